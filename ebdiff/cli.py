"""The commands of a run, and encode and info. Each checks everything before it touches anything."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import EbdiffError

if TYPE_CHECKING:
    from .training.stages import Tick, Work
    from .training.world import World
else:
    World = Any  # a command's signature is read, and must not import torch

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Early-bird tickets for diffusion models: find them early, shrink physically, train each region small.",
)
console = Console(markup=False)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As train.lr=1e-4.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as an option.")]
File = Annotated[Path | None, typer.Option("--config", help="A YAML file on top of the preset, or one that is whole.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="smoke, demo (the default); of EB-Diff-Train cifar10, celeba, lsun-church, lsun-bedroom, imagenet-ldm; "
        "of SpeeD metfaces-dit, metfaces-unet, ffhq-dit, ffhq-unet."
    ),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/<preset> by default.")]
Seed = Annotated[int | None, typer.Option(help="Overrides the configuration's.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; touch nothing.")]
Measure = Annotated[bool, typer.Option("--measure", help="With --dry-run: time a step; estimate device-seconds.")]
Parallel = Annotated[int, typer.Option(min=1, help="So many regions side by side, as local processes.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop after so many; the same command goes on.")]
Drawn = Annotated[
    str | None, typer.Option("--sampler", help='Of timesteps: speed (the default), "speed(k=2)", uniform, ...')
]
BranchAt = Annotated[int | None, typer.Option(min=0, help="First train one joint ticket for so many steps.")]
Conditional = Annotated[
    bool, typer.Option("--conditional", help="Tell the network each image's label, and guide drawing by it.")
]
Arm = Annotated[str, typer.Option(help="tickets (the router) or dense (the control).")]
Model = Annotated[Path | None, typer.Option(help="Any saved network instead: a router, a ticket's or a dense one.")]


def _world(
    overrides: Overrides = None,
    config: File = None,
    preset: Preset = None,
    sets: Sets = None,
    out: Out = None,
    seed: Seed = None,
    sampler: Drawn = None,
    branch_at: BranchAt = None,
    conditional: Conditional = False,
) -> World:
    """The run that the options mean. A folder that holds one already gives the configuration, if no other is named."""
    from .config import FILE, resolve

    short = {"train.sampler": sampler, "regions.branch_at": branch_at, "conditional": "{}" if conditional else None}
    changes = [f"{key}={value}" for key, value in short.items() if value is not None]
    kept = out / FILE if out is not None else None
    if config is None and preset is None and kept is not None and kept.exists():
        config = kept
    resolved = resolve(preset, config, [*(sets or []), *changes, *(overrides or [])], seed)
    out = out or Path("runs") / (config.stem if config is not None and preset is None else preset or "demo")
    from .training.world import World

    return World(resolved, out)


def _command(name: str | None = None, *, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], None]:
    """A command whose first parameter, `world`, is the run that the options of `_world` mean: it gets them, too.

    Args:
        name: by default the function's.
        without: options that it does not get.
    """

    def register(command: Callable[..., None]) -> None:
        options = [p for p in inspect.signature(_world, eval_str=True).parameters.values() if p.name not in without]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def with_world(**given: Any) -> None:
            command(_world(**{option.name: given.pop(option.name) for option in options}), **given)

        with_world.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        app.command(name)(with_world)

    return register


def main() -> None:
    """Run a command; what the user can put right is one line on stderr and exit code 2."""
    try:
        app()
    except (EbdiffError, OSError) as error:
        print(f"ebdiff: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:  # typer makes one of a KeyboardInterrupt
        if end.code == 130:
            print("ebdiff: interrupted; the same command resumes", file=sys.stderr)
        raise


@_command()
def run(
    world: World,
    dry_run: Dry = False,
    measure: Measure = False,
    parallel: Parallel = 1,
    minutes: Minutes = None,
) -> None:
    """The main job: search, tickets, region training, router, dense control, report. To resume, run it again."""
    from .dry_run import planned
    from .training import job

    if planned(world, job.work, console, dry_run, measure):
        return
    _go(world, lambda: job.run(world, parallel), job.work, minutes)
    from . import report

    path, sentence = report.write(world)
    console.print(sentence, highlight=False, soft_wrap=True)
    pictures = ", ".join(str(picture) for picture in sorted(world.out.glob("*.png")))
    console.print(f"report: {path}\npictures: {pictures}", highlight=False, soft_wrap=True)


@_command()
def find(
    world: World,
    dry_run: Dry = False,
    measure: Measure = False,
    minutes: Minutes = None,
) -> None:
    """Only the dense search: a ticket for each region, in <out>/search/tickets."""
    from .dry_run import planned
    from .training import job
    from .training.regions import ticket_of

    works = lambda world: job.work(world)[:1]  # noqa: E731
    if planned(world, works, console, dry_run, measure):
        return
    _go(world, lambda: job.find(world), works, minutes)
    for number in range(len(world.partition)):
        console.print(f"{world.out / 'search' / 'tickets' / str(number)}: {ticket_of(world, number)}", highlight=False)


@_command()
def train(
    world: World,
    dry_run: Dry = False,
    measure: Measure = False,
    region: Annotated[int | None, typer.Option(help="The region's number, ascending in t; all by default.")] = None,
    parallel: Parallel = 1,
    minutes: Minutes = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train the small network of one region, or of all, from a finished search. To resume, run it again."""
    from .dry_run import planned
    from .training import job
    from .training.regions import ticket_of
    from .training.stages import while_alive

    wanted = range(len(world.partition)) if region is None else [world.region_number(region)]

    def works(world: World) -> list[Work]:
        names = ["joint", *(f"region {number}" for number in wanted)]
        return [work for work in job.work(world) if work.stage in names]

    if planned(world, works, console, dry_run, measure):
        return
    for number in wanted:
        ticket_of(world, number)
    _go(world, lambda: while_alive(job.train(world, wanted, parallel), parent), works, minutes)


@_command(without=["overrides"])
def merge(
    world: World,
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of trained regions; the run's own.")] = None,
    dry_run: Dry = False,
) -> None:
    """Compose the regions' networks into one router, in <out>/router; they must tile the schedule."""
    from .training import job

    parts = job.parts(world, folders or ())
    for part, folder in parts:
        console.print(f"{part}: {folder}", highlight=False)
    if not dry_run:
        console.print(f"router: {job.merge(world, folders or ())}", highlight=False)


@_command()
def sample(
    world: World,
    dry_run: Dry = False,
    arm: Arm = "tickets",
    model: Model = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    label: Annotated[int | None, typer.Option(min=0, help="Of all images; by default every label in turn.")] = None,
    to: Annotated[Path | None, typer.Option(help="The picture; <out>/sample-<arm>.png by default.")] = None,
) -> None:
    """Draw images by DDIM and put them into one picture; where the network is told labels, sorted by them."""
    to = to or world.out / f"sample-{model.name if model else arm}.png"
    if to.suffix.lower() != ".png":
        raise EbdiffError("--to", expected="a .png", got=str(to), remedy="name it so")
    network = _network(world, arm, model)
    if dry_run:
        console.print(f"{n} images in {world.config.sample.steps} steps to {to}", highlight=False)
        return
    import torch

    from .plots import grid
    from .training.sampling import draw_images, drawn_about, in_turn, of_label

    seed, labels = world.config.seed, None
    if label is not None:
        labels = of_label(world, label, n)
    elif world.classes:
        labels = in_turn(world, n)
    about = drawn_about(world, n, seed)
    images = torch.cat(list(draw_images(world, network.to(world.device), about, seed, labels)))
    grid({"": images}, to)
    console.print(f"{n} images: {to}", highlight=False)


@_command("eval")
def evaluate(
    world: World,
    dry_run: Dry = False,
    arm: Arm = "tickets",
    model: Model = None,
) -> None:
    """Score a network: FID, KID, precision and recall with the extractor's name, and the held-out loss."""
    world.check()
    network = _network(world, arm, model)
    from .evaluation import Scores
    from .training.judge import judgement, judging_one

    work = judging_one(world, network)
    if dry_run:
        from .dry_run import show_stages

        return show_stages(world, [work], console)
    from .progress import follow

    facts: dict[str, Any] = {}
    count = world.config.evaluate.samples if world.extractor else 0
    follow(judgement(world, network, work.stage, count, facts, []), [work], console)
    scores = Scores(**facts["scores"]) if facts["scores"] else "no extractor, so no scores"
    console.print(f"{scores}; held-out loss {facts['loss']['total']:.4f}", highlight=False, soft_wrap=True)


@app.command()
def encode(
    vae: Annotated[Path, typer.Option(help="A folder that diffusers' AutoencoderKL.save_pretrained wrote.")],
    out: Annotated[Path, typer.Option(help="The file, .safetensors.")],
    data: Annotated[str, typer.Option(help="Images, as data.source of a configuration.")] = "fashion16",
    size: Annotated[int | None, typer.Option(min=1, help="Scale and crop them to so many pixels.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many in each split.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    dry_run: Dry = False,
) -> None:
    """Make the latents of images, to train on with data.source=latents:<out> and data.vae=<vae>."""
    if out.suffix != ".safetensors" or out.exists():
        got = f"{out}, which is there already" if out.exists() else str(out)
        raise EbdiffError("--out", expected="a new file, .safetensors", got=got, remedy="name another")
    import torch

    from .data import encode as encoded
    from .data import load_images, load_vae
    from .progress import follow
    from .training.stages import Tick, Work

    images = load_images(data, size=size, channels=channels, limit=limit)
    network = load_vae(vae).to("cuda" if torch.cuda.is_available() else "cpu")
    count = len(images.train) + len(images.test)
    steps = encoded(images, network, out, batch_size)
    if not dry_run:
        follow((Tick("encode", number, "images") for number in steps), [Work("encode", count)], console)
    touched = "; nothing was touched" if dry_run else ""
    console.print(f"latents of {count} images: {out}{touched}", highlight=False, soft_wrap=True)


@app.command()
def info(
    folder: Annotated[Path | None, typer.Argument(help="A ticket, a saved network or a run.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="linear, scaled_linear, squaredcos_cap_v2, sigmoid, flow, edm, vp, sub_vp or ve.")
    ] = None,
    timesteps: Annotated[int, typer.Option(min=2, help="The schedule's.")] = 1000,
    beta_start: Annotated[float, typer.Option(help="The schedule's.")] = 1e-4,
    beta_end: Annotated[float, typer.Option(help="The schedule's.")] = 0.02,
    shift: Annotated[float, typer.Option(help="Of flow matching.")] = 1.0,
    k: Annotated[float, typer.Option("-k", help="SpeeD's suppression.")] = 5.0,
    r: Annotated[float, typer.Option("-r", help="SpeeD's magnitude: alpha-bar is 1/r at tau.")] = 140.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Changes nothing: info only reads.")] = False,
) -> None:
    """What is installed and how to add what is missing; or what a folder holds; or what SpeeD makes of a schedule."""
    from . import info as about

    if schedule is not None:
        lines = about.schedule(schedule, timesteps=timesteps, betas=(beta_start, beta_end), shift=shift, k=k, r=r)
    else:
        lines = about.describe(folder) if folder else about.installation()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _go(
    world: World,
    ticks: Callable[[], Iterator[Tick]],
    works: Callable[[World], list[Work]],
    minutes: float | None,
) -> None:
    from .progress import follow
    from .training import job

    job.prepare(world)
    if not follow(ticks(), works(world), console, minutes):
        raise typer.Exit


def _network(world: World, arm: str, model: Path | None) -> Any:
    from .training.judge import arm_network, saved_network

    return arm_network(world, arm) if model is None else saved_network(world, model)
