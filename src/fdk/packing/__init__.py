"""Packing: bit streams and layouts, each with its exact inverse."""

from fdk.packing.bits import pack_codes, pack_planes, unpack_codes, unpack_planes
from fdk.packing.fragments import FRAGMENTS
from fdk.packing.layouts import Geometry, Layout, layout, layouts, register_layout

__all__ = [
    "FRAGMENTS",
    "Geometry",
    "Layout",
    "layout",
    "layouts",
    "pack_codes",
    "pack_planes",
    "register_layout",
    "unpack_codes",
    "unpack_planes",
]
