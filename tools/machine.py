"""What a measurement was made on: machine, clocks, versions; and how much memory is in use. For `bench`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import subprocess
from pathlib import Path

import matchanything_ros

GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
MODULES = ("numpy", "cv2", "onnxruntime", "torch", "tensorrt", "tensorrt_rtx")


def describe() -> dict[str, object]:
    """Processor, GPU with its clocks of this moment, operating system and versions of what can be imported."""
    versions = {"matchanything_ros": matchanything_ros.__version__, "python": platform.python_version()}
    for name in MODULES:
        try:
            versions[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except Exception:  # not installed, or installed and broken: not what is measured here
            continue
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cpu_threads": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "gpu": gpu(),
        "versions": versions,
    }


def gpu() -> dict[str, str] | None:
    """Name, driver and clocks of the first GPU as nvidia-smi tells them; None without it (as on a Jetson)."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(GPU_FIELDS, (field.strip() for field in answer.strip().split(",")), strict=False))


def device_memory_used() -> int | None:
    """Bytes in use on the first GPU, by everybody; None without a GPU.

    Asked of the driver in the device's primary context, which ONNX Runtime, PyTorch and pycuda share; the first call
    makes it, so that differences of two calls leave out what the context itself takes.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or cuda.cuCtxPushCurrent_v2(context)
        or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        or cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    )
    return None if failed else total.value - free.value


class HostMemory:
    """Peak of this process's resident memory since `reset`, in bytes above what it had then."""

    def __init__(self) -> None:
        self._start = 0
        self.reset()

    def reset(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # not permitted in some containers: the peak since the process's start counts
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
        self._start = _status("VmRSS")

    def peak(self) -> int:
        return max(_status("VmHWM") - self._start, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
