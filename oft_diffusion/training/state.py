"""From a run in memory to a checkpoint or an adapter file, and back."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from oft_diffusion.errors import OFTError, TrainingError
from oft_diffusion.inject import oft_state_dict
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline import probe_layers
from oft_diffusion.training.checkpoint import (
    Checkpoint,
    check_identity,
    collect_training,
    load_checkpoint,
    restore_rng,
    restore_training,
    rng_states,
)
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.prepare import Parts
from oft_diffusion.training.results import History

# Paths say nothing to a reader of the file, and much about its author's disk.
_PRIVATE = (
    "model", "config_dir", "denoiser_file", "instance_dir", "output_dir", "class_dir", "init_adapter", "resume",
    "overwrite",
)  # fmt: skip


def snapshot(
    parts: Parts, accelerator: Accelerator, config: TrainConfig, step: int, history: History, seconds: float
) -> Checkpoint:
    """Everything a resume needs, and the seconds of training so far.

    All processes must call it, since each adds its RNG states.
    """
    tensors, adam_steps = collect_training(parts.banks, parts.adamw)
    for which, rng in rng_states().items():
        everyone = accelerator.gather(rng.to(accelerator.device)[None]).cpu()
        tensors |= {f"rng/{process}/{which}": one.clone() for process, one in enumerate(everyone)}
    state = {
        "batches": step * config.accumulation,  # the data position: which pictures, noise and timesteps come next
        "config": config.to_dict(),
        "identity": dict(parts.identity),
        "adam_steps": adam_steps,
        "schedule": parts.schedule.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "history": history.to_json(),
        "seconds": seconds,
    }
    return Checkpoint(step, state, tensors)


def restore(parts: Parts, accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Put a snapshot back into freshly prepared parts.

    Raises:
        TrainingError: the checkpoint's layers do not fit, or something is missing inside it.
    """
    state = checkpoint.state
    prefix = f"rng/{accelerator.process_index}/"
    try:
        restore_training(parts.banks, parts.adamw, checkpoint.tensors, state["adam_steps"])
        parts.schedule.load_state_dict(state["schedule"])
        for group, rate in zip(parts.adamw.param_groups, parts.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        restore_rng({k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)})
        _ = History(state["history"]).losses
    except OFTError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, struct.error) as error:
        raise TrainingError(
            f"the checkpoint at step {checkpoint.step} is damaged ({type(error).__name__}: {str(error)[:120]})",
            expected="a checkpoint as it was written",
            fix="resume from an earlier one",
        ) from error


def resume(parts: Parts, accelerator: Accelerator, folder: Path) -> Checkpoint:
    """Go on from a checkpoint's folder with freshly prepared parts.

    Raises:
        TrainingError: it is damaged, or was written with another base, other pictures or another number of processes.
    """
    checkpoint = load_checkpoint(folder)
    check_identity(checkpoint.state, parts.identity)
    restore(parts, accelerator, checkpoint)
    return checkpoint


def adapter_tensors(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """What an adapter file holds: per component, tensors by layer."""
    return {name: oft_state_dict(parts.family.module(name), ADAPTER) for name in parts.banks}


def adapter_metadata(
    parts: Parts, config: TrainConfig, step: int, tensors: Mapping[str, Mapping[str, Tensor]]
) -> AdapterMetadata:
    """What an adapter file says about itself and its tensors (`adapter_tensors`)."""
    settings: Mapping[str, Any] = {k: v for k, v in config.to_dict().items() if k not in _PRIVATE}
    components = {name: bank.adapters[ADAPTER].config for name, bank in parts.banks.items()}
    modules = {name: parts.family.module(name) for name in components}
    return AdapterMetadata(
        components=components,
        base=parts.family.describe(),
        trigger=config.trigger,
        class_word=config.class_word,
        training={"steps_done": step, **settings},
        probes=probe_layers(modules, tensors, components),
    )
