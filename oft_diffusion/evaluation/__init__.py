"""What an adapter did to the pocket base, measured: is the subject learnt, is the rest kept.

The pocket world's renderer is ours, so a classifier trained on it can say what is in a picture. `evaluate` draws
fixed sets of prompts from fixed seeds with and without the adapter, and gives figures with intervals.
"""

from __future__ import annotations

from oft_diffusion.evaluation.figures import Figure, Row, figures
from oft_diffusion.evaluation.intervals import Interval
from oft_diffusion.evaluation.looks import Looks, looks_of
from oft_diffusion.evaluation.measure import Evaluation, evaluate
from oft_diffusion.evaluation.prompts import Prompt

__all__ = ["Evaluation", "Figure", "Interval", "Looks", "Prompt", "Row", "evaluate", "figures", "looks_of"]
