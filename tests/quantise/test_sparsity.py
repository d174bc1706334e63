"""Pruning to 16 of 32: which weights stay, and that dropped ones change nothing else."""

from __future__ import annotations

import pytest
import torch

import fdk
from fdk import reference
from fdk.packing.sparse import unpack_mask
from fdk.quantise import keep_largest, quantise, sqnr_db
from fdk.weight import QuantisedWeight

NAMES = ("int4_g64_sp16of32", "uint4_g32_sp16of32", "lut4_g64_sp16of32", "nf4_chan_sp16of32", "fp4_g64_sp16of32")


def test_the_largest_sixteen_of_every_block_stay(normal) -> None:
    weight = normal(7, 96, dtype=torch.float32)
    keep = keep_largest(weight).view(7, 3, 32)
    blocks = weight.abs().view(7, 3, 32)
    assert (keep.sum(2) == 16).all()
    assert (blocks.masked_fill(~keep, torch.inf).amin(2) >= blocks.masked_fill(keep, 0).amax(2)).all()


def test_ties_go_to_the_lower_column() -> None:
    assert keep_largest(torch.ones(1, 32)).tolist() == [[True] * 16 + [False] * 16]


def test_activations_weigh_the_columns(normal) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    x[:, ::2] *= 100
    keep = keep_largest(0.5 + torch.rand(16, 64, generator=generator), activations=x)
    assert keep[:, ::2].all() and not keep[:, 1::2].any()

    weight = normal(16, 64, dtype=torch.float32)
    x[:, ::2] /= 30

    def output_error(keep):
        return (x @ (weight * ~keep).T).square().sum()

    assert output_error(keep_largest(weight, x)) < output_error(keep_largest(weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["auto", "absmean", "search"])
def test_kept_weights_are_quantised_as_if_alone(name: str, scale: str, normal) -> None:
    """The kept weights of a group are those of a plain weight of half the group, scales and zeros included."""
    weight = normal(6, 128, seed=2)
    parts = quantise(weight, name, scale=scale)
    keep = unpack_mask(parts["mask"], 128)
    assert torch.equal(keep, keep_largest(weight))
    fmt = fdk.parse(name)
    plain = f"{fmt.kind.name}4_" + ("chan" if fmt.group is None else f"g{fmt.group // 2}")
    alone = quantise(weight[keep].view(6, 64), plain, scale=scale)
    assert all(torch.equal(parts[part], tensor) for part, tensor in alone.items())
    dense = reference.dequantise(QuantisedWeight.from_parts(name, 128, parts))
    assert (
        sqnr_db(weight[keep][None], dense[keep][None]) > (4 if scale == "absmean" else 15) and (dense[~keep] == 0).all()
    )


def test_a_given_mask_is_kept(normal) -> None:
    weight = normal(3, 64)
    keep = torch.zeros(3, 64, dtype=torch.bool)
    keep[:, 1::2] = True
    assert torch.equal(unpack_mask(quantise(weight, NAMES[0], keep=keep)["mask"], 64), keep)


def test_layers_and_models_take_sparse_formats(normal, tmp_path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    fdk.quantise_(net, "int4_g32_sp16of32")
    x = torch.randn(2, 64)
    fdk.save(net, tmp_path / "saved")
    other = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    assert torch.equal(fdk.load(tmp_path / "saved", model=other)(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": torch.ones(4, 64, dtype=torch.bool)}, "keep of proj keeps 32 of the 32 weights of row 0"),
        ({"keep": torch.ones(4, 64)}, r"proj: keep must be bool \[4, 64\], not torch.float32"),
        ({"keep": torch.ones(4, 32, dtype=torch.bool)}, r"proj: keep must be bool \[4, 64\]"),
    ],
)
def test_bad_masks_are_named(options, message: str, normal) -> None:
    with pytest.raises(fdk.FormatError, match=message):
        quantise(normal(4, 64), NAMES[0], name="proj", **options)


def test_bad_weights_are_named(normal) -> None:
    weight = normal(4, 64)
    weight[2, 45] = float("inf")
    with pytest.raises(fdk.FormatError, match=r"proj\[2, 45\] is inf"):
        quantise(weight, NAMES[0], name="proj")
    with pytest.raises(fdk.FormatError, match="k = 48 is not a multiple of 32"):
        quantise(normal(4, 48), "int4_chan_sp16of32")
    with pytest.raises(fdk.FormatError, match=r"activations are \[3, 32\], but the layer takes \[..., 64\]"):
        keep_largest(normal(4, 64), torch.ones(3, 32))
    with pytest.raises(fdk.FormatError, match="keeps every weight; use int4_g64_sp16of32 or leave keep out"):
        quantise(normal(4, 64), "int4_g64", keep=torch.ones(4, 64, dtype=torch.bool))
