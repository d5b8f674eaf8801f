"""Pretrains the pocket base from nothing, in one command, and exports it as a diffusers folder.

python train_scripts/pretrain_pocket.py --out runs/pocket --export oft_diffusion/pocket/weights

Stages: render pictures (once), train a wide autoencoder and condense its latents, encode the pictures (once), train
the decoder on noisy latents, train denoiser and text encoder together. Each stage leaves a snapshot in --out, as
safetensors; running the same command again goes on from there.
All random draws of a step come from a generator seeded by (seed, stage, step), so on a CPU a resumed run is equal to
an uninterrupted one, and no generator state needs saving.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from oft_diffusion.errors import OFTError
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket.captions import training_caption
from oft_diffusion.pocket.latents import condense
from oft_diffusion.pocket.model import SIZE, build_scheduler, build_text_encoder, build_unet, build_vae
from oft_diffusion.pocket.stage import Stage, generator
from oft_diffusion.pocket.vocabulary import build_tokenizer
from oft_diffusion.pocket.world import Scene, render, sample_scene

KL_WEIGHT = 3e-5
WIDE_CHANNELS = 8  # of the autoencoder while it learns: with few channels, some die and take colours with them
POSTERIOR_DEVIATION = 0.1
LATENT_NOISE = 0.3  # at most, of the decoder's inputs in its second stage: it must forgive a denoiser's errors
PREVIEW_PROMPTS = (
    "a red mug", "a green car on the beach", "a blue boat at night", "a purple spotted teapot in the desert",
    "an orange house in a meadow", "a red spotted mushroom in the forest", "a teal robot in the city", "a tree",
    "a white striped cat in a room", "a yellow rocket at night", "a photo of a pink flower in the snow", "a fish",
    "a mug in the snow", "a zwx brown car in the forest", "a brown striped boat", "a white teapot on the beach",
)  # fmt: skip


# Data


def scene_at(seed: int, index: int) -> Scene:
    """The scene of one training picture."""
    return sample_scene(random.Random(f"scene/{seed}/{index}"))


def _render_part(path: Path, seed: int, indices: range) -> None:
    pictures = np.load(path, mmap_mode="r+")
    for i in indices:
        pictures[i] = np.asarray(render(scene_at(seed, i), SIZE))
    pictures.flush()


def rendered(out: Path, count: int, seed: int) -> np.ndarray:
    """All training pictures, uint8 (count, 64, 64, 3), rendered by two processes on the first call."""
    path = out / f"pictures-{count}-{seed}.npy"
    if not path.exists():
        print(f"rendering {count} pictures", flush=True)
        partial = out / "pictures.partial.npy"
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)).flush()
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=_render_part, args=(partial, seed, range(k, count, 2))) for k in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            if worker.exitcode:
                raise RuntimeError(f"a rendering process ended with exit code {worker.exitcode}")
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def to_model(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, h, w, 3) to float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures.copy()).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def run_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The options on which a stage's result depends beside its own learning rate and steps."""
    return {"seed": args.seed, "pictures": args.pictures, **more}


def to_pictures(x: Tensor) -> list[Image.Image]:
    """Float (n, 3, h, w) in [-1, 1] to pictures."""
    pixels = x.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


# The stages


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels along both axes."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def picture_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 of pixels, and half of that of their gradients."""
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(x), gradients(y), strict=True))
    return (x - y).abs().mean() + 0.5 * edges


def train_vae(args: argparse.Namespace, pictures: np.ndarray, device: torch.device) -> Stage:
    """The wide autoencoder, with a little of the KL divergence."""
    torch.manual_seed(args.seed)
    vae = build_vae(WIDE_CHANNELS).to(device)
    stage = Stage(args.out / "vae.safetensors", nn.ModuleDict({"vae": vae}), 1e-3, args.vae_steps, run_of(args))

    def loss_at(step: int) -> Tensor:
        draw = generator(args.seed, "vae", step)
        chosen = torch.randint(len(pictures), (8,), generator=draw).numpy()
        x = to_model(pictures[chosen], device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw).to(device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return picture_loss(x, y) + KL_WEIGHT * kl

    def snapshot() -> None:
        x = to_model(pictures[:16], device)
        with stage.averaged():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        save_png(labelled_grid([to_pictures(x), to_pictures(y)]), args.out / "preview-vae.png")
        print(f"vae {stage.step}: L1 {(x - y).abs().mean():.4f}", flush=True)

    stage.run("vae", loss_at, args.snapshot_every, snapshot)
    stage._put(stage.ema)
    return stage


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """The pictures' posterior means, float32 (n, channels, 16, 16)."""
    parts = [
        vae.encode(to_model(pictures[i : i + 64], device)).latent_dist.mean.cpu() for i in range(0, len(pictures), 64)
    ]
    return torch.cat(parts).contiguous()  # whatever layout the convolutions left


def cached_latents(args: argparse.Namespace, vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """`encoded`, from a file after the first call; sets the autoencoder's scaling factor."""
    path = args.out / f"latents-{len(pictures)}-{args.seed}-{args.vae_steps}.safetensors"
    if not path.exists():
        print("encoding the pictures", flush=True)
        save_file({"latents": encoded(vae, pictures, device)}, path)
    latents = load_file(path)["latents"]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents


def train_decoder(
    args: argparse.Namespace, vae: AutoencoderKL, latents: Tensor, pictures: np.ndarray, device: torch.device
) -> None:
    """The decoder alone, on latents with noise of varying strength; the encoder stays as it is."""
    modules = nn.ModuleDict({"decoder": vae.decoder})
    stage = Stage(args.out / "decoder.safetensors", modules, 5e-4, args.decoder_steps, run_of(args))

    def loss_at(step: int) -> Tensor:
        draw = generator(args.seed, "decoder", step)
        chosen = torch.randint(len(latents), (8,), generator=draw)
        strength = LATENT_NOISE * torch.rand((8, 1, 1, 1), generator=draw)
        noisy = latents[chosen] + strength * torch.randn(latents[chosen].shape, generator=draw)
        return picture_loss(to_model(pictures[chosen.numpy()], device), vae.decode(noisy.to(device)).sample)

    def snapshot() -> None:
        with stage.averaged():
            shown = [
                latents[:16],
                latents[:16] + LATENT_NOISE * torch.randn(latents[:16].shape, generator=generator(0)),
            ]
            rows = [to_pictures(vae.decode(z.to(device)).sample) for z in shown]
        save_png(labelled_grid(rows), args.out / "preview-decoder.png")

    stage.run("decoder", loss_at, args.snapshot_every, snapshot)
    stage._put(stage.ema)


class Denoiser:
    """The stage that trains denoiser and text encoder on cached latents, and what it shows and exports."""

    def __init__(self, args: argparse.Namespace, vae: AutoencoderKL, device: torch.device) -> None:
        torch.manual_seed(args.seed)
        self.args, self.vae, self.device = args, vae, device
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        self.unet = build_unet().to(device)
        encoder: Any = build_text_encoder(self.tokenizer)
        self.text_encoder = encoder.to(device)
        self.scheduler = build_scheduler()
        modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.stage = Stage(
            args.out / "unet.safetensors", modules, 1e-3, args.unet_steps, run_of(args, batch_size=args.batch_size)
        )

    def embed(self, prompts: list[str]) -> Tensor:
        """Prompts to (n, 32, 128)."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device))[0]

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline around the modules as they are now."""
        pipe = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def train(self, latents: Tensor) -> None:
        """Predicts v on uniformly drawn timesteps; no weighting, no dropout."""
        alphas = self.scheduler.alphas_cumprod.to(self.device)
        scenes = [scene_at(self.args.seed, i) for i in range(len(latents))]

        def loss_at(step: int) -> Tensor:
            draw, words = generator(self.args.seed, "unet", step), random.Random(f"{self.args.seed}/words/{step}")
            chosen = torch.randint(len(latents), (self.args.batch_size,), generator=draw)
            x = latents[chosen].to(self.device) * self.vae.config.scaling_factor
            t = torch.randint(len(alphas), (len(x),), generator=draw).to(self.device)
            noise = torch.randn(x.shape, generator=draw).to(self.device)
            signal, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
            prompts = [training_caption(scenes[i], words) for i in chosen.tolist()]
            v = self.unet(signal * x + sigma * noise, t, self.embed(prompts)).sample
            return F.mse_loss(v, signal * noise - sigma * x)

        self.stage.run("unet", loss_at, self.args.snapshot_every, self.snapshot)

    def snapshot(self) -> None:
        """A preview, and the export if one was asked for."""
        with self.stage.averaged():
            draws = [torch.Generator().manual_seed(i) for i in range(len(PREVIEW_PROMPTS))]
            images = self.pipeline()(list(PREVIEW_PROMPTS), num_inference_steps=20, generator=draws).images
        rows = [images[i : i + 4] for i in range(0, len(images), 4)]
        save_png(labelled_grid(rows), self.args.out / f"preview-unet-{self.stage.step:06d}.png")
        if self.args.export:
            self.export(self.args.export)

    def export(self, folder: Path) -> None:
        """Writes the moving average as a float16 diffusers folder, and puts it in place only when it is whole."""
        partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with self.stage.averaged():
            pipe = copy.deepcopy(self.pipeline())
        # The text encoder, which is small, stays float32: transformers loads in the dtype of the file, where diffusers
        # loads in float32, and a pipeline of both would not run.
        pipe.unet.half()
        pipe.vae.half()
        pipe.save_pretrained(partial, safe_serialization=True)
        self.tokenizer.backend_tokenizer.model.save(
            str(partial / "tokenizer")
        )  # vocab.json and merges.txt, as CLIP has
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        print(f"exported step {self.stage.step} to {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="snapshots, pictures and previews")
    parser.add_argument("--export", type=Path, help="write the float16 diffusers folder here, at every snapshot")
    parser.add_argument("--export-only", action="store_true", help="export the last snapshot and stop")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--decoder-steps", type=int, default=900)
    parser.add_argument("--unet-steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=32, help="of the denoiser")
    parser.add_argument("--pictures", type=int, default=32768, help="how many are rendered")
    parser.add_argument("--snapshot-every", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.export_only and args.export is None:
        parser.error("--export-only needs --export FOLDER, where to")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    pictures = rendered(args.out, args.pictures, args.seed)
    wide = train_vae(args, pictures, device).modules["vae"].eval()
    vae = condense(wide, encoded(wide, pictures[:2048], device), POSTERIOR_DEVIATION).eval()
    latents = cached_latents(args, vae, pictures, device)
    train_decoder(args, vae, latents, pictures, device)
    vae.requires_grad_(False)
    denoiser = Denoiser(args, vae, device)
    if args.export_only:
        denoiser.export(args.export)
    else:
        denoiser.train(latents)


if __name__ == "__main__":
    try:
        main()
    except OFTError as error:
        sys.exit(f"error: {error}")
