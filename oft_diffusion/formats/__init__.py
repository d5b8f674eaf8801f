"""Adapter files of other tools, one module each."""
