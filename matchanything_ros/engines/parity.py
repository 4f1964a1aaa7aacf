"""Does an engine give the golden result that the PyTorch network gave? Asked after every build: compilers do err."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle, sha256_of
from matchanything_ros.engines import Engine
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import prepare

Arrays = Mapping[str, npt.NDArray[Any]]

RADIUS_PX = 1.0  # a match is found again if both of its ends are this near
# Which share of the matches must be found again, both ways, and how far off the median one may be. Matches at the score
# threshold, and keypoints at the end of a top-K, come and go with rounding: in fp16 one in five was allowed for.
LEAST_FOUND = {"fp32": 0.95, "fp16": 0.80}
MOST_MEDIAN_PX = {"fp32": 0.1, "fp16": 0.3}
MOST_WARP_PX = {"fp32": 0.5, "fp16": 1.0}  # median over what is certain; the golden warp is stored in fp16


@dataclass(frozen=True)
class Parity:
    """The comparison with the golden result. found: share of golden matches found again; real: share of the engine's
    matches that are golden ones; median_px: of the distances; warp_px: median difference of the dense warp, if any."""

    passed: bool
    expected: int
    matches: int
    found: float
    real: float
    median_px: float
    warp_px: float | None
    summary: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_parity(engine: Engine) -> Parity:
    """Run the golden images of the engine's bundle and compare. Raises UserError if the bundle has no golden result."""
    return check_run(engine.bundle, engine.run)


def check_run(bundle: Bundle, run: Callable[[dict[str, npt.NDArray[np.float32]]], Arrays]) -> Parity:
    """The same for whatever runs a bundle's network: inputs by name in, outputs by name out."""
    golden = load_golden(bundle)
    images = (golden["image0"], golden["image1"])
    inputs = {s.name: prepare(images[s.image], bundle.manifest.preprocess, s)[0] for s in bundle.manifest.inputs}
    return compare(golden, run(inputs), bundle.manifest.score_threshold, bundle.manifest.precision)


def warn_if_wrong(engine: Engine) -> None:
    """A RuntimeWarning if the engine does not give the golden result: a library's kernel can be wrong on one kind of
    GPU, as cuDNN 9.19's for 1x9 convolutions with bias in fp16 was."""
    if not engine.bundle.golden.is_file():
        return
    parity = check_parity(engine)
    if not parity.passed:
        warnings.warn(
            f"{engine.bundle.onnx.name} in {engine.backend} does not give the result it was exported with "
            f"({parity.summary}): use another version of the backend's libraries, or the backend onnxruntime-cpu.",
            RuntimeWarning,
            stacklevel=3,
        )


def load_golden(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    """The arrays of NAME.golden.npz. Raises UserError when it is missing or another one than the manifest's."""
    path = bundle.golden
    if not path.is_file():
        raise UserError(f"The golden result {path.name} is missing beside {bundle.onnx}: copy it there.")
    if bundle.manifest.golden_sha256 not in (None, sha256_of(path)):
        raise UserError(f"{path} is not the golden result that the bundle's manifest describes: copy it again.")
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def compare(golden: Arrays, outputs: Arrays, score_threshold: float, precision: str) -> Parity:
    """Compare the outputs of a network with the golden ones; both as networks give them (pixels of their input)."""
    wanted, given = _matches(golden, score_threshold), _matches(outputs, score_threshold)
    finite = all(np.isfinite(np.asarray(outputs[name], np.float32)).all() for name in outputs)
    to_given, to_wanted = _nearest(wanted, given), _nearest(given, wanted)
    found, real = _share(to_given), _share(to_wanted)
    near = to_given[to_given <= RADIUS_PX]
    median = float(np.median(near)) if len(near) else float("inf") if len(wanted) else 0.0
    warp = _warp_difference(golden, outputs)
    least = LEAST_FOUND[precision]
    if not finite:
        problem = "not all values are finite"
    elif warp is not None:
        # Dense networks choose their matches among thousands of equally certain ones: the warp is what must agree.
        problem = "" if warp <= MOST_WARP_PX[precision] else f"the warp is {warp:.2f} px off"
    elif _missing(to_given, least) or _missing(to_wanted, least):
        problem = f"{found:.0%} of {len(wanted)} matches found again, {real:.0%} of {len(given)} are right"
    elif median > MOST_MEDIAN_PX[precision]:
        problem = f"matches are {median:.2f} px off"
    else:
        problem = ""
    summary = problem or f"{found:.0%} of {len(wanted)} matches found again, median {median:.3f} px"
    return Parity(not problem, len(wanted), len(given), found, real, median, warp, summary)


def _matches(arrays: Arrays, threshold: float) -> npt.NDArray[np.float32]:
    """[N, 4]: x0, y0, x1, y1 of the matches above the threshold."""
    scores = np.asarray(arrays["scores"], np.float32)
    keep = (scores > 0) & (scores >= threshold)
    both = np.concatenate([arrays["keypoints0"][keep], arrays["keypoints1"][keep]], axis=1)
    return np.asarray(both, np.float32)


def _nearest(matches: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """For each match the distance to the nearest other one: the larger of the distances of its two ends."""
    if not len(matches) or not len(others):
        return np.full(len(matches), np.inf, np.float32)
    result = np.empty(len(matches), np.float32)
    for start in range(0, len(matches), 256):  # bounded memory
        step = matches[start : start + 256, None] - others[None]
        ends = np.maximum(np.hypot(step[..., 0], step[..., 1]), np.hypot(step[..., 2], step[..., 3]))
        result[start : start + 256] = ends.min(1)
    return result


def _missing(distances: npt.NDArray[np.float32], least: float) -> bool:
    """Whether too few were found. One may always be missing, if it is not the only one."""
    count = int((distances > RADIUS_PX).sum())
    return count > max(1, round((1 - least) * len(distances))) or 0 < len(distances) == count


def _share(distances: npt.NDArray[np.float32]) -> float:
    return float((distances <= RADIUS_PX).mean()) if len(distances) else 1.0


def _warp_difference(golden: Arrays, outputs: Arrays) -> float | None:
    """Median difference in pixels of image 1 between the warps where the golden one is certain; None without a warp."""
    if "warp" not in golden or "warp" not in outputs:
        return None
    height, width = outputs["warp"].shape[-2:]
    step = -(-height // golden["warp"].shape[-2])  # the golden one is stored thinned out
    wanted = golden["warp"].astype(np.float32)[0]
    given = np.asarray(outputs["warp"][0, :, ::step, ::step], np.float32)
    certain = golden["cert"].astype(np.float32)[0, 0] > 0.5
    if not certain.any():
        return None
    difference = np.hypot((given[2] - wanted[2]) * width / 2, (given[3] - wanted[3]) * height / 2)
    return float(np.median(difference[certain]))
