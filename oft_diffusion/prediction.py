"""What a denoiser predicts, told from its scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config, `_class_name` included, means flow matching."""
    return (
        "FlowMatch" in str(scheduler.get("_class_name"))
        or bool(scheduler.get("use_flow_sigmas"))
        or scheduler.get("prediction_type") == "flow_prediction"
    )


def prediction_type(scheduler: Mapping[str, Any]) -> str | None:
    """epsilon, v_prediction, sample or flow; None where the config says nothing."""
    said = scheduler.get("prediction_type")
    return "flow" if is_flow(scheduler) else None if said is None else str(said)
