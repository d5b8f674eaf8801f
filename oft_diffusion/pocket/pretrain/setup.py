"""What all stages of pretraining share: where, on which pictures, from which seed, on which device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Setup:
    """The circumstances of a pretraining run.

    Attributes:
        out: folder of snapshots, pictures and previews.
        pictures: all training pictures, uint8 (n, 128, 128, 3).
        seed: of everything that is drawn by lot.
        device: where the models are.
        bf16: whether forwards run under bfloat16 autocast; weights and optimizers are float32 in any case.
        snapshot_every: steps between snapshots.
    """

    out: Path
    pictures: np.ndarray
    seed: int
    device: torch.device
    bf16: bool
    snapshot_every: int

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast in which forwards run."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def identity(self, **more: Any) -> dict[str, Any]:
        """What a stage's result depends on, beside its own learning rate."""
        return {"seed": self.seed, "pictures": len(self.pictures), "bf16": self.bf16, **more}

    def preview(self, rows: Sequence[Sequence[Image.Image]], name: str) -> None:
        """Writes rows of pictures as `preview-<name>.png`."""
        height, width = rows[0][0].height, max(len(row) for row in rows)
        sheet = Image.new("RGB", (width * rows[0][0].width, height * len(rows)))
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                sheet.paste(picture, (j * picture.width, i * height))
        sheet.save(self.out / f"preview-{name}.png")
