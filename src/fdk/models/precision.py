"""set_precision: the widths at which a model's nested layers are served, changed between two calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import nn

from fdk.arguments import as_integer, check_module
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.models.config import check_pattern, read_overrides
from fdk.nn import Linear


def set_precision(model: nn.Module, precision: int | Mapping[str, int] | str | Path) -> dict[str, int]:
    """Serve the nested layers of `model` at other widths, 2 to 8 bits; returns the width of each of them by name.

    precision  bits for all of them; {regular expression: bits}, where the last that finds something in a layer's name
               counts and layers that none finds keep their width; or a text file of lines `layer.name: bits`.

    Nothing is repacked or copied, so it takes microseconds a layer, also between replays of CUDA graphs: a graph keeps
    the width it was captured with, so capture one for each. FormatError, before anything is changed, for a width that
    does not exist, an expression or name without a nested layer, or a model that has none.
    """
    check_module(model, "model")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module.weight.format.is_nested
    }
    for name, bits in widths({name: layer.weight.format for name, layer in layers.items()}, precision).items():
        layers[name].set_precision(bits)
    return {name: layer.weight.format.served for name, layer in layers.items()}


def widths(nested: Mapping[str, Format], precision: int | Mapping[str, int] | str | Path) -> dict[str, int]:
    """The width that `precision` gives each of these layers that it concerns; FormatError as for `set_precision`."""
    if not nested:
        raise FormatError("the model has no nested layer; quantise it to a nested format such as nest8_g128 first")
    if isinstance(precision, Mapping | str | PathLike):
        asked = precision if isinstance(precision, Mapping) else read_overrides(precision)
        chosen = {}
        for pattern, bits in asked.items():
            check_pattern("precision", pattern)
            found = [name for name in nested if re.search(pattern, name)]
            if not found:
                some = ", ".join(name or "'' (a layer by itself)" for name in list(nested)[:3])
                some += ", ..." if len(nested) > 3 else ""
                raise FormatError(f"precision {pattern!r} matches no nested layer; they are called {some}")
            chosen.update(dict.fromkeys(found, bits))
    else:
        chosen = dict.fromkeys(nested, as_integer(precision, "precision"))
    for name, bits in chosen.items():
        try:
            nested[name].at(bits)
        except FormatError as error:
            raise FormatError(f"{name or 'the layer'}: {error}") from None
    return chosen
