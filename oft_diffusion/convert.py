"""The verbs `convert` and `merge`: adapters into other tools' formats and back, and several adapters as one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oft_diffusion.arithmetic import Combined, average, compose, interpolate, power, subtract
from oft_diffusion.disk import has_metadata
from oft_diffusion.errors import ConfigError
from oft_diffusion.files import FILE_NAME, AdapterFile, load_adapter_file, resolve_adapter_path, save_adapter_file
from oft_diffusion.formats import Imported, read, write_peft, write_single_file
from oft_diffusion.formats.carrier import Exported
from oft_diffusion.formats.carriers import export_diff, export_lora
from oft_diffusion.formats.checkpoint import export_checkpoint, export_folder
from oft_diffusion.formats.components import describe, modules_of
from oft_diffusion.formats.glora import export_glora
from oft_diffusion.formats.target import check_new
from oft_diffusion.formats.tools import TOOLS, names_of
from oft_diffusion.formats.writing import check_fit, part_of
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.load import load_pipeline
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.pipeline import load_oft_weights, set_oft_adapters
from oft_diffusion.pipeline.locating import locate
from oft_diffusion.pocket import pocket_path
from oft_diffusion.skeleton import pipeline_skeleton

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMINGS = ("flat", "kohya", "comfy", "diffusers", "native")
_WEIGHTS = ("diff", "lora", "glora", "folder", "checkpoint")  # what holds changed weights, and so needs the base's
_FOLDERS = ("peft", "folder")
FORMATS = ("oft", "peft", *TOOLS, *_WEIGHTS)

_HELP = """formats:
  oft            ours; --model where the file is another tool's
  peft           a folder for PEFT, one per component
  onetrainer     one file with the names that OneTrainer has for that model
  comfyui-oftv2  the same for ComfyUI with the node ComfyUI-OFTv2
  sd-scripts     the same for sd-scripts (SD 1, SD 2, SDXL)
  diff           changes of weights, for ComfyUI, Forge and A1111: exact, as large as the weights
  lora           the same as a LoRA, for everything that loads LoRA: exact, or of a --rank, with the error printed
  glora          rotations as GLoRA, for ComfyUI and Forge: exact on any base, dense
  folder         the model with the adapter in its weights, in diffusers' format
  checkpoint     the same as one file: --checkpoint names the base's"""


def convert_main(arguments: Sequence[str]) -> int:
    """`oft-diffusion convert`.

    Raises:
        OFTError: see `convert`.
    """
    for line in convert(arguments):
        print(line)
    return 0


def convert(arguments: Sequence[str], on_part: Callable[[str], object] = lambda part: None) -> list[str]:
    """What the command does, and the lines that it prints.

    Args:
        arguments: the command's.
        on_part: called before each part of the work, and before each weight that is computed or copied, with what it
            is; what it raises ends it, and nothing is left.

    Raises:
        OFTError: an option, the adapter or the model is unusable, or the target cannot hold the adapter.
    """
    parser = argparse.ArgumentParser(
        prog="oft-diffusion convert",
        description="An adapter in another tool's format. What is read is told by the file itself.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="adapter: a file, a folder or a hub id")
    parser.add_argument("target", type=Path, help="the new file, or folder")
    parser.add_argument("--weight-name", metavar="FILE", help="which one of the folder or repository")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--subfolder", help="of a folder or hub repository")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--model", help="the base: a pipeline folder or hub id; for some formats its configs do")
    parser.add_argument("--config-dir", metavar="FOLDER", help="for a --model that is one file, as for generate")
    parser.add_argument("--component", help="which one a file of PEFT's or LyCORIS's is for, where it does not tell")
    parser.add_argument("--only", metavar="COMPONENT", help="write this component's part of the adapter alone")
    parser.add_argument("--naming", choices=_NAMINGS, help="of layers, other than the usual one")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: float32, but float16 for changed weights")
    parser.add_argument("--rank", type=int, help="of a LoRA (default: full, which is exact)")
    parser.add_argument("--strength", type=float, default=1.0, help="to bake in (default: 1)")
    parser.add_argument(
        "--mode", choices=("rotation", "linear"),
        help="of the strength: a smaller rotation, as our files take it, or a blend of the weights, as most tools do, "
        "which no file of rotations can hold (default: that of the adapter's tool)",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the base's single file, for --to checkpoint")
    parser.add_argument(
        "--legacy-scaled", action="store_true", help="for Scaled OFT of OneTrainer's builds of February 2026"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a target file that is there already")
    options = parser.parse_args(arguments)
    _check(options)
    _check_target(_written(options), _read_from(options), overwrite=options.overwrite or options.to in _FOLDERS)
    if options.to in _FOLDERS:
        check_new(options.target)
    told = _export(options, on_part) if options.to in _WEIGHTS else _rename(options, on_part)
    return [*told, f"wrote {options.target}"]


def merge_main(arguments: Sequence[str]) -> int:
    """`oft-diffusion merge`.

    Raises:
        OFTError: the adapters cannot be one.
    """
    ways: Mapping[str, Callable[[Sequence[AdapterFile], argparse.Namespace], Combined]] = {
        "compose": lambda files, o: compose(files),
        "average": lambda files, o: average(files, o.weights),
        "interpolate": lambda files, o: interpolate(files[0], files[1], o.t),
        "subtract": lambda files, o: subtract(files[0], files[1]),
    }
    parser = argparse.ArgumentParser(
        prog="oft-diffusion merge", description="Several adapters as one: arithmetic on rotations, not on weights."
    )
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="files of ours, or folders with one")
    parser.add_argument("--out", required=True, type=Path, help="the new file, or a folder")
    parser.add_argument(
        "--how", choices=ways, default="compose",
        help="compose: one after the other (default); average; interpolate: on the way from the first to the second; "
        "subtract: the second from the first",
    )  # fmt: skip
    parser.add_argument("--t", type=float, default=0.5, help="how far to interpolate: 0 is the first, 1 the second")
    parser.add_argument("--weights", type=float, nargs="+", help="for average, one per adapter (default: equal)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    options = parser.parse_args(arguments)
    if options.how in ("interpolate", "subtract") and len(options.adapters) != 2:
        raise ConfigError(
            f"--how {options.how} was given {len(options.adapters)} adapters", expected="two", fix="name two files"
        )
    sources = {f"adapter {path}": resolve_adapter_path(path) for path in options.adapters}
    _check_target(_file_in(options.out), sources, overwrite=options.overwrite)
    combined = ways[options.how]([load_adapter_file(path) for path in options.adapters], options)
    path = save_adapter_file(options.out, combined.components, combined.metadata)
    for note in combined.notes:
        print(note)
    print(f"wrote {path}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that the format has no use for: they would do nothing.

    Raises:
        ConfigError: there is one, or the model or its checkpoint is missing.
    """
    only = {
        "rank": ("lora",), "checkpoint": ("checkpoint",), "naming": (*TOOLS, "diff", "lora"),
        "dtype": ("peft", *TOOLS, "diff", "lora", "glora"),
    }  # fmt: skip
    for name, formats in only.items():
        if getattr(options, name) is not None and options.to not in formats:
            raise _useless(f"--{name}", f"--to {options.to}", f"it with --to {' or '.join(formats)}")
    if options.overwrite and options.to in _FOLDERS:
        raise _useless("--overwrite", f"--to {options.to}", "a new folder, since no folder is ever replaced")
    if options.mode is not None and options.strength == 1.0:
        raise _useless("--mode", "a strength of 1", "it with another --strength")
    if options.config_dir is not None and not _is_file(options.model):
        raise _useless("--config-dir", f"--model {options.model}", "it with a --model that is one file")
    if options.to == "checkpoint" and options.checkpoint is None:
        raise ConfigError(
            "--to checkpoint wants the base's own file", expected="--checkpoint FILE", fix="name it, or use --to folder"
        )
    if options.model is None and options.to != "oft":
        raise ConfigError(
            f"--to {options.to} wants to know the base",
            expected="--model FOLDER, or a hub id",
            fix="name the model that the adapter was trained on",
        )


def _useless(option: str, beside: str, expected: str) -> ConfigError:
    return ConfigError(f"{option} means nothing with {beside}", expected=expected, fix="leave it out")


def _check_target(target: Path, sources: Mapping[str, Path], *, overwrite: bool) -> None:
    """Refuse to write over what is read, or over anything unasked.

    Raises:
        ConfigError: the target is a source, or a file of one, or is there already.
    """
    if not target.exists():
        return
    for name, source in sources.items():
        if source.exists() and (target.samefile(source) or source.resolve() in target.resolve().parents):
            raise ConfigError(
                f"{target} is the {name} itself, or of it", expected="a new file", fix="choose another name"
            )
    if not overwrite:
        raise ConfigError(
            f"{target} is there already", expected="a new file", fix="choose another name, or pass --overwrite"
        )


def _written(options: argparse.Namespace) -> Path:
    """The path that will be written."""
    target: Path = options.target
    return _file_in(target) if options.to == "oft" else target


def _file_in(target: Path) -> Path:
    return target if target.suffix == ".safetensors" else target / FILE_NAME


def _read_from(options: argparse.Namespace) -> dict[str, Path]:
    """What is read, as far as it is local, and what to call it."""
    found = {"adapter": _adapter(options)}
    if options.model is not None:
        found["model"] = Path(_model(options))
    if options.checkpoint is not None:
        found["checkpoint"] = options.checkpoint
    return found


def _adapter(options: argparse.Namespace) -> Path:
    where = {key: value for key in ("revision", "subfolder") if (value := getattr(options, key)) is not None}
    return locate(options.source, options.weight_name, where)[0]


def _is_file(model: str | None) -> bool:
    return model is not None and Path(model).suffix == ".safetensors"


def _model(options: argparse.Namespace) -> str | Path:
    return pocket_path() if options.model == "pocket" else options.model


def _parts(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The model's components, without weights."""
    if not _is_file(options.model):
        return pipeline_skeleton(_model(options))
    if options.config_dir is None:
        raise ConfigError(
            f"{options.model} is a single checkpoint file, which does not tell its layers",
            expected="--config-dir, a folder in diffusers' format of the same architecture",
            fix="pass --config-dir FOLDER; its weights are not needed",
        )
    return pipeline_skeleton(options.config_dir)


def _read(options: argparse.Namespace, parts: Mapping[str, nn.Module] | None) -> Imported:
    """The adapter, or the part of it that is asked for, as one of ours.

    Args:
        options: the command's.
        parts: the model's components, if a model is named.
    """
    path = _adapter(options)
    is_ours = not path.is_dir() and has_metadata(path, HEADER_KEY)
    for option, value in (("--component", options.component), ("--legacy-scaled", options.legacy_scaled)):
        if value and (is_ours or path.is_dir()):
            raise _useless(option, path.name, "it with files of other tools that do not tell")
    if is_ours:
        imported = Imported(load_adapter_file(path), "oft-diffusion")
        if parts is not None:
            check_fit(imported.file, parts)
    elif parts is None:
        raise ConfigError(
            f"{path.name} is another tool's, and its layers go by the names of a model",
            expected="--model FOLDER, or a hub id",
            fix="name the model that the adapter was trained on",
        )
    else:
        imported = read(path, parts, component=options.component, legacy_scaled=options.legacy_scaled)
        states = imported.file.components.values()
        count = sum(key.endswith(KEY_SUFFIX) for state in states for key in state)
        said = f"read {path.name}: {imported.format}, {count} layers"
        imported = replace(imported, notes=(said, *imported.notes))
    return imported if options.only is None else replace(imported, file=part_of(imported.file, options.only))


def _rename(options: argparse.Namespace, on_part: Callable[[str], object]) -> list[str]:
    """Formats that hold the rotations themselves: names, signs and series, and no base."""
    on_part("reading the adapter")
    parts = None if options.model is None else _parts(options)
    imported = _read(options, parts)
    file, notes = imported.file, list(imported.notes)
    if options.strength != 1.0:
        if (options.mode or imported.mode) == "linear":
            raise ConfigError(
                f"--strength {options.strength:g} as {imported.format} takes it is a blend of weights, and no rotation",
                expected="a strength of 1, or --mode rotation, which turns by less",
                fix="pass --mode rotation, or write changed weights (--to diff, lora or folder)",
            )
        combined = power(file, options.strength)
        file, notes = combined, [*notes, *combined.notes]
    on_part("writing the adapter")
    if options.to == "oft":
        save_adapter_file(options.target, file.components, file.metadata)
        return notes
    assert parts is not None
    dtype = _DTYPES[options.dtype or "float32"]
    if options.to == "peft":
        return [*notes, *write_peft(options.target, file, parts, dtype=dtype).notes]
    naming = names_of(options.to, describe(parts), file.components, options.naming)
    return [*notes, *write_single_file(options.target, file, parts, naming, tool=options.to, dtype=dtype).notes]


def _export(options: argparse.Namespace, on_part: Callable[[str], object]) -> list[str]:
    """Formats that hold changed weights, computed from the base's."""
    on_part("loading the base")
    pipe = load_pipeline(_model(options), torch.float32, config_dir=options.config_dir)
    on_part("reading the adapter")
    imported = _read(options, modules_of(pipe))
    place = next(folder for folder in options.target.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=place) as folder:  # so that loading checks this file as it does any
        file = Path(folder) / f"{imported.file.path.stem}.safetensors"
        name = load_oft_weights(pipe, save_adapter_file(file, imported.file.components, imported.file.metadata)).name
    set_oft_adapters(pipe, name, options.strength, options.mode or imported.mode)
    notes = list(imported.notes)
    on_part("writing the weights")

    def told_layer(name: str) -> None:
        on_part(f"writing {name}")

    if options.to == "folder":
        export_folder(pipe, options.target)
        return notes
    if options.to == "checkpoint":
        export_checkpoint(pipe, options.checkpoint, options.target, on_layer=told_layer)
        return notes
    told: dict[str, Any] = {"dtype": _DTYPES[options.dtype or "float16"], "on_layer": told_layer}
    if options.naming is not None:
        told["naming"] = options.naming
    if options.to == "diff":
        return notes + _fidelity(export_diff(pipe, options.target, **told))
    if options.to == "glora":
        return notes + _fidelity(export_glora(pipe, options.target, **told))
    return notes + _fidelity(export_lora(pipe, options.target, rank=options.rank, **told))


def _fidelity(exported: Exported) -> list[str]:
    worst = max(exported.layers, key=lambda layer: exported.layers[layer].delta)
    overall, most = exported.overall, exported.layers[worst].delta
    told = f"of the change of the weights, {overall.delta:.2%} is lost ({overall.weight:.3%} of the weights)"
    return [f"{told}; most in {worst}: {most:.2%}"]
