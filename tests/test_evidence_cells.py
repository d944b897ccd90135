"""Cells of benchmarks/evidence: every arm is a valid configuration, and what is killed goes on."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import pace, page
from benchmarks.evidence.__main__ import cells_of, jobs_of, lines, options, with_results
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.cells import Cell, Failed, run, wanted
from benchmarks.evidence.rates import Tried
from benchmarks.evidence.result import portable, unplaced, widths
from benchmarks.evidence.suite import NAMES, SearchPace, Suite
from ebdiff.errors import EbdiffError
from ebdiff.files import read_json, write_bytes, write_json
from ebdiff.training import job
from ebdiff.training.accounting import FORWARD_AND_BACKWARD
from ebdiff.training.regions import joint_mask, steps_of, ticket_of
from ebdiff.training.stages import locked
from ebdiff.training.world import World


def mini() -> Suite:
    """fashion16 with a network, steps and images small enough for a test."""
    suite = Suite.load("fashion16")
    base = {
        **suite.base,
        "model": {
            **suite.base["model"],
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "add_attention": False,
            "norm_num_groups": 4,
        },
        "data": {"source": "fashion16", "limit": 64},
        "train": {**suite.base["train"], "batch_size": 4, "checkpoint_every": 3, "log_every": 2},
        "sample": {"steps": 3, "batch_size": 6, "grid": 4},
        "evaluate": {"samples": 6, "loss_bins": 4, "loss_per_bin": 4},
    }
    search = SearchPace(steps=4, most=9, window=3, every=1, epoch=2)
    few = {"marks": (0.25, 0.5, 1.0), "score_marks": (0.5, 1.0), "dense_score_marks": (1.0,)}
    return replace(suite, name="mini", arguments="--suite mini", steps=12, search=search, base=base, **few)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Makes the cell of an arm."""
    return lambda arm, suite=None: Cell(suite or mini(), ARMS[arm], 0, tmp_path / "runs", tmp_path / "res")


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_every_suite_can_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite.load(name).on(None if name == "fashion16" else "images.npz")
    dense = World(Cell(suite, ARMS["dense"], 0, tmp_path).config, tmp_path)
    monkeypatch.setattr(World, "plan", dense.plan)  # one network in all arms: traced once
    monkeypatch.setattr(World, "device", None)  # a suite for a GPU can be checked without one
    for arm in ARMS.values():
        world = World(suite.config(arm.overrides(suite), seed=0), tmp_path / arm.name)
        world.check(images=False)


def test_every_stage_is_timed_with_its_own_network(tmp_path: Path) -> None:
    suite = mini()
    config = suite.config(ARMS["regions-30-60-80-speed-budgeted-branch-25"].overrides(suite), 0)
    world = World(config, tmp_path)
    job.prepare(world)
    list(job.find(world))
    masks = [ticket_of(world, number).mask for number in range(3)]
    timed = pace.stages(world, widths(world), after=False)
    sizes = [sum(p.numel() for p in stage.start().model.parameters()) for stage in timed.values()]
    kept = [None, joint_mask(masks), *masks]  # the search is of the whole network
    assert sizes == [world.plan.parameters(mask) for mask in kept]


def test_a_suite_needs_its_images_and_a_name() -> None:
    with pytest.raises(EbdiffError, match="--data FILE"):
        Suite.load("cifar32").on(None)
    with pytest.raises(EbdiffError, match=r"one of .*fashion16"):
        Suite.load("fashion61")
    with pytest.raises(EbdiffError, match="no such arm"):
        cells_of(mini(), ["eb-speed-60"], "0", Path(), Path())
    with pytest.raises(EbdiffError, match="--seeds"):
        cells_of(mini(), ["*"], "0,x", Path(), Path())


def test_what_an_arm_starts_from_comes_first(made: Any) -> None:
    pruned, scratch = made("prune-random-50"), made("scratch-50")
    assert [cell.arm.name for cell in wanted([scratch, pruned])] == ["scratch-50", "dense", "prune-random-50"]
    assert [cell.arm.name for cell in wanted([pruned, made("dense")])] == ["dense", "prune-random-50"]


def test_without_time_nothing_starts(made: Any) -> None:
    assert list(run([made("dense")], jobs=1, minutes=0)) == ["mini: dense, seed 0: not begun"]
    assert not made("dense").folder.exists()


def test_a_cell_from_a_kill_to_its_page(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(("first", "second", "end"))
    monkeypatch.setattr("benchmarks._commit", lambda: next(commits))
    cell = made("eb-speed-50")
    first = cell.start()
    until = time.monotonic() + 300
    while not list(cell.folder.glob("search/checkpoints/step-*")) and first.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    first.kill()
    first.wait()
    (line,) = run([cell], jobs=1)
    assert line.startswith("mini: eb-speed-50, seed 0: "), line
    facts = cell.facts()
    (region,) = steps_of(World(cell.config, tmp_path / "nowhere"))
    end = facts["curve"][-1]
    stages = end["stages"]
    assert [stage["steps"] for stage in stages.values()] == [4, region]
    assert [point["share"] for point in facts["curve"]] == [0.25, 0.5, 1.0]
    assert [point["fid"] is not None for point in facts["curve"]] == [False, True, True]
    assert end["device_seconds"] == pytest.approx(sum(s["device_seconds"] for s in stages.values()))
    dense_step = facts["macs_per_image"]["dense"] * FORWARD_AND_BACKWARD * 4
    assert stages["search"]["macs"] == 4 * dense_step
    assert facts["parameters"]["stored"] < facts["parameters"]["dense"]
    assert facts["machine"]["commit"] == "first, second"
    assert str(tmp_path) not in cell.place.read_text()
    assert wanted([cell]) == []
    assert not list(cell.folder.rglob("checkpoints"))
    monkeypatch.undo()
    shutil.rmtree(cell.folder)  # results are enough for a clock
    names = ("regions-30-60-80-speed-budgeted-branch-25", "prune-random-50", "dense-accelerated")
    others = [made(name) for name in (*names, "dense")]  # without results
    seconds, of = pace.clock([*others, cell], rounds=1)
    assert seconds.keys() == of.keys()
    clock = {"seconds_per_step": seconds, "timed": of}
    assert page.seconds_of(clock, {cell.arm.name: [facts]}) == seconds
    wider = {**facts, "widths": {"region 0": {name: 1 + width for name, width in facts["widths"]["region 0"].items()}}}
    other = {**facts, "config": made("eb-speed-30").config.model_dump(mode="json")}  # searches for another ticket
    joined = {**facts, "widths": {**facts["widths"], "joint": {"any": 9}}}
    assert page.seconds_of(clock, {cell.arm.name: [facts, joined]}) == seconds
    for several in ([wider], [facts, other]):
        assert page.seconds_of(clock, {cell.arm.name: several}).keys() == seconds.keys() - {cell.arm.name}
    assert not page.seconds_of({"seconds_per_step": seconds}, {cell.arm.name: [facts]}).get(cell.arm.name)
    assert set(seconds) == {cell.arm.name, *names[1:], "dense"}  # how wide a joint network will be is not known
    assert set(seconds[cell.arm.name]) == set(stages)
    assert set(seconds["prune-random-50"]) == {"before", "search", "region 0"}
    with pytest.raises(EbdiffError, match="widths are known"):
        pace.clock(others[:1])
    assert seconds["prune-random-50"]["region 0"] == seconds[cell.arm.name]["region 0"]  # timed once
    assert all(second > 0 for of in seconds.values() for (second,) in of.values())
    text = page.write(cell.suite, [cell, made("scratch-50")]).read_text()
    assert "No dense arm is finished" in text
    assert "- scratch-50, seed 0: no result" in text
    assert "- eb-speed-50" not in text


def test_stages_share_a_time_where_networks_and_layers_and_what_they_do_are_the_same(made: Any) -> None:
    names = ("dense", "dense-min-snr", "dense-accelerated", "eb-speed-50", "control-random", "prune-random-50")
    keys = {}
    for name in names:
        cell = made(name)
        world = World(cell.config.model_copy(update={"pretrained": None}), Path("nowhere"))
        timed = pace.stages(world, pace.widths_found(cell, world), after=cell.before is not None)
        keys[name] = {stage: pace.key_of(world, stage, stretch) for stage, stretch in timed.items()}
    regions = {name: of["region 0"] for name, of in keys.items()}
    assert regions["dense"] == regions["dense-min-snr"]
    assert regions["eb-speed-50"] == regions["control-random"] == regions["prune-random-50"]
    assert len({regions[name] for name in ("dense", "dense-accelerated", "eb-speed-50")}) == 3
    assert keys["eb-speed-50"]["search"] != keys["control-random"]["search"]  # random scores take no gradients
    assert keys["prune-random-50"]["before"] == regions["dense"] != keys["eb-speed-50"]["search"]


def test_a_result_of_another_configuration_is_none(made: Any) -> None:
    cell = made("dense")
    config = cell.config.model_dump(mode="json")
    write_json(cell.place, {"config": config})
    assert cell.facts() is not None
    del config["train"]["weight_decay"]  # as if the key were newer than the result
    write_json(cell.place, {"config": config})
    assert cell.facts() is not None
    for damaged in ("{", "{}", "[]"):
        cell.place.write_text(damaged)
        assert cell.facts() is None
    config["train"]["lr"] = 0.5
    write_json(cell.place, {"config": config})
    assert cell.facts() is None
    write_json(cell.place, {"config": {**config, "gone": 1}})
    assert cell.facts() is None


def test_tuning_tries_as_much_for_a_ticket_as_for_the_dense_arm(tmp_path: Path) -> None:
    suite = replace(mini(), lrs=(1e-3, 2e-3))
    cells = page.tuning(suite, tmp_path, tmp_path)
    assert {(cell.arm.name, cell.config.train.lr) for cell in cells} == {
        (arm, lr) for arm in ("dense", "eb-speed-50") for lr in (1e-3, 2e-3)
    }
    assert cells[0].config.regions.steps == [3]
    assert len({cell.folder for cell in cells}) == len({cell.place for cell in cells}) == 4
    write_json(cells[1].place, {"config": cells[1].config.model_dump(mode="json"), "curve": [{"loss": 0.5, "fid": 9}]})
    assert "| 0.001 | eb-speed-50 | 0.5000 | 9.00 |" in page.write_tuning(suite, cells).read_text()
    assert cells[0].command == "python -m benchmarks.evidence --suite mini --tune"
    assert page.tried(suite, tmp_path, tmp_path) == []  # not all of it
    for cell in cells:
        write_json(cell.place, {"config": cell.config.model_dump(mode="json"), "curve": [{"loss": 0.5, "fid": None}]})
    assert page.tried(suite, tmp_path, tmp_path) == [
        Tried(lr, arm, 0.5, None) for lr in (1e-3, 2e-3) for arm in ("dense", "eb-speed-50")
    ]


def test_what_a_step_costs_is_measured_at_every_ratio_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebdiff.training.stretch.store", lambda *given: pytest.fail("a checkpoint was written"))
    suite = mini()
    seconds = pace.ratio_costs(suite, rounds=1)
    assert list(seconds) == [*(("local", ratio) for ratio in suite.cost_of_step), ("cost", 0.44)]
    assert all(each > 0 for (each,) in seconds.values())


def test_a_run_of_another_configuration_is_in_the_way(made: Any) -> None:
    cell = made("dense")
    write_bytes(cell.folder / "config.yaml", made("dense-speed").config.to_yaml().encode())
    (line,) = run([cell], jobs=1)
    assert isinstance(line, Failed)
    assert "train.sampler" in line
    assert f"remove {cell.folder}" in line
    assert not cell.log.exists()


def test_a_cell_that_another_process_is_at_is_left_to_it(made: Any) -> None:
    cell = made("dense")
    with locked(cell.folder):
        (line,) = run([cell], jobs=1)
    assert isinstance(line, Failed)
    assert f"another process works in {cell.folder}" in line
    assert cell.begun_on() == []  # it did not begin, so its result will not say so
    assert cell.obstacle() == ""


def test_a_suite_says_what_a_step_costs() -> None:
    suite = replace(mini(), cost_of_step={0.0: 1.0, 0.5: 0.4})
    with pytest.raises(
        EbdiffError, match=r"mini: cost_of_step: expected what a step costs at 0\.6 removed, got 0, 0\.5"
    ):
        suite.price(0.6)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fashion16", "fashion16"),
        ("/here/images.npz", "images.npz"),
        ("latents:/here/faces.safetensors", "latents:faces.safetensors"),
        ("hf:one/cifar", "hf:one/cifar"),
    ],
)
def test_results_name_data_and_no_folder(text: str, name: str) -> None:
    assert unplaced(text) == name


def test_a_result_stays_when_its_network_is_trained_again(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, dense = made("prune-random-50"), made("dense")
    write_json(dense.place, {"config": portable(dense.config), "curve": "as it was"})
    assert wanted([pruned]) == [dense, pruned]
    monkeypatch.setattr("benchmarks.evidence.cells.keep_dense", lambda world, folder: None)
    (dense.folder / "region-0" / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert "stays" in dense.finish()
    assert not list(dense.folder.rglob("checkpoints"))
    assert read_json(dense.place)["curve"] == "as it was"


def test_a_page_forgets_no_result(made: Any) -> None:
    cell = made("dense")
    other = replace(cell, seed=7)
    write_json(other.place, {"config": portable(other.config)})
    assert with_results([cell]) == [cell, other]
    args = options().parse_args(["--suite", "fashion16", "--table", "--cells", "eb-*"])
    with pytest.raises(EbdiffError, match="expected no --cells"):
        list(lines(args))


def test_cells_of_different_images_share_no_page(made: Any) -> None:
    cells = [made("dense"), made("eb-speed-50")]
    for number, cell in enumerate(cells):
        data = {"name": "images", "fingerprint": str(number)}
        write_json(cell.place, {"config": portable(cell.config), "data": data})
    with pytest.raises(EbdiffError, match=r"different images.* dense-0, eb-speed-50-0"):
        page.write(mini(), cells)


def test_the_clock_knows_every_seed_that_the_page_shows(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(made("dense"), suite=Suite.load("fashion16"), seed=7)
    write_json(other.place, {"config": portable(other.config)})
    given: list[Any] = []
    monkeypatch.setattr(page, "write_clock", lambda suite, cells: given.extend(cells))
    paths = ["--out", str(other.out), "--results", str(other.results)]
    list(lines(options().parse_args(["--suite", "fashion16", "--clock", "--seeds", "0", *paths])))
    assert other in given


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_gpu_by_any_name_runs_one_cell_at_a_time(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    base = {key: value for key, value in mini().base.items() if key != "device"}
    assert jobs_of(replace(mini(), base={**base, "device": "cpu"}), 2) == 2
    always, perhaps = ({"device": "cuda"}, {"device": "cuda:0"}), ({"device": "auto"}, {"device": None}, {})
    for device in (*always, *(perhaps if has_gpu else ())):
        suite = replace(mini(), base={**base, **device})
        assert jobs_of(suite, None) == 1
        with pytest.raises(EbdiffError, match="CUDA_VISIBLE_DEVICES"):
            jobs_of(suite, 2)
    if not has_gpu:
        assert {jobs_of(replace(mini(), base={**base, **device}), 2) for device in perhaps} == {2}


def test_on_a_gpu_cells_run_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs_of(Suite.load("gpu-cifar32"), None) == 1
    assert jobs_of(Suite.load("fashion16"), 3) == 3
    with pytest.raises(EbdiffError, match="CUDA_VISIBLE_DEVICES"):
        jobs_of(Suite.load("gpu-cifar32"), 2)
    for jobs in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            options().parse_args(["--suite", "fashion16", "--jobs", jobs])
    assert "at least 1" in capsys.readouterr().err


def test_a_command_names_its_images(tmp_path: Path) -> None:
    suite = Suite.load("cifar32").on("somewhere/images.npz")
    command = "python -m benchmarks.evidence --suite cifar32 --data images.npz --cells dense --seeds 0"
    assert Cell(suite, ARMS["dense"], 0, tmp_path).command == command
    named = Suite.load("cifar32").on("hf:somebody/images:plain")
    assert named.arguments == "--suite cifar32 --data hf:somebody/images:plain"


def test_a_failed_cell_names_its_log(made: Any) -> None:
    suite = replace(mini(), base={**mini().base, "data": {"source": "nothing.npz"}})
    cell = made("dense", suite=suite)
    (line,) = run([cell], jobs=1)
    assert isinstance(line, Failed)
    assert "FAILED: ebdiff: no images there" in line
    assert str(cell.log) in line


def test_cells_are_listed(tmp_path: Path) -> None:
    args = options().parse_args(["--suite", "fashion16", "--list", "--seeds", "1", "--out", str(tmp_path)])
    args.results = tmp_path
    assert len(list(lines(args))) == len(ARMS)
    assert next(iter(lines(args))) == "dense, seed 1: -; the whole network, timesteps uniform"
