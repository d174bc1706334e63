"""The canonical bit stream, against an independent packer that handles one bit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fdk.errors import FormatError
from fdk.packing import pack_codes, unpack_codes

SHAPES = ((1, 1), (3, 16), (5, 7), (4, 33), (7, 1000), (0, 8), (3, 0), (1, 8))


def one_bit_at_a_time(codes: np.ndarray, bits: int) -> np.ndarray:
    planes = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_stream_is_dense_and_little_endian(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = pack_codes(codes, bits)
    assert stream.shape == (shape[0], -(-shape[1] * bits // 8))
    if codes.numel():
        assert np.array_equal(stream.numpy(), one_bit_at_a_time(codes.numpy(), bits))
    assert torch.equal(unpack_codes(stream, bits, shape[1]), codes)


def test_three_bits_by_hand() -> None:
    # Codes 1, 2, 3, ... in three bits each: 001 010 011 100 101 110 111 000, first code in the low bits.
    stream = pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3)
    assert stream.tolist() == [[0b11_010_001, 0b0_101_100_0, 0b000_111_11]]


def test_packing_takes_strided_codes_and_never_aliases() -> None:
    codes = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    for bits in (4, 8):
        masked = codes & ((1 << bits) - 1)
        assert torch.equal(pack_codes(masked.T, bits), pack_codes(masked.T.contiguous(), bits))
        stream = pack_codes(masked, bits)
        stream.zero_()
        assert masked.any()


def test_meta_tensors_have_the_right_shape() -> None:
    stream = pack_codes(torch.empty(4, 30, dtype=torch.uint8, device="meta"), 3)
    assert stream.shape == (4, 12) and stream.is_meta
    assert unpack_codes(stream, 3, 30).shape == (4, 30)


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(FormatError, match="codes must be uint8"):
        pack_codes(torch.zeros(3, 4, dtype=torch.int32), 4)
    with pytest.raises(FormatError, match=r"uint8 \[n, 12\], not torch.uint8 \[2, 11\]"):
        unpack_codes(torch.zeros(2, 11, dtype=torch.uint8), 3, 32)
