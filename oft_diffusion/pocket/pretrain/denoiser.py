"""The stage that trains denoiser and text encoder on cached latents, and the export of the whole pipeline."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from oft_diffusion.pocket.model import build_scheduler, build_text_encoder, build_unet
from oft_diffusion.pocket.pretrain.captions import training_caption
from oft_diffusion.pocket.pretrain.data import scene_at
from oft_diffusion.pocket.pretrain.setup import Setup
from oft_diffusion.pocket.pretrain.stage import Stage, generator
from oft_diffusion.pocket.vocabulary import build_tokenizer
from oft_diffusion.pocket.world import is_held_out

LEARNING_RATE = 1e-3
RECALL_WEIGHT = 0.05
PREVIEW_PROMPTS = (
    "a red mug", "a green car on the beach", "a blue boat at night", "a purple spotted teapot in the desert",
    "an orange house in a meadow", "a red spotted mushroom in the forest", "a teal robot in the city", "a tree",
    "a white striped cat in a room", "a yellow rocket at night", "a photo of a pink flower in the snow", "a fish",
    "a mug in the snow", "a zwx brown car in the forest", "a brown striped boat", "a white teapot on the beach",
)  # fmt: skip


class Denoiser:
    """Denoiser and text encoder while they learn together, on latents of the autoencoder whose digest is `of`."""

    def __init__(self, setup: Setup, vae: AutoencoderKL, steps: int, batch_size: int, of: str) -> None:
        torch.manual_seed(setup.seed)
        self.setup, self.vae, self.batch_size = setup, vae, batch_size
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        self.unet = build_unet().to(setup.device)
        encoder: Any = build_text_encoder(self.tokenizer)
        self.text_encoder = encoder.to(setup.device)
        # Says every token again from its embedding; not exported. Without it the text encoder would learn that words
        # which mean nothing may be forgotten, and a trigger could not be told from the class word beside it.
        self.recall = nn.Linear(encoder.config.hidden_size, len(self.tokenizer)).to(setup.device)
        self.scheduler = build_scheduler()
        modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder, "recall": self.recall})
        identity = setup.identity(batch_size=batch_size, latents=of)
        self.stage = Stage(setup.out / "unet.safetensors", modules, LEARNING_RATE, steps, identity)

    def train(self, latents: Tensor) -> None:
        """Predicts v on timesteps spread evenly over each batch; no weighting, no dropout."""
        setup, size = self.setup, self.batch_size
        alphas = self.scheduler.alphas_cumprod.to(setup.device)
        scenes = [scene_at(setup.seed, i) for i in range(len(latents))]
        shown = [i for i, s in enumerate(scenes) if not is_held_out(s.object, s.colour, s.pattern, s.background)]
        latents, scenes = latents[shown], [scenes[i] for i in shown]

        def loss_at(step: int) -> Tensor:
            draw, words = generator(setup.seed, "unet", step), random.Random(f"{setup.seed}/words/{step}")
            chosen = torch.randint(len(latents), (size,), generator=draw)
            x = latents[chosen].float().to(setup.device) * self.vae.config.scaling_factor
            spread = (torch.arange(size) + torch.rand(size, generator=draw)) / size
            t = (spread * len(alphas)).long().to(setup.device)
            noise = torch.randn(x.shape, generator=draw).to(setup.device)
            signal, sigma = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
            ids = self.tokenize([training_caption(scenes[i], words) for i in chosen.tolist()])
            # The plain products are faster than the fused kernel in training on a CPU, at these lengths.
            with setup.precision(), sdpa_kernel(SDPBackend.MATH):
                embeddings = self.text_encoder(ids)[0]
                v = self.unet(signal * x + sigma * noise, t, embeddings).sample.float()
                recall = F.cross_entropy(self.recall(embeddings).float().flatten(0, 1), ids.flatten())
            return F.mse_loss(v, signal * noise - sigma * x) + RECALL_WEIGHT * recall

        self.stage.run("unet", loss_at, setup.snapshot_every, self.preview)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts to int64 (n, 32)."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.setup.device)

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

    def preview(self) -> None:
        """Draws the preview prompts with the moving average."""
        with self.stage.averaged(), self.setup.precision():
            draws = [torch.Generator().manual_seed(i) for i in range(len(PREVIEW_PROMPTS))]
            images = self.pipeline()(
                list(PREVIEW_PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=draws
            ).images
        self.setup.preview([images[i : i + 4] for i in range(0, len(images), 4)], f"unet-{self.stage.step:06d}")

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
        # vocab.json and merges.txt, as CLIP has them
        self.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        print(f"exported step {self.stage.step} to {folder}", flush=True)
