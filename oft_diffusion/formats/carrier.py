"""A carrier file in the making: changed weights by the names of the tool that reads it, and what the file loses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from oft_diffusion.disk import tensor_digest, write_atomically
from oft_diffusion.errors import ConfigError
from oft_diffusion.formats.components import Components, describe, modules_of, stable_diffusion
from oft_diffusion.formats.live import EXPORT_KEY, export_note, live_components
from oft_diffusion.formats.names import Meaning, write_names
from oft_diffusion.formats.target import Owners, as_stored, safetensors_path
from oft_diffusion.formats.tools import carrier_naming
from oft_diffusion.merge import LiveWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMINGS = ("kohya", "flat", "comfy")
# `load_lora_weights(..., load_into_transformer_2=True)` looks for the first expert's names.
LOADED_AS = {"transformer_2": "transformer"}


def silent(_: str) -> None:
    """For whoever wants to be told of no layer."""


@dataclass(frozen=True)
class Fidelity:
    """How far a file is from what is live, in Frobenius norms.

    Attributes:
        delta: of the change of the weights, `|file's - live| / |live|`.
        weight: of the weights, `|(W + file's) - W'| / |W'|`.
    """

    delta: float
    weight: float


@dataclass(frozen=True)
class Exported:
    """A file that was written, as it will be read: what its dtype rounds away counts as lost.

    Attributes:
        path: the file.
        overall: over all layers together.
        layers: by `<component>.<layer>`.
    """

    path: Path
    overall: Fidelity
    layers: Mapping[str, Fidelity]


class Change(NamedTuple):
    """A layer's base weight and rotated weight, in the widest dtype that its device has."""

    weight: Tensor
    rotated: Tensor

    @classmethod
    def of(cls, layer: LiveWeight) -> Change:
        # In float64, since the difference of two weights that are much alike is what is wanted.
        weight = layer.weight.to(widest(layer.weight))
        return cls(weight, layer.rotated(weight))

    @property
    def delta(self) -> Tensor:
        return self.rotated - self.weight


class _Norms(NamedTuple):
    """Of a layer, or of several: of what a file has wrong, of the change that it should hold, of the rotated weight."""

    wrong: float
    delta: float
    rotated: float

    def fidelity(self) -> Fidelity:
        return Fidelity(*(self.wrong / norm if norm else math.inf if self.wrong else 0.0 for norm in self[1:]))


class Carrier:
    """A file in the making: its tensors, and how far what they stand for is from what is live."""

    def __init__(
        self,
        pipe: Any,
        path: str | Path,
        dtype: torch.dtype,
        naming: str | None,
        namings: Sequence[str],
        components: Collection[str] | None,
        on_layer: Callable[[str], object],
    ) -> None:
        for what, value, usable in (("naming", naming, (None, *namings)), ("dtype", dtype, DTYPES)):
            if value not in usable:
                raise ConfigError(
                    f"{what}={value!r} is unusable here",
                    expected=f"one of {', '.join(str(known) for known in usable if known is not None)}",
                    fix=f"leave {what} out",
                )
        self._pipe, self._path, self._dtype, self._on_layer = pipe, safetensors_path(path), dtype, on_layer
        self.live = live_components(pipe, components)
        self.about: Components = describe(modules_of(pipe))
        self.naming = naming or carrier_naming(self.about, self.live)
        self.tensors: dict[str, Tensor] = {}
        self._owners = Owners()
        self._norms: dict[str, _Norms] = {}
        self._base: dict[str, str] = {}

    def changes(self) -> Iterator[tuple[str, Meaning, dict[str, Change]]]:
        """Every key to write, with the changes of the layers in it."""
        for part, layers in self.live.items():
            for key, meaning in write_names(self.about, part, layers, self.naming).items():
                if self.naming == "diffusers" and part in LOADED_AS:
                    key = LOADED_AS[part] + key.removeprefix(part)
                self.claim(key, part)
                yield key, meaning, {name: Change.of(layers[name]) for name in meaning.layers if name in layers}

    def claim(self, key: str, part: str) -> None:
        """Tell of a key that comes next, and refuse one that means layers of two components."""
        self._on_layer(key)
        self._owners.claim(key, part)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Add a tensor, and return it as a reader will see it, in float32."""
        stored = as_stored(name, tensor, self._dtype)
        self.tensors[name] = stored
        return stored.to(tensor.device, torch.float32)

    def judge(self, part: str, changes: Mapping[str, Change], made: Mapping[str, Tensor]) -> None:
        """Note how far the changes that the file stands for are from the live ones, layer by layer."""
        for name, change in changes.items():
            delta = change.delta
            norms = [float(torch.linalg.vector_norm(t)) for t in (made[name].to(delta) - delta, delta, change.rotated)]
            self._norms[f"{part}.{name}"] = _Norms(*norms)
            self._base[f"{part}.{name}"] = tensor_digest({name: self.live[part][name].weight.flatten()})

    def save(self, carrier: str, header: Mapping[str, str] | None = None, **more: Any) -> Exported:
        """Write the file; `more` is noted down."""
        overall = _Norms(*(math.hypot(*norms) for norms in zip(*self._norms.values(), strict=True))).fidelity()
        base = hashlib.sha256(json.dumps(self._base, sort_keys=True).encode()).hexdigest()
        note = export_note(
            self._pipe,
            carrier,
            self.live,
            naming=self.naming,
            sha256=tensor_digest({name: t.flatten() for name, t in self.tensors.items()}),
            weights_sha256=base if carrier != "glora" else None,  # those that the numbers were computed from
            errors={"delta": overall.delta, "weight": overall.weight},
            **more,
        )
        told = {"format": "pt", **_told_version(self.about), **(header or {}), EXPORT_KEY: note}
        write_atomically(self._path, save(self.tensors, metadata=told))
        return Exported(self._path, overall, {name: norms.fidelity() for name, norms in self._norms.items()})


def widest(tensor: Tensor) -> torch.dtype:
    """The widest floating dtype that a tensor's device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def native_change(meaning: Meaning, changes: Mapping[str, Change]) -> Tensor:
    """The change of a native weight: zeros in rows of layers that are not adapted."""
    first, runs = next(iter(changes.values())).delta, [run for leaf in meaning.leaves for run in leaf.rows or ()]
    whole = first.new_zeros(sum(length for _, length in runs) or len(first), *first.shape[1:])
    for leaf in meaning.leaves:
        if leaf.layer in changes:
            leaf.put(whole, changes[leaf.layer].delta)
    return whole


def _told_version(about: Components) -> dict[str, str]:
    """By what A1111 knows a file's base; it takes any other with a header for one of SD 1.x."""
    told = {"SDXL": {"ss_base_model_version": "sdxl_base_v1-0"}, "SD 2": {"ss_v2": "True"}}
    return told.get(stable_diffusion(about) or "", {})
