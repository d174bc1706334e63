"""Formats: what the codes of a low-bit weight mean, and the names they go by."""

from fdk.formats.names import parse
from fdk.formats.registry import all_formats, kind, kinds, register
from fdk.formats.spec import Format, Kind

__all__ = ["Format", "Kind", "all_formats", "kind", "kinds", "parse", "register"]
