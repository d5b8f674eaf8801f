"""The page that a finished run leaves."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.pocket import pocket_path, subjects_path
from oft_diffusion.report import Section, Table
from oft_diffusion.training import TrainConfig, TrainResult, preflight, train
from oft_diffusion.training.families.kinds import StableDiffusion
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.page import STRENGTHS, strength_sweep, write_page
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
PROMPTS = ["a {trigger} {class_word}", "a dog"]


def test_a_finished_run_leaves_a_page_with_everything(config: Config, run: Run) -> None:
    _, result = run(config(validation_prompts=PROMPTS))
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    for text in ("The subject", "Before and after", "Strength", "a sks mug", "Use the adapter", "Settings",
                 "learning_rate", "orthogonality error", "load_oft_weights", "Loss over 3 steps",
                 "<figcaption>Before training</figcaption>", "<figcaption>After 3 steps</figcaption>"):  # fmt: skip
        assert text in page, text
    strengths = ", ".join(f"{strength:g}" for strength in STRENGTHS)
    assert re.findall('alt="(.*?)"', page) == [
        "Instance images of sks mug, 3 in a row",
        "Before training, a row per prompt: “a sks mug”; “a dog”",
        "After 3 steps, a row per prompt: “a sks mug”; “a dog”",
        f"“a sks mug” in 2 rows of one seed each, from left to right at strengths {strengths}",
    ]
    assert page.count("data:image/png;base64,") == 4  # instances, before, after, sweep
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_run_that_asks_for_nothing_shows_before_and_after_and_strengths(config: Config, run: Run) -> None:
    settings = config().to_dict()
    del settings["validation_prompts"]
    _, result = run(TrainConfig.from_dict(settings))
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # instances, before, after, sweep
    assert "“a photo of sks mug”" in page


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

    def noting(self: Any, *args: Any) -> object:
        assert run.parts is not None
        drawn.extend(active.strength for active in run.parts.banks["unet"].active)
        return sample(self, *args)

    with train(config(validation_prompts=PROMPTS, learning_rate=0.1), progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        bank = run.parts.banks["unet"]
        with torch.no_grad():  # far from the base, so that strengths differ
            bank.generators[ADAPTER].normal_(0, 0.5)
        monkeypatch.setattr(StableDiffusion, "sample", noting)
        columns = strength_sweep(run.parts, run.config)
        assert drawn == list(STRENGTHS)
        assert columns is not None
        [active] = bank.active
        assert active.strength == 1
        base = run.parts.family.sample(["a sks mug"], [0], run.config.resolution, 2, run.config.guidance_scale)
        bank.set_adapters([])
        plain = run.parts.family.sample(["a sks mug"], [0], run.config.resolution, 2, run.config.guidance_scale)
        assert not np.array_equal(np.asarray(base[0]), np.asarray(plain[0]))
        assert np.array_equal(np.asarray(columns[0.0][0]), np.asarray(plain[0])), "strength 0 is the base"
        assert not np.array_equal(np.asarray(columns[1.0][0]), np.asarray(plain[0]))


def test_strengths_that_a_series_does_not_know_are_left_out(config: Config) -> None:
    settings = config(validation_prompts=PROMPTS, parametrisation="cayley_neumann")
    with train(settings, progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        whole = strength_sweep(run.parts, settings)
        with torch.no_grad():
            run.parts.banks["unet"].generators[ADAPTER].fill_(0.9)
        part = strength_sweep(run.parts, settings)
        [active] = run.parts.banks["unet"].active
        assert active.strength == 1
        page = run._write_page(run.parts, run.result)
        assert page is not None
        assert "from left to right at strengths 0, 1" in page.read_text(encoding="utf-8")
    assert whole is not None
    assert part is not None
    assert list(whole) == list(STRENGTHS)
    assert list(part) == [0, 1]


def test_where_grids_have_one_picture_strengths_are_drawn_one_at_a_time(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As memory's presets have it; or the report would take more than any grid. The pictures are the same."""
    settings, at_once = config(validation_prompts=PROMPTS, validation_count=1), list[int]()
    found = []
    with train(settings, progress=False) as run:
        list(run)
        assert run.parts is not None
        kind = type(run.parts.family.pipe)
        call = kind.__call__

        def noting(self: Any, *, prompt: list[str], **how: Any) -> object:
            at_once.append(len(prompt))
            return call(self, prompt=prompt, **how)

        monkeypatch.setattr(kind, "__call__", functools.wraps(call)(noting))
        for count in (1, 4):
            columns = strength_sweep(run.parts, replace(settings, validation_count=count))
            assert columns is not None
            found.append([np.asarray(picture) for column in columns.values() for picture in column])
    assert at_once == [1] * 2 * len(STRENGTHS) + [2] * len(STRENGTHS)
    assert len(found[0]) == len(found[1])
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_a_stop_leaves_the_sweep_out(config: Config) -> None:
    with train(config(validation_prompts=PROMPTS), progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        assert strength_sweep(run.parts, run.config, lambda: True) is None


def test_a_page_that_cannot_be_made_costs_a_note_and_not_the_run(config: Config) -> None:
    notes: list[str] = []

    def failing(result: TrainResult) -> list[Section]:
        raise RuntimeError("out of memory")

    with train(config(), on_note=notes.append, progress=False, sections=failing) as run:
        for _ in run:
            pass
    assert run.result.adapter.exists()
    assert run.result.report is None
    assert any("out of memory" in note for note in notes)


@pytest.fixture
def pocket(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**knobs: object) -> TrainConfig:
        own = {
            "model": str(pocket_path()), "instance_dir": str(subjects_path("party_car")), "trigger": "zwx",
            "class_word": "car", "output_dir": str(tmp_path / "run"), "resolution": 128, "steps": 1,
            "sampling_steps": 1, "evaluation_count": 1,
        }  # fmt: skip
        return TrainConfig.from_dict(own | knobs)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"text_encoder": True}, marks=pytest.mark.slow),
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_figures_of_the_pocket_base_are_on_the_page(
    pocket: Callable[..., TrainConfig], run: Run, knobs: dict[str, object]
) -> None:
    _, result = run(pocket(**knobs))
    assert result.report is not None
    page = result.report.read_text(encoding="utf-8")
    names = ("Figures", "subject hit", "preservation", "leakage, class word", "Read by a classifier in 1 picture per")
    assert all(name in page for name in names)
    shares, differences = re.findall("<tbody>(.*?)</tbody>", page)
    assert 'data-column="with the adapter">0 of 1: 0 % (' in shares
    assert "preservation" not in shares
    assert re.search('preservation</th><td data-column="points">-?[0-9]+ [(]-?[0-9]+ to -?[0-9]+[)]</td>', differences)
    rows = json.loads((result.report.parent / "evaluation.json").read_text())["rows"]
    assert len(rows) == 2 * len(SETS)


@pytest.mark.slow
def test_a_stop_leaves_the_figures_out(pocket: Callable[..., TrainConfig]) -> None:
    with train(pocket(), progress=False) as running:
        for _ in running:
            pass
        assert running.parts is not None
        path = write_page(
            running.parts, running.config, running.result, running.plan.pictures,
            looks=running.plan.looks, console=running.console, stopped=lambda: True,
        )  # fmt: skip
        [active] = running.parts.banks["unet"].active
        assert active.strength == 1
    assert "subject hit" not in path.read_text(encoding="utf-8")


def test_figures_are_refused_where_nothing_can_read_the_pictures(
    config: Config, pocket: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is no base of the pocket world"):
        preflight(config(evaluation_count=4))
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("party_car", "bow_cat", "cosy_robot"):
        shutil.copy(subjects_path(name) / "01.png", photos / f"{name}.png")
    with pytest.raises(ConfigError, match="do not show one subject of the pocket world"):
        preflight(pocket(instance_dir=str(photos)))
    preflight(pocket(instance_dir=str(photos), evaluation_count=0))


def test_sections_of_the_caller_are_on_the_page(config: Config) -> None:
    def more(result: TrainResult) -> list[Section]:
        return [Table("Of my own", f"after {result.steps} steps", ["", "x"], [["a", "1"]])]

    with train(config(), progress=False, sections=more) as run:
        for _ in run:
            pass
    assert run.result.report is not None
    assert "after 3 steps" in run.result.report.read_text(encoding="utf-8")


def test_grids_of_other_prompts_or_of_another_start_are_not_called_before(config: Config, run: Run) -> None:
    _, first = run(config(validation_prompts=PROMPTS, steps=2))
    _, other = run(config(validation_prompts=["a cat"], steps=3, resume="latest"))
    assert other.report is not None
    assert "Before and after" not in other.report.read_text(encoding="utf-8")
    _, begun = run(config(validation_prompts=PROMPTS, overwrite=True, init_adapter=str(first.adapter)))
    assert begun.report is not None
    assert "Before and after" not in begun.report.read_text(encoding="utf-8")


def test_the_time_of_training_goes_on_where_a_run_is_resumed(config: Config, run: Run) -> None:
    _, first = run(config(steps=2))
    with train(config(steps=3, resume="latest"), progress=False) as running:
        assert running._earlier == pytest.approx(first.seconds)
        for _ in running:
            pass
    assert running.result.seconds > first.seconds


def test_overwriting_takes_the_old_page_away(config: Config, run: Run) -> None:
    _, result = run(config())
    assert result.report is not None
    with train(config(overwrite=True), progress=False):
        assert not result.report.exists()
