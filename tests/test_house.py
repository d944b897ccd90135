"""The house rules of CONTRIBUTING.md that a machine can check: who imports whom, what is public, what never happens."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import ebdiff

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ebdiff"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

EVERYONE = {"errors", "files", "numbers", "seeds"}
# room (or module) -> the rooms and modules it may import, besides itself and the four above
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "numbers": set(),
    "seeds": set(),
    "assets": set(),
    "kernels": set(),
    "ops": {"kernels", "_C"},
    "nn": {"ops"},
    "nn.router": {"ops", "timesteps.region"},  # routes by a Partition
    "nn.replace.optimizer": {"ops", "optim"},  # gives an optimizer its faster class
    "pruning": {"ops", "nn"},
    "timesteps": {"ops"},
    "tickets": {"pruning", "timesteps.region", "ops.block_mask", "nn.attention_calls"},
    "optim": {"ops"},
    "evaluation": {"timesteps", "pruning", "data"},
    "data": set(),
    "config": set(),
    "training": {"pruning", "tickets", "timesteps", "nn", "optim", "evaluation", "data", "config"},
    "report": {"training", "timesteps", "report_text", "report_tables", "report_verdict", "plots"},
    "dry_run": {"training", "pruning"},
    "report_text": {"report_tables", "report_verdict"},
    "report_tables": {"report_verdict"},
    "report_verdict": set(),
    "plots": set(),
    "progress": set(),
    "__main__": {"cli"},
}
MAY_IMPORT_EVERYTHING = {"", "cli", "info"}  # "": the front door; info is a command's body

# fmt: off
PUBLIC = [
    "ChannelMask", "ChannelPlan", "EarlyBird", "EbdiffError", "MaskHistory", "NoiseProfile", "Partition", "Region",
    "SpeeD", "StepReport", "Stratified", "Ticket", "TimestepRouter", "Uniform", "Within", "accelerate", "distance",
    "importance", "load", "masked", "nn", "ops", "optim", "restore", "save", "shrink", "shrink_", "timesteps", "trace",
    "train",
]
# fmt: on


def module_of(path: Path) -> str:
    """ebdiff/nn/router.py -> nn.router; kernels/x.py -> kernels.x; a package is named like its folder."""
    home = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    parts = path.relative_to(home).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imports_of(path: Path) -> set[str]:
    """Every module that `path` imports anywhere, by its full name: "torch.nn", "ebdiff.ops.group_norm"."""
    package = ["ebdiff", *module_of(path).split(".")]
    package = [part for part in (package if path.name == "__init__.py" else package[:-1]) if part]
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from ..nn import group_norm` names a module, `from ..errors import EbdiffError` does not.
            found |= {f"{stem}.{a.name}" if is_module(f"{stem}.{a.name}") else stem for a in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ebdiff":
            home = ebdiff._HOME.get(node.attr)  # through the front door
            found |= {f"ebdiff.{home}"} if home else set()
    return found - {"ebdiff"}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=module_of)
def test_imports_go_one_way_only(path: Path) -> None:
    module = module_of(path)
    room = module.split(".")[0]
    if room in MAY_IMPORT_EVERYTHING:
        return
    assert room in MAY_IMPORT, f"{path} is in no room of the design"
    allowed = MAY_IMPORT.get(module, MAY_IMPORT[room]) | EVERYONE | {room}
    inside = {name.removeprefix("ebdiff.") for name in imports_of(path) if name.startswith("ebdiff.")}
    wrong = {name for name in inside if not any(is_within(name, door) for door in allowed)}
    assert not wrong, f"{module} may import {sorted(allowed)} only"


@pytest.mark.parametrize("path", [*SOURCES, *KERNELS], ids=module_of)
def test_heavy_packages_stay_optional(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports_of(path)}
    assert not outside & {"torchvision", "transformers", "torch_pruning", "wandb"}
    if path not in KERNELS:
        assert "triton" not in outside
    at_the_top = {
        name.split(".")[0]
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert "datasets" not in at_the_top
    if module_of(path).split(".")[0] in {"timesteps", "ops", "pruning", "tickets", "data", "config"}:
        assert "diffusers" not in at_the_top


def test_public_names_are_pinned() -> None:
    assert ebdiff.__all__ == sorted(PUBLIC)
    assert len(ebdiff.__all__) <= 30
    assert set(PUBLIC) <= set(dir(ebdiff))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    found = getattr(ebdiff, name)
    assert found.__name__ == (f"ebdiff.{name}" if isinstance(found, ModuleType) else name)
    assert own_doc(found), f"ebdiff.{name} has no docstring"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="Earlybird"):
        ebdiff.Earlybird  # noqa: B018
    assert not hasattr(ebdiff, "ShrunkNothing")


def modules_loaded_by(code: str) -> set[str]:
    """What `code` adds to sys.modules in a fresh interpreter that has imported torch."""
    report = "print(json.dumps(sorted(set(sys.modules) - before)))"
    script = f"import sys, json, torch\nbefore = set(sys.modules)\n{code}\n{report}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(result.stdout))


def test_importing_ebdiff_costs_nothing_beyond_torch() -> None:
    assert modules_loaded_by("import ebdiff") == {"ebdiff"}


def test_search_and_samplers_load_neither_diffusers_nor_triton() -> None:
    names = [name for name in PUBLIC if name not in ("TimestepRouter", "StepReport", "train")]
    loaded = modules_loaded_by(f"import ebdiff\n{'; '.join(f'ebdiff.{name}' for name in names)}")
    assert {name.split(".")[0] for name in loaded} & {"diffusers", "triton", "matplotlib", "transformers"} == set()


PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING = {
    "torch.save",
    "torch.load",
    "torch.package",
    "torch.jit.load",
    "torch.serialization",
    "accelerator.save_state",
}
UNSAFE = {("allow_pickle", True), ("weights_only", False)}
# Inception weights come as .pth from elsewhere; they are read as tensors only, before torch-fidelity reads them.
FOREIGN = {"evaluation.features": ["torch.load"]}


def pickles_in(source: str) -> Iterator[str]:
    """Everything in `source` that pickles or unpickles, accelerate's save_state included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS | PICKLING)
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module).split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (name for name in names if name in PICKLERS | PICKLING)
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in PICKLING or node.attr == "save_state"):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            yield from (f"{key}={value}" for key, value in UNSAFE if (node.arg, node.value.value) == (key, value))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.save(x, f)",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "accelerator.save_state(d)",
    ],
)
def test_the_search_for_pickles_finds_them(source: str) -> None:
    assert list(pickles_in(source))


@pytest.mark.parametrize("folder", ["ebdiff", "kernels", "benchmarks", "examples", "build_tools"])
def test_nothing_is_pickled(folder: str) -> None:
    paths = {"ebdiff": SOURCES, "kernels": KERNELS}.get(folder) or sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {module_of(path): list(pickles_in(path.read_text(encoding="utf-8"))) for path in paths}
    assert {name: words for name, words in found.items() if words != FOREIGN.get(name, [])} == {}


def test_files_hold_one_idea_each() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in [*SOURCES, *KERNELS]}
    assert {path: n for path, n in lengths.items() if n > 350} == {}


def own_doc(thing: object) -> str | None:
    """The docstring somebody wrote: not the signature that @dataclass makes up."""
    doc = inspect.getdoc(thing)
    made_up = isinstance(thing, type) and doc is not None and doc.startswith(f"{thing.__name__}(")
    return None if made_up else doc


def public_things(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) not in (module.__name__, "ebdiff"):
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield name, thing
        if inspect.isclass(thing) and not getattr(thing, "_is_protocol", False):
            kinds = (FunctionType, property, classmethod, staticmethod)
            members = {key: m for key, m in vars(thing).items() if not key.startswith("_") and isinstance(m, kinds)}
            yield from ((f"{name}.{key}", getattr(thing, key)) for key in members)  # overrides inherit a docstring


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__main__.py"], ids=module_of)
def test_everything_public_is_documented(path: Path) -> None:
    module = importlib.import_module(".".join(filter(None, ["ebdiff", module_of(path)])))
    things = dict(public_things(module))
    assert not things or module.__doc__, f"{path} does not say what it is for"
    assert [name for name, thing in things.items() if not own_doc(thing)] == []
