"""`generate` asks every family's pipeline in its own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oft_diffusion.errors import ConfigError
from oft_diffusion.generate import generate
from oft_diffusion.load import load_pipeline
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of
from tests.library.support import assert_one_sentence

OWN_SIZE = ("HiDreamImagePipeline", "Lumina2Pipeline")  # whatever they are asked for

# Distilled: no guidance but one that is embedded, or none at all.
UNGUIDED = ("FluxPipeline schnell",)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_guidance_matters(name: str, folder_of: Callable[[str], Path]) -> None:
    pipe = load_pipeline(folder_of(name))

    def draw(guidance: float) -> Any:
        options: dict[str, Any] = {"steps": 2, "width": side_of(name), "height": side_of(name)}
        [picture] = generate(pipe, "a dog", [1], guidance=guidance, **options)
        return np.asarray(picture.image).astype(float)

    plain, guided = draw(1.0), draw(4.0)
    assert name in OWN_SIZE or plain.shape == (side_of(name), side_of(name), 3)
    assert (name in UNGUIDED) == np.array_equal(guided, plain)


def edited(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a model with another model_index.json."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | changes))
    return target


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("WanPipeline", {"_class_name": "WanImageToVideoPipeline"}, ("WanImageToVideoPipeline", "starts from image")),
        ("StableDiffusionXLPipeline", {"text_encoder_2": [None, None]}, ("is without text_encoder_2",)),
        ("HiDreamImagePipeline", {"text_encoder_4": [None, None]}, ("cannot be loaded", "text_encoder_4")),
    ],
)
def test_models_that_cannot_draw_from_a_prompt_are_refused_when_loaded(
    name: str, changes: dict[str, object], told: tuple[str, ...], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(edited(folder_of(name), tmp_path / "model", **changes))
    assert_one_sentence(caught, *told[:1])
    assert all(word in str(caught.value) or name == "HiDreamImagePipeline" for word in told)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("StableDiffusionXLPipeline", {"clip_skip": 2}, "clip_skip = 2, but CLIP has 3 layers"),
        ("StableDiffusionXLPipeline", {"clip_skip": 0}, "1 to 1, as diffusers counts"),
        ("FluxPipeline", {"clip_skip": 1}, "a FluxPipeline knows none"),
        ("FluxPipeline", {"negative_prompt": "blurry"}, "a negative prompt does nothing to a FluxPipeline"),
    ],
)
def test_settings_that_a_pipeline_does_not_know_are_refused(
    name: str, options: dict[str, Any], told: str, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(load_pipeline(folder_of(name)), "a dog", [1], steps=1, **options)
    assert_one_sentence(caught, told)


def test_clip_skip_leaves_no_trace_by_which_diffusers_would_read_loras_otherwise(
    folder_of: Callable[[str], Path],
) -> None:
    pipe = load_pipeline(folder_of("StableDiffusionPipeline"))
    (plain,), (skipped,) = (generate(pipe, "a dog", [1], steps=1, clip_skip=skip) for skip in (None, 1))
    assert plain.image.tobytes() != skipped.image.tobytes()
    assert not hasattr(pipe.text_encoder, "text_model")
