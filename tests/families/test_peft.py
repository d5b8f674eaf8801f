"""The same random rotations through PEFT's OFT in the same pipeline: equal loss, and equal gradients by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.inject import oft_state_dict
from oft_diffusion.training.families import Family
from oft_diffusion.training.noise import Diffusion, Flow
from tests.helpers.tiny_families import side_of
from tests.library.support import excite

Load = Callable[[str], Family]
ORDER = 4  # of the series; PEFT counts its terms from the zeroth power
FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_peft(name: str, load: Load) -> None:
    ours, theirs = load(name), load(name)
    config = OFTConfig(block_size=8, parametrisation="cayley_neumann", neumann_order=ORDER)
    bank = inject_oft(ours.denoiser, config)
    excite(bank, norm=0.5)
    state = oft_state_dict(ours.denoiser)
    layers = list(bank.layer_slices("default"))
    peft.inject_adapter_in_model(
        peft.OFTConfig(
            r=0, oft_block_size=8, target_modules=layers, use_cayley_neumann=True, num_cayley_neumann_terms=ORDER + 1
        ),
        theirs.denoiser,
    )
    outcome: Any = peft.set_peft_model_state_dict(theirs.denoiser, state)
    assert not outcome.unexpected_keys

    plain, mine, peers = _loss(load(name)), _loss(ours), _loss(theirs)
    assert abs(float(mine - plain)) > 1e-4 * float(plain)
    assert float(mine.detach()) == pytest.approx(float(peers.detach()), rel=1e-5)
    mine.backward()
    peers.backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    found = {layer: gradient[rows] for layer, rows in bank.layer_slices("default").items()}
    expected = {layer: theirs.denoiser.get_submodule(layer).oft_R["default"].weight.grad for layer in layers}
    assert len(found) == len(layers) > 7
    scale = float(gradient.abs().max())
    assert scale > 1e-6
    for layer in layers:  # each by its own scale
        assert torch.allclose(found[layer], expected[layer], atol=1e-5 * float(expected[layer].abs().max())), layer


def _loss(family: Family) -> Tensor:
    """Of one fixed batch, noise and timestep."""
    generator = torch.Generator().manual_seed(0)
    latents, drawn = (
        torch.randn(2, *family.latent_shape(side_of(family.base.pipeline)), generator=generator) for _ in "xx"
    )
    levels = torch.tensor([200, 700])
    noise: Any = Flow() if family.FLOW else Diffusion(family.base.scheduler)
    with torch.no_grad():
        told = family.encode_text(["a dog", "a red mug"], side_of(family.base.pipeline))
    answer = family.predict(noise.add(latents, drawn, levels), noise.time(levels), told)
    return F.mse_loss(answer, family.pack(noise.target(latents, drawn, levels)))
