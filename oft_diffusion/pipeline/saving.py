"""Adapters of a pipeline as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.files import save_adapter_file
from oft_diffusion.hooks import bank_of, unwrap
from oft_diffusion.inject import oft_state_dict
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline.state import modules, require_banks
from oft_diffusion.proof import fingerprint, layer_probes


def save_oft_weights(
    pipe: DiffusionPipeline, path: str | Path, adapter_name: str, metadata: AdapterMetadata | None = None
) -> Path:
    """Save an adapter, all components in one file.

    Args:
        pipe: a pipeline with the adapter.
        path: a `.safetensors` file, or a folder, in which it is called `oft_adapter.safetensors`.
        adapter_name: which.
        metadata: replaces what the adapter was loaded with (trigger, training settings, ...). Settings of components
            and the base are filled in here.

    Returns:
        The file's path.

    Raises:
        AdapterError: there is no such adapter.
        AdapterFileError: the file cannot be written.
    """
    banks = {p: b for p, b in require_banks(pipe, (adapter_name,)).items() if adapter_name in b.adapters}
    notes = (bank.metadata[adapter_name].metadata for bank in banks.values() if adapter_name in bank.metadata)
    known = metadata or next(notes, None) or AdapterMetadata(components={})
    parts = {part: module for part, module in modules(pipe).items() if part in banks}
    states = {part: oft_state_dict(module, adapter_name) for part, module in parts.items()}
    configs = {part: bank.adapters[adapter_name].config for part, bank in banks.items()}
    filled = replace(known, components=configs)
    if not known.base:
        name = getattr(pipe.config, "_name_or_path", "")
        filled = replace(filled, base=describe_base(name, parts), probes=probe_layers(parts, states, configs))
    return save_adapter_file(path, states, filled)


def probe_layers(
    parts: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, OFTConfig]
) -> dict[str, dict[str, dict[str, float]]]:
    """`AdapterMetadata.probes` through the layers of a base, as loading onto the same base will compute them."""
    clean = {part: module for part, module in parts.items() if not _merged(module)}
    return {"layers": {part: layer_probes(module, states[part], configs[part]) for part, module in clean.items()}}


def describe_base(name: str, components: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What an adapter's metadata says of its base: its name, and each adapted component's class and fingerprint.

    Of a local path only the last part: adapters are shared, and where a base lay is nobody's business.
    """
    local = Path(name)
    shown = local.absolute().name if name and (local.is_absolute() or local.exists()) else str(name)
    return {
        "name": shown,
        "components": {part: type(unwrap(m)).__name__ for part, m in components.items()},
        "fingerprints": {part: fingerprint(m) for part, m in components.items() if not _merged(m)},
    }


def _merged(module: nn.Module) -> bool:
    bank = bank_of(module)
    return bank is not None and bool(bank.merged)
