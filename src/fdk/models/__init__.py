"""Whole models: what to quantise, checkpoints on disk, a small Llama to run, decoding."""

from fdk.models.checkpoint import load, save
from fdk.models.config import QuantisationConfig, read_overrides
from fdk.models.folder import quantise_folder
from fdk.models.precision import set_precision
from fdk.models.quantise import quantise

__all__ = ["QuantisationConfig", "load", "quantise", "quantise_folder", "read_overrides", "save", "set_precision"]
