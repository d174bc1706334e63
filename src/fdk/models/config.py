"""QuantisationConfig: what becomes of each layer of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from fdk import kernels
from fdk.arguments import as_path, check_name, shown
from fdk.errors import FormatError
from fdk.formats import Format, parse
from fdk.formats.registry import INT, LUT
from fdk.nn.convert import DEFAULT_SKIP, Recipe
from fdk.quantise.scales import METHODS

CODEBOOKS = ("uniform", "kmeans", "int")
DENSE_BITS = 16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}

# Names of the source projects that choose a meaning of the codes, not a piece of code: any kernel serves them.
FLAVOURS = {"marlin": "int4 values code - 8", "marlin-lut": "the values of int4 behind a table"}


@dataclass(frozen=True)
class QuantisationConfig:
    """How the linear layers of a model are quantised.

    bits        1 to 8, or a format name such as "lut4_g64" (then block_size is not given).
    block_size  consecutive weights along k that share a scale: a multiple of 16, or "chan" (also None or -1) for one
                scale per row. Default 64.
    kernel      "auto", a kernel's name (`fdk.kernels.names()`), "marlin" (4 bits: value = code - 8 with
                code = clamp(round(w / s) + 8, 0, 15)) or "marlin-lut" (the same values behind a table).
    skip        regular expression; layers whose name it finds stay dense, whatever the overrides say. "" skips none.
    format      a format name in place of bits and block_size.
    codebook    of lut formats: "uniform" (linspace(-1, 1, 2^bits)), "kmeans" (one table fitted to each layer) or
                "int" (the values of the int format behind a table).
    scale       "auto" (mean |w| of a block to 2 bits, max |w| above), "absmax", "absmean" or "search".
    overrides   {regular expression: format name or bits}; the last that finds something in a layer's name counts.
                16 keeps the layer dense. Bits stand for a lut format of the config's block size.
    dtype       of scales, tables and activations; None: bfloat16 in a copy, the layer's own in place.

    FormatError names the field, the value and what is allowed.
    """

    bits: int | str | None = None
    block_size: int | str | None = 64
    kernel: str = "auto"
    skip: str = DEFAULT_SKIP
    format: Format | str | None = None
    codebook: str = "uniform"
    scale: str = "auto"
    overrides: Mapping[str, str | int | Format] = field(default_factory=dict)
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value) -> None:
            object.__setattr__(self, name, value)

        put("kernel", _check_kernel(self.kernel))
        put("dtype", check_dtype(self.dtype))
        if isinstance(self.codebook, torch.Tensor):
            raise FormatError(
                "codebook is a tensor, which no text file can hold; choose one of "
                f"{', '.join(CODEBOOKS)}, and give the table as lut= of fdk.models.quantise"
            )
        check_name(self.codebook, "codebook", CODEBOOKS)
        check_name(self.scale, "scale", METHODS)
        put("skip", "" if self.skip is None else self.skip)
        check_pattern("skip", self.skip)
        fmt = self._main_format()
        if fmt.kind is not LUT and self.codebook != "uniform":
            raise FormatError(
                f"codebook {self.codebook!r} fits a table, but {fmt} defines its own values; use lut{fmt.bits}"
            )
        put("format", fmt)
        put("bits", fmt.bits)
        put("block_size", "chan" if fmt.group is None else fmt.group)
        if not isinstance(self.overrides, Mapping):
            raise FormatError(f"overrides must map expressions to formats or bits, not {shown(self.overrides)}")
        overrides = {}
        for pattern, value in self.overrides.items():
            check_pattern("overrides", pattern)
            overrides[pattern] = self._override(value, f"overrides[{pattern!r}]")
        put("overrides", overrides)

    def _main_format(self) -> Format:
        bits, given = self.bits, self.format
        if isinstance(bits, str) and given is None and not bits.isdigit():
            bits, given = None, bits
        if given is not None:
            fmt = parse(given)
            group = "chan" if fmt.group is None else fmt.group
            if bits not in (None, fmt.bits) or self.block_size not in (64, group):
                raise FormatError(
                    f"format {fmt} contradicts bits={self.bits}, block_size={self.block_size}; give the format alone"
                )
            if self.kernel in FLAVOURS and self.format is not None and fmt not in self._flavoured(fmt):
                raise FormatError(f"kernel {self.kernel!r} means {FLAVOURS[self.kernel]}, not {fmt}; use kernel='auto'")
            return fmt
        if bits is None:
            raise FormatError("a configuration needs bits (1 to 8) or a format name such as format='lut4_g64'")
        return self._lut_or_int(_check_bits(bits, "bits"), _check_group(self.block_size))

    def _flavoured(self, fmt: Format) -> tuple[Format, ...]:
        kind = INT if self.kernel == "marlin" else LUT
        return (Format(kind, 4, fmt.group),)

    def _lut_or_int(self, bits: int, group: int | None) -> Format:
        """The format that plain bits stand for under this kernel."""
        if self.kernel not in FLAVOURS:
            return Format(LUT, bits, group)
        if bits != 4:
            raise FormatError(f"kernel {self.kernel!r} has 4 bits only, not {bits}; use kernel='auto'")
        return Format(INT if self.kernel == "marlin" else LUT, bits, group)

    def _override(self, value, where: str) -> Format | int:
        if isinstance(value, Format):
            return value
        if isinstance(value, str) and not value.isdigit():
            try:
                return parse(value)
            except FormatError as error:
                raise FormatError(f"{where}: {error}") from None
        if isinstance(value, str | int) and value in (DENSE_BITS, str(DENSE_BITS)):
            return DENSE_BITS
        try:
            return self._lut_or_int(_check_bits(value, "bits"), self.format.group)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None

    def _decide(self, name: str) -> Format | None:
        chosen: Format | int = self.format
        for pattern, value in self.overrides.items():
            if re.search(pattern, name):
                chosen = value
        return None if chosen == DENSE_BITS else chosen

    def recipe(self, name: str) -> Recipe | None:
        """How the layer called `name` is quantised; None if it stays dense."""
        if self.skip and re.search(self.skip, name):
            return None
        fmt = self._decide(name)
        if fmt is None:
            return None
        codebook = "int" if self.kernel == "marlin-lut" and fmt.kind is LUT else self.codebook
        kernel = "auto" if self.kernel in FLAVOURS else self.kernel
        return Recipe(fmt, codebook, self.scale, kernel, self.dtype)

    def check_names(self, names: list[str]) -> None:
        """FormatError for an override that finds no layer among `names`, or only layers that `skip` leaves out."""
        for pattern in self.overrides:
            found = [name for name in names if re.search(pattern, name)]
            if not found:
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise FormatError(
                    f"override {pattern!r} matches no layer; the linear layers are called {some or 'nothing'}"
                )
            if self.skip and all(re.search(self.skip, name) for name in found):
                raise FormatError(
                    f"override {pattern!r} matches only {found[0]!r}, which skip = {self.skip!r} leaves dense; "
                    "give skip='' or an expression that does not find it"
                )

    def to_dict(self) -> dict:
        """Plain JSON values, which `from_dict` takes."""
        return {
            "format": str(self.format),
            "kernel": self.kernel,
            "skip": self.skip,
            "codebook": self.codebook,
            "scale": self.scale,
            "overrides": {
                pattern: value if value == DENSE_BITS else str(value) for pattern, value in self.overrides.items()
            },
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> QuantisationConfig:
        """The configuration that `to_dict` wrote; FormatError for a key that it does not know."""
        if not isinstance(values, Mapping):
            raise FormatError(f"values is {shown(values)}; give a mapping as `to_dict` makes it")
        known = [entry.name for entry in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise FormatError(f"unknown key {shown(unknown[0])} in a quantisation config; known: {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_text(cls, path: str | Path, **settings) -> QuantisationConfig:
        """A configuration with the overrides of a text file (see `read_overrides`); `settings` are the other fields."""
        return cls(**settings, overrides=read_overrides(path))


def read_overrides(path: str | Path) -> dict[str, str | int]:
    """Overrides from a text file of lines `layer.name: bits`; a format name may stand for the bits.

    Text after # and empty lines are ignored. Names are whole names, not expressions. FormatError names file and line.
    """
    path = as_path(path, "path of the overrides")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read the overrides in {path}: {getattr(error, 'strerror', None) or error}") from None
    overrides: dict[str, str | int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        name, colon, value = (piece.strip() for piece in line.partition(":"))
        where = f"{path}, line {number}"
        if not colon or not name or not value:
            raise FormatError(f"{where}: {line!r} is not 'layer.name: bits'")
        pattern = f"^{re.escape(name)}$"
        if pattern in overrides:
            raise FormatError(f"{where}: {name} is named a second time; keep one of the lines")
        try:
            overrides[pattern] = _check_bits(value, "bits", dense=True) if value.isdigit() else str(parse(value))
        except FormatError as error:
            raise FormatError(f"{where}: {name}: {error}") from None
    return overrides


def _check_bits(bits, what: str, dense: bool = False) -> int:
    number = int(bits) if isinstance(bits, str) and bits.isdigit() else bits
    if (
        isinstance(number, int)
        and not isinstance(number, bool)
        and (number in LUT.bits or (dense and number == DENSE_BITS))
    ):
        return number
    also = " (16 keeps a layer dense)" if dense else ""
    text = bits if isinstance(bits, str) and bits.isdigit() else shown(bits)
    raise FormatError(f"{what} = {text} is not a width; choose 1 to 8{also}")


def _check_group(block_size) -> int | None:
    if block_size is None or (isinstance(block_size, str | int) and block_size in ("chan", -1)):
        return None
    number = int(block_size) if isinstance(block_size, str) and block_size.isdigit() else block_size
    if not isinstance(number, int) or isinstance(number, bool) or number < 16 or number % 16:
        raise FormatError(
            f"block_size = {shown(block_size)} is not a multiple of 16; use 16, 32, 64, 128, ... or 'chan'"
        )
    return number


def _check_kernel(kernel: str) -> str:
    available = ("auto", *kernels.names(), *FLAVOURS)
    check_name(kernel, "kernel", available)
    return kernel


def check_dtype(dtype) -> torch.dtype | None:
    name = _DTYPE_ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    found = DTYPES.get(name) if isinstance(name, str) else name
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise FormatError(f"dtype {shown(dtype)} is not supported; use {', '.join(DTYPES)}")
    return found


def check_pattern(field_name: str, pattern: object) -> None:
    """FormatError, naming the field, unless it is a regular expression."""
    try:
        re.compile(pattern if isinstance(pattern, str) else None)
    except (re.error, TypeError) as error:
        raise FormatError(f"{field_name} = {shown(pattern)} is not a regular expression: {error}") from None
