"""The plan beside a bundle that this machine runs, opened; and, for people, why it is that one or none."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.device import Device, current_device
from matchanything_ros.engines.flavour import Flavour, flavours
from matchanything_ros.engines.parity import check_parity
from matchanything_ros.engines.plan import (
    PARITY_FAILED,
    Choice,
    choose_plan,
    find_plans,
    manifest_path,
    read_manifest,
    rebuild_command,
)
from matchanything_ros.engines.tensorrt import TensorRTEngine
from matchanything_ros.errors import UserError

_log = logging.getLogger(__name__)


def open_plan(bundle: Bundle, drv: Any = None) -> TensorRTEngine:
    """Open the plan that fits. Raises UserError with the command to type if none does, or if its parity check fails."""
    choice = look(bundle)[0]
    if choice.plan is None or choice.flavour is None:
        raise UserError(why_none(bundle, choice))
    engine = TensorRTEngine(bundle, choice.plan, choice.flavour, drv)
    try:
        _check_once(engine, choice.plan)
    except BaseException:
        engine.close()
        raise
    return engine


def open_plan_if_fitting(bundle: Bundle) -> TensorRTEngine | None:
    """As open_plan, for "auto": None where there is no plan; a plan that does not work is a warning, not an error."""
    if not find_plans(bundle):
        return None  # without importing TensorRT, which takes a second
    try:
        return open_plan(bundle)
    except UserError as error:
        _log.warning("TensorRT is not used: %s", error)
        return None


def look(bundle: Bundle) -> tuple[Choice, list[Flavour], list[str], Device | None]:
    """What there is: the choice among the plans, usable TensorRTs, sentences about unusable ones, the GPU."""
    usable, unusable = flavours()
    device = current_device()
    return choose_plan(bundle, usable, device), usable, unusable, device


def why_none(bundle: Bundle, choice: Choice) -> str:
    """One sentence for a bundle without a fitting plan."""
    if not choice.reasons:
        return f"There is no TensorRT plan beside {bundle.onnx}: run '{rebuild_command(bundle)}' on this machine."
    return next(iter(choice.reasons.values()))


def plan_report(bundle: Bundle) -> list[str]:
    """For `matchanything doctor`: which plan would be used for a bundle here, why not the others, what to type."""
    choice, usable, _, device = look(bundle)
    lines = []
    if choice.plan is not None:
        made = read_manifest(choice.plan)
        state = "parity not checked yet: done at first use" if made.parity is None else made.parity["summary"]
        forced = ", forced" if made.forced and made.bad else ""
        lines.append(f"plan {choice.plan.name} ({state}{forced})")
    elif usable and device is not None and not choice.reasons:
        lines.append(f"no plan: run '{rebuild_command(bundle)}'")
    return lines + [f"not run: {reason}" for reason in choice.reasons.values()]


def _check_once(engine: TensorRTEngine, plan: Path) -> None:
    """The parity check of a plan that was built elsewhere, at its first use; the result is kept in its manifest."""
    made = read_manifest(plan)
    if made.parity is not None or made.forced:
        return
    parity = check_parity(engine)
    made = made.replaced(parity=parity.as_dict(), device_memory=engine.device_memory)
    path = manifest_path(plan)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(made.to_json(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:  # a read-only folder: checked again next time
        temporary.unlink(missing_ok=True)
    if not parity.passed:
        raise UserError(
            f"The plan {plan.name} {PARITY_FAILED} ({parity.summary}): run '{rebuild_command(engine.bundle)}' "
            "or use another backend."
        )
