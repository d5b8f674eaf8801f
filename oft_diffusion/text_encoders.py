"""Text encoders: which layers their target sets mean, and how many of them a pipeline listens to. Data, as rows."""

from __future__ import annotations

from oft_diffusion.architectures import Architecture, row, within

_SELF_ATTENTION = within("self_attn", "q_proj k_proj v_proj o_proj")

# transformers 4 has `text_model.` in CLIPTextModel, 5 has not; CLIPTextModelWithProjection has it in both.
_CLIP = row(
    "encoder.layers text_model.encoder.layers",
    within("self_attn", "q_proj k_proj v_proj out_proj"),
    within("mlp", "fc1 fc2"),
)
_T5 = row(
    "encoder.block",
    within("layer.0.SelfAttention", "q k v o"),
    within("layer.1.DenseReluDense", "wi wi_0 wi_1 wo"),
)
# Anchored at the start, so that the vision tower of a model that sees pictures, too, and `lm_head` stay outside.
_LANGUAGE_MODEL = row(
    "layers model.layers language_model.layers model.language_model.layers",
    _SELF_ATTENTION,
    within("mlp", "gate_proj up_proj gate_up_proj down_proj"),
)
_T5_GEMMA = row(
    "layers encoder.layers text_model.layers encoder.text_model.layers",
    _SELF_ATTENTION,
    within("mlp", "gate_proj up_proj down_proj"),
)
_BERT = row(
    "encoder.layer text_model.encoder.layer",
    f"{within('attention.self', 'query key value')} attention.output.dense",
    "intermediate.dense output.dense",
)

TEXT_ENCODERS: dict[str, Architecture] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "T5GemmaEncoder": _T5_GEMMA,
    "T5GemmaEncoderModel": _T5_GEMMA,
    "T5Gemma2Encoder": _T5_GEMMA,
    "BertModel": _BERT,
    "ClapTextModelWithProjection": _BERT,
    "ChatGLMModel": row(
        "encoder.layers",
        within("self_attention", "query_key_value dense"),
        within("mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    **dict.fromkeys(
        (
            *("GemmaModel", "Gemma2Model", "Gemma3TextModel", "Gemma3ForConditionalGeneration"),
            "Gemma4UnifiedForConditionalGeneration",
            *("GlmModel", "GlmImageForConditionalGeneration"),
            *("LlamaModel", "LlamaForCausalLM", "LlavaForConditionalGeneration"),
            *("MistralModel", "Mistral3Model", "Mistral3ForConditionalGeneration"),
            *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextModel"),
            *("Qwen3Model", "Qwen3ForCausalLM", "Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
            "SmolLM3ForCausalLM",
        ),
        _LANGUAGE_MODEL,
    ),
}

# Which hidden state a pipeline takes last from a text encoder, as diffusers writes it: -1 is the last layer's output,
# -2 the one before it, 30 that of the 30th layer. Layers behind it never matter. By the longest prefix of the
# pipeline's class name; a component that is not named is used whole: so are CLIPs whose pooled output is taken, as
# SDXL's second and both of SD 3.
HIDDEN_STATES: dict[str, dict[str, int]] = {
    "AnimateDiff": {"text_encoder": -1},
    "AnimateDiffSDXL": {"text_encoder": -2},
    "BriaFibo2": {"text_encoder": 35},
    "CogView4": {"text_encoder": -2},
    "EasyAnimate": {"text_encoder": -2},
    "ErnieImage": {"text_encoder": -2},
    "Flux2": {"text_encoder": 30},
    "Flux2Klein": {"text_encoder": 27},
    "HunyuanImage": {"text_encoder": -3},
    "HunyuanSkyreels": {"text_encoder": -3},
    "HunyuanVideo": {"text_encoder": -3},
    "Krea2": {"text_encoder": 35},
    "LEditsPPPipelineStableDiffusionXL": {"text_encoder": -2},
    "LatentConsistencyModel": {"text_encoder": -1},
    "Lumina": {"text_encoder": -2},
    "NucleusMoEImage": {"text_encoder": -8},
    "StableDiffusion": {"text_encoder": -1},
    "StableDiffusion3": {},
    "StableDiffusionXL": {"text_encoder": -2},
    "ZImage": {"text_encoder": -2},
}


def _states(pipeline: str) -> dict[str, int]:
    """A pipeline's entry in `HIDDEN_STATES`, empty where it has none."""
    prefix = max((p for p in HIDDEN_STATES if pipeline.startswith(p)), key=len, default="")
    return HIDDEN_STATES.get(prefix, {})


def most_clip_skip(pipeline: str, layers: int) -> int:
    """The largest clip skip that leaves a CLIP of so many layers one of them. SDXL and SD 3 leave one out anyway."""
    return layers + _states(pipeline).get("text_encoder", -2)


def last_hidden_state(pipeline: str, component: str, clip_skip: int = 0) -> int:
    """The hidden state that a pipeline takes last from one of its text encoders; -1 where it uses every layer.

    Args:
        pipeline: the pipeline's class name.
        component: the text encoder's name in it.
        clip_skip: as the pipeline's call takes it: so many layers fewer, where the pipeline counts from the end.
    """
    state = _states(pipeline).get(component)
    if state is None:  # with a pooled output, or all states
        return -1
    return state - clip_skip if state < 0 else state
