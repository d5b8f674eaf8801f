"""`OFTConfig`: how an adapter is made. Validated here, and written into the adapter file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

from oft_diffusion.errors import ConfigError

Parametrisation = Literal["cayley", "cayley_neumann", "cayley_series"]
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("cayley", "cayley_neumann", "cayley_series")
Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")


@dataclass(frozen=True)
class OFTConfig:
    """Settings of one adapter on one component.

    Attributes:
        block_size: side b of the rotation blocks, at least 2, or "auto" for the largest of 64, 32 and 16 that divides
            every target's input features, or channels. Never adjusted in silence. "mixed" stands in files of other
            tools whose layers have sizes of their own; it cannot be trained.
        targets: the name of a target set ("attention", "attention+mlp", "all-linear", "all-linear+conv"), one regular
            expression, or a list of regular expressions, each matched against whole layer names.
        parametrisation: "cayley", the exact rotation, or "cayley_neumann", the truncated series of arXiv 2506.19847,
            section 3.3; "cayley_series" is what PEFT below 0.18 computed, for its files.
        neumann_order: m, the highest power of Q that the series keeps (PEFT's "terms" minus one). Even orders scale
            the rotated planes, odd ones keep their length almost exactly: see docs/maths.md.
        scaled: divide the trained generator by 2 sqrt(b - 1), which makes the best learning rate nearly independent
            of b. Files always hold the divided generator, so readers need not know.
        coft_eps: constrained OFT (arXiv 2306.07280, section 3.4): after each optimiser step the Frobenius norm of
            every block's Q is brought to at most this bound. None leaves it free.
        share_qkv: one generator for the projections of an attention that read the same input: q, k and v, or k and v
            where q reads another. Runtimes that fuse these projections can then hold the adapter exactly.
        side: "input" rotates what goes into a layer (OFTv2), "output" what comes out of it before the bias, which files
            of the first OFT's tools ask for; it cannot be trained.

    Raises:
        ConfigError: a value is outside what is stated above.
    """

    block_size: int | Literal["auto", "mixed"] = 32
    targets: str | tuple[str, ...] = "attention"
    parametrisation: Parametrisation = "cayley"
    neumann_order: int = 5
    scaled: bool = False
    coft_eps: float | None = None
    share_qkv: bool = False
    side: Side = "input"

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", _pattern_tuple(self.targets))
        _check_block_size(self.block_size)
        if self.parametrisation not in PARAMETRISATIONS:
            raise ConfigError(
                f"parametrisation={self.parametrisation!r} is unknown",
                expected=f"one of {', '.join(PARAMETRISATIONS)}",
                fix='use "cayley" unless a file was trained with the series',
            )
        if self.side not in SIDES:
            raise ConfigError(
                f"side={self.side!r} is unknown", expected=f"one of {', '.join(SIDES)}", fix="leave side out"
            )
        if not _is_int(self.neumann_order) or not 1 <= self.neumann_order <= 32:
            raise ConfigError(
                f"neumann_order={self.neumann_order!r} is not usable",
                expected="an integer from 1 to 32, the highest power of Q in the series",
                fix="use 5, or PEFT's number of terms minus one",
            )
        for switch in ("scaled", "share_qkv"):
            if not isinstance(value := getattr(self, switch), bool):
                raise ConfigError(
                    f"{switch}={value!r} is not usable", expected="true or false", fix=f"leave {switch} out"
                )
        if self.coft_eps is not None and not (_is_number(self.coft_eps) and 0 < self.coft_eps < float("inf")):
            raise ConfigError(
                f"coft_eps={self.coft_eps!r} bounds nothing",
                expected="a positive bound on the Frobenius norm of each block's Q, or None",
                fix="leave coft_eps out for unconstrained OFT",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OFTConfig:
        """Rebuild from `to_dict`'s output.

        Raises:
            ConfigError: a key is unknown (a newer version's file, or a typing error) or a value is invalid.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ConfigError(
                f"unknown OFTConfig setting(s): {', '.join(unknown)}",
                expected=f"only {', '.join(sorted(known))}",
                fix="correct the name, or upgrade oft-diffusion if a newer version wrote this",
            )
        return cls(**dict(data))


def _pattern_tuple(targets: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(targets, Sequence) or not targets or not all(isinstance(t, str) and t for t in targets):
        raise ConfigError(
            f"targets={targets!r} names nothing",
            expected="a target set's name, or a non-empty list of regular expressions",
            fix='use targets="attention"',
        )
    return tuple(targets)


def _check_block_size(block_size: object) -> None:
    if block_size in ("auto", "mixed") or (_is_int(block_size) and cast(int, block_size) >= 2):
        return
    raise ConfigError(
        f"block_size={block_size!r} is not usable",
        expected='an integer of at least 2, or "auto"',
        fix="use 32, which divides the input features of every supported architecture",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)
