"""What merging into a quantized base loses, rotations beside LoRA's: benchmarks/data/quantized_merge.csv.

python -m benchmarks.quantized_merge --trained FOLDER  # measures and appends; without FOLDER, random changes alone
python -m benchmarks.quantized_merge --table           # the newest run as Markdown

Of each attention layer of the pocket base a copy is quantized. Its dequantized weight W is changed, by a rotation of a
given spectral norm of its generators, or by a LoRA of rank 16 whose B A is as large as that change, and quantized anew.
Both directions are random. FOLDER has what runs of `benchmarks.quantized_training` made of the base's own weights, a
rotation and a LoRA of rank 16 that learned the same subject, each with a change of its own size.

Lost is `|Q(W') - W'| / |W'|`, beside what quantizing loses of the float weight to begin with; and, since W' is only as
good as what arrives of the change, `|Q(W') - W'| / |W' - W|`. The range is by how much the largest number of any group
that shares a scale has grown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.methods import LORA, OURS
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
TRAINED = "trained"  # in place of a norm
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


def trained_pairs(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """Weights by method and layer of each subject and seed that both methods have learned.

    Raises:
        SystemExit: there are none.
    """
    found = [
        {"ours": load_file(path), "LoRA": load_file(other)}
        for path in sorted(folder.glob(f"{OURS}-*.safetensors"))
        if (other := path.with_name(path.name.replace(OURS, LORA, 1))).exists()
    ]
    if not found:
        raise SystemExit(f"{folder} has no weights of {OURS} and {LORA}: run benchmarks.quantized_training first")
    return found


def measure(trained: Path | None = None) -> None:
    """Append one run."""
    pipe = load_pipeline(pocket_path())
    attention = [(target.name, target.module) for target in find_targets(pipe.unet, "attention")]
    pairs = trained_pairs(trained) if trained else []
    rows: list[dict[str, str]] = []
    for name in WAYS:
        for index, (layer, module) in enumerate(attention):
            assert isinstance(module, nn.Linear)
            base, begin = _at_first(module, name)
            for norm in NORMS:
                draw = torch.Generator().manual_seed(index)
                turned = rotated(base, norm, draw)
                changed = {"ours": turned, "LoRA": with_lora(base, float((turned - base).norm()), draw)}
                about = {"layer": layer, "norm": str(norm), "at_first": begin}
                rows += _rows(module, name, base, changed, about)
        for number, pair in enumerate(pairs):
            for layer in pair["ours"]:
                part, _, path = layer.partition(".")
                module = getattr(pipe, part).get_submodule(path)
                changed = {method: own[layer] for method, own in pair.items()}
                about = {"layer": f"{layer}, {number}", "norm": TRAINED, "at_first": _at_first(module, name)[1]}
                rows += _rows(module, name, module.weight.detach(), changed, about)
    append(FILE, rows)


def _at_first(layer: nn.Linear, name: str) -> tuple[Tensor, str]:
    """A layer's dequantized weight, and what quantizing lost of it, as rows have it."""
    weight, base = layer.weight.detach(), quantized(layer, scheme(name)).dequantized()
    return base, f"{float((base - weight).norm() / weight.norm()):.5f}"


def _rows(
    layer: nn.Linear, name: str, base: Tensor, changed: Mapping[str, Tensor], about: Mapping[str, str]
) -> list[dict[str, str]]:
    """What quantizing each changed weight of a layer loses, by method."""
    rows = []
    for method, wanted in changed.items():
        error, change = lost(quantized(layer, scheme(name)), wanted), float((wanted - base).norm())
        rows.append(
            {
                "quantization": name, "layer": about["layer"], "norm": about["norm"], "method": method,
                "at_first": about["at_first"], "change": f"{change / float(base.norm()):.5f}",
                "lost": f"{error / float(wanted.norm()):.5f}", "of_change": f"{error / change:.5f}",
                "range": f"{grown(base, wanted, name):.4f}",
            }
        )  # fmt: skip
    return rows


def table() -> str:
    """The newest run: medians over layers; in how many of them a rotation loses less of its change than a LoRA."""
    rows = load(FILE)
    if not rows:
        return "Not measured yet."
    newest = [row for row in rows if row["date"] == rows[-1]["date"] and row["commit"] == rows[-1]["commit"]]
    heads = ["norm", "lost at first", "change, ours", "LoRA", "lost by merging, ours", "LoRA"]
    heads += ["of the change, ours", "LoRA", "less than LoRA's in", "range, ours", "LoRA"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for way in WAYS:
        for norm in dict.fromkeys(row["norm"] for row in newest):
            own = [row for row in newest if (row["quantization"], row["norm"]) == (way, norm)]
            by = {method: {row["layer"]: row for row in own if row["method"] == method} for method in ("ours", "LoRA")}
            cells = [f"`{way}`", norm, _median(by["ours"], "at_first", 3)]
            for column, places in (("change", 2), ("lost", 3), ("of_change", 3), ("range", 2)):
                cells += [_median(rows, column, places) for rows in by.values()]
            less = sum(
                float(row["of_change"]) < float(by["LoRA"][layer]["of_change"]) for layer, row in by["ours"].items()
            )
            cells.insert(-2, f"{less} of {len(by['ours'])}")
            lines.append(f"| {' | '.join(cells)} |")
    last = newest[-1]
    about = f"torch {last['torch']}, commit {last['commit']}; {last['date']}"
    lines += ["", f"Medians over layers of the pocket base; {about}."]
    return "\n".join(lines)


def _median(rows: Mapping[str, Mapping[str, str]], column: str, places: int) -> str:
    return f"{statistics.median(float(row[column]) for row in rows.values()):.{places}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest run, measure nothing")
    parser.add_argument("--trained", type=Path, metavar="FOLDER", help="weights that trained adapters made of the base")
    options = parser.parse_args()
    if not options.table:
        measure(options.trained)
    print(table())


if __name__ == "__main__":
    main()
