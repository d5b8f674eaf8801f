"""The verbs `convert` and `merge`: adapters into other tools' formats and back, and several adapters as one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oft_diffusion.arithmetic import Combined, average, compose, interpolate, power, subtract
from oft_diffusion.disk import has_metadata
from oft_diffusion.errors import ConfigError
from oft_diffusion.files import AdapterFile, load_adapter_file, save_adapter_file
from oft_diffusion.formats import read, write_peft, write_single_file
from oft_diffusion.formats.carrier import Exported
from oft_diffusion.formats.carriers import export_diff, export_lora
from oft_diffusion.formats.checkpoint import export_checkpoint, export_folder
from oft_diffusion.formats.glora import export_glora
from oft_diffusion.load import load_pipeline
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.pipeline import load_oft_weights
from oft_diffusion.pipeline.locating import locate
from oft_diffusion.pocket import pocket_path
from oft_diffusion.skeleton import pipeline_skeleton

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What tools of OFTv2 load as it is, each with the names that it has for layers.
_ROTATIONS = {"onetrainer": "flat", "sd-scripts": "kohya", "comfyui-oftv2": "flat"}
_WEIGHTS = ("diff", "lora", "glora", "folder", "checkpoint")  # what holds changed weights, and so needs the base's
FORMATS = ("oft", "peft", *_ROTATIONS, *_WEIGHTS)

_HELP = """formats:
  oft            ours; --model where the file is another tool's
  peft           a folder for PEFT, one per component
  onetrainer     one file with diffusers' names, for OneTrainer and ComfyUI with the node ComfyUI-OFTv2
  comfyui-oftv2  the same
  sd-scripts     one file with the names that sd-scripts has (SD 1, SD 2, SDXL)
  diff           changes of weights, for ComfyUI, Forge and A1111: exact, as large as the weights
  lora           the same as a LoRA, for everything that loads LoRA: exact, or of a --rank, with the error printed
  glora          rotations as GLoRA, for ComfyUI and Forge: exact on any base, dense
  folder         the model with the adapter in its weights, in diffusers' format
  checkpoint     the same as one file: --checkpoint names the base's"""


def convert_main(arguments: Sequence[str]) -> int:
    """`oft-diffusion convert`.

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
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--model", help="the base: a pipeline folder or hub id; of some formats its configs are enough")
    parser.add_argument("--config-dir", metavar="FOLDER", help="for a --model that is one file, as for generate")
    parser.add_argument("--component", help="which one a file of PEFT's or LyCORIS's is for, where it does not tell")
    parser.add_argument("--naming", help="of layers, other than the format's: flat, kohya, comfy, diffusers, native")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: float32, but float16 for changed weights")
    parser.add_argument("--rank", type=int, help="of a LoRA (default: full, which is exact)")
    parser.add_argument("--strength", type=float, default=1.0, help="to bake in (default: 1)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the base's single file, for --to checkpoint")
    parser.add_argument(
        "--legacy-scaled", action="store_true", help="for Scaled OFT of OneTrainer's builds of February 2026"
    )
    options = parser.parse_args(arguments)
    _check(options)
    told = _export(options) if options.to in _WEIGHTS else _rename(options)
    for line in told:
        print(line)
    print(f"wrote {options.target}")
    return 0


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
    options = parser.parse_args(arguments)
    if options.how in ("interpolate", "subtract") and len(options.adapters) != 2:
        raise ConfigError(
            f"--how {options.how} was given {len(options.adapters)} adapters", expected="two", fix="name two files"
        )
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
    only = {"rank": ("lora",), "checkpoint": ("checkpoint",), "naming": (*_ROTATIONS, "diff", "lora")}
    for name, formats in only.items():
        if getattr(options, name) is not None and options.to not in formats:
            raise ConfigError(
                f"--{name} means nothing with --to {options.to}",
                expected=f"it with --to {' or '.join(formats)}",
                fix="leave it out",
            )
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


def _parts(options: argparse.Namespace) -> dict[str, nn.Module]:
    model = pocket_path() if options.model == "pocket" else options.model
    return pipeline_skeleton(model)


def _rename(options: argparse.Namespace) -> list[str]:
    """Formats that hold the rotations themselves: names, signs and series, and no base."""
    path, _ = locate(options.source, None, {})
    notes: list[str] = []
    if has_metadata(path, HEADER_KEY):
        file = load_adapter_file(path)
    else:
        if options.model is None:
            raise ConfigError(
                f"{path.name} is another tool's, and its layers go by the names of a model",
                expected="--model FOLDER, or a hub id",
                fix="name the model that the adapter was trained on",
            )
        imported = read(path, _parts(options), component=options.component, legacy_scaled=options.legacy_scaled)
        print(f"read {path.name}: {imported.format}, {sum(map(len, imported.file.components.values()))} layers")
        file, notes = imported.file, list(imported.notes)
    if options.strength != 1.0:
        file = power(file, options.strength)
    dtype = _DTYPES[options.dtype or "float32"]
    if options.to == "oft":
        save_adapter_file(options.target, file.components, file.metadata)
        return notes
    parts = _parts(options)
    if options.to == "peft":
        for part in file.components:
            folder = options.target if len(file.components) == 1 else options.target / part
            notes += write_peft(folder, file, part, parts[part], dtype=dtype).notes
        return notes
    naming = options.naming or _ROTATIONS[options.to]
    return [*notes, *write_single_file(options.target, file, parts, naming, dtype=dtype).notes]


def _export(options: argparse.Namespace) -> list[str]:
    """Formats that hold changed weights, computed from the base's."""
    model = pocket_path() if options.model == "pocket" else options.model
    pipe = load_pipeline(model, torch.float32, config_dir=options.config_dir)
    load_oft_weights(pipe, options.source, strength=options.strength, component=options.component)
    if options.to == "folder":
        export_folder(pipe, options.target)
        return []
    if options.to == "checkpoint":
        export_checkpoint(pipe, options.checkpoint, options.target)
        return []
    told: dict[str, Any] = {"dtype": _DTYPES[options.dtype or "float16"]}
    if options.naming is not None:
        told["naming"] = options.naming
    if options.to == "diff":
        return _fidelity(export_diff(pipe, options.target, **told))
    if options.to == "glora":
        return _fidelity(export_glora(pipe, options.target, **told))
    return _fidelity(export_lora(pipe, options.target, rank=options.rank, **told))


def _fidelity(exported: Exported) -> list[str]:
    worst = max(exported.layers, key=lambda layer: exported.layers[layer].delta)
    overall, most = exported.overall, exported.layers[worst].delta
    told = f"of the change of the weights, {overall.delta:.2%} is lost ({overall.weight:.3%} of the weights)"
    return [f"{told}; most in {worst}: {most:.2%}"]
