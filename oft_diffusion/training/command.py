"""`oft-diffusion train`, and what train_scripts/train_dreambooth.py runs: a command line to a run to an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from oft_diffusion.errors import OFTError, TrainingError, first_line
from oft_diffusion.training.checkpoint import list_checkpoints
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.estimate import estimate
from oft_diffusion.training.loop import TrainingRun, train
from oft_diffusion.training.savings import Phase, savings


def main(
    argv: Sequence[str] | None = None,
    *,
    program: str = "oft-diffusion train",
    shipped: Mapping[str, Callable[[], Path]] | None = None,
) -> int:
    """Train as a command line says, or with `--estimate` say what it would take.

    Args:
        argv: the options; this process's if None.
        program: how usage and the resume command begin.
        shipped: names that `--model` may give instead of a path, with what finds them.

    Returns:
        The exit status: 0, 1 after an error of ours, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog=program, description="DreamBooth: pictures of a subject to an OFT adapter.")
    parser.add_argument(
        "--estimate", action="store_true", help="say how long it would take and how much memory; train nothing"
    )
    TrainConfig.add_arguments(parser)
    options = parser.parse_args(dashed(sys.argv[1:] if argv is None else argv))
    run: TrainingRun | None = None
    try:
        config = TrainConfig.from_namespace(options, shipped)
        if options.estimate:
            return _estimate(config)
        with train(config, program=program) as run:
            for _ in run:
                pass
    except OFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {_too_little(config, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted" if options.estimate else _cut_off(run), file=sys.stderr)
        return 130
    result = run.result
    if run.accelerator.is_main_process:
        print(f"adapter     {result.adapter}  ({result.adapter.stat().st_size / 1e6:.2f} MB, {result.steps} steps)")
        print(f"checkpoint  {result.checkpoint}")
        for path in result.pictures[-1:]:
            print(f"pictures    {path}")
        if result.report:
            print(f"report      {result.report}")
    return 130 if result.interrupted else 0


def _estimate(config: TrainConfig) -> int:
    found = estimate(config)
    if PartialState().is_main_process:
        print("\n".join((*found.notes, found.summary())))
    return 0


def _too_little(config: TrainConfig, error: torch.OutOfMemoryError) -> TrainingError:
    """The error for a card that was full."""
    phases: tuple[Phase, ...] = ("steps", "encoding", "loading", "grids")  # which it was is not known here
    helping = dict.fromkeys(words for phase in phases for words in savings(config, phase, torch.device("cuda")))
    return TrainingError(
        f"the card's memory does not suffice ({first_line(error)})",
        expected="a card with more of it, or settings that take less (--estimate says how much they take)",
        fix=f"use {', or '.join(helping)}",
    )


def _cut_off(run: TrainingRun | None) -> str:
    """What a Ctrl-C leaves that did not wait for the step in progress."""
    if run is None or run.step == 0:
        return "interrupted before the first step; class images made so far will be used again"
    if list_checkpoints(run.output_dir):
        return (
            f"interrupted after step {run.step}, unsaved; to go on from the last checkpoint:\n  {run.resume_command()}"
        )
    return f"interrupted after step {run.step}, unsaved; there is no checkpoint to go on from"


def dashed(argv: Sequence[str]) -> list[str]:
    """Options with underscores, as knobs are spelled in TOML, mean the same as those with dashes."""
    spelled = []
    for word in argv:
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return spelled
