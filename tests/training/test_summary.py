"""The page that a finished run leaves."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from oft_diffusion.images import labelled_grid
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.family import StableDiffusion
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.summary import STRENGTHS, strength_sweep, write_summary
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
PROMPTS = ["a {trigger} {class_word}", "a dog"]


def test_a_finished_run_leaves_a_page_with_everything(config: Config, run: Run) -> None:
    _, result = run(config(validation_prompts=PROMPTS))
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    for text in ("The subject", "Before and after", "Strength", "a sks mug", "Use the adapter", "Settings",
                 "learning_rate", "orthogonality error", "load_oft_weights", "Loss over 3 steps"):  # fmt: skip
        assert text in page, text
    assert page.count("data:image/png;base64,") == 4  # instances, before, after, sweep
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_without_prompts_there_are_no_pictures_but_those_of_the_subject(config: Config, run: Run) -> None:
    _, result = run(config())
    assert result.report is not None
    assert result.report.read_text(encoding="utf-8").count("data:image/png;base64,") == 1


def test_a_resumed_run_still_shows_the_first_grid(config: Config, run: Run) -> None:
    settings = config(validation_prompts=PROMPTS, steps=2)
    run(settings)
    _, result = run(config(validation_prompts=PROMPTS, steps=3, resume="latest"))
    assert result.report is not None
    assert result.report.read_text(encoding="utf-8").count("data:image/png;base64,") == 4


def test_a_stopped_run_has_a_page_too_and_an_interrupted_one_does_not_draw(config: Config) -> None:
    for interrupted in (False, True):
        with train(config(validation_prompts=PROMPTS, overwrite=True), progress=False) as run:
            for _ in run:
                run.interrupted = interrupted
                run.stop()
        assert (run.result.report is None) is interrupted
        assert (run.output_dir / "report.html").exists() is not interrupted


def test_the_sweep_goes_through_the_strengths_and_comes_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    sample = StableDiffusion.sample

    def noting(self: StableDiffusion, *args: object) -> object:
        assert run.parts is not None
        drawn.extend(active.strength for active in run.parts.banks["unet"].active)
        return sample(self, *args)  # type: ignore[arg-type]

    with train(config(validation_prompts=PROMPTS, learning_rate=0.1), progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        bank = run.parts.banks["unet"]
        with torch.no_grad():  # far from the base, so that strengths differ
            bank.generators[ADAPTER].normal_(0, 0.5)
        monkeypatch.setattr(StableDiffusion, "sample", noting)
        sheet = strength_sweep(run.parts, run.config)
        assert drawn == list(STRENGTHS)
        assert sheet is not None
        [active] = bank.active
        assert active.strength == 1
        base = run.parts.family.sample(["a sks mug"], [0], run.config.resolution, 2, run.config.guidance_scale)
        bank.set_adapters([])
        plain = run.parts.family.sample(["a sks mug"], [0], run.config.resolution, 2, run.config.guidance_scale)
        assert not np.array_equal(np.asarray(base[0]), np.asarray(plain[0]))
        cell = labelled_grid([plain], cell=128)
        at_zero = np.asarray(sheet)[-128 * 2 - 12 : -128 - 12, 2 * 134 + 6 : 2 * 134 + 134]
        assert np.array_equal(at_zero, np.asarray(cell)[6:134, 6:134]), "strength 0 is the base"


def test_a_series_past_its_norm_has_no_sweep_but_a_page(config: Config) -> None:
    settings = config(validation_prompts=PROMPTS, parametrisation="cayley_neumann")
    with train(settings, progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        with torch.no_grad():
            run.parts.banks["unet"].generators[ADAPTER].fill_(0.9)
        page = write_summary(run.parts, settings, run.result, run.plan.pictures)
        [active] = run.parts.banks["unet"].active
        assert active.strength == 1
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 3


def test_overwriting_takes_the_old_page_away(config: Config, run: Run) -> None:
    _, result = run(config())
    assert result.report is not None
    with train(config(overwrite=True), progress=False):
        assert not result.report.exists()
