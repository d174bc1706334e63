"""Quantisers: from a float weight to the codes, scales, table and zeros of a format."""

from fdk.quantise.codebooks import fixed_table, stored_table, uniform_table
from fdk.quantise.kmeans import fit_table
from fdk.quantise.metrics import LayerError, layer_error, sqnr_db
from fdk.quantise.nearest import Nearest
from fdk.quantise.nested import NestedQuantisation, quantise_nested, sqnr_by_width
from fdk.quantise.rtn import quantise
from fdk.quantise.scales import base_scales
from fdk.quantise.sparsity import keep_largest

__all__ = [
    "LayerError",
    "Nearest",
    "NestedQuantisation",
    "base_scales",
    "fit_table",
    "fixed_table",
    "keep_largest",
    "layer_error",
    "quantise",
    "quantise_nested",
    "sqnr_by_width",
    "sqnr_db",
    "stored_table",
    "uniform_table",
]
