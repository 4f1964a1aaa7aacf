"""The GPU's kernels as a library for the CPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "matchanything_ros" / "engines" / "kernels.cu"


@functools.lru_cache(maxsize=1)
def compiled_kernels() -> ctypes.CDLL | None:
    """kernels.cu compiled as C++, with a launch_NAME(grid, block, arguments) each; None without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    code = (
        "struct Index { int x, y; }; static thread_local Index blockIdx, blockDim, threadIdx;\n"
        "#define __global__\n#define __device__\n"
        f'#include "{KERNELS}"\n'
        "template <class F, class... A> static void launch(F f, int gx, int gy, int bx, int by, A... a) {\n"
        "  blockDim = {bx, by};\n"
        "  for (blockIdx.y = 0; blockIdx.y < gy; ++blockIdx.y) for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x)\n"
        "    for (threadIdx.y = 0; threadIdx.y < by; ++threadIdx.y)\n"
        "      for (threadIdx.x = 0; threadIdx.x < bx; ++threadIdx.x) f(a...);\n}\n"
        'extern "C" void launch_resize_rows(int gx, int gy, int bx, int by, const unsigned char* a, int b, int c,\n'
        "    int d, int e, const int* f, const float* g, int h, int i, float* j) {\n"
        "  launch(resize_rows, gx, gy, bx, by, a, b, c, d, e, f, g, h, i, j); }\n"
        'extern "C" void launch_resize_columns(int gx, int gy, int bx, int by, const float* a, int b, int c, int d,\n'
        "    const int* e, const float* f, int g, int h, int i, int j, int k, int l, float* m) {\n"
        "  launch(resize_columns, gx, gy, bx, by, a, b, c, d, e, f, g, h, i, j, k, l, m); }\n"
    )
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        library = Path(folder) / "kernels.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), "-x", "c++", "-"]
        subprocess.run(command, input=code, text=True, check=True)
        return ctypes.CDLL(str(library))
