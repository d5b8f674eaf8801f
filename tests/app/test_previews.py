"""Unfinished pictures of every family: decoded as the pipeline itself decodes what is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from app.drawing import Request, Studio
from app.machine import Cancelled, Job
from app.previews import Previews, decoded
from oft_diffusion.generate import Step, generate
from tests.helpers.tiny_families import BUILDERS, side_of, tiny_family


def drawn(pipe: Any, width: int, height: int, steps: int = 2) -> tuple[Any, list[Step]]:
    """A picture, and the steps that it took."""
    pipe.set_progress_bar_config(disable=True)
    told: list[Step] = []
    [picture] = generate(pipe, "a mug", [1], steps=steps, guidance=2.0, width=width, height=height, on_step=told.append)
    return picture.image, told


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", BUILDERS)
def test_of_what_is_finished_it_is_the_picture(name: str, tmp_path: Path) -> None:
    pipe, width = tiny_family(name, tmp_path), side_of(name)
    height = width if name == "HiDreamImagePipeline" else 2 * width  # which enlarges what is that small
    picture, [*before, last] = drawn(pipe, width, height)
    assert [(step.step, step.steps) for step in (*before, last)] == [(1, 2), (2, 2)]
    assert last.latents is not None
    found = decoded(pipe, last.latents, (width, height))
    assert found is not None
    assert np.array_equal(np.asarray(found), np.asarray(picture))


def test_a_scheduler_that_passes_twice_through_a_step_tells_of_it_once(tmp_path: Path) -> None:
    pipe = tiny_family("PixArtSigmaPipeline", tmp_path)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    told = drawn(pipe, 16, 16, steps=3)[1]
    assert [(step.step, step.steps) for step in told] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def test_a_cancel_ends_a_drawing_within_a_step(name: str, tmp_path: Path) -> None:
    job, pipe, side = Job("somebody", "draw"), tiny_family(name, tmp_path), side_of(name)
    pipe.set_progress_bar_config(disable=True)
    tell, told = job.tell, list[str]()

    def cancel_at_the_second(*found: Any, **changes: Any) -> None:
        tell(*found, **changes)
        if (text := changes.get("text", "")).startswith("step"):
            told.append(text)
        if text == "step 2 of 6":
            job.cancel()

    job.tell = cancel_at_the_second  # type: ignore[method-assign]
    studio, request = Studio(pipe, name, 6, 2.0), Request("a mug", (1,), steps=6, width=side, height=side)
    with pytest.raises(Cancelled):
        studio.draw(request, job, lambda _: None)
    assert told == ["step 1 of 6", "step 2 of 6"]
    fresh = Job("somebody", "draw")
    studio.draw(request, fresh, lambda picture: picture)
    assert len(fresh.progress.found) == 1


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"],
)
def test_the_studio_shows_them(name: str, tmp_path: Path) -> None:
    job = Job("somebody", "draw")
    seen: list[Any] = []
    job.tell = lambda *_, **changes: seen.append(changes.get("preview"))  # type: ignore[method-assign]
    pipe, side = tiny_family(name, tmp_path), side_of(name)
    pipe.set_progress_bar_config(disable=True)
    Studio(pipe, name, 4, 2.0).draw(Request("a mug", (1,), steps=4, width=side, height=side), job, lambda _: None)
    assert any(preview is not None and preview.size == (side, side) for preview in seen)


def test_a_decoder_that_needs_it_works_in_float32_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_family("StableDiffusionXLPipeline", tmp_path)
    vae = pipe.vae.to(torch.float16)
    asked, decode = [], vae.decode

    def noted(latents: torch.Tensor) -> Any:
        asked.append((latents.dtype, vae.dtype))
        return decode(latents)

    monkeypatch.setattr(vae, "decode", noted)
    decoded(pipe, torch.zeros(1, 4, 8, 8, dtype=torch.float16), (16, 16))
    assert asked == [(torch.float32, torch.float32)]
    assert vae.dtype == torch.float16


def test_patches_of_another_size_than_was_asked_for_are_not_shown(tmp_path: Path) -> None:
    pipe = tiny_family("FluxPipeline", tmp_path)
    assert decoded(pipe, torch.zeros(1, 15, 16), (16, 16)) is None


def test_there_is_none_after_the_last_step(tmp_path: Path) -> None:
    pipe = tiny_family("FluxPipeline", tmp_path)
    for step, shown in ((1, True), (2, False)):
        found = Previews(pipe, (16, 16)).of(Step(step, 2, 0, 1, torch.zeros(1, 16, 16)))
        assert (found is not None) == shown
