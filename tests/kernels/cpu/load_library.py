"""Load the library with ctypes and multiply on every instruction set there is: for an aarch64 Python without torch.

python load_library.py LIBRARY prints the instruction sets whose product of small integers was exact.
"""

import ctypes
import platform
import sys
from array import array
from ctypes import c_int32, c_int64, c_void_p

N, K, FP32, INT = 40, 96, 2, 1


def address(values: array) -> c_void_p:
    return c_void_p(values.buffer_info()[0])


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    library.fdk_weight_size.restype, library.fdk_weight_size.argtypes = c_int64, [c_int64]
    memory = array("q", bytes(library.fdk_weight_size(1) + 8))
    codes = [[(3 * row + 5 * k) % 16 for k in range(K)] for row in range(N)]
    stream = array("B", [row[k] | row[k + 1] << 4 for row in codes for k in range(0, K, 2)])
    scales, ends = array("f", [0.5 + row for row in range(N) for _ in range(K // 32)]), array("q", [N])
    x, out, data = array("f", [k % 7 - 3 for k in range(K)]), array("f", bytes(4 * N)), array("B", bytes(1 << 16))
    status = library.fdk_weight_init(
        address(memory), address(data), c_int64(N), c_int64(K), c_int32(4), c_int64(32), c_int32(FP32), c_int32(INT),
        address(ends), c_int64(1), None, c_int32(0),
    )  # fmt: skip
    assert status == 0
    library.fdk_pack(address(memory), address(data), address(stream), address(scales), None, c_int32(1))
    expected = [(0.5 + row) * sum((codes[row][k] - 8) * x[k] for k in range(K)) for row in range(N)]
    exact = []
    for isa in range(16):
        if not library.fdk_isa_available(c_int32(isa)):
            continue
        library.fdk_use_isa(c_int32(isa))
        library.fdk_linear(address(memory), address(x), None, address(out), c_int64(1), c_int32(1))
        assert list(out) == expected, isa
        exact.append(str(isa))
    print(platform.machine(), *exact)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
