"""A recording in any format gives what matching its pictures directly gives; wrong recordings are one sentence."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from mcap.reader import make_reader
from recordings import START, TOPICS, Frames, record
from rosbags.highlevel import AnyReader
from trivial_bundle import write_trivial_bundle

from matchanything_ros import Matcher, estimate_homography
from matchanything_ros.bagplayer import BagPlayer
from matchanything_ros.cli import main
from matchanything_ros.matcher import Matches
from matchanything_ros.messages import read_correspondences, read_homography
from matchanything_ros.pairing import Pairing
from matchanything_ros.worker import Worker

PAIRS = Path(__file__).parent / "data" / "pairs"
MS = 1_000_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Small matches: the translation of its grid is a homography that every pair accepts.
    return write_trivial_bundle(tmp_path_factory.mktemp("bundle") / "trivial.onnx")


def pictures(count: int = 4) -> Frames:
    """Real pictures of two kinds and sizes: colour at the left, gray and smaller at the right."""
    image = cv2.imread(str(PAIRS / "garfield_rgb_nir_0123" / "0.jpg"))[..., ::-1]
    gray = cv2.imread(str(PAIRS / "garfield_rgb_nir_0123" / "1.jpg"), cv2.IMREAD_GRAYSCALE)
    frames = []
    for index in range(count):
        frames.append((0, index * 100 * MS, np.roll(image, 8 * index, axis=1)))
        frames.append((1, index * 100 * MS + 4 * MS, gray[:360, : 480 - 4 * index]))
    return frames


def replay(bag: Path, bundle: Path, out: Path, *more: str) -> int:
    topics = ["--image0", TOPICS[0], "--image1", TOPICS[1]]
    return main(["replay", str(bag), *topics, "--bundle", str(bundle), "--out", str(out), *more])


@pytest.mark.parametrize(
    ("kind", "compressed", "bare"),
    [("mcap", False, False), ("sqlite3", False, False), ("ros1", False, False), ("ros1", True, False),
     ("mcap", True, True), ("sqlite3", False, True)],
)  # fmt: skip
def test_round_trip(tmp_path: Path, bundle: Path, kind: str, compressed: bool, bare: bool) -> None:
    frames = pictures()
    bag = record(tmp_path / "bag", kind, frames, compressed)
    if bare:
        bag = next(file for file in bag.iterdir() if file.suffix in (".mcap", ".db3"))
    assert replay(bag, bundle, tmp_path / "out") == 0
    with AnyReader([tmp_path / "out" / "matches.mcap"]) as reader:  # without any registration of our types
        read = [(c.topic, t, reader.deserialize(raw, c.msgtype)) for c, t, raw in reader.messages()]
    assert [topic for topic, _, _ in read] == ["/match_node/correspondences", "/match_node/homography"] * 4
    with Matcher(bundle) as matcher:
        for index in range(4):
            (camera0, stamp0, image0), (camera1, stamp1, image1) = frames[2 * index : 2 * index + 2]
            expected: Matches = matcher.match(image0, image1)
            estimate = estimate_homography(expected.keypoints0, expected.keypoints1, expected.size0, expected.size1)
            (_, _, points), (_, _, found) = read[2 * index : 2 * index + 2]
            matches, inliers = read_correspondences(points)
            assert matches.size0 == (640, 480) and matches.size1 == (480 - 4 * index, 360)
            for name in ("keypoints0", "keypoints1", "scores"):
                np.testing.assert_array_equal(getattr(matches, name), getattr(expected, name))
            np.testing.assert_array_equal(inliers, estimate.inliers)
            np.testing.assert_array_equal(read_homography(found).matrix, estimate.matrix)
            for message in (points, found):
                stamps = [
                    (h.stamp.sec * 10**9 + h.stamp.nanosec, h.frame_id) for h in (message.header0, message.header1)
                ]
                assert stamps == [(START + stamp0, f"camera{camera0}"), (START + stamp1, f"camera{camera1}")]
                assert message.header == message.header0
                assert message.bundle_sha256 == matcher.bundle.manifest.onnx_sha256


def test_all_files_tell_the_same(tmp_path: Path, bundle: Path) -> None:
    # A fifth picture at the left has no partner.
    frames = [*pictures(), (0, 900 * MS, np.zeros((480, 640, 3), np.uint8))]
    assert replay(record(tmp_path / "bag", "mcap", frames), bundle, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["matches.csv", "matches.mcap", "report.html", "summary.json"]
    rows = list(csv.DictReader((out / "matches.csv").open()))
    summary = json.loads((out / "summary.json").read_text())
    assert len(rows) == summary["pairs"] == 4
    assert [int(row["stamp0"]) - START for row in rows] == [index * 100 * MS for index in range(4)]
    assert summary["images_received"] == {TOPICS[0]: 5, TOPICS[1]: 4}
    assert summary["images_dropped"] == {TOPICS[0]: {"cleared": 1}, TOPICS[1]: {}}
    assert summary["status"] == {"OK": 4} and all(row["status"] == "OK" for row in rows)
    matrix = np.array([float(rows[0][f"h{r}{c}"]) for r in range(3) for c in range(3)]).reshape(3, 3)
    # The grid moves by (6, -4) in inputs of 160x120: image 0 is 4 times as large, image 1 3 times.
    point = matrix @ [4 * 80.5 - 0.5, 4 * 60.5 - 0.5, 1]
    np.testing.assert_allclose(point[:2] / point[2], [3 * 86.5 - 0.5, 3 * 56.5 - 0.5], atol=0.01)
    with (out / "matches.mcap").open("rb") as file:  # another reader than the one that wrote: definitions are inside
        schemas = {schema.name for schema in make_reader(file).get_summary().schemas.values()}
    assert schemas == {"matchanything_ros/msg/Correspondences", "matchanything_ros/msg/Homography"}
    report = (out / "report.html").read_text()
    assert report.count("data:image/jpeg;base64,") == 6 and report.count("<svg") == 3
    assert summary["bundle_sha256"] in report


def test_the_report_needs_nothing_from_outside(tmp_path: Path, bundle: Path) -> None:
    assert replay(record(tmp_path / "bag", "mcap", pictures(2)), bundle, tmp_path / "out") == 0
    report = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", report))
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', report))


class SlowMatcher:
    """Takes 0.25 s for every pair and finds nothing."""

    def __init__(self, bundle: Path) -> None:
        self.inner = Matcher(bundle)
        self.bundle = self.inner.bundle

    def match(self, image0: np.ndarray, image1: np.ndarray, dense: bool = False) -> Matches:
        time.sleep(0.25)
        return self.inner.match(image0, image1)


def stream(events: list[tuple[int, int]]) -> Iterator[Any]:
    """(camera, stamp in nanoseconds), received when stamped."""
    for camera, time_ns in events:
        stamp = START + time_ns
        header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id="")
        image = SimpleNamespace(
            header=header, encoding="mono8", height=8, width=8, step=8, is_bigendian=0, data=bytes(64)
        )
        yield SimpleNamespace(topic=TOPICS[camera]), stamp, image


def test_pairs_are_those_of_the_node(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slow cameras, a large tolerance: the node's worker takes the pair that is there after a tenth of a second."""
    events = [(0, 0), (0, 1000 * MS), (1, 1600 * MS), (0, 2000 * MS), (1, 2600 * MS), (0, 3000 * MS)]
    live: list[tuple[int, int]] = []
    with Matcher(bundle) as matcher:
        answered = BagPlayer(matcher, Pairing(0.7), None, 3.0)  # type: ignore[arg-type]
        monkeypatch.setattr(answered, "_record", lambda *args: None)
        list(answered.play(stream(events), TOPICS, live=False))
        worker = Worker(lambda: matcher, Pairing(0.7), lambda _, pair: live.append((pair.stamp0, pair.stamp1)))
        before = 0
        for camera, time_ns in events:
            time.sleep((time_ns - before) * 0.5e-9 if time_ns - before > 300 * MS else 0)  # twice as fast
            before = time_ns
            worker.add(camera, START + time_ns, None)
        time.sleep(0.4)
        worker.stop()
    assert [(record.stamp0, record.stamp1) for record in answered.records] == live
    assert [(a - START, b - START) for a, b in live] == [(1000 * MS, 1600 * MS), (2000 * MS, 2600 * MS)]


@pytest.mark.parametrize("live", [False, True])
def test_bag_rate_drops_what_a_busy_node_drops(bundle: Path, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 10 Hz and 0.25 s a pair: the pair at 0 s runs until 0.25 s, then the newest (0.2 s) until 0.5 s, and so on."""
    played = BagPlayer(SlowMatcher(bundle), Pairing(0.05), None, 3.0)  # type: ignore[arg-type]
    monkeypatch.setattr(played, "_record", lambda *args: None)
    events = [(camera, index * 100 * MS + camera * MS) for index in range(10) for camera in (0, 1)]
    assert list(played.play(stream(events), TOPICS, live)) == list(range(1, 21))
    matched = [round((record.stamp0 - START) / (100 * MS)) for record in played.records]
    if not live:
        assert matched == list(range(10)) and played.dropped == 0
        return
    assert matched[:2] == [0, 2] and matched[-1] == 9
    assert 4 <= len(matched) <= 5  # 1 s at 0.25 s and a little each
    assert played.dropped == 2 * (10 - len(matched)) == played.drops[-1][1]
    # The second waited: it came at 0.2 s, and the matcher was free at 0.25 s or a little later.
    assert 290 < played.records[1].latency_ms < 450


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", *TOPICS], "does not exist"),
        (["empty", *TOPICS], "no metadata.yaml"),
        (["loose", *TOPICS], "name the file a.mcap in it"),
        (["text.txt", *TOPICS], "is no bag"),
        (["broken.mcap", *TOPICS], "cannot be read"),
        (["cut.bag", *TOPICS], "cannot be read"),
        (["bag", "/left/image_raw", "/wrong"], "no topic /wrong; it has /left/image_raw (sensor_msgs/Image)"),
        (["bag", "/chatter", "/left/image_raw"], "/chatter holds std_msgs/msg/String, not images"),
        (["bag", "/left/image_raw", "/left/image_raw"], "name the topics of two cameras"),
        (["apart", *TOPICS], "none has a partner"),
        (["silent", *TOPICS], "/right/image_raw holds no message"),
        (["bag", *TOPICS, "--bundle", "nowhere.onnx"], "does not exist"),
        (["bag", *TOPICS, "--score-threshold", "2"], "give a number from 0 to 1"),
        (["bag", *TOPICS, "--ransac-threshold", "nan"], "positive number of pixels"),
        (["bag", *TOPICS, "--approximate-sync-tolerance", "-1"], "0 or more"),
        (["bag", *TOPICS, "--queue-size", "0"], "--queue-size is 0"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, bundle: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = np.zeros((8, 8), np.uint8)
    record(tmp_path / "bag", "mcap", [(0, 0, small), (1, 0, small)], extra=True)
    record(tmp_path / "apart", "mcap", [(0, 0, small), (1, 500 * MS, small)])
    record(tmp_path / "silent", "mcap", [(0, 0, small)])
    whole = record(tmp_path / "whole", "ros1", [(0, 0, small), (1, 0, small)])
    (tmp_path / "cut.bag").write_bytes(whole.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.mcap").touch()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.mcap").write_bytes(b"\x89MCAP0\r\n" + bytes(50))
    before = sorted(tmp_path.iterdir())
    name, topic0, topic1, *more = arguments
    flags = ["--image0", topic0, "--image1", topic1, "--bundle", str(bundle), *more]
    assert main(["replay", str(tmp_path / name), *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_that_cannot_be_read_is_answered_with_a_status(tmp_path: Path, bundle: Path) -> None:
    """As live: one broken picture costs its pair, not the run."""
    frames = list(pictures(3))
    frames[2] = (0, 100 * MS, np.zeros((1, 1), np.uint8))  # 1 x 1 pixel cannot be matched
    assert replay(record(tmp_path / "bag", "mcap", frames), bundle, tmp_path / "out") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "matches.csv").open()))
    assert [row["status"] for row in rows] == ["OK", "NOT_COMPUTED", "OK"]
    (reason,) = json.loads((tmp_path / "out" / "summary.json").read_text())["not_computed"]
    assert "1x1" in reason
