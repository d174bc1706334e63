"""The k-means table against exact optima, and the inputs that trip k-means up."""

import numpy as np
import pytest
import torch

from fdk.packing.bits import unpack_codes
from fdk.quantise import quantise
from fdk.quantise.kmeans import weighted_kmeans


def unit_scale(weight):
    """Blocks of 64 divided by their largest magnitude: every absmax scale is 1, so the problem is unweighted."""
    blocks = weight.float().view(weight.shape[0], -1, 64)
    return (blocks / blocks.abs().amax(-1, keepdim=True)).view_as(weight)


def squared_error(x, centres):
    centres = np.sort(centres)
    return np.square(x - centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, x)]).sum()


@pytest.mark.parametrize(
    "bits", (1, 2, 3, 4, 5, pytest.param(6, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow))
)
@pytest.mark.parametrize("distribution", ("normal", "laplace"))
def test_within_half_a_percent_of_the_optimum(distribution, bits, request, dequantise):
    import kmeans1d  # here, so that a machine without the dev extra still runs the rest

    n = 128 if bits < 8 else 512
    weight = unit_scale(request.getfixturevalue(distribution)(n, 512, dtype=torch.float32))
    name = f"lut{bits}_g64"
    parts = quantise(weight, name, codebook="kmeans", scale="absmax")
    assert (parts["scales"] == 1).all()
    x = weight.double().flatten().numpy()
    optimum = squared_error(x, np.array(kmeans1d.cluster(x, 1 << bits).centroids))
    ours = (dequantise(parts, name, 512) - weight).square().sum().item()
    assert ours <= 1.005 * optimum


def weighted_optimum(points, mass, size):
    """Error of exact weighted k-means: dynamic programming over all boundaries, O(size * points^2)."""
    sums = [np.concatenate([[0.0], np.cumsum(mass * points**power)]) for power in range(3)]
    total, first, second = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(total > 0, second - first**2 / total, np.inf)
    np.fill_diagonal(cost, 0.0)
    cost[np.tril_indices_from(cost, -1)] = np.inf
    best = cost[0]
    for _ in range(size - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


@pytest.mark.parametrize("bits", (1, 2, 3, 4))
@pytest.mark.parametrize("scale", ("auto", "absmean"))
def test_minimises_the_error_of_weights_with_unequal_scales(bits, scale, dequantise):
    generator = torch.Generator().manual_seed(bits)
    row_scale = torch.randn(24, 1, generator=generator).exp()
    weight = torch.randn(24, 64, generator=generator) * row_scale
    name = f"lut{bits}_g16"
    parts = quantise(weight, name, codebook="kmeans", scale=scale)
    s = parts["scales"].double().repeat_interleave(16, 1)
    x, order = (weight.double() / s).flatten().sort()
    optimum = weighted_optimum(x.numpy(), s.square().flatten()[order].numpy(), 1 << bits)
    ours = (dequantise(parts, name, 64) - weight).square().sum().item()
    assert ours <= 1.005 * optimum


@pytest.mark.parametrize("bits", range(1, 9))
def test_table_is_ascending_and_rounded_like_the_weight(bits, normal):
    table = quantise(normal(64, 512), f"lut{bits}_g64", codebook="kmeans")["table"]
    assert table.dtype == torch.bfloat16 and table.shape == (1, 1 << bits)
    assert (table[0, 1:] > table[0, :-1]).all()


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_few_distinct_values_are_exact(bits, dequantise):
    weight = torch.tensor([-0.5, 0.0, 0.5]).repeat(2, 64)[:, :128].bfloat16()
    parts = quantise(weight, f"lut{bits}_g64", codebook="kmeans", scale="absmax")
    assert torch.equal(dequantise(parts, f"lut{bits}_g64", 128), weight.double())
    assert parts["table"][0, 2:].tolist() == [1.0] * ((1 << bits) - 2)
    assert unpack_codes(parts["codes"], bits, 128).max() == 2


@pytest.mark.parametrize("value", (0.0, 1.0, -2.5))
def test_constant_weights(value, dequantise):
    weight = torch.full((4, 64), value)
    parts = quantise(weight, "lut4_g64", codebook="kmeans")
    assert (dequantise(parts, "lut4_g64", 64) - weight).abs().max() <= 1e-6 * abs(value)


def test_outliers_far_beyond_the_scale(dequantise):
    weight = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    weight[3, 100], weight[5, 7] = 1e4, -3e3
    parts = quantise(weight, "lut2_chan", codebook="kmeans")
    s = parts["scales"].double().repeat_interleave(4096, 1)
    x, order = (weight.double() / s).flatten().sort()
    # Every 16th point near 0 stands for its neighbours; the tails, which hold the energy, are kept whole.
    points, mass = x.numpy(), s.square().flatten()[order].numpy()
    bulk = np.arange(64, len(points) - 64).reshape(-1, 16)
    kept = [np.r_[points[:64], points[bulk].mean(1), points[-64:]], np.r_[mass[:64], mass[bulk].sum(1), mass[-64:]]]
    ours = (dequantise(parts, "lut2_chan", 4096) - weight).square().sum().item()
    assert ours <= 1.005 * weighted_optimum(*kept, 4)


@pytest.mark.parametrize("size", (2, 16, 256))
def test_more_clusters_than_points_and_gaps(size):
    points = np.array([-1.0, -0.25, 0.5])
    centres = weighted_kmeans(points, np.ones(3), size)
    assert len(centres) == size and (np.diff(centres) >= 0).all()
    if size >= 3:
        assert np.array_equal(centres, np.r_[points, np.full(size - 3, 0.5)])


@pytest.mark.parametrize("seed", range(20))
def test_clumps_far_apart_have_no_wasted_centre(seed):
    rng = np.random.default_rng(seed)
    clumps = rng.uniform(-1, 1, 8) * 10.0 ** rng.uniform(-3, 3, 8)
    points = np.unique(np.concatenate([c + 1e-3 * rng.standard_normal(40) * abs(c) for c in clumps]))
    mass = rng.uniform(0.1, 10, len(points))
    size = int(rng.integers(2, 17))
    centres = weighted_kmeans(points, mass, size)
    assert len(centres) == size and (np.diff(centres) >= 0).all()
    error = (mass * np.square(points - centres[np.abs(points[:, None] - centres).argmin(1)])).sum()
    assert error <= 1.005 * weighted_optimum(points, mass, size)
