"""Training curves: how timesteps are drawn and weighted, at equal device-seconds, on the embedded images.

    python -m benchmarks.train_samplers --out benchmarks/results

Every sampler trains the same network from the same first weights on the same images and noise; only timesteps and
weights differ. A step costs the same with each of them (drawing takes microseconds), so equal steps are equal
device-seconds: the seconds reported are steps times the median CPU seconds per step over all runs, and each run's own
are beside them. Each run is a process of one thread; finished ones are kept in --work, so the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, pool, write_results
from ebdiff import plots
from ebdiff.config import resolve
from ebdiff.files import read_json, write_json
from ebdiff.training.judge import judgement
from ebdiff.training.loop import train
from ebdiff.training.stretch import dense_state, train_config
from ebdiff.training.world import World

SAMPLERS = {  # name: what the configuration calls it
    "uniform": ["train.sampler=uniform", "train.stratified=false"],
    "uniform, stratified": ["train.sampler=uniform"],
    "SpeeD, paper": ["train.sampler=speed"],
    "SpeeD, released": ["train.sampler=speed-released", "train.stratified=false"],
    "Min-SNR": ["train.sampler=min-snr"],
    "P2": ["train.sampler=p2"],
    "logit-normal": ["train.sampler=logit-normal"],
}
NETWORK = ["model.block_out_channels=[32, 32, 64]", "model.norm_num_groups=8"]
MARKS = 4  # held-out loss at each quarter; images are drawn and scored at the half and at the end


def world_of(name: str, seed: int, work: Path) -> World:
    return World(resolve("demo", overrides=[*NETWORK, *SAMPLERS[name]], seed=seed), work)


def one(name: str, seed: int, steps: int, work: Path) -> None:
    """One run: its network judged, with EMA weights, at each mark."""
    torch.set_num_threads(1)
    world = world_of(name, seed, work)
    state, marks, seconds = dense_state(world), [], 0.0
    for mark in range(1, MARKS + 1):
        began, until = time.process_time(), steps * mark // MARKS
        for _ in train(
            state,
            world.data.train,
            scheduler=world.scheduler,
            sampler=world.sampler,
            config=train_config(world, seed),
            until=until,
        ):
            pass
        seconds += time.process_time() - began
        marks.append({"steps": until, **judged(world, state, scored=mark in (MARKS // 2, MARKS))})
    write_json(place(work, name, seed), {"sampler": name, "seed": seed, "cpu_seconds": seconds, "marks": marks})


def judged(world: World, state: Any, scored: bool) -> dict[str, Any]:
    state.ema.store(state.model.parameters())
    state.ema.copy_to(state.model.parameters())
    facts: dict[str, Any] = {}
    for _ in judgement(world, state.model, "", world.config.evaluate.samples if scored else 0, facts, []):
        pass
    state.ema.restore(state.model.parameters())
    return {"loss": facts["loss"]["total"], "loss_per_bin": facts["loss"]["mean"], "scores": facts["scores"]}


def place(work: Path, name: str, seed: int) -> Path:
    return work / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}.json"


def side_by_side(waiting: list[tuple[str, int]], steps: int, work: Path, parallel: int) -> Iterator[str]:
    """Every run in a process of its own, `parallel` at a time; yields a line for each that ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(run: tuple[str, int]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.train_samplers", "--one", run[0], str(run[1])]
        return subprocess.Popen([*command, "--steps", str(steps), "--work", str(work)], env=environment)

    for (name, seed), code in pool(waiting, start, parallel):
        if code:
            raise SystemExit(f"{name}, seed {seed}: exit code {code}")
        yield f"{name}, seed {seed}: loss {read_json(place(work, name, seed))['marks'][-1]['loss']:.4f}"


def gathered(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per sampler and mark: mean and standard deviation over the seeds."""
    each = statistics.median(run["cpu_seconds"] / run["marks"][-1]["steps"] for run in runs)
    rows = []
    for name, mark in product(dict.fromkeys(run["sampler"] for run in runs), range(MARKS)):
        found = [run["marks"][mark] for run in runs if run["sampler"] == name]
        steps = found[0]["steps"]
        row = {"sampler": name, "steps": steps, "device_seconds": steps * each, "seeds": len(found)}
        measures = {"loss": [entry["loss"] for entry in found]}
        if found[0]["scores"]:
            measures |= {key: [entry["scores"][key] for entry in found] for key in ("fid", "precision", "recall")}
        for key, values in measures.items():
            row[key] = statistics.mean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out loss and FID against device-seconds."""
    panels = []
    for key, label in (("loss", "held-out loss"), ("fid", "FID")):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if key in row:
                series.setdefault(row["sampler"], []).append((row["device_seconds"], row[key]))
        panels.append(plots.Panel(f"{label}, mean over seeds", "device-seconds", label, series, log=key == "loss"))
    plots.lines(panels, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/samplers"), help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, metavar=("SAMPLER", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], int(args.one[1]), args.steps, args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [(name, seed) for seed, name in product(range(args.seeds), SAMPLERS)]
    waiting = [run for run in wanted if not place(args.work, *run).exists()]
    for line in side_by_side(waiting, args.steps, args.work, args.parallel):
        print(line, flush=True)
    runs = [read_json(place(args.work, *run)) for run in wanted]
    rows = gathered(runs)
    command = f"python -m benchmarks.train_samplers --steps {args.steps} --seeds {args.seeds}"
    config = world_of("uniform", 0, args.work).config.model_dump(mode="json")
    facts = {"command": command, "machine": {**machine("cpu"), "threads": 1}, "config": config}
    write_results(args.out, "samplers", {**facts, "rows": rows, "runs": runs})
    draw(rows, args.out / "samplers.png")


if __name__ == "__main__":
    main()
