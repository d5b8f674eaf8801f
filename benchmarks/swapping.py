"""How long it takes to change adapters, side by side with PEFT and diffusers: benchmarks/data/swapping.csv.

python -m benchmarks.swapping            # measures and appends
python -m benchmarks.swapping --table    # the newest run as Markdown

On the UNet of Stable Diffusion 1.5 (real configuration, random weights, float32): adapters on q, k, v and out of every
attention. Ways are taken in turn, `--repeats` times; figures are medians, and their spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks.records import DATA, append, load
from oft_diffusion import (
    OFTConfig,
    fuse_oft,
    inject_oft,
    load_oft_weights,
    oft_state_dict,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
)
from oft_diffusion.inject import load_oft_state_dict

FILE = DATA / "swapping.csv"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 16
_SWAP, _FROM_FILE, _AT_HALF = "hot swap, in memory", "hot swap, from a file, checked", "the same at strength 0.5"
_PEFT = "PEFT OFT: unmerge and merge"
_NAMES = {_SWAP: "a hot swap in memory", _FROM_FILE: "one from a file", _AT_HALF: "that at strength 0.5"}


def unet() -> Any:
    """Stable Diffusion 1.5's."""
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval().requires_grad_(False)
    )


def ours(folder: Path) -> dict[str, Callable[[], object]]:
    """What a user of this package does: the calls of `docs/using.md`, and those for tensors in memory."""
    model = unet()
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**nothing, unet=model, scheduler=DDIMScheduler(), requires_safety_checker=False)
    bank = inject_oft(model, OFTConfig(block_size=32), "a")
    states, paths = [], []
    for seed in (1, 2):
        with torch.no_grad():
            bank.generators["a"].copy_(
                0.02 * torch.randn(bank.generators["a"].shape, generator=torch.Generator().manual_seed(seed))
            )
        states.append(oft_state_dict(model, "a"))
        paths.append(save_oft_weights(pipe, folder / f"{seed}.safetensors", "a"))
    bank.freeze("a")
    turn = _turns()

    def swap_at(strength: float) -> Callable[[], object]:
        def swap() -> None:
            load_oft_weights(pipe, paths[turn()], adapter_name="a", hotswap=True)

        return _after(lambda: set_oft_adapters(pipe, "a", strength), swap)

    def forget() -> None:
        set_oft_adapters(pipe, "a")
        bank.refresh()  # forgets the decomposition that fractions need

    return {
        _SWAP: _after(lambda: set_oft_adapters(pipe, "a"), lambda: load_oft_state_dict(model, states[turn()], "a")),
        _FROM_FILE: swap_at(1.0),
        _AT_HALF: swap_at(0.5),
        "strength, first time": _after(forget, lambda: set_oft_adapters(pipe, "a", 0.5)),
        "strength": lambda: set_oft_adapters(pipe, "a", (0.3, 0.7)[turn()]),
        "strength, linear": lambda: set_oft_adapters(pipe, "a", (0.3, 0.7)[turn()], mode="linear"),
        "back to 1": lambda: set_oft_adapters(pipe, "a"),
        "fuse": lambda: fuse_oft(pipe),
        "unfuse": lambda: unfuse_oft(pipe),
    }


def pefts_oft() -> dict[str, Callable[[], object]]:
    """PEFT has no hot swap of OFT: what is merged is unmerged, the other adapter made active, and merged."""
    config = peft.OFTConfig(oft_block_size=32, target_modules=TARGETS)
    model = peft.get_peft_model(unet(), config, "a")
    model.add_adapter("b", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.02)
    turn = _turns()
    model.merge_adapter(["a"])

    def swap() -> None:
        model.unmerge_adapter()
        model.merge_adapter([("a", "b")[turn()]])

    return {_PEFT: swap}


def diffusers_lora(folder: Path) -> dict[str, Callable[[], object]]:
    """diffusers' hot swap of LoRA."""
    model, states = unet(), []
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(config, "a")
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = {k: torch.randn_like(t) for k, t in peft.get_peft_model_state_dict(model, adapter_name="a").items()}
        states.append(state)
    model.save_lora_adapter(folder / "lora", adapter_name="a")
    turn = _turns()
    model.delete_adapters("a")
    model.load_lora_adapter(dict(states[0]), adapter_name="a", prefix=None)
    return {
        "diffusers LoRA: hot swap, in memory": lambda: model.load_lora_adapter(
            dict(states[turn()]), adapter_name="a", prefix=None, hotswap=True
        ),
        "diffusers LoRA: hot swap, from a file": lambda: model.load_lora_adapter(
            folder / "lora", weight_name="pytorch_lora_weights.safetensors", adapter_name="a", prefix=None, hotswap=True
        ),
    }


def measure(repeats: int, threads: int) -> None:
    """Append one run."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = {**ours(folder), **diffusers_lora(folder), **pefts_oft()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, way in ways.items():
                getattr(way, "before", lambda: None)()  # not timed
                started = time.perf_counter()
                way()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - started)
    rows = [
        {
            "way": name, "threads": threads, "repeats": repeats, "median": f"{statistics.median(values):.5f}",
            "least": f"{min(values):.5f}", "most": f"{max(values):.5f}",
        }
        for name, values in times.items()
    ]  # fmt: skip
    append(FILE, rows, "cpu")


def table() -> str:
    """The newest run."""
    rows = load(FILE)
    newest = [row for row in rows if row["date"] == rows[-1]["date"] and row["threads"] == rows[-1]["threads"]]
    newest = list({row["way"]: row for row in newest}.values())
    took = {row["way"]: float(row["median"]) for row in newest}
    swap = took[_SWAP]
    lines = ["| | ms, median (least to most) | of a hot swap |", "|---|---|---|"]
    for row in newest:
        median, least, most = (1000 * float(row[key]) for key in ("median", "least", "most"))
        lines.append(f"| {row['way']} | {median:.1f} ({least:.1f} to {most:.1f}) | {median / 1000 / swap:.1f} |")
    lines += [
        "",
        "PEFT's way takes "
        + ", ".join(f"{took[_PEFT] / took[way]:.0f} times as long as {name}" for way, name in _NAMES.items())
        + ".",
    ]
    told = newest[-1]
    lines += ["", f"{told['hardware']}, {told['threads']} thread(s), {told['repeats']} turns, torch {told['torch']}."]
    return "\n".join(lines)


def _after(before: Callable[[], object], way: Callable[[], object]) -> Callable[[], object]:
    """A way that is timed after something else was done."""

    def timed() -> object:
        return way()

    timed.before = before  # type: ignore[attr-defined]
    return timed


def _turns() -> Callable[[], int]:
    """0, 1, 0, 1, ..."""
    state = SimpleNamespace(at=0)

    def turn() -> int:
        state.at = 1 - state.at
        return int(state.at)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest run, measure nothing")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    options = parser.parse_args()
    if not options.table:
        measure(options.repeats, options.threads)
    print(table())


if __name__ == "__main__":
    main()
