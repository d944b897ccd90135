"""`ebdiff info --schedule`: what SpeeD makes of a schedule, in numbers done by hand."""

from __future__ import annotations

import pytest
from tiny import ebdiff

from ebdiff.errors import EbdiffError
from ebdiff.info import schedule


def test_the_linear_schedule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ebdiff(monkeypatch, "info", "--schedule", "linear") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "linear, 1000 timesteps: tau = 698, the first where alpha-bar is at most 1/140.5"
    # 698 to 999 are 302 timesteps, of which SpeeD draws 302 in 5 * 698 + 302.
    assert said[3] == "  convergence: [698, 1000), 30.2% of the timesteps, 8.0% of what SpeeD draws"
    assert "come 1.32 times as often" in said[4]
    assert said[4].endswith("never more than T/tau = 1.43 times")


@pytest.mark.parametrize(
    ("options", "tau", "bound"),
    [
        (["scaled_linear"], 873, "1.15"),
        (["scaled_linear", "--beta-start", "0.00085", "--beta-end", "0.012"], 963, "1.04"),
        (["squaredcos_cap_v2"], 945, "1.06"),
        (["flow"], 922, "1.08"),
        (["flow", "--shift", "3"], 797, "1.25"),
        (["linear", "--timesteps", "100", "-r", "1.05", "-k", "2"], 22, "4.55"),
        (["edm"], 754, "1.33"),
    ],
)
def test_other_schedules(options, tau, bound, monkeypatch, capsys) -> None:
    assert ebdiff(monkeypatch, "info", "--schedule", *options) == 0
    said = capsys.readouterr().out
    assert f"tau = {tau}," in said
    assert f"T/tau = {bound} times" in said


def test_edm_s_own_density_leaves_nothing_to_gain() -> None:
    """Its convergence area is sigma > 0.5 sqrt(139.5) = 5.9, where N(-1.2, 1.2²) of ln sigma has 0.7%."""
    said = schedule("edm")
    assert said[-1].startswith("  EDM's own log-normal density draws 0.7% there")
    assert not any("log-normal" in line for line in schedule("edm", r=1e9))
    assert not any("log-normal" in line for line in schedule("flow"))


def test_an_area_may_be_missing() -> None:
    said = "\n".join(schedule("linear", betas=(1e-5, 1e-4)))
    assert "tau = 1000, alpha-bar never falls to 1/140.5" in said
    assert "convergence" not in said
    assert "T/tau = 1.00" in said


@pytest.mark.parametrize("name", ["quadratic", "from_sigmas"])
def test_another_schedule_is_refused(name: str) -> None:
    with pytest.raises(EbdiffError, match=r"squaredcos_cap_v2.*flow"):
        schedule(name)
