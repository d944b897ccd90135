"""A CPU part under AddressSanitizer and UndefinedBehaviorSanitizer, and a command run against it.

python -m build_tools.sanitize FOLDER COMMAND ...     builds in FOLDER, then runs COMMAND with it in place of ebdiff._C
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .build import ROOT, build
from .plan import SANITIZE
from .settings import Settings
from .tools import find_compiler

__all__ = ["environment", "main"]

LOADS = """
from ebdiff.ops import native
assert "-fsanitize" in native.facts().get("flags", ""), native.why_not() or "another module was loaded"
"""


def environment(module: Path) -> dict[str, str]:
    """The variables under which an ordinary Python loads a sanitized module.

    The sanitizer's runtime has to come before everything else, and libstdc++ with it, so that it sees exceptions.
    Leaks are not looked for: Python and torch keep what they have until the end.
    """
    compiler = find_compiler().command
    runtimes = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": ":".join(str(Path(path).resolve()) for path in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "EBDIFF_C_PATH": str(module),
    }


def main(folder: str, *command: str) -> int:
    """Build, run the command, return its exit code; 1 where the module could not be built or does not load."""
    outcome = build(Settings("cpu", werror=True), Path(folder).resolve(), SANITIZE)
    if outcome.module is None:
        why = outcome.missing["cpu"]
        print(why.output, f"{why.problem}; {why.remedy}", sep="\n", file=sys.stderr)
        return 1
    variables = os.environ | environment(outcome.module)
    # Where it does not load, the references would serve, and every test would pass without it.
    loads = subprocess.run([sys.executable, "-c", LOADS], env=variables, cwd=ROOT).returncode
    return loads or (subprocess.run(command, env=variables).returncode if command else 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
