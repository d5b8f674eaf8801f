"""Whether an adapter's file fits a pipeline, and whether it proves itself there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.components import modules_of
from oft_diffusion.hooks import unwrap
from oft_diffusion.prediction import prediction_type
from oft_diffusion.proof import compare, differing, fingerprint, layer_probes


def component_for(pipe: DiffusionPipeline, file: AdapterFile, part: str) -> nn.Module:
    """The component that a part of a file adapts.

    Raises:
        AdapterFileError: the pipeline has none of that name, or one of another class.
    """
    found = modules_of(pipe)
    module = found.get(part)
    if module is None:
        raise AdapterFileError(
            f"{file.path.name} adapts the component {part!r}, which this {type(pipe).__name__} does not have",
            expected=f"a pipeline with it; this one has {', '.join(found)}",
            fix="load the adapter into the kind of pipeline it was trained for",
        )
    trained_on = file.metadata.base.get("components", {}).get(part)
    here = type(unwrap(module)).__name__
    if trained_on is not None and trained_on != here:
        raise AdapterFileError(
            f"{file.path.name} was trained on a {trained_on}, but this pipeline's {part} is a {here}",
            expected=f"a {trained_on}",
            fix="load the adapter into the kind of pipeline it was trained for",
        )
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


def check_base(parts: Mapping[str, nn.Module], file: AdapterFile) -> list[str]:
    """Warnings about components that are not those that the adapter was trained on.

    Where one is, to the bit, some adapted layers must answer as they did when the file was written.

    Raises:
        AdapterFileError: they do not.
    """
    known: Mapping[str, Any] = file.metadata.base.get("fingerprints", {})
    probes: Mapping[str, Any] = file.metadata.probes.get("layers", {})
    warnings = []
    for part, module in parts.items():
        if part not in known:
            continue
        same = compare(known[part], fingerprint(module))
        if same == "other":
            name = file.metadata.base.get("name")
            warnings.append(
                f"{file.path.name} was trained on another base{f' ({name})' if name else ''} than this pipeline's "
                f"{part}; it may act differently here"
            )
        if same == "equal" and part in probes:
            here = layer_probes(module, file.components[part], file.metadata.components[part])
            if wrong := differing(probes[part], here):
                raise AdapterFileError(
                    f"{file.path.name}: through the very base that it was trained on, {len(wrong)} adapted layers of "
                    f"{part} answer otherwise than when it was written: {', '.join(wrong[:3])}",
                    expected="each rotation on the layer it was trained for",
                    fix="get the file again; if it is sound, this version of oft-diffusion has a bug",
                )
    return warnings
