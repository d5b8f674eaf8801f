"""How events of the page are wired."""

from __future__ import annotations

from typing import Any

# Of every event but those of `api.py`: no name for programs, and progress is told by the status line.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
