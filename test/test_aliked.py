"""ALIKED: its stages written out by hand, and its recorded results.

The implementation was compared with the original's results for all four published networks (keypoints within 1e-4 px,
cosine of descriptors above 0.999999) on images that may not be shipped. What is recorded in data/golden/aliked.npz is
this implementation's result then, on an image that may.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import seeded
import torch
import torch.nn.functional as F
from aliked_case import network

from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict
from matchanything_tools.networks.aliked import VARIANTS, Aliked, FeatureReader
from matchanything_tools.networks.aliked.detection import LEAST, detect, refine, select, suppress
from matchanything_tools.networks.aliked.features import ReadFeatures, WholeFeatures, Window, upsample
from matchanything_tools.networks.aliked.padding import PaddingConv, pad_edges
from matchanything_tools.networks.sampling import sample

DATA = Path(__file__).parent / "data"


def image() -> torch.Tensor:
    """301 x 385 of the coffee cup: neither side a multiple of 32."""
    pixels = cv2.imread(str(DATA / "golden" / "coffee_0.png"))[100:401, 150:535, ::-1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("features", [WholeFeatures, ReadFeatures])
@pytest.mark.parametrize("variant", ["t16", "n16"])
def test_recorded_result(variant: str, features: FeatureReader) -> None:
    """Tolerances: ten times what 1e-6 of noise on the input changed (keypoints 8e-5 px, scores 3e-5)."""
    golden = np.load(DATA / "golden" / "aliked.npz")
    wanted = golden[f"{variant}_keypoints"]
    with torch.inference_mode():
        keypoints, scores, descriptors = (x[0].numpy() for x in network(variant, 300, 0.2, features)(image()))
    valid = scores > 0
    assert valid.sum() == len(wanted) and not valid[len(wanted) :].any()
    distance = np.linalg.norm(keypoints[valid][:, None] - wanted, axis=2)
    nearest = distance.argmin(axis=0)
    assert distance.min(axis=0).max() < 1e-3
    assert np.abs(scores[nearest] - golden[f"{variant}_scores"]).max() < 3e-4
    cosine = (descriptors[nearest[::4]] * golden[f"{variant}_descriptors"]).sum(axis=1)
    # A patch starts at the rounded-down coordinate: one keypoint in a hundred may fall on the other side.
    assert np.mean(cosine > 0.9999) >= 0.99


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_strictly(variant: str) -> None:
    aliked = Aliked(VARIANTS[variant], 50).eval()
    state = dict(seeded.state(f"aliked-{variant}"))
    assert len(state) == 76
    load_strict(aliked, state, what="ALIKED", path=Path("seeded"))
    aliked.fuse()
    with torch.inference_mode():
        keypoints, scores, descriptors = aliked(torch.rand(2, 3, 64, 96))
    assert keypoints.shape == (2, 50, 2) and descriptors.shape == (2, 50, VARIANTS[variant].dim)
    assert torch.isfinite(descriptors).all() and (scores >= 0).all()
    state.pop("score_head.0.weight")
    with pytest.raises(UserError, match=r"score_head\.0\.weight"):
        load_strict(Aliked(VARIANTS[variant], 50), state, what="ALIKED", path=Path("seeded"))


def score_map(height: int = 41, width: int = 53) -> torch.Tensor:
    noise = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, 1, 1)


def test_suppression_and_selection_by_hand() -> None:
    """The best pixel suppresses its 5x5 surroundings, then the best of what is left, in three rounds; 2 px border."""
    scores = score_map()
    found = suppress(scores)[0, 0].numpy()
    values = scores[0, 0].numpy()
    kept = np.zeros(values.shape, bool)
    for _ in range(3):
        near = cv2.dilate(kept.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        rest = np.where(near, 0, values)
        highest = cv2.dilate(rest, np.ones((5, 5), np.uint8))
        kept |= (rest == highest) & ~near
    kept[:2], kept[-2:], kept[:, :2], kept[:, -2:] = False, False, False, False
    assert np.array_equal(found, np.where(kept, values, 0)) and kept.sum() > 50

    rows, columns = np.nonzero(kept)
    order = np.argsort(-values[rows, columns])
    best, pixels = select(suppress(scores), 40)
    assert np.array_equal(best[0].numpy(), values[rows, columns][order[:40]])
    assert np.array_equal(pixels[0].numpy(), (rows * values.shape[1] + columns)[order[:40]])
    best, _ = select(suppress(scores), 500)  # more than there are maxima, and than there are blocks
    assert (best[0] > 0).sum() == kept.sum() and (best[0, kept.sum() :] == 0).all()


def test_selection_by_logits_in_half_precision() -> None:
    """The same pixels as by scores, in any order; LEAST where there are no more maxima or blocks."""
    logits = (score_map() * 8 - 4).half()
    maxima = suppress(torch.sigmoid(logits.float()))
    for k in (40, 500):
        best, pixels = select(maxima, k)
        ranks, found = select(maxima, k, ordered=False, ranks=logits)
        assert set(found[ranks > LEAST].tolist()) == set(pixels[best > 0].tolist())
        assert torch.equal(logits.flatten()[found[ranks > LEAST]], ranks[ranks > LEAST])


@pytest.mark.parametrize(("height", "width"), [(50, 70), (64, 33), (64, 96)])
def test_first_convolution_pads(height: int, width: int) -> None:
    """One Gather into stripes, against padding and a convolution."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, padding=1)
    image = torch.rand(2, 3, height, width)
    with torch.inference_mode():
        wanted = convolution(pad_edges(image))
        assert wanted.shape[2] % 32 == wanted.shape[3] % 32 == 0
        assert torch.allclose(PaddingConv(convolution, 8, planes=True)(image), wanted, atol=1e-6)


def test_threshold_falls_back_to_the_mean() -> None:
    scores = score_map()
    _, values = detect(scores, 200, threshold=0.7)
    peaks, _ = select(suppress(scores), 200)
    assert (values > 0).sum() == (peaks > 0.7).sum() > 5
    _, values = detect(scores, 200, threshold=0.999)
    assert (values > 0).sum() == (peaks > scores.mean()).sum() > 50


def test_subpixel_by_hand() -> None:
    scores = score_map()
    found = refine(scores, torch.tensor([[7 * 53 + 10, 38 * 53 + 50]]))[0].numpy()
    for (x, y), position in zip(((10, 7), (50, 38)), found, strict=True):
        window = scores[0, 0, y - 2 : y + 3, x - 2 : x + 3].numpy().astype(float)
        weight = np.exp((window - window.max()) / 0.1)
        rows, columns = np.mgrid[-2:3, -2:3]
        wanted = (x + (weight * columns).sum() / weight.sum(), y + (weight * rows).sum() / weight.sum())
        assert np.allclose(position, wanted, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_descriptors_look_no_further_than_a_quarter_of_the_longer_side(height: int, width: int) -> None:
    looked_at: list[torch.Tensor] = []

    class Recording(WholeFeatures):
        def between(self, positions: torch.Tensor) -> torch.Tensor:
            looked_at.append(positions)
            return super().between(positions)

    aliked = network("t16", 50, features=Recording)
    aliked.desc_head.offset_conv[2].weight.data.mul_(20)  # far beyond the limit
    with torch.inference_mode():
        keypoints, _, _ = aliked(image()[:, :, :height, :width])
    offsets = looked_at[0] - keypoints.unsqueeze(2)  # sides of a multiple of 32 are not padded
    assert float(offsets.max()) == pytest.approx(96 / 4) and float(offsets.min()) == pytest.approx(-96 / 4)


@pytest.mark.parametrize(
    ("reader", "dtype"), [(WholeFeatures, torch.float32), (ReadFeatures, torch.float32), (ReadFeatures, torch.float16)]
)
def test_features_are_zero_outside_of_the_image(reader: FeatureReader, dtype: torch.dtype) -> None:
    """All ways to read the map, at whole pixels and between them, against the padded map written out."""
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3  # four times the relative precision of fp16
    torch.manual_seed(0)
    groups = [torch.randn(1, 2, 32 // s, 64 // s) for s in (1, 2, 8, 32)]
    whole = F.normalize(torch.cat([upsample(group, groups[0].shape[2:]) for group in groups], dim=1), dim=1)
    whole[:, :, :3], whole[:, :, 30:], whole[:, :, :, :5], whole[:, :, :, 60:] = 0, 0, 0, 0
    features = reader(
        [group.to(dtype) for group in groups], Window(torch.tensor([5.0, 3.0]), torch.tensor([59.0, 29.0]))
    )
    pixels = torch.tensor([[[5, 3], [4, 3], [59, 29], [60, 29], [59, 30], [20, 10], [-1, 5], [64, 31], [70, 40]]])
    found = features.at(pixels.float().unsqueeze(2))[0, :, 0].float()
    for number, (x, y) in enumerate(pixels[0].tolist()):
        wanted = whole[0, :, y, x] if 0 <= x < 64 and 0 <= y < 32 else torch.zeros(8)
        assert torch.allclose(found[number], wanted, atol=tolerance)
    positions = torch.tensor([[[20.25, 10.5], [4.5, 15.0], [59.75, 29.75], [30.0, 2.25], [-3.0, 50.0]]])
    found = features.between(positions.unsqueeze(2)).float().permute(0, 3, 1, 2)
    assert torch.allclose(found, sample(whole, positions.unsqueeze(2)), atol=tolerance)
