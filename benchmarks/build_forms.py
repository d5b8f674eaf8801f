"""Ways to build D, beside each other: how long they take, and how near they come: benchmarks/data/build_forms.csv.

python -m benchmarks.build_forms                  # measures the processor and appends
python -m benchmarks.build_forms --device cuda    # a CUDA card
python -m benchmarks.build_forms --table          # the newest run of each machine as Markdown

Errors are of float32 against the exact rotation in float64: the rotation's own, how far it is from orthogonal, and that
of the gradient, for generators whose blocks have a given spectral norm. Training reaches norms of 0.1 to 0.5. A form
that a machine does not have, as C on a card, has empty cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.command import run
from benchmarks.methods import UnsupportedError
from benchmarks.records import DATA, append, load
from benchmarks.stamps import commits
from benchmarks.turns import spread, take_turns
from oft_diffusion import OFTConfig
from oft_diffusion.kernels import processor
from oft_diffusion.kernels.block_rotate import triton_kernels
from oft_diffusion.rotation import (
    cayley_delta,
    cayley_neumann_delta,
    orthogonality_error,
    packed_size,
    rotation_delta,
    unpack,
)

FILE = DATA / "build_forms.csv"
NORMS = (0.1, 0.3, 0.7)
BLOCKS, BLOCK_SIZE = 3000, 32  # those of SD 1.5's attention


Form = Callable[[Tensor], Tensor]  # packed generators to D
Row = Mapping[str, str]


def in_c(packed: Tensor) -> Tensor:
    """The exact rotation and its gradient as a processor with a C compiler has them.

    Raises:
        UnsupportedError: this one has not, or it is a card.
    """
    if not processor.fits(packed, BLOCK_SIZE):
        raise UnsupportedError("the kernels need a processor, Linux and a C compiler")
    return rotation_delta(packed, OFTConfig(block_size=BLOCK_SIZE))


def plain(packed: Tensor) -> Tensor:
    """The exact rotation as it comes wherever there is no C, and on cards."""
    return cayley_delta(unpack(packed))


def in_one_kernel(packed: Tensor) -> Tensor:
    """The exact rotation by the candidate of `benchmarks.solve_kernel`.

    Raises:
        UnsupportedError: it is no card, or without Triton.
    """
    if not packed.is_cuda or triton_kernels() is None:
        raise UnsupportedError("the kernel needs a CUDA card, Triton and a C compiler")
    from benchmarks.solve_kernel import solved_delta

    return solved_delta(unpack(packed))


def solve_of_autograd(packed: Tensor) -> Tensor:
    """The exact rotation, with torch's own backward: another solve."""
    q = unpack(packed)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    delta: Tensor = torch.linalg.solve_ex(identity - q, 2.0 * q)[0]
    return delta


def series(order: int) -> Form:
    return lambda packed: cayley_neumann_delta(unpack(packed), order)


def polished(packed: Tensor) -> Tensor:
    """The series, and one Newton-Schulz step towards the nearest orthogonal matrix: `R (3 I - R^T R) / 2`."""
    delta = series(5)(packed)
    turned = delta.transpose(1, 2)
    off = torch.baddbmm(delta + turned, turned, delta)  # R^T R - I
    return delta - 0.5 * (off + delta @ off)


IN_C, IN_TRITON, PLAIN = "exact, in C", "exact, a solve in one kernel", "exact, in plain PyTorch"
FORMS: dict[str, Form] = {
    IN_C: in_c,
    PLAIN: plain,
    IN_TRITON: in_one_kernel,
    "a solve": solve_of_autograd,
    "series, m = 5": series(5),
    "series, m = 8": series(8),
    "series, m = 5, one polishing step": polished,
}
_FORMER = {"exact, as it comes": PLAIN}  # of rows that are older than C


def generators(norm: float, device: str) -> Tensor:
    """Packed generators whose blocks' largest singular value is `norm`, float64 `(BLOCKS, packed)`."""
    drawn = torch.Generator().manual_seed(0)
    packed = torch.randn(BLOCKS, packed_size(BLOCK_SIZE), generator=drawn, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(unpack(packed), 2)
    return (packed * (norm / largest)[:, None]).to(device)


def gradient(form: Form, packed: Tensor, grad: Tensor) -> Tensor:
    """Of the generators, for a given gradient of D."""
    packed = packed.detach().requires_grad_()
    [found] = torch.autograd.grad(form(packed), packed, grad)
    return found


def errors(form: Form, norm: float, device: str) -> dict[str, str]:
    """Largest entries of what is wrong, the gradient's relative to its largest; empty where there is no such form."""
    exact = generators(norm, device)
    try:
        delta = form(exact.float())
    except UnsupportedError:
        return dict.fromkeys(_ERRORS, "")
    grad = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1)).to(device)
    truth = gradient(plain, exact, grad.double())
    wrong = (
        (delta.double() - plain(exact)).abs().max(),
        orthogonality_error(delta.double()),
        (gradient(form, exact.float(), grad).double() - truth).abs().max() / truth.abs().max(),
    )
    return {name: f"{float(value):.2g}" for name, value in zip(_ERRORS, wrong, strict=True)}


_ERRORS = ("error", "orthogonality", "gradient_error")


def measure(device: str, rounds: int) -> None:
    """Append one run."""
    packed = generators(0.3, device).float().requires_grad_()

    def calls(form: Form) -> dict[str, Callable[[], object]]:
        def both() -> None:
            delta = form(packed)
            torch.autograd.grad(delta, packed, delta.detach())

        return {"build": torch.no_grad()(lambda: form(packed)), "build and backward": both}

    stage = {name: calls(form) for name, form in FORMS.items()}
    take_turns(stage, 2, device)
    times, _ = take_turns(stage, rounds, device)
    about = {"blocks": BLOCKS, "block_size": BLOCK_SIZE}
    rows = [
        {
            **about, "form": name, "kind": kind, "norm": "", **dict.fromkeys(_ERRORS, ""),
            **spread(times.get(name, {}).get(kind, [])),
        }
        for name in FORMS for kind in stage[name]
    ]  # fmt: skip
    rows += [
        {**about, "form": name, "kind": "errors", "norm": norm, **errors(form, norm, device), **spread([])}
        for name, form in FORMS.items()
        for norm in NORMS
    ]
    append(FILE, rows, device)


def table() -> str:
    """The newest run of each machine."""
    rows = load(FILE)
    newest = {row["hardware"]: row["date"] for row in rows}
    parts = []
    for machine, date in newest.items():
        found = {
            (_FORMER.get(row["form"], row["form"]), row["kind"], row["norm"]): row
            for row in rows
            if (row["hardware"], row["date"]) == (machine, date)
        }
        shown = [f"error at norm {norm}" for norm in NORMS]
        lines = [f"| | build, ms | with its gradient, ms | {' | '.join(shown)} |", "|---" * (3 + len(NORMS)) + "|"]
        for form in FORMS:
            took = [_milliseconds(found.get((form, kind, ""))) for kind in ("build", "build and backward")]
            wrong = [_wrong(found.get((form, "errors", str(norm)))) for norm in NORMS]
            lines.append(f"| {form} | {' | '.join(took + wrong)} |")
        about = next(iter(found.values()))
        lines += [
            "",
            (
                f"{about['blocks']} blocks of {about['block_size']}, float32. Errors: of the rotation, how far it is "
                f"from orthogonal, of the gradient. {machine}, {about['threads']} threads, torch {about['torch']}; "
                f"commit {commits(found.values())}."
            ),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "Not measured yet."


def _milliseconds(row: Row | None) -> str:
    return f"{1000 * float(row['median']):.2f}" if row and row["median"] else ""


def _wrong(row: Row | None) -> str:
    return ", ".join(row[name] for name in _ERRORS) if row and row["error"] else ""


if __name__ == "__main__":
    run(__doc__, measure, table, rounds=11)
