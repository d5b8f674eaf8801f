"""What differs between model families: one small class each. Everything else in `training/` is the same for all.

A family loads a base, turns prompts and pictures into what its denoiser takes, and says what the denoiser should have
answered. The loop calls, in this order: `tokenize`, `encode_text`, `encode_image`, `add_noise`, `predict`, `target`,
`loss_weight`; and `sample` for pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oft_diffusion.errors import ConfigError, TrainingError, first_line
from oft_diffusion.pipeline import describe_base
from oft_diffusion.training.base import Base

# CLIP's tokenizer numbers its words by frequency: ids past this one are words that hardly occur in captions.
COMMON_BELOW = 40_000

AT_ONCE = 4  # pictures per pipeline call; guidance makes that eight rows for the UNet

Text = Mapping[str, Tensor]


class Posterior(NamedTuple):
    """A VAE's answer to one picture: mean and standard deviation, float32 `(C, h, w)`."""

    mean: Tensor
    std: Tensor


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: epsilon, v-prediction or sample, as the scheduler's config says.

    Attributes:
        unet, text_encoder: frozen; they may carry adapters. In the dtype asked for.
        vae: frozen, always float32, since half precision overflows in some VAEs.
        noise_schedule: the training schedule, from the base's scheduler config.
    """

    name = "stable-diffusion"

    # The components are typed Any: nn.Module's stubs take every attribute of theirs for a tensor.
    def __init__(self, pipeline: Any, base: Base) -> None:
        self.base = base
        self.unet: Any = pipeline.unet
        self.text_encoder: Any = pipeline.text_encoder
        self.vae: Any = pipeline.vae.float()
        self.tokenizer: Any = pipeline.tokenizer
        self.sampler: Any = pipeline.scheduler
        schedule: Any = DDPMScheduler
        known = schedule().config
        self.noise_schedule = schedule(**{k: v for k, v in self.sampler.config.items() if k in known and k[0] != "_"})
        for module in (self.unet, self.text_encoder, self.vae):
            module.requires_grad_(False).eval()

    @classmethod
    def load(cls, base: Base, dtype: torch.dtype) -> StableDiffusion:
        """Load a base that `find_base` accepted, onto the CPU.

        Raises:
            TrainingError: diffusers cannot load it.
        """
        options: dict[str, Any] = {"dtype": dtype, "safety_checker": None, "local_files_only": True}
        try:
            if base.single_file:
                pipeline = StableDiffusionPipeline.from_single_file(
                    str(base.weights), config=str(base.configs), **options
                )
            else:
                pipeline = StableDiffusionPipeline.from_pretrained(
                    str(base.weights), use_safetensors=True, variant=base.variant, feature_extractor=None,
                    requires_safety_checker=False, **options,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise TrainingError(
                f"diffusers cannot load {base.name} ({first_line(error)})",
                expected=f"weights that fit {'config_dir' if base.single_file else 'the configs beside them'}",
                fix="check that the model is whole, and that a single file's config_dir is of the same architecture",
            ) from error
        return cls(pipeline, base)

    @staticmethod
    def skeleton(base: Base, component: str) -> nn.Module:
        """A component as its config describes it, on the meta device: every layer, no weights, no memory.

        Raises:
            ConfigError: diffusers or transformers cannot build it.
        """
        unet: Any = UNet2DConditionModel
        try:
            with torch.device("meta"):
                if component == "unet":
                    return cast(nn.Module, unet.from_config(dict(base.unet)))
                folder = str(base.configs / component)
                return CLIPTextModel(CLIPTextConfig.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            raise ConfigError(
                f"no model can be built from {base.configs / component / 'config.json'} ({first_line(error)})",
                expected="the config that came with the model",
                fix="download or copy the model again",
            ) from error

    def enable_gradient_checkpointing(self, component: str) -> None:
        """Recompute activations in backward instead of keeping them. Non-reentrant, as adapters' hooks need it."""
        if component == "unet":
            self.unet.enable_gradient_checkpointing()  # diffusers' is non-reentrant
        else:
            self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- text --------------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str]) -> Text:
        """Token ids `(prompts, 77)`, padded and cut to the text encoder's length."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return {"input_ids": ids}

    def encode_text(self, tokens: Text) -> Text:
        """The conditioning that `predict` takes. Differentiable where the text encoder carries an adapter."""
        ids = tokens["input_ids"].to(next(self.text_encoder.parameters()).device)
        return {"encoder_hidden_states": self.text_encoder(ids)[0]}

    # -- pictures ----------------------------------------------------------------------------------------------------

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """`(C, h, w)` of one picture's latents."""
        side = resolution // self.base.vae_factor
        return (int(self.vae.config.latent_channels), side, side)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """One picture `(3, H, W)` in [-1, 1] to its posterior, on the VAE's device.

        One at a time, so that cached and fresh latents are equal to the bit whatever the batch.
        """
        device = next(self.vae.parameters()).device
        posterior = self.vae.encode(pixels[None].to(device)).latent_dist
        return Posterior(posterior.mean[0], posterior.std[0])

    def latents(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """A sample of the posterior, scaled as the UNet wants it."""
        sampled = posterior.mean + posterior.std * noise.to(posterior.mean.device)
        return sampled * float(self.vae.config.scaling_factor)

    # -- diffusion ---------------------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> int:
        """How many timesteps there are to draw from."""
        return int(self.noise_schedule.config.num_train_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents of batch `(B, C, h, w)` at timesteps `(B,)`."""
        noisy: Tensor = self.noise_schedule.add_noise(latents, noise, timesteps)
        return noisy

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Text) -> Tensor:
        """The UNet's answer, `(B, C, h, w)`."""
        dtype = next(self.unet.parameters()).dtype
        states = conditioning["encoder_hidden_states"].to(noisy.device, dtype)
        answer: Tensor = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return answer

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should have answered."""
        if self.base.prediction_type == "v_prediction":
            velocity: Tensor = self.noise_schedule.get_velocity(latents, noise, timesteps)
            return velocity
        return latents if self.base.prediction_type == "sample" else noise

    def loss_weight(self, timesteps: Tensor, gamma: float | None) -> Tensor:
        """Weight of each sample's loss, `(B,)`: ones, or min-SNR (arXiv 2303.09556) for this prediction type."""
        if gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.noise_schedule, timesteps)
        clipped = snr.clamp(max=gamma)
        if self.base.prediction_type == "sample":
            return clipped
        if self.base.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        # epsilon: clipped / snr, written so that a terminal SNR of zero gives its limit, 1
        return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr.clamp_min(torch.finfo(snr.dtype).tiny))

    # -- pictures from it --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], resolution: int, steps: int, guidance: float
    ) -> list[Image.Image]:
        """One picture per prompt and seed, with the base's own sampler, on the device where the UNet is.

        A few at a time, whatever the number: a run has little memory to spare. Components that are parked on the CPU
        are there again afterwards.
        """
        with self.pipeline() as pipeline:
            scale, decoded = self.vae.config.scaling_factor, []
            for first in range(0, len(prompts), AT_ONCE):
                few = slice(first, first + AT_ONCE)
                latents = pipeline(
                    list(prompts[few]), height=resolution, width=resolution, num_inference_steps=steps,
                    guidance_scale=guidance, output_type="latent",
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[few]],
                ).images  # fmt: skip
                decoded += [self.vae.decode(one[None].to(self.vae.dtype) / scale).sample.cpu() for one in latents]
            images: list[Image.Image] = pipeline.image_processor.postprocess(torch.cat(decoded), output_type="pil")
        return images

    @contextmanager
    def pipeline(self) -> Iterator[Any]:
        """The base with its adapters as a pipeline, all of it on the UNet's device and without dropout meanwhile.

        The VAE decodes in float32, whatever dtype the UNet's latents have.
        """
        pipeline_class: Any = StableDiffusionPipeline
        pipeline = pipeline_class(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=type(self.sampler).from_config(self.sampler.config), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        device = next(self.unet.parameters()).device
        entrance = self.vae.post_quant_conv or self.vae.decoder
        hook = entrance.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        try:
            with _evaluating(self.unet, self.text_encoder), _visiting(device, self.vae, self.text_encoder):
                yield pipeline
        finally:
            hook.remove()

    # -- what the adapter file says ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The base, for an adapter's metadata; plain JSON types, no path but its last part."""
        name = self.base.weights.resolve().name if self.base.name == str(self.base.weights) else self.base.name
        own = {"family": self.name, "prediction_type": self.base.prediction_type}
        modules = {"unet": self.unet, "text_encoder": self.text_encoder}
        return describe_base(name, modules) | own | {"fingerprint": self.base.fingerprint()}


FAMILIES = {"StableDiffusionPipeline": StableDiffusion}


def load_tokenizer(base: Base) -> CLIPTokenizer:
    """The base's tokenizer alone.

    Raises:
        ConfigError: transformers cannot read it.
    """
    try:
        return CLIPTokenizer.from_pretrained(str(base.configs / "tokenizer"), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the tokenizer in {base.configs / 'tokenizer'} cannot be read ({first_line(error)})",
            expected="a CLIP tokenizer (vocab.json and merges.txt)",
            fix="download or copy the model again",
        ) from error


def check_trigger(tokenizer: CLIPTokenizer, trigger: str) -> None:
    """Refuse a trigger that the model knows as a word: each of its words one frequent token.

    Raises:
        ConfigError: training would have to unlearn that word's meaning.
    """
    tokens = [tokenizer(word, add_special_tokens=False).input_ids for word in trigger.split()]
    if all(len(ids) == 1 and ids[0] < COMMON_BELOW for ids in tokens):
        raise ConfigError(
            f"the trigger {trigger!r} is a common word to this model's tokenizer",
            expected="a rare word, which has no meaning yet that training would have to fight",
            fix="use a word such as sks or ohwx, or invent one, such as zwx",
        )


def too_long(tokenizer: CLIPTokenizer, prompt: str) -> bool:
    """Whether the tokenizer would cut the prompt."""
    return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode (no dropout), and back as they were."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


@contextmanager
def _visiting(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on the device, and back where they were."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
