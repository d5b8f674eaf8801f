"""Small random pipelines of every family that can be trained, from the real classes.

Sizes are the smallest that the classes take: 16 px pictures, VAEs that halve them once or twice, two layers where that
is enough. Text encoders of which a pipeline takes a certain layer have that many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_sd import MAX_TOKENS, RESOLUTION, tiny_pipeline, tiny_tokenizer

WIDTH = 32  # of every text encoder
_CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)


def tiny_family(name: str, folder: Path, seed: int = 0) -> Any:
    """A random pipeline of the class `name`, in float32; tokenizer files are written below `folder`."""
    torch.manual_seed(seed)
    return BUILDERS[name](folder)


def kind_of(name: str) -> str:
    """The pipeline class of an entry of `BUILDERS`: what stands before a variant's name."""
    return name.partition(" ")[0]


def side_of(name: str) -> int:
    """Pixels per side of a picture for a tiny pipeline: Sana's wants a multiple of 32."""
    return 2 * RESOLUTION if name == "SanaPipeline" else RESOLUTION


def write_tiny_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write `tiny_family` as `folder/name`, in diffusers' format."""
    tiny_family(name, folder, seed).save_pretrained(folder / name)
    return folder / name


# -- parts -------------------------------------------------------------------------------------------------------------


def bytes_tokenizer(most: int = 512) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per byte and a chat template, in place of Qwen's, Gemma's and Llama's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<s>", "<unk>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        model_max_length=most, padding_side="right", chat_template=_CHAT,
    )  # fmt: skip


def t5_tokenizer() -> Any:
    """T5's own kind of tokenizer, with one token per printable ASCII character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


_VOCABULARY = 4 + 256
_DECODER: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip


def _clip(folder: Path, projected: bool, tokens: int = MAX_TOKENS, width: int = WIDTH) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=tokens, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, hidden_act="gelu" if projected else "quick_gelu",
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config), tokenizer


def _t5(kind: Any = None, width: int = WIDTH) -> tuple[Any, Any]:
    shape: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "d_model": width,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
    }
    if kind is None:
        config: Any = transformers.T5Config(**shape, feed_forward_proj="gated-gelu")
        return transformers.T5EncoderModel(config), t5_tokenizer()
    return kind(transformers.UMT5Config(**shape, feed_forward_proj="gated-gelu")), t5_tokenizer()


def _vae(channels: int = 4, **more: Any) -> Any:
    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "latent_channels": channels, "norm_num_groups": 8, "layers_per_block": 1,
        "sample_size": RESOLUTION, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    kind: Any = more.pop("kind", diffusers.AutoencoderKL)
    return kind(**shape, **more)


def _video_vae(kind: Any, **more: Any) -> Any:
    return kind(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.2, 0.1, 0.0, 0.3], latents_std=[0.8, 1.1, 1.3, 0.9], **more,
    )  # fmt: skip


def _flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def _sdxl(folder: Path) -> Any:
    first, tokenizer = _clip(folder, projected=False)
    second, _ = _clip(folder, projected=True, width=2 * WIDTH)  # by their widths single files are told apart
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=3 * WIDTH,
        attention_head_dim=(2, 4), norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 2 * WIDTH,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13), text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=scheduler,
    )  # fmt: skip


def _sd3(folder: Path, dual: bool = True) -> Any:
    clips = [_clip(folder, projected=True) for _ in range(2)]
    t5, its_tokenizer = _t5(width=2 * WIDTH)  # as wide as both CLIPs together, which share its sequence
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_flow(shift=3.0), vae=_vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clips[0][0], tokenizer=clips[0][1], text_encoder_2=clips[1][0], tokenizer_2=clips[1][1],
        text_encoder_3=t5, tokenizer_3=its_tokenizer,
    )  # fmt: skip


def _flux(folder: Path, guidance: bool = True) -> Any:
    clip, tokenizer = _clip(folder, projected=False)
    t5, its_tokenizer = _t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=_flow(shift=3.0, use_dynamic_shifting=True), vae=_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip, tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=its_tokenizer, transformer=transformer,
    )  # fmt: skip


def _sd3_medium(folder: Path) -> Any:
    pipe = _sd3(folder, dual=False)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)  # as many save it, since T5 is most of its size
    return pipe


def _chroma(folder: Path) -> Any:
    t5, tokenizer = _t5()
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=_vae(scaling_factor=0.36, shift_factor=0.12), text_encoder=t5,
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def _flux2_parts(joint: int) -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=joint, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)  # or rotations before it would hardly matter
    vae = _vae(kind=diffusers.AutoencoderKLFlux2)
    with torch.no_grad():
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 1.5)
    scheduler = _flow(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, "tokenizer": bytes_tokenizer()}


def _flux2(folder: Path) -> Any:
    text = {**_DECODER, "num_hidden_layers": 31}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 16, "patch_size": 8, "head_dim": 16}  # fmt: skip
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", **vision},
        image_token_index=3,
    )  # fmt: skip
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    return diffusers.Flux2Pipeline(text_encoder=encoder, **_flux2_parts(3 * WIDTH))


def _klein(folder: Path) -> Any:
    encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**_DECODER, "num_hidden_layers": 28}))
    return diffusers.Flux2KleinPipeline(text_encoder=encoder, **_flux2_parts(3 * WIDTH))


def _qwen_image(folder: Path) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH,
              "fullatt_block_indexes": [0]}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    config = transformers.Qwen2_5_VLConfig(text_config={**_DECODER, "rope_scaling": rope}, vision_config=vision)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192),
        vae=_video_vae(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=bytes_tokenizer(2048),
        transformer=transformer,
    )  # fmt: skip


def _krea2(folder: Path) -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    config = transformers.Qwen3VLConfig(text_config={**_DECODER, "rope_scaling": rope}, vision_config=vision)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=64,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=_video_vae(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen3VLModel(config), tokenizer=bytes_tokenizer(2048), transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def _z_image(folder: Path) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for parameter in transformer.parameters():  # some start empty
        torch.nn.init.normal_(parameter, std=0.15)
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0), vae=_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_DECODER)), tokenizer=bytes_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def _gemma2() -> Any:
    config = transformers.Gemma2Config(**_DECODER, query_pre_attn_scalar=16, sliding_window=64)
    return transformers.Gemma2Model(config)


def _lumina2(folder: Path) -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8), axes_lens=(512, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=_flow(shift=6.0), vae=_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=_gemma2(), tokenizer=bytes_tokenizer(),
    )  # fmt: skip


def _hidream(folder: Path) -> Any:
    clips = [_clip(folder, projected=True, tokens=248) for _ in range(2)]
    t5, its_tokenizer = _t5()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))
    llama.set_attn_implementation("eager")  # the pipeline asks for attention maps
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(64, 64), llama_layers=[0, 1],
        force_inference_output=True,
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        scheduler=_flow(shift=3.0), vae=_vae(scaling_factor=0.36, shift_factor=0.12), text_encoder=clips[0][0],
        tokenizer=clips[0][1], text_encoder_2=clips[1][0], tokenizer_2=clips[1][1], text_encoder_3=t5,
        tokenizer_3=its_tokenizer, text_encoder_4=llama, tokenizer_4=bytes_tokenizer(), transformer=transformer,
    )  # fmt: skip


def _pixart(folder: Path, kind: Any = diffusers.PixArtSigmaPipeline) -> Any:
    t5, tokenizer = _t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return kind(tokenizer=tokenizer, text_encoder=t5, vae=_vae(), transformer=transformer, scheduler=scheduler)


def _pixart_alpha(folder: Path) -> Any:
    return _pixart(folder, diffusers.PixArtAlphaPipeline)


def _sana(folder: Path) -> Any:
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.41,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=bytes_tokenizer(), text_encoder=_gemma2(), vae=vae, transformer=transformer, scheduler=scheduler
    )


def _wan(folder: Path, experts: int = 2, expand_timesteps: bool = False) -> Any:
    encoder, tokenizer = _t5(transformers.UMT5EncoderModel)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    transformers_ = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
            ffn_dim=64, num_layers=2, rope_max_seq_len=64,
        )
        for _ in range(experts)
    ]  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_video_vae(diffusers.AutoencoderKLWan, scale_factor_spatial=2),
        scheduler=scheduler, transformer=transformers_[0], transformer_2=transformers_[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None, expand_timesteps=expand_timesteps,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "StableDiffusionPipeline": tiny_pipeline,
    "StableDiffusionPipeline 2.x": partial(tiny_pipeline, prediction_type="v_prediction"),
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusion3Pipeline medium": _sd3_medium,
    "FluxPipeline": _flux,
    "FluxPipeline schnell": partial(_flux, guidance=False),
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _klein,
    "ChromaPipeline": _chroma,
    "QwenImagePipeline": _qwen_image,
    "Krea2Pipeline": _krea2,
    "ZImagePipeline": _z_image,
    "Lumina2Pipeline": _lumina2,
    "HiDreamImagePipeline": _hidream,
    "PixArtAlphaPipeline": _pixart_alpha,
    "PixArtSigmaPipeline": _pixart,
    "SanaPipeline": _sana,
    "WanPipeline 2.1": partial(_wan, experts=1),
    "WanPipeline": _wan,
    "WanPipeline 2.2 5B": partial(_wan, experts=1, expand_timesteps=True),
}
