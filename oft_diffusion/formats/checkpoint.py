"""Merged models: a base's single-file checkpoint or a folder in diffusers' format, live adapters in the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oft_diffusion.disk import writing_atomically
from oft_diffusion.errors import AdapterError, AdapterFileError
from oft_diffusion.formats.carrier import silent
from oft_diffusion.formats.components import describe, modules_of
from oft_diffusion.formats.live import EXPORT_KEY, export_note, live_components
from oft_diffusion.formats.names import Leaf, checkpoint_names
from oft_diffusion.formats.target import Owners, new_folder, safetensors_path
from oft_diffusion.hooks import bank_of
from oft_diffusion.merge import LiveWeight, merge_oft, refuse_quantized, unmerge_oft

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 2**24  # bytes that are copied at a time


def export_checkpoint(
    pipe: Any,
    base: str | Path,
    path: str | Path,
    *,
    components: Collection[str] | None = None,
    on_layer: Callable[[str], object] = silent,
) -> Path:
    """Write a copy of a base's single-file checkpoint with the live adapters, at their strengths, in its weights.

    Only tensors that they rotate change, from what the file has of them, in its dtype; all else is copied byte by
    byte. Of the file, one tensor is in memory at a time.

    Args:
        pipe: a diffusers pipeline of that base with live adapters.
        base: the base's `.safetensors` file, with the names of its original implementation.
        path: the new file.
        components: which adapted ones of the pipeline's; all if None.
        on_layer: told each tensor's name before it is written; what it raises ends the export, and no file is written.

    Returns:
        The new file's path.

    Raises:
        AdapterError: nothing is live, or an adapter or a LoRA is fused.
        TargetError: a weight is quantized or not in memory, has no name in a checkpoint that we know, or has the same
            one as another component's.
        AdapterFileError: `base` is no such file, lacks a tensor, has a quantized one, or is another base than the
            pipeline's; or the new file cannot be written, or would replace the base. Nothing is left then.
    """
    source, target = safetensors_path(base), safetensors_path(path)
    live, about = live_components(pipe, components), describe(modules_of(pipe))
    header, start = _read_header(source)
    if target.exists() and target.samefile(source):
        raise AdapterFileError(f"{target} is the base itself", expected="a new file", fix="choose another name")
    told = header.pop("__metadata__", {})
    touched: dict[str, list[tuple[str, Leaf, LiveWeight]]] = {}
    owners = Owners()
    for part, layers in live.items():
        for name, meaning in checkpoint_names(about, part, layers, header, source=source.name).items():
            owners.claim(name, part)
            touched[name] = [(part, leaf, layers[leaf.layer]) for leaf in meaning.leaves if leaf.layer in layers]
    _refuse_quantized(source, {name: header[name]["dtype"] for name in touched})
    note = export_note(pipe, "checkpoint", live, file=source.name)
    written = json.dumps({"__metadata__": {**told, EXPORT_KEY: note}, **header}, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # tensors begin at a multiple of 8 bytes
    with source.open("rb") as reader, writing_atomically(target) as writer:
        writer.write(len(written).to_bytes(8, "little") + written)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            on_layer(name)
            reader.seek(start + first)
            if name not in touched:
                _copy(reader, writer, end - first)
                continue
            data = bytearray(reader.read(end - first))
            native = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).view(entry["shape"])
            for part, leaf, layer in touched[name]:
                own = leaf.take(native)
                _refuse_other_base(source, name, f"{part}.{layer.layer}", own, layer.weight)
                leaf.put(native, layer.rotated(own.reshape(layer.weight.shape)).reshape(own.shape))
            writer.write(data)
    return target


def export_folder(pipe: Any, folder: str | Path, *, keep_base: Literal["cpu", "disk"] = "cpu") -> Path:
    """Write the pipeline in diffusers' format with the live adapters, at their strengths, in its weights.

    Afterwards the pipeline is as it was, bit by bit, with its adapters live.

    Args:
        pipe: a diffusers pipeline with live adapters.
        folder: the new folder. It appears whole or not at all.
        keep_base: where the base's weights wait meanwhile.

    Returns:
        The folder.

    Raises:
        AdapterError: nothing is live, an adapter is fused, a LoRA is loaded, or the base's weights cannot be kept.
        TargetError: a weight is quantized or not in memory.
        AdapterFileError: the folder is there already, or cannot be written.
    """
    folder, modules = Path(folder), modules_of(pipe)
    adapted = [modules[part] for part in live_components(pipe)]
    if wrapped := [part for part, module in modules.items() if any(hasattr(m, "base_layer") for m in module.modules())]:
        raise AdapterError(
            f"a LoRA is loaded into {wrapped[0]}, and folders cannot hold one",
            expected="no adapters but OFT's",
            fix="unload_lora_weights first, or fuse_oft, fuse_lora, unload_lora_weights and save_pretrained yourself",
        )
    for module in adapted:
        refuse_quantized(module)
    with new_folder(folder) as temporary:
        try:
            for module in adapted:
                merge_oft(module, keep_base=keep_base)
            pipe.save_pretrained(temporary, safe_serialization=True)
        finally:
            for module in adapted:
                if (bank := bank_of(module)) is not None and bank.merged:
                    unmerge_oft(module)
    return folder


# -- single files -----------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:  # which checks it
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path.name} cannot be read ({str(error)[:200]})",
            expected="a whole safetensors file",
            fix="check the path, or download or copy the file again",
        ) from error


def _refuse_quantized(source: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise AdapterFileError(
                f"{source.name} has {name} in {dtype}, which cannot be rotated",
                expected=f"one of {', '.join(_DTYPES)}",
                fix="use the checkpoint that is not quantized",
            )


def _refuse_other_base(source: Path, name: str, layer: str, found: Tensor, weight: Tensor) -> None:
    """Both may have been rounded, each to its own dtype."""
    apart = f"{tuple(found.shape)} instead of {tuple(weight.shape)}"
    if found.numel() == weight.numel():
        dtypes = [torch.finfo(found.dtype), torch.finfo(weight.dtype)]
        rounding, least = max(d.eps for d in dtypes), max(d.smallest_normal * d.eps for d in dtypes)
        theirs, ours = found.double().flatten(), weight.cpu().double().flatten()
        difference = (theirs - ours).abs()
        other = ~(difference <= rounding * torch.maximum(theirs.abs(), ours.abs()) + least)
        if not other.any():
            return
        apart = f"{float(difference[other].max()):.3g} apart"
    raise AdapterFileError(
        f"{source.name} is not the base of this pipeline: its {name} is not {layer}'s weight ({apart})",
        expected="the checkpoint that the pipeline was made of",
        fix="load the pipeline from this very file, and the adapter into it",
    )


def _copy(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        chunk = reader.read(min(count, _CHUNK))
        if not chunk:
            raise OSError("the file was cut while it was read")
        writer.write(chunk)
        count -= len(chunk)
