"""Which TensorRT this machine has: the full one (JetPack, desktop) or TensorRT-RTX; one code for both."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from matchanything_ros.errors import UserError

# Import names in the order in which they are tried. TensorRT-RTX comes under two, depending on how it was packaged.
MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True)
class Flavour:
    """An importable TensorRT. name: "tensorrt" or "tensorrt_rtx"; version: its full version; trt: its module."""

    name: str
    version: str
    trt: Any

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for GPUs that are not in this machine."""
        return self.name == "tensorrt_rtx"

    @property
    def title(self) -> str:
        return ("TensorRT-RTX " if self.ahead_of_time else "TensorRT ") + self.version


def flavours() -> tuple[list[Flavour], list[str]]:
    """The usable TensorRT modules, best first, and a sentence for each one that is there but cannot be used."""
    usable: list[Flavour] = []
    unusable: list[str] = []
    for name, modules in MODULES.items():
        for module_name in modules:
            try:
                trt = importlib.import_module(module_name)
            except ModuleNotFoundError:
                continue
            except (ImportError, OSError, RuntimeError) as error:  # a library it needs is missing
                unusable.append(f"{module_name} is installed and cannot be loaded ({_first_line(error)}).")
                continue
            reason = refusal(name, getattr(trt, "__version__", ""))
            if reason is None:
                usable.append(Flavour(name, str(trt.__version__), trt))
            else:
                unusable.append(reason)
            break
    return usable, unusable


def refusal(name: str, version: str) -> str | None:
    """Why this version cannot be used, or None."""
    if not version:
        return f"{name} is a placeholder without a library: install the TensorRT of your JetPack or CUDA instead."
    if name == "tensorrt" and int(version.split(".")[0]) < 10:
        return (
            f"TensorRT {version} is too old: strongly typed networks and the tensor-name API that this package uses "
            "are complete from 10.0 on; use JetPack 6 or pip install 'tensorrt>=10.3'."
        )
    return None


def load_flavour(name: str | None = None, for_target: bool = False) -> Flavour:
    """The TensorRT to use: the named one, or the first that is there; with `for_target` one that builds for other GPUs.

    Raises UserError with what to install when there is none.
    """
    usable, unusable = flavours()
    for flavour in usable:
        if name in (None, flavour.name) and (flavour.ahead_of_time or not for_target):
            return flavour
    if for_target:
        raise UserError(
            "Only TensorRT-RTX builds for a GPU that is not in this machine: "
            "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings, or build on the machine itself."
        )
    wanted = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}.get(name or "", "TensorRT")
    advice = "on a Jetson it comes with JetPack, elsewhere pip install '.[tensorrt]' in a clone of matchanything_ros."
    raise UserError(" ".join([*unusable, f"There is no usable {wanted} here: {advice}"]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
