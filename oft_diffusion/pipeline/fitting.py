"""Whether an adapter's file fits a pipeline, and whether it proves itself there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import hooked_layers, unwrap
from oft_diffusion.inject import oft_state_dict
from oft_diffusion.offload import is_on_disk
from oft_diffusion.plan import layer_of
from oft_diffusion.prediction import prediction_type
from oft_diffusion.proof import Same, compare, differing, floating_weight, layer_probes, weight_probes, weights_of
from oft_diffusion.targets import canonical_name


def trained_on(file: AdapterFile) -> str:
    """What a file says that it was trained on, for messages: "a StableDiffusionPipeline (sd15)"."""
    base = file.metadata.base
    kind = base.get("pipeline") or ", ".join(base.get("components", {}).values())
    name = base.get("name")
    return f"a {kind}{f' ({name})' if name else ''}" if kind else f"another model{f', {name}' if name else ''}"


def not_for(pipe: DiffusionPipeline, file: AdapterFile, problem: str, expected: str) -> AdapterFileError:
    """The error for a file that does not fit a pipeline; it names both."""
    return AdapterFileError(
        f"{file.path.name} was trained on {trained_on(file)} and does not fit this {type(pipe).__name__}: {problem}",
        expected=expected,
        fix="load the adapter into the kind of pipeline it was trained for",
    )


def component_for(pipe: DiffusionPipeline, file: AdapterFile, part: str) -> nn.Module:
    """The component that a part of a file adapts.

    Raises:
        AdapterFileError: the pipeline has none of that name, or one of another class.
    """
    found = modules_of(pipe)
    module = found.get(part)
    if module is None:
        raise not_for(
            pipe, file, f"it has no component {part!r}", f"a pipeline with it; this one has {', '.join(found)}"
        )
    trained = file.metadata.base.get("components", {}).get(part)
    here = type(unwrap(module)).__name__
    if trained is not None and trained != here:
        raise not_for(pipe, file, f"its {part} is a {here}", f"a {trained}")
    return module


def check_prediction(pipe: DiffusionPipeline, file: AdapterFile) -> None:
    """SD 2.1 and its base differ in nothing else; an adapter of the one makes noise of the other's pictures.

    Raises:
        AdapterFileError: the pipeline predicts something else than the base that the adapter was trained on.
    """
    trained = file.metadata.base.get("prediction_type")
    scheduler = getattr(pipe, "scheduler", None)
    here = prediction_type({"_class_name": type(scheduler).__name__, **getattr(scheduler, "config", {})})
    if trained is not None and here is not None and trained != here:
        raise AdapterFileError(
            f"{file.path.name} was trained on a model that predicts {trained!r}, but this pipeline's scheduler says "
            f"{here!r}",
            expected=f"a base with prediction_type {trained!r}",
            fix="load the base it was trained on"
            + (f" ({name})" if (name := file.metadata.base.get("name")) else "")
            + ", or correct the scheduler's config",
        )


def compare_bases(parts: Mapping[str, nn.Module], file: AdapterFile) -> dict[str, Same]:
    """By component, whether it is the one that the adapter was trained on, where the file tells.

    Of components that are offloaded to disk nothing is told: their tensors hold garbage.
    """
    known: Mapping[str, Any] = file.metadata.base.get("fingerprints", {})
    readable = {part: module for part, module in parts.items() if part in known and not is_on_disk(unwrap(module))}
    found = {part: compare(known[part], module) for part, module in readable.items()}
    for part, told in file.metadata.probes.get("weights", {}).items():
        # Samples may miss what was edited in a few layers; those that are adapted are known one by one.
        if found.get(part) == "equal" and differing(told, weight_probes(weights_of(parts[part]), told)):
            found[part] = "other"
    return found


def warn_of_bases(found: Mapping[str, Same], file: AdapterFile) -> list[str]:
    """Sentences about components that are not those that the adapter was trained on."""
    name = file.metadata.base.get("name")
    return [
        f"{file.path.name} was trained on another base{f' ({name})' if name else ''} than this pipeline's {part}; it "
        "may act differently here"
        for part, same in found.items()
        if same == "other"
    ]


def prove_layers(part: str, module: nn.Module, adapter_name: str, file: AdapterFile) -> None:
    """Check that each layer of an adapter, as it is in the model now, answers as when the file was written.

    To be asked on the very base alone, and of an adapter that has just been put in: what is probed are the layers
    that its hooks sit on, and the generators that its bank holds.

    Raises:
        AdapterFileError: some do not.
    """
    known = file.metadata.probes.get("layers", {}).get(part)
    if known is None:
        return
    layers = {canonical_name(layer_of(site)): layer for site, layer in hooked_layers(module).items()}
    weights = {name: weight for name, layer in layers.items() if (weight := floating_weight(layer)) is not None}
    here = layer_probes(weights, oft_state_dict(module, adapter_name), file.metadata.components[part])
    if wrong := differing(known, here):
        raise AdapterFileError(
            f"{file.path.name}: through the very base that it was trained on, {len(wrong)} adapted layers of {part} "
            f"answer otherwise than when it was written: {', '.join(wrong[:3])}",
            expected="each rotation on the layer it was trained for",
            fix="get the file again; if it is sound, this version of oft-diffusion has a bug",
        )
