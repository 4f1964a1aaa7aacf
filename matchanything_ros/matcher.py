"""A bundle and an engine: two images -> matches in pixels of these images."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle, Manifest, load_bundle
from matchanything_ros.engines import Engine, ImageEngine, open_engine
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import Image, ToOriginal, check_image, prepare

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Matches:
    """Correspondences between two images, best first.

    keypoints0, keypoints1: float32 [N, 2], (x, y) in pixels of the original images, pixel centres at integers.
    scores: float32 [N] in (0, 1].
    size0, size1: (width, height) of the original images in pixels.
    timings_ms: wall time of the stages "preprocess", "network" (copies to and from the device included), "postprocess".
    warp, cert: for dense networks on request: float32 [4, H, W] (x0, y0, x1, y1 in [-1, 1], the edges of the image) and
        [H, W] in [0, 1].
    """

    keypoints0: Float
    keypoints1: Float
    scores: Float
    size0: tuple[int, int]
    size1: tuple[int, int]
    timings_ms: dict[str, float] = field(default_factory=dict)
    warp: Float | None = None
    cert: Float | None = None

    def __len__(self) -> int:
        return len(self.scores)


class Matcher:
    """Matches pairs of images with one bundle.

        with Matcher() as matcher:
            matches = matcher.match(image0, image1)

    bundle: a path, the name of a bundle in the package, a loaded Bundle, or None for the default one.
    backend, as_exported: see engines.open_engine. score_threshold and max_matches: by default the manifest's; may be
    assigned at any time. Raises UserError when the bundle or the backend cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        backend: str = "auto",
        score_threshold: float | None = None,
        max_matches: int | None = None,
        as_exported: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        manifest = self.bundle.manifest
        self.score_threshold = manifest.score_threshold if score_threshold is None else score_threshold
        self.max_matches = manifest.max_matches if max_matches is None else max_matches
        self.engine: Engine = open_engine(self.bundle, backend, as_exported)

    def match(self, image0: Image, image1: Image, dense: bool = False) -> Matches:
        """Match two images: uint8, or float32 in [0, 1]; gray [H, W] or RGB [H, W, 3]; of any, also different, sizes.

        Raises UserError for images that cannot be matched (empty, not finite, of another type), and for dense=True
        with a network that has no dense output. No match at all is an answer: Matches of length 0.
        """
        manifest = self.engine.bundle.manifest
        if dense and not manifest.dense:
            raise UserError(f"The bundle {manifest.name} has no dense output: use a RoMa bundle.")
        check_image(image0, "image 0")
        check_image(image1, "image 1")
        start = time.perf_counter()
        outputs, back, preprocess_ms = self._run((image0, image1), dense)
        ran = time.perf_counter()
        scores = outputs["scores"]
        # Best first, so that the rows to keep are a prefix; 0 marks padding whatever the threshold.
        keep = np.flatnonzero((scores > 0) & (scores >= self.score_threshold))
        keypoints0 = back["image0"](outputs["keypoints0"][keep])
        keypoints1 = back["image1"](outputs["keypoints1"][keep])
        if _pads(manifest):  # padding matches padding, beautifully
            inside = _inside(keypoints0, image0) & _inside(keypoints1, image1)
            keep, keypoints0, keypoints1 = keep[inside], keypoints0[inside], keypoints1[inside]
        most = self.max_matches
        keep, keypoints0, keypoints1 = keep[:most], keypoints0[:most], keypoints1[:most]
        done = time.perf_counter()
        return Matches(
            keypoints0=keypoints0,
            keypoints1=keypoints1,
            scores=np.minimum(scores[keep], np.float32(1)),  # a cosine may be rounded to a little more
            size0=(image0.shape[1], image0.shape[0]),
            size1=(image1.shape[1], image1.shape[0]),
            timings_ms={
                "preprocess": preprocess_ms,
                "network": 1e3 * (ran - start) - preprocess_ms,
                "postprocess": 1e3 * (done - ran),
            },
            warp=np.array(outputs["warp"][0]) if dense else None,
            cert=np.array(outputs["cert"][0, 0]) if dense else None,
        )

    def _run(self, images: tuple[Image, Image], dense: bool) -> tuple[dict[str, Float], dict[str, ToOriginal], float]:
        """Outputs, for each input the map to its image's pixels, and the milliseconds of the preprocessing."""
        if getattr(self.engine, "takes_images", False) and all(image.dtype == np.uint8 for image in images):
            return cast(ImageEngine, self.engine).run_images(images, dense)
        start = time.perf_counter()
        inputs: dict[str, Float] = {}
        back: dict[str, ToOriginal] = {}
        manifest = self.engine.bundle.manifest  # a plan may take fewer sizes than the bundle
        for spec in manifest.inputs:
            inputs[spec.name], back[spec.name] = prepare(images[spec.image], manifest.preprocess, spec)
        preprocess_ms = 1e3 * (time.perf_counter() - start)
        return self.engine.run(inputs), back, preprocess_ms

    def reopen(self, backend: str = "auto") -> None:
        """Open the engine again, such as after a plan was built. If that raises UserError, the present one stays."""
        engine = open_engine(self.bundle, backend)
        self.engine.close()
        self.engine = engine

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def __enter__(self) -> Matcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pads(manifest: Manifest) -> bool:
    """Whether images may be smaller than the network's input: to its fixed size, the least one, or the divisor."""
    resize = manifest.preprocess.resize
    return resize in ("fit", "fit_down") or (resize == "fit_stretch" and manifest.fixed)


def _inside(keypoints: Float, image: Image) -> npt.NDArray[np.bool_]:
    """Which keypoints [N, 2] lie on the image."""
    return np.all((keypoints >= -0.5) & (keypoints <= np.array([image.shape[1], image.shape[0]]) - 0.5), axis=1)
