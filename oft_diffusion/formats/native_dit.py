"""Names in native checkpoints of transformers, and of OpenCLIP as text encoder, as tables: a new kind is a new table.

A table's keys are pairs of block lists, the native one and the one of diffusers or transformers (one name where both
agree); `*` is a block's index, `$` that of the last block, "" is outside all lists. Under each stand native names with
the layers that lie in them, in the order of their rows. `~` marks a layer whose halves of rows have changed places
(native modulations are shift, then scale), `^` one whose native weight is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Table = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Leaf:
    """A layer as it lies in a native weight.

    Attributes:
        layer: its name in diffusers or transformers.
        rows: runs of rows of the native weight, `(start, length)` each, which make up the layer's rows in its own
            order; None where the native weight is the layer's, row for row. More than one only where halves have
            changed places.
        transposed: whether the native weight has the layer's rows as columns.
    """

    layer: str
    rows: tuple[tuple[int, int], ...] | None = None
    transposed: bool = False

    def take(self, native: Tensor) -> Tensor:
        """The layer's weight, or whatever else has one row per output, out of the native one."""
        whole = native.T if self.transposed else native
        if self.rows is None:
            return whole
        return torch.cat([whole[start : start + length] for start, length in self.rows])

    def put(self, native: Tensor, own: Tensor) -> None:
        """Write what `take` reads, in place."""
        whole = native.T if self.transposed else native
        first = 0
        for start, length in self.rows if self.rows is not None else ((0, len(whole)),):
            whole[start : start + length] = own[first : first + length]
            first += length


Native = dict[str, tuple[Leaf, ...]]  # a native name, and the layers in it


def native_names(class_name: str, layers: Mapping[str, int]) -> Native:
    """The native name of every layer that has one, from a transformer's table; empty for a class without.

    Args:
        class_name: the transformer's.
        layers: its layers' names, with the number of their outputs.
    """
    if class_name in SAME_NAMES:
        return {layer: (Leaf(layer),) for layer in layers}
    return expand(TABLES.get(class_name, {}), layers)


def expand(table: Table, layers: Mapping[str, int]) -> Native:
    """A table's rows for the blocks that a model has. Native weights of which a layer is missing are left out."""
    names: Native = {}
    for lists, rows in table.items():
        native_list, _, own_list = lists.partition(" ")
        own_list = own_list or native_list
        for index in _indices(own_list, layers):
            for native, own in rows.items():
                mark = own[0] if own[0] in "~^" else ""
                leaves = [_named(own_list, leaf, index) for leaf in own.removeprefix(mark).split()]
                if all(leaf in layers for leaf in leaves):
                    names[_named(native_list, native, index)] = _leaves(leaves, mark, layers)
    return names


def _indices(blocks: str, layers: Mapping[str, int]) -> list[int]:
    """The blocks that a list has: all for `*`, the last for `$`; one without a meaning outside all lists."""
    if not blocks:
        return [-1]
    pattern = re.compile(re.escape(blocks[:-1]) + r"(\d+)\.")
    found = sorted({int(match[1]) for match in map(pattern.match, layers) if match})
    return found[-1:] if blocks.endswith("$") else found


def _named(blocks: str, name: str, index: int) -> str:
    return f"{blocks[:-1]}{index}.{name}" if blocks else name


def _leaves(names: list[str], mark: str, layers: Mapping[str, int]) -> tuple[Leaf, ...]:
    if mark == "~":
        half = layers[names[0]] // 2
        return (Leaf(names[0], ((half, half), (0, half))),)
    if len(names) == 1:
        return (Leaf(names[0], transposed=mark == "^"),)
    leaves, start = [], 0
    for name in names:
        leaves.append(Leaf(name, ((start, layers[name]),)))
        start += layers[name]
    return tuple(leaves)


# -- transformers -----------------------------------------------------------------------------------------------------


def _linears(native: str, natives: str, own: str) -> dict[str, str]:
    """`_linears("time_in", "in_layer out_layer", "x")` is `time_in.in_layer` for `x.linear_1`, and so on."""
    return {f"{native}.{name}": f"{own}.linear_{number}" for number, name in enumerate(natives.split(), 1)}


_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_IN_OUT = "in_layer out_layer"

_DOUBLE, _SINGLE = "double_blocks.* transformer_blocks.*", "single_blocks.* single_transformer_blocks.*"
_ENDS = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
_DOUBLE_ATTENTION = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": _ADDED_QKV,
    "txt_attn.proj": "attn.to_add_out",
}
_DOUBLE_MLP = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_LINEAR12 = {"linear1": f"{_QKV} proj_mlp", "linear2": "proj_out"}

_FLUX: Table = {
    "": {
        **_ENDS,
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
        **_linears("time_in", _IN_OUT, "time_text_embed.timestep_embedder"),
        **_linears("vector_in", _IN_OUT, "time_text_embed.text_embedder"),
        **_linears("guidance_in", _IN_OUT, "time_text_embed.guidance_embedder"),
    },
    _DOUBLE: {
        **_DOUBLE_ATTENTION,
        **_DOUBLE_MLP,
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
    },
    _SINGLE: {**_LINEAR12, "modulation.lin": "norm.linear"},
}
_CHROMA: Table = {
    "": {
        **_ENDS,
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    },
    "distilled_guidance_layer.layers.*": {"in_layer": "linear_1", "out_layer": "linear_2"},
    _DOUBLE: {**_DOUBLE_ATTENTION, **_DOUBLE_MLP},
    _SINGLE: _LINEAR12,
}
_FLUX2: Table = {
    "": {
        **_ENDS,
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
        **_linears("time_in", _IN_OUT, "time_guidance_embed.timestep_embedder"),
        **_linears("guidance_in", _IN_OUT, "time_guidance_embed.guidance_embedder"),
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    _DOUBLE: {
        **_DOUBLE_ATTENTION,
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    },
    _SINGLE: {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
}
_SD3: Table = {
    "": {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        **_linears("t_embedder.mlp", "0 2", "time_text_embed.timestep_embedder"),
        **_linears("y_embedder.mlp", "0 2", "time_text_embed.text_embedder"),
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "~norm_out.linear",
    },
    "joint_blocks.* transformer_blocks.*": {
        "x_block.attn.qkv": _QKV,
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.qkv": _ADDED_QKV,
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    },
    # There the text's modulation has scale and shift alone, so that they change places.
    "joint_blocks.$ transformer_blocks.$": {"context_block.adaLN_modulation.1": "~norm1_context.linear"},
}
_SANA: Table = {
    "": {
        "x_embedder.proj": "patch_embed.proj",
        **_linears("t_embedder.mlp", "0 2", "time_embed.emb.timestep_embedder"),
        "t_block.1": "time_embed.linear",
        **_linears("y_embedder.y_proj", "fc1 fc2", "caption_projection"),
        "final_layer.linear": "proj_out",
    },
    "blocks.* transformer_blocks.*": {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.inverted_conv.conv": "ff.conv_inverted",
        "mlp.depth_conv.conv": "ff.conv_depth",
        "mlp.point_conv.conv": "ff.conv_point",
    },
}

_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")},
}
_Z_IMAGE: Table = {
    "": {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    },
    "noise_refiner.*": _Z_IMAGE_BLOCK,
    "context_refiner.*": _Z_IMAGE_BLOCK,
    "layers.*": _Z_IMAGE_BLOCK,
}

_LUMINA2_BLOCK = {
    "attention.qkv": _QKV,
    "attention.out": "attn.to_out.0",
    **_linears("feed_forward", "w1 w2 w3", "feed_forward"),
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA2: Table = {
    "": {
        "x_embedder": "x_embedder",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        **_linears("t_embedder.mlp", "0 2", "time_caption_embed.timestep_embedder"),
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    "noise_refiner.*": _LUMINA2_BLOCK,
    "context_refiner.*": _LUMINA2_BLOCK,
    "layers.*": _LUMINA2_BLOCK,
}

_WAN_BLOCK = {
    **{f"self_attn.{native}": f"attn1.to_{native}" for native in "qkv"},
    **{f"cross_attn.{native}": f"attn2.to_{native}" for native in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_WAN: Table = {
    "": {
        "patch_embedding": "patch_embedding",
        "vace_patch_embedding": "vace_patch_embedding",
        **_linears("time_embedding", "0 2", "condition_embedder.time_embedder"),
        **_linears("text_embedding", "0 2", "condition_embedder.text_embedder"),
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
    },
    "blocks.*": _WAN_BLOCK,
    "vace_blocks.*": {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"},
}

TABLES: Mapping[str, Table] = {
    "ChromaTransformer2DModel": _CHROMA,
    "ChronoEditTransformer3DModel": _WAN,
    "Flux2Transformer2DModel": _FLUX2,
    "FluxTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": _LUMINA2,
    "SD3Transformer2DModel": _SD3,
    "SanaTransformer2DModel": _SANA,
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
# Their native checkpoints have the names of diffusers.
SAME_NAMES = frozenset({"QwenImageTransformer2DModel"})
# Their adapters, too, whatever native checkpoints are like: tools train them on diffusers' own models.
SPLIT_ADAPTERS = frozenset({"SanaTransformer2DModel", "ZImageTransformer2DModel"})

# -- text encoders ----------------------------------------------------------------------------------------------------

# OpenCLIP's, with the names of tensors, which do not all end in `.weight`; layers without `text_model.`.
OPEN_CLIP: Table = {
    "": {"text_projection": "^text_projection"},
    "transformer.resblocks.* encoder.layers.*": {
        "attn.in_proj_weight": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attn.out_proj.weight": "self_attn.out_proj",
        "mlp.c_fc.weight": "mlp.fc1",
        "mlp.c_proj.weight": "mlp.fc2",
    },
}
