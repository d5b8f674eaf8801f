"""Everything between a checked config and the first step: load, make class images, cache, inject, optimise, resume."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import nn
from transformers import get_scheduler, get_wsd_schedule

from oft_diffusion.bank import OFTBank
from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import TrainingError
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.gguf_file import gguf_digest
from oft_diffusion.inject import inject_oft, load_oft_state_dict
from oft_diffusion.quantization import eight_bit_adamw
from oft_diffusion.quantized import send
from oft_diffusion.streaming import stream_weights
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training.base import Base
from oft_diffusion.training.batches import Batches
from oft_diffusion.training.checkpoint import list_checkpoints, restore_rng, rng_states
from oft_diffusion.training.class_images import class_pictures, make_class_images, twin_pictures
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import Picture, pictures_digest
from oft_diffusion.training.families import FAMILIES, Family
from oft_diffusion.training.memory import freed_memory_kept
from oft_diffusion.training.model import ADAPTER, AdaptedModel
from oft_diffusion.training.noise import Diffusion, Flow, Noise
from oft_diffusion.training.precision import DTYPES, quantizing
from oft_diffusion.training.preflight import Plan
from oft_diffusion.training.results import EVALUATION, GRIDS, LOSSES, PAGE, SETTINGS, Console
from oft_diffusion.training.skeleton import adapted


@dataclass(frozen=True)
class Parts:
    """What the loop turns.

    Attributes:
        family: the base, with adapters in its components.
        batches: what to learn from, by number.
        noise: how pictures are noised, and what is learned from that.
        banks: by component: the denoisers', and the text encoders' where they are adapted.
        model: the prepared container; call this one in training.
        optimizer: as accelerate wrapped it; adamw is the one inside.
        schedule: the learning rate's course; stepped once per applied optimizer step.
        identity: what a resumed run must find unchanged.
    """

    family: Family
    noise: Noise
    batches: Batches
    banks: Mapping[str, OFTBank]
    model: Any
    optimizer: Any
    adamw: torch.optim.Optimizer
    schedule: Any
    identity: Mapping[str, Any]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base as it was, and back. At strength 0, so that the layout stays and nothing is compiled anew."""
        try:
            for bank in self.banks.values():
                bank.set_adapters([ADAPTER], 0.0)
            yield
        finally:
            for bank in self.banks.values():
                bank.set_adapters([ADAPTER])


@contextmanager
def accelerated(config: TrainConfig, base: Base) -> Iterator[Accelerator]:
    """Accelerate for one run. Afterwards its state and the random states of this process are as they were.

    Raises:
        TrainingError: accelerate is in use in this process with other settings.
    """
    owned = not AcceleratorState._shared_state
    try:
        # Of several experts, those that no sample of a batch comes to have no gradient.
        several = DistributedDataParallelKwargs(find_unused_parameters=bool(base.experts))
        # Nothing is to be moved: all is where it belongs, of a denoiser that is streamed in part off the device.
        accelerator = Accelerator(
            device_placement=False, mixed_precision=config.mixed_precision, kwargs_handlers=[several]
        )
    except ValueError as error:
        raise TrainingError(
            f"accelerate is in use in this process with other settings ({error})",
            expected=f"no Accelerator yet, or one with mixed_precision={config.mixed_precision!r}",
            fix="train in a process of its own",
        ) from error
    random_states = rng_states()
    torch.manual_seed(config.seed)  # for dropout in a base that has any; all else is in data.py
    try:
        with freed_memory_kept() if accelerator.device.type == "cpu" else nullcontext():
            yield accelerator
    finally:
        restore_rng(random_states)
        accelerator.free_memory()
        if config.layer_offload and torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):
            gc.collect()  # layers and what streams their weights hold each other
            torch.accelerator.empty_host_cache()  # so that the system gets their memory back
        if owned:
            # accelerate keeps the precision of its first use for the whole process; the next run may want another.
            AcceleratorState._reset_state()


def prepare(config: TrainConfig, plan: Plan, accelerator: Accelerator, console: Console) -> Parts:
    """Build everything, in this order, since class images and caches want the base as it is.

    Raises:
        OFTError: the model cannot be loaded or adapted, a disk is full, an image or adapter file is unusable.
    """
    console.say(f"loading {config.model}")
    family = load_family(config, plan.base, accelerator.device)
    if plan.class_images is not None:
        make_class_images(
            plan.class_images, family, console.track, accelerator.process_index, accelerator.num_processes
        )
        accelerator.wait_for_everyone()
    pictures = pictures_of(config, plan)
    parts = assemble(config, plan, family, pictures, accelerator, lambda batches: batches.fill_caches(console.track))
    if accelerator.is_main_process:  # only now, when nothing is left that could fail: an earlier run may go
        _prepare_output(config)
    accelerator.wait_for_everyone()
    return parts


def load_family(config: TrainConfig, base: Base, device: torch.device) -> Family:
    """The base in the run's precision, all of it on the device; text encoders that are to be dropped on the CPU.

    On a card the denoiser is there first, with its weights streamed as the config has it, so that it leaves room for
    the others.

    Raises:
        OFTError: it cannot be loaded.
    """
    dtype = DTYPES[config.mixed_precision]
    file = None if config.denoiser_file is None else Path(config.denoiser_file)
    quantized = quantizing(config, base, device.type)
    streamed = base.denoisers if streams(config, device) else ()
    on_denoiser = partial(stream_weights, share=config.layer_offload, device=device) if streamed else None
    family = FAMILIES[base.pipeline].load(base, dtype, config.clip_skip, quantized, file, on_denoiser)
    for name in base.modules:
        if name not in streamed:
            send(family.module(name), "cpu" if config.drop_encoders and name in base.text_encoders else device)
    return family


def streams(config: TrainConfig, device: torch.device) -> bool:
    """Whether the denoiser's weights are streamed: not on a processor, in whose memory they would wait."""
    return bool(config.layer_offload) and device.type == "cuda"


def pictures_of(config: TrainConfig, plan: Plan) -> dict[str, list[Picture]]:
    """What is learned from, by stream. Class images need not be made yet."""
    if plan.class_images is None:
        return {"instance": plan.pictures, "class": []}
    return {
        "instance": plan.pictures,
        "class": class_pictures(plan.class_images) + twin_pictures(plan.pictures, config),
    }


def assemble(
    config: TrainConfig,
    plan: Plan,
    family: Family,
    pictures: Mapping[str, Sequence[Picture]],
    accelerator: Accelerator,
    fill: Callable[[Batches], object],
) -> Parts:
    """A loaded base and pictures to what the loop turns. Writes nothing.

    Args:
        config: the settings.
        plan: what the checks found.
        family: freshly loaded, on the accelerator's device; it is adapted here.
        pictures: by stream.
        accelerator: of this run.
        fill: called with the batches while encoders are where they belong, to cache what is to be cached.

    Raises:
        OFTError: the base cannot be adapted, an image or adapter file is unusable.
    """
    batches = Batches(config, family, pictures, accelerator.device)
    fill(batches)
    noise = make_noise(config, family)  # which may ask the pipeline, whose parts are where they belong until now
    _park(config, family)
    banks = _inject(config, plan, family)
    if accelerator.device.type == "cpu" and config.mixed_precision == "bf16":
        family.quicken_backward(config.resolution)
    model = AdaptedModel(family, banks, config.resolution)
    adamw = make_optimizer(config, plan.base, banks)
    wrapped, optimizer = accelerator.prepare(model, adamw)
    schedule = make_schedule(config, adamw)
    identity = {
        "base model": plan.base.fingerprint(),
        "instance images or captions": pictures_digest(pictures["instance"]),
        "class images": pictures_digest(pictures["class"]),
        "number of processes": accelerator.num_processes,
    }
    if config.denoiser_file is not None:
        identity["denoiser file"] = gguf_digest(Path(config.denoiser_file))
    return Parts(family, noise, batches, banks, wrapped, optimizer, adamw, schedule, identity)


def make_optimizer(config: TrainConfig, base: Base, banks: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """AdamW as the config has it, over the parameters of what is trained of each component, by its name."""
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        kind = eight_bit_adamw()
    made: torch.optim.Optimizer = kind(
        [{"params": list(bank.parameters()), "lr": _rate(config, base, name)} for name, bank in banks.items()],
        weight_decay=config.weight_decay,
        eps=config.adam_epsilon,
    )
    return made


def make_schedule(config: TrainConfig, adamw: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """How the learning rates rise and fall over the run, as the config has it."""
    if config.decay_steps:
        return get_wsd_schedule(adamw, config.warmup_steps, config.decay_steps, config.steps)
    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    return get_scheduler(name, adamw, config.warmup_steps, config.steps)


def _rate(config: TrainConfig, base: Base, component: str) -> float:
    own = config.text_encoder_learning_rate if component in base.text_encoders else None
    return own or config.learning_rate


def make_noise(config: TrainConfig, family: Family) -> Noise:
    """How pictures are noised: as the base's sampler takes noise away, and what the config says otherwise."""
    if not family.FLOW:
        return Diffusion(family.base.scheduler, config.min_snr_gamma)
    shift = config.timestep_shift or family.sampler_shift(config.resolution)
    return Flow(family.base.timesteps, shift, config.flow_weighting)


def _prepare_output(config: TrainConfig) -> None:
    """Delete an earlier run where that is wished, and write down the settings of this one."""
    folder = Path(config.output_dir)
    if config.overwrite:
        for path in (*list_checkpoints(folder), folder / GRIDS):
            shutil.rmtree(path, ignore_errors=True)
        for name in (FILE_NAME, LOSSES, PAGE, EVALUATION, SETTINGS):
            (folder / name).unlink(missing_ok=True)
    settings = replace(config, resume=None, overwrite=False).to_toml()
    write_atomically(folder / SETTINGS, settings.encode())


def _park(config: TrainConfig, family: Family) -> None:
    """Move what is not needed any more off the device, or free it; pictures fetch it back for a moment."""
    if config.drop_encoders:
        family.drop("vae", *family.base.text_encoders)
    elif config.cache_latents:
        send(family.vae, "cpu")
    if config.cache_text_embeddings and not config.drop_encoders:
        for name in family.base.text_encoders:
            send(family.module(name), "cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _inject(config: TrainConfig, plan: Plan, family: Family) -> dict[str, OFTBank]:
    banks = {}
    start = None
    if config.init_adapter is not None and plan.resume_from is None:
        start = load_adapter_file(config.init_adapter).components
    for name, settings in adapted(config, plan.base).items():
        component = family.module(name)
        used = last_hidden_state(plan.base.pipeline, name, config.clip_skip or 0)
        banks[name] = inject_oft(component, settings, ADAPTER, hidden_state=used)
        if start is not None:
            load_oft_state_dict(component, start[name], ADAPTER)
        if config.gradient_checkpointing:
            family.enable_gradient_checkpointing(name)
        component.train()  # dropout, where a base has any, and transformers' checkpointing work in training mode only
    return banks
