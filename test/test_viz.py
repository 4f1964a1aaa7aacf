"""Pictures show what they should at any size: points land on their pixels, the outline where the homography says."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from matchanything_ros.errors import UserError
from matchanything_ros.viz import GAP, OUTLIER, OUTLINE, draw_dense, draw_matches, encode_jpeg, write_picture

SIZES = [((480, 640), (480, 640)), ((24, 32), (1080, 1920)), ((2, 500), (500, 2)), ((900, 40), (40, 900))]


@pytest.mark.parametrize(("size0", "size1"), SIZES)
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_any_size_and_any_number_of_matches(size0: tuple[int, int], size1: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(0)
    image0, image1 = np.zeros(size0, np.uint8), rng.random((*size1, 3)).astype(np.float32)
    points0, points1 = (rng.uniform(0, 1, (count, 2)).astype(np.float32) * size[::-1] for size in (size0, size1))
    good = rng.random(count) < 0.5
    picture = draw_matches(image0, image1, points0, points1, inliers=good, homography=np.eye(3), caption="two words")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert 1200 <= picture.shape[1] <= 1320 and picture.shape[0] <= 2000
    assert draw_matches(image0, image1, points0, points1, scores=np.ones(count, np.float32)).shape[2] == 3


def test_a_point_is_drawn_on_its_pixel() -> None:
    black = np.zeros((120, 160), np.uint8)
    point0, point1 = np.array([[40, 30]], np.float32), np.array([[150, 100]], np.float32)
    picture = draw_matches(black, black, point0, point1, inliers=np.zeros(1, bool), max_lines=0)
    panel = (picture.shape[1] - GAP) // 2
    scale = panel / 160
    red = np.all(np.abs(picture.astype(int) - OUTLIER) < 60, axis=2)
    ys, xs = np.nonzero(red)
    # Half a pixel of the image is `scale` / 2 pixels here: a centre taken for an edge would be off by that much.
    for at, point, offset in ((xs < panel, point0, 0), (xs > panel, point1, panel + GAP)):
        centre = np.array([xs[at].mean() - offset, ys[at].mean()])
        assert np.abs((centre + 0.5) / scale - 0.5 - point[0]).max() < 0.2


def test_the_outline_follows_the_homography() -> None:
    black = np.zeros((120, 160), np.uint8)
    half = np.diag([0.5, 0.5, 1.0])
    none = np.zeros((0, 2), np.float32)
    picture = draw_matches(black, black, none, none, homography=half)
    panel = (picture.shape[1] - GAP) // 2
    yellow = np.all(np.abs(picture.astype(int) - OUTLINE) < 60, axis=2)
    assert not yellow[:, :panel].any()
    ys, xs = np.nonzero(yellow)
    assert abs(xs.max() - panel - GAP - panel / 2) < 8 and abs(ys.max() - picture.shape[0] / 2) < 8


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_dense_warp_moves_image_1_onto_image_0(symmetric: bool) -> None:
    image1 = np.zeros((96, 128), np.uint8)
    image1[:, 64:] = 255
    # Cell centres: from edge to edge, -1 and 1 lie half a cell outside.
    columns, rows = ((2 * np.arange(n) + 1) / n - 1 for n in (64, 48))
    grid = np.stack(np.meshgrid(columns, rows)).astype(np.float32)
    warp = np.concatenate([grid, grid * [[[-1]], [[1]]]]).astype(np.float32)  # image 1 seen in a mirror
    cert = np.ones((48, 64), np.float32)
    if symmetric:
        warp, cert = np.concatenate([warp, warp[[2, 3, 0, 1]]], axis=2), np.concatenate([cert, 0 * cert], axis=1)
    picture = draw_dense(np.zeros((96, 128), np.uint8), image1, warp, cert)
    quarter = picture[picture.shape[0] * 5 // 8, : (picture.shape[1] - GAP) // 2].mean(1)
    assert quarter[: len(quarter) // 3].min() > 240 and quarter[-len(quarter) // 3 :].max() < 15


def test_pictures_are_files_or_a_sentence(tmp_path: Path) -> None:
    picture = np.full((20, 30, 3), (200, 30, 30), np.uint8)
    write_picture(tmp_path / "a.png", picture)
    assert (cv2.imread(str(tmp_path / "a.png"))[..., ::-1] == picture).all()
    assert abs(int(cv2.imdecode(np.frombuffer(encode_jpeg(picture), np.uint8), 1)[10, 10, 2]) - 200) < 8
    with pytest.raises(UserError, match="could not be written"):
        write_picture(tmp_path / "missing" / "a.png", picture)
    with pytest.raises(UserError, match="warp"):
        draw_dense(picture, picture, np.zeros((2, 4, 4), np.float32), np.zeros((4, 4), np.float32))
