"""The files that `test_mutated_files` damages, and what each tool would make of them: read apart from this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.disk import SEAL_KEY, sealed
from oft_diffusion.metadata import HEADER_KEY
from tests.helpers.safetensors_bytes import Entry, built, entries, tensors_of
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, peft_oft, sd_scripts, wild

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_k", "down_blocks.0.attentions.0.proj_in")
KERNEL = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Layer = tuple[str, str]  # component, and name in it
Files = Mapping[str, bytes]
Own = Mapping[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What a file says of a layer: its generators as ours, None where it has none, its weight, and how exactly."""

    packed: Tensor | None
    weight: Callable[[], Tensor]
    scale: Tensor | None = None
    tolerance: float = 2e-5


@dataclass(frozen=True)
class Subject:
    """A sound adapter, and one of its files that is to be damaged.

    Attributes:
        name: for messages.
        files: by their names in a folder.
        damaged: which of them is damaged.
        source: what is loaded, below the folder.
        read: what the files say, by layer; None where no damaged one may be loaded.
        finish: what else is done to the damaged file.
    """

    name: str
    files: Files
    damaged: str
    source: str
    read: Callable[[Files], dict[Layer, Wanted]] | None
    finish: Callable[[bytes], bytes] = bytes


def subjects(pipe: Any, ours: Path) -> list[Subject]:
    """One per tool and kind of file. `ours` is a file of this package for the pipeline."""
    flat = _keys(
        pipe, lambda n: "lora_unet_" + n.replace(".", "_"), lambda n: "lora_te_text_model_" + n.replace(".", "_")
    )
    wan = _keys(pipe, lambda n: "oftv2_unet_" + n.replace(".", "_"), None)
    kohya = _keys(pipe, lambda n: "oft_unet_" + n.replace(".", "_"), None)
    layers = [("unet", name) for name in (*UNET, KERNEL)] + [("text_encoder", TEXT)]
    unet = layers[:-1]

    def shapes(keys: Mapping[str, Layer], chosen: list[Layer]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(_weight(pipe, layer).shape) for key, layer in keys.items() if layer in chosen}

    everything = shapes(flat, layers)
    singles = {
        "onetrainer": (onetrainer.write_onetrainer(everything, block_size=8, coft_eps=0.3), flat, _onetrainer),
        "onetrainer scaled": (onetrainer.write_onetrainer(everything, block_size=8, scaled=True), flat, _onetrainer),
        "sd-scripts": (
            sd_scripts.write_sd_scripts(everything, block_size=8, coft=True, coft_eps=0.3), flat, _sd_scripts
        ),
        "musubi": (wild.write_musubi(everything, block_size=8, coft=True, coft_eps=2.0), flat, _musubi),
        "wan": (wild.write_wan(shapes(wan, unet), block_size=8, terms=6), wan, _wan),
        "kohya oft": (kohya_oft.write_kohya_oft(shapes(kohya, unet), alpha=0.02), kohya, _kohya),
        "lycoris": (lycoris_oft.write_lycoris(everything, constraint=0.02), flat, _kohya),
        "lycoris rescaled": (lycoris_oft.write_lycoris(everything, rescaled=True), flat, _kohya),
        "old lycoris": (lycoris_oft.write_lycoris_oft_diag(shapes(flat, unet)), flat, _oft_diag),
    }  # fmt: skip
    found = [
        Subject(name, {"a.safetensors": _saved(written)}, "a.safetensors", "a.safetensors", _reader(pipe, keys, tool))
        for name, (written, keys, tool) in singles.items()
    ]
    peft = _keys(pipe, lambda n: peft_oft.PREFIX + n, None)
    modules = {name: tuple(_weight(pipe, ("unet", name)).shape) for name in UNET}
    for exact in (False, True):
        config = peft_oft.peft_config(list(modules), block_size=8, coft=not exact, eps=0.3, exact=exact)
        files = {TENSORS: _saved(peft_oft.peft_file(modules, block_size=8)), CONFIG: json.dumps(config).encode()}
        reader = _reader(pipe, peft, _peft)
        kind = "peft exact" if exact else "peft"
        found += [Subject(kind, files, TENSORS, "", reader), Subject(f"{kind} config", files, CONFIG, "", reader)]
    own = {"a.safetensors": _settled(ours.read_bytes())}
    names = _keys(pipe, lambda n: f"unet.{n}", lambda n: f"text_encoder.{n}")
    found.append(Subject("ours", own, "a.safetensors", "a.safetensors", None))
    # As if written so: what a stranger could make, rather than an accident.
    again = Subject("ours sealed", own, "a.safetensors", "a.safetensors", _reader(pipe, names, _ours), _sealed_again)
    return [*found, again]


def _keys(pipe: Any, unet: Callable[[str], str], text: Callable[[str], str] | None) -> dict[str, Layer]:
    """The keys of all layers in one way to spell them."""
    spelling = {"unet": unet} | ({"text_encoder": text} if text else {})
    return {
        spell(name): (part, name)
        for part, spell in spelling.items()
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def _weight(pipe: Any, layer: Layer) -> Tensor:
    return getattr(pipe, layer[0]).get_submodule(layer[1]).weight.detach()


def _saved(written: algebra.Written) -> bytes:
    # Not by safetensors, which orders texts as it likes: a seed is to mean the same damage tomorrow.
    stored = {key: Entry("F32", (), b"").holding(t.numpy(), DTYPES[t.dtype]) for key, t in written.tensors.items()}
    return built(written.metadata, stored)


def _settled(data: bytes) -> bytes:
    """A file of ours as it would have been written on another day, every time the same."""
    texts, tensors = entries(data)
    told = json.loads(texts[HEADER_KEY]) | {"created": "2026-01-01T00:00:00+00:00"}
    return sealed(built(dict(sorted(texts.items())) | {HEADER_KEY: json.dumps(told, sort_keys=True)}, tensors))


def _sealed_again(data: bytes) -> bytes:
    try:
        return sealed(data) if data.count(SEAL_KEY.encode()) else data
    except AssertionError:  # its place is gone
        return data


Tool = Callable[[Tensor, Own, Mapping[str, Any]], Wanted]


def _reader(pipe: Any, keys: Mapping[str, Layer], tool: Tool) -> Callable[[Files], dict[Layer, Wanted]]:
    def read(files: Files) -> dict[Layer, Wanted]:
        data = next(data for name, data in files.items() if name.endswith(".safetensors"))
        told: Mapping[str, Any] = json.loads(files[CONFIG]) if CONFIG in files else entries(data)[0]
        tensors = tensors_of(data)
        found = {}
        for key, layer in keys.items():
            if own := algebra.of_layer(tensors, key):
                tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{key}.")}
                found[layer] = tool(_weight(pipe, layer), own, told)
        unknown = [name for name in tensors if not name.startswith("bundle_emb.")]
        assert not unknown, f"loaded, but {unknown[0]} is no layer's"
        return found

    return read


# -- tools -------------------------------------------------------------------------------------------------------------


def _input_side(weight: Tensor, packed: Tensor, sign: float) -> Tensor:
    blocks = weight[0].numel() // algebra.block_size_of(packed)
    return (sign * packed).expand(blocks, -1)


def _onetrainer(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    settings = {"coft_eps": 1e-4} | json.loads(texts.get("ot_config", "{}"))
    conv, packed = weight.dim() == 4, own["oft_R.weight"].double()
    if settings.get("oft_coft") and not conv:
        packed = algebra.project(packed, settings["coft_eps"])
    if "oft_R.scaled_oft" in own:
        packed = packed / onetrainer.divisor(algebra.block_size_of(packed))
    told = {"ot_config": json.dumps(settings)}
    return Wanted(
        _input_side(weight, packed, -1.0 if conv else 1.0),
        lambda: onetrainer.merged_weight_onetrainer(weight, own, told),
    )


def _sd_scripts(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    arguments, packed = json.loads(texts.get("ss_network_args", "{}")), own["oft_R.weight"].double()
    told = str(arguments.get("oft_coft", arguments.get("coft", "False")))
    if told.lower() in ("1", "true", "yes", "y", "on"):
        packed = algebra.project(packed, float(arguments.get("coft_eps", 6e-5)))
    arguments["oft_coft"] = told
    return Wanted(
        _input_side(weight, packed, -1.0 if weight.dim() == 4 else 1.0),
        lambda: sd_scripts.merged_weight_sd_scripts(weight, own, {"ss_network_args": json.dumps(arguments)}),
    )


def _musubi(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    packed = own["oft_R.weight"].double()
    if float(own["oft_coft_metadata"]):
        packed = algebra.project(packed, float(own["coft_eps_metadata"]))
    if float(own.get("scaled_oft_metadata", float("oft_R.scaled_oft" in own))):
        packed = packed / onetrainer.divisor(algebra.block_size_of(packed))
    return Wanted(
        _input_side(weight, packed, -1.0 if weight.dim() == 4 else 1.0),
        lambda: wild.merged_weight_musubi(weight, dict(own)),
    )


def _wan(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    packed = own["oft_rotation.weight" if "oft_rotation.weight" in own else "oft_R.weight"].double()
    if int(own["oft_coft_buffer"]):
        packed = algebra.project(packed, float(own["oft_coft_eps_buffer"]))
    series, conv = bool(int(own["oft_use_cayley_neumann_buffer"])), weight.dim() == 4
    return Wanted(
        _input_side(weight, packed, 1.0 if series != conv else -1.0), lambda: wild.merged_weight_wan(weight, dict(own))
    )


def _peft(weight: Tensor, own: Own, config: Mapping[str, Any]) -> Wanted:
    packed = own["oft_R.weight"].double()
    if config["coft"]:
        packed = algebra.project(packed, config["eps"])
    sign = 1.0 if config["use_cayley_neumann"] else -1.0
    return Wanted(_input_side(weight, packed, sign), lambda: peft_oft.merged_weight_peft(weight, own, config))


def _kohya(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    """`networks.oft`, and LyCORIS, which has a bound only where alpha is positive."""
    alpha = float(own.get("alpha", 0.0))
    always = texts.get("ss_network_module", "").startswith("networks.oft")
    blocks, scale = own["oft_blocks"].double(), own.get("rescale")
    q, limit = blocks - blocks.mT, alpha * weight.shape[0]
    if always or limit > 0:
        q = q * min(1.0, limit / max(float(q.norm()), 1e-12))
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    formula = kohya_oft.merged_weight_kohya_oft if always else lycoris_oft.merged_weight_lycoris
    return Wanted(q[:, rows, columns], lambda: formula(weight, own), None if scale is None else scale.flatten().float())


def _oft_diag(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    """The rotation itself, as rounded when it was stored, which ours is not."""
    stored = own["oft_diag"].double()
    rounding = float((stored @ stored.mT - torch.eye(stored.shape[1])).abs().max())
    return Wanted(None, lambda: lycoris_oft.merged_weight_oft_diag(weight, own), tolerance=2e-4 + 2 * rounding)


def _ours(weight: Tensor, own: Own, texts: Mapping[str, Any]) -> Wanted:
    packed = own["oft_R.weight"].double()
    return Wanted(packed, lambda: algebra.times(weight, algebra.cayley(algebra.skew(packed)).mT))
