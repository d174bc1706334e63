"""Format names: `parse(str(f)) == f`.

name  = kind bits ["s" served] "_" group ["_sp16of32"]
        lut4_g64  int3_g128  uint4_g32  nf4_g64  lut2_chan  nest8_g128  nest8s3_g128  int4_g128_sp16of32
group = "g" positive-multiple-of-16 | "chan"
"""

from __future__ import annotations

import re
from functools import cache

from fdk.arguments import shown
from fdk.errors import FormatError
from fdk.formats import registry
from fdk.formats.spec import BLOCK, KEPT, Format

_NAME = re.compile(
    r"(?P<kind>[a-z]+)(?P<bits>[1-9]\d?)(?:s(?P<served>[1-9]\d?))?_(?:g(?P<group>[1-9]\d*)|(?P<chan>chan))"
    r"(?P<sparse>_sp(?P<kept>\d+)of(?P<of>\d+))?"
)


def parse(name: str | Format) -> Format:
    """The Format called `name` (a Format is returned as it is). FormatError if the grammar does not match."""
    return name if isinstance(name, Format) else _parsed(name if isinstance(name, str) else shown(name))


@cache
def _parsed(name: str) -> Format:
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(
            f"{name!r} is not a format name; expected <kind><bits>_g<group> or <kind><bits>_chan, "
            f"such as lut4_g64, int4_g128 or lut3_chan (kinds: {', '.join(k.name for k in registry.kinds())})"
        )
    group = None if match["chan"] else int(match["group"])
    served = None if match["served"] is None else int(match["served"])
    if match["sparse"] and (int(match["kept"]), int(match["of"])) != (KEPT, BLOCK):
        raise FormatError(f"{name!r} keeps {match['kept']} of {match['of']} weights; fdk keeps {KEPT} of {BLOCK}")
    return Format(registry.kind(match["kind"]), int(match["bits"]), group, served, match["sparse"] is not None)
