"""CPU kernels in C++: one library with a plain C interface, an instruction set chosen when it is loaded.

build.py     sources, flags, compiler; for setup.py and for the build at run time
library.py   finds or builds the library, hands it torch's OpenMP runtime, chooses the instruction set
launch.py    tensors to pointers: the layout, the kernel
csrc/        fdk_cpu.h (the interface and the bytes), kernels.h (what every unit includes, one header for each idea),
             one unit per instruction set
"""

from fdk.kernels.cpu.launch import KERNEL, dequantise
from fdk.kernels.cpu.library import info

__all__ = ["KERNEL", "dequantise", "info"]
