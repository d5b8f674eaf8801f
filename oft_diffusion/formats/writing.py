"""Writing adapters for tools that know input-side OFT: PEFT, OneTrainer, sd-scripts, ComfyUI-OFTv2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.components import UNET, Components, describe
from oft_diffusion.formats.names import Meaning, write_names
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.rotation import block_size_of, rotation_delta, unpack
from oft_diffusion.targets import canonical_name, find_layers, taps_of

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
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
    naming: str = "flat",
    *,
    dtype: torch.dtype = torch.float32,
) -> Written:
    """One file that OneTrainer, ComfyUI-OFTv2 and, on Stable Diffusion 1, 2 and XL, sd-scripts load.

    They take the series of five terms, unscaled, `W R^T` in linear layers and `W R` in convolutions.

    Args:
        path: a `.safetensors` file.
        file: the adapter.
        parts: the modules of the pipeline that it is for, by name; "meta" tensors are enough.
        naming: of `names.NAMINGS`: "flat" for OneTrainer, "kohya" for sd-scripts, "comfy", "diffusers", "native".
        dtype: of the numbers.

    Raises:
        AdapterFileError: it rotates outputs; layers that are one in that naming have different rotations; it cannot be
            written.
        TargetError: a layer has no name in that naming.
    """
    about = describe(parts)
    tensors: dict[str, Tensor] = {}
    notes = []
    for part, state in file.components.items():
        config = file.metadata.components[part]
        layers = {layer.name: layer for layer in _layers(file, part, parts[part])}
        for key, meaning in write_names(about, part, layers, naming).items():
            layer = _one_of(file, key, meaning, layers)
            tensors[key + KEY_SUFFIX] = (-layer.packed if layer.is_conv else layer.packed).to(dtype).contiguous()
        notes += _difference(part, state, config, _FIVE_TERMS)
    header = _kohya_header(file, about, naming)
    write_atomically(path, save(tensors, metadata=header))
    return Written(path, tuple(notes))


def write_peft(
    folder: Path, file: AdapterFile, component: str, module: nn.Module, *, dtype: torch.dtype = torch.float32
) -> Written:
    """A folder that PEFT loads onto one component: `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        folder: made if need be.
        file: the adapter.
        component: which of its components.
        module: that component of the pipeline it is for; "meta" tensors are enough.
        dtype: of the numbers.

    Raises:
        AdapterFileError: it rotates outputs, or convolutions larger than 1x1, which PEFT gets wrong; no single block
            size makes PEFT choose the sizes that its layers have; it cannot be written.
    """
    config = file.metadata.components[component]
    layers = list(_layers(file, component, module))
    if wide := [layer.name for layer in layers if layer.taps > 1]:
        raise AdapterFileError(
            f"{file.path.name} adapts {wide[0]}, a convolution larger than 1x1, where PEFT's OFT is broken",
            expected="linear layers and 1x1 convolutions",
            fix="write another format",
        )
    told, target = _peft_series(config)
    sign = -1.0 if config.parametrisation == "cayley" else 1.0
    tensors = {
        f"base_model.model.{layer.name}{KEY_SUFFIX}": (sign * layer.packed).to(dtype).contiguous() for layer in layers
    }
    settings = {
        "peft_type": "OFT", "peft_version": "0.21.2", "auto_mapping": None, "base_model_name_or_path": None,
        "bias": "none", "block_share": False, "coft": False, "eps": 6e-5, "exclude_modules": None,
        "fan_in_fan_out": False, "inference_mode": True, "init_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None,
        "oft_block_size": _peft_block_size(file, layers), "r": 0, "revision": None,
        "target_modules": [layer.name for layer in layers], "task_type": None, **told,
    }  # fmt: skip
    write_atomically(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True).encode())
    return Written(folder, tuple(_difference(component, file.components[component], config, target)))


def _layers(file: AdapterFile, part: str, module: nn.Module) -> Iterator[_Layer]:
    """The adapted layers of a component, under their names in the model."""
    config, state = file.metadata.components[part], file.components[part]
    if config.side == "output":
        raise AdapterFileError(
            f"{file.path.name} rotates outputs, as the first OFT did",
            expected="an adapter that rotates inputs, which is all that tools of OFTv2 know",
            fix='write "diff", "lora" or a merged model instead, which hold any change',
        )
    given = {canonical_name(key.removesuffix(KEY_SUFFIX)): tensor.float() for key, tensor in state.items()}
    for target in find_layers(module, [key.removesuffix(KEY_SUFFIX) for key in state]):
        packed = given[canonical_name(target.name)]
        is_conv = isinstance(target.module, nn.Conv2d)
        taps = taps_of(target.module)
        size = block_size_of(packed.shape[1]) or 0
        if taps > 1 and len(packed) * size == target.in_features:
            packed = _at_every_tap(packed, taps)
        yield _Layer(target.name, packed, is_conv, taps)


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
            fix='use the naming "flat", which keeps them apart, or train with share_qkv = true',
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
    how = "" if theirs.parametrisation == "cayley" else f" (order {theirs.neumann_order})"
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


def _kohya_header(file: AdapterFile, about: Components, naming: str) -> dict[str, str]:
    """What sd-scripts, OneTrainer and the tools that list adapters look at."""
    sizes = {config.block_size for config in file.metadata.components.values()}
    unet = next((layers for layers in about.values() if layers.class_name == UNET), None)
    base = "sdxl_base_v1-0" if unet is not None and unet.is_xl else "sd_v1" if unet is not None else ""
    header = {
        "format": "pt",
        "ss_network_module": "networks.oft_v2",
        "ss_network_dim": str(max((s for s in sizes if isinstance(s, int)), default=0)),
        "ss_network_args": json.dumps({"coft": "False"}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": file.metadata.trigger or file.path.stem,
        "modelspec.trigger_phrase": file.metadata.trigger or "",
        f"{HEADER_KEY}_export": json.dumps({"naming": naming, "sha256": file.metadata.sha256}),
    }
    return header | ({"ss_base_model_version": base} if base else {})
