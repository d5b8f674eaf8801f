"""All measurements that need a CUDA card, each whatever became of the one before: `make bench-gpu`.

python -m benchmarks.on_card                                           # meant for twenty minutes
python -m benchmarks.on_card --parts models --minutes 9 --out FOLDER   # a part of it, for a machine lent for less

It takes a Python that has this checkout and its extras train, eval and quant on its path, installed or not. Rows are
appended to benchmarks/data. After each measurement all of them are copied to FOLDER, so that a machine that is taken
away has given what it had; given the same commit, `models` goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import DATA

# By part, modules of `benchmarks` and their options.
PARTS: dict[str, list[list[str]]] = {
    "models": [["speed", "--device", "cuda"]],
    "kernels": [
        ["rotate_bandwidth"], ["stages", "--device", "cuda"], ["build_forms", "--device", "cuda"], ["fused_linear"],
    ],
    "memory": [["card_memory", "--minutes", "2"]],
    "quantized": [["quantized_times", "--device", "cuda"]],
}  # fmt: skip


def measure(parts: Sequence[str], minutes: float, out: Path | None) -> list[str]:
    """Run them in processes of their own.

    Args:
        parts: names of `PARTS`.
        minutes: for the models; the others take what they take.
        out: a folder for copies of the data.

    Returns:
        What failed.
    """
    failed = []
    for part in parts:
        for module, *options in PARTS[part]:
            limit = ["--minutes", f"{minutes:g}"] if part == "models" else []
            command = [sys.executable, "-m", f"benchmarks.{module}", *options, *limit]
            print("::", *command[2:], flush=True)
            # Or the profiler would write two lines for every count.
            if subprocess.run(command, env={"KINETO_LOG_LEVEL": "99", **os.environ}, check=False).returncode:
                failed.append(module)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                for file in DATA.glob("*.csv"):
                    shutil.copy2(file, out)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="(default: all)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for the models (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="copies of the data go there")
    options = parser.parse_args()
    if failed := measure(options.parts, options.minutes, options.out):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
