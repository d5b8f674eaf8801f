"""Checkpoints: a folder of safetensors and JSON, written whole or not at all, from which a run goes on to the bit.

```
checkpoint-000500/
  oft_adapter.safetensors   the adapter so far, a file like the final one
  training.safetensors      by layer: trained generators and Adam's moments (those in 8 bits: by component); per
                            process: RNG states as bytes
  state.json                step, data position, schedule, scaler, settings, losses
```

Tensors are kept by layer name, so that a changed target list cannot scramble a resume. No pickle anywhere.
"""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from oft_diffusion.bank import OFTBank
from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import AdapterFileError, TrainingError
from oft_diffusion.files import save_adapter_file
from oft_diffusion.metadata import AdapterMetadata, software_versions
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.model import ADAPTER

STATE_VERSION = 1
# state.json: what a resume reads, and of which type
_STATE: Mapping[str, type | tuple[type, ...]] = {
    "version": int, "step": int, "config": dict, "identity": dict, "adam_steps": dict, "schedule": dict,
    "scaler": (dict, type(None)), "history": list,
}  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq")
_EIGHT_BIT = ("state1", "state2", "absmax1", "absmax2")  # what bitsandbytes has instead; scales reach over layers
_PYTHON_RNG = struct.Struct("<625I?d")  # Mersenne twister state and index, whether a gauss is stored, that gauss


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: optimizer steps done.
        state: everything else that is JSON: `config`, `identity`, `schedule`, `scaler`, `adam_steps`, `history`, ...
        tensors: `<component>/<layer>/{generator,exp_avg,exp_avg_sq}` float32, `rng/<process>/<which>` uint8.
    """

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


# -- writing and reading -----------------------------------------------------------------------------------------------


def save_checkpoint(
    output_dir: Path,
    checkpoint: Checkpoint,
    components: Mapping[str, Mapping[str, Tensor]],
    metadata: AdapterMetadata,
    keep: int,
) -> Path:
    """Write `checkpoint-<step>` into output_dir, then delete all but the newest `keep`.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; nothing half-written stays.
    """
    final = output_dir / f"checkpoint-{checkpoint.step:06d}"
    partial, old = final.with_suffix(".partial"), final.with_suffix(".old.partial")
    state = {"version": STATE_VERSION, "step": checkpoint.step, **checkpoint.state, "software": software_versions()}
    try:
        for leftover in output_dir.glob("checkpoint-*.partial"):  # of a run that was killed while writing
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        save_adapter_file(partial, components, metadata)
        write_atomically(partial / "training.safetensors", save(dict(checkpoint.tensors)))
        write_atomically(partial / "state.json", json.dumps(state, indent=1).encode())
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, AdapterFileError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        raise TrainingError(
            f"checkpoint {final.name} cannot be written ({'the disk is full' if full else error})",
            expected=f"a writable {output_dir} with space for an adapter and Adam's moments",
            fix="free some space and resume from the last checkpoint" if list_checkpoints(output_dir)
            else "free some space, or choose another output_dir",
        ) from error  # fmt: skip
    for path in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(path)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / "state.json").is_file()), key=lambda p: int(p.name.rpartition("-")[2]))


def find_checkpoint(resume: str, output_dir: Path) -> Path:
    """The folder that `resume` means: a checkpoint, or "latest" for the newest in output_dir.

    Raises:
        TrainingError: there is none.
    """
    if resume == "latest":
        if not (found := list_checkpoints(output_dir)):
            raise TrainingError(
                f"resume = 'latest', but {output_dir} holds no checkpoint",
                expected="folders such as checkpoint-000500 there",
                fix="correct output_dir, or leave resume out to start anew",
            )
        return found[-1]
    if not (Path(resume) / "state.json").is_file():
        raise TrainingError(
            f"resume = {resume!r} is no checkpoint",
            expected='a folder with a state.json, or "latest"',
            fix="correct the path",
        )
    return Path(resume)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's JSON.

    Raises:
        TrainingError: it is damaged, or of a newer version.
    """
    try:
        state = dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        if int(state["version"]) <= STATE_VERSION:
            for key, kind in _STATE.items():
                if not isinstance(state[key], kind):
                    raise TypeError(f"{key} is {state[key]!r}")
    except KeyError as error:
        raise _damaged(folder / "state.json", f"{error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder / "state.json", error) from error
    if (version := int(state["version"])) > STATE_VERSION:
        raise TrainingError(
            f"{folder} is a checkpoint of version {version}",
            expected=f"at most {STATE_VERSION}",
            fix="upgrade oft-diffusion",
        )
    return state


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TrainingError: it is damaged.
    """
    state = read_state(folder)
    try:
        tensors = load_file(folder / "training.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / "training.safetensors", error) from error
    return Checkpoint(int(state["step"]), state, tensors)


def _damaged(path: Path, cause: object) -> TrainingError:
    return TrainingError(
        f"the checkpoint file {path} is damaged ({str(cause)[:120]})",
        expected="a checkpoint as it was written",
        fix="resume from an earlier one",
    )


def check_resumable(state: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with settings that would make another run of it.

    Raises:
        TrainingError: naming every knob that differs.
    """
    saved, now = state["config"], config.to_dict()
    fixed = [f.name for f in fields(TrainConfig) if not f.metadata.get("free")]
    if config.lr_schedule != "constant" or config.decay_steps:
        fixed.append("steps")  # the course of the learning rate depends on it
    changed = [f"{k} was {saved.get(k)!r}, now {now[k]!r}" for k in fixed if saved.get(k) != now[k]]
    if changed:
        raise TrainingError(
            f"the checkpoint at step {state['step']} was trained with other settings: {'; '.join(changed)}",
            expected="the same settings, but for paths, intervals and (at a constant rate) steps",
            fix="use the config.toml in its output_dir, or start a new run with init_adapter",
        )


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse to go on with another base, other pictures or another number of processes.

    Raises:
        TrainingError: naming what differs.
    """
    if changed := [what for what, value in identity.items() if state["identity"].get(what) != value]:
        raise TrainingError(
            f"since the checkpoint at step {state['step']} was written, these changed: {', '.join(changed)}",
            expected="the same base, pictures, captions and number of processes",
            fix="restore them, or start a new run with init_adapter",
        )


# -- collecting and restoring ------------------------------------------------------------------------------------------


def collect_training(
    banks: Mapping[str, OFTBank], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trained generators and Adam's moments by layer, on the CPU; and Adam's step count per component."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for component, bank in banks.items():
        parameter = bank.generators[ADAPTER]
        parts = {"generator": parameter.detach()}
        if adam := optimizer.state.get(parameter):
            parts |= {moment: adam[moment] for moment in _MOMENTS if moment in adam}
            tensors |= {f"{component}/optimizer/{n}": adam[n].cpu().clone() for n in _EIGHT_BIT if n in adam}
            steps[component] = float(adam["step"])
        for layer, rows in bank.layer_slices(ADAPTER).items():
            for name, tensor in parts.items():
                tensors[f"{component}/{layer}/{name}"] = tensor[rows].cpu().clone()
    return tensors, steps


def restore_training(
    banks: Mapping[str, OFTBank],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    steps: Mapping[str, float],
) -> None:
    """The inverse of `collect_training`, in place.

    Raises:
        TrainingError: layers or shapes differ.
    """
    for component, bank in banks.items():
        parameter = bank.generators[ADAPTER]
        start = f"{component}/optimizer/"
        packed = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        parts = ["generator", *(_MOMENTS if component in steps and not packed else ())]
        flat = {name: torch.empty_like(parameter, device="cpu") for name in parts}
        for layer, rows in bank.layer_slices(ADAPTER).items():
            for name in parts:
                found = tensors.get(f"{component}/{layer}/{name}")
                if found is None or found.shape != flat[name][rows].shape:
                    raise TrainingError(
                        f"the checkpoint has no {name} of fitting shape for layer {component}.{layer}",
                        expected="a checkpoint of the same adapter",
                        fix="resume with the settings that it was written with",
                    )
                flat[name][rows] = found
        with torch.no_grad():
            parameter.copy_(flat["generator"])
        bank.refresh()
        if packed:
            _restore_eight_bit(optimizer, parameter, packed, int(steps[component]))
        elif component in steps:
            adam = {moment: flat[moment].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(steps[component]), **adam}


def _restore_eight_bit(optimizer: Any, parameter: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
    """The state of bitsandbytes' AdamW, which it makes itself, and these are written into."""
    for number, group in enumerate(optimizer.param_groups):
        for place, own in enumerate(group["params"]):
            if own is parameter:
                optimizer.init_state(group, own, number, place)
    state = optimizer.state[parameter]
    state["step"] = step
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise TrainingError(
                f"the checkpoint's optimizer has a {name} of shape {tuple(tensor.shape)}, which does not fit",
                expected="a checkpoint of the same adapter and optimizer",
                fix="resume with the settings that it was written with",
            )
        state[name].copy_(tensor)


def rng_states() -> dict[str, Tensor]:
    """Global RNG states of this process as bytes. Ours draw nothing from them; dropout layers of a base would."""
    version, words, gauss = random.getstate()
    assert version == 3
    python = _PYTHON_RNG.pack(*words, gauss is not None, gauss or 0.0)
    states = {"torch": torch.get_rng_state(), "python": torch.frombuffer(bytearray(python), dtype=torch.uint8)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """The inverse of `rng_states`; a state for a device that is absent here is left out."""
    torch.set_rng_state(states["torch"])
    *words, has_gauss, gauss = _PYTHON_RNG.unpack(bytes(states["python"].tolist()))
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# -- space on disk -----------------------------------------------------------------------------------------------------


def require_space(folder: Path, size: int, what: str) -> None:
    """Check that the disk of `folder`, which need not exist yet, has `size` bytes free.

    Raises:
        TrainingError: it has not.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise TrainingError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free",
            expected=f"at least {size / 1e6:.0f} MB, for {what}",
            fix="free some space, or choose an output_dir on another disk",
        )
