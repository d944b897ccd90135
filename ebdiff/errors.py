"""The one error a user sees: what was expected, what came, and what to do about it."""

from __future__ import annotations

__all__ = ["EbdiffError"]


class EbdiffError(ValueError):
    """Bad input, refused before anything was changed. The command line prints it and exits with 2.

    Args:
        problem: what is wrong, in a few words.
        expected: what would have been right.
        got: what came instead.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, *, expected: str = "", got: str = "", remedy: str = "") -> None:
        facts = ", ".join(f"{word} {fact}" for word, fact in (("expected", expected), ("got", got)) if fact)
        super().__init__("; ".join(part for part in (f"{problem}: {facts}" if facts else problem, remedy) if part))
