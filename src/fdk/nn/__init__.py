"""Modules that multiply by low-bit weights."""

from fdk.nn.linear import Linear

__all__ = ["Linear"]
