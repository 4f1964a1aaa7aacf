"""ONNX -> serialized TensorRT plan, in memory. It needs no torch: a robot builds its own plans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matchanything_ros.bundle import Bundle, Size, load_bundle
from matchanything_ros.engines.buildlog import BuildLog, parser_sentence, trt_logger
from matchanything_ros.engines.device import Device, current_device
from matchanything_ros.engines.flavour import Flavour, load_flavour
from matchanything_ros.engines.interruptible import interruptible
from matchanything_ros.engines.plan import Profile
from matchanything_ros.errors import UserError

Progress = Callable[[str, int, int], None]  # phase, step, steps


@dataclass(frozen=True)
class Built:
    """A serialized plan and how it came about. data: a buffer; device_memory: bytes, where the build told it."""

    data: Any
    flavour: Flavour
    device: Device | None
    targets: tuple[str, ...]
    profile: Profile
    seconds: float
    device_memory: int | None
    warnings: tuple[str, ...]
    timing_cache: bytes | None


def build_engine(
    source: Bundle | str | Path,
    *,
    target: str | tuple[str, ...] | None = None,
    profile: Mapping[str, tuple[Size, Size, Size]] | None = None,
    workspace_mib: int | None = None,
    timing_cache: bytes | None = None,
    flavour: Flavour | None = None,
    progress: Progress | None = None,
    verbose: Callable[[str], None] | None = None,
) -> Built:
    """Build a bundle, or a bare ONNX file, into a plan.

    target: "sm_86" or several, for GPUs that are not here (TensorRT-RTX; needs no GPU); None: the GPU of this machine.
    profile: input name -> (min, opt, max), each (height, width); by default the bundle's, or the ONNX file's fixed one.
    Raises UserError: the parser refuses a node, the build fails, it was interrupted, there is no TensorRT or no GPU.
    """
    targets = (target,) if isinstance(target, str) else tuple(target or ())
    flavour = flavour or load_flavour(for_target=bool(targets))
    trt, log = flavour.trt, BuildLog(verbose)
    capabilities = [compute_capability(trt, name) for name in targets]
    device = None if targets else current_device()
    if not targets and device is None:
        raise UserError(
            "There is no GPU here to build for: run this on the machine that has it"
            + (", or name its architecture, such as --target sm_86." if flavour.ahead_of_time else ".")
        )
    onnx = source.onnx if isinstance(source, Bundle) else Path(source)
    if profile is None:
        if not isinstance(source, Bundle) and onnx.with_suffix(".json").is_file():
            source = load_bundle(onnx)
        bundle = source if isinstance(source, Bundle) else None
        profile = {spec.name: (spec.min, spec.opt, spec.max) for spec in bundle.manifest.inputs} if bundle else {}
    logger = trt_logger(trt, log)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only mode from 11 on
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise UserError(parser_sentence(onnx, [parser.get_error(i) for i in range(parser.num_errors)], log))
    config = builder.create_builder_config()
    full = _set_profile(builder, config, network, profile, onnx)
    config.clear_flag(trt.BuilderFlag.TF32)  # precision is what the graph says, and nothing less
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
    cached = not flavour.ahead_of_time  # TensorRT-RTX has no tactics to time
    if cached:
        cache = config.create_timing_cache(timing_cache or b"")
        if not config.set_timing_cache(cache, False):  # another device's or version's
            config.set_timing_cache(config.create_timing_cache(b""), False)
    stop = threading.Event()
    config.progress_monitor = monitor = _monitor(trt, progress, stop)
    start = time.monotonic()
    plan = interruptible(lambda: builder.build_serialized_network(network, config), stop)
    seconds = time.monotonic() - start
    del monitor
    if plan is None:
        if stop.is_set():
            raise UserError("The build was interrupted; nothing was written.")
        raise UserError(log.failure(onnx))
    return Built(
        data=plan,
        flavour=flavour,
        device=device,
        targets=targets,
        profile=full,
        seconds=seconds,
        device_memory=log.device_memory(),
        warnings=log.warnings(),
        timing_cache=bytes(config.get_timing_cache().serialize()) if cached else None,
    )


def compute_capability(trt: Any, target: str) -> Any:
    """The ComputeCapability of a target such as "sm_86"; UserError lists the known ones."""
    known = {f"sm_{name[2:]}": value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"}
    if target not in known:
        raise UserError(
            f"TensorRT-RTX {trt.__version__} does not build for '{target}': it knows {', '.join(sorted(known))}; "
            "for any other GPU (every Jetson among them) build with TensorRT on the machine itself."
        )
    return known[target]


def _set_profile(builder: Any, config: Any, network: Any, wanted: Mapping[str, Any], onnx: Path) -> Profile:
    """Give every input its sizes; returns the profile of all inputs, fixed ones included."""
    full: Profile = {}
    profile, dynamic = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            full[tensor.name] = ((shape[-2], shape[-1]),) * 3
            continue
        if tensor.name not in wanted:
            raise UserError(f"The input {tensor.name} of {onnx.name} has no fixed size: give --min, --opt and --max.")
        dynamic = True
        sizes = tuple((int(height), int(width)) for height, width in wanted[tensor.name])
        shapes = [
            tuple(f if s == -1 else s for s, f in zip(shape, (1, shape[1], *size), strict=True)) for size in sizes
        ]
        profile.set_shape(tensor.name, *shapes)
        full[tensor.name] = (sizes[0], sizes[1], sizes[2])
    if dynamic:
        config.add_optimization_profile(profile)
    return full


def _monitor(trt: Any, progress: Progress | None, stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
        """Called from TensorRT's threads; answering False ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            if progress is not None:
                progress(phase, 0, steps)

        def phase_finish(self, phase: str) -> None:
            steps = self.steps.pop(phase, 0)
            if progress is not None:
                progress(phase, steps, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if progress is not None:
                progress(phase, step + 1, self.steps.get(phase, 0))
            return not stop.is_set()

    return Monitor()
