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
Float = npt.NDArray[np.float32]

RADIUS_PX = 1.0  # a match is found again if both of its ends are this near
# Which share of the matches must be found again, both ways, and how far off the median one may be. Matches at the score
# threshold, and keypoints at the end of a top-K, come and go with rounding: in fp16 one in five was allowed for.
LEAST_FOUND = {"fp32": 0.95, "fp16": 0.80}
MOST_MEDIAN_PX = {"fp32": 0.1, "fp16": 0.3}
LEAST_FOUND_DENSE = 0.5  # the pixels of a warp that become matches: many are as good, but not entirely others
MOST_WARP_PX = {"fp32": 0.5, "fp16": 1.0}  # see Parity; the golden warp is stored in fp16
MOST_CERTAINTY = 0.1
CERTAIN = 0.5  # certainty of a dense warp above which it must be right


@dataclass(frozen=True)
class Parity:
    """The comparison with the golden result. found: share of golden matches found again; real: share of the engine's
    matches that are golden ones; median_px: of the distances of these; warp_px: median difference of a dense warp where
    it is certain, in the worse direction."""

    passed: bool
    expected: int
    matches: int
    found: float
    real: float
    median_px: float | None
    warp_px: float | None
    summary: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_parity(engine: Engine) -> Parity:
    """Run the golden images of the engine's bundle and compare. Raises UserError if the bundle has no golden result."""
    return check_run(engine.bundle, engine.run)


def check_run(bundle: Bundle, run: Callable[[dict[str, Float]], Arrays]) -> Parity:
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
    wanted, given = (matches_above(arrays, score_threshold)[0] for arrays in (golden, outputs))
    to_given, to_wanted = nearest(wanted, given)[1], nearest(given, wanted)[1]
    found, real = _share(to_given), _share(to_wanted)
    near = to_given[to_given <= RADIUS_PX]
    median = float(np.median(near)) if len(near) else None
    distances = warp_distances(golden, outputs)
    warp = max((float(np.median(x)) for x in distances), default=None)
    # Dense networks choose their matches among thousands of equally certain ones: the warp is what must agree.
    least = LEAST_FOUND[precision] if warp is None else LEAST_FOUND_DENSE
    summary = f"{found:.0%} of {len(wanted)} matches found again"
    passed = False
    if not all_finite(outputs):
        summary = "not all values are finite"
    elif warp is not None and warp > MOST_WARP_PX[precision]:
        summary = f"the warp is {warp:.2f} px off"
    elif warp is not None and (off := certainty_difference(golden, outputs)) > MOST_CERTAINTY:
        summary = f"the certainty is {off:.2f} off"
    elif _missing(to_given, least) or _missing(to_wanted, least):
        summary += f", {real:.0%} of {len(given)} are right"
    elif warp is None and median is not None and median > MOST_MEDIAN_PX[precision]:
        summary = f"matches are {median:.2f} px off"
    else:
        passed = True
        summary += "" if median is None else f", median {median:.3f} px"
        summary += "" if warp is None else f"; the warp is {warp:.3f} px off"
    return Parity(passed, len(wanted), len(given), found, real, median, warp, summary)


def all_finite(outputs: Arrays) -> bool:
    """Whether no output of a network has a NaN or an infinity."""
    return all(bool(np.isfinite(np.asarray(value, np.float32)).all()) for value in outputs.values())


def matches_above(arrays: Arrays, threshold: float) -> tuple[Float, Float]:
    """Matches [N, 4] (x0, y0, x1, y1) and scores [N] of those that a network found with at least this score."""
    scores = np.asarray(arrays["scores"], np.float32)
    keep = (scores > 0) & (scores >= threshold)
    both = np.concatenate([arrays["keypoints0"][keep], arrays["keypoints1"][keep]], axis=1)
    return np.asarray(both, np.float32), scores[keep]


def nearest(matches: Float, others: Float) -> tuple[npt.NDArray[np.intp], Float]:
    """Of the other matches, for each [N, 4] the index of the nearest and its distance: the larger one of the two ends'.
    Infinite if there is none."""
    index, distance = np.zeros(len(matches), np.intp), np.full(len(matches), np.inf, np.float32)
    if not len(others):
        return index, distance
    for start in range(0, len(matches), 256):  # bounded memory
        step = matches[start : start + 256, None] - others[None]
        ends = np.maximum(np.hypot(step[..., 0], step[..., 1]), np.hypot(step[..., 2], step[..., 3]))
        index[start : start + 256] = ends.argmin(1)
        distance[start : start + 256] = ends.min(1)
    return index, distance


def warp_distances(wanted: Arrays, given: Arrays, certain: float = CERTAIN) -> list[Float]:
    """Pixels between two dense warps [1, 4, H, 2W] where the certainty of the first is above `certain`: one array a
    direction in which something is. The first may be thinned out, as golden results are stored. Empty without warps.

    Pixels of the warp's resolution, W x H. The left half holds targets in image 1 (channels 2, 3), the right half those
    in image 0 (channels 0, 1); what else is there are the pixels' own places, the same in both.
    """
    if "warp" not in wanted or "warp" not in given:
        return []
    height, width = given["warp"].shape[2], given["warp"].shape[3] // 2
    step = _step(wanted, given)
    difference = np.asarray(given["warp"][0, :, ::step, ::step], np.float32) - np.asarray(wanted["warp"][0], np.float32)
    x0, y0, x1, y1 = difference * np.array([width, height] * 2, np.float32)[:, None, None] / 2
    sure = np.asarray(wanted["cert"], np.float32)[0, 0] > certain
    border = -(-width // step)  # thinned out, too
    left, right = np.hypot(x1, y1)[:, :border], np.hypot(x0, y0)[:, border:]
    directions = (left[sure[:, :border]], right[sure[:, border:]])
    return [np.asarray(x, np.float32) for x in directions if len(x)]


def certainty_difference(wanted: Arrays, given: Arrays, certain: float = CERTAIN) -> float:
    """Median difference of the certainties where the first is above `certain` (it may be thinned out); 0 if nowhere."""
    step, sure = _step(wanted, given), np.asarray(wanted["cert"], np.float32)
    difference = np.abs(np.asarray(given["cert"][..., ::step, ::step], np.float32) - sure)[sure > certain]
    return float(np.median(difference)) if len(difference) else 0.0


def _step(wanted: Arrays, given: Arrays) -> int:
    return -(-given["warp"].shape[2] // wanted["warp"].shape[2])


def _missing(distances: Float, least: float) -> bool:
    """Whether too few were found. One may always be missing, if it is not the only one."""
    count = int((distances > RADIUS_PX).sum())
    return count > max(1, round((1 - least) * len(distances))) or 0 < len(distances) == count


def _share(distances: Float) -> float:
    return float((distances <= RADIUS_PX).mean()) if len(distances) else 1.0
