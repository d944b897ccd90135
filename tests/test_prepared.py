"""Training steps in another memory layout or compiled: the same losses and weights, to rounding, and plain names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from kill_me import Net, half, net, pictures, training
from norm_patterns import counted
from torch import Tensor, nn

import ebdiff
from ebdiff.config import resolve
from ebdiff.errors import EbdiffError
from ebdiff.pruning.save import save
from ebdiff.training import prepared
from ebdiff.training.checkpoint import Checkpoints
from ebdiff.training.loop import TrainConfig, TrainState, train


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torch.compile with the graphs run as they are: what inductor makes of them takes long, and is sometimes wrong."""
    compiled, real = [], torch.compile

    def eager(graph: Any, example: Any) -> Any:
        compiled.append(str(graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, options, **given: real(model, backend=eager, **given))
    yield compiled
    torch.compiler.reset()


def run(until: int = 4, model: nn.Module | None = None, **options: Any) -> tuple[list[float], TrainState]:
    config = TrainConfig(batch_size=4, lr=1e-2, flip=True, **options)
    state = TrainState.begin(model or net(), config)
    settings = {"scheduler": DDPMScheduler(1000), "sampler": ebdiff.Uniform(1000), "config": config, "until": until}
    return [report.loss for report in train(state, pictures(), **settings)], state


def assert_same(found: tuple[list[float], TrainState], wanted: tuple[list[float], TrainState]) -> None:
    torch.testing.assert_close(found[0], wanted[0])
    ours, theirs = found[1].tensors(), wanted[1].tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


OPTIONS: list[dict[str, Any]] = [
    {"channels_last": True},
    {"compile": True},
    {"compile": True, "channels_last": True, "precision": "bf16"},
    {"compile": "reduce-overhead"},
    {"compile": True, "accumulate": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(map(str, options.items())))
def test_losses_and_weights_are_those_without(options: dict[str, Any], graphs: list[str]) -> None:
    """Dropout included, whose random numbers are the loop's, where the layout is the same: it draws in that order."""
    dropout = 0.0 if "channels_last" in options else 0.2
    others = {key: value for key, value in options.items() if key not in ("compile", "channels_last")}
    assert_same(run(model=net(dropout=dropout), **options), run(model=net(dropout=dropout), **others))
    assert len(graphs) == ("compile" in options), "one graph, whatever the number of steps"


def test_weights_lie_in_channels_last_order_and_so_do_moments_and_averages() -> None:
    _, state = run(channels_last=True)
    weight = state.model.get_parameter("first.weight")
    moment = state.optimizer.state[weight]["exp_avg"]
    for tensor in (weight, moment, state.ema.shadow_params[0]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_resumed_it_goes_on_the_same(tmp_path: Any, graphs: list[str]) -> None:
    options = {"compile": True, "channels_last": True, "batch_size": 4}
    config = TrainConfig(lr=1e-2, **options)
    state, checkpoints = TrainState.begin(net(), config), Checkpoints(tmp_path)
    list(training(state, 3, checkpoints=checkpoints, **options))
    again = TrainState.begin(net(), config)
    saved = checkpoints.newest()
    assert saved is not None
    again.restore(saved)
    assert [r.loss for r in training(again, 5, **options)] == [r.loss for r in training(state, 5, **options)]
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_the_state_s_model_stays_plain_and_may_be_shrunken_between_steps(tmp_path: Any, graphs: list[str]) -> None:
    config = TrainConfig(batch_size=4)
    state = TrainState.begin(net(), config)
    for report in training(state, 4, compile=True):
        assert type(state.model) is Net
        if report.step == 2:
            ebdiff.shrink_(state.model, half(state.model), optimizer=state.optimizer, ema=state.ema)
    assert len(graphs) == 2
    assert state.model.get_parameter("first.weight").shape[0] == 4
    save(state.model, tmp_path / "net")


class Block(nn.Module):
    """A norm whose result goes to SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(4, 8), nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x))))  # type: ignore[no-any-return]


def block() -> Block:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Block()


def shrunken_midway(mask: ebdiff.ChannelMask, **options: Any) -> tuple[list[float], TrainState]:
    """Two steps, what the mask keeps, two more."""
    state, losses = TrainState.begin(block(), TrainConfig(batch_size=4)), []
    for report in training(state, 4, **options):
        losses.append(report.loss)
        if report.step == 2:
            ebdiff.shrink_(state.model, mask, optimizer=state.optimizer, ema=state.ema)
    return losses, state


@pytest.mark.parametrize("last", [False, True])
def test_accelerated_its_norms_are_one_operator_with_silu_before_and_after_it_is_shrunken(last: bool) -> None:
    plan = ebdiff.trace(block(), torch.zeros(1, 2, 6, 6), torch.zeros(1))
    mask = ebdiff.ChannelMask.draw(ebdiff.importance(block(), plan), plan=plan, ratio=0.5)
    with counted("silu") as plain:
        wanted = shrunken_midway(mask, channels_last=last)
    with counted("silu") as fused:
        found = shrunken_midway(mask, channels_last=last, accelerate=True)
    assert (len(plain), len(fused)) == (4, 0)
    assert_same(found, wanted)


def test_accelerated_it_resumes_the_same_and_can_be_restored(tmp_path: Any) -> None:
    options = {"accelerate": True, "batch_size": 4}
    state, checkpoints = TrainState.begin(block(), TrainConfig(**options)), Checkpoints(tmp_path)
    list(training(state, 3, checkpoints=checkpoints, **options))
    again, saved = TrainState.begin(block(), TrainConfig(**options)), checkpoints.newest()
    assert saved is not None
    again.restore(saved)
    for each in (state, again):
        list(training(each, 5, **options))
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    ebdiff.restore(again.model)
    assert type(again.model) is Block


@pytest.mark.skipif(not prepared._CAN_ISOLATE, reason="this torch counts the networks of a class together")
def test_a_run_may_compile_more_networks_than_torch_keeps_of_one_class(graphs: list[str]) -> None:
    for width in range(2, 12):
        run(1, net(width=width), compile=True)
    assert len(graphs) == 10


class Normed(nn.Module):
    """A network whose forward pass changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def test_looking_at_gradients_leaves_nothing_behind(graphs: list[str]) -> None:
    model = Normed()
    run(1, model, compile=True)
    assert int(model.norm.num_batches_tracked) == 1
    assert graphs


def test_on_the_cpu_convolutions_are_compiled_in_the_layout_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another one, inductor of torch 2.13 loses the gradients behind an upsampling."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda model, options, **others: given.update(options))
    prepared.compiled(net(), True)
    assert given["layout_optimization"] is False


class Wrong(nn.Module):
    """A compiler's network whose output is right and whose gradients are not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.model(x, t)
        return out + 0.3 * (out - out.detach())  # type: ignore[no-any-return]


class Shifted(Wrong):
    """A compiler's network that draws other random numbers."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        torch.rand(1)
        return self.model(x, t)  # type: ignore[no-any-return]


def test_a_compiler_may_draw_dropout_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "compiled", lambda model, how: Shifted(model))
    model = net(dropout=0.5)
    run(1, model, compile=True)
    assert model.drop.p == 0.5


def test_a_compiler_that_errs_is_found_out_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "compiled", lambda model, how: Wrong(model))
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for precision in ("no", "bf16"):
        with pytest.raises(EbdiffError, match=r"torch.compile changes the gradients.* got 0\.3, .*compile=False"):
            run(1, model, compile=True, precision=precision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("elsewhere", [1.0, float("nan")])
def test_a_gradient_that_errs_in_one_process_is_refused_in_all(
    elsewhere: float, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that went on alone would wait for the others for ever."""
    monkeypatch.setattr(prepared, "compiled", lambda model, how: model)
    asked = []

    def gather(found: Tensor) -> Tensor:
        asked.append(float(found))
        return torch.tensor([0.0, elsewhere])

    def backward(network: nn.Module) -> None:
        network(torch.ones(1, 2, 6, 6), torch.zeros(1)).sum().backward()

    two = Accelerator(cpu=True)
    monkeypatch.setattr(two, "gather", gather)
    with pytest.raises(EbdiffError, match=r"torch.compile changes the gradients"):
        prepared.prepared(net(dropout=dropout), TrainConfig(compile=True), two, backward)
    assert len(asked) == 1 + (dropout > 0), "each process looks again without dropout"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": "fast"}, "'reduce-overhead'"),
        ({"compile": "reduce-overhead", "accumulate": 2}, "accumulate of 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EbdiffError, match=words):
        TrainConfig(**options)


def test_attention_is_not_watched_in_a_compiled_network() -> None:
    with pytest.raises(EbdiffError, match=r"train\.compile: false with search\.attention"):
        resolve("smoke", overrides=["train.compile=true", "search.attention=0.5"])
