"""What getting past quantized layers costs a training step, each library's, three ways: quantized_layers.csv.

python -m benchmarks.quantized_layers            # --device cuda on a card; the machine must be idle
python -m benchmarks.quantized_layers --table    # the newest figures as Markdown, from the CSV alone

A step is forward and backward of the pocket base's UNet, quantized, with our adapters, a batch of four at 32 x 32.
"ours" is `oft_diffusion.frozen`, whose backward dequantizes a weight once more and keeps nothing; "the library" its
layers as they are, whose graph keeps what it likes; "streamed" is `layer_offload = 1`, on a processor a copy of each
weight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import DATA, append, load
from benchmarks.turns import spread, take_turns
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.frozen import freeze_quantized, thaw_quantized
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import pocket_path
from oft_diffusion.quantization import SCHEMES
from oft_diffusion.streaming import stream_weights
from oft_diffusion.training.memory import Meter
from tests.quantization.backends import GGUF, denoiser_knobs

FILE = DATA / "quantized_layers.csv"
OURS, LIBRARY, STREAMED = "ours", "the library", "streamed"
NONE = "none"  # not quantized


def unet_of(kind: str, device: str, folder: Path, *, streamed: bool = False) -> Any:
    """The pocket base's UNet, quantized, with an adapter that is not the identity."""
    knobs = {} if kind == NONE else denoiser_knobs(kind, pocket_path(), folder)
    unet = load_pipeline(pocket_path(), torch.float32, device, **knobs).unet.requires_grad_(False).train()
    if streamed:
        stream_weights(unet, 1.0, torch.device(device))
    bank = inject_oft(unet, OFTConfig(block_size=32))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.02)
    return unet


def step_of(unet: Any, device: str) -> Callable[[], None]:
    """One forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(4, unet.config.in_channels, 32, 32, device=device)
    text = torch.randn(4, 32, unet.config.cross_attention_dim, device=device)
    times = torch.tensor([10, 300, 500, 900], device=device)
    return lambda: unet(x, times, text).sample.square().mean().backward()


@contextmanager
def _thawed(unet: Any) -> Any:
    thaw_quantized(unet)
    try:
        yield
    finally:
        freeze_quantized(unet)


def measure(kind: str, device: str, rounds: int) -> list[dict[str, str]]:
    """A row for each way past the layers of one kind."""
    with tempfile.TemporaryDirectory() as folder:
        unet = unet_of(kind, device, Path(folder))
        other = unet_of(kind, device, Path(folder), streamed=True)
    steps = {OURS: step_of(unet, device), STREAMED: step_of(other, device)}
    around: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    if kind not in (NONE, "nf4"):  # of which we leave the graph to bitsandbytes
        steps[LIBRARY] = steps[OURS]
        around[LIBRARY] = lambda: _thawed(unet)
    meter, peaks = Meter(torch.device(device)), {}
    for way, step in steps.items():
        with around.get(way, nullcontext)():
            step()
            step()
            peaks[way] = meter.growth(step)
    times, reasons = take_turns({way: {"step": step} for way, step in steps.items()}, rounds, device, around)
    if reasons:
        raise RuntimeError(f"steps that fail have no times: {reasons}")
    about = {"load": f"{os.getloadavg()[0]:.1f}"}
    return [
        {"quantization": kind, "way": way, "peak_bytes": str(peaks[way]), **about, **spread(times[way]["step"])}
        for way in times
    ]


def table() -> str:
    """Markdown: the newest rows of each kind of hardware, and their ratios to ours, round by round."""
    newest: dict[str, dict[tuple[str, str], Mapping[str, str]]] = {}
    for row in load(FILE):
        newest.setdefault(row["hardware"], {})[row["quantization"], row["way"]] = row
    parts = []
    for rows in newest.values():
        lines = ["| base | ms a step, ours | the library's time | streamed | peak, MiB, ours | the library's |"]
        lines.append("|---" * 6 + "|")
        for kind in dict.fromkeys(kind for kind, _ in rows):
            own, library = rows[kind, OURS], rows.get((kind, LIBRARY))
            cells = [f"{1000 * float(own['median']):.0f}"]
            cells += [_ratio(row, own) if row else "" for row in (library, rows[kind, STREAMED])]
            cells += [f"{int(row['peak_bytes']) / 2**20:.0f}" if row else "" for row in (own, library)]
            lines.append(f"| `{kind}` | {' | '.join(cells)} |")
        some = next(iter(rows.values()))
        about = (
            f"{some['hardware']}, {some['threads']} threads, float32; {some['rounds']} rounds; torch {some['torch']}"
        )
        parts.append("\n".join([*lines, "", f"{about}; commit {some['commit']}; {some['date']}."]))
    return "\n\n".join(parts) or "Nothing is measured yet."


def _ratio(row: Mapping[str, str], own: Mapping[str, str]) -> str:
    pairs = zip(row["seconds"].split(), own["seconds"].split(), strict=True)
    low, middle, high = statistics.quantiles([float(a) / float(b) for a, b in pairs], n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=16, help="steps of each way (default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        ways = [way for way in SCHEMES.values() if way.trains and (options.device == "cuda" or not way.needs_cuda)]
        for kind in (NONE, *(way.name for way in ways), GGUF):
            append(FILE, measure(kind, options.device, options.rounds), options.device)
    print(table())


if __name__ == "__main__":
    main()
