"""The fragment layout: where each code lies, by the formula of its documentation, and its size."""

import pytest
import torch

from fdk import testing
from fdk.formats import parse
from fdk.packing import fragments, layout, unpack_codes
from fdk.packing.bits import unpack_planes


@pytest.mark.parametrize("bits", range(1, 9))
def test_pieces_cover_every_bit_once(bits: int) -> None:
    taken = [(word, bit + i) for _, _, width, word, bit in fragments.pieces(bits) for i in range(width)]
    assert sorted(taken) == [(word, bit) for word in range(bits) for bit in range(32)]
    codes = [(e, first + i) for e, first, width, _, _ in fragments.pieces(bits) for i in range(width)]
    assert sorted(codes) == [(e, i) for e in range(32) for i in range(bits)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_where_the_module_says(bits: int) -> None:
    n, k = 128, 192
    weight = testing.random_weight(parse(f"int{bits}_g64"), n, k, seed=bits)
    codes = unpack_codes(weight.parts["codes"], bits, k)
    packed = weight.to_layout("fragments").parts["codes"]
    assert packed.shape == (n // 64, k // 64, bits, 32, 4)
    words = packed.transpose(2, 3).reshape(n // 64, k // 64, 32, 4, bits)
    generator = torch.Generator().manual_seed(bits)
    for _ in range(200):
        row, column = (int(torch.randint(0, limit, (), generator=generator)) for limit in (n, k))
        r, h, g = row % 64 // 16, row % 16 // 8, row % 8
        s, t, j = column % 64 // 16, column % 8 // 2, column % 16 // 8 * 2 + column % 2
        lane_words = words[row // 64, column // 64, 4 * g + t, r].tolist()
        code = 0
        for e, first, width, word, bit in fragments.pieces(bits):
            if e == 8 * s + 4 * h + j:
                code |= (lane_words[word] >> bit & ((1 << width) - 1)) << first
        assert code == int(codes[row, column]), (row, column)


def test_planes_lie_where_the_module_says() -> None:
    n, k = 128, 192
    weight = testing.random_weight(parse("nest8_g64"), n, k, seed=1)
    codes = unpack_planes(weight.parts["planes"], k)
    packed = weight.to_layout("fragments").parts["codes"]
    assert packed.shape == (n // 64, k // 64, 8, 32, 4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        row, column = (int(torch.randint(0, limit, (), generator=generator)) for limit in (n, k))
        r, h, g = row % 64 // 16, row % 16 // 8, row % 8
        s, t, j = column % 64 // 16, column % 8 // 2, column % 16 // 8 * 2 + column % 2
        pair, second = 4 * s + 2 * h + j // 2, j % 2
        words = packed[row // 64, column // 64, :, 4 * g + t, r].tolist()
        code = sum((word >> 16 * second + pair & 1) << 7 - p for p, word in enumerate(words))
        assert code == int(codes[row, column]), (row, column)


def test_kept_codes_lie_where_the_module_says() -> None:
    n, k = 128, 160
    weight = testing.random_weight(parse("int4_chan_sp16of32"), n, k, seed=1)
    packed = weight.to_layout("fragments").parts["codes"]
    assert packed.shape == (n // 64, 3, 6, 16, 4)
    words = packed.transpose(2, 3).reshape(n // 64, 3, 16, 24)
    mask, codes = weight.parts["mask"].view(torch.int32), weight.parts["codes"].view(torch.int32)
    for row in range(n):
        for block in range(k // 32):
            r, h, g = row % 64 // 16, row % 16 // 8, row % 8
            found = words[row // 64, block // 2, 2 * g + block % 2, 6 * r + 3 * h :][:3]
            assert found.tolist() == [mask[row, block], codes[row, 2 * block], codes[row, 2 * block + 1]], (row, block)
    assert not words[:, 2, 1::2].any()


@pytest.mark.parametrize("name,reason", [("uint4_g64", "zero points"), ("int4_g32", "a multiple of 64, not 32")])
def test_sparse_weights_that_it_does_not_hold(name: str, reason: str) -> None:
    weight = testing.random_weight(parse(f"{name}_sp16of32"), 64, 64)
    assert reason in layout("fragments").supports(weight.geometry)


@pytest.mark.parametrize("name", ["lut3_g64", "uint5_g32", "int1_g16"])
def test_size_is_exactly_bits_per_padded_weight(name: str) -> None:
    fmt = parse(name)
    weight = testing.random_weight(fmt, 100, 192).to_layout("fragments")
    assert weight.parts["codes"].numel() * 32 == 128 * 192 * fmt.bits
    assert weight.parts["scales"].shape == (2 * fmt.groups(192), 64)


def test_scales_of_a_lane_are_contiguous() -> None:
    weight = testing.random_weight(parse("int4_g64"), 64, 128)
    packed = weight.to_layout("fragments").parts["scales"]
    for row in range(64):
        r, h, g = row // 16, row % 16 // 8, row % 8
        assert torch.equal(packed[: weight.geometry.groups, g * 8 + r * 2 + h], weight.parts["scales"][row])


def test_each_table_starts_a_block() -> None:
    weight = testing.random_weight(parse("lut2_g64"), 150, 64, tables=3, seed=4)
    counts = fragments.block_counts(weight.geometry)
    assert counts == tuple(-(-(end - start) // 64) for start, end in weight.geometry.ranges)
    assert weight.to_layout("fragments").parts["codes"].shape[0] == sum(counts)
    assert layout("fragments").supports(weight.geometry) is None
