"""Adapter files of other tools, read and written."""

from oft_diffusion.formats.reading import read
from oft_diffusion.formats.source import Imported
from oft_diffusion.formats.writing import Written, write_peft, write_single_file

__all__ = ["Imported", "Written", "read", "write_peft", "write_single_file"]
