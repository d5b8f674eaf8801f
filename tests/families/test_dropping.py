"""Dropped encoders are read from disk anew in every family, and what they say and draw is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from oft_diffusion.training.count import bytes_of
from oft_diffusion.training.families import Family, where
from oft_diffusion.training.memory import tensor_bytes
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of


def equal(one: Any, other: Any) -> bool:
    """Of tensors, lists and dictionaries, however nested."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return all(equal(one[name], other[name]) for name in one)
    return bool(one == other)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_what_was_dropped_comes_back_as_it_was(name: str, load: Callable[[str], Family]) -> None:
    family, side = load(name), side_of(name)
    pixels, noise = torch.rand(3, side, side) * 2 - 1, torch.randn(family.latent_shape(side))
    told, posterior = family.encode_text(["a dog"], side), family.encode_image(pixels)
    latents, described = family.latents(posterior, noise), family.describe()
    how = (["a dog"], [1], side, 2, 3.0)
    [picture] = family.sample(*how)
    names = ("vae", *family.base.text_encoders)
    size, random = bytes_of(family.module(part) for part in names), torch.get_rng_state()

    family.drop(*names)
    assert {where(family.module(part)).type for part in names} == {"meta"}
    assert size > 0 == tensor_bytes([p for part in names for p in family.module(part).parameters() if not p.is_meta])
    assert torch.equal(family.latents(posterior, noise), latents)  # a step needs the VAE's config, and its statistics
    assert family.describe() == described
    [again] = family.sample(*how)
    assert again.tobytes() == picture.tobytes()
    assert equal(told, family.encode_text(["a dog"], side))
    with family.whole(), family.whole():
        assert bytes_of(family.module(part) for part in names) == size
        assert torch.equal(family.encode_image(pixels).mean, posterior.mean)
    assert {where(family.module(part)).type for part in names} == {"meta"}
    assert torch.equal(torch.get_rng_state(), random)
