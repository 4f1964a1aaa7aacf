"""The GPU of this machine as the driver names it. No CUDA context is made, and no package is needed."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Device:
    """A GPU. compute_capability: such as "8.7"; cuda: what the driver supports, such as "12.6"; driver: its version."""

    name: str
    compute_capability: str
    cuda: str
    driver: str = ""

    @property
    def target(self) -> str:
        """The architecture's name, such as "sm_87"."""
        return "sm_" + self.compute_capability.replace(".", "")

    @property
    def tag(self) -> str:
        """The GPU's name as part of a file name, such as "nvidia-geforce-rtx-3080"."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or self.target


def current_device(index: int = 0) -> Device | None:
    """The GPU that CUDA would use, or None where there is no driver or no GPU."""
    cuda = _libcuda()
    if cuda is None or cuda.cuInit(0) != 0:
        return None
    handle, version = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(handle), index) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), handle)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(str(value.value))
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return Device(
        name.value.decode(errors="replace"),
        ".".join(capability),
        f"{version.value // 1000}.{version.value % 1000 // 10}",
        _driver_version(),
    )


def _libcuda() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_version() -> str:
    """The kernel driver's version, such as "580.159.03"; empty where it is not told."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\s(\d{3}\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else ""
