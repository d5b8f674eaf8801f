"""Counts of steps of full size: the same as with numbers, what they guard, and what the table makes of them."""

from __future__ import annotations

import pytest

from benchmarks.counting import saved_bytes
from benchmarks.full_counts import COUNTED, Step, counts, steps, table
from benchmarks.methods import BASE, EQUAL_LORA, LORA, METHODS, OURS, PEFT_OFT, WEIGHT_CENTRIC, kernels_switched
from benchmarks.speed_setups import STACK
from benchmarks.works import WORKS, Sizes
from oft_diffusion.training.memory import LiveStorages


@pytest.mark.parametrize("method", [OURS, LORA, PEFT_OFT, WEIGHT_CENTRIC])
@kernels_switched(on=False)  # C keeps no D
def test_counts_without_numbers_are_those_with_them(method: str) -> None:
    found = counts(STACK, method, checkpointing=False)
    work = WORKS[STACK](Sizes()).requires_grad_(False).train()
    trained = METHODS[method].adapt(work.denoiser, work.targets()[0], 32).trained
    assert found["trained"] == sum(p.numel() for p in trained)
    assert found["saved_bytes"] == saved_bytes(lambda: work().square().mean(), [*work.parameters(), *trained])
    with LiveStorages("cpu") as alive:
        work().square().mean().backward()
    if method == OURS:  # D by a solve there, by products here
        assert found["step_bytes"] == pytest.approx(alive.most, rel=0.05)
    else:
        assert found["step_bytes"] == alive.most


@pytest.fixture(scope="module")
def full_size() -> dict[str, dict[str, int]]:
    return {name: counts("SD 1.5", name, checkpointing=False) for name in (BASE, OURS, LORA, WEIGHT_CENTRIC)}


def test_at_full_size_a_step_peaks_below_loras(full_size: dict[str, dict[str, int]]) -> None:
    peaks = {name: own["step_bytes"] + own["state_bytes"] for name, own in full_size.items()}
    assert peaks[BASE] < peaks[OURS] <= peaks[LORA]
    assert peaks[OURS] - peaks[BASE] <= (peaks[WEIGHT_CENTRIC] - peaks[BASE]) / 3


def test_at_full_size_no_more_is_saved_than_loras_inputs_and_d(full_size: dict[str, dict[str, int]]) -> None:
    saved = {name: own["saved_bytes"] for name, own in full_size.items()}
    deltas = 4 * 2 * full_size[OURS]["trained"] * 32 / 31  # b x b of b (b - 1) / 2 numbers
    assert saved[BASE] < saved[OURS] - deltas < saved[LORA]
    assert saved[OURS] <= 1.005 * saved[LORA]


def _row(method: str, **figures: object) -> dict[str, str]:
    usual = {"work": "SD 1.5", "checkpointing": "no", "trained": 1, "operations": 10, "saved_bytes": 100}
    about = {"torch": "2", "diffusers": "1", "commit": "abc", "date": "today", "reason": ""}
    more = {"step_bytes": 1000, "state_bytes": 0}
    return {name: str(value) for name, value in ({"method": method} | usual | more | about | figures).items()}


def test_ratios_are_of_the_newest_counts_and_empty_where_a_method_has_none() -> None:
    rows = [
        _row(OURS, saved_bytes=5),
        _row(BASE),
        _row(OURS, saved_bytes=150, step_bytes=1400, state_bytes=100),
        _row(LORA, saved_bytes=300, step_bytes=1500, state_bytes=500),
        _row(WEIGHT_CENTRIC, step_bytes=3000),
        _row(EQUAL_LORA, trained="", operations="", saved_bytes="", step_bytes="", state_bytes="", reason="it broke"),
    ]
    [step] = steps(rows)
    assert step.ratio(LORA, "saved_bytes") == 0.5
    assert step.ratio(LORA, "peak") == 0.75
    assert step.ratio(WEIGHT_CENTRIC, "peak", above_base=True) == 0.25
    assert step.ratio(EQUAL_LORA, "peak") is None
    assert step.ratio(PEFT_OFT, "peak") is None
    text = table(rows)
    assert "| peak above the weights, of PEFT LoRA's | 1.00 | 0.750 |" in text
    assert f"- {EQUAL_LORA}: it broke" in text
    assert all(f"| {method} |" in text for method in COUNTED)
    assert text.endswith("commit abc of today.")
    assert table([*rows, _row(LORA, commit="d")]).endswith(f"commit abc of today; {LORA}: d of today.")
    assert Step("SD 1.5", True, step.rows).of(OURS, "peak") == 1500
