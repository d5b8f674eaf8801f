"""`oft-diffusion evaluate`: the figures of one adapter on the pocket base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.evaluation.looks import Looks, instance_images, looks_of
from oft_diffusion.evaluation.measure import evaluate
from oft_diffusion.load import load_pipeline
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.pipeline import load_oft_weights
from oft_diffusion.pocket import GUIDANCE, STEPS, SUBJECTS, pocket_path, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.vocabulary import is_pocket_tokenizer
from oft_diffusion.training.find import find_base


def main(argv: Sequence[str]) -> int:
    """Draw, read, print the table.

    Returns:
        The exit status, 0.

    Raises:
        OFTError: the adapter or the images cannot be used, or the base is no pocket base.
    """
    options = _parser().parse_args(argv)
    for name in ("count", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} is too small", expected="1 or more", fix="raise it")
    images = _instance_images(options)
    model = str(pocket_path()) if options.model == "pocket" else options.model
    pipe = load_pipeline(model, device=options.device)
    _check_base(pipe, options.model)
    classifier = load_classifier(options.device)
    looks = looks_of(classifier, images)
    adapter = load_oft_weights(pipe, options.adapter)
    trigger = options.trigger or (adapter.metadata.trigger if adapter.metadata else None)
    if not trigger:
        raise ConfigError(
            f"{options.adapter} does not say what its trigger is",
            expected="--trigger WORD",
            fix="give the one of its training",
        )
    _check_adapter(adapter.metadata, looks, model)
    shown = ", ".join(f"{name} {value}" for name, value in looks.uncaptioned.items())
    print(f"subject  a {looks.object} with {shown}; in its images {looks.colour}, at {', '.join(looks.backgrounds)}")
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
            on_picture=bar.update,
        )
    print("in brackets 95 % intervals:")
    print(found.text())
    if options.out:
        print(f"written to {found.save(options.out)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oft-diffusion evaluate",
        description="Draws fixed prompts from fixed seeds with and without an adapter on the pocket base, reads the "
        "pictures, and prints how well the subject is learnt and how well the rest is kept.",
    )
    parser.add_argument("adapter", help="a run's folder, a .safetensors file or a hub id, trained on the pocket base")
    parser.add_argument("--model", default="pocket", help="folder of a base of the pocket world (default: pocket)")
    parser.add_argument("--subject", choices=sorted(SUBJECTS), help="which example subject it was trained on")
    parser.add_argument("--instance-dir", type=Path, help="or the folder with its instance images")
    parser.add_argument("--trigger", help="its trigger (default: the one in the file)")
    parser.add_argument("--count", type=int, default=64, help="pictures per set, with and without (default: 64)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"guidance scale (default: {GUIDANCE})")
    parser.add_argument("--device", default="cpu", help="as torch spells it (default: cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write figures and every picture's reading as JSON")
    return parser


def _instance_images(options: argparse.Namespace) -> list[Image.Image]:
    if (options.subject is None) == (options.instance_dir is None):
        raise ConfigError(
            "what the subject looks like is not known", expected="--subject or --instance-dir, not both", fix="give one"
        )
    return instance_images(options.instance_dir or subjects_path(options.subject), "--instance-dir")


def _check_base(pipe: Any, name: str) -> None:
    """The classifier reads drawings of the pocket world; anything else it would read wrongly, with confidence."""
    if not is_pocket_tokenizer(getattr(pipe, "tokenizer", None)):
        raise ConfigError(
            f"{name} is no base of the pocket world",
            expected="the shipped one, or one that train_scripts/pretrain_pocket.py made",
            fix="leave --model out",
        )


def _check_adapter(metadata: AdapterMetadata | None, looks: Looks, model: str) -> None:
    if metadata is None:
        return
    if metadata.class_word and metadata.class_word != looks.object:
        raise ConfigError(
            f"the adapter was trained on a {metadata.class_word}, and the images show a {looks.object}",
            expected="the subject of its training",
            fix="name that one with --subject or --instance-dir",
        )
    trained_on = metadata.base.get("fingerprint")
    if trained_on and trained_on != find_base(model).fingerprint():
        print("warning: the adapter was trained on another base than this one", file=sys.stderr)
