"""Figures of result rows: titled, with units, legible in black and white; SVG and PNG."""

from kvjax.plots.codecs import codecs, pareto
from kvjax.plots.figure import MARKERS, pyplot, save
from kvjax.plots.memory import decode_time_against_context, memory_against_context, plot_memory_savings
from kvjax.plots.quality import quality_against_bytes, quality_against_kv_heads
from kvjax.plots.studies import loss_curves, rates, recovery

__all__ = [
    "MARKERS",
    "codecs",
    "decode_time_against_context",
    "loss_curves",
    "memory_against_context",
    "pareto",
    "plot_memory_savings",
    "pyplot",
    "quality_against_bytes",
    "quality_against_kv_heads",
    "rates",
    "recovery",
    "save",
]
