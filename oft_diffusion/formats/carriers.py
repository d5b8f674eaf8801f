"""Exports for tools that know no OFT: what live adapters change in the weights, as differences, LoRAs and GLoRAs.

All take what is live, at its strengths. A tool's own strength then blends, `W + s (W' - W)`, as `mode="linear"` does
here. Differences and LoRAs fit the base that they were computed from; a GLoRA, `W + s W A`, fits any.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from oft_diffusion.disk import tensor_digest, write_atomically
from oft_diffusion.errors import AdapterFileError, ConfigError, TargetError
from oft_diffusion.formats.checkpoint import (
    EXPORT_KEY,
    LiveWeight,
    export_note,
    live_components,
    modules_of,
    safetensors_path,
    same_name,
)
from oft_diffusion.formats.components import Components, describe, encoder_of
from oft_diffusion.formats.names import Meaning, write_names
from oft_diffusion.plan import place_of
from oft_diffusion.targets import canonical_name

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMINGS = ("kohya", "flat", "comfy")
# Denoisers of whose fused weights ComfyUI finds the rows by diffusers' names, `lora_transformer_`.
_SPLIT_IN_COMFY = ("SD3Transformer2DModel", "FluxTransformer2DModel", "ChromaTransformer2DModel")
# `load_lora_weights(..., load_into_transformer_2=True)` looks for the first expert's names.
_LOADED_AS = {"transformer_2": "transformer"}


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


def export_diff(
    pipe: Any,
    path: str | Path,
    *,
    naming: str = "kohya",
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
) -> Exported:
    """Write `W' - W` of every layer as `<key>.diff`, for ComfyUI, Forge and A1111: exact, and as large as the weights.

    Args:
        pipe: a diffusers pipeline with live adapters.
        path: a `.safetensors` file.
        naming: "kohya" for `lora_unet_` with the names that sd-scripts has; "flat" for diffusers' names, which leave
            fused weights split (of transformers, ComfyUI knows SD 3's, Flux's and Chroma's); "comfy" for dotted native
            names.
        dtype: of the file.
        components: which adapted ones of the pipeline's; all if None.

    Raises:
        AdapterError: nothing is live, or an adapter or a LoRA is fused.
        TargetError: a weight is quantized or not in memory, or a layer has no name of this kind, or that of another
            component's.
        ConfigError: `naming` or `dtype` is unusable.
        AdapterFileError: the file cannot be written, or a value is too large for `dtype`.
    """
    file = _Carrier(pipe, path, dtype, naming, NAMINGS, components)
    for key, meaning, changes in file.changes():
        made = file.put(f"{key}.diff", _native(meaning, changes))
        file.judge(meaning.component, changes, {leaf.layer: leaf.take(made) for leaf in meaning.leaves})
    return file.save("diff")


def export_lora(
    pipe: Any,
    path: str | Path,
    *,
    rank: int | None = None,
    naming: str = "kohya",
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
) -> Exported:
    """Write `W' - W` of every layer as a LoRA: exactly, at full rank, or the best of a smaller rank.

    Rotations change a weight in all directions, so that a small rank can keep little: show the user what is lost,
    `Exported.overall`.

    Args:
        pipe: a diffusers pipeline with live adapters.
        path: a `.safetensors` file.
        rank: of every layer that allows it; None for full rank, `min(in, out)`.
        naming: "diffusers" for what `pipe.load_lora_weights` takes, `unet.<layer>.lora_A.weight`; the others are those
            of `export_diff`, with `lora_up`, `lora_down` and `alpha`.
        dtype: of the file.
        components: as for `export_diff`.

    Raises:
        AdapterError, TargetError, ConfigError, AdapterFileError: as `export_diff`; or `rank` is not positive, or
            `load_lora_weights` would leave out an adapted component.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank={rank!r} is unusable", expected="a positive integer", fix="leave it out for full rank")
    file = _Carrier(pipe, path, dtype, naming, (*NAMINGS, "diffusers"), components)
    peft = naming == "diffusers"
    if peft:
        _refuse_unread(pipe, file.live)
    names = ("lora_B", "lora_A") if peft else ("lora_up", "lora_down")
    ranks: dict[str, dict[str, int]] = {part: {} for part in file.live}
    for key, meaning, changes in file.changes():
        delta = _native(meaning, changes)
        up, down = _factors(delta.flatten(1), rank)
        ranks[meaning.component][meaning.layers[0]] = len(down)
        # One alpha for all layers, which readers divide by the rank: diffusers' reader of flat names mixes up several.
        scale = 1.0 if peft else 1.0 / len(down)
        up, down = _balanced(up / scale, down)
        up = file.put(f"{key}.{names[0]}.weight", up.view(*up.shape, *(1 for _ in delta.shape[2:])))
        down = file.put(f"{key}.{names[1]}.weight", down.view(-1, *delta.shape[1:]))
        if not peft:
            file.put(f"{key}.alpha", torch.tensor(1.0))
        made = scale * (up.flatten(1) @ down.flatten(1)).view(delta.shape)
        file.judge(meaning.component, changes, {leaf.layer: leaf.take(made) for leaf in meaning.leaves})
    header = {"lora_adapter_metadata": json.dumps(_lora_configs(file.about, ranks))} if peft else {}
    return file.save("lora", header, rank=rank)


def export_glora(
    pipe: Any,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
) -> Exported:
    """Write `R^T - I` of every layer as a GLoRA, which ComfyUI and Forge apply to any base: exact, but dense.

    A file has two matrices `(in, in)` per layer. A fused weight is written as one where all its layers are rotated
    alike (`OFTConfig.share_qkv`), else layer by layer, which ComfyUI understands of SD 3, Flux and Chroma.

    Args:
        pipe: a diffusers pipeline with live adapters.
        path: a `.safetensors` file.
        dtype: of the file.
        components: as for `export_diff`.

    Raises:
        AdapterError, TargetError, ConfigError, AdapterFileError: as `export_diff`; or an adapter rotates outputs, or a
            kernel of more than one tap, or layers of a fused weight differently where ComfyUI cannot tell them apart.
    """
    file = _Carrier(pipe, path, dtype, "kohya", NAMINGS, components)
    for part, layers in file.live.items():
        for layer in layers.values():
            _check_glora(part, layer)
        for key, meaning in _glora_names(file.about, part, layers).items():
            file.claim(key, part)
            changes = {name: _Change.of(layers[name]) for name in meaning.layers}
            turn = _right_factor(layers[meaning.layers[0]])
            a1 = file.put(f"{key}.a1.weight", turn).to(turn)
            file.put(f"{key}.a2.weight", torch.eye(len(turn)))
            # The second term, b1 b2, may not be absent. An alpha may: without it nothing is scaled.
            file.put(f"{key}.b1.weight", torch.zeros(sum(len(change.weight) for change in changes.values()), 1))
            file.put(f"{key}.b2.weight", torch.zeros(1, len(turn)))
            file.judge(part, changes, {name: (w.flatten(1) @ a1).view(w.shape) for name, (w, _) in changes.items()})
    return file.save("glora")


# -- files ------------------------------------------------------------------------------------------------------------


class _Change(NamedTuple):
    """A layer's base weight and rotated weight, in the widest dtype that its device has."""

    weight: Tensor
    rotated: Tensor

    @classmethod
    def of(cls, layer: LiveWeight) -> _Change:
        # In float64, since the difference of two weights that are much alike is what is wanted.
        weight = layer.weight.to(_widest(layer.weight))
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


class _Carrier:
    """A file in the making: its tensors, and how far what they stand for is from what is live."""

    def __init__(
        self,
        pipe: Any,
        path: str | Path,
        dtype: torch.dtype,
        naming: str,
        namings: Sequence[str],
        components: Collection[str] | None,
    ) -> None:
        for what, value, usable in (("naming", naming, namings), ("dtype", dtype, DTYPES)):
            if value not in usable:
                raise ConfigError(
                    f"{what}={value!r} is unusable here",
                    expected=f"one of {', '.join(map(str, usable))}",
                    fix=f"leave {what} out",
                )
        self._pipe, self._path, self._dtype, self._naming = pipe, safetensors_path(path), dtype, naming
        self.live = live_components(pipe, components)
        self.about: Components = describe(modules_of(pipe))
        self.tensors: dict[str, Tensor] = {}
        self._owners: dict[str, str] = {}
        self._norms: dict[str, _Norms] = {}
        self._base: dict[str, str] = {}

    def changes(self) -> Iterator[tuple[str, Meaning, dict[str, _Change]]]:
        """Every key to write, with the changes of the layers in it."""
        for part, layers in self.live.items():
            for key, meaning in write_names(self.about, part, layers, self._naming).items():
                if self._naming == "diffusers" and part in _LOADED_AS:
                    key = _LOADED_AS[part] + key.removeprefix(part)
                self.claim(key, part)
                yield key, meaning, {name: _Change.of(layers[name]) for name in meaning.layers if name in layers}

    def claim(self, key: str, part: str) -> None:
        """Refuse a key that means layers of two components."""
        first = self._owners.setdefault(key, part)
        if first != part:
            raise same_name(key, first, part)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Add a tensor, and return it as a reader will see it, in float32."""
        stored = tensor.to("cpu", self._dtype).contiguous()
        if not torch.isfinite(stored).all():
            raise AdapterFileError(
                f"{name} reaches {float(tensor.abs().max()):.3g}, which {self._dtype} cannot hold",
                expected=f"numbers up to {torch.finfo(self._dtype).max:.3g}",
                fix="write bfloat16 or float32, or take a smaller strength",
            )
        self.tensors[name] = stored
        return stored.to(tensor.device, torch.float32)

    def judge(self, part: str, changes: Mapping[str, _Change], made: Mapping[str, Tensor]) -> None:
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
            naming=self._naming,
            sha256=tensor_digest({name: t.flatten() for name, t in self.tensors.items()}),
            weights_sha256=base if carrier != "glora" else None,  # those that the numbers were computed from
            errors={"delta": overall.delta, "weight": overall.weight},
            **more,
        )
        told = {"format": "pt", **_told_version(self.about), **(header or {}), EXPORT_KEY: note}
        write_atomically(self._path, save(self.tensors, metadata=told))
        return Exported(self._path, overall, {name: norms.fidelity() for name, norms in self._norms.items()})


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _native(meaning: Meaning, changes: Mapping[str, _Change]) -> Tensor:
    """The change of a native weight: zeros in rows of layers that are not adapted."""
    first, runs = next(iter(changes.values())).delta, [run for leaf in meaning.leaves for run in leaf.rows or ()]
    whole = first.new_zeros(sum(length for _, length in runs) or len(first), *first.shape[1:])
    for leaf in meaning.leaves:
        if leaf.layer in changes:
            leaf.put(whole, changes[leaf.layer].delta)
    return whole


def _told_version(about: Components) -> dict[str, str]:
    """By what A1111 knows a file's base; it takes any other with a header for one of SD 1.x."""
    if any(layers.is_xl for layers in about.values()):
        return {"ss_base_model_version": "sdxl_base_v1-0"}
    encoder = encoder_of(about, "text_encoder") if "text_encoder" in about else None
    return {"ss_v2": "True"} if encoder is not None and encoder.comfy == "clip_h" else {}


# -- LoRA -------------------------------------------------------------------------------------------------------------


def _factors(delta: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """`up (out, r)` and `down (r, in)`, whose product is nearest to `delta (out, in)`."""
    out, width = delta.shape
    if rank is None:
        eye = torch.eye(min(out, width), dtype=delta.dtype, device=delta.device)
        return (delta, eye) if width <= out else (eye, delta)
    # The nearest of a rank is the projection on the leading singular vectors; the smaller side's, by its Gram matrix.
    small = delta.T if width <= out else delta
    gram = small @ small.T
    vectors = torch.linalg.eigh(gram.cpu() if gram.device.type == "mps" else gram).eigenvectors.to(delta.device)
    leading = vectors[:, -min(rank, out, width) :]
    return (delta @ leading, leading.T) if width <= out else (leading, leading.T @ delta)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Shares a power of two between the factors, so that float16 loses neither to its small range."""
    largest, other = float(up.abs().max()), float(down.abs().max())
    if largest == 0.0 or other == 0.0:
        return up, down
    factor = 2.0 ** round(math.log2(other / largest) / 2)
    return up * factor, down / factor


def _refuse_unread(pipe: Any, live: Mapping[str, object]) -> None:
    read = getattr(pipe, "_lora_loadable_modules", ())
    if unread := [part for part in live if part not in read]:
        raise TargetError(
            f"{type(pipe).__name__}.load_lora_weights does not read LoRAs of {', '.join(unread)}",
            expected=f"adapters of {', '.join(read) or 'a pipeline that has it'} only",
            fix='write a merged folder, or naming="kohya" for ComfyUI',
        )


def _lora_configs(about: Components, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What diffusers makes PEFT's configurations of. Without it, older ones (0.37) scale unequal ranks wrongly."""
    told: dict[str, Any] = {}
    for part, by_layer in ranks.items():
        # Of text encoders names' ends are compared: they have `text_model.` before them, or not.
        mark = "^" if encoder_of(about, part) is None else ""
        common = Counter(by_layer.values()).most_common(1)[0][0]
        others = {mark + canonical_name(layer): rank for layer, rank in by_layer.items() if rank != common}
        config = {
            "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": [canonical_name(layer) for layer in by_layer],
        }  # fmt: skip
        told |= {f"{_LOADED_AS.get(part, part)}.{name}": value for name, value in config.items()}
    return told


# -- GLoRA ------------------------------------------------------------------------------------------------------------


def _check_glora(part: str, layer: LiveWeight) -> None:
    if any(place_of(site) != "input" for site in layer.deltas) or layer.weight[0].numel() != layer.weight.shape[1]:
        raise TargetError(
            f"{part}.{layer.layer} {tuple(layer.weight.shape)} is no layer that a GLoRA can rotate",
            expected="rotated inputs of linear layers and 1x1 convolutions",
            fix="write a .diff file, or a LoRA of full rank",
        )


def _right_factor(layer: LiveWeight) -> Tensor:
    """`R^T - I` `(in, in)`, by rotating an identity."""
    weight = layer.weight
    identity = torch.eye(weight.shape[1], dtype=_widest(weight), device=weight.device)
    return layer.rotated(identity) - identity


def _glora_names(about: Components, part: str, layers: Mapping[str, LiveWeight]) -> dict[str, Meaning]:
    """Native names, but split ones for the layers of a fused weight that are not all rotated alike."""
    found: dict[str, Meaning] = {}
    for key, meaning in write_names(about, part, layers, "kohya").items():
        here = [layers[name] for name in meaning.layers if name in layers]
        if not meaning.missing and all(_alike(layer, here[0]) for layer in here):
            found[key] = meaning
        elif about[part].class_name in _SPLIT_IN_COMFY:
            found |= write_names(about, part, [layer.layer for layer in here], "flat")
        else:
            raise TargetError(
                f"{', '.join(meaning.layers)} of {part} are one weight in ComfyUI, and not all rotated alike",
                expected="one rotation for all of them, as share_qkv gives",
                fix="write a .diff file, or a LoRA of full rank",
            )
    return found


def _alike(one: LiveWeight, other: LiveWeight) -> bool:
    [ours], [theirs] = one.deltas.values(), other.deltas.values()  # each has one site, its input
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
