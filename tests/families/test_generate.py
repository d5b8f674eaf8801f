"""`generate` asks every family's pipeline in its own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oft_diffusion.generate import generate
from oft_diffusion.load import load_pipeline
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of

# Their sizes come in bins, of which there are none as small as these models draw.
BINNED = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline")
OWN_SIZE = ("HiDreamImagePipeline", "Lumina2Pipeline")  # whatever they are asked for

# Distilled: no guidance but one that is embedded, or none at all.
UNGUIDED = ("FluxPipeline schnell",)


@pytest.mark.parametrize("name", [p for p in EVERY_FAMILY if p.values[0] not in BINNED])
def test_guidance_matters(name: str, folder_of: Callable[[str], Path]) -> None:
    pipe = load_pipeline(folder_of(name))

    def draw(guidance: float) -> Any:
        options: dict[str, Any] = {"steps": 2, "width": side_of(name), "height": side_of(name)}
        [picture] = generate(pipe, "a dog", [1], guidance=guidance, **options)
        return np.asarray(picture.image).astype(float)

    plain, guided = draw(1.0), draw(4.0)
    assert name in OWN_SIZE or plain.shape == (side_of(name), side_of(name), 3)
    assert (name in UNGUIDED) == np.array_equal(guided, plain)
