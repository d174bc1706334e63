"""From PTX text to a program of the emulated machine (csrc/): registers become words, names become operations.

A statement becomes one line of text: the name of an operation that csrc/ registers, its guard and its operands, which
are words of a warp's registers or plain numbers. What is not known here is an error that names the statement; what is
known here but not there is one too, when the program is loaded.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

PARAM_AT = 0x1000
"""Address of the first parameter; twin of the constant in csrc/machine.hpp."""

_STATEMENT = re.compile(
    r"\s*(?://[^\n]*|(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<text>[^;{}\s][^;{}]*(?:\{[^}]*\}[^;{}]*)*);)", re.ASCII
)
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_BITS = {"pred": 1, "b8": 16, "b16": 16, "f16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}
_SPACES = {"global": 0, "shared": 1, "shared::cta": 1, "param": 2, "generic": 3, "shared::cluster": 4}
# What only tells the hardware how likely data is to be used again, or in which order it is seen.
_HINTS = re.compile(r"\.(?:nc|cg|cs|ca|wb|wt|lu|weak|L1::\w+|L2::\w+|level::\w+)(?=\.|$)")


class TranslationError(Exception):
    """PTX that the emulator does not know; the message holds the statement."""


@dataclass
class Program:
    """A translated kernel: `text` for the machine, statements by program counter for messages."""

    entry: str
    text: str
    statements: list[str]
    param_bytes: int
    threads: int | None


@dataclass
class _Translator:
    words: int = 0
    lines: list[str] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    scopes: list[dict[str, tuple[int, int]]] = field(default_factory=lambda: [{}])
    symbols: dict[str, int] = field(default_factory=dict)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    specials: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    statement: str = ""
    guard: str = "-1 0"

    # --- registers ---

    def allocate(self, bits: int) -> int:
        at = self.words
        self.words += {1: 16, 16: 32, 32: 32, 64: 64}[bits]  # predicates, a bit for each lane, keep vectors aligned
        return at

    def declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        bits = _BITS.get(kind) or int(kind[1:])
        for name in names.split(","):
            name = name.strip()
            if many := re.fullmatch(r"(.+)<(\d+)>", name):
                for i in range(int(many[2])):
                    # Words are given out at first use: most of a thousand registers are optimised away.
                    self.scopes[-1][f"{many[1]}{i}"] = (-1, bits)
            else:
                self.scopes[-1][name] = (-1, bits)

    def register(self, name: str) -> tuple[int, int] | None:
        """(word, bits) of a register, or None if there is none of that name."""
        for scope in reversed(self.scopes):
            if name in scope:
                at, bits = scope[name]
                if at < 0:
                    at = self.allocate(bits)
                    scope[name] = (at, bits)
                return at, bits
        return None

    def constant(self, value: int, bits: int) -> int:
        key = (value & (1 << 64) - 1 if bits == 64 else value & 0xFFFFFFFF, 32 if bits == 16 else bits)
        if key not in self.constants:
            self.constants[key] = self.allocate(bits)
        return self.constants[key]

    def operand(self, text: str, bits: int) -> int:
        """The word of a register or of a constant of that many bits."""
        if found := self.register(text):
            at, have = found
            if (have == 64) != (bits == 64) or (have == 1) != (bits == 1):
                raise TranslationError(f"{text} has {have} bits where {bits} are needed: {self.statement}")
            return at
        if text.startswith("%"):
            name = text[1:]
            if name not in self.specials:
                self.specials[name] = self.allocate(32)
            return self.specials[name]
        if text in self.symbols:
            return self.constant(self.symbols[text], bits)
        return self.constant(self.number(text, bits), bits)

    def number(self, text: str, bits: int = 32) -> int:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return int(text[2:], 16)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16)
        if re.fullmatch(r"-?\d+\.\d*", text):
            return int.from_bytes(struct.pack("<f", float(text)), "little")
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            raise TranslationError(f"cannot read the operand {text!r} of: {self.statement}") from None

    def address(self, text: str, bits: int = 32) -> tuple[int, int]:
        """(word, offset) of an address in brackets."""
        name, offset = _ADDRESS.fullmatch(text).groups()
        return self.operand(name, bits), int(offset or "0", 0)

    def vector(self, text: str, bits: int) -> list[int]:
        items = [item.strip() for item in text.strip("{}").split(",")] if text.startswith("{") else [text]
        return [self.scratch(bits) if item == "_" else self.operand(item, bits) for item in items]

    def scratch(self, bits: int) -> int:
        return self.constant(0, bits) if bits == 1 else self.allocate(bits)

    def emit(self, name: str, *operands: int | str) -> None:
        self.lines.append(f"code {name} {self.guard} {' '.join(map(str, operands))}")
        self.statements.append(self.statement)

    # --- statements ---

    def translate(self, text: str) -> None:
        self.statement = " ".join(text.split())
        self.guard = "-1 0"
        if guard := _GUARD.match(text):
            self.guard = f"{self.operand(guard[2], 1)} {int(bool(guard[1]))}"
            text = text[guard.end() :]
        opcode, *rest = text.split(None, 1)
        operands = _OPERAND.findall(rest[0]) if rest else []
        method = getattr(self, "op_" + opcode.split(".")[0], None)
        if method is None:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        method(opcode, operands)

    def simple(self, opcode: str, operands: list[str], bits: int, *others: int) -> None:
        """An operation on registers: the result of `bits` bits, operands of `others`, the last for all that follow."""
        widths = [bits, *others] + [others[-1]] * (len(operands) - 1 - len(others))
        self.emit(opcode, *(self.operand(text, width) for text, width in zip(operands, widths, strict=True)))

    @staticmethod
    def bits(opcode: str) -> int:
        """Bits of the last type of an opcode; of pairs of halves 32."""
        kind = opcode.split(".")[-1]
        if kind == "pred":
            return 1
        return 32 if kind.endswith("x2") else 16 if kind == "bf16" else max(16, int(kind[1:]))

    def same(self, opcode: str, operands: list[str]) -> None:
        self.simple(opcode, operands, *[self.bits(opcode)] * 2)

    def op_add(self, opcode: str, operands: list[str]) -> None:
        self.same(opcode.replace(".rn.f32", ".f32"), operands)

    op_sub = op_add
    op_and = op_or = op_xor = op_div = op_rem = op_min = op_max = op_neg = op_abs = op_prmt = same
    op_rcp = op_sqrt = op_rsqrt = op_ex2 = op_lg2 = op_fma = same

    def op_popc(self, opcode: str, operands: list[str]) -> None:
        self.simple(opcode, operands, 32, self.bits(opcode))

    op_clz = op_popc

    def op_not(self, opcode: str, operands: list[str]) -> None:
        if opcode.endswith(".pred"):
            operands = [operands[0], operands[1], operands[1]]
        self.same(opcode, operands)

    def op_mul(self, opcode: str, operands: list[str]) -> None:
        if ".wide." in opcode:
            bits = self.bits(opcode)
            self.simple(opcode, operands, 2 * bits, bits)
        else:
            self.op_add(opcode, operands)

    def op_mad(self, opcode: str, operands: list[str]) -> None:
        bits = self.bits(opcode)
        wide = 2 * bits if ".wide." in opcode else bits
        self.simple(opcode, operands, wide, bits, bits, wide)

    def op_shl(self, opcode: str, operands: list[str]) -> None:
        bits = self.bits(opcode)
        self.simple(opcode, operands, bits, bits, 32)

    op_shr = op_bfe = op_shl

    def op_bfi(self, opcode: str, operands: list[str]) -> None:
        bits = self.bits(opcode)
        self.simple(opcode, operands, bits, bits, bits, 32)

    def op_shf(self, opcode: str, operands: list[str]) -> None:
        self.simple(opcode, operands, 32, 32)

    def op_lop3(self, opcode: str, operands: list[str]) -> None:
        *registers, function = operands
        self.emit(opcode, *(self.operand(text, 32) for text in registers), self.number(function))

    def op_setp(self, opcode: str, operands: list[str]) -> None:
        if len(operands) != 3 or "|" in operands[0] or opcode.count(".") != 2:
            raise TranslationError(f"setp in a form that is not emulated: {self.statement}")
        self.simple(opcode, operands, 1, self.bits(opcode))

    def op_selp(self, opcode: str, operands: list[str]) -> None:
        bits = self.bits(opcode)
        self.simple("selp.64" if bits == 64 else "selp.32", operands, bits, bits, bits, 1)

    def op_cvt(self, opcode: str, operands: list[str]) -> None:
        parts = opcode.split(".")
        if ".bf16x2." in opcode or ".f16x2." in opcode:
            self.simple(opcode, operands, 32, 32)
        else:
            self.simple(opcode, operands, self.bits("." + parts[-2]), self.bits(opcode))

    def op_cvta(self, opcode: str, operands: list[str]) -> None:
        name = opcode.removesuffix(".u64")
        if name in ("cvta.to.global", "cvta.global"):
            name = "mov.64"
        self.simple(name, operands, 64, 64)

    def op_mov(self, opcode: str, operands: list[str]) -> None:
        bits = self.bits(opcode)
        to, value = operands
        if value == "%clock":
            self.emit("clock", self.operand(to, 32))
        elif to.startswith("{"):
            self.emit(f"unpack.{bits}", *self.vector(to, bits // 2), self.operand(value, bits))
        elif value.startswith("{"):
            self.emit(f"pack.{bits}", self.operand(to, bits), *self.vector(value, bits // 2))
        elif bits == 1:
            self.emit("mov.pred", self.operand(to, 1), self.operand(value, 1), self.operand(value, 1))
        else:
            self.simple("mov.64" if bits == 64 else "mov.32", operands, bits, bits)

    # --- control ---

    def op_bra(self, opcode: str, operands: list[str]) -> None:
        self.emit("bra", "@" + operands[0])

    def op_ret(self, opcode: str, operands: list[str]) -> None:
        self.emit("exit")

    op_exit = op_ret

    def op_trap(self, opcode: str, operands: list[str]) -> None:
        self.emit("trap")

    def op_nothing(self, opcode: str, operands: list[str]) -> None:
        self.emit("nop")

    # Every write is seen at once, so that orders between them mean nothing.
    op_membar = op_fence = op_prefetch = op_nanosleep = op_nothing

    def op_griddepcontrol(self, opcode: str, operands: list[str]) -> None:
        self.emit(opcode if opcode == "griddepcontrol.wait" else "nop")

    def op_createpolicy(self, opcode: str, operands: list[str]) -> None:
        self.emit("mov.64", self.operand(operands[0], 64), self.constant(0, 64))

    def op_setmaxnreg(self, opcode: str, operands: list[str]) -> None:
        self.emit("together")

    # --- memory ---

    def access(self, opcode: str) -> tuple[int, int, str, bool]:
        """(space, elements, type, whether others may change the value meanwhile) of a load or store."""
        parts = _HINTS.sub("", opcode).split(".")[1:]
        latest = False
        for name in ("volatile", "relaxed", "acquire", "release", "gpu", "sys", "cta", "cluster"):
            if name in parts:
                parts.remove(name)
                latest = True
        space = _SPACES[parts.pop(0)] if parts[0] in _SPACES else _SPACES["generic"]
        count = int(parts.pop(0)[1:]) if parts[0] in ("v2", "v4") else 1
        if len(parts) != 1:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        return space, count, parts[0], latest

    def place(self, text: str, space: int) -> tuple[int, int, int]:
        """(word, whether it has 64 bits, offset) of an address in a space."""
        name, offset = _ADDRESS.fullmatch(text).groups()
        found = self.register(name)
        wide = found[1] == 64 if found else space != _SPACES["shared"]
        return self.operand(name, 64 if wide else 32), int(wide), int(offset or "0", 0)

    def op_ld(self, opcode: str, operands: list[str]) -> None:
        space, count, kind, latest = self.access(opcode)
        bits = int(kind[1:])
        to = self.vector(operands[0], 32 if bits < 32 else bits)
        name = f"{'s' if kind[0] == 's' else 'u'}{bits}" if bits < 32 else str(bits)
        self.emit(f"ld.{'latest.' * latest}{name}", space, count, *self.place(operands[1], space), *to)

    def op_st(self, opcode: str, operands: list[str]) -> None:
        if opcode.startswith("st.async."):
            self.store_counted(opcode, operands)
            return
        space, count, kind, _ = self.access(opcode)
        bits = int(kind[1:])
        self.emit(f"st.{bits}", space, count, *self.place(operands[0], space), *self.vector(operands[1], max(32, bits)))

    def store_counted(self, opcode: str, operands: list[str]) -> None:
        if not re.fullmatch(
            r"st\.async(\.weak)?\.shared::cluster\.mbarrier::complete_tx::bytes(\.v[24])?\.[bfus]32", opcode
        ):
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        values = self.vector(operands[1], 32)
        self.emit("st.async", *self.address(operands[0]), *self.address(operands[2]), len(values), *values)

    def op_atom(self, opcode: str, operands: list[str]) -> None:
        result = operands.pop(0) if opcode.startswith("atom") else None
        parts = [
            p for p in opcode.split(".")[1:] if p not in ("relaxed", "acquire", "release", "acq_rel", "gpu", "sys")
        ]
        space = _SPACES[parts.pop(0)] if parts[0] in _SPACES else _SPACES["generic"]
        if parts not in (["add", "u32"], ["add", "s32"], ["exch", "b32"]):
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        at = -1 if result is None else self.vector(result, 32)[0]
        word, wide, offset = self.place(operands[0], space)
        self.emit(f"atom.{parts[0]}.32", at, space, word, wide, offset, self.operand(operands[1], 32))

    op_red = op_atom

    def op_cp(self, opcode: str, operands: list[str]) -> None:
        name = _HINTS.sub("", opcode.replace(".cg.", ".").replace(".ca.", "."))
        hints = opcode.count("L2::cache_hint")
        operands = operands[: len(operands) - hints]
        counted = "shared::cluster.global.mbarrier::complete_tx::bytes"
        if name in ("cp.async.commit_group", "cp.async.wait_all"):
            self.emit(name)
        elif name == "cp.async.wait_group":
            self.emit(name, self.number(operands[0]))
        elif name == "cp.async.shared.global" and len(operands) == 3:
            to, source = self.address(operands[0]), self.address(operands[1], 64)
            self.emit("cp.async", *to, *source, self.number(operands[2]))
        elif name == f"cp.async.bulk.{counted}":
            to, source, barrier = self.address(operands[0]), self.address(operands[1], 64), self.address(operands[3])
            self.emit("cp.async.bulk", *to, *source, self.operand(operands[2], 32), *barrier)
        elif name.removesuffix(".multicast::cluster") == f"cp.async.bulk.tensor.2d.{counted}":
            source, place = re.fullmatch(r"\[\s*(\S+)\s*,\s*\{([^}]*)\}\s*\]", operands[1]).groups()
            place = [self.operand(text.strip(), 32) for text in place.split(",")]
            mask = self.operand(operands[3], 32) if len(operands) > 3 else -1
            to, barrier = self.address(operands[0]), self.address(operands[2])
            self.emit("cp.async.bulk.tensor.2d", *to, self.operand(source, 64), *place, *barrier, mask)
        else:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")

    def op_mapa(self, opcode: str, operands: list[str]) -> None:
        if opcode != "mapa.shared::cluster.u32":
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        self.simple("mapa", operands, 32, 32)

    # --- barriers and what lanes exchange ---

    def op_mbarrier(self, opcode: str, operands: list[str]) -> None:
        plain = re.sub(
            r"\.(release|acquire|relaxed|cta|cluster|shared::cta|shared::cluster|shared|b64)(?=\.|$)", "", opcode
        )
        if plain in ("mbarrier.try_wait.parity", "mbarrier.test_wait.parity"):
            at = self.operand(operands[0], 1)
            self.emit(plain, at, *self.address(operands[1]), self.operand(operands[2], 32))
            return
        if plain.startswith("mbarrier.arrive") and operands.pop(0) != "_":
            raise TranslationError(f"states of barriers are not emulated: {self.statement}")
        if plain not in ("mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "mbarrier.arrive.expect_tx"):
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        self.emit(plain, *self.address(operands[0]), *(self.operand(text, 32) for text in operands[1:]))

    def op_bar(self, opcode: str, operands: list[str]) -> None:
        if opcode == "bar.warp.sync":
            self.emit(opcode, self.operand(operands[0], 32))
        elif opcode in ("bar.sync", "bar.arrive"):
            number, *threads = (self.operand(text, 32) for text in operands)
            self.emit(opcode, number, *(threads or [-1]))
        else:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")

    def op_barrier(self, opcode: str, operands: list[str]) -> None:
        plain = re.sub(r"\.(release|acquire|relaxed|aligned)(?=\.|$)", "", opcode)
        if plain in ("barrier.cluster.arrive", "barrier.cluster.wait"):
            self.emit(plain)
        elif plain in ("barrier.sync", "barrier.arrive"):
            self.op_bar(plain.replace("barrier", "bar"), operands)
        else:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")

    def op_shfl(self, opcode: str, operands: list[str]) -> None:
        result, _, valid = operands[0].partition("|")
        at = self.operand(valid, 1) if valid and valid != "_" else -1
        value, lane, bounds, mask = (self.operand(text, 32) for text in operands[1:])
        self.emit(opcode.removesuffix(".b32"), mask, self.operand(result, 32), at, value, lane, bounds)

    def op_redux(self, opcode: str, operands: list[str]) -> None:
        result, value, mask = (self.operand(text, 32) for text in operands)
        self.emit(opcode, mask, result, value)

    def op_vote(self, opcode: str, operands: list[str]) -> None:
        negated = operands[1].startswith("!")
        if negated:
            raise TranslationError(f"votes of negated predicates are not emulated: {self.statement}")
        result = self.operand(operands[0], self.bits(opcode))
        self.emit(opcode, self.operand(operands[2], 32), result, self.operand(operands[1], 1))

    def op_elect(self, opcode: str, operands: list[str]) -> None:
        result, _, chosen = operands[0].partition("|")
        at = -1 if result == "_" else self.operand(result, 32)
        self.emit(opcode, self.operand(operands[1], 32), at, self.operand(chosen, 1))

    # --- tensor cores ---

    def op_ldmatrix(self, opcode: str, operands: list[str], store: bool = False) -> None:
        form = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", opcode)
        if not form:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        where, registers = operands if store else reversed(operands)
        word, offset = self.address(where)
        name = opcode.split(".")[0]
        self.emit(name, int(form[1]), int(bool(form[2])), word, offset, *self.vector(registers, 32))

    def op_stmatrix(self, opcode: str, operands: list[str]) -> None:
        self.op_ldmatrix(opcode, operands, store=True)

    def op_mma(self, opcode: str, operands: list[str]) -> None:
        if form := re.fullmatch(r"mma\.sp\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32", opcode):
            *vectors, indices, pair = operands
            registers = [at for text in vectors for at in self.vector(text, 32)]
            self.emit(f"mma.sp.m16n8k32.{form[1]}", *registers, self.operand(indices, 32), self.number(pair))
            return
        forms = {
            "m16n8k16.row.col.f32.bf16.bf16.f32": "mma.m16n8k16.bf16",
            "m16n8k16.row.col.f32.f16.f16.f32": "mma.m16n8k16.f16",
            "m16n8k32.row.col.s32.u8.s8.s32": "mma.m16n8k32.u8.s8",
            "m16n8k32.row.col.s32.s8.s8.s32": "mma.m16n8k32.s8.s8",
            "m16n8k32.row.col.s32.u8.u8.s32": "mma.m16n8k32.u8.u8",
        }
        name = forms.get(opcode.removeprefix("mma.sync.aligned."))
        if name is None:
            raise TranslationError(f"unknown PTX opcode {opcode}: {self.statement}")
        self.emit(name, *(at for text in operands for at in self.vector(text, 32)))

    def op_wgmma(self, opcode: str, operands: list[str]) -> None:
        if opcode in ("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned"):
            self.emit(opcode.removesuffix(".sync.aligned"))
            return
        if opcode == "wgmma.wait_group.sync.aligned":
            self.emit("wgmma.wait_group", self.number(operands[0]))
            return
        form = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", opcode)
        if not form or not operands[1].startswith("{") or operands[4:] != ["1", "1", "0"]:
            raise TranslationError(f"wgmma in a form that is not emulated: {self.statement}")
        d, a = self.vector(operands[0], 32), self.vector(operands[1], 32)
        if len(d) != int(form[1]) // 2 or len(a) != 4:
            raise TranslationError(f"wgmma with {len(d)} and {len(a)} registers: {self.statement}")
        self.emit(f"wgmma.{form[2]}", int(form[1]), *d, *a, self.operand(operands[2], 64), self.operand(operands[3], 1))

    # --- the whole ---

    def function(self, body: str) -> None:
        at = 0
        while match := _STATEMENT.match(body, at):
            at = match.end()
            if match["brace"] == "{":
                self.scopes.append({})
            elif match["brace"] == "}":
                self.scopes.pop()
            elif match["label"]:
                self.labels[match["label"]] = len(self.lines)
            elif text := match["text"]:
                if text.startswith(".reg"):
                    self.declare(text)
                elif not text.startswith((".pragma", ".loc")):
                    if text.startswith("."):
                        raise TranslationError(f"unknown PTX directive: {text}")
                    self.translate(text)
        if body[at:].strip():
            raise TranslationError(f"cannot read PTX from here on: {body[at : at + 200]!r}")
        self.statement, self.guard = "(end of the kernel)", "-1 0"
        self.emit("exit")


def translate(ptx: str, shared_base: int) -> Program:
    """The program of the one kernel in `ptx`, with shared memory from address `shared_base` on."""
    head = re.search(r"\.visible\s+\.entry\s+(\w+)\(([^)]*)\)([^{]*)\{", ptx)
    if head is None:
        raise TranslationError("no kernel in the PTX")
    entry, params, directives = head.groups()
    translator = _Translator()
    offset = 0
    for param in params.split(","):
        found = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", param)
        if not found:
            raise TranslationError(f"cannot read the parameter {param!r}")
        size = int(found[4]) if found[4] else int(found[2][1:]) // 8
        align = int(found[1]) if found[1] else size
        offset = -(-offset // align) * align
        translator.symbols[found[3]] = PARAM_AT + offset
        offset += size
    variables = re.findall(r"(\.extern\s+)?\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[", ptx)
    for extern, name in variables:
        if not extern:
            raise TranslationError(f"static shared memory is not emulated: {name}")
        translator.symbols[name] = shared_base
    translator.function(ptx[head.end() : ptx.rindex("}")])
    header = [f"words {translator.words}"]
    names = {1: "pred", 16: "32", 32: "32", 64: "64"}
    header += [f"constant {at} {names[bits]} {value}" for (value, bits), at in translator.constants.items()]
    header += [f"special {at} {name}" for name, at in translator.specials.items()]
    lines = []
    for line in translator.lines:
        start, _, label = line.partition("@")
        lines.append(f"{start}{translator.labels[label]}" if label else line)
    threads = re.search(r"\.maxntid\s+(\d+)", directives)
    text = "\n".join(header + lines) + "\n"
    return Program(entry, text, translator.statements, offset, int(threads[1]) if threads else None)
