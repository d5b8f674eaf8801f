"""Drawing prompts from seeds in batches, and reading the pictures with the classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.world import ATTRIBUTES, SIZE

Reading = dict[str, str]
"""Per attribute the value that the classifier holds for the likeliest."""


@torch.no_grad()
def read(classifier: AttributeClassifier, pictures: Sequence[Image.Image]) -> list[Reading]:
    """What is in each picture. Pictures of other sizes are scaled to the classifier's."""
    arrays = [np.asarray(p.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)) for p in pictures]
    device = next(classifier.parameters()).device
    x = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    chosen = {name: logits.argmax(1).tolist() for name, logits in classifier(x).items()}
    return [{name: ATTRIBUTES[name][chosen[name][i]] for name in ATTRIBUTES} for i in range(len(pictures))]


def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, batch_size: int = 16
) -> Iterator[list[Image.Image]]:
    """One picture per prompt and seed, batch by batch. The noise of a seed does not depend on its batch."""
    for start in range(0, len(prompts), batch_size):
        few = slice(start, start + batch_size)
        yield pipe(
            list(prompts[few]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[few]],
        ).images
