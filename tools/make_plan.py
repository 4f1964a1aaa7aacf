"""A bundle -> NAME.<device>.plan and its manifest on disk: all or nothing, one at a time, checked before it is seen."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.builder import Built, Progress, build_engine
from matchanything_ros.engines.device import current_device
from matchanything_ros.engines.flavour import Flavour, load_flavour
from matchanything_ros.engines.parity import check_parity
from matchanything_ros.engines.plan import PlanManifest, Profile, manifest_path, plan_path, plan_tag, read_manifest
from matchanything_ros.errors import UserError


def make_plan(
    bundle: Bundle,
    *,
    targets: tuple[str, ...] = (),
    profile: Profile | None = None,
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
    flavour_name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    verbose: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    command: str = "",
) -> tuple[Path, PlanManifest]:
    """Build the plan of a bundle for this machine's GPU, or ahead of time for `targets`; returns it and its manifest.

    A plan that fails its parity check is written and marked, and never used unless `force`. If another process builds
    the same plan, this one waits and takes what it made. Raises UserError like builder.build_engine.
    """
    flavour = load_flavour(flavour_name, for_target=bool(targets))
    device = None if targets else current_device()
    if not targets and device is None:
        raise UserError(
            "There is no GPU here to build for: run this on the machine that has it"
            + (", or name its architecture, such as --target sm_86." if flavour.ahead_of_time else ".")
        )
    plan = plan_path(bundle, plan_tag(flavour.name, device, targets))
    cache = timing_cache or plan.with_suffix(".timing")
    asked = time.time()
    with _lock(plan, say):
        for left in plan.parent.glob(f".{_escaped(plan.name)}.*.tmp"):
            left.unlink()  # of a build that was killed: the lock says that none is running
        if _made_meanwhile(plan, asked):
            other = read_manifest(plan)
            if other.onnx_sha256 == bundle.manifest.onnx_sha256 and other.profile == (profile or other.profile):
                say("another process has built this plan meanwhile")
                return plan, other
        built = build_engine(
            bundle,
            target=targets,
            profile=profile,
            workspace_mib=workspace_mib,
            timing_cache=cache.read_bytes() if cache.is_file() else None,
            flavour=flavour,
            progress=progress,
            verbose=verbose,
        )
        temporary = [_temporary(plan), _temporary(manifest_path(plan))]
        try:
            made = _write(bundle, built, temporary[0], force, command)
            if device is not None:
                made = _checked(bundle, temporary[0], made, flavour, say)
            temporary[1].write_text(made.to_json(), encoding="utf-8")
            manifest_path(plan).unlink(missing_ok=True)  # at no time does a manifest lie beside another plan
            os.replace(temporary[0], plan)
            os.replace(temporary[1], manifest_path(plan))
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
        if built.timing_cache:
            _temporary(cache).write_bytes(built.timing_cache)
            os.replace(_temporary(cache), cache)
    return plan, made


def _write(bundle: Bundle, built: Built, path: Path, force: bool, command: str) -> PlanManifest:
    manifest, device = bundle.manifest, built.device
    data = memoryview(built.data).cast("B")
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    capabilities = (device.compute_capability,) if device else tuple(_capability(name) for name in built.targets)
    return PlanManifest(
        bundle=manifest.name,
        onnx_sha256=manifest.onnx_sha256,
        data_sha256=manifest.data_sha256,
        plan_sha256=hashlib.sha256(data).hexdigest(),
        flavour=built.flavour.name,
        version=built.flavour.version,
        gpu=device.name if device else None,
        compute_capabilities=capabilities,
        cuda=device.cuda if device else None,
        driver=device.driver if device else None,
        precision=manifest.precision,
        profile=built.profile,
        build_seconds=round(built.seconds, 2),
        size=len(data),
        device_memory=built.device_memory,
        forced=force,
        command=command,
        warnings=built.warnings,
    )


def _checked(
    bundle: Bundle, plan: Path, made: PlanManifest, flavour: Flavour, say: Callable[[str], None]
) -> PlanManifest:
    """The manifest with the parity result, and with the device memory that the loaded engine states."""
    from matchanything_ros.engines.tensorrt import TensorRTEngine

    try:
        engine = TensorRTEngine(bundle, plan, flavour)
    except UserError as error:
        say(f"parity was not checked: {error}")
        return made
    try:
        parity = check_parity(engine)
        return made.replaced(parity=parity.as_dict(), device_memory=engine.device_memory)
    finally:
        engine.close()


def _made_meanwhile(plan: Path, since: float) -> bool:
    path = manifest_path(plan)
    return plan.is_file() and path.is_file() and path.stat().st_mtime >= since


@contextmanager
def _lock(plan: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One build of a plan at a time on this machine; the others wait. The system drops the lock of a killed process."""
    path = plan.with_name(f".{plan.name}.lock")
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(
            f"{plan.parent} cannot be written ({error.strerror}): copy the bundle to another folder."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building {plan.name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _capability(target: str) -> str:
    digits = target.removeprefix("sm_")
    return f"{digits[:-1]}.{digits[-1]}"
