"""Quantisers: from a float weight to the codes, scales, table and zeros of a format."""

from fdk.quantise.codebooks import fixed_table, stored_table, uniform_table
from fdk.quantise.kmeans import fit_table
from fdk.quantise.metrics import LayerError, layer_error, sqnr_db
from fdk.quantise.nearest import Nearest
from fdk.quantise.rtn import quantise
from fdk.quantise.scales import base_scales

__all__ = [
    "LayerError",
    "Nearest",
    "base_scales",
    "fit_table",
    "fixed_table",
    "layer_error",
    "quantise",
    "sqnr_db",
    "stored_table",
    "uniform_table",
]
