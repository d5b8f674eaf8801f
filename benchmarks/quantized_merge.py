"""What merging into a quantized base loses, rotations beside LoRA's: benchmarks/data/quantized_merge.csv.

python -m benchmarks.quantized_merge            # measures and appends
python -m benchmarks.quantized_merge --table    # the newest run as Markdown

Of each attention layer of the pocket base a copy is quantized. Its dequantized weight W is changed, by a rotation of a
given spectral norm of its generators, or by a LoRA of rank 16 whose B A is as large as that change, and quantized anew.
Both directions are random. Lost is `|Q(W') - W'| / |W'|`, beside what quantizing loses of the float weight to begin
with; and, since W' is only as good as what arrives of the change, `|Q(W') - W'| / |W' - W|`. The range is by how much
the largest number of any group that shares a scale has grown.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn

from benchmarks.records import DATA, append, load
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import pocket_path
from oft_diffusion.quantization import Scheme, quantize_with_bitsandbytes, scheme
from oft_diffusion.quantized import QuantizedWeight, quantized_weight
from oft_diffusion.rotation import cayley_delta, unpack
from oft_diffusion.targets import find_targets

FILE = DATA / "quantized_merge.csv"
WAYS = ("nf4", "int8")
NORMS = (0.1, 0.3, 0.56)
BLOCK_SIZE, RANK = 32, 16


def rotated(weight: Tensor, norm: float, draw: torch.Generator) -> Tensor:
    """A weight `(out, in)` behind random rotations, of generators of that spectral norm."""
    blocks = weight.shape[1] // BLOCK_SIZE
    q = unpack(torch.randn(blocks, BLOCK_SIZE * (BLOCK_SIZE - 1) // 2, generator=draw))
    q *= (norm / torch.linalg.matrix_norm(q, 2))[:, None, None]
    turned = weight.view(len(weight), blocks, BLOCK_SIZE)
    change = torch.einsum("orb,rcb->orc", turned, cayley_delta(q))  # W R^T
    return weight + change.reshape(weight.shape)


def with_lora(weight: Tensor, size: float, draw: torch.Generator) -> Tensor:
    """A weight with a random B A of that Frobenius norm added."""
    change = torch.randn(len(weight), RANK, generator=draw) @ torch.randn(RANK, weight.shape[1], generator=draw)
    return weight + change * (size / change.norm())


def quantized(layer: nn.Linear, way: Scheme) -> QuantizedWeight:
    """A copy of a layer, quantized."""
    model = nn.Sequential(copy.deepcopy(layer))
    quantize_with_bitsandbytes(model, way, torch.float32)
    found = quantized_weight(model[0])
    assert found is not None
    return found


def lost(weight: QuantizedWeight, wanted: Tensor) -> float:
    """Frobenius norm of what quantizing a weight anew loses. The layer has it afterwards."""
    weight.quantize(wanted)
    return float((weight.dequantized() - wanted).norm())


def grown(base: Tensor, wanted: Tensor, name: str) -> float:
    """Of all groups with one scale (NF4: 64 numbers of a row, or 32; int8: a row), the largest growth of its range."""
    group = base.shape[1] if name == "int8" else (64 if base.shape[1] % 64 == 0 else 32)
    before, after = (weight.reshape(-1, group).abs().amax(dim=1) for weight in (base, wanted))
    return float((after / before).max())


def measure() -> None:
    """Append one run."""
    unet = load_pipeline(pocket_path()).unet
    layers: dict[str, nn.Module] = {target.name: target.module for target in find_targets(unet, "attention")}
    rows = []
    for name in WAYS:
        for index, (layer, module) in enumerate(layers.items()):
            assert isinstance(module, nn.Linear)
            first = quantized(module, scheme(name))
            base = first.dequantized()
            begin = float((base - module.weight.detach()).norm() / module.weight.detach().norm())
            for norm in NORMS:
                draw = torch.Generator().manual_seed(index)
                turned = rotated(base, norm, draw)
                change = float((turned - base).norm())
                for method, wanted in (("ours", turned), ("LoRA", with_lora(base, change, draw))):
                    error = lost(quantized(module, scheme(name)), wanted)
                    rows.append(
                        {
                            "quantization": name, "layer": layer, "norm": norm, "method": method,
                            "at_first": f"{begin:.5f}", "change": f"{change / float(base.norm()):.5f}",
                            "lost": f"{error / float(wanted.norm()):.5f}", "of_change": f"{error / change:.5f}",
                            "range": f"{grown(base, wanted, name):.4f}",
                        }
                    )  # fmt: skip
    append(FILE, rows)


def table() -> str:
    """The newest run: medians over layers; in how many of them a rotation loses less of its change than a LoRA."""
    rows = load(FILE)
    if not rows:
        return "Not measured yet."
    newest = [row for row in rows if row["date"] == rows[-1]["date"] and row["commit"] == rows[-1]["commit"]]
    heads = ["norm", "change", "lost at first", "lost by merging, ours", "LoRA", "of the change, ours", "LoRA"]
    heads += ["less than LoRA's in", "range, ours", "LoRA"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]

    def median(way: str, norm: float, method: str, column: str) -> float:
        found = [row for row in newest if (row["quantization"], row["norm"], row["method"]) == (way, str(norm), method)]
        return statistics.median(float(row[column]) for row in found)

    def won(way: str, norm: float) -> str:
        of: dict[str, dict[str, float]] = {}
        for row in newest:
            if (row["quantization"], row["norm"]) == (way, str(norm)):
                of.setdefault(row["layer"], {})[row["method"]] = float(row["of_change"])
        return f"{sum(own['ours'] < own['LoRA'] for own in of.values())} of {len(of)}"

    for way in WAYS:
        for norm in NORMS:
            one = [median(way, norm, "ours", column) for column in ("change", "at_first")]
            both = [median(way, norm, m, column) for column in ("lost", "of_change") for m in ("ours", "LoRA")]
            cells = [f"`{way}`", f"{norm}", f"{one[0]:.2f}", *(f"{x:.3f}" for x in (one[1], *both)), won(way, norm)]
            cells += [f"{median(way, norm, method, 'range'):.2f}" for method in ("ours", "LoRA")]
            lines.append(f"| {' | '.join(cells)} |")
    layers = len({row["layer"] for row in newest})
    last = newest[-1]
    about = f"torch {last['torch']}, commit {last['commit']}; {last['date']}"
    lines += ["", f"Medians over {layers} layers of the pocket base; {about}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest run, measure nothing")
    if not parser.parse_args().table:
        measure()
    print(table())


if __name__ == "__main__":
    main()
