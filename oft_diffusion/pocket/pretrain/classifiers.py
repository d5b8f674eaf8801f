"""The stages that train the two classifiers: the perception, part of the autoencoder's loss, and the judge."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oft_diffusion.pocket.classifier import WIDTHS, AttributeClassifier
from oft_diffusion.pocket.pretrain.data import scene_at, to_model
from oft_diffusion.pocket.pretrain.setup import Setup
from oft_diffusion.pocket.pretrain.stage import Stage, generator, write_tensors
from oft_diffusion.pocket.world import ATTRIBUTES

BATCH = 64
PERCEPTION_WIDTHS = (32, 64, 128, 160)
LEARNING_RATE = 2e-3


def labels_of(seed: int, indices: list[int]) -> dict[str, Tensor]:
    """What the classifier should say about training pictures: per attribute, int64 (n,)."""
    scenes = [scene_at(seed, i) for i in indices]
    return {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        for name, values in ATTRIBUTES.items()
    }


def worn(x: Tensor, draw: torch.Generator) -> Tensor:
    """Pictures as a generator may draw them: some a little blurred, all a little noisy."""
    factor = 1 + 0.8 * float(torch.rand((), generator=draw))
    if torch.rand((), generator=draw) < 0.5:
        small = F.interpolate(x, scale_factor=1 / factor, mode="bilinear", antialias=True)
        x = F.interpolate(small, size=x.shape[-2:], mode="bilinear")
    return x + 0.08 * torch.rand((len(x), 1, 1, 1), generator=draw) * torch.randn(x.shape, generator=draw)


def train_classifier(
    setup: Setup, name: str, steps: int, widths: tuple[int, int, int, int] = WIDTHS
) -> tuple[Stage, AttributeClassifier]:
    """One of them, trained, or resumed from its snapshot; its weights are the moving average.

    Everything that is drawn by lot depends on the name, so that two of them share no more than the pictures.
    """
    torch.manual_seed(generator(setup.seed, name).initial_seed())
    classifier = AttributeClassifier(widths).to(setup.device)
    modules = nn.ModuleDict({"classifier": classifier})
    stage = Stage(setup.out / f"{name}.safetensors", modules, LEARNING_RATE, steps, setup.identity())

    def loss_at(step: int) -> Tensor:
        draw = generator(setup.seed, name, step)
        chosen = torch.randint(len(setup.pictures), (BATCH,), generator=draw)
        labels = labels_of(setup.seed, chosen.tolist())
        x = worn(to_model(setup.pictures[chosen.numpy()]), draw).to(setup.device)
        with setup.precision():
            logits = classifier(x)
        losses = [F.cross_entropy(logits[name].float(), labels[name].to(setup.device)) for name in labels]
        return torch.stack(losses).sum()

    stage.run(name, loss_at, setup.snapshot_every, lambda: None)
    stage.put(stage.ema)
    return stage, classifier.eval().requires_grad_(False)


def export_classifier(classifier: nn.Module, path: Path) -> None:
    """Writes the classifier as float16 safetensors."""
    write_tensors(path, {k: v.half() for k, v in classifier.state_dict().items()})
