"""What the target sets mean on every denoiser of diffusers and every text encoder of its pipelines.

Models are built on the meta device, so that real sizes cost nothing. The result is committed as tests/data/targets.csv
and docs/targets.md; after a change that is meant,

    python -m tests.helpers.coverage

writes both again.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

from oft_diffusion.architectures import DENOISERS, TARGET_SETS
from oft_diffusion.targets import find_targets
from oft_diffusion.text_encoders import TEXT_ENCODERS

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "tests/data/targets.csv"
PAGE = ROOT / "docs/targets.md"
COMMAND = "python -m tests.helpers.coverage"
BLOCK_SIZE = 32
# Where diffusers keeps models that do not denoise.
OTHER_MODELS = {
    "diffusers.models.autoencoders": "latents to pictures and back",
    "diffusers.models.controlnets": "control networks, which steer a denoiser",
    "diffusers.models.adapter": "control networks, which steer a denoiser",
    "diffusers.models.condition_embedders": "they prepare what a denoiser is told",
    "diffusers.models.latent_upscaler": "they enlarge latents",
}

Settings = dict[str, Any]

_SDXL: Settings = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
_DEEP_FLOYD: Settings = {
    "block_out_channels": (320, 640),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
}
_SMALL: Settings = {"num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 32, "num_layers": 2}

# How to build a class, by variant, where its defaults do not build or leave layers out; else it is built once, as is.
BUILDS: dict[str, dict[str, Settings]] = {
    "CLIPTextModel": {"SD 1.5": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}},
    "CLIPTextModelWithProjection": {"SDXL": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}},
    "ChatGLMModel": {"": {"original_rope": True}},
    "ConsisIDTransformer3DModel": {"": {}, "with faces": {"num_layers": 4, "is_train_face": True}},
    "CosmosTransformer3DModel": {"": {}, "with pictures": {"img_context_dim_in": 1152}},
    "DreamLiteTransformer2DModel": {"small": {**_SMALL, "cross_attention_dim": 64}},
    "EasyAnimateTransformer3DModel": {"12B": {"in_channels": 16, "out_channels": 16, "patch_size": 2}},
    "Flux2Transformer2DModel": {
        "dev": {},
        "klein 4B": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    },
    "HiDreamImageTransformer2DModel": {
        "I1": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "caption_channels": [4096, 4096],
            "llama_layers": list(range(32)) + [31] * 16,
        },
        "without experts": {
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_routed_experts": 0,
            "caption_channels": [4096, 4096],
            "llama_layers": [0, 1],
        },
    },
    "HunyuanDiT2DModel": {"v1.2": {"in_channels": 4, "patch_size": 2, "num_layers": 40, "hidden_size": 1408}},
    "LTX2VideoTransformer3DModel": {"": {}, "gated": {"num_layers": 2, "gated_attn": True, "audio_gated_attn": True}},
    "LatteTransformer3DModel": {
        "1": {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "num_layers": 28,
            "patch_size": 2,
            "cross_attention_dim": 1152,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "caption_channels": 4096,
        }
    },
    "LuminaNextDiT2DModel": {"2B": {"num_kv_heads": 8, "num_layers": 24}},
    "MotifVideoTransformer3DModel": {
        "": {},
        "with cross-attention": {
            "num_layers": 2,
            "num_single_layers": 2,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
    },
    "OmniGenTransformer2DModel": {"v1": {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}}},
    "SD3Transformer2DModel": {
        "SD 3 medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        "SD 3.5 medium": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
        },
        "SD 3.5 large": {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    },
    "T5EncoderModel": {
        "v1.1 XXL": {
            "d_model": 4096,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        "v1 small": {},
    },
    "T5Gemma2Encoder": {"": {"text_config": {"dropout_rate": 0.0}}},
    "T5GemmaEncoder": {"": {"dropout_rate": 0.0}},
    "T5GemmaEncoderModel": {"": {"is_encoder_decoder": False}},
    "Transformer2DModel": {"small": {**_SMALL, "cross_attention_dim": 64}},
    "TransformerTemporalModel": {"small": _SMALL},
    "UNet2DConditionModel": {
        "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "SD 2.1": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "SDXL": _SDXL,
        "DeepFloyd, small": _DEEP_FLOYD,
    },
    "WanTransformer3DModel": {
        "T2V 1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "T2V 14B": {},
        "I2V 14B": {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36},
    },
}  # fmt: skip

# Classes without a row, and why.
WITHOUT_ROW: dict[str, str] = {
    "AceStepAudioTokenDetokenizer": "sound to tokens and back",
    "AceStepAudioTokenizer": "sound to tokens and back",
    "AceStepConditionEncoder": "prepares what a denoiser is told",
    "AudioLDM2ProjectionModel": "prepares what a denoiser is told",
    "CLIPImageProjection": "reads a reference picture",
    "Ideogram4PromptEnhancerHead": "writes prompts",
    "ReduxImageEncoder": "reads a reference picture",
    "StableAudio3DurationEmbedder": "prepares what a denoiser is told",
    "StableAudioProjectionModel": "prepares what a denoiser is told",
    "UniDiffuserModel": "of a deprecated pipeline",
    "UniDiffuserTextDecoder": "of a deprecated pipeline",
    "MiniMaxMusic3RVQDepthDecoder": "predicts audio codes one by one; no denoiser",
    "MotionAdapter": "a container of weights for UNetMotionModel; it has no forward",
    "RFD4ProteinaTransformer": "designs proteins",
    "ClapModel": "compares sounds with texts to choose among results",
    "GPT2LMHeadModel": "its layers are transformers' Conv1D, whose weights are transposed; sound only",
    "VitsModel": "speaks the text for AudioLDM 2",
}
# Classes that pipelines name in signatures, and what is loaded there.
STANDS_FOR = {"Gemma2PreTrainedModel": "Gemma2Model", "GemmaPreTrainedModel": "GemmaModel"}

# Attention in lists of blocks that is left out, and why.
LEFT_OUT: dict[str, str] = {
    r"(context_embedder\.)?token_refiner\.refiner_blocks\.": "a token refiner: it sees the text alone",
    r"context_refiner\.": "a token refiner: it sees the text alone",
    r"text_fusion\.(layerwise|refiner)_blocks\.": "a token refiner: it sees the text alone",
    r"(video_|audio_)?text_transformer_blocks\.": "it sees the text alone",
    r"txt_mode_blocks\.": "it sees the text alone",
    r"perceiver\.layers\.": "a resampler of the text",
    r"mode_blocks\.image_cond\.": "it sees reference pictures alone, and does not run without one",
    r"local_facial_extractor\.|perceiver_cross_attention\.": "it reads the face of a reference picture",
    r"(model\.)?(visual|vision_tower|vision_model|vision_embedder|audio_tower)\.": "it sees pictures or sound, no text",
    r"vqmodel\.": "it makes tokens of pictures",
}


class Line(NamedTuple):
    """One line of the table; `parameters` is None where the block size does not divide some layer."""

    name: str
    variant: str
    target_set: str
    layers: int
    parameters: int | None


# Text encoders that their library does not export at its top.
_ELSEWHERE = {
    "ChatGLMModel": "diffusers.pipelines.kolors.text_encoder",
    "T5GemmaEncoder": "transformers.models.t5gemma.modeling_t5gemma",
}


@cache
def denoiser_classes() -> dict[str, Any]:
    """Every model class that diffusers exports, but for those of OTHER_MODELS."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if not inspect.isclass(cls) or not issubclass(cls, diffusers.ModelMixin) or cls is diffusers.ModelMixin:
            continue
        if not cls.__module__.startswith(tuple(OTHER_MODELS)):
            found[name] = cls
    return found


@cache
def text_encoder_classes() -> dict[str, Any]:
    """Every class with a row, and every one that a pipeline's signature names for a text encoder."""
    folder = Path(inspect.getfile(diffusers)).parent / "pipelines"
    parameter = re.compile(r"^\s+\w*(?:text_encoder|language_encoder|language_model)\w*\s*:\s*([^=\n]+)", re.MULTILINE)
    names = {*TEXT_ENCODERS}
    for file in folder.rglob("*.py"):
        for annotation in parameter.findall(file.read_text(encoding="utf-8")):
            names.update(STANDS_FOR.get(word, word) for word in re.findall(r"\w+", annotation))
    found = {}
    for name in sorted(names - {"PreTrainedModel"}):
        module = importlib.import_module(_ELSEWHERE[name]) if name in _ELSEWHERE else transformers
        cls = getattr(module, name, None)
        if inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel):
            found[name] = cls
    return found


def builds() -> list[tuple[str, str]]:
    """(class, variant) of everything that is built: first denoisers, then text encoders."""
    return [(name, variant) for name in (*DENOISERS, *TEXT_ENCODERS) for variant in BUILDS.get(name, {"": {}})]


def build(name: str, variant: str) -> nn.Module:
    """The model, on the meta device."""
    settings = BUILDS.get(name, {"": {}})[variant]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in DENOISERS:
            denoiser: nn.Module = denoiser_classes()[name](**settings)
            return denoiser
        cls = text_encoder_classes()[name]
        config_class = transformers.T5GemmaModuleConfig if name == "T5GemmaEncoder" else cls.config_class
        encoder: nn.Module = cls(config_class(**settings))
        return encoder


def measure(name: str, variant: str, model: nn.Module) -> list[Line]:
    """What each set adapts, one line per set; sets that add nothing to the one before are left out."""
    lines: list[Line] = []
    for target_set in TARGET_SETS:
        found = find_targets(model, target_set)
        if not lines or len(found) > lines[-1].layers:
            parameters = sum(t.in_features * (BLOCK_SIZE - 1) // 2 for t in found)
            fits = all(t.in_features % BLOCK_SIZE == 0 for t in found)
            lines.append(Line(name, variant, target_set, len(found), parameters if fits else None))
    return lines


def committed() -> list[Line]:
    """The table as it is committed."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Line(n, v, s, int(count), int(size) if size else None) for n, v, s, count, size in rows]


def to_csv(lines: Iterable[Line]) -> str:
    """The table as the file holds it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "variant", "set", "layers", f"parameters_b{BLOCK_SIZE}"))
    writer.writerows(lines)
    return text.getvalue()


def to_page(lines: Sequence[Line]) -> str:
    """docs/targets.md: one row per model, one column per set."""
    head, tail = (HEAD.format(command=COMMAND, block_size=BLOCK_SIZE), TAIL)
    by_model: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        size = ""
        if line.parameters is not None:
            size = f" / {line.parameters / 1e6:.2f} M / {4 * line.parameters / 1e6:.1f} MB"
        by_model.setdefault((line.name, line.variant), {})[line.target_set] = f"{line.layers}{size}"
    parts = [head]
    for title, table in (("Denoisers", DENOISERS), ("Text encoders", TEXT_ENCODERS)):
        parts += [
            f"## {title}",
            "",
            f"| class | variant | {' | '.join(TARGET_SETS)} |",
            "|---" * (2 + len(TARGET_SETS)) + "|",
        ]
        for (name, variant), sets in by_model.items():
            if name in table:
                cells = (sets.get(target_set, "as before") for target_set in TARGET_SETS)
                parts.append(f"| {name} | {variant} | {' | '.join(cells)} |")
        parts.append("")
    parts += ["## Without a row", "", "| class | why |", "|---|---|"]
    parts += [f"| {name} | {why} |" for name, why in sorted(WITHOUT_ROW.items())]
    parts += ["", "## Attention that is left out", "", "| layers | why |", "|---|---|"]
    parts += [f"| `{pattern.replace('|', chr(92) + '|')}` | {why} |" for pattern, why in LEFT_OUT.items()]
    return "\n".join([*parts, "", tail])


HEAD = """# Targets

What `targets="attention"`, `"attention+mlp"`, `"all-linear"` and `"all-linear+conv"` mean on every denoiser that
diffusers exports and every text encoder that its pipelines name: layers / parameters / size of the adapter's file
(float32), at block size {block_size}. "As before" means that the set adds nothing. The sizes are those of the class's
defaults where no variant is named. Written by `{command}`, together with
`tests/data/targets.csv`, with which `tests/core/test_coverage.py` compares the installed libraries.

The rows are in `oft_diffusion/architectures.py` and `oft_diffusion/text_encoders.py`, anchored to the lists of
repeated blocks. What no set ever adapts: final projections, timestep and caption embedders, modulation (adaLN), token
refiners, vision towers, language heads, routers, experts and depthwise convolutions. A natively fused projection
(`to_qkv_mlp_proj`, `img_attn_qkv`, ...) is one linear layer and has one rotation. Layers of the last block whose
output a model throws away are left out, too.

A class without a row is not refused: a set's name then means attention projections (and MLPs, or all linear layers)
inside repeated blocks, by their names, and one line says so. A regular expression, or a list, names layers outright.
"""

TAIL = """## Convolutions

Of convolutions, `"all-linear+conv"` adapts 1x1 and 3x3 `Conv2d` of one group inside repeated blocks: residual blocks,
down- and upsamplers of UNets, Sana's feed-forward. A pattern of your own that names a `Conv2d` adapts it, too. The
rotation acts on the input channels, the same at every tap, so it is the identity at the start whatever stride and
padding are, and merges as `W[:, :, i, j] R^T`. Grouped convolutions, whose groups see only a part of the channels,
are refused where a pattern names them. PEFT reads the 1x1 ones; its own 3x3 ones are others (they rotate unfolded
patches).

## Layers that a pipeline never uses

Some pipelines take a hidden state before a text encoder's last one. `HIDDEN_STATES` in
`oft_diffusion/text_encoders.py` says which, and training leaves out the layers behind it. Where a pooled output of
the last layer is used as well (SDXL's second text encoder, both CLIPs of SD 3, Flux's CLIP), every layer counts.

## One rotation for q, k and v

`OFTConfig(share_qkv=True)` gives the projections of an attention that read the same input one generator: q, k and v
of each stream, or k and v in cross-attention, where q reads another. A runtime that fuses them into one matrix can
then hold the adapter exactly. Files hold every layer's tensor, equal ones for tied layers, and any reader can use
them.
"""


def main() -> None:
    """Write the table and the page."""
    lines = [line for name, variant in builds() for line in measure(name, variant, build(name, variant))]
    TABLE.write_text(to_csv(lines), encoding="utf-8")
    PAGE.write_text(to_page(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
