"""The command line of a benchmark that measures a processor or a card, and prints a table of what it has kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

INCOMPLETE = 3  # exit status of a measurement that had too little time for all of it


def run(
    about: str | None,
    measure: Callable[[str, int], None],
    table: Callable[[], str],
    rounds: int,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> None:
    """Parse the options, measure unless the table alone is asked for, and print it.

    Args:
        about: the module's docstring.
        measure: appends one run, given the device and the number of rounds.
        table: the newest runs as Markdown.
        rounds: by default.
        devices: those that it measures, the usual one first.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest runs, measure nothing")
    parser.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no CUDA device: this measures a card")
        measure(options.device, options.rounds)
    print(table())
