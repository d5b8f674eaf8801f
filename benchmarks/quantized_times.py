"""Time and memory of a training step upon quantized bases, ours beside PEFT's LoRA and OFT: quantized_times.csv.

python -m benchmarks.quantized_times            # --device cuda on a card; the machine must be idle
python -m benchmarks.quantized_times --table    # the newest figures as Markdown, from the CSV alone

The steps are those of `benchmarks.quantized_training`. All methods upon one kind of base lie in one process and take
turns, as `benchmarks.turns` says, so that a ratio is of steps side by side.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.methods import LORA
from benchmarks.pocket_subjects import FINAL
from benchmarks.quantized_learner import step_bytes, training_steps
from benchmarks.quantized_run import Bench, Task
from benchmarks.quantized_tables import Row
from benchmarks.quantized_training import METHODS, QUANTIZATIONS, settings_for
from benchmarks.records import DATA, append, load
from benchmarks.turns import spread, take_turns

FILE = DATA / "quantized_times.csv"
SETTLING = 2  # steps of each method before the clock runs
_RATE, _EPSILON = 1e-3, 1e-8  # what they are makes no difference to a step's time


def measure(bench: Bench, quantization: str, rounds: int) -> list[dict[str, str]]:
    """A row for each method upon one kind of base."""
    rows, training = {}, {}
    for method in METHODS:
        config, plan, learner = bench.prepare(Task("times", quantization, method, FINAL[1], 0, _RATE, _EPSILON))
        training[method] = training_steps(learner, config, plan)
        trained = sum(p.numel() for p in learner.trained)
        rows[method] = {
            "quantization": quantization,
            "method": method,
            "adapter": learner.began,
            "parameters": str(trained),
            "dtype": config.mixed_precision,
            "peak_bytes": str(step_bytes(training[method], bench.device, trained)),
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        for _ in range(SETTLING):
            next(training[method])
    stage = {method: {"step": lambda steps=steps: next(steps)} for method, steps in training.items()}
    times, reasons = take_turns(stage, rounds, str(bench.device))
    if reasons:
        raise RuntimeError(f"steps that fail have no times: {reasons}")
    return [row | spread(times[method]["step"]) for method, row in rows.items()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: of each kind of hardware and dtype the newest rows, and their ratio to LoRA's, round by round."""
    groups: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        groups.setdefault((row["hardware"], row["dtype"]), {})[row["quantization"], row["method"]] = row
    parts = []
    for cells in groups.values():
        lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        for (base, method), row in cells.items():
            lora = cells[base, LORA]
            pairs = zip(_seconds(row), _seconds(lora), strict=True)
            times = [_spread([1000 * s for s in _seconds(row)], 1), _spread([a / b for a, b in pairs], 2)]
            peak, theirs = int(row["peak_bytes"]), int(lora["peak_bytes"])
            shown = [f"`{base}`", method, row["adapter"], row["parameters"], *times, f"{peak / 2**20:.1f}"]
            lines.append(f"| {' | '.join([*shown, f'{peak / theirs:.2f}'])} |")
        about = (
            f"{row['hardware']}, {row['threads']} threads, {'float32' if row['dtype'] == 'no' else row['dtype']}; "
            f"{row['rounds']} rounds; torch {row['torch']}; commit {row['commit']}; {row['date']}. "
            "Peak of a step, above base and adapter."
        )
        parts.append("\n".join([*lines, "", about]))
    return "\n\n".join(parts) or "Nothing is measured yet."


_COLUMNS = (
    "base", "method", "adapter", "parameters", "ms a step", "of LoRA's", "peak memory, MiB", "of LoRA's",
)  # fmt: skip


def _seconds(row: Row) -> list[float]:
    return [float(word) for word in row["seconds"].split()]


def _spread(values: Sequence[float], places: int) -> str:
    middle, low, high = (float(spread(values)[name]) for name in ("median", "low", "high"))
    return f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true", help="even where the device computes in bfloat16")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/quantized-times"), help="class images")
    options = parser.parse_args()
    if not options.table:
        settings = settings_for(options.device, float32=options.float32)
        bench = Bench(settings, 1, options.out, options.device, busy=False, validation=1)
        for quantization in QUANTIZATIONS:
            append(FILE, measure(bench, quantization, options.rounds), options.device)
    print(table(load(FILE)))


if __name__ == "__main__":
    main()
