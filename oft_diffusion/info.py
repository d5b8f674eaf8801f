"""The verb `info`: what an adapter file is, ours or another tool's, without any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import has_metadata
from oft_diffusion.files import load_adapter_file
from oft_diffusion.formats.folders import component_folders
from oft_diffusion.formats.origins import origin_of
from oft_diffusion.formats.source import Source, read_source
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.pipeline.locating import locate
from oft_diffusion.rotation import block_size_of, orthogonality_error, rotation_delta


def describe_file(path: Path) -> list[str]:
    """Lines about a file, or what is in a folder.

    Raises:
        AdapterFileError: it is broken, or no OFT adapter.
    """
    found, _ = locate(path, None, {})
    if found.is_dir():
        return [line for part in component_folders(found).values() for line in describe_file(part)]
    return _ours(found) if has_metadata(found, HEADER_KEY) else _foreign(read_source(found))


def _ours(path: Path) -> list[str]:
    file = load_adapter_file(path)
    meta = file.metadata
    parameters = sum(t.numel() for state in file.components.values() for t in state.values())
    lines = [
        f"{file.path}  {file.path.stat().st_size / 1e6:.2f} MB, {parameters:,} parameters, written {meta.created}",
        f"trigger    {meta.trigger or '(none)'}    class word  {meta.class_word or '(none)'}",
        f"base       {meta.base.get('name', '(unknown)')}",
    ]
    for part, state in file.components.items():
        config = meta.components[part]
        packed = [t.float() for key, t in state.items() if key.endswith(KEY_SUFFIX)]
        error = max(float(orthogonality_error(rotation_delta(t, config))) for t in packed)
        settings = ", ".join(f"{f.name} {getattr(config, f.name)}" for f in fields(OFTConfig))
        lines += [
            f"{part:<10} {len(packed)} layers of {meta.base.get('components', {}).get(part, 'an unknown class')}",
            f"           {settings}",
            f"           orthogonality error {error:.1e}",
        ]
    for title, entries in (("training", meta.training), ("software", meta.software)):
        if entries:
            lines.append(f"{title:<10} " + "\n           ".join(f"{k} = {v}" for k, v in entries.items()))
    return [*lines, f"sha256     {meta.sha256} (verified)"]


def _foreign(source: Source) -> list[str]:
    outputs = source.has("oft_blocks", "oft_diag")
    name = "sd-scripts networks.oft or LyCORIS diag-oft" if outputs else origin_of(source).name
    parameters = sum(t.numel() for tensors in source.groups.values() for t in tensors.values())
    sizes = Counter(_size(tensors) for tensors in source.groups.values())
    first = next(iter(source.groups))
    lines = [
        f"{source.path}  {source.path.stat().st_size / 1e6:.2f} MB, {parameters:,} numbers",
        f"written by {name}; rotates {'outputs' if outputs else 'inputs'}",
        f"layers     {len(source.groups)}, named as {first}",
        f"blocks     of size {', '.join(f'{size} ({count} layers)' for size, count in sizes.most_common())}",
    ]
    for part in () if outputs else source.configured or [""]:
        series = origin_of(source).reading(source.settings_of(part)).settings
        lines.append(f"series     {', '.join(f'{k} {v}' for k, v in series.items())}{f' ({part})' if part else ''}")
    return [*lines, "load it with load_oft_weights, or make it one of ours with oft-diffusion convert --to oft"]


def _size(tensors: Mapping[str, Tensor]) -> int:
    """The block size of one layer's tensors."""
    for name, tensor in tensors.items():
        if name in ("oft_R.weight", "oft_rotation.weight") and tensor.dim() == 2:
            return block_size_of(tensor.shape[1]) or 0
        if name.startswith(("oft_blocks", "oft_diag")) and tensor.dim() >= 2:
            return int(tensor.shape[-1])
    return 0
