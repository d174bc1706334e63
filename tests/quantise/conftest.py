"""Weights to quantise, and dequantisation by the definition, independent of fdk.reference."""

import pytest
import torch

from fdk.formats import parse
from fdk.packing.bits import unpack_codes


@pytest.fixture(scope="session")
def dequantise():
    """(parts, format name, k) -> float64 [n, k]."""

    def decode(parts, name, k):
        format = parse(name)
        codes = unpack_codes(parts["codes"], format.bits, k).long()
        size = format.group_size(k)
        if format.is_table:
            values = parts["table"][0].double()[codes]
        elif format.has_zeros:
            values = codes.double() - parts["zeros"].double().repeat_interleave(size, 1)
        else:
            values = codes.double() - format.offset
        return values * parts["scales"].double().repeat_interleave(size, 1)

    return decode


@pytest.fixture(scope="session")
def normal():
    """(n, k, seed, dtype) -> normal weights with standard deviation 0.02."""

    def make(n, k, seed=0, dtype=torch.bfloat16):
        return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)

    return make


@pytest.fixture(scope="session")
def laplace():
    """(n, k, seed, dtype) -> Laplace weights with mean absolute value 0.02."""

    def make(n, k, seed=0, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        sign = torch.randint(0, 2, (n, k), generator=generator) * 2 - 1
        return (torch.empty(n, k).exponential_(generator=generator) * sign * 0.02).to(dtype)

    return make
