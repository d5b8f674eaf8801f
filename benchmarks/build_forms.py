"""Ways to build D, beside each other: how long they take, and how near they come: benchmarks/data/build_forms.csv.

python -m benchmarks.build_forms                  # measures the processor and appends
python -m benchmarks.build_forms --device cuda    # a CUDA card
python -m benchmarks.build_forms --table          # the newest run of each machine as Markdown

Errors are of float32 against the exact rotation in float64: the rotation's own, how far it is from orthogonal, and that
of the gradient, for generators whose blocks have a given spectral norm. Training reaches norms of 0.1 to 0.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.command import run
from benchmarks.records import DATA, append, load
from benchmarks.turns import spread, take_turns
from oft_diffusion.rotation import (
    cayley_delta,
    cayley_neumann_delta,
    orthogonality_error,
    packed_size,
    unpack,
)

FILE = DATA / "build_forms.csv"
NORMS = (0.1, 0.3, 0.7)
BLOCKS, BLOCK_SIZE = 3000, 32  # those of SD 1.5's attention


def solve_of_autograd(q: Tensor) -> Tensor:
    """The exact rotation, with torch's own backward: another solve."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    delta: Tensor = torch.linalg.solve_ex(identity - q, 2.0 * q)[0]
    return delta


def polished(q: Tensor) -> Tensor:
    """The series, and one Newton-Schulz step towards the nearest orthogonal matrix: `R (3 I - R^T R) / 2`."""
    delta = cayley_neumann_delta(q, 5)
    turned = delta.transpose(1, 2)
    off = torch.baddbmm(delta + turned, turned, delta)  # R^T R - I
    return delta - 0.5 * (off + delta @ off)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact, as it comes": cayley_delta,
    "a solve": solve_of_autograd,
    "series, m = 5": lambda q: cayley_neumann_delta(q, 5),
    "series, m = 8": lambda q: cayley_neumann_delta(q, 8),
    "series, m = 5, one polishing step": polished,
}


def generators(norm: float, device: str) -> Tensor:
    """Packed generators whose blocks' largest singular value is `norm`, float64 `(BLOCKS, packed)`."""
    drawn = torch.Generator().manual_seed(0)
    packed = torch.randn(BLOCKS, packed_size(BLOCK_SIZE), generator=drawn, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(unpack(packed), 2)
    return (packed * (norm / largest)[:, None]).to(device)


def gradient(form: Callable[[Tensor], Tensor], packed: Tensor, grad: Tensor) -> Tensor:
    """Of the generators, for a given gradient of D."""
    packed = packed.detach().requires_grad_()
    [found] = torch.autograd.grad(form(unpack(packed)), packed, grad)
    return found


def errors(form: Callable[[Tensor], Tensor], norm: float, device: str) -> dict[str, str]:
    """Largest entries of what is wrong, the gradient's relative to its largest."""
    exact = generators(norm, device)
    delta = form(unpack(exact.float()))
    grad = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)).to(device)
    truth = gradient(cayley_delta, exact, grad.double())
    found = {
        "error": (delta.double() - cayley_delta(unpack(exact))).abs().max(),
        "orthogonality": orthogonality_error(delta.double()),
        "gradient_error": (gradient(form, exact.float(), grad).double() - truth).abs().max() / truth.abs().max(),
    }
    return {name: f"{float(value):.2g}" for name, value in found.items()}


def measure(device: str, rounds: int) -> None:
    """Append one run."""
    packed = generators(0.3, device).float().requires_grad_()

    def calls(form: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
        def both() -> None:
            delta = form(unpack(packed))
            torch.autograd.grad(delta, packed, delta.detach())

        return {"build": torch.no_grad()(lambda: form(unpack(packed))), "build and backward": both}

    stage = {name: calls(form) for name, form in FORMS.items()}
    take_turns(stage, 2, device)
    times, _ = take_turns(stage, rounds, device)
    rows = [
        {
            "blocks": BLOCKS, "block_size": BLOCK_SIZE, "form": name, "kind": kind, "norm": "", "error": "",
            "orthogonality": "", "gradient_error": "", **spread(times[name][kind]),
        }
        for name in FORMS for kind in stage[name]
    ]  # fmt: skip
    rows += [
        {
            "blocks": BLOCKS, "block_size": BLOCK_SIZE, "form": name, "kind": "errors", "norm": norm,
            **errors(form, norm, device), **spread([]),
        }
        for name, form in FORMS.items() for norm in NORMS
    ]  # fmt: skip
    append(FILE, rows, device)


def table() -> str:
    """The newest run of each machine."""
    rows = load(FILE)
    newest = {row["hardware"]: row["date"] for row in rows}
    found = {(r["hardware"], r["form"], r["kind"], r["norm"]): r for r in rows if r["date"] == newest[r["hardware"]]}
    parts = []
    for machine in newest:
        shown = [f"error at norm {norm}" for norm in NORMS]
        lines = [f"| | build, ms | with its gradient, ms | {' | '.join(shown)} |", "|---" * (3 + len(NORMS)) + "|"]
        for form in FORMS:
            took = [1000 * float(found[machine, form, kind, ""]["median"]) for kind in ("build", "build and backward")]
            wrong = [found[machine, form, "errors", str(norm)] for norm in NORMS]
            cells = [f"{row['error']}, {row['orthogonality']}, {row['gradient_error']}" for row in wrong]
            lines.append(f"| {form} | {took[0]:.2f} | {took[1]:.2f} | {' | '.join(cells)} |")
        about = next(row for row in found.values() if row["hardware"] == machine)
        lines += [
            "",
            (
                f"{about['blocks']} blocks of {about['block_size']}, float32. Errors: of the rotation, how far it is "
                f"from orthogonal, of the gradient. {machine}, {about['threads']} threads, torch {about['torch']}; "
                f"{about['date']}."
            ),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured yet."


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=11)
