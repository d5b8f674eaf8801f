"""The stages that train the autoencoder: first a wide one as a whole, then the condensed one's decoder by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.model import build_vae
from oft_diffusion.pocket.pretrain.data import to_model, to_pictures
from oft_diffusion.pocket.pretrain.latents import condense
from oft_diffusion.pocket.pretrain.setup import Setup
from oft_diffusion.pocket.pretrain.stage import Stage, digest, generator, write_tensors

WIDE_CHANNELS = 16  # of the autoencoder while it learns: with few channels, some die and take colours with them
BATCH = 8
KL_WEIGHT = 3e-5
POSTERIOR_DEVIATION = 0.1
CONDENSED_FROM = 2048  # pictures, whose latents' principal components are taken
LATENT_NOISE = 0.3  # at most, of the decoder's inputs in its own stage: it must forgive a denoiser's errors


@dataclass(frozen=True)
class PictureLoss:
    """How far two pictures are apart: in pixels, in edges, and in what the classifier sees in them."""

    classifier: AttributeClassifier
    perceptual_weight: float = 0.5

    def __call__(self, drawn: Tensor, real: Tensor) -> Tensor:
        edges = sum((a - b).abs().mean() for a, b in zip(_edges(drawn), _edges(real), strict=True))
        with torch.no_grad():
            expected = [_unit(m) for m in self.classifier.features(real)[:3]]
        seen = [_unit(m) for m in self.classifier.features(drawn)[:3]]
        perceptual = sum((a - b).square().sum(1).mean() for a, b in zip(seen, expected, strict=True))
        return (drawn - real).abs().mean() + 0.5 * edges + self.perceptual_weight * perceptual


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def _unit(features: Tensor) -> Tensor:
    """Every position's feature vector scaled to length 1, as LPIPS compares them."""
    return F.normalize(features.float(), dim=1, eps=1e-4)


def train_vae(setup: Setup, picture_loss: PictureLoss, steps: int) -> tuple[Stage, AutoencoderKL]:
    """The wide autoencoder, with a little of the KL divergence."""
    torch.manual_seed(setup.seed)
    vae = build_vae(WIDE_CHANNELS).to(setup.device)
    stage = Stage(setup.out / "vae.safetensors", nn.ModuleDict({"vae": vae}), 1e-3, steps, setup.identity())

    def loss_at(step: int) -> Tensor:
        draw = generator(setup.seed, "vae", step)
        chosen = torch.randint(len(setup.pictures), (BATCH,), generator=draw).numpy()
        x = to_model(setup.pictures[chosen], setup.device)
        with setup.precision():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draw).to(setup.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
            loss = picture_loss(y, x)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return loss + KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()

    def snapshot() -> None:
        x = to_model(setup.pictures[:16], setup.device)
        with stage.averaged(), setup.precision():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float()
        setup.preview([to_pictures(x), to_pictures(y)], "vae")
        print(f"vae {stage.step}: L1 {(x - y).abs().mean():.4f}", flush=True)

    stage.run("vae", loss_at, setup.snapshot_every, snapshot)
    stage.put(stage.ema)
    return stage, vae.eval()


@torch.no_grad()
def encoded(setup: Setup, vae: AutoencoderKL, count: int) -> Tensor:
    """The posterior means of the first pictures, float32 (count, channels, 16, 16)."""
    parts = []
    for start in range(0, count, 32):
        with setup.precision():
            x = to_model(setup.pictures[start : min(count, start + 32)], setup.device)
            parts.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(parts).contiguous()  # whatever layout the convolutions left


def condensed(setup: Setup, wide: AutoencoderKL, of: str) -> tuple[AutoencoderKL, str]:
    """The wide autoencoder, whose digest is `of`, condensed once and kept in a file; with its own digest.

    Kept, since the signs of principal components may differ from one machine to the next, and latents with them.
    """
    path = setup.out / "condensed.safetensors"
    vae = build_vae()
    if _noted(path) != of:
        vae = condense(wide, encoded(setup, wide, min(CONDENSED_FROM, len(setup.pictures))), POSTERIOR_DEVIATION)
        write_tensors(path, vae.state_dict(), {"of": of})
    vae.load_state_dict(load_file(path))
    return vae.to(setup.device).eval(), digest(vae.state_dict())


def cached_latents(setup: Setup, vae: AutoencoderKL, of: str) -> Tensor:
    """`encoded` of all pictures by the autoencoder whose digest is `of`, float16, kept in a file.

    Sets the autoencoder's scaling factor.
    """
    path = setup.out / "latents.safetensors"
    if _noted(path) != of:
        print("encoding the pictures", flush=True)
        write_tensors(path, {"latents": encoded(setup, vae, len(setup.pictures)).half()}, {"of": of})
    latents = load_file(path)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 4))
    return latents


def _noted(path: Path) -> str | None:
    """What the file was made of."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("of")


def train_decoder(
    setup: Setup, vae: AutoencoderKL, latents: Tensor, picture_loss: PictureLoss, steps: int, of: str
) -> Stage:
    """The decoder alone, in place, on latents with noise of varying strength; the encoder stays as it is.

    `of` is the digest of the autoencoder that the latents are from.
    """
    modules = nn.ModuleDict({"decoder": vae.decoder})
    stage = Stage(setup.out / "decoder.safetensors", modules, 5e-4, steps, setup.identity(latents=of))

    def loss_at(step: int) -> Tensor:
        draw = generator(setup.seed, "decoder", step)
        chosen = torch.randint(len(latents), (BATCH,), generator=draw)
        strength = LATENT_NOISE * torch.rand((BATCH, 1, 1, 1), generator=draw)
        clean = latents[chosen].float()
        noisy = clean + strength * torch.randn(clean.shape, generator=draw)
        with setup.precision():
            y = vae.decode(noisy.to(setup.device)).sample.float()
            return picture_loss(y, to_model(setup.pictures[chosen.numpy()], setup.device))

    def snapshot() -> None:
        clean = latents[:16].float()
        noisy = clean + LATENT_NOISE * torch.randn(clean.shape, generator=generator(0))
        with stage.averaged(), setup.precision():
            rows = [to_pictures(vae.decode(z.to(setup.device)).sample) for z in (clean, noisy)]
        setup.preview(rows, "decoder")

    stage.run("decoder", loss_at, setup.snapshot_every, snapshot)
    stage.put(stage.ema)
    return stage
