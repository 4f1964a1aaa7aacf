"""TensorRT plans beside a bundle: NAME.<device>.plan with NAME.<device>.plan.json, and which of them may be run here.

A plan belongs to one network, one TensorRT and one GPU. TensorRT itself reports a misfit cryptically or not at all, so
everything is compared with the plan's own manifest before TensorRT sees the file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matchanything_ros.bundle import Bundle, Size, sha256_of
from matchanything_ros.engines.device import Device
from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.errors import UserError

SCHEMA = 1
PARITY_FAILED = "failed its parity check"
Profile = dict[str, tuple[Size, Size, Size]]  # input name -> (min, opt, max), each (height, width)


@dataclass(frozen=True)
class PlanManifest:
    """What a plan was built from, with and for. Sizes are (height, width); memory is in bytes.

    gpu: the GPU's name, or None for a plan built ahead of time for `compute_capabilities`.
    device_memory: activations and scratch, as TensorRT states them. parity: see parity.py; None if it was not run.
    forced: its user wants it run even if that failed. command: what it was built with.
    """

    bundle: str
    onnx_sha256: str
    data_sha256: str | None
    plan_sha256: str
    flavour: str
    version: str
    gpu: str | None
    compute_capabilities: tuple[str, ...]
    cuda: str | None
    driver: str | None
    precision: str
    profile: Profile
    build_seconds: float
    size: int
    device_memory: int | None
    parity: dict[str, Any] | None = None
    forced: bool = False
    command: str = ""
    warnings: tuple[str, ...] = field(default_factory=tuple)
    schema: int = SCHEMA

    @property
    def bad(self) -> bool:
        """Whether its parity check failed."""
        return self.parity is not None and not self.parity.get("passed", False)

    def replaced(self, **changes: Any) -> PlanManifest:
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def plan_path(bundle: Bundle | Path, tag: str) -> Path:
    """Where the plan of a bundle for a device lies. tag: see `plan_tag`."""
    onnx = bundle if isinstance(bundle, Path) else bundle.onnx
    return onnx.with_suffix(f".{tag}.plan")


def plan_tag(flavour: str, device: Device | None, targets: tuple[str, ...] = ()) -> str:
    """The <device> of a plan's file name: the GPU's name, or the targets; "-rtx" tells the flavours apart."""
    assert targets or device is not None
    base = "-".join(targets) if targets else device.tag if device else ""
    return base + ("-rtx" if flavour == "tensorrt_rtx" else "")


def manifest_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def find_plans(bundle: Bundle) -> list[Path]:
    """Every plan that lies beside the bundle, in the order of their names."""
    # No glob: a bundle's name may hold characters that mean something there.
    start = bundle.onnx.stem + "."
    try:
        files = list(bundle.onnx.parent.iterdir())
    except OSError:
        return []
    return sorted(f for f in files if f.suffix == ".plan" and f.name.startswith(start) and f.is_file())


def read_manifest(plan: Path, rebuild: str = "matchanything build") -> PlanManifest:
    """Read the manifest of a plan. Raises UserError that ends with the command `rebuild`."""
    path = manifest_path(plan)
    if not path.is_file():
        raise UserError(f"The plan {plan} has no manifest {path.name}, so nobody knows what it is: run '{rebuild}'.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise UserError(
                f"The manifest {path} has schema {raw['schema']} and this version reads {SCHEMA}: run '{rebuild}'."
            )
        profile = {
            name: tuple((int(height), int(width)) for height, width in sizes) for name, sizes in raw["profile"].items()
        }
        lists = {key: tuple(raw.get(key, ())) for key in ("compute_capabilities", "warnings")}
        return PlanManifest(**{**raw, **lists, "profile": profile})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"The manifest {path} cannot be read ({error}): run '{rebuild}'.") from error


def rebuild_command(bundle: Bundle) -> str:
    return f"matchanything build {bundle.onnx}"


def misfit(plan: Path, bundle: Bundle, flavour: Flavour, device: Device | None) -> str | None:
    """Why the plan must not be run for this bundle with this TensorRT on this GPU: one sentence, or None if it may."""
    again = rebuild_command(bundle)
    try:
        found = read_manifest(plan, again)
    except UserError as error:
        return str(error)
    manifest = bundle.manifest
    made = f"The plan {plan.name} was built"

    def differs(what: str, then: object, now: object) -> str:
        return f"{made} {what} {then} and this is {now}: run '{again}'."

    if found.onnx_sha256 != manifest.onnx_sha256:
        return differs("from the network", found.onnx_sha256[:12], bundle.hash)
    if found.data_sha256 != manifest.data_sha256:
        return f"{made} from other weights than {bundle.onnx.name}.data holds: run '{again}'."
    if found.flavour != flavour.name:
        titles = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
        return differs("with", titles.get(found.flavour, found.flavour), flavour.title)
    if found.version != flavour.version:
        return differs(f"with {flavour.title.rsplit(' ', 1)[0]}", found.version, flavour.version)
    if device is None:
        return f"{made} for a GPU and this machine shows none: check the driver with 'matchanything doctor'."
    if device.compute_capability not in found.compute_capabilities:
        there = ", ".join(found.compute_capabilities)
        return differs("for compute capability", there, f"{device.name} with {device.compute_capability}")
    if found.gpu is not None and found.gpu != device.name:
        return differs("for the GPU", found.gpu, device.name)
    if found.cuda is not None and _numbers(device.cuda) < _numbers(found.cuda):
        return differs("with a driver for CUDA", found.cuda, f"{device.cuda}, which is older")
    if found.precision != manifest.precision:
        return differs("in", found.precision, manifest.precision)
    if problem := _profile_misfit(found.profile, bundle):
        return f"{made} {problem}: run '{again}'."
    if not plan.is_file():
        return f"The plan {plan.name} is missing beside its manifest: run '{again}'."
    if plan.stat().st_size != found.size or sha256_of(plan) != found.plan_sha256:
        return (
            f"The plan {plan.name} is not the file that its manifest describes (truncated or replaced): run '{again}'."
        )
    if found.bad and not found.forced:
        reason = (found.parity or {}).get("summary", "its result is wrong")
        return f"The plan {plan.name} {PARITY_FAILED} ({reason}): run '{again}' or use another backend."
    return None


@dataclass(frozen=True)
class Choice:
    """The plan to run for a bundle here, with its flavour; and for every other plan the sentence why not.

    bad: there is a plan that fits but for its parity check.
    """

    plan: Path | None
    flavour: Flavour | None
    reasons: dict[Path, str]
    bad: bool = False


def choose_plan(bundle: Bundle, available: list[Flavour], device: Device | None) -> Choice:
    """Look at every plan beside the bundle with every TensorRT of this machine; the first fitting one is chosen."""
    reasons: dict[Path, str] = {}
    bad = False
    plans = find_plans(bundle)
    for plan in plans:
        if not available:
            reasons[plan] = "There is no usable TensorRT here, see 'matchanything doctor'."
            continue
        try:
            wanted = read_manifest(plan).flavour
        except UserError:
            wanted = ""
        flavour = next((entry for entry in available if entry.name == wanted), available[0])
        reason = misfit(plan, bundle, flavour, device)
        if reason is None:
            rest = {other: f"{plan.name} comes first." for other in plans if other > plan}
            return Choice(plan, flavour, {**reasons, **rest})
        reasons[plan] = reason
        bad = bad or PARITY_FAILED in reason
    return Choice(None, None, reasons, bad)


def _profile_misfit(profile: Profile, bundle: Bundle) -> str | None:
    """What is wrong with the plan's shapes: other inputs, or sizes that the bundle does not have. Narrower is fine."""
    specs = {spec.name: spec for spec in bundle.manifest.inputs}
    if set(profile) != set(specs):
        return f"for the inputs {', '.join(sorted(profile))} and the bundle has {', '.join(sorted(specs))}"
    for name, (least, _, most) in profile.items():
        spec = specs[name]
        if any(low < bound for low, bound in zip(least, spec.min, strict=True)) or any(
            high > bound for high, bound in zip(most, spec.max, strict=True)
        ):
            return f"for {name} from {_size(least)} to {_size(most)}, outside the bundle's sizes"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
