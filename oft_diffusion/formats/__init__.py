"""Adapter files of other tools, read and written."""

from oft_diffusion.formats.reading import read
from oft_diffusion.formats.source import Imported

__all__ = ["Imported", "read"]
