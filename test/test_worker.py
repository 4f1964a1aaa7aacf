"""The matcher's thread, and the answer it gives to every pair, without ROS."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from trivial_bundle import write_trivial_bundle

from matchanything_ros import Matcher, Status, UserError
from matchanything_ros.answer import answer
from matchanything_ros.pairing import Pairing
from matchanything_ros.worker import Worker


class StandIn:
    closed_by: threading.Thread | None = None

    def close(self) -> None:
        self.closed_by = threading.current_thread()


def test_one_thread_opens_works_and_closes() -> None:
    matcher, threads, pairs, done = StandIn(), [], [], threading.Event()

    def open_matcher() -> Any:
        threads.append(threading.current_thread())
        return matcher

    def work(_: Any, pair: Any) -> None:
        threads.append(threading.current_thread())
        pairs.append((pair.image0, pair.image1))
        done.set()

    worker = Worker(open_matcher, Pairing(), work)
    worker.add(0, 1, "a")
    worker.add(1, 1, "b")
    assert done.wait(10)
    worker.stop()
    assert pairs == [("a", "b")]
    assert {*threads, matcher.closed_by} == {threads[0]} and threads[0] is not threading.current_thread()


def test_what_opening_raises_reaches_the_caller() -> None:
    def open_matcher() -> Any:
        raise UserError("no such bundle")

    with pytest.raises(UserError, match="no such bundle"):
        Worker(open_matcher, Pairing(), lambda matcher, pair: None)


def test_a_pair_that_waits_for_a_nearer_image_is_not_kept_waiting() -> None:
    done = threading.Event()
    worker = Worker(lambda: StandIn(), Pairing(0.05), lambda matcher, pair: done.set())  # type: ignore[arg-type,return-value]
    for stamp in (0, 33, 66):
        worker.add(0, stamp * 1_000_000, None)
    worker.add(1, 100 * 1_000_000, None)  # camera 0 would send a nearer one at 99, and sends no more
    assert done.wait(10)
    worker.stop()


def picture(encoding: str = "mono8", value: int = 9) -> SimpleNamespace:
    data = np.full((32, 40), value, np.uint8).tobytes()
    return SimpleNamespace(height=32, width=40, encoding=encoding, is_bigendian=0, step=40, data=data)


def test_every_pair_has_an_answer(tmp_path: Path) -> None:
    with Matcher(write_trivial_bundle(tmp_path / "trivial.onnx")) as matcher:
        good = answer(matcher, picture(), picture())
        assert good.estimate.status is Status.OK and not good.failure
        assert {"decode", "preprocess", "network", "postprocess", "homography"} == set(good.timings_ms)
        assert good.picture().shape[2] == 3
        bad = answer(matcher, picture(), picture("abc"))
        assert bad.estimate.status is Status.NOT_COMPUTED and bad.matches.size0 == (40, 32)
        assert bad.failure.startswith("image1: The image encoding 'abc'") and not bad.trace
        png = cv2.imencode(".png", np.zeros((32, 40), np.uint8))[1].tobytes()  # a message without a size
        half = answer(matcher, SimpleNamespace(format="png", data=png), SimpleNamespace(format="png", data=b"?"))
        assert half.failure.startswith("image1: ") and (half.matches.size0, half.matches.size1) == ((40, 32), (0, 0))
        strict = answer(matcher, picture(), picture(), min_significance=1000.0)
        assert strict.estimate.status is Status.NOT_SIGNIFICANT


def test_an_engine_that_fails_is_an_answer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Matcher(write_trivial_bundle(tmp_path / "trivial.onnx")) as matcher:

        def lost(inputs: Any) -> Any:
            raise RuntimeError("device lost")

        monkeypatch.setattr(matcher.engine, "run", lost)
        failed = answer(matcher, picture(), picture())
        assert failed.estimate.status is Status.NOT_COMPUTED
        assert "RuntimeError: device lost" in failed.failure and "Traceback" in failed.trace
