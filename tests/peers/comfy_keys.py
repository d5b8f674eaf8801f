"""Stock ComfyUI's key maps (a125cd84, 2025-10; Z-Image's as of 2026): which weight a key of a file changes, and where.

The maps are those of its `model_lora_keys_unet` and `model_lora_keys_clip`, told by the layers' names in diffusers. A
key that is not in them is left out with a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.single_files import unet_name

Layer = tuple[str, str]  # component, and the layer's name in diffusers or transformers


class Place(NamedTuple):
    """Where a key's patch goes.

    Attributes:
        weight: the native one, with its component before it.
        rows: where the layer begins in it, and how many rows it has; None for the whole.
        swapped: whether ComfyUI exchanges the halves of what it adds: modulations are shift, then scale there, and the
            other way round in diffusers.
    """

    weight: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


# Native weights, with the layers that lie in them one below the other; `*` is a block's index, `~` marks swapped ones.
_MMDIT = {
    "context_embedder": "context_embedder", "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "~norm_out.linear", "final_layer.linear": "proj_out",
}  # fmt: skip
_MMDIT_BLOCK = {
    "context_block.adaLN_modulation.1": "norm1_context.linear", "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.adaLN_modulation.1": "norm1.linear", "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0", "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v", "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
}  # fmt: skip
_FLUX = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
    **{
        f"{native}.{layer}": f"time_text_embed.{own}.linear_{number}"
        for native, own in
        (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}  # fmt: skip
_FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0", "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out",
    "txt_mod.lin": "norm1_context.linear", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear", "linear2": "proj_out", "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
}  # fmt: skip
# Native names of what the diffusers map of Flux lacks; there are no other keys for these.
_CHROMA = {
    f"distilled_guidance_layer.{native}": f"distilled_guidance_layer.{own}"
    for native, own in (("in_proj", "in_proj"), ("out_proj", "out_proj"),
                        *((f"layers.{i}.{a}", f"layers.{i}.{b}") for i in range(5)
                          for a, b in (("in_layer", "linear_1"), ("out_layer", "linear_2"))))
}  # fmt: skip
_PIXART = {
    "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    **{
        f"{native}.mlp.{number}": f"adaln_single.emb.{own}_embedder.linear_{1 + number // 2}"
        for native, own in
        (("t_embedder", "timestep"), ("csize_embedder", "resolution"), ("ar_embedder", "aspect_ratio"))
        for number in (0, 2)
    },
}  # fmt: skip
_PIXART_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2", "cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
}  # fmt: skip
_WAN = {
    "patch_embedding": "patch_embedding", "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    **{
        f"{kind}_embedding.{number}": f"condition_embedder.{kind}_embedder.linear_{1 + number // 2}"
        for kind in ("time", "text")
        for number in (0, 2)
    },
}  # fmt: skip
_WAN_BLOCK = {
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    **{f"{native}.{x}": f"{own}.to_{x if x != 'o' else 'out.0'}"
       for native, own in (("self_attn", "attn1"), ("cross_attn", "attn2")) for x in "qkvo"},
}  # fmt: skip
_FLUX2 = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
    **{f"{kind}_in.{layer}_layer": f"time_guidance_embed.{own}_embedder.linear_{number}"
       for kind, own in (("time", "timestep"), ("guidance", "guidance")) for number, layer in ((1, "in"), (2, "out"))},
    **{f"{kind}.lin": f"{kind}.linear" for kind in
       ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")},
}  # fmt: skip
_FLUX2_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v", "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}  # fmt: skip
_FLUX2_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_LUMINA = {
    "x_embedder": "x_embedder", "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
}  # fmt: skip
_LUMINA_BLOCK = {
    "attention.qkv": "attn.to_q attn.to_k attn.to_v", "attention.out": "attn.to_out.0",
    "adaLN_modulation.1": "norm1.linear", **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
}  # fmt: skip
_Z_IMAGE = {
    "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
}  # fmt: skip
_Z_IMAGE_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v", "attention.out": "attention.to_out.0",
    "adaLN_modulation.0": "adaLN_modulation.0", **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
}  # fmt: skip

_Rows = Mapping[str, str]
_BLOCKS = ("noise_refiner", "context_refiner", "layers")
_TABLES: dict[str, dict[tuple[str, str], _Rows]] = {  # by native and diffusers' list of blocks
    "SD3Transformer2DModel": {("", ""): _MMDIT, ("joint_blocks", "transformer_blocks"): _MMDIT_BLOCK},
    "FluxTransformer2DModel": {
        ("", ""): _FLUX, ("double_blocks", "transformer_blocks"): _FLUX_DOUBLE,
        ("single_blocks", "single_transformer_blocks"): _FLUX_SINGLE,
    },
    "PixArtTransformer2DModel": {("", ""): _PIXART, ("blocks", "transformer_blocks"): _PIXART_BLOCK},
    "WanTransformer3DModel": {("", ""): _WAN, ("blocks", "blocks"): _WAN_BLOCK},
    "Flux2Transformer2DModel": {
        ("", ""): _FLUX2, ("double_blocks", "transformer_blocks"): _FLUX2_DOUBLE,
        ("single_blocks", "single_transformer_blocks"): _FLUX2_SINGLE,
    },
    "Lumina2Transformer2DModel": {("", ""): _LUMINA, **{(name, name): _LUMINA_BLOCK for name in _BLOCKS}},
    "ZImageTransformer2DModel": {("", ""): _Z_IMAGE, **{(name, name): _Z_IMAGE_BLOCK for name in _BLOCKS}},
}  # fmt: skip
_TABLES["ChromaTransformer2DModel"] = {**_TABLES["FluxTransformer2DModel"], ("", ""): {**_FLUX, **_CHROMA}}
_SAME_NAMES = ("QwenImageTransformer2DModel", "HiDreamImageTransformer2DModel")

# What may stand before diffusers' names: dotted, and flat.
_DIFFUSERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SD3Transformer2DModel": (("transformer.", "base_model.model."), ("lora_transformer_", "lycoris_")),
    "FluxTransformer2DModel": (("transformer.", ""), ("lora_transformer_", "lycoris_")),
    "PixArtTransformer2DModel": (("transformer.", "base_model.model.", "unet.base_model.model."), ()),
    "QwenImageTransformer2DModel": (("transformer.", ""), ("lycoris_",)),
    "HiDreamImageTransformer2DModel": (("transformer.",), ("lycoris_",)),
    "ZImageTransformer2DModel": (("transformer.", "diffusion_model.", ""), ("lycoris_",)),
    "UNet2DConditionModel": ((), ("lora_unet_", "lycoris_")),
}
_DIFFUSERS["ChromaTransformer2DModel"] = _DIFFUSERS["FluxTransformer2DModel"]
_CLIPS = {  # the names of its text encoders
    "FluxTransformer2DModel": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "ChromaTransformer2DModel": {"text_encoder": "t5xxl"},
    "PixArtTransformer2DModel": {"text_encoder": "t5xxl"},
    "SD3Transformer2DModel": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}
_CLIP_LAYERS = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("k", "q", "v", "out")))


class KeyMap:
    """A pipeline as ComfyUI knows it.

    Attributes:
        places: where each layer lies.
        keys: what each key of a file changes.
    """

    def __init__(self, pipe: Any) -> None:
        self._layers = {
            (part, name): layer
            for part, module in pipe.components.items()
            if isinstance(module, nn.Module)
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d))
        }
        self.places: dict[Layer, Place] = {}
        self.keys: dict[str, Place] = {}
        denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
        self._add_denoiser(denoiser, getattr(pipe, denoiser))
        self._add_clips(pipe, type(getattr(pipe, denoiser)).__name__)

    def native(self, weights: Mapping[Layer, Tensor]) -> dict[str, Tensor]:
        """The native weights that diffusers' make up, in float64."""
        found: dict[str, Tensor] = {}
        for layer, place in self.places.items():
            weight = weights[layer].detach().double()
            weight = _swap(weight) if place.swapped else weight
            if place.rows is None:
                found[place.weight] = weight.clone()
                continue
            start, count = place.rows
            rows = max(sum(p.rows) for p in self.places.values() if p.weight == place.weight and p.rows)
            found.setdefault(place.weight, weight.new_zeros(rows, *weight.shape[1:]))[start : start + count] = weight
        return found

    def patched(self, native: Mapping[str, Tensor], tensors: Mapping[str, Tensor], reader: Any) -> dict[str, Tensor]:
        """The native weights with a file's patches.

        Raises:
            KeyError: ComfyUI does not know a key.
        """
        found = {name: weight.clone() for name, weight in native.items()}
        by_key: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            key, suffix = _split(name)
            by_key.setdefault(key, {})[suffix] = tensor
        for key, own in by_key.items():
            place = self.keys[key]
            start, count = place.rows or (0, len(native[place.weight]))
            before = native[place.weight][start : start + count]
            change = reader(before, own) - before
            found[place.weight][start : start + count] += _swap(change) if place.swapped else change
        return found

    def _add_denoiser(self, part: str, model: nn.Module) -> None:
        family = type(model).__name__
        own = {name: layer for (component, name), layer in self._layers.items() if component == part}
        for name, place in _places(family, model, own):
            self.places[part, name] = place
            native = place.weight.removeprefix("diffusion_model.")
            self.keys[f"lora_unet_{native.replace('.', '_')}"] = Place(place.weight)
            self.keys[place.weight] = Place(place.weight)
        dotted, flat = _DIFFUSERS.get(family, ((), ()))
        for name in own:
            if family == "ChromaTransformer2DModel" and name.startswith("distilled"):
                continue
            place = self.places[part, name]
            self.keys |= {prefix + name: place for prefix in dotted}
            self.keys |= {prefix + name.replace(".", "_"): place for prefix in flat}

    def _add_clips(self, pipe: Any, family: str) -> None:
        clips = _CLIPS.get(family, {})
        if family == "UNet2DConditionModel":
            alone = pipe.text_encoder is None  # the refiner of SDXL
            first = "clip_h" if not alone and pipe.text_encoder.config.hidden_act == "gelu" else "clip_l"
            clips = {**({} if alone else {"text_encoder": first}), "text_encoder_2": "clip_g"}
        names = list(clips.values())
        for part, clip in clips.items():
            for component, layer in self._layers:
                if component == part:
                    self._add_clip(part, clip, layer, names)

    def _add_clip(self, part: str, clip: str, layer: str, names: list[str]) -> None:
        bare = layer.removeprefix("text_model.")
        inside = bare if clip == "t5xxl" or bare == "text_projection" else f"text_model.{bare}"
        place = Place(f"{clip}.transformer.{inside}")
        self.places[part, layer] = place
        self.keys[f"text_encoders.{place.weight}"] = place
        flat = inside.replace(".", "_")
        if clip == "t5xxl":
            number = 1 + ("clip_g" in names) + ("clip_l" in names)
            numbers = (2, 3) if number == 2 else (number,)
            self.keys |= {f"lora_te{n}_{flat}": place for n in numbers}
        elif bare == "text_projection":
            self.keys[f"lora_te{2 if clip == 'clip_g' else 1}_text_projection"] = place
        elif bare.endswith(_CLIP_LAYERS):
            alone = clip == "clip_g" and "clip_l" not in names
            te = ("te",) if alone else ("te2",) if clip == "clip_g" else ("te", "te1")
            dotted = "text_encoder_2" if clip == "clip_g" and not alone else "text_encoder"
            self.keys |= {f"lora_{prefix}_{flat}": place for prefix in te} | {f"{dotted}.{inside}": place}


def _places(family: str, model: nn.Module, layers: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """Every layer of a denoiser, and where it lies."""
    if family == "UNet2DConditionModel" or family in _SAME_NAMES:
        for name in layers:
            native = unet_name(f"{name}.weight", model).removesuffix(".weight") if "UNet" in family else name
            yield name, Place(f"diffusion_model.{native}")
        return
    last = max((int(name.split(".")[1]) for name in layers if name.startswith("transformer_blocks.")), default=0)
    for (theirs, ours), rows in _TABLES.get(family, {}).items():
        for index in sorted({name.split(".")[1] for name in layers if name.startswith(f"{ours}.")}) if ours else [""]:
            for native, told in rows.items():
                swapped = told.startswith("~") or (
                    family == "SD3Transformer2DModel"
                    and told == "norm1_context.linear"
                    and (ours, index) == ("transformer_blocks", str(last))
                )
                names = [f"{ours}.{index}.{name}" if ours else name for name in told.lstrip("~").split()]
                if names[0] not in layers:
                    continue
                weight = f"diffusion_model.{f'{theirs}.{index}.' if theirs else ''}{native}"
                start = 0
                for name in names:
                    count = len(layers[name].weight)
                    yield name, Place(weight, (start, count) if len(names) > 1 else None, swapped)
                    start += count


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as its key and what follows."""
    for suffix in ("diff", "alpha", "oft_R.weight", *(f"{x}.weight" for x in
                   ("lora_up", "lora_down", "lora_A", "lora_B", "a1", "a2", "b1", "b2"))):  # fmt: skip
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    raise KeyError(name)
