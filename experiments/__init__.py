"""Command lines, one a file: `python -m experiments.NAME --help`."""
