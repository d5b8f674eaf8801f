"""What `benchmarks.speed` measures, as data: one entry per set of rows, the most telling first: time may run out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.methods import BASE, FULL, LORA, METHODS, NATIVE, OURS, PEFT_OFT, TRITON, WEIGHT_CENTRIC
from benchmarks.works import Sizes

_USUAL = Sizes()
STACK = "stack of linear layers"
# Of D for all layers at once: the exact rotation by a solve, and the series.
BUILDS = ("cayley", "cayley_neumann")
_SWITCHES = ("compiled", "checkpointing", "text", "small")
KINDS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "inference": ("live", "fused", "merge", "unmerge", "swap"),
    "build": ("build", "build and backward"),
}


@dataclass(frozen=True)
class Setup:
    """One work, measured with several methods in turn.

    Attributes:
        kind: "train" is a step of training, "inference" one of a sampler with the adapter live and fused, and what it
            takes to merge and to swap, "build" that of making D alone.
        text: text encoders are run and adapted, too; without it their outputs are given.
        small: cut for processors, see `works`.
        quantization: how the denoiser's linear layers lie in memory, as bitsandbytes has them.
        rounds: at most; fewer, never less than `speed.LEAST`, where time runs out.
    """

    work: str
    kind: Literal["train", "inference", "build"] = "train"
    methods: tuple[str, ...] = tuple(METHODS)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    checkpointing: bool = False
    text: bool = False
    small: bool = False
    quantization: Literal["none", "nf4", "int8"] = "none"
    block_size: int = 32
    sizes: Sizes = _USUAL
    rounds: int = 15

    def cells(self) -> list[tuple[str, str]]:
        """(method, kind) of every row."""
        return [(method, kind) for method in self.methods for kind in KINDS[self.kind]]

    def columns(self) -> dict[str, str]:
        """What tells its rows from others'."""
        own = ("work", "dtype", "quantization", "block_size")
        switches = {name: "yes" if getattr(self, name) else "no" for name in _SWITCHES}
        sizes = {"batch": self.sizes.batch}
        if self.work == STACK:
            sizes |= {"tokens": self.sizes.tokens, "width": self.sizes.width, "layers": self.sizes.layers}
        blank = dict.fromkeys(("tokens", "width", "layers"), "")
        told = {name: str(getattr(self, name)) for name in own} | switches | blank
        return told | {name: str(size) for name, size in sizes.items()}

    def __str__(self) -> str:
        told = [self.kind, self.dtype, f"batch {self.sizes.batch}"]
        told += [self.quantization] * (self.quantization != "none")
        told += [name for name in _SWITCHES if getattr(self, name)]
        if self.work == STACK:
            told += [f"{self.sizes.tokens} tokens, {self.sizes.width} wide, {self.sizes.layers} layers"]
        return f"{self.work} ({', '.join(told)}, b = {self.block_size})"


_INFERENCE = tuple(name for name in METHODS if name != FULL)
_MAIN = (BASE, OURS, NATIVE, LORA, PEFT_OFT)
_COMPILED = (BASE, OURS, NATIVE, LORA)
_SCALED = (BASE, OURS, LORA, PEFT_OFT, WEIGHT_CENTRIC)
_QUANTIZED: tuple[Literal["nf4", "int8"], ...] = ("nf4", "int8")


def _scaling(usual: Setup, tokens: tuple[int, ...], widths: tuple[int, ...]) -> list[Setup]:
    """One size at a time away from the usual ones."""
    sizes = [replace(usual.sizes, tokens=n) for n in tokens] + [replace(usual.sizes, width=n) for n in widths]
    sizes += [replace(usual.sizes, layers=n) for n in (2, 32)]
    return [usual, *(replace(usual, sizes=s) for s in sizes), *(replace(usual, block_size=b) for b in (16, 64))]


_CPU_TRAIN = Setup("SD 1.5", small=True, rounds=15)
_CPU_MAIN = replace(_CPU_TRAIN, methods=_MAIN, rounds=10)
CPU: list[Setup] = [
    _CPU_TRAIN,
    replace(_CPU_TRAIN, kind="inference", methods=_INFERENCE, rounds=10),
    *(replace(_CPU_MAIN, compiled=True, methods=_COMPILED, kind=kind) for kind in ("inference", "train")),
    replace(_CPU_MAIN, sizes=Sizes(batch=4), rounds=8),
    *(replace(_CPU_MAIN, quantization=name, rounds=8) for name in _QUANTIZED),
    Setup("SD 1.5", kind="build", methods=BUILDS, rounds=7),
    *_scaling(Setup(STACK, methods=(*_SCALED, NATIVE), rounds=8), tokens=(64, 1024), widths=(320, 1280)),
    replace(_CPU_MAIN, checkpointing=True),
    replace(_CPU_MAIN, text=True),
    replace(_CPU_MAIN, dtype="bfloat16"),
    *(Setup(work, methods=_MAIN, small=True, rounds=4) for work in ("SDXL", "SD 3.5 Medium", "Flux.1")),
    *(Setup(work, "inference", _MAIN, small=True, rounds=4) for work in ("SDXL", "SD 3.5 Medium", "Flux.1")),
]

_GPU_MAIN = (BASE, TRITON, LORA, PEFT_OFT, WEIGHT_CENTRIC)
_GPU_FEW = (BASE, TRITON, LORA, PEFT_OFT)
_GPU_LIVE = (BASE, TRITON, LORA)
_SD15 = Setup("SD 1.5", methods=_GPU_MAIN, dtype="bfloat16", sizes=Sizes(batch=4), rounds=8)
_SDXL = Setup("SDXL", methods=_GPU_MAIN, dtype="bfloat16", rounds=5)
_SD35 = replace(_SDXL, work="SD 3.5 Medium")
_FLUX = replace(_SDXL, work="Flux.1", checkpointing=True, rounds=4)
_FAMILIES = (_SD15, _SDXL, _SD35, _FLUX)  # Flux.1 last, here and below: its base once stopped a card, nobody knows why
_LIVE = [replace(setup, kind="inference", methods=_GPU_LIVE, checkpointing=False, rounds=4) for setup in _FAMILIES]
# What the aims ask for. A card is lent for minutes, so these are to take few, reckoned by rows of an H200: a round of
# the five methods takes 1.05 s (SD 1.5) and 4.1 s (SDXL), 69 microseconds an operation; by the operations that
# `full_counts` has of the others, 2.8 s (SD 3.5) and 5.2 s (Flux.1). With what settles and what is counted, some seven
# rounds more, training takes 16 + 49 + 34 + 58 = 157 s. Compiled, with four methods and five such rounds, it is below
# 9 + 27 + 21 + 35 = 92 s. Sampling, most of it merging, takes 29 s (SDXL), of the others no longer, in both forms
# below 232 s. With five seconds to make each model this is 565 s, of 9.5 minutes that `on_card` gives. What compiling
# takes is not known, and comes on top.
AIMED = [
    *_FAMILIES,
    *_LIVE,
    *(replace(setup, methods=_GPU_FEW, compiled=True) for setup in _FAMILIES),
    *(replace(setup, compiled=True) for setup in _LIVE),
]
_LARGE = Sizes(tokens=4096, width=1280, layers=16)
CUDA: list[Setup] = [  # all methods upon SD 1.5 are `on_card`'s peers, too; upon SDXL, where they take longest, last
    *AIMED,
    replace(_SD15, methods=tuple(METHODS), sizes=Sizes(batch=2)),
    *(replace(_SD35, methods=_GPU_FEW, quantization=name) for name in _QUANTIZED),
    replace(_FLUX, methods=_GPU_FEW, quantization="nf4"),
    Setup("SDXL", kind="build", methods=BUILDS),
    replace(_SDXL, checkpointing=True),
    replace(_SDXL, text=True),
    replace(_SD35, text=True),
    *_scaling(
        Setup(STACK, methods=(*_SCALED, TRITON), dtype="bfloat16", sizes=_LARGE, rounds=8),
        tokens=(1024, 16384),
        widths=(640, 2560),
    ),
    replace(_SD15, dtype="float32", sizes=_USUAL),
    replace(_SDXL, methods=tuple(METHODS), sizes=Sizes(batch=2)),
    replace(_SDXL, kind="inference", methods=_INFERENCE, sizes=Sizes(batch=2)),
]
SETUPS: dict[str, list[Setup]] = {"cpu": CPU, "cuda": CUDA}
