"""Compile each kernel for a GPU, which needs none; print their names."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hesse.solvers.sweeps.kernels.columns import _walk
from hesse.solvers.sweeps.kernels.rounding import EXACT
from hesse.solvers.sweeps.kernels.two_sided import _descend, _solve_tiles

HOPPER = GPUTarget("cuda", 90, 32)
WHOLE = ("width", "height", "first", "last", "stride", "diagonal", "leftmost")
IN_COLUMNS = {"codes": "*i8", "lowest": "fp32", "highest": "fp32"}


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> None:
    types = (
        {"group": "*i64", "kept": "*i8"} | dict.fromkeys(WHOLE, "i32") | types | dict.fromkeys(constants, "constexpr")
    )
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, places), target=HOPPER, options=EXACT)
    print(kernel.fn.__name__)


columns = {"WIDTH": 128, "ROWS": 32}
compile_kernel(_walk, {**columns, "dtype": tl.bfloat16}, IN_COLUMNS)
compile_kernel(_walk, {**columns, "dtype": tl.float16, "zero_point": None, "kept": None}, IN_COLUMNS)
compile_kernel(_walk, {**columns, "dtype": tl.float32, **dict.fromkeys(("codes", "scale", "zero_point"))}, IN_COLUMNS)
compile_kernel(_solve_tiles, {"TILE": 64, "DEPTH": 16, "dtype": tl.bfloat16}, {})
compile_kernel(_descend, {"CHUNK": 512, "CHUNKS": 8, "dtype": tl.float32}, {})
