"""Presets, one small file each: a docstring with what it is, what it cost and what it reached."""
