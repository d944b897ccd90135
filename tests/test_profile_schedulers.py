"""Every scheduler of the installed diffusers: its training process, or the reason why it has none."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from ebdiff.errors import EbdiffError
from ebdiff.timesteps.profile import NoiseProfile

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
# Schedulers that have no training process ebdiff could follow, with a word of the reason.
REFUSED = {
    "AmusedScheduler": "tokens",
    "BlockRefinementScheduler": "tokens",
    "DiscreteDDIMScheduler": "tokens",
    "EntropyBoundScheduler": "tokens",
    "VQDiffusionScheduler": "tokens",
    "CMStochasticIterativeScheduler": "consistency",
    "ConsistencyDecoderScheduler": "consistency",
    "SCMScheduler": "consistency",
    "HeliosScheduler": "stage",
    "HeliosDMDScheduler": "stage",
    "MiniMaxH3Scheduler": "clean end",
    "RFD4ProteinaScheduler": "two modalities",
    "IPNDMScheduler": "how to sample",
    "KarrasVeScheduler": "how to sample",
}
CONTINUOUS = {
    "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "PiflowScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
}


def installed() -> dict[str, type | None]:
    """All scheduler classes that diffusers ships; None for what needs a package that is not installed (torchsde)."""
    found: dict[str, type | None] = {}
    for file in sorted(Path(diffusers.schedulers.__path__[0]).rglob("scheduling_*.py")):
        names = re.findall(r"^class (\w+Scheduler)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        home = "diffusers.schedulers.deprecated" if file.parent.name == "deprecated" else "diffusers.schedulers"
        try:
            module = importlib.import_module(f"{home}.{file.stem}")
            found |= {name: getattr(module, name) for name in names}
        except ImportError:
            found |= dict.fromkeys(names)
    return found


SCHEDULERS = installed()
NEEDED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 7},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
STAND_INS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": {"config": {}, "alphas_cumprod": diffusers.DDPMScheduler().alphas_cumprod},
    "CosineDPMSolverMultistepScheduler": {
        "config": {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "num_train_timesteps": 1000},
        "precondition_noise": None,
    },
}


def made(name: str, **settings: Any) -> Any:
    """An instance, or a stand-in with the same facts where that class cannot be imported here."""
    kind = SCHEDULERS[name]
    return type(name, (), STAND_INS[name])() if kind is None else kind(**NEEDED.get(name, {}), **settings)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_is_followed_or_refused_with_a_reason(name):
    scheduler = made(name)
    if name in REFUSED:
        with pytest.raises(EbdiffError, match=rf"{name}.*{REFUSED[name]}.*from_functions"):
            NoiseProfile.from_scheduler(scheduler)
        return
    profile = NoiseProfile.from_scheduler(scheduler)
    assert profile.is_continuous == (name in CONTINUOUS)
    assert profile.alpha_bar[0] > 0.9
    assert profile.alpha_bar[-1] < 0.05
    config = getattr(scheduler, "config", {})
    assert config.get("num_train_timesteps", 1000) == profile.T


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("DDPMScheduler", schedule) for schedule in BETAS]
    + [(name, schedule) for name in ("DDIMScheduler", "PNDMScheduler") for schedule in BETAS[:3]],
)
def test_discrete_tables_add_noise_as_the_scheduler_does(name, schedule):
    scheduler = made(name, beta_schedule=schedule)
    scheduler.set_timesteps(7)  # must not matter
    t = torch.arange(1000)
    table, row = NoiseProfile.from_scheduler(scheduler).coefficients(t)
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    torch.testing.assert_close(table[0, row][:, None], scheduler.add_noise(ones, zeros, t), rtol=2e-7, atol=0)
    torch.testing.assert_close(table[1, row][:, None], scheduler.add_noise(zeros, ones, t), rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("schedule", BETAS[:3])
def test_zero_terminal_snr_is_zero_and_finite(schedule, name):
    profile = NoiseProfile.from_scheduler(made(name, beta_schedule=schedule, rescale_betas_zero_snr=True))
    assert profile.snr[-1] == 0
    assert bool(profile.snr.isfinite().all() & profile.alpha_bar.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "settings", "prediction"),
    [
        ("DDPMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("DDPMScheduler", {"prediction_type": "sample"}, "sample"),
        ("DDPMScheduler", {}, "epsilon"),
        ("UniPCMultistepScheduler", FLOW, "flow"),
        ("FlowMatchEulerDiscreteScheduler", {}, "flow"),
        ("EDMEulerScheduler", {}, "sample"),
        ("ScoreSdeVeScheduler", {}, None),
    ],
)
def test_what_the_network_predicts(kind, settings, prediction):
    assert NoiseProfile.from_scheduler(made(kind, **settings)).prediction == prediction


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
     "SASolverScheduler"],
)  # fmt: skip
def test_flow_sigmas_and_their_shift_are_flow_matching(name):
    profile = NoiseProfile.from_scheduler(made(name, **FLOW))
    torch.testing.assert_close(profile.edges, NoiseProfile.flow(3.0).edges)


def test_shifted_flow_is_what_training_scripts_draw():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t, sigmas = scheduler.timesteps.flip(0).double(), scheduler.sigmas.flip(0).double()
    profile = NoiseProfile.from_scheduler(scheduler)
    # Training scripts draw an index uniformly, hand the network timesteps[index] and mix with sigmas[index].
    torch.testing.assert_close(profile.edges[1:], t, rtol=1e-6, atol=0)
    table, row = profile.coefficients(t)
    torch.testing.assert_close(table[1, row].double(), sigmas, rtol=1e-6, atol=0)
    scheduler.set_shift(6.0)
    torch.testing.assert_close(NoiseProfile.from_scheduler(scheduler).edges, NoiseProfile.flow(6.0).edges)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    torch.testing.assert_close(NoiseProfile.from_scheduler(dynamic).edges, NoiseProfile.flow(1.0).edges)


def test_a_flow_from_the_noise_to_the_data_is_refused():
    with pytest.raises(EbdiffError, match="noisy end"):
        NoiseProfile.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_edm_s_timesteps_are_the_network_s():
    scheduler = diffusers.EDMEulerScheduler()
    profile = NoiseProfile.from_scheduler(scheduler)
    table, row = profile.coefficients(scheduler.precondition_noise(torch.tensor([0.002, 0.5, 80.0])))
    torch.testing.assert_close(table[1, row], torch.tensor([0.002, 0.5, 80.0]), rtol=2e-6, atol=0)
    assert (profile.data_std, profile.edges[0].exp() ** 4) == (0.5, pytest.approx(0.002))


def test_cosine_solver_s_timesteps_are_the_network_s():
    profile = NoiseProfile.from_scheduler(made("CosineDPMSolverMultistepScheduler"))
    steps = profile.edges.mul(torch.pi / 2).tan().log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0])), rtol=1e-6, atol=0)
    assert profile.sigma[0] == pytest.approx(0.3, rel=0.01)


def test_stable_video_s_euler_is_edm():
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    scheduler = diffusers.EulerDiscreteScheduler(sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, **settings)
    profile = NoiseProfile.from_scheduler(scheduler)
    torch.testing.assert_close(profile.edges, NoiseProfile.edm(0.002, 700.0, 1.0).edges)
    assert NoiseProfile.from_scheduler(diffusers.EulerDiscreteScheduler(**settings)).sigma[-1] > 30


def test_a_subclass_is_its_parent_and_a_stranger_is_refused():
    class Mine(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    assert NoiseProfile.from_scheduler(Mine()).prediction == "flow"
    for stranger in (object(), SimpleNamespace(config={})):
        with pytest.raises(EbdiffError, match="no training process"):
            NoiseProfile.from_scheduler(stranger)
