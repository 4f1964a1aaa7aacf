"""kernels.cu -> kernels.ptx with NVRTC; run it after changing the kernels, on any machine, no GPU needed.

    pip download nvidia-cuda-nvrtc-cu11==11.8.89 && unzip -d nvrtc nvidia_cuda_nvrtc*.whl
    python -m matchanything_tools.compile_kernels nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2

An old NVRTC on purpose: its PTX is accepted by every later driver, JetPack 6's among them, while the PTX of a new one
is refused by older drivers.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys

from matchanything_ros.engines import gpu_preprocess

SOURCE = gpu_preprocess.PTX.with_suffix(".cu")
ARCHITECTURE = "compute_75"  # the oldest that TensorRT 10 supports


def source_line() -> str:
    """The first line of the PTX: which source it was made from."""
    return f"// made from kernels.cu, sha256 {hashlib.sha256(SOURCE.read_bytes()).hexdigest()}\n"


def compile_ptx(library: str) -> str:
    """PTX of the kernels. library: path of libnvrtc. Raises RuntimeError with the compiler's log."""
    nvrtc = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = SOURCE.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None)
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={ARCHITECTURE}".encode())
    failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


if __name__ == "__main__":
    gpu_preprocess.PTX.write_text(source_line() + compile_ptx(sys.argv[1]), encoding="utf-8")
    print(f"wrote {gpu_preprocess.PTX}")
