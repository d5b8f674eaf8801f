"""Layers as adapter files and checkpoints of other tools name them.

A foreign key is what stands in a file before the suffix (`.oft_R.weight`, `.alpha`, ...). Nothing is taken apart or
guessed: every key that a pipeline's layers can have is spelled out from their names, and keys are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from oft_diffusion.errors import AdapterFileError, TargetError
from oft_diffusion.formats.components import (
    OMI,
    UNET,
    ComponentLayers,
    Components,
    describe,
    described,
    encoder_of,
    stable_diffusion,
)
from oft_diffusion.formats.native_dit import OPEN_CLIP, SPLIT_ADAPTERS, Leaf, Native, expand, native_names
from oft_diffusion.formats.native_unet import unet_names
from oft_diffusion.targets import canonical_name

__all__ = [
    "APART",
    "NAMINGS",
    "ComponentLayers",
    "Components",
    "Leaf",
    "Meaning",
    "Naming",
    "checkpoint_names",
    "describe",
    "read_names",
    "split_names",
    "write_names",
]


@dataclass(frozen=True)
class Meaning:
    """What a foreign key means.

    Attributes:
        component: of the pipeline.
        leaves: the layers. Several where the native format has one weight for them: an input rotation is every
            leaf's, an output rotation or a change of the weight goes by their rows.
        missing: on writing, those leaves that were not asked for. A file cannot leave them out.
    """

    component: str
    leaves: tuple[Leaf, ...]
    missing: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The leaves' names."""
        return tuple(leaf.layer for leaf in self.leaves)


@dataclass(frozen=True)
class Naming:
    """A way to write names.

    Attributes:
        denoiser: what stands before a denoiser's layers; `{part}` is the component's name.
        encoder: the same for text encoders, with names of `Encoder`; None where such files have none.
        native: a denoiser's layers go by their native names.
        flat: `_` stands for every `.`.
        live: a text encoder's layers are named as they are, rather than with CLIP's `text_model.`.
    """

    denoiser: str
    encoder: str | None
    native: bool = False
    flat: bool = False
    live: bool = False


# A "peft" or "lycoris" file is one component's, and any other but "flat" and "diffusers" one denoiser's; which one, it
# does not say.
NAMINGS: Mapping[str, Naming] = {
    "flat": Naming("lora_{part}_", "lora_{te}_", flat=True),  # OneTrainer's LEGACY; all trainers of SD 1.x and 2.x
    "kohya": Naming("lora_unet_", "lora_{kohya}_", native=True, flat=True),  # sd-scripts, OneTrainer's KOHYA
    "diffusers": Naming("{part}.", "{part}."),
    "comfy": Naming("diffusion_model.", "text_encoders.{comfy}.transformer.", native=True),
    "native": Naming("", None, native=True),  # OneTrainer's ORIGINAL
    "peft": Naming("base_model.model.", "base_model.model.", live=True),
    "lycoris": Naming("lycoris_", "lycoris_", flat=True, live=True),
}

APART = "apart"  # that of `split_names`
# Denoisers of whose fused weights ComfyUI finds the rows by diffusers' names, `lora_transformer_`.
_SPLIT_IN_COMFY = ("SD3Transformer2DModel", "FluxTransformer2DModel", "ChromaTransformer2DModel")

# By these prefixes other tools mean the denoiser, whatever its kind.
_DENOISER_DOTTED = ("diffusion_model.", "model.diffusion_model.", "lora_unet.")
_DENOISER_FLAT = ("lora_unet_", "oft_unet_", "oftv2_unet_")
# These stand before its tensors in single-file checkpoints.
_DENOISER_TENSORS = ("model.diffusion_model.", "", "diffusion_model.")


def read_names(
    pipeline: Components,
    keys: Iterable[str],
    component: str | None = None,
    *,
    source: str = "the file",
    trained_on: str = "another model",
    strict: bool = True,
) -> dict[str, Meaning]:
    """What each foreign key means.

    Args:
        pipeline: all of its denoisers and text encoders, whether or not the file adapts them (`describe`).
        keys: what stands before the suffixes.
        component: the one meant by keys that name none, as PEFT's and LyCORIS's; needed only where several have such
            a layer.
        source: what errors call the file.
        trained_on: what errors say that it was trained on.
        strict: whether every key must be a layer's. If not, those of no layer are left out, unless all are.

    Raises:
        AdapterFileError: a key is no layer's, or that of layers of several components.
        TargetError: the pipeline has no such component.
    """
    names, clashes = _index(pipeline, component)
    keys = list(keys)
    if unclear := [key for key in keys if key in clashes]:
        raise AdapterFileError(
            f"{source}: {_shown(unclear)} may be a layer of {' or of '.join(clashes[unclear[0]])}",
            expected="keys that say which component they adapt",
            fix="say which one the file is for (component=...)",
        )
    unknown = [key for key in keys if key not in names]
    if unknown and (strict or len(unknown) == len(keys)):
        kind = f" {known}" if (known := stable_diffusion(pipeline)) else ""
        raise AdapterFileError(
            f"{source} was trained on {trained_on} and does not fit this{kind} pipeline of "
            f"{', '.join(f'{part} ({about.class_name})' for part, about in pipeline.items())}: "
            f"{len(unknown)} of its {len(keys)} layers are not in it, {_shown(unknown)}",
            expected="a file for this architecture",
            fix="load the kind of pipeline that the file was trained on"
            + (", or say which component it is for (component=...)" if _would_help(pipeline, keys, component) else "")
            + (", or load what fits with strict=False" if len(unknown) < len(keys) else ""),
        )
    return {key: names[key] for key in keys if key in names}


def _would_help(pipeline: Components, keys: Iterable[str], component: str | None) -> bool:
    """Whether all keys are layers' names of some component, if it is the one meant."""
    return component is None and any(set(keys) <= _index(pipeline, part)[0].keys() for part in pipeline)


def write_names(pipeline: Components, component: str, layers: Iterable[str], naming: str) -> dict[str, Meaning]:
    """The foreign keys of some layers of a component. `Meaning.missing` tells which others a fused weight has.

    Args:
        pipeline: all of its denoisers and text encoders.
        component: the one that the layers are in.
        layers: their names, with or without `text_model.`.
        naming: of `NAMINGS`.

    Raises:
        TargetError: there is no such component or layer, or one has no name of this kind.
    """
    about, style, encoder = described(pipeline, component), NAMINGS[naming], encoder_of(pipeline, component)
    kind = f"{naming!r} files"
    if encoder is None:
        prefix = style.denoiser.format(part=component)
        names = _adapter_names(about, naming) if style.native else _own_names(about)
    elif style.encoder is None or (naming == "comfy" and not encoder.comfy):
        raise _no_name(about, component, kind)
    else:
        told = {"te": encoder.te, "kohya": encoder.kohya or encoder.te, "comfy": encoder.comfy}
        prefix = style.encoder.format(part=component, **told)
        spell = str if style.live else about.comfy_name if naming == "comfy" else about.file_name
        names = {spell(layer): (Leaf(layer),) for layer in about.layers}
    found: dict[str, Meaning] = {}
    for name, meaning in _grouped(about, component, layers, names, kind).items():
        key = prefix + (name.replace(".", "_") if style.flat else name)
        if style.flat and not style.live and encoder is not None and encoder.projection and name == "text_projection":
            key = f"lora_{encoder.projection}_{name}"
        if key in found:
            raise TargetError(
                f"{component} has two layers of the name {key}: {found[key].layers[0]} and {meaning.layers[0]}",
                expected="names that differ in more than their dots",
                fix='write dotted names (naming="diffusers")',
            )
        found[key] = meaning
    return found


def split_names(
    pipeline: Components,
    component: str,
    layers: Iterable[str],
    alike: Callable[[Collection[str]], bool],
    naming: str = "kohya",
) -> dict[str, Meaning]:
    """Names for ComfyUI, where those of a fused weight's layers must be kept apart if their rotations differ.

    Native names, but diffusers' ("flat") for such layers, where ComfyUI knows those. For other layers they
    would be wrong: it exchanges the halves of the last modulation's rows after rotating.

    Args:
        pipeline: as for `write_names`.
        component: as there.
        layers: as there.
        alike: whether these layers have the same rotation.
        naming: of the native names.

    Raises:
        TargetError: as `write_names`.
    """
    names: dict[str, Meaning] = {}
    for key, meaning in write_names(pipeline, component, layers, naming).items():
        here = [layer for layer in meaning.layers if layer not in meaning.missing]
        is_whole = not meaning.missing and alike(here)
        if is_whole or pipeline[component].class_name not in _SPLIT_IN_COMFY:
            names[key] = meaning
        else:
            names |= write_names(pipeline, component, here, "flat")
    return names


def checkpoint_names(
    pipeline: Components, component: str, layers: Iterable[str], tensors: Collection[str], *, source: str = "the file"
) -> dict[str, Meaning]:
    """The tensors of a native single-file checkpoint in which some layers of a component lie.

    Args:
        pipeline: all of its denoisers and text encoders.
        component: the one that the layers are in.
        layers: their names, with or without `text_model.`.
        tensors: the names of all tensors in the checkpoint, which tell its layout.
        source: what errors call the checkpoint.

    Raises:
        TargetError: there is no such component or layer, or one has no name in any native layout that we know.
        AdapterFileError: the checkpoint lacks one.
    """
    about, layers, kind = described(pipeline, component), list(layers), "native checkpoints"
    layouts = [_grouped(about, component, layers, names, kind) for names in _layouts(pipeline, component)]
    if not layouts:
        raise _no_name(about, component, kind)
    for found in layouts:
        if all(name in tensors for name in found):
            return found
    absent = min(([name for name in found if name not in tensors] for found in layouts), key=len)
    raise AdapterFileError(
        f"{source} lacks {len(absent)} tensors of {component}: {_shown(absent)}",
        expected=f"a native checkpoint with the {component} ({about.class_name}) in it",
        fix="use the single-file checkpoint of this very base, or a folder in diffusers' format",
    )


# -- what is read -----------------------------------------------------------------------------------------------------


def _index(pipeline: Components, component: str | None) -> tuple[dict[str, Meaning], dict[str, list[str]]]:
    """Every key with its meaning, and the components of those keys that have several."""
    if component is not None:
        described(pipeline, component)
    names: dict[str, Meaning] = {}
    clashes: dict[str, list[str]] = {}
    for key, meaning in _readings(pipeline, component):
        known = names.setdefault(key, meaning)
        if known != meaning:
            clashes.setdefault(key, [known.component]).append(meaning.component)
    return {key: meaning for key, meaning in names.items() if key not in clashes}, clashes


def _readings(pipeline: Components, component: str | None) -> Iterator[tuple[str, Meaning]]:
    for part, about in pipeline.items():
        names = {
            spelling: Meaning(part, (Leaf(layer),))
            for layer in about.layers
            for spelling in (layer, canonical_name(layer), about.file_name(layer), about.comfy_name(layer))
        }
        native = {name: Meaning(part, leaves) for name, leaves in _native_names(about).items()}
        dotted, flat = _prefixes(pipeline, part, component)
        for name, meaning in (*names.items(), *native.items()):
            yield from ((prefix + name, meaning) for prefix in dotted)
            yield from ((prefix + name.replace(".", "_"), meaning) for prefix in flat)
        for name, meaning in native.items():  # OneTrainer's files of 2025 number the leaves of a fused weight
            for number, layer in enumerate(meaning.layers if len(meaning.leaves) > 1 else ()):
                yield f"{part}.{name}.{number}", Meaning(part, (Leaf(layer),))


def _prefixes(pipeline: Components, part: str, component: str | None) -> tuple[list[str], list[str]]:
    """What may stand before a component's layers, dotted and flat, in files for `component`."""
    encoder = encoder_of(pipeline, part)
    dotted, flat = [f"{part}.", f"{part}.base_model.model."], []
    # The components of a combined pipeline that a pipeline of their own calls otherwise: `prior_prior` is its `prior`.
    alone = part.removeprefix("prior_")
    if alone != part and alone not in pipeline:
        dotted += [f"{alone}.", f"{alone}.base_model.model."]
        flat += [f"lora_{alone}_"] if encoder is None else []
    if component in (None, part):
        dotted += ["", "base_model.model."]
        flat += ["lycoris_"]
    if encoder is not None:
        dotted += [f"lora_{te}." for te in encoder.flat]
        flat += [f"lora_{te}_" for te in encoder.flat]
        if encoder.comfy:
            dotted += [f"text_encoders.{encoder.comfy}.transformer."]
        if encoder.comfy in OMI:
            dotted += [f"{OMI[encoder.comfy]}."]
        return dotted, flat
    flat += [f"lora_{part}_"]
    # In a file for a text encoder they still mean a denoiser.
    if component in (None, part) or encoder_of(pipeline, component) is not None:
        dotted += _DENOISER_DOTTED
        flat += _DENOISER_FLAT
    return dotted, flat


# -- names of layers --------------------------------------------------------------------------------------------------


def _own_names(about: ComponentLayers) -> Native:
    return {layer: (Leaf(layer),) for layer in about.layers}


def _native_names(about: ComponentLayers) -> Native:
    return unet_names(about.layers) if about.class_name == UNET else native_names(about.class_name, about.layers)


def _adapter_names(about: ComponentLayers, naming: str) -> Native:
    """A denoiser's native names as adapter files have them."""
    # sd-scripts trains SD 1.x and 2.x on a UNet with diffusers' names, SDXL on one with native names.
    keeps = about.class_name in SPLIT_ADAPTERS or (naming == "kohya" and about.class_name == UNET and not about.is_xl)
    return _own_names(about) if keeps else _native_names(about)


def _layouts(pipeline: Components, component: str) -> Iterator[Native]:
    """The names that a component's tensors may have in single-file checkpoints, one layout after another."""
    about, encoder = pipeline[component], encoder_of(pipeline, component)
    if encoder is None:
        native = _native_names(about)
        for prefix in _DENOISER_TENSORS if native else ():
            yield {f"{prefix}{name}.weight": leaves for name, leaves in native.items()}
        return
    live = {canonical_name(layer): layer for layer in about.layers}
    comfy = ((f"text_encoders.{encoder.comfy}.transformer.", "comfy"),) if encoder.comfy else ()
    for prefix, style in (*encoder.single_file, *comfy):
        if style == "open_clip":
            native = expand(OPEN_CLIP, {name: about.layers[layer] for name, layer in live.items()})
            yield {
                prefix + name: tuple(replace(leaf, layer=live[leaf.layer]) for leaf in leaves)
                for name, leaves in native.items()
            }
        else:
            spell = {"bare": canonical_name, "comfy": about.comfy_name}.get(style, about.file_name)
            spelled = {spell(layer): layer for layer in live.values()}
            yield {f"{prefix}{name}.weight": (Leaf(layer),) for name, layer in spelled.items()}


def _grouped(
    about: ComponentLayers, component: str, layers: Iterable[str], names: Native, kind: str
) -> dict[str, Meaning]:
    """Those of `names` in which the layers lie, each with the leaves that are not among them."""
    live = {canonical_name(layer): layer for layer in about.layers}
    wanted = {live.get(canonical_name(layer), layer) for layer in layers}
    found = {
        name: Meaning(component, leaves, missing=tuple(leaf.layer for leaf in leaves if leaf.layer not in wanted))
        for name, leaves in names.items()
        if any(leaf.layer in wanted for leaf in leaves)
    }
    unnamed = wanted.difference(*(meaning.layers for meaning in found.values()))
    if strangers := [layer for layer in unnamed if layer not in about.layers]:
        raise TargetError(
            f"{component} ({about.class_name}) has no layer {_shown(strangers)}",
            expected="names of its linear layers and convolutions",
            fix="use the pipeline that these layers belong to",
        )
    if unnamed:
        raise _no_name(about, component, kind, f": {_shown(unnamed)}")
    return found


def _no_name(about: ComponentLayers, component: str, kind: str, layers: str = "") -> TargetError:
    return TargetError(
        f"layers of {component} ({about.class_name}) have no name in {kind}{layers}",
        expected="a component whose native names are known, and layers that native implementations have",
        fix='write names of diffusers (naming="flat" or "diffusers"), and merged pipelines as folders',
    )


def _shown(names: Collection[str]) -> str:
    return "; ".join(sorted(names)[:3]) + ("; ..." if len(names) > 3 else "")
