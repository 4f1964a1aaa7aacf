"""Two image messages -> one answer, whatever happens: what the live node and the bag replay do with every pair."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.errors import UserError
from matchanything_ros.homography import HomographyEstimate, estimate_homography
from matchanything_ros.images import Stretch, to_array
from matchanything_ros.matcher import Matcher, Matches
from matchanything_ros.messages import not_computed
from matchanything_ros.viz import draw_matches


@dataclass(frozen=True)
class Answer:
    """Matches and homography of a pair, milliseconds by stage, the decoded images (uint8, gray or RGB).

    failure: one sentence if the pair could not be matched (then status is NOT_COMPUTED), else empty; trace: where, if
    the failure is a defect and not bad input.
    """

    matches: Matches
    estimate: HomographyEstimate
    timings_ms: dict[str, float]
    images: tuple[npt.NDArray[Any], ...]
    failure: str = ""
    trace: str = ""

    def picture(self) -> npt.NDArray[np.uint8]:
        """Both images side by side with their matches, RGB. Only for a pair that was matched."""
        image0, image1 = self.images
        return draw_matches(
            image0,
            image1,
            self.matches.keypoints0,
            self.matches.keypoints1,
            inliers=self.estimate.inliers,
            homography=self.estimate.matrix,
            caption=f"{self.estimate.status.name}  {self.estimate.num_inliers}/{self.estimate.num_matches} inliers",
        )


def answer(
    matcher: Matcher, message0: Any, message1: Any, stretch: Stretch | None = None, **estimate_options: float
) -> Answer:
    """Decode, match, estimate. Never raises for what a pair or an engine can do: no match is an answer.

    message0, message1: sensor_msgs/Image or CompressedImage. estimate_options: see estimate_homography.
    """
    start = time.perf_counter()
    timings: dict[str, float] = {}
    images: list[npt.NDArray[Any]] = []
    try:
        for camera, message in enumerate((message0, message1)):
            try:
                images.append(to_array(message, stretch))
            except UserError as error:
                raise UserError(f"image{camera}: {error}") from error
        timings["decode"] = 1e3 * (time.perf_counter() - start)
        matches = matcher.match(images[0], images[1])
        timings |= matches.timings_ms
        matched = time.perf_counter()
        estimate = estimate_homography(
            matches.keypoints0,
            matches.keypoints1,
            matches.size0,
            matches.size1,
            **estimate_options,  # type: ignore[arg-type]
        )
        timings["homography"] = 1e3 * (time.perf_counter() - matched)
        return Answer(matches, estimate, timings, tuple(images))
    except Exception as error:
        sizes = [(getattr(m, "width", 0), getattr(m, "height", 0)) for m in (message0, message1)]
        sizes[: len(images)] = [(image.shape[1], image.shape[0]) for image in images]
        matches, estimate = not_computed(sizes[0], sizes[1])
        if isinstance(error, UserError):
            return Answer(matches, estimate, timings, tuple(images), str(error))
        failure = f"Matching failed ({type(error).__name__}: {error})."
        return Answer(matches, estimate, timings, tuple(images), failure, traceback.format_exc())
