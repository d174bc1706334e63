"""Packing: bit streams and layouts, each with its exact inverse."""

from fdk.packing.bits import pack_codes, unpack_codes
from fdk.packing.fragments import FRAGMENTS
from fdk.packing.layouts import Geometry, Layout, layout, layouts, register_layout

__all__ = ["FRAGMENTS", "Geometry", "Layout", "layout", "layouts", "pack_codes", "register_layout", "unpack_codes"]
