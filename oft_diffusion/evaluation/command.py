"""`oft-diffusion evaluate`: the figures of one adapter on the pocket base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.evaluate import GUIDANCE, STEPS, evaluate, looks_of
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.load import load_pipeline
from oft_diffusion.pipeline import load_oft_weights
from oft_diffusion.pocket import SUBJECTS, pocket_path, subjects_path
from oft_diffusion.pocket.classifier import load_classifier


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oft-diffusion evaluate",
        description="Draws fixed prompts from fixed seeds with and without an adapter on the pocket base, reads the "
        "pictures, and prints subject hit, prompt fidelity, preservation, leakage and memorisation.",
    )
    parser.add_argument("adapter", help="a run's folder, a .safetensors file or a hub id, trained on the pocket base")
    parser.add_argument("--model", default="pocket", help="folder of a base of the pocket world (default: pocket)")
    parser.add_argument("--subject", choices=sorted(SUBJECTS), help="which example subject it was trained on")
    parser.add_argument("--instance-dir", type=Path, help="or the folder with its instance images")
    parser.add_argument("--trigger", help="its trigger (default: the one in the file)")
    parser.add_argument("--count", type=int, default=64, help="pictures per figure, with and without (default: 64)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"guidance scale (default: {GUIDANCE})")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write figures and every picture's reading as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Draw, read, print the table.

    Returns:
        The exit status, 0.

    Raises:
        OFTError: the adapter or the pictures cannot be used, or the base is no pocket base.
    """
    options = _parser().parse_args(argv)
    if options.count < 1 or options.steps < 1:
        raise ConfigError("--count and --steps are too small", expected="1 or more", fix="raise them")
    pictures = _instance_images(options)
    pipe = load_pipeline(pocket_path() if options.model == "pocket" else options.model, device=options.device)
    classifier = load_classifier(options.device)
    looks = looks_of(classifier, pictures)
    adapter = load_oft_weights(pipe, options.adapter)
    trigger = options.trigger or (adapter.metadata.trigger if adapter.metadata else None)
    if not trigger:
        raise ConfigError(
            f"{options.adapter} does not say what its trigger is",
            expected="--trigger WORD",
            fix="give the one of its training",
        )
    shown = ", ".join(f"{name} {value}" for name, value in looks.uncaptioned.items())
    print(f"subject  a {looks.object} with {shown}; in its pictures {looks.colour}, at {', '.join(looks.backgrounds)}")
    with tqdm(total=2 * len(SETS) * options.count, desc="drawing", unit="picture", disable=None) as bar:
        found = evaluate(
            pipe,
            adapter.name,
            classifier=classifier,
            looks=looks,
            trigger=trigger,
            count=options.count,
            steps=options.steps,
            guidance=options.guidance,
            on_pictures=bar.update,
        )
    print("per cent of pictures, with 95 % bootstrap intervals:")
    print(found.table())
    if options.out:
        print(f"written to {found.save(options.out)}")
    return 0


def _instance_images(options: argparse.Namespace) -> list[Image.Image]:
    if (options.subject is None) == (options.instance_dir is None):
        raise ConfigError(
            "what the subject looks like is not known", expected="--subject or --instance-dir, not both", fix="give one"
        )
    folder = options.instance_dir or subjects_path(options.subject)
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]
