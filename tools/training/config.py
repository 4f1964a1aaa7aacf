"""The file CONFIG of `matchanything train`: what its keys mean, and reading it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from matchanything_ros.errors import UserError


@dataclass(frozen=True)
class Phase:
    """Steps up to `until` (a fraction of the run) use views of height x width and `batch` pairs per process."""

    until: float
    height: int
    width: int
    batch: int


@dataclass(frozen=True)
class Config:
    """The file CONFIG; every key has a default but steps and phases."""

    steps: int
    phases: list[Phase]
    seed: int = 1
    learning_rate: float = 1.0e-3
    warmup_steps: int = 400
    weight_decay: float = 0.02
    easiest: float = 0.2  # difficulty of a pair is uniform between easiest and ...
    hardest_start: float = 0.4  # ... this at the start, rising to 1 ...
    hardest_full: float = 0.12  # ... by this fraction of the run
    fine_matches: int = 96  # cells per pair that teach the fine stages
    weights: dict[str, float] = field(
        default_factory=lambda: {
            "matchable": 0.5, "window_ce": 1.0, "window_nll": 0.25, "patch_ce": 0.5, "patch_nll": 0.5
        }
    )  # fmt: skip
    ema: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 2000
    compile: bool = True


def read_config(path: Path, overrides: list[str] = ()) -> Config:  # type: ignore[assignment]
    """CONFIG as YAML; overrides are KEY=VALUE."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no keys with values: see config/train/kestrel.yaml for an example.")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override} sets nothing: give KEY=VALUE.")
        raw[key] = yaml.safe_load(value)
    known = {entry.name for entry in fields(Config)}
    unknown = sorted(set(raw) - known)
    if unknown or "steps" not in raw or "phases" not in raw:
        raise UserError(f"{path} needs steps and phases; unknown keys: {', '.join(unknown) or 'none'}.")
    try:
        raw["phases"] = [Phase(**phase) for phase in raw["phases"]]
    except TypeError as error:
        raise UserError(f"{path}: phases is no list of until, height, width and batch ({error}).") from error
    for phase in raw["phases"]:
        if phase.height % 32 or phase.width % 32:
            raise UserError(f"{path}: views of {phase.height}x{phase.width} must have sides that are multiples of 32.")
    defaults: dict[str, Any] = {"steps": 0} | {
        f.name: f.default for f in fields(Config) if type(f.default) in (int, float)
    }
    for name, default in defaults.items():
        try:
            raw[name] = type(default)(raw.get(name, default))  # YAML takes 1e-3 for text
        except (TypeError, ValueError):
            raise UserError(f"{path}: {name} is {raw[name]!r}: give a number.") from None
    for name in ("steps", "log_every", "checkpoint_every"):
        if raw[name] < 1:
            raise UserError(f"{path}: {name} is {raw[name]}: give at least 1.")
    return Config(**raw)
