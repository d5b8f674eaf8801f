"""DreamBooth (arXiv 2208.12242) with OFTv2 (arXiv 2506.19847): the whole method in one short file.

    python train_scripts/train_dreambooth_minimal.py MODEL PICTURES sks dog --steps 500 --class-images runs/class_dogs

MODEL is a Stable Diffusion 1.x or 2.x folder, PICTURES a folder with a few pictures of the subject. This is what
`oft_diffusion.training.train` does, less its care for files, memory and mistakes: a test holds both to the same losses.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps

from oft_diffusion import OFTConfig, inject_oft, save_oft_weights


def images_in(folder: Path) -> list[Path]:
    """PNG, JPEG and WebP files, by name."""
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))


def read_square(path: Path, side: int) -> torch.Tensor:
    """The central square of an image, in [-1, 1]: `(3, side, side)`."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def main(argv: list[str] | None = None) -> list[float]:
    """Train an adapter. Returns every step's loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("trigger", help="a rare word that will name the subject")
    parser.add_argument("class_word", help="what the subject is")
    parser.add_argument("--class-images", type=Path, help="folder for prior preservation; filled if empty")
    parser.add_argument("--class-count", type=int, default=100)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/minimal"))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pictures = images_in(args.pictures) or parser.error(f"{args.pictures} holds no PNG, JPEG or WebP images")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe: Any = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, use_safetensors=True)
    pipe.to(device)
    schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)

    # The subject gets a word that means nothing yet. Class images, drawn by the base, keep the class word's meaning.
    streams = {"instance": (pictures, f"a photo of {args.trigger} {args.class_word}")}
    if args.class_images is not None:
        prompt = f"a photo of {args.class_word}"
        args.class_images.mkdir(parents=True, exist_ok=True)
        for i in range(0 if images_in(args.class_images) else args.class_count):
            generator = torch.Generator().manual_seed(i)
            image = pipe(prompt, height=args.resolution, width=args.resolution, generator=generator).images[0]
            image.save(args.class_images / f"class_{i:05d}.png")
        streams["class"] = (images_in(args.class_images), prompt)

    # Every picture becomes the VAE's posterior, every prompt token ids.
    posteriors, tokens = {}, {}
    for stream, (paths, prompt) in streams.items():
        with torch.no_grad():
            pixels = [read_square(path, args.resolution)[None].to(device) for path in paths]
            posteriors[stream] = [pipe.vae.encode(p).latent_dist for p in pixels]
        tokens[stream] = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids

    # OFT: each attention projection's input is rotated, block by block. The base is frozen; the rotations' generators,
    # zero at first, are all that learns. A pre-hook builds the rotations from them in every forward.
    bank = inject_oft(pipe.unet, OFTConfig(block_size=args.block_size), "default")
    optimizer = torch.optim.AdamW(bank.parameters(), lr=args.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(args.steps):
        # One sample per stream. All that is random about it comes from a generator of its own.
        samples = []
        for stream in streams:
            generator = torch.Generator().manual_seed(random.Random(f"{args.seed} {stream} {step}").getrandbits(63))
            epoch, place = divmod(step, len(posteriors[stream]))
            order = list(range(len(posteriors[stream])))
            random.Random(f"{args.seed} {stream} epoch {epoch}").shuffle(order)
            posterior = posteriors[stream][order[place]]
            sampled = torch.randn(posterior.mean.shape, generator=generator).to(device)
            latents = (posterior.mean + posterior.std * sampled) * pipe.vae.config.scaling_factor
            noise = torch.randn(latents.shape, generator=generator).to(device)
            quarter = (step % 4 + torch.rand(1, generator=generator, dtype=torch.float64)) / 4  # each in turn
            timestep = (quarter * schedule.config.num_train_timesteps).long().to(device)
            samples.append((latents, noise, timestep, tokens[stream]))
        latents, noise, timesteps, ids = (torch.cat(parts) for parts in zip(*samples, strict=True))

        # The diffusion objective: say what noise (or velocity, or clean latents) is in the noisy latents.
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = pipe.unet(noisy, timesteps, pipe.text_encoder(ids.to(device))[0]).sample
        velocity = schedule.get_velocity(latents, noise, timesteps)
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[schedule.config.prediction_type]
        per_sample = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        loss = per_sample.sum()  # the subject's, and the class's with weight 1

        loss.backward()
        torch.nn.utils.clip_grad_norm_(bank.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1} of {args.steps}  loss {losses[-1]:.4f}", flush=True)
    save_oft_weights(pipe, args.output_dir, adapter_name="default")
    return losses


if __name__ == "__main__":
    main()
