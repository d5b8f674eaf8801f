"""How events of the page are wired."""

from __future__ import annotations

from abc import ABCMeta
from functools import cache
from typing import Any, TypeVar

# Of every event but those of `api.py`: no name for programs, and progress is told by the status line.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Of those that look on at a job until its end.
LOOKING: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "once", **PRIVATE}
# Of those that begin such a job: pressed again meanwhile, they begin another, or say why not.
EACH_TIME: dict[str, Any] = {**LOOKING, "trigger_mode": "multiple"}

_Component = TypeVar("_Component")


def as_it_came(component: _Component) -> _Component:
    """A component whose value is not checked by gradio, which would say its own words on an empty or an old one."""
    kind: Any = type(component)
    component.__class__ = _as_it_comes(kind)
    return component


@cache
def _as_it_comes(kind: Any) -> Any:
    """The same kind, which takes values as they come.

    A class, because an update makes its component anew, of its class. Of the same name, by which the browser knows it.
    By gradio's own way to make one, a file would be written beside the source.
    """
    own = {"__module__": kind.__module__, "preprocess": lambda self, payload: payload}
    return ABCMeta.__new__(type(kind), kind.__name__, (kind,), own)
