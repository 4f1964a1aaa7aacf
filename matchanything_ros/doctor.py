"""`matchanything doctor`: what this machine has, and what is missing for what. It never fails: exit status 0 always.

One function for each topic; each returns findings and is independent of the others.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import matchanything_ros
from matchanything_ros.bundle import BUNDLES, load_bundle
from matchanything_ros.engines.device import current_device
from matchanything_ros.engines.flavour import flavours
from matchanything_ros.engines.open_plan import plan_report
from matchanything_ros.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line. missing: what this lack prevents and what helps; None where nothing is missing."""

    what: str
    value: str
    missing: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="*", help="also look at these bundles (.onnx) and their plans")


def run(args: argparse.Namespace) -> int:
    topics: dict[str, Callable[[], list[Finding]]] = {
        "System": system,
        "ROS 2": ros,
        "Bags": bags,
        "ONNX Runtime": onnx_runtime,
        "GPU": gpu,
        "TensorRT": tensorrt,
        "Offline tools": offline_tools,
        "Bundles": lambda: bundles(args.bundles),
    }
    missing: list[Finding] = []
    for title, topic in topics.items():
        print(title)
        for finding in _guarded(topic):
            print(f"  {finding.what:22} {finding.value}")
            if finding.missing:
                missing.append(finding)
    print("Missing" if missing else "Nothing is missing.")
    for finding in missing:
        print(f"  {finding.what}: {finding.missing}")
    return 0


def system() -> list[Finding]:
    """Operating system, Python and the two libraries that everything needs."""
    found = [
        Finding("matchanything_ros", f"{matchanything_ros.__version__} in {Path(__file__).parent}"),
        Finding("system", f"{_os_name()}, {platform.machine()}, {os.cpu_count()} CPU cores"),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name, module in (("numpy", "numpy"), ("OpenCV", "cv2")):
        found.append(_module(name, module, "nothing works without it: pip install numpy opencv-python-headless"))
    return found


def ros() -> list[Finding]:
    """Distribution, client library, our messages, cv_bridge and the middleware."""
    node = "the node does not run: source a ROS 2 installation and build with colcon, or pip install '.[ros]' (x86-64)"
    distribution = os.environ.get("ROS_DISTRO", "")
    found = [Finding("distribution", distribution or ("from wheels" if _has("rclpy") else "none sourced"))]
    found.append(_module("rclpy", "rclpy", node))
    build = "the node does not run: its messages were not built; build with colcon, or pip install '.[ros]' (x86-64)"
    found.append(_module("messages", "matchanything_ros.msg", build, value="generated"))
    bridge = "none (our own converter serves)"
    found.append(Finding("cv_bridge", "present" if _has("cv_bridge") else bridge))
    found.append(Finding("middleware", os.environ.get("RMW_IMPLEMENTATION", "the default of ROS")))
    return found


def bags() -> list[Finding]:
    """What `matchanything replay` needs."""
    return [_module("rosbags", "rosbags", "replay does not run: pip install rosbags", load=False)]


def onnx_runtime() -> list[Finding]:
    """Version and execution providers."""
    advice = "the backend onnxruntime does not run: pip install onnxruntime, or onnxruntime-gpu for CUDA"
    found = [_module("onnxruntime", "onnxruntime", advice)]
    if found[0].missing is None:
        names = importlib.import_module("onnxruntime").get_available_providers()
        cuda = "CUDAExecutionProvider" in names
        lack = None
        if not cuda and current_device() is not None:
            lack = (
                "there is a GPU that ONNX Runtime cannot use: pip install onnxruntime-gpu (and uninstall onnxruntime)"
            )
        shown = ", ".join(name.removesuffix("ExecutionProvider") for name in names)
        found.append(Finding("providers", shown, lack))
    return found


def gpu() -> list[Finding]:
    """Driver, GPU and pycuda."""
    device = current_device()
    if device is None:
        reason = "no NVIDIA driver or GPU: TensorRT and CUDA do not run, networks run on the CPU, slowly"
        return [Finding("GPU", "none", reason)]
    driver = f"driver {device.driver or 'unknown'}, CUDA {device.cuda}"
    return [
        Finding("GPU", f"{device.name}, compute capability {device.compute_capability}"),
        Finding("driver", driver),
        _module("pycuda", "pycuda", "the backend tensorrt does not run: pip install pycuda (needs the CUDA toolkit)"),
    ]


def tensorrt() -> list[Finding]:
    """The TensorRT flavours that can be used, and why others cannot."""
    usable, unusable = flavours()
    found = [Finding(flavour.title.rsplit(" ", 1)[0], flavour.version) for flavour in usable]
    found += [Finding("unusable", sentence) for sentence in unusable]
    if not usable:
        advice = "no plan can be built or run: it comes with JetPack; elsewhere pip install '.[tensorrt]' in a clone"
        found.append(Finding("TensorRT", "none", advice))
    return found


def offline_tools() -> list[Finding]:
    """What export, validate and bench need; never the robot."""
    advice = "no checkpoint can be exported here: pip install '.[tools]' in a clone (not needed on a robot)"
    names = {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "safetensors": "safetensors"}
    return [_module(name, module, advice, load=False) for name, module in names.items()]


def bundles(paths: list[str]) -> list[Finding]:
    """The bundles in the package and the given ones: whole or damaged, and which plan would run."""
    files = [str(file) for file in sorted(BUNDLES.glob("*.onnx"))] + list(paths)
    found = []
    for path in files:
        try:
            bundle = load_bundle(path)
        except UserError as error:
            found.append(Finding(Path(path).stem, "damaged", str(error)))
            continue
        manifest = bundle.manifest
        size = bundle.onnx.stat().st_size + sum(
            file.stat().st_size for file in [bundle.onnx.with_name(bundle.onnx.name + ".data")] if file.is_file()
        )
        text = f"{manifest.family} {manifest.variant}, {manifest.precision}, {size / 1e6:.1f} MB, {bundle.hash}"
        found.append(Finding(manifest.name, text))
        found += [Finding("", line) for line in plan_report(bundle)]
    return found or [Finding("bundles", "none", "nothing to match with: reinstall the package, or export a checkpoint")]


def _guarded(topic: Callable[[], list[Finding]]) -> list[Finding]:
    """A topic that fails is a finding, too: half-installed libraries are what this command is called for."""
    try:
        return topic()
    except Exception as error:
        return [Finding("error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")]


def _module(name: str, module: str, advice: str, value: str = "", load: bool = True) -> Finding:
    """Whether a module is there and (with load) can be imported; its version, or what its lack prevents."""
    if not _has(module):
        return Finding(name, "none", advice)
    if load:
        try:
            importlib.import_module(module)
        except Exception as error:  # a shared library that is missing raises many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Finding(name, f"cannot be loaded: {reason}", advice)
    return Finding(name, value or _version(module))


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(module: str) -> str:
    loaded = sys.modules.get(module)
    if (text := getattr(loaded, "__version__", None)) is not None:
        return str(text)
    # A distribution may be called otherwise than its module (onnxruntime-gpu, ros-jazzy-rclpy).
    for name in metadata.packages_distributions().get(module, [module]):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "present"


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return f"{platform.system()} {platform.release()}"
