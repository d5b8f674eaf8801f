"""Exports for tools that know no OFT: what live adapters change in the weights, as differences and LoRAs.

All take what is live, at its strengths. A tool's own strength then blends, `W + s (W' - W)`, as `mode="linear"` does
here. Differences and LoRAs fit the base that they were computed from; a GLoRA, `W + s W A`, fits any.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.errors import ConfigError, TargetError
from oft_diffusion.formats.carrier import LOADED_AS, NAMINGS, Carrier, Exported, native_change, silent
from oft_diffusion.formats.components import Components, encoder_of
from oft_diffusion.targets import canonical_name


def export_diff(
    pipe: Any,
    path: str | Path,
    *,
    naming: str | None = None,
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
    on_layer: Callable[[str], object] = silent,
) -> Exported:
    """Write `W' - W` of every layer as `<key>.diff`, for ComfyUI, Forge and A1111: exact, and as large as the weights.

    Args:
        pipe: a diffusers pipeline with live adapters.
        path: a `.safetensors` file.
        naming: "kohya" for `lora_unet_` with the names that sd-scripts has; "flat" for diffusers' names, which leave
            fused weights split (of transformers, ComfyUI knows SD 3's, Flux's and Chroma's); "comfy" for dotted native
            names. None for the one by which ComfyUI finds this family: "kohya", but "comfy" of Z-Image.
        dtype: of the file.
        components: which adapted ones of the pipeline's; all if None.
        on_layer: told each key before its weight is computed; what it raises ends the export, and no file is written.

    Raises:
        AdapterError: nothing is live, or an adapter or a LoRA is fused.
        TargetError: a weight is quantized or not in memory, or a layer has no name of this kind, or that of another
            component's; or ComfyUI has no names for this family, and no naming is given.
        ConfigError: `naming` or `dtype` is unusable.
        AdapterFileError: the file cannot be written, or a value is too large for `dtype`.
    """
    file = Carrier(pipe, path, dtype, naming, NAMINGS, components, on_layer)
    for key, meaning, changes in file.changes():
        made = file.put(f"{key}.diff", native_change(meaning, changes))
        file.judge(meaning.component, changes, {leaf.layer: leaf.take(made) for leaf in meaning.leaves})
    return file.save("diff")


def export_lora(
    pipe: Any,
    path: str | Path,
    *,
    rank: int | None = None,
    naming: str | None = None,
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
    on_layer: Callable[[str], object] = silent,
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
        on_layer: likewise.

    Raises:
        AdapterError, TargetError, ConfigError, AdapterFileError: as `export_diff`; or `rank` is not positive, or
            `load_lora_weights` would leave out an adapted component.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank={rank!r} is unusable", expected="a positive integer", fix="leave it out for full rank")
    file = Carrier(pipe, path, dtype, naming, (*NAMINGS, "diffusers"), components, on_layer)
    peft = naming == "diffusers"
    if peft:
        _refuse_unread(pipe, file.live)
    names = ("lora_B", "lora_A") if peft else ("lora_up", "lora_down")
    ranks: dict[str, dict[str, int]] = {part: {} for part in file.live}
    for key, meaning, changes in file.changes():
        delta = native_change(meaning, changes)
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
        told |= {f"{LOADED_AS.get(part, part)}.{name}": value for name, value in config.items()}
    return told
