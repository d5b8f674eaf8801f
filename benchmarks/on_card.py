"""All measurements that need a CUDA card, each whatever became of the one before: `make bench-gpu`.

python -m benchmarks.on_card                                           # all of them; that has not been run yet
python -m benchmarks.on_card --parts models --minutes 8 --out FOLDER   # a part, where a card is lent for minutes
python -m benchmarks.on_card --parts peers --minutes 3 --out FOLDER    # all methods upon SD 1.5

It takes a Python that has this checkout on its path, installed or not, what the package needs with its extras train,
eval and quant, and peft and lycoris-lora. Rows are appended to benchmarks/data. What changes there is copied to FOLDER
every few seconds, eight files at most, so that a machine that is taken away has given what it had. With these back in
benchmarks/data of the same tree, on the same hardware, `models` and `peers` go on where they stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.records import DATA

# By part, modules of `benchmarks` and their options.
PARTS: dict[str, list[list[str]]] = {
    "models": [["speed", "--device", "cuda"]],
    "peers": [["speed", "--device", "cuda", "--only", "SD 1.5 (train, bfloat16, batch 2,"]],
    "kernels": [
        ["rotate_bandwidth"], ["stages", "--device", "cuda"], ["build_forms", "--device", "cuda"], ["fused_linear"],
    ],
    "memory": [
        ["card_memory", "--minutes", "2"],
        ["card_memory", "--families", "SDXL", "--minutes", "1", "--settings", '{"layer_offload": 1.0}'],
    ],
    "quantized": [["quantized_times", "--device", "cuda"], ["quantized_layers", "--device", "cuda"]],
}  # fmt: skip
COPIED_EVERY = 5.0  # seconds


def measure(parts: Sequence[str], minutes: float, out: Path | None) -> list[str]:
    """Run them in processes of their own.

    Args:
        parts: names of `PARTS`.
        minutes: for the models, and for the peers; the others take what they take.
        out: a folder for copies of the data that the run changes.

    Returns:
        What failed.
    """
    failed = []
    before = _digests()
    for part in parts:
        for module, *options in PARTS[part]:
            limit = ["--minutes", f"{minutes:g}"] if module == "speed" else []
            command = [sys.executable, "-m", f"benchmarks.{module}", *options, *limit]
            print("::", *command[2:], flush=True)
            with _copied(out, before):
                # Or the profiler would write two lines for every count.
                environment = {"KINETO_LOG_LEVEL": "99", **os.environ}
                if subprocess.run(command, env=environment, check=False).returncode:
                    failed.append(module)
    return failed


@contextmanager
def _copied(out: Path | None, before: Mapping[Path, str]) -> Iterator[None]:
    """Copy what changes inside to a folder, again and again: amid a measurement a machine can be taken away, too."""
    if out is None:
        yield
        return
    ended = threading.Event()

    def copy_until_ended() -> None:
        while not ended.wait(COPIED_EVERY):
            _copy_changed(out, before)

    copying = threading.Thread(target=copy_until_ended, daemon=True)
    copying.start()
    try:
        yield
    finally:
        ended.set()
        copying.join()
        _copy_changed(out, before)


def _copy_changed(out: Path, before: Mapping[Path, str]) -> None:
    """The files of the data that are not what they were: only a few may come back from a machine that is lent."""
    out.mkdir(parents=True, exist_ok=True)
    for file, digest in _digests().items():
        if digest != before.get(file):
            shutil.copy2(file, out)


def _digests() -> dict[Path, str]:
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in DATA.glob("*.csv")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="(default: all)")
    parser.add_argument(
        "--minutes", type=float, default=12.0,
        help="after which the models begin nothing, nor the peers, which have as many (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="copies of the data that changes go there")
    options = parser.parse_args()
    if failed := measure(options.parts, options.minutes, options.out):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
