"""What a model card says, in markdown and YAML, from which no text of others can break out."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.tools import is_loaded_by
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline.escaping import code, is_repo_id, line, plain, python, without_local_paths

# By the first that the class of a family, a pipeline or a denoiser begins with.
_FAMILIES = {
    "StableDiffusionXL": "stable-diffusion-xl", "StableDiffusion3": "stable-diffusion-3", "SD3": "stable-diffusion-3",
    "StableDiffusion": "stable-diffusion", "Flux2": "flux-2", "Flux": "flux", "Chroma": "chroma", "Krea2": "krea-2",
    "QwenImage": "qwen-image", "ZImage": "z-image", "Lumina2": "lumina-2", "HiDream": "hidream", "PixArt": "pixart",
    "Sana": "sana", "Wan": "wan",
}  # fmt: skip
# What the hub knows by name; it refuses a card with any other, but "other" with a license_name.
_LICENSES = (
    " afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 "
    "lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail "
    "openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib "
)
_TOOLS = {
    "comfyui-oftv2": "ComfyUI with the node ComfyUI-OFTv2", "onetrainer": "OneTrainer", "sd-scripts": "sd-scripts",
}  # fmt: skip
# Of the training settings, those that a reader of the card has a use for. Never a path.
_TRAINING = {
    "imported_from": "imported from", "combined": "several adapters as one, by", "steps_done": "steps",
    "learning_rate": "learning rate", "text_encoder_learning_rate": "learning rate of the text encoder",
    "batch_size": "batch size", "accumulation": "accumulation", "resolution": "resolution",
    "prior_preservation": "prior preservation", "clip_skip": "clip skip",
    "min_snr_gamma": "min-SNR gamma", "mixed_precision": "mixed precision", "seed": "seed",
}  # fmt: skip


def front_matter(
    metadata: AdapterMetadata, terms: str | None, pictures: Mapping[str, Mapping[str, Any]]
) -> ModelCardData:
    """The card's YAML: what the hub sorts, filters and draws its gallery by.

    Args:
        metadata: the adapter's.
        terms: its license, as the hub calls it, or any other name; None if nobody says.
        pictures: settings by file name.
    """
    base = metadata.base.get("name")
    is_public = isinstance(base, str) and is_repo_id(base)
    told: dict[str, Any] = {} if terms is None else _license(terms)
    return ModelCardData(
        base_model=base if is_public else None,
        base_model_relation="adapter" if is_public else None,
        library_name="diffusers",
        **told,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "oft", "oft-diffusion", *_family(metadata)],
        instance_prompt=_instance_prompt(metadata) or None,
        widget=[_widget(name, settings) for name, settings in pictures.items()] or None,
    )


def body(file: AdapterFile, repo_id: str, terms: str | None, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's markdown.

    Args:
        file: the adapter.
        repo_id: where it will be.
        terms: its license, or None.
        pictures: settings by file name.
    """
    metadata = file.metadata
    sections = [
        f"# {plain(repo_id.partition('/')[2])}",
        *(["<Gallery />"] if pictures else []),
        _lead(metadata),
        _at_a_glance(file),
        *([_samples(pictures)] if pictures else []),
        _usage(metadata, repo_id, pictures),
        _making(file),
        _limits(terms),
    ]
    return "\n\n".join(sections) + "\n\n"


# -- sections ----------------------------------------------------------------------------------------------------------


def _lead(metadata: AdapterMetadata) -> str:
    words = " ".join(filter(None, (metadata.trigger, metadata.class_word)))
    taught = f"teaches it the words {code(words)}" if words else "changes how it draws"
    return (
        f"An adapter for {_base_link(metadata)} that {taught}. It is of the kind OFTv2, orthogonal finetuning "
        "([arXiv 2506.19847](https://arxiv.org/abs/2506.19847)): every weight of the base stays as it is, and small "
        "rotations of what flows into its layers are added."
    )


def _at_a_glance(file: AdapterFile) -> str:
    metadata = file.metadata
    numbers = [t.numel() for state in file.components.values() for t in state.values()]
    layers = sum(key.endswith(KEY_SUFFIX) for state in file.components.values() for key in state)
    lines = [
        f"**Base**: {_base_link(metadata)}",
        f"**Trigger**: {code(metadata.trigger) if metadata.trigger else 'none'}",
        *([f"**Class word**: {code(metadata.class_word)}"] if metadata.class_word else []),
        f"**Recommended strength**: {metadata.strength:g} (0 is exactly the base, 1 as trained, -1 the inverse)",
        f"**Size**: {file.path.stat().st_size / 1e6:.2f} MB, {sum(numbers):,} parameters in {layers} layers",
    ]
    return _list(lines)


def _samples(pictures: Mapping[str, Mapping[str, Any]]) -> str:
    shown = []
    for number, (name, told) in enumerate(pictures.items(), 1):
        prompt = line(told.get("prompt") or "")
        facts = [f"not {code(told['negative_prompt'])}"] if told.get("negative_prompt") else []
        facts += [f"{key} {code(told[key])}" for key in ("seed", "steps", "guidance", "scheduler") if key in told]
        facts += [f"strength {strength:g}" for strength in _strengths(told)]
        caption = "\n\n".join(filter(None, (code(prompt) if prompt else "", ", ".join(facts))))
        shown.append(f"![{plain(prompt or f'Sample {number}')}]({name})" + (f"\n\n{caption}" if caption else ""))
    return "## Sample pictures\n\n" + "\n\n".join(shown)


def _usage(metadata: AdapterMetadata, repo_id: str, pictures: Mapping[str, Mapping[str, Any]]) -> str:
    how = _call(metadata, next((told for told in pictures.values() if told.get("prompt")), {}))
    prompt = how.pop("prompt")
    base = _base_name(metadata)
    by_file = base.endswith(".safetensors")
    load = (
        f'load_pipeline({python(base)}, dtype, device, config_dir="path/to/configs")'
        if by_file
        else f"DiffusionPipeline.from_pretrained({python(base)}, dtype=dtype).to(device)"
    )
    asked = "".join(f", {key}={python(value)}" for key, value in how.items() if key != "seed")
    flags = "".join(
        f" --{key.replace('_', '-').removesuffix('-prompt')} {shlex.quote(line(value))}" for key, value in how.items()
    )
    model = f"--model {shlex.quote(base)}" + (" --config-dir path/to/configs" if by_file else "")
    name = repo_id.partition("/")[2]
    stands = "" if is_repo_id(base) else f" ({code(base)} stands for wherever you have the base.)"
    convert = f"oft-diffusion convert {repo_id} {name}"
    classes = metadata.base.get("components", {})
    tools = "".join(
        f"# {called}\n{convert}-{tool}.safetensors --to {tool} {model}\n"
        for tool, called in _TOOLS.items()
        if is_loaded_by(tool, classes)
    )
    return f"""## How to use it

It needs the Python package `oft-diffusion`.{stands}

```python
import torch
{"from oft_diffusion.load import load_pipeline" if by_file else "from diffusers import DiffusionPipeline"}
from oft_diffusion import load_oft_weights
from oft_diffusion.generate import generate

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = {load}
load_oft_weights(pipe, "{repo_id}", strength={metadata.strength!r})
[picture] = generate(pipe, {python(prompt)}, [{how["seed"]}]{asked})
picture.image.save("picture.png")
```

Calling `pipe(...)` as always works, too. On the command line:

```bash
oft-diffusion generate {shlex.quote(prompt)} {model} --adapter {repo_id}:{metadata.strength!r}{flags}
```

For other tools; what a format cannot hold exactly, the command tells:

```bash
# everything that loads LoRA
{convert}-lora.safetensors --to lora {model}
{tools}# PEFT, and diffusers through it
{convert}-peft --to peft {model}
```"""


def _making(file: AdapterFile) -> str:
    metadata = file.metadata
    lines = []
    for part, state in file.components.items():
        config = metadata.components[part]
        layers = sum(key.endswith(KEY_SUFFIX) for key in state)
        sets = [config.targets] if isinstance(config.targets, str) else list(config.targets)
        targets = ", ".join(map(code, sets[:3])) + (", ..." if len(sets) > 3 else "")
        kind = metadata.base.get("components", {}).get(part)
        numbers = sum(t.numel() for t in state.values())
        lines.append(
            f"{code(part)}{f' ({code(kind)})' if kind else ''}: {layers} layers ({targets}), block size "
            f"{config.block_size}, {code(config.parametrisation)}, {numbers:,} parameters"
        )
    told = without_local_paths(metadata.training)
    facts = [
        f"{label}: {code('yes' if told[key] is True else told[key])}"
        for key, label in _TRAINING.items()
        if isinstance(told.get(key), (str, int, float)) and told[key] is not False
    ]
    versions = ", ".join(f"{code(name)} {code(number)}" for name, number in metadata.software.items())
    last = [f"saved: {code(metadata.created[:10])} with {versions}", f"SHA-256 of the tensors: `{metadata.sha256}`"]
    return "## How it was made\n\n" + _list([*lines, *facts, *last])


def _limits(terms: str | None) -> str:
    own = "none is stated, ask its author." if terms is None else f"{code(terms)}."
    return f"""## License and limits

License of the adapter: {own} The license of the base holds for what is drawn with both.

An adapter of a few pictures knows those pictures: their light, their backgrounds and what stood beside the subject may
come along, most of all at high strengths. It acts as intended on the base that it was trained on, and keeps that base's
faults and biases. Do not use it to deceive, or to depict people who did not agree."""


# -- facts -------------------------------------------------------------------------------------------------------------


def _base_name(metadata: AdapterMetadata) -> str:
    return line(str(without_local_paths(metadata.base.get("name") or ""))) or "path/to/the/base"


def _base_link(metadata: AdapterMetadata) -> str:
    name = _base_name(metadata)
    return f"[{plain(name)}](https://huggingface.co/{name})" if is_repo_id(name) else code(name)


def _family(metadata: AdapterMetadata) -> list[str]:
    classes = metadata.base.get("components", {}).values()
    told = [str(name) for name in (metadata.base.get("family"), metadata.base.get("pipeline"), *classes)]
    return [tag for name in told for start, tag in _FAMILIES.items() if name.startswith(start)][:1]


def _instance_prompt(metadata: AdapterMetadata) -> str:
    words = {"trigger": metadata.trigger, "class_word": metadata.class_word}
    if not any(words.values()):
        return ""
    told = metadata.training.get("instance_prompt")
    prompt = told if isinstance(told, str) and told else "{trigger} {class_word}"
    for name, word in words.items():
        prompt = prompt.replace(f"{{{name}}}", word or "")
    return line(prompt)


def _license(terms: str) -> dict[str, str]:
    name = re.sub(r"[^a-z0-9.+]+", "-", terms.lower()).strip("-")
    return {"license": name} if f" {name} " in _LICENSES else {"license": "other", "license_name": name or "custom"}


def _widget(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": line(told.get("prompt") or "") or "-"}  # the hub wants one
    if told.get("negative_prompt"):
        entry["parameters"] = {"negative_prompt": line(told["negative_prompt"])}
    return entry | {"output": {"url": name}}


def _call(metadata: AdapterMetadata, told: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is asked for the first picture, or for one as training drew them on the way."""
    training = metadata.training
    seed, size = told.get("seed"), (told.get("width"), told.get("height"))
    found: dict[str, Any] = {
        "prompt": line(told.get("prompt") or "") or _instance_prompt(metadata) or "a photo",
        "seed": seed if _is_count(seed) else 0,
    }
    if told.get("negative_prompt"):
        found["negative_prompt"] = line(told["negative_prompt"])
    choices = {
        "steps": (told.get("steps"), training.get("sampling_steps")),
        "guidance": (told.get("guidance"), training.get("guidance_scale")),
        "clip_skip": (told.get("clip_skip"), training.get("clip_skip")),
    }
    for name, values in choices.items():
        usable = [v for v in values if _is_count(v) or (name == "guidance" and _is_number(v))]
        found |= {name: usable[0]} if usable else {}
    return found | (dict(zip(("width", "height"), size, strict=True)) if all(map(_is_count, size)) else {})


def _strengths(told: Mapping[str, Any]) -> list[float]:
    adapters = told.get("adapters")
    entries = [a for a in adapters if isinstance(a, Mapping)] if isinstance(adapters, list) else []
    return [a["strength"] for a in entries if _is_number(a.get("strength"))]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
