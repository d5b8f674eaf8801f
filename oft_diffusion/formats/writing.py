"""Writing adapters for tools that know input-side OFT: PEFT, OneTrainer, sd-scripts, ComfyUI-OFTv2."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import AdapterFileError, ConfigError, TargetError
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.components import Components, describe, stable_diffusion
from oft_diffusion.formats.live import EXPORT_KEY
from oft_diffusion.formats.names import APART, Meaning, split_names, write_names
from oft_diffusion.formats.target import Owners, as_stored, new_folder, safetensors_path
from oft_diffusion.hooks import unwrap
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.rotation import block_size_of, rotation_delta, unpack
from oft_diffusion.targets import Target, canonical_name, find_layers, taps_of

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SINGLE_FILE = ("flat", "kohya", "diffusers", "comfy", "native", APART)
_FIVE_TERMS = OFTConfig(parametrisation="cayley_neumann", neumann_order=4)


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the file or folder.
        notes: what a user should know, in sentences: by how much the other tool's rotation differs.
    """

    path: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """One layer to write: its generator as a rotation of the columns of its flattened weight."""

    name: str
    packed: Tensor
    is_conv: bool
    taps: int


def write_single_file(
    path: Path,
    file: AdapterFile,
    parts: Mapping[str, nn.Module],
    naming: str | Mapping[str, str] = "flat",
    *,
    tool: str = "sd-scripts",
    dtype: torch.dtype = torch.float32,
) -> Written:
    """One file that OneTrainer, ComfyUI-OFTv2 and, on Stable Diffusion 1, 2 and XL, sd-scripts load.

    They take the series of five terms, unscaled, `W R^T` in linear layers and `W R` in convolutions.

    Args:
        path: a `.safetensors` file.
        file: the adapter.
        parts: the modules of the pipeline that it is for, by name; "meta" tensors are enough.
        naming: of `SINGLE_FILE`, or one by component; `tools.names_of` tells which one a tool reads.
        tool: whose file it is to be, of `tools.TOOLS`. Headers alone differ by it, which no tool reads settings from.
        dtype: of the numbers.

    Raises:
        AdapterFileError: it rotates outputs, or is not for these modules; layers that are one in that naming have
            different rotations; a number is too large for `dtype`; it cannot be written.
        TargetError: a layer has no name in that naming, or that of another component's.
        ConfigError: there is no such naming.
    """
    path, about = safetensors_path(path), describe(parts)
    namings = dict.fromkeys(file.components, naming) if isinstance(naming, str) else dict(naming)
    if unknown := sorted(set(namings.values()) - set(SINGLE_FILE)):
        raise ConfigError(
            f"naming={unknown[0]!r} is no naming of single files",
            expected=f"one of {', '.join(SINGLE_FILE)}",
            fix="leave it out",
        )
    tensors: dict[str, Tensor] = {}
    held: dict[str, int] = {}  # layers per key
    kernels = False
    notes, owners = [], Owners()
    for part, state in file.components.items():
        layers = {layer.name: layer for layer in _layers(file, part, parts)}
        kernels = kernels or any(layer.taps > 1 for layer in layers.values())
        for key, meaning in _names(about, part, layers, namings[part]).items():
            owners.claim(key, part)
            layer = _one_of(file, key, meaning, layers)
            tensors[key + KEY_SUFFIX] = as_stored(key, -layer.packed if layer.is_conv else layer.packed, dtype)
            held[key] = len(meaning.leaves)
        notes += _difference(part, state, file.metadata.components[part], _FIVE_TERMS)
    assert sum(held.values()) == sum(map(len, file.components.values())), "layers were lost"
    note = json.dumps({"tool": tool, "naming": namings, "sha256": file.metadata.sha256})
    header = _modelspec(file, about) | {EXPORT_KEY: note}
    header |= _sd_scripts_header(file, kernels) if tool != "onetrainer" else {}
    write_atomically(path, save(tensors, metadata=header))
    return Written(path, tuple(notes))


def write_peft(
    folder: Path, file: AdapterFile, parts: Mapping[str, nn.Module], *, dtype: torch.dtype = torch.float32
) -> Written:
    """What PEFT loads onto a component: a folder with `adapter_model.safetensors` and `adapter_config.json`.

    Of an adapter of several components, each has a folder in it that is called as it is. All is written, or nothing.

    Args:
        folder: the new folder.
        file: the adapter.
        parts: the modules of the pipeline that it is for, by name; "meta" tensors are enough.
        dtype: of the numbers.

    Raises:
        AdapterFileError: it rotates outputs, or convolutions larger than 1x1, which PEFT gets wrong, or is not for
            these modules; no single block size makes PEFT choose the sizes that its layers have; a number is too large
            for `dtype`; the folder is there already, or cannot be written.
    """
    made = {part: _peft_files(file, part, parts, dtype) for part in file.components}
    notes = []
    for part, state in file.components.items():
        config = file.metadata.components[part]
        notes += _difference(part, state, config, _peft_series(config)[1])
    with new_folder(folder) as temporary:
        for part, files in made.items():
            for name, data in files.items():
                write_atomically((temporary / part if len(made) > 1 else temporary) / name, data)
    return Written(folder, tuple(notes))


def part_of(file: AdapterFile, component: str) -> AdapterFile:
    """What an adapter does to one component, as an adapter.

    Raises:
        ConfigError: it does not adapt it.
    """
    if component not in file.components:
        raise ConfigError(
            f"{file.path.name} does not adapt {component}",
            expected=f"one of {', '.join(file.components)}",
            fix="choose one of those",
        )
    metadata = replace(file.metadata, components={component: file.metadata.components[component]})
    return AdapterFile(file.path, {component: file.components[component]}, metadata)


def check_fit(file: AdapterFile, parts: Mapping[str, nn.Module]) -> None:
    """Refuse an adapter for another model than the one with these modules.

    Raises:
        AdapterFileError: a component is not there, or of another class, or lacks a layer, or one is of another width.
    """
    for part, state in file.components.items():
        _targets(file, part, state, parts)


def _peft_files(file: AdapterFile, part: str, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, bytes]:
    """PEFT's two files about a component, by name."""
    config = file.metadata.components[part]
    layers = list(_layers(file, part, parts))
    if wide := [layer.name for layer in layers if layer.taps > 1]:
        raise AdapterFileError(
            f"{file.path.name} adapts {wide[0]}, a convolution larger than 1x1, where PEFT's OFT is broken",
            expected="linear layers and 1x1 convolutions",
            fix="write another format",
        )
    sign = -1.0 if config.parametrisation == "cayley" else 1.0
    keys = {layer.name: f"base_model.model.{layer.name}{KEY_SUFFIX}" for layer in layers}
    tensors = {keys[layer.name]: as_stored(keys[layer.name], sign * layer.packed, dtype) for layer in layers}
    settings = {
        "peft_type": "OFT", "peft_version": "0.21.2", "auto_mapping": None, "base_model_name_or_path": None,
        "bias": "none", "block_share": False, "coft": False, "eps": 6e-5, "exclude_modules": None,
        "fan_in_fan_out": False, "inference_mode": True, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None,
        "oft_block_size": _peft_block_size(file, layers), "r": 0, "revision": None,
        "target_modules": [layer.name for layer in layers], "task_type": None, **_peft_series(config)[0],
    }  # fmt: skip
    return {
        WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: json.dumps(settings, indent=2, sort_keys=True).encode(),
    }


def _targets(
    file: AdapterFile, part: str, state: Mapping[str, Tensor], parts: Mapping[str, nn.Module]
) -> list[tuple[Target, Tensor]]:
    """A component's adapted layers in a model, each with its generator."""
    trained = file.metadata.base.get("components", {}).get(part)
    here = type(unwrap(parts[part])).__name__ if part in parts else None
    if here is None or trained not in (None, here):
        found = f"its {part} is a {here}" if here else f"it has no {part}"
        raise _not_for(file, found, f"a {trained or 'model'} as {part}", describe(parts))
    given = {canonical_name(key.removesuffix(KEY_SUFFIX)): t for key, t in state.items() if key.endswith(KEY_SUFFIX)}
    try:
        targets = find_layers(parts[part], given)
    except TargetError as error:
        raise _not_for(file, f"{part}: {error.problem}", error.expected, describe(parts)) from error
    inputs = file.metadata.components[part].side == "input"
    for target in targets:
        packed = given[canonical_name(target.name)]
        width, taps = len(packed) * (block_size_of(packed.shape[1]) or 0), taps_of(target.module)
        if inputs and width not in (target.in_features, target.in_features * taps):
            raise _not_for(
                file, f"its rotation of {part}.{target.name} has {width} rows, which has {target.in_features} inputs",
                "layers as wide as those that it was trained on", describe(parts),
            )  # fmt: skip
    return [(target, given[canonical_name(target.name)]) for target in targets]


def _not_for(file: AdapterFile, problem: str, expected: str, about: Components) -> AdapterFileError:
    classes = ", ".join(f"{part} {layers.class_name}" for part, layers in about.items())
    trained = ", ".join(f"{part} {name}" for part, name in file.metadata.base.get("components", {}).items())
    return AdapterFileError(
        f"{file.path.name}{f', trained on a model with {trained},' if trained else ''} does not fit the model with "
        f"{classes}: {problem}",
        expected=expected,
        fix="name the model that the adapter was trained on",
    )


def _layers(file: AdapterFile, part: str, parts: Mapping[str, nn.Module]) -> Iterator[_Layer]:
    """The adapted layers of a component, under their names in the model."""
    if file.metadata.components[part].side == "output":
        raise AdapterFileError(
            f"{file.path.name} rotates outputs, as the first OFT did",
            expected="an adapter that rotates inputs, which is all that tools of OFTv2 know",
            fix='write "diff", "lora" or a merged model instead, which hold any change',
        )
    for target, stored in _targets(file, part, file.components[part], parts):
        packed, taps = stored.float(), taps_of(target.module)
        size = block_size_of(packed.shape[1]) or 0
        if taps > 1 and len(packed) * size == target.in_features:
            packed = _at_every_tap(packed, taps)
        yield _Layer(target.name, packed, isinstance(target.module, nn.Conv2d), taps)


def _names(about: Components, part: str, layers: Mapping[str, _Layer], naming: str) -> dict[str, Meaning]:
    if naming != APART:
        return write_names(about, part, layers, naming)

    def alike(names: Collection[str]) -> bool:
        first, *others = (layers[name].packed for name in names)
        return all(torch.equal(first, other) for other in others)

    return split_names(about, part, layers, alike)


def _at_every_tap(packed: Tensor, taps: int) -> Tensor:
    """A rotation of channels as one of flattened patches `(channels, taps)`: `Q ⊗ I`, blocks `taps` times as large."""
    q = torch.kron(unpack(packed), torch.eye(taps))
    rows, columns = torch.triu_indices(q.shape[1], q.shape[1], 1)
    return q[:, rows, columns]


def _one_of(file: AdapterFile, key: str, meaning: Meaning, layers: Mapping[str, _Layer]) -> _Layer:
    """The rotation of a weight that several layers are in: they read the same input, so it must be the same."""
    leaves = [layers[layer] for layer in meaning.layers if layer in layers]
    if meaning.missing or any(not torch.equal(leaf.packed, leaves[0].packed) for leaf in leaves):
        why = f"{meaning.missing[0]} is not adapted" if meaning.missing else "their rotations differ"
        raise AdapterFileError(
            f"{key} is one weight of {', '.join(meaning.layers)}, and {why} in {file.path.name}",
            expected="one rotation for all of them, as share_qkv trains it",
            fix='use names that keep them apart ("flat", "diffusers"), train with share_qkv = true, or write a diff',
        )
    return leaves[0]


def _difference(part: str, state: Mapping[str, Tensor], ours: OFTConfig, theirs: OFTConfig) -> list[str]:
    """By how much another series turns otherwise, if it does."""
    if (ours.parametrisation, ours.neumann_order) == (theirs.parametrisation, theirs.neumann_order):
        return []
    if ours.parametrisation == theirs.parametrisation == "cayley":
        return []
    worst, norm = 0.0, 0.0
    for packed in (tensor.double() for key, tensor in state.items() if key.endswith(KEY_SUFFIX)):
        worst = max(worst, float((rotation_delta(packed, ours) - rotation_delta(packed, theirs)).abs().max()))
        norm = max(norm, float(torch.linalg.matrix_norm(unpack(packed), 2).max()))
    how = "exactly" if theirs.parametrisation == "cayley" else f"by a series of order {theirs.neumann_order}"
    told = f"{part}: the target builds rotations {how}, so that they differ by up to {worst:.2g} in an entry"
    return [f"{told} (generators reach a norm of {norm:.2f})"]


def _peft_series(config: OFTConfig) -> tuple[dict[str, Any], OFTConfig]:
    """PEFT's settings for a series, and what they mean to us: its own where it has it, else the nearest."""
    if config.parametrisation == "cayley":
        return {"use_cayley_neumann": False, "num_cayley_neumann_terms": 5}, config
    order = config.neumann_order
    if config.parametrisation == "cayley_series":
        terms = 2 if order == 1 else max(order + 1, 4)
    else:
        terms = max(order + 1, 4)
    if terms == 2:
        target = replace(config, parametrisation="cayley_series", neumann_order=1)
    else:
        target = replace(config, parametrisation="cayley_neumann", neumann_order=terms - 1)
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}, target


def _peft_block_size(file: AdapterFile, layers: list[_Layer]) -> int:
    """The block size from which PEFT comes to every layer's own."""
    sizes = {layer.name: block_size_of(layer.packed.shape[1]) or 0 for layer in layers}
    widths = {layer.name: len(layer.packed) * sizes[layer.name] for layer in layers}
    for wanted in range(max(sizes.values()), 1, -1):
        if all(_adjusted(widths[name], wanted) == size for name, size in sizes.items()):
            return wanted
    raise AdapterFileError(
        f"{file.path.name} has blocks of {', '.join(map(str, sorted(set(sizes.values()))))}, which PEFT cannot be told",
        expected="one block size, or sizes that PEFT itself would come to",
        fix="write another format",
    )


def _adjusted(width: int, wanted: int) -> int:
    """What PEFT makes of a block size: the nearest that divides, the smaller of two."""
    if wanted >= width:
        return width
    for distance in range(width):
        for size in (wanted - distance, wanted + distance):
            if size > 0 and width % size == 0:
                return size
    return width


def _modelspec(file: AdapterFile, about: Components) -> dict[str, str]:
    """What tools that list adapters look at, and by what they know the base."""
    version = stable_diffusion(about)
    base = {"SD 1": "sd_v1", "SD 2": "sd_v2", "SDXL": "sdxl_base_v1-0"}.get(version or "")
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": file.metadata.trigger or file.path.stem,
        "modelspec.trigger_phrase": file.metadata.trigger or "",
    }
    return header | ({"ss_base_model_version": base, "ss_v2": str(version == "SD 2")} if base else {})


def _sd_scripts_header(file: AdapterFile, kernels: bool) -> dict[str, str]:
    """The module and the arguments by which sd-scripts would train such an adapter."""
    states = file.components.values()
    sizes = {block_size_of(t.shape[1]) or 0 for state in states for key, t in state.items() if key.endswith(KEY_SUFFIX)}
    arguments = {"block_size": str(max(sizes))} if len(sizes) == 1 else {}  # several have no argument
    arguments |= {"coft": "False", **({"enable_conv": "True"} if kernels else {})}
    return {
        "ss_network_module": "networks.oft_v2",
        "ss_network_dim": str(max(sizes)),
        "ss_network_args": json.dumps(arguments),
    }
