"""The bundle: an exported network and its manifest, the only thing that the two halves of the project share.

NAME.onnx (+ NAME.onnx.data)   the network; precision lives in the graph
NAME.json                      the manifest, described by the classes below
NAME.golden.npz                an image pair and what the PyTorch network made of it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matchanything_ros.errors import UserError

SCHEMA = 1
BUNDLES = Path(__file__).parent / "bundles"
DEFAULT_BUNDLE = BUNDLES / "kestrel.onnx"

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class InputSpec:
    """One input of the network: float32 [1, C, H, W] in [0, 1], made from image 0 or image 1.

    Sizes are (height, width). Equal min, opt and max mean a fixed shape.
    """

    name: str
    image: int
    min: Size
    opt: Size
    max: Size

    @property
    def fixed(self) -> bool:
        return self.min == self.opt == self.max


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a network input. Mean and standard deviation, where a network wants them, are in its graph.

    channels: "rgb" or "gray".
    resize: "stretch" to exactly the input's size (aspect ratio ignored); "fit" keeps the aspect ratio, makes the long
        side that of `opt`, then pads right and bottom with zeros; "fit_down" is "fit" that never enlarges.
        "fit_stretch" is "fit" with each side cut to a multiple of the divisor by a slight stretch instead of padding;
        a side that would be below the least of the input is stretched to that.
    interpolation: "area", "linear", "bicubic", "bicubic_antialias" or "lanczos" (see resample.py).
    divisor: dynamic sizes are padded to multiples of this.
    long_side_limit: if set, first reduce to this long side by area (the MatchAnything demo does).
    gray: "luma" (ITU-R 601 in floating point), "pil_l" (resized, truncated to uint8, then the integer arithmetic of
        PIL's "L") or "pil_l_first" (what PIL does by itself: "L", then resized in uint8, rounded after each axis; only
        with PIL's own interpolations, "bicubic_antialias" and "lanczos", and without a long_side_limit).
    """

    channels: str = "rgb"
    resize: str = "stretch"
    interpolation: str = "linear"
    divisor: int = 1
    long_side_limit: int | None = None
    gray: str = "luma"

    def __post_init__(self) -> None:
        _one_of("preprocess.channels", self.channels, ("rgb", "gray"))
        _one_of("preprocess.resize", self.resize, ("stretch", "fit", "fit_down", "fit_stretch"))
        _one_of(
            "preprocess.interpolation",
            self.interpolation,
            ("area", "linear", "bicubic", "bicubic_antialias", "lanczos"),
        )
        _one_of("preprocess.gray", self.gray, ("luma", "pil_l", "pil_l_first"))
        if self.gray == "pil_l_first":  # area and linear choose by both axes at once; this takes one after the other
            _one_of("preprocess.interpolation", self.interpolation, ("bicubic_antialias", "lanczos"))
            if self.long_side_limit is not None:
                raise ValueError("preprocess.gray 'pil_l_first' takes no long_side_limit")


@dataclass(frozen=True)
class WeightsInfo:
    """Where the parameters came from: file name, sha256 of the file, licence as its source states it, source."""

    name: str
    sha256: str
    licence: str
    source: str = ""


@dataclass(frozen=True)
class Manifest:
    """What is known of an exported network. `name` is the matcher's name in messages and reports.

    score_threshold is the default below which matches are dropped; keypoints are in pixels of the inputs
    `image0` and `image1`, (x, y), pixel centres at integers.
    """

    name: str
    family: str
    variant: str
    precision: str
    weights: tuple[WeightsInfo, ...]
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess
    outputs: tuple[str, ...]
    max_matches: int
    score_threshold: float
    onnx_sha256: str
    data_sha256: str | None = None
    golden_sha256: str | None = None
    stages: tuple[str, ...] = ()
    exporter: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "fp16"))
        for name in ("keypoints0", "keypoints1", "scores"):
            if name not in self.outputs:
                raise ValueError(f"outputs lacks '{name}'")
        names = [spec.name for spec in self.inputs]
        if "image0" not in names or "image1" not in names:
            raise ValueError("inputs lacks 'image0' or 'image1'")

    @property
    def dense(self) -> bool:
        """Whether the network can give its dense warp and certainty."""
        return "warp" in self.outputs and "cert" in self.outputs

    @property
    def fixed(self) -> bool:
        """Whether every input has one fixed shape."""
        return all(spec.fixed for spec in self.inputs)

    def input(self, name: str) -> InputSpec:
        return next(spec for spec in self.inputs if spec.name == name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and found to fit its files."""

    onnx: Path
    manifest: Manifest

    @property
    def golden(self) -> Path:
        return self.onnx.with_suffix(".golden.npz")

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the network's sha256: what messages and reports carry."""
        return self.manifest.onnx_sha256[:12]


def load_bundle(path: str | Path | None = None, verify: bool = True) -> Bundle:
    """Read a bundle given by its .onnx (or .json) file, or by the name of one inside the package; None is the default.

    With `verify` the hashes of the files are compared with the manifest (some milliseconds a megabyte).
    Raises UserError with one sentence for everything that can be wrong with it.
    """
    onnx = _resolve(path)
    manifest_path = onnx.with_suffix(".json")
    if not manifest_path.is_file():
        raise UserError(f"{onnx} has no manifest {manifest_path.name} beside it: export the bundle again or copy both.")
    try:
        raw = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"The manifest {manifest_path} cannot be read ({error}): export the bundle again.") from error
    manifest = _parse(raw, manifest_path)
    if not onnx.is_file():
        raise UserError(f"The network {onnx} is missing: copy it beside its manifest {manifest_path.name}.")
    if verify:
        _verify(onnx, manifest)
    return Bundle(onnx, manifest)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _resolve(path: str | Path | None) -> Path:
    if path is None or str(path) == "":
        return DEFAULT_BUNDLE
    given = Path(path).expanduser()
    if given.is_dir():
        raise UserError(f"{given} is a folder: name the bundle's .onnx file in it.")
    if given.suffix not in (".onnx", ".json"):
        packaged = BUNDLES / f"{given.name}.onnx"
        if len(given.parts) == 1 and packaged.is_file():
            return packaged
        known = ", ".join(sorted(file.stem for file in BUNDLES.glob("*.onnx"))) or "none"
        raise UserError(f"There is no bundle '{given}': give the path of an .onnx file or one of {known}.")
    onnx = given.with_suffix(".onnx")
    if not onnx.is_file() and not onnx.with_suffix(".json").is_file():
        raise UserError(f"The bundle {onnx} does not exist: check the path, or make it with 'matchanything export'.")
    return onnx


def _parse(raw: Any, path: Path) -> Manifest:
    if not isinstance(raw, dict) or "schema" not in raw:
        raise UserError(f"{path} is not a bundle manifest: name the .onnx file that 'matchanything export' wrote.")
    if raw["schema"] != SCHEMA:
        raise UserError(
            f"{path} has manifest schema {raw['schema']} and this version reads schema {SCHEMA}: "
            "update matchanything_ros or export the bundle again."
        )
    try:
        return Manifest(
            **{
                **raw,
                "weights": tuple(WeightsInfo(**entry) for entry in raw["weights"]),
                "inputs": tuple(
                    InputSpec(**{**entry, **{key: _size(entry[key]) for key in ("min", "opt", "max")}})
                    for entry in raw["inputs"]
                ),
                "preprocess": Preprocess(**raw["preprocess"]),
                "outputs": tuple(raw["outputs"]),
                "stages": tuple(raw.get("stages", ())),
            }
        )
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"The manifest {path} is damaged ({error}): export the bundle again.") from error


def _verify(onnx: Path, manifest: Manifest) -> None:
    data = onnx.with_name(onnx.name + ".data")
    if manifest.data_sha256 is not None and not data.is_file():
        raise UserError(f"The weights {data.name} of {onnx} are missing: copy the file beside it.")
    if sha256_of(onnx) != manifest.onnx_sha256:
        raise UserError(f"{onnx} is not the file that its manifest describes (truncated or replaced): copy it again.")
    if manifest.data_sha256 is not None and sha256_of(data) != manifest.data_sha256:
        raise UserError(f"{data} is not the file that its manifest describes (truncated or replaced): copy it again.")


def _size(pair: Any) -> Size:
    height, width = pair
    return int(height), int(width)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is '{value}', not one of {', '.join(allowed)}")
