"""A network with its weights -> a bundle: ONNX, manifest and golden result, all or nothing."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnx
import torch

import matchanything_ros
from matchanything_ros.bundle import Bundle, InputSpec, Manifest, Preprocess, WeightsInfo, load_bundle, sha256_of
from matchanything_ros.errors import UserError
from matchanything_ros.match_files import check_limits
from matchanything_ros.preprocess import prepare
from matchanything_tools.arguments import parse_size
from matchanything_tools.networks import FAMILIES
from matchanything_tools.networks.attention import add_function_bodies

OPSET = 20  # the newest that every TensorRT 10 parses
EXTERNAL_DATA_OVER = 64 << 20  # bytes of weights above which they go to NAME.onnx.data (protobuf ends at 2 GB)


@dataclass
class Exportable:
    """A network ready for export.

    module: in eval mode, takes the inputs in order (float32 [1, C, H, W] in [0, 1]) and returns the outputs in order,
        float32; everything that is to run in fp16 is cast inside. `reference` is the same network in fp32, if other.
    dynamic_shapes: as torch.export takes them, by input name; None where the shapes are fixed.
    part: for a part of a network that is no matcher by itself (a detector): its example inputs by name. It is written
        as plain ONNX, without manifest.
    """

    family: str
    variant: str
    module: torch.nn.Module
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess
    max_matches: int
    score_threshold: float
    weights: tuple[WeightsInfo, ...]
    precision: str = "fp32"
    outputs: tuple[str, ...] = ("keypoints0", "keypoints1", "scores")
    stages: tuple[str, ...] = ()
    dynamic_shapes: dict[str, Any] | None = None
    part: dict[str, torch.Tensor] | None = None


class NetworkModule(Protocol):
    """What a row of FAMILIES points to."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def exportable(self, args: argparse.Namespace) -> Exportable: ...


def network(family: str) -> NetworkModule:
    """Import the module of a family."""
    return cast(NetworkModule, importlib.import_module(FAMILIES[family].module))


def export(item: Exportable, out: Path, command: Sequence[str] = ()) -> Bundle:
    """Write the bundle OUT (NAME.onnx) with its manifest and golden result; returns it, loaded and verified.

    Everything is written into a temporary folder beside OUT and moved at the end, manifest last: whoever finds a
    manifest finds a whole bundle.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    item.module.eval()
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as folder:
        path = Path(folder) / out.name
        _write_onnx(item, path)
        golden = path.with_suffix(".golden.npz")
        np.savez_compressed(golden, **golden_result(item))  # type: ignore[arg-type]
        data = path.with_name(path.name + ".data")
        manifest = Manifest(
            name=f"{item.family}-{item.variant}",
            family=item.family,
            variant=item.variant,
            precision=item.precision,
            weights=item.weights,
            inputs=item.inputs,
            preprocess=item.preprocess,
            outputs=item.outputs,
            max_matches=item.max_matches,
            score_threshold=item.score_threshold,
            stages=item.stages,
            onnx_sha256=sha256_of(path),
            data_sha256=sha256_of(data) if data.exists() else None,
            golden_sha256=sha256_of(golden),
            exporter={
                "matchanything_ros": matchanything_ros.__version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "python": platform.python_version(),
                "opset": OPSET,
                "command": shlex.join(command),
            },
        )
        path.with_suffix(".json").write_text(manifest.to_json(), encoding="utf-8")
        for suffix in (".onnx.data", ".onnx", ".golden.npz", ".json"):
            file = path.with_suffix(suffix)
            if file.exists():
                os.replace(file, out.with_suffix(suffix))
            else:
                out.with_suffix(suffix).unlink(missing_ok=True)
    return load_bundle(out)


def export_part(item: Exportable, out: Path) -> Path:
    """Write a part of a network as plain ONNX."""
    out.parent.mkdir(parents=True, exist_ok=True)
    item.module.eval()
    with tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent) as folder:
        path = Path(folder) / out.name
        _write_onnx(item, path)
        for file in sorted(path.parent.iterdir(), reverse=True):  # the data before what refers to it
            os.replace(file, out.with_name(file.name))
    return out


def check_out(out: Path, size: int = 0) -> None:
    """Raise UserError unless a bundle of `size` bytes can be written as OUT, before anything takes time."""
    if out.suffix != ".onnx":
        raise UserError(f"--out is {out}: give a file name that ends in .onnx.")
    if out.is_dir():
        raise UserError(f"--out is {out}, which is a folder: give the name of a file.")
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"Nothing can be written into {existing}: choose another --out.")
    if shutil.disk_usage(existing).free < size:
        raise UserError(f"There is too little free space in {existing} for the bundle: choose another --out.")


def golden_pair(height: int = 240, width: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 RGB images [H, W, 3] related by a known homography: soft discs of many sizes."""
    rng = np.random.Generator(np.random.PCG64(7))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    matrix = np.array([[1.03, 0.06, -9.0], [-0.05, 0.98, 7.0], [8e-5, -6e-5, 1.0]])
    depth = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2]
    warped_x = (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]) / depth
    warped_y = (matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]) / depth
    images = [np.zeros((height, width, 3)), np.zeros((height, width, 3))]
    for _ in range(400):  # discs with soft edges, large ones first
        cx, cy = rng.uniform(-20, width + 20), rng.uniform(-20, height + 20)
        radius, colour = 40 * rng.uniform(0.05, 1) ** 2 + 2, rng.uniform(0, 255, 3)
        for image, px, py in ((images[1], x, y), (images[0], warped_x, warped_y)):
            alpha = np.clip(radius - np.hypot(px - cx, py - cy) + 0.5, 0, 1)[..., None]
            image += alpha * (colour - image)
    return images[0].round().astype(np.uint8), images[1].round().astype(np.uint8)


def golden_result(item: Exportable) -> dict[str, np.ndarray]:
    """The golden image pair and what the PyTorch network makes of it: outputs by name."""
    image0, image1 = golden_pair()
    inputs = [prepare((image0, image1)[spec.image], item.preprocess, spec)[0] for spec in item.inputs]
    with torch.inference_mode():
        outputs = item.module(*(torch.from_numpy(array) for array in inputs))
    arrays = {name: value.float().numpy() for name, value in zip(item.outputs, outputs, strict=True)}
    for name in ("warp", "cert"):
        if name in arrays:
            arrays[name] = arrays[name][..., ::4, ::4].astype(np.float16)
    return {"image0": image0, "image1": image1, **arrays}


def _write_onnx(item: Exportable, path: Path) -> None:
    channels = 3 if item.preprocess.channels == "rgb" else 1
    example = item.part or {spec.name: torch.rand(1, channels, *spec.opt) for spec in item.inputs}
    # The exporter logs that torchvision's operators are not there, which nothing here needs.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            item.module,
            tuple(example.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(item.outputs),
            dynamic_shapes=item.dynamic_shapes,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    add_function_bodies(program.model)
    _strip_traces(program.model)
    size = sum(tensor.nbytes for tensor in item.module.state_dict().values())
    program.save(str(path), external_data=size > EXTERNAL_DATA_OVER)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"The exporter of torch {torch.__version__} wrote an invalid graph ({first}): install another version."
        ) from error


def _strip_traces(model: Any) -> None:
    """Drop what the exporter noted on every node except its module: stack traces name files of this machine."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            for key in [key for key in node.metadata_props if key != "namespace"]:
                del node.metadata_props[key]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `matchanything export`: a subcommand per family, the common ones in each."""
    families = parser.add_subparsers(dest="family", required=True, metavar="NETWORK")
    for name, family in FAMILIES.items():
        sub = families.add_parser(name, help=family.help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--weights", type=Path, required=True, help="the published checkpoint")
        sub.add_argument("--licence", default="not stated", help="licence of the weights, as their source states it")
        sub.add_argument("--size", type=parse_size, help="fixed input size HxW")
        for bound in ("min", "opt", "max"):
            sub.add_argument(f"--{bound}", type=parse_size, help=f"{bound} input size HxW of a dynamic shape")
        sub.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the graph")
        sub.add_argument("--max-matches", type=int, help="rows of the outputs")
        sub.add_argument("--score-threshold", type=float, help="default threshold of the bundle")
        sub.add_argument("--out", type=Path, required=True, help="NAME.onnx to write")
        network(name).add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    """`matchanything export`."""
    given = [args.min, args.opt, args.max]
    if any(given) and not all(given):
        raise UserError("A dynamic shape needs all of --min, --opt and --max.")
    if args.size and any(given):
        raise UserError("Give --size for a fixed shape, or --min, --opt and --max for a dynamic one, not both.")
    check_limits(args.score_threshold, None)  # how many matches there may be, a network knows
    files = [value for value in vars(args).values() if isinstance(value, Path) and value != args.out]
    check_out(args.out, 3 * sum(file.stat().st_size for file in files if file.is_file()))
    item = network(args.family).exportable(args)
    command = ["matchanything", "export", args.family, *_spelled(args)]
    print(f"exporting {item.family}-{item.variant} ({item.precision}) ...", flush=True)
    if item.part is not None:
        print(f"wrote {export_part(item, args.out)}: {', '.join(item.part)} -> {', '.join(item.outputs)}; no manifest")
        return 0
    bundle = export(item, args.out, command)
    sizes = ", ".join(f"{spec.name} {_range(spec)}" for spec in item.inputs)
    data = bundle.onnx.with_name(bundle.onnx.name + ".data")
    size = sum(file.stat().st_size for file in (bundle.onnx, data) if file.is_file()) / 1e6
    print(f"wrote {bundle.onnx} ({size:.1f} MB; {sizes}; up to {item.max_matches} matches)")
    return 0


def weights_info(path: Path, licence: str, source: str = "") -> WeightsInfo:
    """The manifest's entry for a checkpoint file."""
    return WeightsInfo(path.name, sha256_of(path), licence, source)


def fixed_input(name: str, image: int, size: tuple[int, int]) -> InputSpec:
    """An input of one fixed (height, width)."""
    return InputSpec(name, image, size, size, size)


def _spelled(args: argparse.Namespace) -> list[str]:
    skip = {"command", "family", "debug", "out"}
    words: list[str] = []
    for key, value in vars(args).items():
        if key in skip or value is None or value is False:
            continue
        text = (
            "x".join(map(str, value))
            if isinstance(value, tuple)
            else Path(value).name
            if isinstance(value, Path)
            else value
        )
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(text)])
    return words


def _range(spec: InputSpec) -> str:
    return "x".join(map(str, spec.opt)) + (
        "" if spec.fixed else f" ({'x'.join(map(str, spec.min))} to {'x'.join(map(str, spec.max))})"
    )
