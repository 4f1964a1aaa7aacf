"""The measures against values worked out by hand; the command on the pairs in test/data/pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from matchanything_ros.cli import main
from matchanything_ros.errors import UserError
from matchanything_tools.accuracy import auc, corner_error, precision, roc, roc_area
from matchanything_tools.pairs import category, read_pairs, shuffled_pairs

PAIRS = Path(__file__).parent / "data" / "pairs"


def test_corner_error_is_measured_at_pixel_centres_in_image_1() -> None:
    truth = np.diag([2.0, 2.0, 1.0])
    moved = np.array([[2.0, 0, 3], [0, 2, 4], [0, 0, 1]])
    assert corner_error(moved, truth, (640, 480)) == pytest.approx(5)  # 3-4-5, whatever the size
    # Twice as wide about the origin: the corners at x = 639 are off by 639, the other two by nothing.
    assert corner_error(np.diag([3.0, 2.0, 1.0]), truth, (640, 480)) == pytest.approx(639 / 2)
    assert corner_error(None, truth, (640, 480)) == math.inf
    horizon = np.array([[1.0, 0, 0], [0, 1, 0], [-0.01, 0, 1]])  # x > 100 lies behind it
    assert corner_error(horizon, truth, (640, 480)) == math.inf


def test_auc_by_hand() -> None:
    assert auc([0.0], 10) == pytest.approx(1)
    assert auc([20.0, math.inf], 10) == 0
    # Recall rises linearly to 1/2 at 4 px, stays there to 10: (4 * 1/4 + 6 * 1/2) / 10.
    assert auc([4.0, 20.0], 10) == pytest.approx(0.4)
    assert math.isnan(auc([], 10))


def test_precision_and_roc_by_hand() -> None:
    points = np.array([[0, 0], [10, 0], [0, 10], [5, 5]], np.float32)
    moved = points + np.array([[2.9, 0], [3.1, 0], [0, 0], [0, 100]], np.float32)
    assert precision(points, moved, np.eye(3)) == 0.5
    assert precision(points[:0], moved[:0], np.eye(3)) == 0
    # Pixels of image 1: 4 px there are 2 px of an image half as large.
    doubled = 2 * points[:2] + np.array([[4, 0], [2.9, 0]], np.float32)
    assert precision(points[:2], doubled, np.diag([2.0, 2.0, 1.0])) == 0.5
    assert roc([5.0, 3.0], [4.0, 1.0]) == [(5, 0, 0.5), (4, 0.5, 0.5), (3, 0.5, 1), (1, 1, 1)]
    assert roc_area([5.0, 3.0], [4.0, 1.0]) == 0.75
    assert roc_area([1.0], [1.0]) == 0.5  # a tie counts half


def test_a_change_of_sensor_outweighs_a_change_of_view() -> None:
    kinds = ("cross-modal + viewpoint", "zoom + rotation (one capture)", "viewpoint", "temporal (11 years)")
    assert [category(kind) for kind in kinds] == ["cross-modal", "rotation", "viewpoint", "other"]


def test_shuffled_pairs_share_no_source_and_repeat() -> None:
    pairs = read_pairs(PAIRS)
    drawn = shuffled_pairs(pairs, 20)
    assert [pair.name for pair in drawn] == [pair.name for pair in shuffled_pairs(pairs, 20)]
    assert len({pair.name for pair in drawn}) == 20
    by_file = {file: pair for pair in pairs if pair.homography is not None for file in pair.files}
    for pair in drawn:
        first, second = (by_file[file] for file in pair.files)
        assert not first.sources & second.sources and pair.homography is None


def test_the_command_is_deterministic_and_draws_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert main(["evaluate", str(PAIRS), "--shuffled", "2", "--out", str(tmp_path / name)]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    records = json.loads((tmp_path / "a" / "evaluation.json").read_text())["SIFT"]
    assert len(records) == 14 + 2
    by_name = {record["name"]: record for record in records}
    # Two overlapping photographs of one flight: solved by all ways, to less than an inlier may be off.
    for way in ("error_magsac_px", "error_px", "error_accepted_px"):
        assert by_name["caliterra_046_047"][way] < 3
    assert by_name["caliterra_046_047"]["precision"] > 0.8
    # Thermal against colour is what SIFT cannot do; a refused pair has no error at all.
    assert by_name["tri2i_46373"]["error_accepted_px"] is None
    assert all(record["status"] != "OK" for record in records if record["precision"] is None)
    drawn = {path.stem for path in (tmp_path / "a" / "failures").iterdir()}
    assert "SIFT_tri2i_46373" in drawn and "SIFT_caliterra_046_047" not in drawn
    assert "| SIFT | MAGSAC |" in capsys.readouterr().out


def test_plain_folders(tmp_path: Path) -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (200, 260), np.uint8), (0, 0), 2)
    for name, moved in (("one", True), ("two", False)):
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "0.png"), texture[:180, :240])
        cv2.imwrite(str(folder / "1.jpg"), texture[20:, 20:])
        if moved:
            np.savetxt(folder / "H.txt", [[2, 0, -40], [0, 2, -40], [0, 0, 2]])
    one, two = read_pairs(tmp_path)
    assert one.homography is not None and one.homography[2, 2] == 1 and one.homography[0, 2] == -20
    assert two.homography is None and two.category == "no overlap"
    (tmp_path / "pairs" / "one" / "0.json").write_text("{}")  # what is no image does not take its place
    truth = tmp_path / "pairs" / "one" / "H.txt"
    truth.write_text("1, 0, 5\n0, 1, 6\n0, 0, 1\n")
    first = read_pairs(tmp_path)[0]
    assert first.homography is not None and first.homography[1, 2] == 6 and first.files[0].name == "0.png"
    for text, sentence in {
        "1 2 3": "homography of pair one",
        "": "homography of pair one",
        "1 0 a 0 1 0 0 0 1": "no 3x3 matrix",
        "1 2 3 2 4 6 0 0 1": "to a line",
    }.items():
        truth.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_pairs(tmp_path)
    (tmp_path / "pairs" / "two" / "1.jpg").unlink()
    truth.unlink()
    with pytest.raises(UserError, match="two holds only one image of two"):
        read_pairs(tmp_path)


def test_files_of_a_list_in_any_of_its_three_places(tmp_path: Path) -> None:
    entry = {"name": "x", "files": ["x/0.png", "x/1.png"], "homography": None}
    for number, (place, given) in enumerate([("x", "."), ("pairs/x", "."), ("pairs/x", "pairs"), ("some/x", "some")]):
        root = tmp_path / str(number)
        (root / place).mkdir(parents=True)
        (root / "pairs.json").write_text(json.dumps({"pairs": [entry]}))
        for name in ("0.png", "1.png"):
            (root / place / name).write_bytes(b"")
        assert read_pairs(root / given)[0].files[1] == root / place / "1.png"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--score-threshold 3", "from 0 to 1"),
        ("--max-matches 0", "positive"),
        ("--shuffled -1", "--shuffled is -1"),
        ("--poses -1", "--poses is -1"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(PAIRS), *flags.split(), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is no folder"),
        ({}, "holds no image pair"),
        ({"pairs.json": "{}"}, "no list of pairs"),
        ({"pairs.json": '{"pairs": [{"name": "x", "files": ["0.png", "1.png"], "homography": null}]}'}, "x is missing"),
    ],
)
def test_wrong_folders_are_one_sentence(
    tmp_path: Path, content: dict[str, str] | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert main(["evaluate", str(folder), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
