"""What Triton's compiler makes of the tiles, without a GPU."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from fdk.kernels.triton import interpreted

pytestmark = pytest.mark.skipif(find_spec("triton") is None or interpreted(), reason="needs Triton's compiler")


@pytest.mark.parametrize("steps", [1, 2])
def test_the_bias_is_added_to_the_sum_and_not_before_it(steps: int, monkeypatch, tmp_path) -> None:
    """As the first term it would be rounded k times: a float32 product then leaves the bound of docs/numerics.md."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fdk.kernels.triton.source import product

    floats = ("x_ptr", "scales_ptr", "zeros_ptr", "table_ptr", "bias_ptr", "out_ptr")
    types = dict.fromkeys(floats, "*fp32") | {"codes_ptr": "*u8", "tiles_ptr": "*i32"}
    types |= dict.fromkeys(("m", "n", "k", "row_words", "groups"), "i32")
    constants = {"BITS": 6, "GROUP": 32, "OFFSET": 32, "CODES": 8, "BN": 32, "BM": 64, "BK": 32, "STEPS": steps}
    constants |= {"PACK": 1, "STAGES": 2, "BIAS": True, "EVEN_K": True}
    flags = ("STORED", "LOOKUP", "ZEROS", "TILES", "SPLIT", "INTERPRETED")
    constants |= dict.fromkeys(flags, False)
    names = product.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(product, signature, {(names.index(name),): value for name, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ttir"]
    start = re.findall(r"tt\.dot \S+ \S+ (%\w+)", code)
    assert len(start) == 1
    # The sum starts from a constant, or from what the loop carries.
    assert re.match(r"%cst|%acc_\d+ = %cst|%arg", start[0]) or re.search(rf"iter_args\({start[0]} = %cst", code)
