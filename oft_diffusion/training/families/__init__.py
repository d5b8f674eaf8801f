"""Model families: everything in `training/` that depends on the architecture of the base."""

from oft_diffusion.training.families.family import AT_ONCE, Family, Posterior
from oft_diffusion.training.families.homes import where
from oft_diffusion.training.families.kinds import FAMILIES

__all__ = ["AT_ONCE", "FAMILIES", "Family", "Posterior", "where"]
