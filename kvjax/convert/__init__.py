"""Conversions: the weights of one attention variant made those of another, with another cache.

All but `rotate_values` take grouped attention (MHA, MQA, GQA) and the configuration of the attention wanted,
and return a new decoder. How near it is to the old one is each function's to say; training goes on from there.
"""

from kvjax.convert.grouped import to_grouped
from kvjax.convert.inputs import input_moments
from kvjax.convert.latent import to_latent
from kvjax.convert.low_rank import to_low_rank
from kvjax.convert.rotation import rotate_values
from kvjax.convert.run import write_run
from kvjax.convert.surgery import target

__all__ = [
    "input_moments",
    "rotate_values",
    "target",
    "to_grouped",
    "to_latent",
    "to_low_rank",
    "write_run",
]
