"""Reading pictures with the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.world import ATTRIBUTES, SIZE

Reading = dict[str, str]
"""Per attribute the value that the classifier holds for the likeliest."""


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture at the classifier's size, float32 (128, 128, 3) from 0 to 1."""
    small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


@torch.no_grad()
def read(classifier: AttributeClassifier, pictures: Sequence[Image.Image]) -> list[Reading]:
    """What is in each picture. Pictures of other sizes are scaled to the classifier's."""
    device = next(classifier.parameters()).device
    x = torch.from_numpy(np.stack([pixels(p) for p in pictures])).to(device).permute(0, 3, 1, 2).mul(2).sub(1)
    chosen = {name: logits.argmax(1).tolist() for name, logits in classifier(x).items()}
    return [{name: ATTRIBUTES[name][chosen[name][i]] for name in ATTRIBUTES} for i in range(len(pictures))]
