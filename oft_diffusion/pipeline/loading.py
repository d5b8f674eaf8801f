"""Loading adapter files into a pipeline, or in the place of one that is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.disk import has_metadata
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError, TargetError
from oft_diffusion.files import AdapterFile, load_adapter_file
from oft_diffusion.formats import Imported, read
from oft_diffusion.formats.components import modules_of
from oft_diffusion.inject import (
    KEY_SUFFIX,
    SCALE_SUFFIX,
    inject_state,
    load_oft_state_dict,
    oft_state_dict,
    remove_oft,
)
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.pipeline.fitting import (
    check_prediction,
    compare_bases,
    component_for,
    not_for,
    prove_layers,
    warn_of_bases,
)
from oft_diffusion.pipeline.locating import locate
from oft_diffusion.pipeline.state import (
    LoadedAdapter,
    Note,
    Strength,
    list_oft_adapters,
    refuse_mixed,
    refuse_strengths_of_others,
    require_banks,
    strength_of,
)
from oft_diffusion.plan import Active, StrengthMode, check_adapter_name, layer_of
from oft_diffusion.targets import canonical_name, layer_names


def load_oft_weights(
    pipe: DiffusionPipeline,
    source: str | Path,
    *,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    strength: Strength | None = None,
    strict: bool = True,
    hotswap: bool = False,
    component: str | None = None,
    **hub_options: Any,
) -> LoadedAdapter:
    """Load an adapter into every component that its file adapts, frozen, active after those already active.

    Files of other tools are read, too (docs/formats.md), and act as they do there.

    Args:
        pipe: any diffusers pipeline.
        source: a `.safetensors` file, a folder with one, PEFT's folder or a folder with one of PEFT's per component, or
            a hub repository id.
        weight_name: the file's name in the folder or repository; `oft_adapter.safetensors`, or PEFT's names, if None.
        adapter_name: its name in this pipeline; made from the trigger token or the file's name if None.
        strength: 0 is the base, 1 as trained, also by component, see `set_oft_adapters`; what its author recommends if
            None, which is 1 unless the file says otherwise.
        strict: refuse a file of which some layers are not in this pipeline; else they are left out, and
            `LoadedAdapter.unmatched` names them.
        hotswap: put the file in the place of the adapter `adapter_name`, whose order and strength it takes over. No
            layout changes, so that compiled models and captured graphs go on with the new adapter. Layers that it
            lacks become the identity; it may not have others, nor differ where that adapter's `share_qkv` ties layers.
            A strength is not changed, so `strength` must be None.
        component: of a file that does not tell which component it is for, as PEFT's and LyCORIS's do not, where
            several have such layers; None for all others.
        **hub_options: for `huggingface_hub.hf_hub_download`: revision, subfolder, token, cache_dir,
            local_files_only, ... Of these a local folder has a use for subfolder alone.

    Returns:
        What was loaded.

    Raises:
        AdapterFileError: the file is missing, broken, or does not fit this pipeline; the pipeline is unchanged then.
        AdapterError: this is no pipeline, the name is taken or not usable, or an adapter is fused; likewise.
        ConfigError: an option would do nothing here.

    A warning says where the base is another than the one that the adapter was trained on.
    """
    refuse_mixed(pipe, f"{source} cannot be loaded")
    if hotswap and (adapter_name is None or strength is not None):
        raise ConfigError(
            "hotswap=True " + ("names no adapter" if adapter_name is None else f"with strength={strength}"),
            expected="adapter_name, that of a loaded adapter, whose order and strength the new one takes over",
            fix="pass adapter_name, and change strengths with set_oft_adapters",
        )
    path, label = locate(source, weight_name, hub_options)
    imported = _read(pipe, path, component, strict=strict)
    file = imported.file
    parts = {part: component_for(pipe, file, part) for part in file.components}
    check_prediction(pipe, file)
    bases = compare_bases(parts, file)
    note = Note(file.metadata, imported.format, imported.unmatched)
    proven = [part for part, same in bases.items() if same == "equal"]
    if hotswap:
        name = adapter_name or ""
        _swap(pipe, name, file, note, proven)
    else:
        name = adapter_name or _default_name(pipe, file.metadata.trigger or label)
        _add(pipe, name, parts, file, note, file.metadata.strength if strength is None else strength, proven)
    for sentence in (*imported.notes, *warn_of_bases(bases, file)):
        warnings.warn(sentence, stacklevel=2)
    return next(a for a in list_oft_adapters(pipe) if a.name == name)


def _read(pipe: DiffusionPipeline, path: Path, component: str | None, *, strict: bool) -> Imported:
    """A file of ours or of another tool, without the layers that this pipeline lacks if they may be left out."""
    parts = modules_of(pipe)
    if path.is_dir() or not has_metadata(path, HEADER_KEY):
        try:
            return read(path, parts, component=component, strict=strict)
        except TargetError as error:
            raise AdapterFileError(
                f"{path.name} does not fit this pipeline: {error.problem}", expected=error.expected, fix=error.fix
            ) from error
    if component is not None:
        raise ConfigError(
            f"component={component!r} with {path.name}, which tells its components itself",
            expected="component for files that do not tell, as PEFT's and LyCORIS's do not",
            fix="leave it out; to let one component rest, set its strength to 0 with set_oft_adapters",
        )
    file = load_adapter_file(path)
    if strict:
        return Imported(file, "oft-diffusion")
    kept, left_out = _fitting(file, parts)
    note = (f"{path.name}: {len(left_out)} layers that this pipeline does not have were left out",) if left_out else ()
    return Imported(replace(file, components=kept), "oft-diffusion", note, left_out)


def _fitting(file: AdapterFile, parts: Mapping[str, nn.Module]) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """A file's tensors for layers that the pipeline has, and the names of the others."""
    kept: dict[str, dict[str, Tensor]] = {}
    left_out = []
    for part, state in file.components.items():
        here = layer_names(parts[part]) if part in parts else frozenset()
        for key, tensor in state.items():
            if canonical_name(key.removesuffix(KEY_SUFFIX).removesuffix(SCALE_SUFFIX)) in here:
                kept.setdefault(part, {})[key] = tensor
            elif key.endswith(KEY_SUFFIX):
                left_out.append(f"{part}.{key.removesuffix(KEY_SUFFIX)}")
    if not kept:
        raise AdapterFileError(
            f"{file.path.name} has no layer that this pipeline has",
            expected="at least one",
            fix="load the adapter into the kind of pipeline it was trained for",
        )
    return kept, tuple(left_out)


def _add(
    pipe: DiffusionPipeline,
    name: str,
    parts: Mapping[str, nn.Module],
    file: AdapterFile,
    note: Note,
    strength: Strength,
    proven: Sequence[str],
) -> None:
    """Put an adapter into all components or none; those called `proven` are the very base that it was trained on."""
    check_adapter_name(name)
    if name in {a.name for a in list_oft_adapters(pipe)}:
        raise AdapterError(
            f"the pipeline already has an adapter {name!r}",
            expected="a new name",
            fix="pass another adapter_name, unload that one first, or replace it with hotswap=True",
        )
    refuse_strengths_of_others(strength, [name], list(parts))
    loaded: list[nn.Module] = []
    try:
        for part, module in parts.items():
            try:
                # By the tensors' names, never by the file's target patterns: a stranger's regular expression may take
                # for ever, and what a target set's name means may have grown since.
                bank = inject_state(module, file.metadata.components[part], file.components[part], name)
            except (TargetError, AdapterFileError) as error:
                raise not_for(pipe, file, f"{part}: {error.problem}", error.expected) from error
            loaded.append(module)
            bank.metadata[name] = note
            bank.freeze(name)
            bank.activate(name, strength_of(strength, part), note.mode)
            if part in proven:
                prove_layers(part, module, name, file)
    except BaseException:  # Ctrl-C, too
        for module in loaded:
            remove_oft(module, name)
        raise


def _swap(pipe: DiffusionPipeline, name: str, file: AdapterFile, note: Note, proven: Sequence[str]) -> None:
    """Overwrite a loaded adapter by a file, in all components or none."""
    banks = {part: bank for part, bank in require_banks(pipe, (name,)).items() if name in bank.adapters}
    parts = modules_of(pipe)
    if unknown := [part for part in file.components if part not in banks]:
        raise _no_place(file, name, f"it adapts {unknown[0]}, which {name!r} does not")
    states = {part: _state_for(part, bank, name, file) for part, bank in banks.items()}
    before = {part: (bank.adapters[name], oft_state_dict(parts[part], name)) for part, bank in banks.items()}
    choices = {part: (bank.active, bank.disabled) for part, bank in banks.items()}
    try:
        for part, bank in banks.items():
            config = file.metadata.components.get(part, bank.adapters[name].config)
            size = bank.adapters[name].config.block_size
            bank.adapters[name] = replace(bank.adapters[name], config=replace(config, block_size=size, scaled=False))
            load_oft_state_dict(parts[part], states[part], name)
            _follow_mode(bank, name, note.mode)
            if part in proven:
                prove_layers(part, parts[part], name, file)
    except BaseException:
        for part, (adapter, state) in before.items():
            banks[part].adapters[name] = replace(adapter, config=replace(adapter.config, scaled=False))
            load_oft_state_dict(parts[part], state, name)
            banks[part].use(*choices[part])
        raise
    for bank in banks.values():
        bank.metadata[name] = note


def _follow_mode(bank: OFTBank, name: str, mode: StrengthMode) -> None:
    """Take an adapter's strength as its new file's tool does, unless the user chose another way than the old one's."""
    old = bank.metadata[name].mode if name in bank.metadata else "rotation"
    if mode == old:
        return

    def follow(item: Active) -> Active:
        return replace(item, mode=mode) if item.name == name and item.mode == old else item

    bank.use(tuple(map(follow, bank.active)), {n: follow(item) for n, item in bank.disabled.items()})


def _state_for(part: str, bank: OFTBank, name: str, file: AdapterFile) -> dict[str, Tensor]:
    """A file's tensors for an adapter that is loaded: the identity for layers that it lacks.

    Raises:
        AdapterFileError: it has other layers, sizes, or another side.
    """
    bank.refuse_merged([name])
    config = file.metadata.components.get(part)
    if config is not None and config.side != bank.adapters[name].config.side:
        raise _no_place(file, name, f"it rotates the {config.side}s of {part}, which {name!r} does not")
    wanted = {canonical_name(layer): t for layer, t in bank.effective_generators(name).items()}
    state = {canonical_name(k): t for k, t in file.components.get(part, {}).items()}
    for key, tensor in state.items():
        layer = key.removesuffix(KEY_SUFFIX)
        if key.endswith(KEY_SUFFIX) and (layer not in wanted or wanted[layer].shape != tensor.shape):
            has = f"has shape {tuple(wanted[layer].shape)} there" if layer in wanted else "is not in it"
            raise _no_place(file, name, f"{part}.{layer} of shape {tuple(tensor.shape)} {has}")
    whole = {k + KEY_SUFFIX: torch.zeros_like(t) for k, t in wanted.items()} | state
    for site, keeper in bank.adapters[name].tied.items():
        first, second = layer_of(site), layer_of(keeper)
        if not torch.equal(whole[canonical_name(first) + KEY_SUFFIX], whole[canonical_name(second) + KEY_SUFFIX]):
            raise _no_place(file, name, f"{part}.{first} and {second} share one rotation there, but not here")
    return whole


def _no_place(file: AdapterFile, name: str, problem: str) -> AdapterFileError:
    return AdapterFileError(
        f"{file.path.name} cannot take the place of {name!r}: {problem}",
        expected="the same layers and block sizes, or fewer layers, and the same share_qkv",
        fix="load first the adapter with the most layers, or load this one without hotswap",
    )


def _default_name(pipe: DiffusionPipeline, text: str) -> str:
    base = re.sub(r"[^A-Za-z0-9_\-]+", "_", text).strip("_") or "adapter"
    if hasattr(nn.ParameterDict, base):  # "train" is a fine trigger, but no name for a parameter
        base += "_adapter"
    taken = {a.name for a in list_oft_adapters(pipe)}
    return next(name for name in (base, *(f"{base}_{i}" for i in range(2, 1000))) if name not in taken)
