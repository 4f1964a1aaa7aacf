"""`matchanything inspect`: what a checkpoint, a bundle or a plan is."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from matchanything_ros.bundle import BUNDLES, Bundle, InputSpec, load_bundle, sha256_of
from matchanything_ros.engines.plan import find_plans
from matchanything_ros.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, help="a checkpoint, a bundle (NAME.onnx, or its name), or NAME.<device>.plan"
    )


def run(args: argparse.Namespace) -> int:
    path: Path = args.file
    packaged = (BUNDLES / f"{path.name}.onnx").is_file() and len(path.parts) == 1
    if path.is_dir() and not packaged:
        raise UserError(f"{path} is a folder: name a checkpoint, a bundle (.onnx) or a plan (.plan) in it.")
    if not path.is_file() and not packaged:
        raise UserError(f"{path} does not exist: name a checkpoint, a bundle (.onnx) or a plan (.plan).")
    if packaged or (path.suffix in (".onnx", ".json") and not path.name.endswith(".plan.json")):
        # A packaged name wins over a file or folder of that name here, as with the other commands.
        lines = describe_bundle(load_bundle(BUNDLES / f"{path.name}.onnx" if packaged else path))
    elif path.suffix == ".plan" or path.name.endswith(".plan.json"):
        lines = describe_plan(path)
    else:
        lines = describe_checkpoint(path)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    return 0


def describe_checkpoint(path: Path) -> list[tuple[str, str]]:
    """Family, number of keys, hash, totals by type, and the parts with the most parameters."""
    import torch

    from matchanything_tools.checkpoints import read_checkpoint
    from matchanything_tools.fingerprints import guess_family

    state = read_checkpoint(path)
    totals: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for key, value in state.items():
        totals[str(value.dtype).removeprefix("torch.")] += value.numel()
        parts[key.split(".")[0]] += value.numel()
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    lines = [
        ("checkpoint", str(path)),
        ("family", guess_family(state) or "unknown"),
        ("keys", str(len(state))),
        ("sha256", sha256_of(path)),
        ("types", ", ".join(f"{count:,} {name}" for name, count in totals.most_common())),
        ("parts", ", ".join(f"{part} {count:,}" for part, count in parts.most_common(6))),
    ]
    return lines + ([("not finite", f"{len(broken)} tensors, such as {broken[0]}")] if broken else [])


def describe_bundle(bundle: Bundle) -> list[tuple[str, str]]:
    """What the manifest says, after its hashes were checked, and the golden result's state."""
    manifest = bundle.manifest
    preprocess = manifest.preprocess
    lines = [
        ("bundle", f"{bundle.onnx} ({_size(bundle.onnx)})"),
        ("family", f"{manifest.family}, {manifest.variant}, {manifest.precision}"),
        ("sha256", manifest.onnx_sha256),
    ]
    for weights in manifest.weights:
        lines.append(("weights", f"{weights.name}, sha256 {weights.sha256}, licence: {weights.licence}"))
    lines += [("input", _input(spec)) for spec in manifest.inputs]
    lines += [
        ("preprocess", f"{preprocess.channels}, {preprocess.resize}, {preprocess.interpolation}"),
        ("outputs", f"{', '.join(manifest.outputs)}; up to {manifest.max_matches} matches"),
        ("threshold", f"{manifest.score_threshold:g}"),
        ("exported by", ", ".join(f"{k} {v}" for k, v in manifest.exporter.items() if k != "command")),
        ("command", str(manifest.exporter.get("command") or "not recorded")),
        ("golden", "there" if bundle.golden.is_file() else "missing"),
    ]
    return lines + [("plan", plan.name) for plan in find_plans(bundle)]


def describe_plan(path: Path) -> list[tuple[str, str]]:
    """What the plan's manifest says, and whether the plan is the file that it describes."""
    plan = path.with_suffix("") if path.suffix == ".json" else path
    manifest = plan.with_name(plan.name + ".json")
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{plan} has no readable manifest {manifest.name}: build it with 'matchanything build'."
        ) from error
    same = plan.is_file() and sha256_of(plan) == raw.get("plan_sha256")
    lines = [("plan", f"{plan} ({_size(plan) if plan.is_file() else 'missing'})")]
    for name, value in raw.items():
        if value not in (None, "", [], {}):
            lines.append((name.replace("_", " "), value if isinstance(value, str) else json.dumps(value)))
    return [
        *lines,
        ("file", "as its manifest says" if same else "NOT the one that its manifest describes: build again"),
    ]


def _input(spec: InputSpec) -> str:
    low, opt, high = ("x".join(map(str, size)) for size in (spec.min, spec.opt, spec.max))
    return f"{spec.name}: {opt}" + ("" if spec.fixed else f" ({low} to {high})")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
