"""Which adapters of a component act: in which order, how strongly, live or merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oft_diffusion.errors import AdapterError
from oft_diffusion.plan import Active, StrengthMode, as_names, make_active
from oft_diffusion.store import AdapterStore


class AdapterChoice(AdapterStore):
    """The adapters of a component, and which of them act.

    Attributes, beside those of `AdapterStore`:
        disabled: adapters that keep their place, at strength 0 until they are enabled again, and what they were.
        base_copy: target weights as they were before a merge (`merge.BaseCopy`), if kept.
    """

    def __init__(self, component: str) -> None:
        super().__init__(component)
        self.disabled: dict[str, Active] = {}
        self.base_copy: Any = None
        self._active: tuple[Active, ...] = ()
        self._merged_active: tuple[Active, ...] = ()

    @abstractmethod
    def _use(self, active: tuple[Active, ...]) -> None:
        """Let these adapters act, with deltas to match."""

    @property
    def active(self) -> tuple[Active, ...]:
        """The adapters that x meets, in order; merged ones are left out."""
        return self._active

    def set_adapters(
        self, names: Sequence[str], strengths: float | Sequence[float] = 1.0, mode: StrengthMode = "rotation"
    ) -> None:
        """Choose which adapters x meets, in this order, and how strongly.

        Frozen adapters' deltas are rewritten here, in place where the layout stays, so that compiled models and
        captured graphs go on with the new ones.

        Args:
            names: adapter names, each at most once; empty for the base alone.
            strengths: one for all, or one each; any real number, 0 is the base and 1 as trained.
            mode: "rotation" for the group power R^s, "linear" for the blend (1-s) I + s R of other tools.

        Raises:
            AdapterError: a name is unknown, merged or repeated, counts differ, or a strength is not finite.
        """
        names = as_names(names)
        for name in names:
            self.require(name)
        self.refuse_merged(names)
        self.use(make_active(names, strengths, mode))

    def use(self, active: tuple[Active, ...], disabled: Mapping[str, Active] | None = None) -> None:
        """`set_adapters` with a mode each. After an error, the adapters of before are in use again.

        Args:
            active: the adapters, in order.
            disabled: of those whose strength is 0 only for now, what they are when they are enabled.

        Raises:
            AdapterError: a series adapter's norm allows no fractional power.
        """
        before = self._active
        try:
            self._use(active)
        except AdapterError:
            self._use(before)
            raise
        merged = {name: a for name, a in self.disabled.items() if name in self.merged}  # to come back as they were
        self.disabled = merged | dict(disabled or {})

    def activate(self, name: str, strength: float = 1.0, mode: StrengthMode = "rotation") -> None:
        """Put an adapter after those that are active."""
        self.require(name)
        others = tuple(a for a in self._active if a.name != name)
        disabled = {n: a for n, a in self.disabled.items() if n != name}
        self.use((*others, *make_active([name], strength, mode)), disabled)

    @property
    def chosen(self) -> tuple[Active, ...]:
        """The active adapters with the strengths that they have when they are enabled."""
        return tuple(self.disabled.get(a.name, a) for a in self._active)

    def enable(self, name: str, enabled: bool = True) -> None:
        """Let an active adapter do nothing, at its place, or act again as strongly as before; no layout changes.

        Raises:
            AdapterError: the adapter is unknown, or not active.
        """
        self.require(name)
        chosen = {a.name: a for a in self.chosen}
        if name not in chosen:
            raise AdapterError(
                f"adapter {name!r} of {self.component} is not active",
                expected=f"one of: {', '.join(chosen) or '(none is active)'}",
                fix="activate it with set_adapters first",
            )
        disabled = {n: a for n, a in self.disabled.items() if n != name}
        if not enabled:
            disabled[name] = chosen[name]
        active = (replace(a, strength=0.0) if a.name in disabled else a for a in chosen.values())
        self.use(tuple(active), disabled)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged into the weights."""
        return tuple(a.name for a in self._merged_active)

    @property
    def merged_active(self) -> tuple[Active, ...]:
        """The merged adapters with their strengths, in order."""
        return self._merged_active

    def set_merged(self, staying: tuple[Active, ...], merging: tuple[Active, ...], base_copy: Any) -> None:
        """Note that `merging` are in the weights now, and only `staying` act live (`merge_oft` calls this)."""
        self._use(staying)
        self._merged_active, self.base_copy = merging, base_copy

    def clear_merged(self) -> None:
        """Note that the base's weights are back: merged adapters act live again, where they were next to the weight."""
        merged, self._merged_active, self.base_copy = self._merged_active, (), None
        outputs = tuple(a for a in merged if self.adapters[a.name].config.side == "output")
        self._use((*outputs, *self._active, *(a for a in merged if a not in outputs)))

    def refuse_merged(self, names: Iterable[str]) -> None:
        """Raise if one of these adapters is merged into the weights.

        Raises:
            AdapterError: one is.
        """
        if merged := [n for n in names if n in self.merged]:
            kept = self.base_copy is not None
            raise AdapterError(
                f"adapter {merged[0]!r} is merged into the weights of {self.component}"
                + ("" if kept else ", and the base was not kept"),
                expected="an adapter that is not merged",
                fix="call unmerge_oft (unfuse_oft on a pipeline) first" if kept else "load the base again",
            )
