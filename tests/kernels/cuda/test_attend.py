"""The attention of one new token: host arithmetic, compilation, and its values against float64."""

import math

import pytest
import torch

from fdk.kernels.cuda import attend
from fdk.testing import UNIT_ROUNDOFF


@pytest.mark.parametrize("length", [1, 100, 1000, 8256])
@pytest.mark.parametrize("key_heads", [1, 8, 128, 1000])
@pytest.mark.parametrize("heads", [1, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_configurations_are_possible(head_dim: int, heads: int, key_heads: int, length: int) -> None:
    config = attend.choose_config(head_dim, heads, key_heads, length, True)
    assert config.threads <= 1024 and config.shared_bytes <= 228 * 1024
    assert heads * head_dim // 4 % config.cluster == 0
    assert config.cluster == 1 or config.splits * config.cluster * key_heads <= 132


def test_no_configuration_for_other_heads() -> None:
    assert attend.choose_config(96, 4, 8, 100, True) is None
    assert attend.choose_config(128, 17, 8, 100, True) is None


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_compiles_without_spills(compiled, arch: str) -> None:
    configs = [
        attend.choose_config(head_dim, heads, 8, 8256, heads % 2 == 0, heads % 3 == 0)
        for head_dim in (32, 64, 128, 256)
        for heads in (1, 3, 4, 6)
    ]
    for config, result in zip(configs, compiled(("attend.cuh", c.defines(), arch) for c in configs), strict=True):
        assert result.spilled == 0 and result.registers * config.threads <= 65536, config


@pytest.mark.parametrize("length", [64, 2500])
@pytest.mark.parametrize(
    ("head_dim", "heads", "norm"),
    [(128, 3, False), (128, 6, False), (128, 2, True), (64, 4, False), (32, 1, True), (256, 2, False)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_a_new_token(where: str, dtype, head_dim: int, heads: int, norm: bool, length: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters, of compute capability 9.0")
    config = attend.choose_config(head_dim, heads, 6, length, dtype == torch.bfloat16, norm)
    # Seconds each on an emulated device, where the order of a run's warps is always the same.
    few, repeats = (length > 1000, 1) if where == "cpu" else (False, 2)
    check(config, where, length, (length // 2,) if few else (0, 1, 15, length // 2, length - 1), repeats)


@pytest.mark.parametrize(
    ("head_dim", "heads", "cluster", "warps", "splits"),
    [(128, 3, 2, 8, 8), (128, 3, 8, 4, 2), (128, 3, 1, 4, 16), (64, 4, 4, 4, 4), (256, 6, 1, 4, 3), (32, 1, 2, 4, 2)],
)
def test_attention_split_over_clusters(
    where: str, head_dim: int, heads: int, cluster: int, warps: int, splits: int
) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters, of compute capability 9.0")
    config = attend.Config(head_dim, heads, True, -(-heads // 4), warps, cluster, 2, splits=splits)
    # Positions of one cluster's turn; of several; of each that there is, and a second turn of some.
    span = cluster * warps * 1024 // head_dim
    check(config, where, 3 * splits * span // 2, (0, span, span + 1, splits * span - 1, splits * span + 5), 1)


def check(config: attend.Config, where: str, length: int, positions: tuple[int, ...], repeats: int) -> None:
    """What `config` makes of random caches of `length`, filled up to `positions`: right and equal `repeats` times."""
    batch, groups = 2, 3
    head_dim, heads, norm = config.head_dim, config.heads, config.norm
    dtype = torch.bfloat16 if config.bf16 else torch.float16
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(where)

    qkv = random(batch, groups * (heads + 2) * head_dim)
    past = random(batch, groups, length, head_dim), random(batch, groups, length, head_dim)
    angles = torch.rand(length, head_dim // 2, generator=generator).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype).to(where), angles.sin().to(dtype).to(where)
    scale = math.log2(math.e) / math.sqrt(head_dim)
    u, eps = UNIT_ROUNDOFF[dtype], 1e-5
    norms = (random(head_dim), random(head_dim)) if norm else None
    workspace = config.workspace(batch * groups, torch.device(where))
    for filled in positions:
        keys, values = past[0].clone(), past[1].clone()
        position = torch.tensor([filled], dtype=torch.int32, device=where)
        runs = []
        for _ in range(repeats):
            out = torch.full((batch, groups * heads * head_dim), torch.nan, dtype=dtype, device=where)
            attend.attend(config, qkv, keys, values, cos, sin, position, out, scale, norms, eps, workspace)
            runs.append(out)
        assert all(torch.equal(out, run) for run in runs)
        assert workspace is None or not workspace[1].any()
        q, k, v = qkv.double().view(batch, -1, head_dim).split([groups * heads, groups, groups], 1)
        if norm:
            q, k = (
                torch.nn.functional.rms_norm(x, x.shape[-1:], w.double(), eps)
                for x, w in zip((q, k), norms, strict=True)
            )
        flip = torch.ones(head_dim, dtype=torch.float64, device=where)
        flip[: head_dim // 2] = -1
        pairs = [(x * cos[filled].double(), x.roll(head_dim // 2, -1) * sin[filled].double() * flip) for x in (q, k)]
        turned = [(own + other).to(dtype).double() for own, other in pairs]
        # A rotated value next to the middle of two 16-bit numbers may be rounded to the other one, and where its two
        # terms nearly cancel, what is left of up to 16 roundings in float32 is seen.
        terms = pairs[1][0].abs() + pairs[1][1].abs()
        assert ((keys[:, :, filled].double() - turned[1]).abs() <= 2 * u * turned[1].abs() + 2.0**-20 * terms).all()
        assert torch.equal(values[:, :, filled], v.to(dtype))
        others = [i for i in range(length) if i != filled]
        assert torch.equal(keys[:, :, others], past[0][:, :, others])
        k, v = keys[:, :, : filled + 1].double(), values[:, :, : filled + 1].double()
        q = turned[0].view(batch, groups, heads, head_dim)
        scores = q @ k.mT / math.sqrt(head_dim)
        weights = scores.softmax(-1)
        expected = (weights @ v).view(batch, -1)
        # A score is off by roundings of q that fell to the other side and by float32 sums; weights by twice that.
        products = (q.square() @ k.square().mT).sqrt().amax(-1, keepdim=True) / math.sqrt(head_dim)
        off = (6 * u / math.sqrt(3) + 6 * math.sqrt(head_dim) * 2.0**-24) * products + 2.0**-20
        bound = (2 * off * (weights @ v.abs())).view(batch, -1) + 1.01 * u * expected.abs() + 2.0**-24
        assert ((out.double() - expected).abs() <= bound).all()
