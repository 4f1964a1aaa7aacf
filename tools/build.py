"""`matchanything build`: a bundle -> a TensorRT plan beside it, checked against the golden result.

This runs on the robot: it imports neither torch nor ONNX.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from matchanything_ros.bundle import Bundle, Size, load_bundle
from matchanything_ros.engines.builder import Progress, build_engine
from matchanything_ros.engines.plan import PlanManifest, Profile
from matchanything_ros.errors import UserError
from matchanything_tools.arguments import parse_size
from matchanything_tools.make_plan import make_plan

__all__ = ["build_engine", "make_plan"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything build`."""
    parser.add_argument("bundle", help="NAME.onnx, or the name of a bundle in the package")
    for bound in ("min", "opt", "max"):
        parser.add_argument(
            f"--{bound}", type=parse_size, metavar="HxW", help=f"{bound} input size, within the bundle's range"
        )
    parser.add_argument("--workspace", type=int, metavar="MIB", help="device memory that a layer may use at most")
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="sm_XX", help="other GPUs to build for, ahead of time"
    )
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="default: beside the bundle")
    parser.add_argument("--flavour", choices=("tensorrt", "tensorrt_rtx"), help="which TensorRT, if both are here")
    parser.add_argument("--force", action="store_true", help="use the plan even if it fails its parity check")
    parser.add_argument("--verbose", action="store_true", help="show TensorRT's whole log")


def run(args: argparse.Namespace) -> int:
    """`matchanything build`. Returns 1 if the plan failed its parity check."""
    bundle = load_bundle(args.bundle)
    profile = narrowed(bundle, args.min, args.opt, args.max)
    bar = ProgressBar()
    plan, made = make_plan(
        bundle,
        targets=tuple(args.target),
        profile=profile,
        workspace_mib=args.workspace,
        timing_cache=args.timing_cache,
        flavour_name=args.flavour,
        force=args.force,
        progress=None if args.verbose else bar.show,
        verbose=(lambda line: print(line, file=sys.stderr)) if args.verbose else None,
        say=bar.say,
        command=" ".join(["matchanything", "build", *_words(args)]),
    )
    for warning in made.warnings:
        bar.say(f"warning: {warning}")
    print(f"wrote {plan}")
    print(summary(made))
    if made.bad and not made.forced:
        raise UserError(f"{plan.name} failed its parity check ({(made.parity or {})['summary']}) and will not be used.")
    return 0


def narrowed(bundle: Bundle, least: Size | None, best: Size | None, most: Size | None) -> Profile:
    """The bundle's profile, or a narrower one for all of its dynamic inputs. Raises UserError for impossible sizes."""
    manifest = bundle.manifest
    given = (least, best, most)
    profile: Profile = {spec.name: (spec.min, spec.opt, spec.max) for spec in manifest.inputs}
    if not any(given):
        return profile
    if manifest.fixed:
        size = "x".join(map(str, manifest.input("image0").opt))
        raise UserError(f"{bundle.onnx.name} has the fixed size {size}: leave out --min, --opt and --max.")
    for spec in manifest.inputs:
        if spec.fixed:
            continue
        if most is not None and any(high < opt for high, opt in zip(most, spec.opt, strict=True)):
            raise UserError(
                f"--max {_size(most)} is below {_size(spec.opt)}, the size that images are brought to: give at least "
                "that, or export the bundle for smaller images."
            )
        sizes = (least or spec.min, best or spec.opt, most or spec.max)
        for low, middle, high, first, last in zip(*sizes, spec.min, spec.max, strict=True):
            if not first <= low <= middle <= high <= last:
                raise UserError(
                    f"The sizes must lie between {_size(spec.min)} and {_size(spec.max)}, min <= opt <= max: "
                    "choose others or export the bundle again."
                )
        step = manifest.preprocess.divisor
        if any(side % step for size in sizes for side in size):
            raise UserError(f"{manifest.name} takes sizes that are multiples of {step}: round --min, --opt and --max.")
        profile[spec.name] = (sizes[0], sizes[1], sizes[2])
    return profile


def summary(made: PlanManifest) -> str:
    """What was built, in a few lines: for whom, how long, how much memory, how right."""
    where = made.gpu or "any GPU of these architectures"
    memory = "unknown" if made.device_memory is None else f"{made.device_memory / 2**20:.0f} MiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[made.flavour]
    parity = (made.parity or {}).get("summary", "not checked: it is checked when the plan is first used on its GPU")
    return "\n".join(
        [
            f"  for     {where}, compute capability {', '.join(made.compute_capabilities)}; {title} {made.version}",
            f"  took    {made.build_seconds:.1f} s, {peak:.0f} MiB of host memory at most",
            f"  needs   {memory} on the device besides the weights; the file has {made.size / 2**20:.1f} MiB",
            f"  parity  {parity}",
        ]
    )


class ProgressBar:
    """TensorRT's phases on one line of a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._open = False

    show: Progress

    def show(self, phase: str, step: int, steps: int) -> None:  # type: ignore[no-redef]
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else 10.0):
            return
        self._last = now
        done = step / steps if steps else 1.0
        text = f"{phase[:46]:46} [{'#' * round(24 * done):24}] {now - self._start:5.0f} s"
        print(f"\r{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._open = self._terminal

    def say(self, text: str) -> None:
        print(("\n" if self._open else "") + text, file=sys.stderr, flush=True)
        self._open = False


def _words(args: argparse.Namespace) -> list[str]:
    words = [str(args.bundle)]
    for bound in ("min", "opt", "max"):
        if getattr(args, bound):
            words += [f"--{bound}", _size(getattr(args, bound))]
    if args.workspace:
        words += ["--workspace", str(args.workspace)]
    if args.target:
        words += ["--target", *args.target]
    if args.flavour:
        words += ["--flavour", args.flavour]
    return words


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
