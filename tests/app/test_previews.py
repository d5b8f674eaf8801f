"""Unfinished pictures of every family: decoded as the pipeline itself decodes what is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.drawing import Request, Studio
from app.machine import Job
from app.previews import Previews, decoded
from oft_diffusion.generate import Step, generate
from tests.helpers.tiny_families import BUILDERS, side_of, tiny_family

SILENT = {"PixArtAlphaPipeline", "PixArtSigmaPipeline"}  # they tell of no steps


def drawn(pipe: Any, width: int, height: int, steps: int = 2) -> tuple[Any, list[Step]]:
    """A picture, and the steps that it took."""
    pipe.set_progress_bar_config(disable=True)
    told: list[Step] = []
    [picture] = generate(pipe, "a mug", [1], steps=steps, guidance=2.0, width=width, height=height, on_step=told.append)
    return picture.image, told


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in SILENT])
def test_of_what_is_finished_it_is_the_picture(name: str, tmp_path: Path) -> None:
    pipe, width = tiny_family(name, tmp_path), side_of(name)
    height = width if name == "HiDreamImagePipeline" else 2 * width  # which enlarges what is that small
    picture, [*_, last] = drawn(pipe, width, height)
    assert last.latents is not None
    found = decoded(pipe, last.latents, (width, height))
    assert found is not None
    assert np.array_equal(np.asarray(found), np.asarray(picture))


@pytest.mark.parametrize("name", sorted(SILENT))
def test_those_without_are_known(name: str, tmp_path: Path) -> None:
    assert drawn(tiny_family(name, tmp_path), side_of(name), side_of(name))[1] == []


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline"])
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
