"""The emulated GPU itself: what instructions compute, and that each kind of mistake is an error that says where."""

import ctypes
import random
import struct
from dataclasses import replace

import pytest

from emulate import SCHEDULES, EmulationError, Schedule, ptx, unavailable
from emulate.machine import Kernel

REASON = unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

HEAD = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry test(.param .u64 test_param_0)
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<40>;
.reg .f32 %f<9>;
.reg .b64 %rd<9>;
ld.param.u64 %rd1, [test_param_0];
cvta.to.global.u64 %rd1, %rd1;
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
"""


def run(
    body: str,
    words: list[int],
    threads: int = 32,
    grid: int = 1,
    cluster: int = 1,
    schedule: Schedule = SCHEDULES[0],
    **more,
) -> list[int]:
    """What a kernel of these statements makes of `words`: %rd1 their address, %rd3 that of the thread's word."""
    data = (ctypes.c_uint32 * len(words))(*words)
    first = ctypes.addressof(data)
    kernel = Kernel(ptx.translate(HEAD + body + "ret;\n}\n", 0))
    ranges = {"words": (first, first + 4 * len(words))}
    kernel.run(grid, threads, struct.pack("<Q", first), ranges, (0, 1024), cluster, 4, schedule=schedule, **more)
    return list(data)


def each(operation: str, *operands: list[int]) -> list[int]:
    """A 32-bit operation on every lane's operands."""
    loads = "".join(f"ld.global.u32 %r{i + 3}, [%rd3+{128 * i}];\n" for i in range(len(operands)))
    words = [word for operand in operands for word in operand]
    return run(f"{loads}{operation}\nst.global.u32 [%rd3], %r2;\n", words)[:32]


def lanes(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.choice([generator.getrandbits(32), generator.getrandbits(5), 0, 0xFFFFFFFF]) for _ in range(32)]


def test_permutes_choose_bytes() -> None:
    a, b, selectors = lanes(1), lanes(2), lanes(3)
    expected = []
    for x, y, selector in zip(a, b, selectors, strict=True):
        source = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picks = [selector >> 4 * i & 15 for i in range(4)]
        chosen = [source[p & 7] if p < 8 else 255 * (source[p & 7] >> 7) for p in picks]
        expected.append(int.from_bytes(bytes(chosen), "little"))
    assert each("prmt.b32 %r2, %r3, %r4, %r5;", a, b, selectors) == expected


@pytest.mark.parametrize("function", [0xE4, 0xEA, 0xAE, 0x6A, 0x96])
def test_functions_of_three_words(function: int) -> None:
    a, b, c = lanes(4), lanes(5), lanes(6)
    expected = [
        sum((function >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i for i in range(32))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert each(f"lop3.b32 %r2, %r3, %r4, %r5, {function};", a, b, c) == expected


def test_shifts_and_fields() -> None:
    a, b, by = lanes(7), lanes(8), lanes(9)
    pairs = list(zip(a, b, by, strict=True))
    assert each("shf.l.wrap.b32 %r2, %r3, %r4, %r5;", a, b, by) == [
        ((y << 32 | x) << (s % 32) >> 32) & 0xFFFFFFFF for x, y, s in pairs
    ]
    assert each("shf.r.clamp.b32 %r2, %r3, %r4, %r5;", a, b, by) == [
        (y << 32 | x) >> min(s, 32) & 0xFFFFFFFF for x, y, s in pairs
    ]
    assert each("bfi.b32 %r2, %r3, %r4, 5, 7;", a, b) == [y & ~(127 << 5) | (x & 127) << 5 for x, y, _ in pairs]
    assert each("shl.b32 %r2, %r3, %r4;", a, by) == [x << s & 0xFFFFFFFF if s < 32 else 0 for x, _, s in pairs]


def test_sixteen_bit_floats_round_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        values = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.randint(-30, 18, (32,))
        values[:4] = torch.tensor([0.0, 65520.0, 2.0**-25, 1 + 2.0**-9])
        words = values.view(torch.int32).tolist()
        body = f"ld.global.f32 %f1, [%rd3];\ncvt.rn.{kind}x2.f32 %r2, %f1, %f1;\nst.global.u32 [%rd3], %r2;\n"
        got = run(body, [word & 0xFFFFFFFF for word in words])
        expected = [int(v) & 0xFFFF for v in values.to(dtype).view(torch.int16)]
        assert got == [v << 16 | v for v in expected]


def test_diverged_lanes_meet_again() -> None:
    body = """
setp.lt.u32 %p1, %r1, 5;
mov.u32 %r2, 0;
@%p1 bra $SHORT;
$LOOP: add.s32 %r2, %r2, 1;
setp.lt.u32 %p2, %r2, %r1;
@%p2 bra $LOOP;
$SHORT: shfl.sync.idx.b32 %r3|%p3, %r2, 31, 31, -1;
st.global.u32 [%rd3], %r3;
"""
    for schedule in SCHEDULES:
        assert run(body, [0] * 32, schedule=schedule) == [31] * 32


# Message, statements, and the one that the message names.
MISTAKES = [
    ("unknown PTX opcode", "frobnicate.u32 %r2, %r1;", "frobnicate"),
    ("no operand; ends 4 bytes past words", "st.global.u32 [%rd3+4], %r1;", "st.global"),
    ("outside the CTA's 1024 bytes", "st.shared.u32 [%r1+1024], %r1;", "st.shared"),
    ("no multiple of the 4 bytes", "ld.global.u32 %r2, [%rd1+2];", "ld.global"),
    ("words is read before the wait", "ld.global.u32 %r2, [%rd1];", "ld.global"),
    ("no mbarrier", "mbarrier.arrive.shared::cta.b64 _, [%r5];", "mbarrier.arrive"),
    (
        "expects 1 arrivals in a phase",
        "mbarrier.init.shared::cta.b64 [%r5], 1;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 16;",
        "mbarrier.arrive.expect_tx",
    ),
    ("nothing moves any more", "bar.sync 1, 64;", "bar.sync"),
    (
        "before its cp.async",
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 cp.async.cg.shared.global [%r5], [%rd1], 16;\ncp.async.commit_group;",
        "ret",
    ),
    ("lane 1 writes shared address 0, which", "st.shared.u32 [%r5], %r1;", "(lanes 0x1) has written"),
    ("stopped itself", "trap;", "trap"),
    ("did not end the launch", "$AGAIN: bra $AGAIN;", "bra"),
    ("a predicate that differs within it", "setp.lt.u32 %p1, %r1, 5;\n@%p1 bar.sync 0;", "bar.sync"),
]


@pytest.mark.parametrize("message,body,named", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistakes_are_errors_that_name_the_statement(message: str, body: str, named: str) -> None:
    with pytest.raises((EmulationError, ptx.TranslationError), match=message) as raised:
        run("mov.u32 %r5, 0;\n" + body, [0] * 32, early=() if "wait" in message else None, limit=100_000)
    assert named in str(raised.value).replace(message, "")


def test_a_barrier_that_is_missing_shows_in_some_order() -> None:
    def exchange(barrier: str) -> str:
        return f"""
shl.b32 %r2, %r1, 2;
st.shared.u32 [%r2], %r1;
{barrier}
xor.b32 %r3, %r2, 128;
ld.shared.u32 %r4, [%r3];
st.global.u32 [%rd3], %r4;
"""

    expected = [i ^ 32 for i in range(64)]
    for schedule in SCHEDULES:
        assert run(exchange("bar.sync 0;"), [0] * 64, 64, schedule=schedule) == expected
        with pytest.raises(EmulationError, match="a race: lane 0 (reads|writes) shared address"):
            run(exchange(""), [0] * 64, 64, schedule=schedule)
    unwatched = [replace(schedule, races=False) for schedule in SCHEDULES]
    assert any(run(exchange(""), [0] * 64, 64, schedule=schedule) != expected for schedule in unwatched)


def test_a_copy_that_is_not_waited_for_shows_when_it_is_late() -> None:
    def copied(wait: str) -> str:
        return f"""
mov.u32 %r2, 512;
mov.u32 %r3, 0;
setp.ne.u32 %p1, %r1, 0;
@%p1 bra $JOIN;
mbarrier.init.shared::cta.b64 [%r2], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 128, [%r2];
$JOIN: bar.warp.sync -1;
{wait}
shl.b32 %r4, %r1, 2;
ld.shared.u32 %r5, [%r4];
$END: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra $END;
add.s32 %r5, %r5, 1;
st.global.u32 [%rd3], %r5;
"""

    wait = "$AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra $AGAIN;"
    for copies in ("at once", "late", "random"):
        assert run(copied(wait), list(range(32)), schedule=Schedule("forward", copies)) == list(range(1, 33))
        with pytest.raises(EmulationError, match="lane 0 reads shared address 0, .* of warp 0 .* has written"):
            run(copied(""), list(range(32)), schedule=Schedule("forward", copies))
    unwatched = Schedule("forward", "late", races=False)
    assert run(copied(""), list(range(32)), schedule=unwatched) != list(range(1, 33))


def test_what_an_arrival_tells_is_what_its_thread_knows() -> None:
    # Lane 31 arrives for what all lanes of warp 1 have read, and warp 0, which waits, writes there.
    def given_back(barrier: str) -> str:
        return f"""
mov.u32 %r2, 512;
setp.ne.u32 %p1, %r1, 0;
@%p1 bra $JOIN;
mbarrier.init.shared::cta.b64 [%r2], 1;
$JOIN: bar.sync 0;
and.b32 %r4, %r1, 31;
shl.b32 %r4, %r4, 2;
setp.lt.u32 %p1, %r1, 32;
@%p1 bra $AGAIN;
ld.shared.u32 %r5, [%r4];
{barrier}
setp.ne.u32 %p2, %r1, 63;
@%p2 bra $END;
mbarrier.arrive.shared::cta.b64 _, [%r2];
bra $END;
$AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra $AGAIN;
st.shared.u32 [%r4], %r1;
$END: ret;
"""

    for schedule in SCHEDULES:
        run(given_back("bar.warp.sync -1;"), [0] * 64, 64, schedule=schedule)
        with pytest.raises(EmulationError, match=r"lane 0 writes .* of warp 1 \(lanes 0x.*1\) has read"):
            run(given_back(""), [0] * 64, 64, schedule=schedule)


def test_stores_are_counted_in_other_ctas_of_a_cluster() -> None:
    # Each CTA of two sends its lanes' numbers to the other, which waits for 512 bytes.
    body = """
mov.u32 %r2, 512;
mov.u32 %r9, %cluster_ctarank;
setp.ne.u32 %p1, %r1, 0;
@%p1 bra $JOIN;
mbarrier.init.shared::cta.b64 [%r2], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512;
$JOIN: bar.warp.sync -1;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
xor.b32 %r10, %r9, 1;
shl.b32 %r3, %r1, 4;
mapa.shared::cluster.u32 %r4, %r3, %r10;
mapa.shared::cluster.u32 %r5, %r2, %r10;
shl.b32 %r6, %r9, 8;
add.s32 %r6, %r6, %r1;
st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r4], {%r6, %r6, %r6, %r6}, [%r5];
$AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra $AGAIN;
ld.shared.v4.u32 {%r11, %r12, %r13, %r14}, [%r3];
shl.b32 %r7, %r9, 7;
cvt.u64.u32 %rd5, %r7;
add.s64 %rd6, %rd3, %rd5;
st.global.u32 [%rd6], %r14;
"""
    for schedule in SCHEDULES:
        got = run(body, [0] * 64, grid=2, cluster=2, schedule=schedule)
        assert got == [256 + i for i in range(32)] + list(range(32))
