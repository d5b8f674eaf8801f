"""Unfinished pictures: of latents as models have them, and in a precision that their decoders can bear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.drawing import Request
from app.previews import Previews
from app.session import Session
from app.workspace import new_token
from oft_diffusion.generate import Step
from tests.helpers.tiny_families import tiny_family, write_tiny_family


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_models_show_what_they_draw_in_its_shape(tmp_path: Path, name: str) -> None:
    session = Session(tmp_path / "work", str(write_tiny_family(name, tmp_path)))
    own = session.abilities
    request = Request("a mug", (1,), steps=6, width=2 * own.size, height=own.size)
    *seen, last = session.draw(new_token(), request).watch(timeout=60)
    assert last.state == "done", last.error
    previews = [now.preview for now in seen if now.preview is not None]
    assert previews
    assert {preview.size for preview in previews} == {(2 * own.size, own.size)}


def test_a_decoder_that_overflows_in_float16_shows_pictures_in_float32(tmp_path: Path) -> None:
    pipe, used = tiny_family("StableDiffusionXLPipeline", tmp_path), []
    pipe.vae.to(torch.float16)
    assert pipe.vae.config.force_upcast
    decode = pipe.vae.decode

    def noted(latents: Any) -> Any:
        used.append((latents.dtype, pipe.vae.dtype))
        return decode(latents)

    pipe.vae.decode = noted
    step = Step(first=0, pictures=1, step=1, steps=2, latents=torch.randn(1, 4, 8, 8))
    assert Previews(pipe, (64, 64)).of(step) is not None
    assert used == [(torch.float32, torch.float32)]
    assert pipe.vae.dtype == torch.float16
