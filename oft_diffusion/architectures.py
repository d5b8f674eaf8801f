"""Which layers each architecture's target sets mean, as data: a new architecture is a new row.

A row names lists of repeated blocks, and layers within one block. `*` is an index. Nothing outside the lists is ever
adapted: not the final projection, timestep and caption embedders, token refiners, vision towers or the language head;
and inside them not the modulation (adaLN), routers, experts' tensors, nor depthwise convolutions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TARGET_SETS = ("attention", "attention+mlp", "all-linear", "all-linear+conv")


@dataclass(frozen=True)
class Architecture:
    """One row: lists of blocks, and what in a block each set adds to the one before it.

    Attributes:
        blocks: the lists of repeated blocks, as module names.
        attention, mlp, other: linear layers within a block; `attention+mlp` is the first two, `all-linear` all three.
        conv: convolutions within a block, which `all-linear+conv` adds. A layer that is one or the other by a model's
            configuration is in `other` alone.
        idle: layers of the *last* block whose output the model throws away. They could not learn.
    """

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def layers(self, target_set: str) -> tuple[str, ...]:
        """What the set adapts within one block."""
        groups = (self.attention, self.mlp, self.other, self.conv)[: TARGET_SETS.index(target_set) + 1]
        return tuple(layer for group in groups for layer in group)

    def pattern(self, target_set: str) -> str:
        """A regular expression over whole layer names."""
        return rf"{_any_of(self.blocks)}\.\d+\.{_any_of(self.layers(target_set))}"

    def block_of(self, name: str) -> tuple[str, int] | None:
        """The list and the index of the block that a layer is in, or None."""
        match = re.match(rf"({_any_of(self.blocks)})\.(\d+)\.", name)
        return (match[1], int(match[2])) if match else None

    def is_idle(self, layer: str) -> bool:
        """Whether a layer, named within its block, is idle where that block is the last."""
        return bool(self.idle) and re.fullmatch(_any_of(self.idle), layer) is not None


def _any_of(names: tuple[str, ...]) -> str:
    return "(?:" + "|".join(re.escape(name).replace(r"\*", r"\d+") for name in names) + ")"


def row(blocks: str, attention: str, mlp: str = "", other: str = "", conv: str = "", idle: str = "") -> Architecture:
    """An `Architecture` whose every part is names with spaces between them."""
    return Architecture(*(tuple(part.split()) for part in (blocks, attention, mlp, other, conv, idle)))


def within(parents: str, layers: str) -> str:
    """`within("attn1 attn2", "to_q to_k")` is "attn1.to_q attn1.to_k attn2.to_q attn2.to_k"."""
    return " ".join(f"{parent}.{layer}" for parent in parents.split() for layer in layers.split())


# -- parts that many rows share ---------------------------------------------------------------------------------------

_QKV = "to_q to_k to_v"
_QKVO = f"{_QKV} to_out.0"
_ADDED = "add_q_proj add_k_proj add_v_proj to_add_out"  # the second stream of a joint attention, mostly text
_JOINT = f"{_QKVO} {_ADDED}"
_FF = "net.0.proj net.2"
_GATED = "gate_proj up_proj down_proj"
_W123 = "w1 w2 w3"
_QUERY = "to_query to_key to_value out_layer"

_ATTN1, _ATTN12 = within("attn1", _QKVO), within("attn1 attn2", _QKVO)
_FEED_FORWARD = within("ff", _FF)
_IMAGE_TEXT_MLP = within("img_mlp txt_mlp", _FF)

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"

# PixArt's kind: self-attention, cross-attention, MLP.
_CROSS = row(_DOUBLE, _ATTN12, _FEED_FORWARD)
# CogView's kind: one self-attention over text and picture together.
_PLAIN = row(_DOUBLE, _ATTN1, _FEED_FORWARD)
# Flux's kind: two streams, then one whose output projection serves attention and MLP at once.
_FLUX = row(f"{_DOUBLE} {_SINGLE}", within("attn", _JOINT), f"{within('ff ff_context', _FF)} proj_mlp proj_out")
# SD 3's kind: two streams to the end, where the text's is thrown away.
_SD3 = row(
    _DOUBLE,
    f"{within('attn', _JOINT)} {within('attn2', _QKVO)}",
    within("ff ff_context", _FF),
    idle=f"attn.add_q_proj attn.to_add_out {within('ff_context', _FF)}",
)
# Wan's kind; image-to-video models have the added keys and values.
_WAN = row("blocks", f"{_ATTN12} {within('attn2', 'add_k_proj add_v_proj')}", within("ffn", _FF))
_LTX2 = row(
    _DOUBLE,
    within(
        "attn1 attn2 audio_attn1 audio_attn2 audio_to_video_attn video_to_audio_attn",
        f"{_QKVO} to_gate_logits",
    ),
    within("ff audio_ff", _FF),
)
_JOY = row(
    "double_blocks",
    within("attn", "img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj"),
    _IMAGE_TEXT_MLP,
    idle=f"attn.txt_attn_proj {within('txt_mlp', _FF)}",
)
# Z-Image's kind; its `context_refiner` sees the text alone, and is left out as all token refiners are.
_Z_IMAGE = row("noise_refiner layers", within("attention", _QKVO), within("feed_forward", _W123))


# Convolutions of UNets' residual blocks, down- and upsamplers: SD's, Stable Video Diffusion's, DreamLite's.
_RESNET = (
    f"conv {within('conv1 conv2', 'pointwise')} conv1 conv2 conv_shortcut "
    f"{within('spatial_res_block', 'conv1 conv2 conv_shortcut')}"
)


def _unet(*lists: str, added: str = "") -> Architecture:
    """UNets: lists of transformers in every resolution, or of attentions without a transformer around them."""
    lists = (*lists, "resnets", "downsamplers", "upsamplers")  # the last three have convolutions alone
    places = " ".join(f"{level}.{name}" for name in lists for level in ("down_blocks.*", "mid_block", "up_blocks.*"))
    inner = "transformer_blocks.* temporal_transformer_blocks.* transformers.*.transformer_blocks.*"
    return row(
        f"{places} {added}",
        f"{within(inner, _ATTN12)} {_QKVO} add_k_proj add_v_proj",
        within(inner, f"{_FEED_FORWARD} {within('ff_in', _FF)}"),
        "proj_in proj_out",  # linear in SD 2.x and SDXL, 1x1 convolutions in SD 1.x
        _RESNET,
    )


# A video UNet's input transformer: the list is its blocks, so that its own proj_in and proj_out stay outside.
_TRANSFORMER_IN = "transformer_in.transformer_blocks"


def _video_unet() -> Architecture:
    own = _unet("attentions", "temp_attentions", added=_TRANSFORMER_IN)
    return replace(own, attention=(*own.attention, *_ATTN12.split()), mlp=(*own.mlp, *_FEED_FORWARD.split()))


DENOISERS: dict[str, Architecture] = {
    # Pictures.
    "AuraFlowTransformer2DModel": row(
        "joint_transformer_blocks single_transformer_blocks",
        within("attn", _JOINT),
        within("ff ff_context", "linear_1 linear_2 out_projection"),
    ),
    "BriaFibo2Transformer2DModel": row(
        "noise_refiner layers",
        within("attention cross_attention", _QKVO),
        within("feed_forward", _W123),
    ),
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "CogView3PlusTransformer2DModel": _PLAIN,
    "CogView4Transformer2DModel": _PLAIN,
    "DiTTransformer2DModel": _PLAIN,
    "DreamLiteTransformer2DModel": _CROSS,
    "DreamLiteUNetModel": _unet("attentions"),
    "ErnieImageTransformer2DModel": row(
        "layers", within("self_attention", _QKVO), within("mlp", "gate_proj up_proj linear_fc2")
    ),
    "Flux2Transformer2DModel": row(
        f"{_DOUBLE} {_SINGLE}",
        within("attn", f"{_JOINT} to_qkv_mlp_proj to_out"),  # fused in the single blocks: one linear, one rotation
        within("ff ff_context", "linear_in linear_out"),
    ),
    "Flux3Transformer2DModel": row(
        f"mode_blocks.image {_SINGLE}",  # the others see the text, or reference pictures, alone
        within("attn", _QKVO),
        within("ff", "linear_in linear_out"),
    ),
    "FluxTransformer2DModel": _FLUX,
    "GlmImageTransformer2DModel": _PLAIN,
    "HiDreamImageTransformer2DModel": row(
        "double_stream_blocks single_stream_blocks",
        within("block.attn1", f"{_QKV} to_out to_q_t to_k_t to_v_t to_out_t"),
        within("block.ff_i.shared_experts block.ff_i block.ff_t", _W123),
    ),
    "HunyuanDiT2DModel": row("blocks", _ATTN12, _FEED_FORWARD, "skip_linear"),
    "HunyuanImageTransformer2DModel": _FLUX,
    "Ideogram4Transformer2DModel": row("layers", within("attention", _QKVO), within("feed_forward", _W123)),
    "JoyImageEditPlusTransformer3DModel": _JOY,
    "JoyImageEditTransformer3DModel": _JOY,
    "Kandinsky3UNet": row(
        within("down_blocks.* up_blocks.*", "attentions resnets_in resnets_out"),
        within("attention", _QKVO),
        conv="feed_forward.* resnet_blocks.*.projection resnet_blocks.*.down_sample shortcut_projection "
        "shortcut_down_sample",
    ),
    "Krea2Transformer2DModel": row(_DOUBLE, within("attn", f"{_QKVO} to_gate"), within("ff", "gate up down")),
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": row(
        "noise_refiner layers", within("attn", _QKVO), within("feed_forward", "linear_1 linear_2 linear_3")
    ),
    "LuminaNextDiT2DModel": row("layers", _ATTN12, within("feed_forward", "linear_1 linear_2 linear_3")),
    "NucleusMoEImageTransformer2DModel": row(
        _DOUBLE,
        within("attn", f"{_QKVO} add_k_proj add_v_proj"),
        within("img_mlp img_mlp.shared_expert", _FF),
        "encoder_proj",
    ),
    "OmniGenTransformer2DModel": row("layers", within("self_attn", _QKVO), within("mlp", "gate_up_proj down_proj")),
    "OvisImageTransformer2DModel": _FLUX,
    "PRXTransformer2DModel": row("blocks", within("attention", "img_qkv_proj txt_kv_proj to_out.0"), _GATED),
    "PixArtTransformer2DModel": _CROSS,
    "PriorTransformer": _PLAIN,
    "QwenImage21Transformer2DModel": row(_DOUBLE, within("attn", _QKVO), within("img_mlp", "proj out gate_layer")),
    "QwenImageTransformer2DModel": row(
        _DOUBLE,
        within("attn", _JOINT),
        _IMAGE_TEXT_MLP,
        idle=f"attn.add_q_proj attn.to_add_out {within('txt_mlp', _FF)}",
    ),
    "SD3Transformer2DModel": _SD3,
    "SanaTransformer2DModel": row(_DOUBLE, _ATTN12, conv=within("ff", "conv_inverted conv_point")),
    "StableCascadeUNet": row(
        "down_blocks.* up_blocks.*", within("attention", _QKVO), "channelwise.0 channelwise.4", "kv_mapper.1"
    ),
    "Transformer2DModel": _CROSS,
    "UNet2DConditionModel": _unet("attentions"),
    "UNet2DModel": _unet("attentions"),
    "UVit2DModel": row(
        "transformer_layers down_block.attention_blocks up_block.attention_blocks", _ATTN12, _FEED_FORWARD, "kv_mapper"
    ),
    "ZImageTransformer2DModel": _Z_IMAGE,
    # Video.
    "AllegroTransformer3DModel": _CROSS,
    "AnyFlowFARTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": _PLAIN,
    "ConsisIDTransformer3DModel": _PLAIN,
    "Cosmos3OmniTransformer": row(
        "layers",
        within("self_attn", f"{_QKV} to_out {_ADDED}"),
        within("mlp mlp_moe_gen", _GATED),  # dense in spite of its name: the understanding and the generating half
        idle=f"self_attn.to_q self_attn.to_out {within('mlp', _GATED)}",
    ),
    "CosmosTransformer3DModel": row(
        _DOUBLE, f"{_ATTN12} {within('attn2', 'q_img k_img v_img to_out_img.0')}", _FEED_FORWARD
    ),
    "EasyAnimateTransformer3DModel": row(
        _DOUBLE,
        within("attn1", _JOINT),
        within("ff txt_ff", _FF),
        idle=f"attn1.add_q_proj attn1.to_add_out {within('txt_ff', _FF)}",
    ),
    "HeliosTransformer3DModel": _WAN,
    "HunyuanVideo15Transformer3DModel": _SD3,
    "HunyuanVideoFramepackTransformer3DModel": _FLUX,
    "HunyuanVideoTransformer3DModel": _FLUX,
    "I2VGenXLUNet": _video_unet(),
    "Kandinsky5Transformer3DModel": row(
        "visual_transformer_blocks",
        within("self_attention cross_attention", _QUERY),
        within("feed_forward", "in_layer out_layer"),
    ),
    "Kandinsky6SRTransformer3DModel": row(
        "visual_transformer_blocks", within("self_attention", _QUERY), within("feed_forward", _FF)
    ),
    "Kandinsky6Transformer3DModel": row(
        "visual_transformer_blocks",
        f"{within(within('video_dec_block audio_dec_block', 'self_attention cross_attention'), _QUERY)} "
        f"{within('va_cross_attention av_cross_attention', _QUERY)}",
        within("video_dec_block.feed_forward audio_dec_block.feed_forward", _FF),
    ),
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": _CROSS,
    "LatteTransformer3DModel": row(f"{_DOUBLE} temporal_transformer_blocks", _ATTN12, _FEED_FORWARD),
    "MiniMaxH3Transformer3DModel": row(_DOUBLE, within("attn", _QKVO), _FEED_FORWARD),
    "MochiTransformer3DModel": row(
        _DOUBLE, within("attn1", _JOINT), within("ff ff_context", _FF), idle="attn1.add_q_proj"
    ),
    "MotifVideoTransformer3DModel": replace(_FLUX, attention=(*_FLUX.attention, *within("cross_attn", _QKVO).split())),
    "SanaVideoTransformer3DModel": row(_DOUBLE, _ATTN12, conv=within("ff", "conv_inverted conv_point conv_temp")),
    "SanaWMLTX2RefinerTransformer3DModel": _LTX2,
    "SanaWMTransformer3DModel": row(
        "blocks",
        f"{within('attn', 'qkv proj q_proj_cam k_proj_cam v_proj_cam out_proj_cam beta_proj gate_proj output_gate')} "
        f"{within('cross_attn', 'q_linear kv_linear proj')}",
        other="plucker_proj",
        conv=within("mlp", "inverted_conv.conv point_conv.conv t_conv"),
    ),
    "SkyReelsV2Transformer3DModel": _WAN,
    "TransformerTemporalModel": _CROSS,
    "UNet3DConditionModel": _video_unet(),
    "UNetMotionModel": _unet("attentions", "motion_modules"),
    "UNetSpatioTemporalConditionModel": _unet("attentions"),
    "WanAnimate2Transformer3DModel": row(
        "blocks",
        f"{within('self_attn cross_attn', _QKVO)} {within('cross_attn', 'add_k_proj add_v_proj')}",
        within("ffn", "0 2"),
    ),
    "WanAnimateTransformer3DModel": row(
        "blocks face_adapter",
        f"{_ATTN12} {within('attn2', 'add_k_proj add_v_proj')} {_QKV} to_out",
        within("ffn", _FF),
    ),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": replace(_WAN, blocks=("blocks", "vace_blocks"), other=("proj_in", "proj_out")),
    # Sound.
    "AudioLDM2UNet2DConditionModel": _unet("attentions"),
    "AceStepTransformer1DModel": row("layers", within("self_attn cross_attn", _QKVO), within("mlp", _GATED)),
    "LongCatAudioDiTTransformer": row("blocks", within("self_attn cross_attn", _QKVO), within("ffn.ff", "0 3")),
    "MiniMaxMusic3Transformer1DModel": row(_DOUBLE, within("attn", _QKVO), "ff_in ff_out"),
    "StableAudio3DiTModel": row(
        _DOUBLE, within("self_attn cross_attn", "to_qkv to_q to_kv to_out"), within("ff", "proj_in proj_out")
    ),
    "StableAudioDiTModel": _CROSS,
    "T5FilmDecoder": row(
        "decoders", within("layer.*.attention", _QKVO), within("layer.*.DenseReluDense", "wi_0 wi_1 wo")
    ),
    "UNet1DModel": row(
        "down_blocks.*.attentions mid_block.attentions up_blocks.*.attentions", "query key value proj_attn"
    ),
}
