"""`Family`: a base pipeline as training needs it. What differs between architectures is in `kinds.py`."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from oft_diffusion.errors import TrainingError
from oft_diffusion.images import pictures_of
from oft_diffusion.load import clip_skip_mended
from oft_diffusion.pipeline import describe_base
from oft_diffusion.quantization import Quantizing
from oft_diffusion.quantized import send
from oft_diffusion.training.base import Base
from oft_diffusion.training.families.homes import in_turn, where
from oft_diffusion.training.families.recording import Conditioning, Stacking, inputs, move, record_call, recorder
from oft_diffusion.training.families.source import Source, hollow

AT_ONCE = 4  # pictures per pipeline call; guidance makes that eight rows for the denoiser


class _ShiftTold(Exception):  # noqa: N818 - no error, but a way out of the pipeline's call
    def __init__(self, mu: float | None) -> None:
        super().__init__()
        self.mu = mu


class Posterior(NamedTuple):
    """A VAE's answer to one picture: mean and standard deviation, float32 `(C, h, w)`."""

    mean: Tensor
    std: Tensor


class Family:
    """A pipeline whose denoiser, and text encoders if wished, are trained.

    The loop calls `encode_text`, `encode_image`, `latents`, `pack` and `predict`, and `sample` for pictures.

    Attributes:
        base: the model on disk.
        pipe: diffusers' pipeline; its modules are frozen, and may carry adapters. The VAE is always float32, since
            half precision overflows in some; the others have the dtype asked for.
    """

    # -- what architectures differ in ----------------------------------------------------------------------------------

    DENOISERS: ClassVar[tuple[str, ...]] = ("transformer",)
    NEEDED: ClassVar[tuple[str, ...]] = ("text_encoder",)  # text encoders that its pipeline cannot do without
    GET_NEEDED: ClassVar[str] = "download or copy the model again"  # what to do where one is missing
    FLOW: ClassVar[bool] = True  # trained by flow matching, not by diffusion
    PACKED: ClassVar[int] = 1  # latents per side that are packed into one
    CALL: ClassVar[Mapping[str, Any]] = {}  # what the pipeline is to be told in every call

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` of the VAE as the denoiser wants them."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (torch.tensor(values).to(latents).view(1, -1, 1, 1) for values in (mean, std))
            latents = (latents - mean) / std
        shift = getattr(config, "shift_factor", None) or 0.0
        scaled: Tensor = (latents - shift) * (getattr(config, "scaling_factor", None) or 1.0)
        return scaled

    def pack(self, latents: Tensor) -> Tensor:
        """Latents, noise or targets `(B, C, h, w)` in the shape in which the denoiser takes and answers them."""
        return latents

    def timestep(self, times: Tensor) -> Tensor:
        """The scheduler's timesteps `(B,)` as the denoiser is told them."""
        return times

    def ask(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer in `packed`'s shape, with the scheduler's sign."""
        latents, timestep = inputs(denoiser)
        own = {latents: packed, timestep: self.timestep(times)}
        answer: Tensor = denoiser(**{**conditioning, **own})[0]
        return answer

    def guided(self, scale: float) -> dict[str, Any]:
        """What the pipeline is to be told for pictures with this guidance, of which 1 is none."""
        return {"guidance_scale": scale}

    # ------------------------------------------------------------------------------------------------------------------

    def __init__(self, pipe: Any, source: Source, clip_skip: int | None = None) -> None:
        self.pipe = pipe
        self.source = source
        self.base = source.base
        self.call = dict(self.CALL)
        if clip_skip is not None:
            self.call["clip_skip"] = clip_skip
        pipe.set_progress_bar_config(disable=True)
        self._recorder = recorder(pipe, self.denoiser)
        self._stacking: dict[int, Stacking] = {}
        self._hollow: dict[str, nn.Module] = {}  # what stands for the components that are dropped
        self._described: dict[str, Any] | None = None
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        base: Base,
        dtype: torch.dtype,
        clip_skip: int | None = None,
        quantizing: Quantizing | None = None,
        denoiser_file: Path | None = None,
        on_denoiser: Callable[[nn.Module], object] | None = None,
    ) -> Family:
        """Load a base that `find_base` accepted, onto the CPU; what a card's library quantizes, onto that.

        Args:
            base: the model on disk.
            dtype: of all components but the VAE.
            clip_skip: as the pipeline's call takes it, for prompts in training and for pictures.
            quantizing: which components to quantize; of a folder only.
            denoiser_file: a GGUF file with the denoiser's weights; likewise.
            on_denoiser: called with each denoiser, frozen, before the rest of a folder is loaded.

        Raises:
            TrainingError: diffusers cannot load it.
            ConfigError: a single file lacks some of its weights.
        """
        source = Source(base, dtype, quantizing, denoiser_file)
        return cls(source.pipe(on_denoiser), source, clip_skip)

    def module(self, name: str) -> Any:
        """A component. Typed Any: nn.Module's stubs take every attribute of theirs for a tensor."""
        return self.pipe.components[name]

    @property
    def denoiser(self) -> Any:
        """The component that denoises, the first where there are several."""
        return self.module(self.base.denoisers[0])

    @property
    def vae(self) -> Any:
        """The component that turns pictures into latents and back."""
        return self.pipe.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The components that read prompts."""
        return [self.module(name) for name in self.base.text_encoders]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def enable_gradient_checkpointing(self, component: str) -> None:
        """Recompute activations in backward instead of keeping them. Non-reentrant, as adapters' hooks need it."""
        module = self.module(component)
        if component in self.base.denoisers:
            module.enable_gradient_checkpointing()  # diffusers' is non-reentrant
        else:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- memory ------------------------------------------------------------------------------------------------------

    def drop(self, *names: str) -> None:
        """Free components, none of them adapted. What needs them reads them from disk anew, and drops them again."""
        self._described = self.describe()
        self._hollow = {name: hollow(self.base, name, self.module(name)) for name in names}
        self._put(self._hollow)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All components at hand, those that were dropped on the CPU; and dropped again afterwards.

        Raises:
            TrainingError: they cannot be loaded any more.
        """
        dropped, self._hollow = self._hollow, {}
        try:
            if dropped:
                loaded = self.source.again(self.pipe.components, dropped)
                self._put({name: send(module.requires_grad_(False).eval(), "cpu") for name, module in loaded.items()})
                del loaded
            yield
        finally:
            self._hollow = dropped or self._hollow
            self._put(self._hollow)

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            for pipe in (self.pipe, self._recorder):
                setattr(pipe, name, module)
        if modules:
            gc.collect()  # what was there goes round in circles

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Text encoders where the denoiser is, to read several prompts, and back."""
        with self.whole(), _visiting(self.device, *self.text_encoders):
            yield

    def quicken_backward(self, resolution: int) -> None:
        """For bfloat16 on a processor, where flash attention's backward takes longer than plain attention's."""

    # -- text --------------------------------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str], resolution: int) -> Conditioning:
        """What the denoiser is told beside latents and timestep, as `pipe` itself would without guidance.

        Differentiable where text encoders carry adapters.
        """
        recorded = self._record(prompts, resolution, steps=2)
        for name in inputs(self.denoiser):
            del recorded[name]
        return recorded

    def _record(self, prompts: Sequence[str], resolution: int, steps: int) -> Conditioning:
        generator = torch.Generator().manual_seed(0)  # for latents that nobody uses, or torch's own would move on
        with self.reading(), clip_skip_mended(self.pipe):
            return record_call(
                self._recorder, self.denoiser, prompt=list(prompts), height=resolution, width=resolution,
                num_inference_steps=steps, generator=generator, output_type="latent", **self.call, **self.guided(1.0),
            )  # fmt: skip

    def stacking(self, resolution: int) -> Stacking:
        """How this family's conditionings of single prompts are joined to one of a batch."""
        if resolution not in self._stacking:
            with torch.no_grad():
                once, twice = (self.encode_text([""] * count, resolution) for count in (1, 2))
            self._stacking[resolution] = Stacking(once, twice)
        return self._stacking[resolution]

    # -- pictures ----------------------------------------------------------------------------------------------------

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """`(C, h, w)` of one picture's normalised latents."""
        side = resolution // self.base.vae_factor
        return (self.base.latent_channels, side, side)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Posterior:
        """One picture `(3, H, W)` in [-1, 1] to its posterior, on the VAE's device.

        One at a time, so that cached and fresh latents are equal to the bit whatever the batch.
        """
        device = next(self.vae.parameters()).device
        picture = pixels[None].to(device)
        found = self.vae.encode(picture[:, :, None] if self.base.video_vae else picture)
        if hasattr(found, "latent_dist"):
            mean, std = found.latent_dist.mean, found.latent_dist.std
        else:  # an autoencoder without noise, such as Sana's
            mean, std = found.latent, torch.zeros_like(found.latent)
        if self.base.video_vae:
            mean, std = mean[:, :, 0], std[:, :, 0]
        return Posterior(mean[0], std[0])

    def latents(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """A sample of the posterior, `(C, h, w)`, as the denoiser wants it. `noise` has the VAE's latents' shape."""
        sampled = posterior.mean + posterior.std * noise.to(posterior.mean.device).view(posterior.mean.shape)
        return self.normalise(sampled[None])[0]

    # -- denoising ---------------------------------------------------------------------------------------------------

    def sampler_shift(self, resolution: int) -> float:
        """By what factor the pipeline's sampler moves noise levels towards noise, as `Flow` takes it.

        Where that depends on the picture, the pipeline's own call, with as many steps as it takes by default, says it.
        A stretch to a last level (`shift_terminal`) is not followed.

        Raises:
            TrainingError: it does not say it.
        """
        scheduler = self._recorder.scheduler
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("flow_shift") or config.get("shift") or 1.0)
        mu: float | None = None

        @functools.wraps(scheduler.set_timesteps)  # pipelines look at its signature
        def note(*_: Any, **kwargs: Any) -> None:
            raise _ShiftTold(kwargs.get("mu"))

        steps = inspect.signature(type(self.pipe).__call__).parameters["num_inference_steps"].default
        scheduler.set_timesteps = note
        try:
            with torch.no_grad():
                self._record([""], resolution, steps)
        except _ShiftTold as told:
            mu = told.mu
        finally:
            del scheduler.set_timesteps
        if mu is None:
            raise TrainingError(
                f"the scheduler of {self.base.name} shifts by the picture, but a {self.base.pipeline} does not say how",
                expected="use_dynamic_shifting = false in scheduler/scheduler_config.json",
                fix="correct it, or give timestep_shift",
            )
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer to noisy latents `(B, C, h, w)` at the scheduler's timesteps `(B,)`, packed."""
        dtype = self.denoiser.dtype  # not that of its first parameter: some are kept in float32
        return self.ask(self.denoiser, self.pack(noisy).to(dtype), times, move(conditioning, noisy.device))

    # -- pictures from it --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], resolution: int, steps: int, guidance: float,
        at_once: int = AT_ONCE,
    ) -> list[Image.Image]:  # fmt: skip
        """One picture per prompt and seed, with the base's own sampler, on the device where the denoiser is.

        A few at a time (`at_once`), whatever the number: a run has little memory to spare. Components that are parked
        on the CPU or dropped are so again afterwards.
        """
        images: list[Image.Image] = []
        with self.pipeline() as pipe:
            for first in range(0, len(prompts), at_once):
                few = slice(first, first + at_once)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[few]]
                images += pictures_of(
                    pipe(
                        prompt=list(prompts[few]), height=resolution, width=resolution, num_inference_steps=steps,
                        generator=generators, **self.call, **self.guided(guidance),
                    )
                )  # fmt: skip
        return images

    @contextmanager
    def pipeline(self) -> Iterator[Any]:
        """The base with its adapters as a pipeline, all of it on the denoiser's device, without dropout meanwhile.

        The VAE decodes one picture at a time in float32, whatever dtype the latents have. Text encoders whose home is
        elsewhere are there for the prompts alone.
        """
        with ExitStack() as restored:
            restored.enter_context(self.whole())
            modules = [module for module in self.pipe.components.values() if isinstance(module, nn.Module)]
            encoders = self.text_encoders
            scheduler = self.pipe.scheduler
            pipe = copy.copy(self.pipe)
            pipe.scheduler = type(scheduler).from_config(scheduler.config)  # with a count of steps of its own
            restored.enter_context(clip_skip_mended(self.pipe))
            restored.enter_context(_evaluating(*modules))
            denoisers = [self.module(name) for name in self.base.denoisers]
            restored.enter_context(in_turn(pipe, self.device, encoders, denoisers))
            restored.enter_context(_visiting(self.device, *(m for m in modules if m not in encoders)))
            entrance = getattr(self.vae, "post_quant_conv", None) or self.vae.decoder
            hook = entrance.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            restored.callback(hook.remove)
            if (sliced := getattr(self.vae, "use_slicing", None)) is not None:
                restored.callback(setattr, self.vae, "use_slicing", sliced)
                self.vae.use_slicing = True
            yield pipe

    # -- what the adapter file says ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The base, for an adapter's metadata; plain JSON types, no path but its last part."""
        if self._described is not None:
            return self._described
        name = self.base.weights.resolve().name if self.base.name == str(self.base.weights) else self.base.name
        modules = {part: self.module(part) for part in (*self.base.denoisers, *self.base.text_encoders)}
        own = {"family": type(self).__name__, "prediction_type": self.base.prediction_type}
        return describe_base(name, modules) | own | {"fingerprint": self.base.fingerprint()}


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
    homes = {module: home for module in modules if (home := where(module)) != device}
    for module in homes:
        send(module, device)
    try:
        yield
    finally:
        for module, home in homes.items():
            send(module, home)
