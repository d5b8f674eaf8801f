"""OFT adapters in a diffusers pipeline: load, weigh, fuse and save, over all its components at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError, AdapterFileError, TargetError, first_line
from oft_diffusion.files import (
    FILE_NAME,
    AdapterFile,
    AdapterMetadata,
    load_adapter_file,
    resolve_adapter_path,
    save_adapter_file,
)
from oft_diffusion.hooks import bank_of, unwrap
from oft_diffusion.inject import inject_state, oft_state_dict, remove_oft
from oft_diffusion.merge import KeepBase, check_keep_base, check_merge, merge_oft, unmerge_oft
from oft_diffusion.plan import StrengthMode, as_names, check_adapter_name, make_active
from oft_diffusion.prediction import prediction_type

_HUB_OPTIONS = (
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version",
    "local_dir", "local_files_only", "repo_type", "revision", "subfolder", "token", "user_agent",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in a pipeline.

    Attributes:
        name: its name here.
        components: the components it adapts.
        strength: s where it is active or fused, None where it is inactive.
        mode: how that strength is taken, "rotation" or "linear"; None where it is inactive.
        fused: whether it is merged into the weights.
        metadata: its file's metadata.
    """

    name: str
    components: tuple[str, ...]
    strength: float | None
    mode: StrengthMode | None
    fused: bool
    metadata: AdapterMetadata | None


def load_oft_weights(
    pipe: DiffusionPipeline,
    source: str | Path,
    *,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    strength: float = 1.0,
    **hub_options: Any,
) -> LoadedAdapter:
    """Load an adapter into every component that its file adapts, frozen, active after those already active.

    Args:
        pipe: any diffusers pipeline.
        source: a `.safetensors` file, a folder with one, or a hub repository id.
        weight_name: the file's name in the folder or repository; `oft_adapter.safetensors` if None.
        adapter_name: its name in this pipeline; made from the trigger token or the file's name if None.
        strength: 0 is the base, 1 as trained, see `set_oft_adapters`.
        **hub_options: for `huggingface_hub.hf_hub_download`: revision, subfolder, token, cache_dir,
            local_files_only, ...

    Returns:
        What was loaded.

    Raises:
        AdapterFileError: the file is missing, broken, or does not fit this pipeline; the pipeline is unchanged then.
        AdapterError: this is no pipeline, the name is taken or not usable, or an adapter is fused; likewise.
    """
    path, label = _locate(source, weight_name, hub_options)
    file = load_adapter_file(path)
    name = adapter_name or _default_name(pipe, file.metadata.trigger or label)
    check_adapter_name(name)
    if name in {a.name for a in list_oft_adapters(pipe)}:
        raise AdapterError(
            f"the pipeline already has an adapter {name!r}",
            expected="a new name",
            fix="pass another adapter_name, or unload that one first",
        )
    modules = {part: _component_for(pipe, file, part) for part in file.components}
    _check_prediction(pipe, file)
    loaded: list[nn.Module] = []
    try:
        for part, module in modules.items():
            state = file.components[part]
            # By the tensors' names, never by the file's target patterns: a stranger's regular expression may take for
            # ever, and what a target set's name means may have grown since.
            bank = inject_state(module, file.metadata.components[part], state, name)
            loaded.append(module)
            bank.metadata[name] = file.metadata
            bank.freeze(name)
            bank.activate(name, strength)
    except BaseException as error:  # Ctrl-C, too
        for module in loaded:
            remove_oft(module, name)
        if isinstance(error, (TargetError, AdapterFileError)):
            raise AdapterFileError(
                f"{file.path.name} does not fit this pipeline's {part}: {error.problem}",
                expected=error.expected,
                fix="load the adapter into the kind of pipeline it was trained for",
            ) from error
        raise
    return next(a for a in list_oft_adapters(pipe) if a.name == name)


def list_oft_adapters(pipe: DiffusionPipeline) -> list[LoadedAdapter]:
    """The pipeline's adapters, in the order they were loaded into each component."""
    found: dict[str, LoadedAdapter] = {}
    order: list[str] = []
    for part, bank in _banks(pipe).items():
        used = {a.name: a for a in (*bank.active, *bank.merged_active)}
        place = 0
        for name in bank.adapters:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
            before = found.get(name)
            found[name] = LoadedAdapter(
                name,
                (*(before.components if before else ()), part),
                used[name].strength if name in used else None,
                used[name].mode if name in used else None,
                name in bank.merged,
                bank.metadata.get(name),
            )
    return [found[name] for name in order]


def set_oft_adapters(
    pipe: DiffusionPipeline,
    adapter_names: str | Sequence[str],
    strengths: float | Sequence[float] = 1.0,
    mode: StrengthMode = "rotation",
) -> None:
    """Choose the adapters that act, in this order, and how strongly; the others stay loaded and rest.

    Args:
        pipe: a pipeline with adapters.
        adapter_names: names, in the order in which a layer's input meets them; empty for the base alone.
        strengths: one for all or one each: 0 is the base, 1 as trained, -1 the inverse (exact Cayley), any number.
        mode: "rotation" takes the group power R^s, "linear" the blend (1-s) I + s R that other tools use.

    Raises:
        AdapterError: a name is unknown, fused or repeated, counts differ, or a strength is not finite, or a fraction
            that a series adapter's norm does not allow; nothing is changed then.
    """
    names = as_names(adapter_names)
    banks = _require_banks(pipe, names)
    active = make_active(names, strengths, mode)
    for bank in banks.values():
        bank.refuse_merged(names)
    before = [(bank, bank.active) for bank in banks.values()]
    try:
        for bank in banks.values():
            bank.use(tuple(a for a in active if a.name in bank.adapters))
    except AdapterError:
        for bank, was_active in before:
            bank.use(was_active)
        raise


def fuse_oft(
    pipe: DiffusionPipeline, adapter_names: str | Sequence[str] | None = None, *, keep_base: KeepBase = "cpu"
) -> None:
    """Merge active adapters into the weights: no cost per step any more, and the same pictures up to rounding.

    Args:
        pipe: a pipeline with active adapters.
        adapter_names: which; all active ones if None. They must be the last in order.
        keep_base: where to keep what `unfuse_oft` puts back bit by bit: "cpu", "disk", or False for nowhere.

    Raises:
        AdapterError: nothing is active, the order would change, a LoRA is fused there, or `keep_base` is none of the
            three, or a disk that is full.
        TargetError: a layer has no floating weight, as in a quantized base.

    After any error nothing is fused, in no component; but for one amid the work (Ctrl-C, no memory) with
    `keep_base=False`: load the pipeline again then.
    """
    check_keep_base(keep_base)
    names = None if adapter_names is None else as_names(adapter_names)
    wanted: dict[str, list[str]] = {}
    for part, bank in _require_banks(pipe, names or ()).items():
        here = [a.name for a in bank.active] if names is None else [n for n in names if n in bank.adapters]
        if here:
            wanted[part] = here
    if not wanted:
        fused = [a.name for a in list_oft_adapters(pipe) if a.fused]
        raise AdapterError(
            f"nothing to fuse: no adapter is active or named{f' ({fused[0]} is fused already)' if fused else ''}",
            expected="active adapters",
            fix="activate them with set_oft_adapters first",
        )
    for part, here in wanted.items():
        check_merge(getattr(pipe, part), here)
    done: list[str] = []
    try:
        for part, here in wanted.items():
            merge_oft(getattr(pipe, part), here, keep_base=keep_base)
            done.append(part)
    except BaseException:  # Ctrl-C, too
        for part in done if keep_base else ():
            unmerge_oft(getattr(pipe, part))
        raise


def unfuse_oft(pipe: DiffusionPipeline) -> None:
    """Put the base's weights back, bit by bit; fused adapters act live again.

    Raises:
        AdapterError: nothing is fused, or the base was not kept.
    """
    fused = [part for part, bank in _require_banks(pipe, ()).items() if bank.merged]
    if not fused:
        raise AdapterError("nothing is fused in this pipeline", expected="a fused adapter", fix="call fuse_oft first")
    for part in fused:
        unmerge_oft(getattr(pipe, part))


def unload_oft_weights(pipe: DiffusionPipeline, adapter_name: str | None = None) -> None:
    """Remove one adapter, or all; without any, the pipeline is bit-identical to what it was.

    Raises:
        AdapterError: there is none of that name, or it is fused and the base was kept: unfuse first. Nothing is
            removed then.
    """
    banks = _require_banks(pipe, () if adapter_name is None else (adapter_name,))
    for bank in banks.values():
        if adapter_name is not None or bank.base_copy is not None:
            bank.refuse_merged(bank.merged if adapter_name is None else (adapter_name,))
    for part, bank in banks.items():
        if adapter_name is None or adapter_name in bank.adapters:
            remove_oft(getattr(pipe, part), adapter_name)


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
    banks = {p: b for p, b in _require_banks(pipe, (adapter_name,)).items() if adapter_name in b.adapters}
    known = metadata or next((b.metadata[adapter_name] for b in banks.values() if adapter_name in b.metadata), None)
    known = known or AdapterMetadata(components={})
    modules = {part: getattr(pipe, part) for part in banks}
    filled = replace(
        known,
        components={part: bank.adapters[adapter_name].config for part, bank in banks.items()},
        base=known.base or describe_base(getattr(pipe.config, "_name_or_path", ""), modules),
    )
    states = {part: oft_state_dict(module, adapter_name) for part, module in modules.items()}
    return save_adapter_file(path, states, filled)


def describe_base(name: str, components: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What an adapter's metadata says of its base: its name, and each adapted component's class.

    Of a local path only the last part: adapters are shared, and where a base lay is nobody's business.
    """
    local = Path(name)
    shown = local.absolute().name if name and (local.is_absolute() or local.exists()) else str(name)
    return {"name": shown, "components": {part: type(unwrap(m)).__name__ for part, m in components.items()}}


def _banks(pipe: DiffusionPipeline) -> dict[str, OFTBank]:
    return {part: bank for part, module in _modules(pipe).items() if (bank := bank_of(module)) is not None}


def _modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise AdapterError(
            f"a {type(pipe).__name__} is no pipeline",
            expected="a diffusers pipeline with its components",
            fix="pass the pipeline itself, not one of its components",
        )
    return {part: module for part, module in components.items() if isinstance(module, nn.Module)}


def _require_banks(pipe: DiffusionPipeline, names: Sequence[str]) -> dict[str, OFTBank]:
    banks = _banks(pipe)
    known = [a.name for a in list_oft_adapters(pipe)]
    for name in names:
        if name not in known:
            raise AdapterError(
                f"no adapter {name!r} in this pipeline",
                expected=f"one of: {', '.join(known) or '(none is loaded)'}",
                fix="check the name, or load it with load_oft_weights",
            )
    if not banks:
        raise AdapterError(
            "this pipeline has no OFT adapter", expected="a loaded adapter", fix="call load_oft_weights first"
        )
    return banks


def _component_for(pipe: DiffusionPipeline, file: AdapterFile, part: str) -> nn.Module:
    modules = _modules(pipe)
    module = modules.get(part)
    if module is None:
        raise AdapterFileError(
            f"{file.path.name} adapts the component {part!r}, which this {type(pipe).__name__} does not have",
            expected=f"a pipeline with it; this one has {', '.join(modules)}",
            fix="load the adapter into the kind of pipeline it was trained for",
        )
    trained_on = file.metadata.base.get("components", {}).get(part)
    here = type(unwrap(module)).__name__
    if trained_on is not None and trained_on != here:
        raise AdapterFileError(
            f"{file.path.name} was trained on a {trained_on}, but this pipeline's {part} is a {here}",
            expected=f"a {trained_on}",
            fix="load the adapter into the kind of pipeline it was trained for",
        )
    return module


def _check_prediction(pipe: DiffusionPipeline, file: AdapterFile) -> None:
    """SD 2.1 and its base differ in nothing else; an adapter of the one makes noise of the other's pictures."""
    trained = file.metadata.base.get("prediction_type")
    scheduler = getattr(pipe, "scheduler", None)
    here = prediction_type({"_class_name": type(scheduler).__name__, **getattr(scheduler, "config", {})})
    if trained is not None and here is not None and trained != here:
        raise AdapterFileError(
            f"{file.path.name} was trained on a model that predicts {trained!r}, but this pipeline's scheduler says "
            f"{here!r}",
            expected=f"a base with prediction_type {trained!r}",
            fix="load the base it was trained on"
            + (f" ({name})" if (name := file.metadata.base.get("name")) else "")
            + ", or correct the scheduler's config",
        )


def _default_name(pipe: DiffusionPipeline, text: str) -> str:
    base = re.sub(r"[^A-Za-z0-9_\-]+", "_", text).strip("_") or "adapter"
    if hasattr(nn.ParameterDict, base):  # "train" is a fine trigger, but no name for a parameter
        base += "_adapter"
    taken = {a.name for a in list_oft_adapters(pipe)}
    return next(name for name in (base, *(f"{base}_{i}" for i in range(2, 1000))) if name not in taken)


def _locate(source: str | Path, weight_name: str | None, hub_options: Mapping[str, Any]) -> tuple[Path, str]:
    """The local path of an adapter file, and what to call it: the folder's, the file's or the repository's name."""
    if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
        raise TypeError(f"load_oft_weights() got an unexpected keyword argument {unknown[0]!r}")
    local = Path(source)
    is_hub_id = isinstance(source, str) and re.fullmatch(r"[\w.\-]{1,96}/[\w.\-]{1,96}", source) is not None
    if not is_hub_id or local.suffix == ".safetensors" or local.exists():
        if subfolder := hub_options.get("subfolder"):
            local = local / subfolder
        path = resolve_adapter_path(local, weight_name)
        return path, path.absolute().parent.name if path.name == FILE_NAME else path.stem
    from huggingface_hub import hf_hub_download

    file_name = weight_name or FILE_NAME
    try:
        path = Path(hf_hub_download(str(source), file_name, **hub_options))
    except Exception as error:  # its client raises those of several libraries
        raise AdapterFileError(
            f"{source!r} is no local path, and {file_name} could not be had from that hub repository "
            f"({first_line(error)})",
            expected="a local file or folder, or a reachable repository that holds the file",
            fix="check the name, weight_name, revision and token, or download the file first",
        ) from error
    return path, local.name if path.name == FILE_NAME else path.stem
