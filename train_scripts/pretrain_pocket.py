"""Pretrains the pocket base and its classifier from nothing, in one command. Needs torch 2.9 or newer, for Muon.

python train_scripts/pretrain_pocket.py --out runs/pocket --export oft_diffusion/pocket

Stages: render pictures, train two classifiers (one is part of the autoencoder's loss, the other the judge), train a
wide autoencoder and condense its latents, encode the pictures, train the decoder on noisy latents, train denoiser and
text encoder together. Each stage leaves a snapshot in --out, as safetensors; running the same command again goes on
from there. All random draws of a step come from a generator seeded by (seed, stage, step), so on a CPU a resumed run is
equal to an uninterrupted one, and no generator state needs saving.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import OFTError
from oft_diffusion.pocket.pretrain.autoencoder import PictureLoss, cached_latents, condensed, train_decoder, train_vae
from oft_diffusion.pocket.pretrain.classifiers import PERCEPTION_WIDTHS, export_classifier, train_classifier
from oft_diffusion.pocket.pretrain.data import rendered
from oft_diffusion.pocket.pretrain.denoiser import Denoiser
from oft_diffusion.pocket.pretrain.setup import Setup
from oft_diffusion.pocket.pretrain.stage import Stage

STAGES = ("perception", "classifier", "vae", "decoder", "unet")


def main(argv: list[str] | None = None) -> None:
    """Run the stages in order; each begins where its snapshot ends."""
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.export:  # now: hours later would be a bad time to find out that it cannot be
        (args.export / "weights").mkdir(parents=True, exist_ok=True)
    pictures = rendered(args.out, args.pictures, args.seed)
    setup = Setup(args.out, pictures, args.seed, torch.device(args.device), args.bf16, args.snapshot_every)
    # A stage that is not asked for is as its snapshot left it.
    steps = {stage: getattr(args, f"{stage}_steps") if stage in args.stages else 0 for stage in STAGES}

    perception_stage, perception = train_classifier(setup, "perception", steps["perception"], PERCEPTION_WIDTHS)
    classifier_stage, classifier = train_classifier(setup, "classifier", steps["classifier"])
    picture_loss = PictureLoss(perception)
    vae_stage, wide = train_vae(setup, picture_loss, steps["vae"])
    vae, of = condensed(setup, wide, vae_stage.digest())
    latents = cached_latents(setup, vae, of)
    decoder_stage = train_decoder(setup, vae, latents, picture_loss, steps["decoder"], of)
    vae.requires_grad_(False)
    denoiser = Denoiser(setup, vae, steps["unet"], args.batch_size, of)
    denoiser.train(latents)
    if args.export:
        export_classifier(classifier, args.export / "classifier.safetensors")
        denoiser.export(args.export / "weights")
        stages = (perception_stage, classifier_stage, vae_stage, decoder_stage, denoiser.stage)
        _write_provenance(args, stages)


def _write_provenance(args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    """How the exported weights were made, for the model card."""
    made = {
        stage.path.stem: {"steps": stage.step, "minutes": round(stage.seconds / 60), "digest": stage.digest()}
        for stage in stages
    }
    settings = {name: getattr(args, name) for name in ("pictures", "batch_size", "seed", "bf16", "device")}
    text = json.dumps({"settings": settings, "stages": made}, indent=2) + "\n"
    write_atomically(args.export / "pretraining.json", text.encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket"), help="snapshots, pictures and previews")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write classifier and pipeline into it at the end"
    )
    parser.add_argument(
        "--stages", nargs="*", choices=STAGES, default=STAGES, help="train these; others are as their snapshots are"
    )
    parser.add_argument("--perception-steps", type=int, default=1200)
    parser.add_argument("--classifier-steps", type=int, default=800)
    parser.add_argument("--vae-steps", type=int, default=1250)
    parser.add_argument("--decoder-steps", type=int, default=500)
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32, help="of the denoiser")
    parser.add_argument("--pictures", type=int, default=40000, help="how many are rendered")
    parser.add_argument("--snapshot-every", type=int, default=500)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    try:
        main()
    except OFTError as error:
        sys.exit(f"error: {error}")
