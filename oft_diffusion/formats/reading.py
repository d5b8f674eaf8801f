"""Reading an adapter file of any tool, told by what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterFileError, ConfigError
from oft_diffusion.files import AdapterFile
from oft_diffusion.formats.folders import component_folders, joined
from oft_diffusion.formats.origins import origin_of
from oft_diffusion.formats.output_side import notes_of_training, read_output_side
from oft_diffusion.formats.packed import MARKER, read_packed
from oft_diffusion.formats.source import Imported, Source, match_layers, read_source
from oft_diffusion.hooks import unwrap
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.plan import StrengthMode
from oft_diffusion.rotation import rotation_delta, unpack


def read(
    path: str | Path,
    parts: Mapping[str, nn.Module],
    *,
    component: str | None = None,
    strict: bool = True,
    legacy_scaled: bool = False,
) -> Imported:
    """Read a file of another tool: PEFT, diffusers, OneTrainer, sd-scripts, LyCORIS, ComfyUI-OFTv2, and some forks.

    Args:
        path: the file; of PEFT's folder, `adapter_model.safetensors`; or a folder with such folders, one per component.
        parts: the pipeline's modules by name; "meta" tensors are enough.
        component: the one that the file is for, where its keys do not tell and several could be meant (PEFT, LyCORIS).
        strict: whether every layer of the file must be in the pipeline.
        legacy_scaled: for Scaled OFT of OneTrainer's builds of 14 February to 4 March 2026, whose divisor was
            `sqrt(b(b-1)/2)`; nothing in their files tells them from later ones.

    Returns:
        The adapter as one of ours: it gives the weights that its tool's formula gives.

    Raises:
        AdapterFileError: the file is broken, is of a kind that has no exact counterpart here, or does not fit.
        ConfigError: `legacy_scaled` for a file that is not of Scaled OFT, or `component` for several folders.
    """
    path = Path(path)
    if inner := component_folders(path):
        if component is not None:
            raise ConfigError(
                f"component={component!r} with {path.name}, whose folders are called after their components",
                expected="component for files that do not tell",
                fix="leave it out, or load one of its folders",
            )
        options: dict[str, bool] = {"strict": strict, "legacy_scaled": legacy_scaled}
        return joined(path, {part: read(file, parts, component=part, **options) for part, file in inner.items()})
    source = read_source(path)
    if legacy_scaled and not source.has(MARKER):
        raise ConfigError(
            f"legacy_scaled (--legacy-scaled) means nothing with {source.name}, which has no {MARKER}",
            expected="it with a file of Scaled OFT, which has that marker for every layer",
            fix="leave it out",
        )
    matches, unmatched = match_layers(source, parts, component, strict=strict)
    outputs, inputs = source.has("oft_blocks", "oft_diag"), source.has("oft_R.weight", "oft_rotation.weight")
    if outputs == inputs:
        raise AdapterFileError(
            f"{source.name} has {'rotations of inputs and of outputs' if inputs else 'no rotation'}",
            expected="an adapter of one kind",
            fix="get the file again from its author",
        )
    mode: StrengthMode = "linear"
    notes: tuple[str, ...] = ()
    if outputs:
        name = "output-side OFT (sd-scripts networks.oft, LyCORIS diag-oft)"
        components = read_output_side(source, matches)
        notes = notes_of_training(source, matches)
    else:
        origin = origin_of(source)
        parts_read = dict.fromkeys(match.meaning.component for match in matches)
        readings = {p: replace(origin.reading(source.settings_of(p)), legacy=legacy_scaled) for p in parts_read}
        name, mode = origin.name, origin.mode
        notes = tuple(dict.fromkeys(note for reading in readings.values() for note in reading.notes))
        components = read_packed(source, matches, readings)
    if source.left_out:
        notes = (*notes, f"{len(source.left_out)} embedding tensors were left out ({source.left_out[0]})")
    if unmatched:
        notes = (*notes, f"{len(unmatched)} layers that this pipeline does not have were left out")
    _check_rotations(source, components)
    notes = (*notes, *_norms(components))
    metadata = AdapterMetadata(
        components={part: config for part, (config, _) in components.items()},
        base={"components": {part: type(unwrap(parts[part])).__name__ for part in components}},
        training={"imported_from": name},
        mode=mode,
    )
    file = AdapterFile(source.path, {part: state for part, (_, state) in components.items()}, metadata)
    return Imported(file, name, notes, unmatched)


def _check_rotations(source: Source, components: Mapping[str, tuple[OFTConfig, Mapping[str, Tensor]]]) -> None:
    """Refuse numbers that are finite and make rotations that are not."""
    for part, (config, state) in components.items():
        for key, packed in state.items():
            if key.endswith(KEY_SUFFIX) and not torch.isfinite(rotation_delta(packed, config)).all():
                raise AdapterFileError(
                    f"{source.name} has generators of up to {float(packed.abs().max()):.2g} for {part}."
                    f"{key.removesuffix(KEY_SUFFIX)}, which make no rotation",
                    expected="numbers that are small enough to compute with",
                    fix="use an earlier checkpoint, or get the file again; this one is broken",
                )


def _norms(components: Mapping[str, tuple[OFTConfig, Mapping[str, Tensor]]]) -> list[str]:
    """Warn of truncated series that are far from rotations: that is what was trained, and it is kept."""
    found = []
    for part, (config, state) in components.items():
        if config.parametrisation == "cayley":
            continue
        norm = max(float(torch.linalg.matrix_norm(unpack(t), 2).max()) for t in state.values())
        if norm > 0.5:
            found.append(
                f"{part}: generators reach a norm of {norm:.2f}, where the truncated series changes lengths by up to "
                f"{norm**config.neumann_order:.0%}; it is kept as it was trained"
            )
    return found
