"""The console script `oft-diffusion`: train, generate, evaluate, convert, merge, info, app."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oft_diffusion.errors import ConfigError, OFTError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Errors of ours are printed as a sentence, without a traceback.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        if arguments[:1] == ["evaluate"]:
            return _evaluate(arguments[1:])
        if arguments[:1] == ["convert"]:
            return _convert(arguments[1:])
        if arguments[:1] == ["merge"]:
            return _merge(arguments[1:])
        if arguments[:1] == ["app"]:
            return _app(arguments[1:])
        options = _parser().parse_args(arguments)
        return {"generate": _generate, "info": _info}[options.verb](options)
    except OFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse_adapter(text: str) -> tuple[str, float | None]:
    """`mug/oft_adapter.safetensors:0.8` to its path and strength; None where none is given.

    Raises:
        ConfigError: what follows the last colon is neither a number nor part of a path.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        return path, float(strength)
    except ValueError:
        # C:\mug.safetensors and a hub id have no strength; anything else is a typing error.
        if "/" in strength or "\\" in strength:
            return text, None
        raise ConfigError(
            f"--adapter {text} gives {strength!r} as the strength",
            expected="PATH or PATH:NUMBER",
            fix="for example --adapter runs/mug:0.8",
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oft-diffusion", description="Personalise diffusion models with OFTv2, and use the adapters."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("train", help="DreamBooth: pictures of a subject to an adapter (train --help for its options)")
    verbs.add_parser("evaluate", help="what an adapter did to the pocket base, measured (evaluate --help)")

    verbs.add_parser("convert", help="an adapter into another tool's format, or out of it (convert --help)")
    verbs.add_parser("merge", help="several adapters as one (merge --help)")
    verbs.add_parser("app", help="draw, compare and train in the browser (app --help)")

    generate = verbs.add_parser("generate", help="pictures from a prompt, with adapters")
    generate.add_argument("prompt", help="what to draw")
    generate.add_argument(
        "--model", default="pocket", help="pipeline folder, .safetensors checkpoint or hub id; pocket: the shipped one"
    )
    generate.add_argument("--config-dir", metavar="FOLDER", help="of a checkpoint's architecture, in diffusers' format")
    generate.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[:STRENGTH]",
        help="may be repeated; the file's own strength if none, mostly 1",
    )
    generate.add_argument(
        "--out", type=Path, default=Path("pictures"), help="folder (default: pictures); nothing there is replaced"
    )
    generate.add_argument("--negative", metavar="PROMPT", help="what not to draw")
    generate.add_argument("--count", type=int, default=1, help="how many pictures, of seeds one after another")
    generate.add_argument("--seed", type=int, default=0, help="the first picture's seed (default: 0)")
    generate.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    generate.add_argument(
        "--guidance", type=float, help="guidance scale (default: that of the first adapter's training, else 7.5)"
    )
    generate.add_argument(
        "--clip-skip", type=int, help="of CLIP's layers, as diffusers counts (1 is others' clip skip 2)"
    )
    generate.add_argument("--width", type=int, help="in pixels (default: the model's)")
    generate.add_argument("--height", type=int, help="in pixels (default: the model's)")
    generate.add_argument("--device", default="cuda" if _has_cuda() else "cpu", help="default: cuda if there is one")
    generate.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 where the device computes in it"
    )
    for knob, part in (("quantization", "denoiser"), ("text-encoder-quantization", "text encoders")):
        generate.add_argument(f"--{knob}", metavar="NAME", help=f"of the {part}: nf4, int8, ... (docs/quantization.md)")
    generate.add_argument("--denoiser-file", metavar="FILE", help="GGUF file in place of the model's own denoiser")
    generate.add_argument(
        "--offload", action="store_true", help="keep on the card only what works at the moment: less memory, more time"
    )
    generate.add_argument("--grid", action="store_true", help="write one more PNG with all pictures")

    info = verbs.add_parser("info", help="what an adapter file is, ours or another tool's")
    info.add_argument("file", type=Path, help="a .safetensors file, or a folder with one")
    return parser


def _train(arguments: Sequence[str]) -> int:
    from oft_diffusion.pocket import pocket_path
    from oft_diffusion.training.command import main as train_main

    return train_main(arguments, shipped={"pocket": pocket_path})


def _evaluate(arguments: Sequence[str]) -> int:
    from oft_diffusion.evaluation.command import main as evaluate_main

    return evaluate_main(arguments)


def _convert(arguments: Sequence[str]) -> int:
    from oft_diffusion.convert import convert_main

    return convert_main(arguments)


def _merge(arguments: Sequence[str]) -> int:
    from oft_diffusion.convert import merge_main

    return merge_main(arguments)


def _app(arguments: Sequence[str]) -> int:
    """The web app, which lies in the package in a wheel, and beside it in a checkout."""
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ConfigError("gradio is not installed", expected="it, for the app", fix="pip install 'oft-diffusion[app]'")
    inside = f"{__package__}.app"
    if find_spec(inside) is None:
        inside = "app"
        sys.path.insert(0, str(Path(__file__).parents[1]))
    return int(import_module(f"{inside}.main").main(arguments))


def _generate(options: argparse.Namespace) -> int:
    import torch

    from oft_diffusion.disk import is_writable
    from oft_diffusion.generate import Picture, generate
    from oft_diffusion.images import free_path, labelled_grid, save_png
    from oft_diffusion.load import load_pipeline, usual_dtype
    from oft_diffusion.pipeline import load_oft_weights
    from oft_diffusion.pocket import GUIDANCE, pocket_path

    for name in ("count", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} is too small", expected="1 or more", fix="raise it")
    if not is_writable(options.out):
        raise ConfigError(
            f"--out {options.out} cannot be written",
            expected="a folder, or a path where one can be made",
            fix="choose another",
        )
    adapters = [parse_adapter(text) for text in options.adapter]
    guidances: list[float] = []  # of adapters' trainings
    model = pocket_path() if options.model == "pocket" else options.model
    dtype = getattr(torch, options.dtype) if options.dtype else usual_dtype(options.device)
    pipe = load_pipeline(
        model, dtype, options.device, config_dir=options.config_dir, quantization=options.quantization,
        text_encoder_quantization=options.text_encoder_quantization, denoiser_file=options.denoiser_file,
        offload=options.offload,
    )  # fmt: skip
    for path, strength in adapters:
        adapter = load_oft_weights(pipe, path, strength=strength)
        print(f"adapter {adapter.name} on {', '.join(adapter.components)}, strength {adapter.strength:g}")
        told = adapter.metadata.training if adapter.metadata else {}
        _warn_without_trigger(options.prompt, adapter.metadata.trigger if adapter.metadata else None)
        guidances += [g for g in (told.get("guidance_scale"),) if isinstance(g, (int, float))]
        trained = told.get("clip_skip")
        if trained != options.clip_skip and (trained or options.clip_skip):
            print(f"warning: {adapter.name} was trained with clip skip {trained or 'off'}", file=sys.stderr)
    usual = GUIDANCE if options.model == "pocket" else 7.5
    guidance = next(iter(guidances), usual) if options.guidance is None else options.guidance
    paths: list[Path] = []

    def keep(picture: Picture, total: int) -> None:
        name = f"{picture.settings['seed']:05d}"
        paths.append(save_png(picture.image, free_path(options.out, name), picture.settings))
        print(f"{len(paths)} of {total}  {paths[-1]}", flush=True)

    pictures = generate(
        pipe,
        options.prompt,
        range(options.seed, options.seed + options.count),
        negative_prompt=options.negative,
        steps=options.steps,
        guidance=guidance,
        clip_skip=options.clip_skip,
        width=options.width,
        height=options.height,
        on_picture=keep,
    )
    if options.grid:
        columns = min(len(pictures), 4)
        rows = [[p.image for p in pictures[i : i + columns]] for i in range(0, len(pictures), columns)]
        grid = labelled_grid(rows, row_labels=[options.prompt] + [""] * (len(rows) - 1))
        print(f"grid  {save_png(grid, free_path(options.out, 'grid'), pictures[0].settings)}")
    return 0


def _warn_without_trigger(prompt: str, trigger: str | None) -> None:
    from oft_diffusion.metadata import has_trigger

    if trigger and not has_trigger(prompt, trigger):
        print(f"warning: the prompt lacks the adapter's trigger {trigger!r}", file=sys.stderr)


def _info(options: argparse.Namespace) -> int:
    from oft_diffusion.info import describe_file

    print("\n".join(describe_file(options.file)))
    return 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
