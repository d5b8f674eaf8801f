"""Our loss is that of diffusers' own DreamBooth scripts, whose runs tests/helpers/record_dreambooth.py recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.batches import Batch
from oft_diffusion.training.data import normalise
from oft_diffusion.training.families.kinds import Sana
from oft_diffusion.training.losses import losses
from oft_diffusion.training.prepare import Parts
from tests.helpers.record_dreambooth import (
    CLASS_PROMPT,
    PRIOR_WEIGHT,
    PROMPT,
    RECORD,
    SCRIPTS,
    STEPS,
    TENSORS,
    WITHOUT_PRIOR,
    digest,
)  # fmt: skip
from tests.helpers.tiny_families import side_of

TOLERANCE = 1e-5  # relative, float32
# The scripts know no dynamic shift: of these families' noise levels they move none. Lumina's moves its levels, which
# run backwards, towards the picture instead of the noise.
SHIFTS = {
    "FluxPipeline": 1.0,
    "QwenImagePipeline": 1.0,
    "Krea2Pipeline": 1.0,
    "SanaPipeline": 1.0,
    "Lumina2Pipeline": 1 / 6,
}


BFLOAT16_TEXT = ("SanaPipeline", "Lumina2Pipeline")  # these scripts cast Gemma whatever the precision is


@pytest.fixture(scope="module")
def told() -> Any:
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(TENSORS)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", SCRIPTS, ids=lambda name: str(name).removesuffix("Pipeline"))
def test_a_scripts_losses_are_ours(
    name: str, told: Any, tensors: dict[str, Tensor], folder_of: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Sana's pipeline puts an instruction before every prompt, in training with us too; the script leaves it out.
    monkeypatch.setattr(Sana, "CALL", {**Sana.CALL, "complex_human_instruction": None})
    expected = told["families"][name]
    assert digest(folder_of(name)) == expected["base"], "the libraries draw other random weights now: record again"
    prior = name not in WITHOUT_PRIOR
    pictures = [tensors[f"{name}/{step}/pixels"] for step in range(STEPS)]
    more: dict[str, Any] = {"timestep_shift": SHIFTS.get(name)}
    if prior:
        more |= {
            "prior_preservation": True, "prior_weight": PRIOR_WEIGHT, "class_prompts": (CLASS_PROMPT,),
            "class_dir": str(write_pictures([p[1] for p in pictures], tmp_path / "classes")), "num_class_images": STEPS,
        }  # fmt: skip
    config = TrainConfig(
        model=str(folder_of(name)), instance_dir=str(write_pictures([p[0] for p in pictures], tmp_path / "instances")),
        trigger="sks", class_word="mug", output_dir=str(tmp_path / "run"), resolution=side_of(name), batch_size=1,
        block_size=8, cache_text_embeddings=False, cache_latents=False, steps=1, **more,
    )  # fmt: skip
    with train(config, progress=False) as run:
        assert run.parts is not None
        if name in BFLOAT16_TEXT:
            run.parts.family.module("text_encoder").to(torch.bfloat16)
        for step in range(STEPS):
            drawn = {what: tensors.get(f"{name}/{step}/{what}") for what in ("pixels", "posterior_noise", "noise")}
            batch = batch_of(run.parts, drawn, torch.tensor(expected["timesteps"][step]), config.resolution)
            with torch.no_grad():
                instance, kept = losses(run.parts, batch, config)
            loss = float(instance + config.prior_weight * kept)
            tolerance = TOLERANCE * (10 if name in BFLOAT16_TEXT else 1)  # processors round bfloat16 sums differently
            assert loss == pytest.approx(expected["losses"][step], rel=tolerance)


def batch_of(parts: Parts, drawn: Mapping[str, Any], told: Tensor, resolution: int) -> Batch:
    """What the script drew, as our loop has it. `told` is what the script told its denoiser of the noise levels."""
    family, shape = parts.family, parts.family.latent_shape(resolution)
    ours = family.timestep(parts.noise.time(torch.arange(parts.noise.count)))
    distance, levels = (ours[None] - told[:, None]).abs().min(dim=1)
    assert (distance <= 1e-6 * ours.max()).all()
    noise = drawn["noise"].reshape(-1, *shape)  # videos have an axis more
    posterior_noise = drawn["posterior_noise"]
    if posterior_noise is None:  # an autoencoder without noise
        posterior_noise = torch.zeros_like(noise)
    posteriors = [family.encode_image(normalise(p.reshape(3, resolution, resolution))) for p in drawn["pixels"]]
    latents = [family.latents(p, n) for p, n in zip(posteriors, posterior_noise, strict=True)]
    return Batch(torch.stack(latents), noise, levels, (PROMPT, CLASS_PROMPT)[: len(noise)], None, instances=1)


def write_pictures(pictures: Sequence[Tensor], folder: Path) -> Path:
    """Pictures, uint8 `(3, H, W)`, a video's frame `(3, 1, H, W)`, as files."""
    folder.mkdir()
    for i, picture in enumerate(pictures):
        rows = picture.reshape(3, *picture.shape[-2:]).permute(1, 2, 0)
        Image.fromarray(rows.contiguous().numpy()).save(folder / f"{i}.png")
    return folder


def test_the_record_says_where_it_comes_from(told: Any) -> None:
    assert set(told["families"]) == set(SCRIPTS)
    assert len(told["commit"]) == 40
    assert told["tag"] in told["command"]
    for entry in told["families"].values():
        assert len(set(entry["losses"])) == STEPS
