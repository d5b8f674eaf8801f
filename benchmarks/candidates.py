"""One method upon one work, ready to be timed: its step of training or of sampling, and what does not wobble of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks.counting import kernels_of, leaf_operations, peak_allocated, saved_bytes
from benchmarks.methods import BASE, FULL, METHODS, NATIVE, OURS, TRITON, disturb, kernels_switched
from benchmarks.speed_setups import Setup
from benchmarks.works import Work
from oft_diffusion import OFTConfig
from oft_diffusion.rotation import packed_size, rotation_delta

LEARNING_RATE = 1e-5  # it is steps that are measured, not where they lead


class Candidate:
    """A method's own copy of a work, upon the same weights as the others'.

    Attributes:
        own_bytes: of weights that it shares with no other candidate.
        trained: what the optimiser gets.
    """

    def __init__(self, work: Work, targets: Sequence[Sequence[str]], method: str, setup: Setup) -> None:
        self.setup, self.method, self.device = setup, method, next(work.parameters()).device
        before = _allocated(self.device)
        rotated = {id(part.get_submodule(n).weight) for part, names in _parts(work, targets) for n in names}
        own = rotated if setup.kind == "inference" else set()  # merging changes them
        self.work = work.copy(None if METHODS[method].own_weights else own)
        self.own_bytes = _bytes(p for p in work.parameters() if METHODS[method].own_weights or id(p) in own)
        self.base = {tensor.untyped_storage().data_ptr() for tensor in _state(work)}
        self.work.train(setup.kind == "train").requires_grad_(False)
        self.adapted = [
            METHODS[method].adapt(part, names, setup.block_size) for part, names in _parts(self.work, targets)
        ]
        self.trained = [parameter for adapted in self.adapted for parameter in adapted.trained]
        self.adapter_bytes = 0 if method == FULL else _bytes(self.trained)
        self.optimiser: torch.optim.Optimizer | None = None
        if method != FULL:
            disturb(self.trained)
        if setup.kind == "train":
            self._prepare_training()
        else:
            for adapted in self.adapted:
                adapted.freeze()
        if setup.checkpointing:
            self.work.checkpoint()
        if setup.compiled:
            self.work.compile()
        self.stays = _allocated(self.device) - before

    def _prepare_training(self) -> None:
        if self.method == BASE or self.work.inner:
            self.work.let_gradients_through()
        if self.method != BASE:
            self.optimiser = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)

    # -- what is timed ----------------------------------------------------------------------------------------------

    def stages(self) -> list[dict[str, Callable[[], None]]]:
        """What is taken in turns: for each stage, in order, a method's calls by kind."""
        if self.setup.kind == "train":
            return [{"train": self.train}]
        merge = {"merge": self._all("merge"), "unmerge": self._all("unmerge")} if self.can("merge") else {}
        fused = {"fused": self.sample} if merge or self.method == BASE else {}
        swap = {"swap": self._all("swap")} if self.can("swap") else {}
        return [{"live": self.sample}, merge, fused, swap]

    def between(self, stage: int) -> None:
        """What is done before a stage and not timed: fused steps are of a merged model."""
        if self.can("merge") and self.setup.kind == "inference":
            if stage == 2:
                self._all("merge")()
            elif stage == 3:
                self._all("unmerge")()

    def can(self, verb: str) -> bool:
        return all(getattr(adapted, verb) is not None for adapted in self.adapted)

    def reason(self) -> str:
        """Why some kinds are not among the stages."""
        return self.adapted[0].lacks or "it has none"

    def train(self) -> None:
        """One step, the optimiser's included. Of the base, gradients up to its inputs."""
        self.gradients()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        for value in self.work.inputs.values():
            if isinstance(value, Tensor):
                value.grad = None

    def gradients(self) -> None:
        """Forward and backward."""
        self.loss().backward()

    def loss(self) -> Tensor:
        """In bfloat16 below autocast, as trainers have it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setup.dtype == "bfloat16"):
            return self.work().float().square().mean()

    @torch.no_grad()
    def sample(self) -> None:
        """One forward of a sampler."""
        self.work()

    def kernels(self) -> AbstractContextManager[None]:
        """What every call is made in, and what is not timed."""
        own = self.method in (OURS, TRITON, NATIVE)
        return kernels_switched(on=self.method != OURS) if own else nullcontext()

    def _all(self, verb: str) -> Callable[[], None]:
        calls = [getattr(adapted, verb) for adapted in self.adapted]

        def call() -> None:
            for one in calls:
                one()

        return call

    # -- what is counted --------------------------------------------------------------------------------------------

    def warm_up(self, steps: int) -> None:
        """What only the first steps do: compiling, tuning, making an optimiser's state."""
        before = _allocated(self.device)
        for _ in range(steps):
            (self.train if self.setup.kind == "train" else self.sample)()
        self.stays += _allocated(self.device) - before

    def counts(self) -> dict[str, float]:
        """Of one step as `stages` has it first; operations and what is kept only where nothing is compiled."""
        training = self.setup.kind == "train"
        step, worked = (self.train, self.gradients) if training else (self.sample, self.sample)
        found: dict[str, float] = {"peak_bytes": self._peak(step)}
        if not self.setup.compiled:
            if self.method != NATIVE:  # a profiler does not see what C does
                found["operations"] = leaf_operations(worked)
            if training:
                found["saved_bytes"] = saved_bytes(self.loss, [*self.work.parameters(), *self.trained])
        if self.device.type == "cuda":
            found["kernels"], found["kernel_seconds"] = kernels_of(worked)
        return found

    def _peak(self, step: Callable[[], None]) -> int:
        """Bytes at most, above the base's weights: what stays, and what a step allocates on top."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            already = _allocated(self.device)
            step()
            torch.cuda.synchronize(self.device)
            return self.stays - self.own_bytes + torch.cuda.max_memory_allocated(self.device) - already
        states = self.optimiser.state.values() if self.optimiser is not None else ()
        kept = [*_state(self.work), *self.trained, *(t for state in states for t in state.values())]
        kept += [tensor for adapted in self.adapted for tensor in adapted.beside()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        new = sum(size for pointer, size in storages.items() if pointer not in self.base)
        return new - self.own_bytes + peak_allocated(step)


def builder(parametrisation: str, blocks: int, block_size: int, device: str) -> dict[str, Callable[[], None]]:
    """D of all layers at once, without and with its gradient."""
    packed = torch.randn(blocks, packed_size(block_size), device=device) * 0.02
    packed.requires_grad_()
    config = OFTConfig(block_size=block_size, parametrisation=parametrisation)  # type: ignore[arg-type]

    @torch.no_grad()
    def build() -> None:
        rotation_delta(packed, config)

    def backward() -> None:
        delta = rotation_delta(packed, config)
        delta.backward(delta.detach())
        packed.grad = None

    return {"build": build, "build and backward": backward}


def _parts(work: Work, targets: Sequence[Sequence[str]]) -> list[tuple[nn.Module, Sequence[str]]]:
    return list(zip(work.components(), targets, strict=True))


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
