"""How events of the page are wired."""

from __future__ import annotations

from typing import Any, TypeVar

# Of every event but those of `api.py`: no name for programs, and progress is told by the status line.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Of those that look on at a job until its end.
LOOKING: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "once", **PRIVATE}
# Of those that begin such a job: pressed again meanwhile, they begin another, or say why not.
EACH_TIME: dict[str, Any] = {**LOOKING, "trigger_mode": "multiple"}

_Component = TypeVar("_Component")


def as_it_came(component: _Component) -> _Component:
    """A component whose value is not checked by gradio, which would fail without a sentence on an empty one."""
    component.preprocess = lambda payload: payload  # type: ignore[attr-defined]
    return component
