"""The pocket base: a tiny real StableDiffusionPipeline, the world it was trained on, and subjects to teach it."""

from __future__ import annotations

from oft_diffusion.pocket.model import GUIDANCE, STEPS, pocket_path, pocket_pipeline
from oft_diffusion.pocket.world import (
    SUBJECTS,
    Scene,
    Subject,
    caption,
    render,
    sample_scene,
    subject_scenes,
    subjects_path,
)

__all__ = [
    "GUIDANCE",
    "STEPS",
    "SUBJECTS",
    "Scene",
    "Subject",
    "caption",
    "pocket_path",
    "pocket_pipeline",
    "render",
    "sample_scene",
    "subject_scenes",
    "subjects_path",
]
