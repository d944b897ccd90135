"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_me import whole
from torch import Tensor

from ebdiff.errors import EbdiffError
from ebdiff.training.checkpoint import Checkpoints

ANY = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}


def of(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((4,), value)}


def steps_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 2, dtype=torch.bfloat16),
        "whole": torch.arange(5),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "view": torch.arange(12.0).view(3, 4).t()[1:],
    }
    facts = {"text": "ü", "list": [1, 2.5, None], "tuple": (0.9, 0.999), "deep": {"x": 1e-300}}
    Checkpoints(tmp_path / "deep" / "er").save(7, tensors, facts)
    saved = whole(Checkpoints(tmp_path / "deep" / "er"))
    assert saved.step == 7
    assert saved.facts == {**facts, "tuple": [0.9, 0.999]}
    assert saved.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)


def test_a_few_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    assert checkpoints.newest_step() is None
    for step in (1, 2, 10, 99999999, 100000000):  # by number: as text the last comes before the one before it
        checkpoints.save(step, of(step), {})
        assert whole(checkpoints).step == checkpoints.newest_step() == step
    assert steps_in(tmp_path) == ["step-100000000", "step-99999999"]


def test_the_one_just_written_stays_even_beside_later_steps(tmp_path: Path) -> None:
    """A run that went back to an older checkpoint, since its newest was damaged."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(10, of(10), {})
    (tmp_path / "step-00000010" / "state.safetensors").write_bytes(b"")
    checkpoints.save(7, of(7), {})
    assert whole(checkpoints).step == 7


def test_the_same_step_twice(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, value in ((3, 0.0), (4, 1.0), (4, 2.0)):
        checkpoints.save(step, of(value), {"value": value})
    saved = whole(checkpoints)
    assert torch.equal(saved.tensors["a"], of(2)["a"])
    assert saved.facts == {"value": 2.0}
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004"]


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, of(1), {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".new-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".old-00000001")
    (tmp_path / ".new-00000003").mkdir()
    assert whole(checkpoints).step == 1
    assert checkpoints.newest_step() == 1
    checkpoints.save(3, of(3), {})
    assert steps_in(tmp_path) == ["step-00000001", "step-00000003"]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [5, 6], ids=["again", "next"])
@pytest.mark.parametrize("name", ["rename", "replace", "fsync"])
def test_a_write_that_is_cut_off_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    """Even where only one is kept and the same step is written again; and the next write succeeds."""
    cut = 0
    for last in range(1, 20):
        checkpoints = Checkpoints(tmp_path / str(last), keep=1)
        checkpoints.save(5, of(0), {})
        left, call = last, getattr(os, name)

        def failing(*args: Any, call: Callable[..., Any] = call) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return call(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                checkpoints.save(step, of(1), {})
            except KeyboardInterrupt:
                cut += 1
        saved = whole(checkpoints)
        assert float(saved.tensors["a"][0]) in (0, 1)
        if left > 0:  # there were fewer calls: the write was completed
            assert float(saved.tensors["a"][0]) == 1
            break
        with monkeypatch.context() as patch:  # the next write is cut off too, before anything is whole
            patch.setattr(os, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(6, of(2), {})
        assert torch.equal(whole(checkpoints).tensors["a"], saved.tensors["a"])
        checkpoints.save(6, of(2), {})
        assert torch.equal(whole(checkpoints).tensors["a"], of(2)["a"])
        assert steps_in(checkpoints.folder) == ["step-00000006"]
    assert cut == {"rename": 2 if step == 5 else 1, "replace": 2, "fsync": 5}[name]


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = place / "state.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip_the_last_bit(place: Path) -> None:
    content = bytearray((place / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "state.safetensors").write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "tensors missing": lambda place: (place / "state.safetensors").unlink(),
    "tensors empty": cut("state.safetensors", 0),
    "tensors truncated": cut("state.safetensors", 0.9),
    "tensors changed": flip_the_last_bit,
    "facts missing": lambda place: (place / "state.json").unlink(),
    "facts truncated": cut("state.json", 0.9),
    "facts another step": edit(lambda content: content.update(step=3)),
    "facts changed": edit(lambda content: content["facts"].update(x=2)),
    "facts without checksum": edit(lambda content: content.pop("sha256")),
    "facts with another checksum": edit(lambda content: content.update(sha256=5)),
    "facts no object": lambda place: (place / "state.json").write_text("[1, 2]"),
    "everything missing": lambda place: [path.unlink() for path in place.iterdir()] and None,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_only_damaged_ones_are_an_error(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, ANY, {"x": 1})
    checkpoints.save(2, ANY, {"x": 1})
    damage(tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match="damaged checkpoint.*step-00000002"):
        saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 1
    damage(tmp_path / "step-00000001")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(EbdiffError, match=r"no whole checkpoint.*start again") as error,
    ):
        checkpoints.newest()
    assert "\n" not in str(error.value)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_keep_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(EbdiffError, match="keep"):
        Checkpoints(tmp_path, keep=0)
