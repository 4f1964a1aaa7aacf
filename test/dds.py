"""The node in its own process and a client in the test's, over real DDS. Nothing waits for a fixed time.

Every pair of node and client has a ROS domain of its own, so that tests do not hear each other.
"""

from __future__ import annotations

import array
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchanything_ros.messages import stamp_of

try:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState
    from rcl_interfaces.srv import SetParametersAtomically
    from rclpy.context import Context
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter
    from rclpy.qos import QoSProfile, QoSReliabilityPolicy
    from sensor_msgs.msg import CompressedImage, Image

    from matchanything_ros.msg import Correspondences, Homography
except ImportError as missing:
    pytest.skip(
        f"needs ROS 2 ({missing}): pip install '.[ros]', or source a ROS installation and build with colcon",
        allow_module_level=True,
    )

ROOT = Path(__file__).parents[1]
TIMEOUT = 60.0  # seconds for anything; only a defect or a crawling machine takes as long
_numbers = itertools.count()

os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"  # before the first message is made: setters check types and ranges

# Ours is the publisher's process: without this, best-effort images above 512 kB are mostly lost.
PROFILE = str(ROOT / "config" / "fastdds_large_images.xml")
os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", PROFILE)
os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", PROFILE)


def new_domain() -> int:
    """A ROS domain that hardly anybody else on this machine uses now; below 102 lie no ephemeral ports."""
    return 1 + (os.getpid() * 13 + 29 * next(_numbers)) % 100


class NodeProcess:
    """match_node in a process. parameters: given on its command line; remap: "image0:=/a" and the like."""

    def __init__(self, domain: int, log: Path, parameters: dict[str, object] | None = None, *remap: str) -> None:
        words = ["--ros-args"]
        for name, value in (parameters or {}).items():
            words += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        for rule in remap:
            words += ["-r", rule]
        self._log = log
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "match_node"), *words],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str) -> None:
        end = time.monotonic() + TIMEOUT
        while text not in self.log:
            assert time.monotonic() < end and self.process.poll() is None, f"no '{text}' in:\n{self.log}"
            time.sleep(0.02)

    def stop(self, *signals: int) -> int:
        """Send signals (SIGTERM if none) and return the exit status."""
        for number in signals or (signal.SIGTERM,):
            if self.process.poll() is None:
                self.process.send_signal(number)
        return self.process.wait(TIMEOUT)


class Client:
    """Publishes images to a node and collects what it answers."""

    def __init__(
        self,
        domain: int,
        node: NodeProcess,
        name: str = "/match_node",
        topics: tuple[str, str] = ("/image0", "/image1"),
        reliable: bool = True,
        image_type: Any = Image,
    ) -> None:
        self.process, self._name = node, name
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain)
        self.node = rclpy.create_node("test_client", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.image_type = image_type
        self.images = [self.publisher(topic, reliable) for topic in topics]
        self.points: list[Correspondences] = []
        self.homographies: list[Homography] = []
        self.pictures: list[Image] = []
        self.diagnostics: list[DiagnosticArray] = []
        listen = self.node.create_subscription
        self.results = [
            listen(Correspondences, f"{name}/correspondences", self.points.append, 100),
            listen(Homography, f"{name}/homography", self.homographies.append, 100),
        ]
        listen(DiagnosticArray, "/diagnostics", self.diagnostics.append, 10)
        self._services = {
            kind: self.node.create_client(kind, f"{name}/{service}")
            for kind, service in (
                (ChangeState, "change_state"),
                (GetState, "get_state"),
                (SetParametersAtomically, "set_parameters_atomically"),
            )
        }

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def publisher(self, topic: str, reliable: bool) -> Any:
        kind = QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT
        return self.node.create_publisher(self.image_type, topic, QoSProfile(depth=100, reliability=kind))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Spin until the condition is true, and return its value."""
        end = time.monotonic() + TIMEOUT
        while not (value := condition()):
            assert self.process.process.poll() is None, f"the node died before: {what}\n{self.process.log}"
            assert time.monotonic() < end, f"never: {what}\n{self.process.log}"
            self._executor.spin_once(timeout_sec=0.02)
        return value

    def connected(self, start: float = 0.0, image: Any = None) -> None:
        """Wait until a pair is answered; stamps from `start` on (seconds; 20 s are ours), or 0.

        Each side learns of the other on its own: only an answer shows that both know both.
        """
        self.until(lambda: all(p.get_subscription_count() for p in self.images), "the node subscribes to both cameras")
        image = np.full((16, 16), 128, np.uint8) if image is None else image
        patience = 0.2
        for stamp in np.arange(start, start + 20, 0.2):
            nanoseconds = round(stamp * 1e9)
            self.send(0, stamp, image)
            self.send(1, stamp, image)
            end = time.monotonic() + patience
            self.until(lambda end=end, ns=nanoseconds: time.monotonic() > end or self._answered(ns), "a first answer")
            if self._answered(nanoseconds):
                self.points.clear()
                self.homographies.clear()
                return
            patience = min(patience * 1.6, TIMEOUT / 2)  # a slow network on a busy machine answers late
        raise AssertionError(f"no pair is answered\n{self.process.log}")

    def call(self, kind: Any, request: Any) -> Any:
        service = self._services[kind]
        self.until(service.service_is_ready, f"service {service.srv_name}")
        future = service.call_async(request)
        self.until(future.done, f"an answer of {service.srv_name}")
        return future.result()

    def transition(self, *names: str) -> list[bool]:
        """Ask for transitions one after the other ("configure", "activate", ...); whether each succeeded."""
        ids = {name: getattr(Transition, f"TRANSITION_{name.upper()}") for name in names}
        requests = [ChangeState.Request(transition=Transition(id=ids[name])) for name in names]
        return [self.call(ChangeState, request).success for request in requests]

    def state(self) -> str:
        return str(self.call(GetState, GetState.Request()).current_state.label)

    def set(self, **values: object) -> str:
        """Set parameters together; returns why they were refused, or an empty string."""
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        result = self.call(SetParametersAtomically, SetParametersAtomically.Request(parameters=messages)).result
        return "" if result.successful else result.reason or "refused without a reason"

    def status(self, condition: Callable[[Any, dict[str, str]], Any] = lambda status, values: True) -> Any:
        """The next diagnostic status, with its values as a dictionary, for which the condition holds."""
        self.diagnostics.clear()
        seen: list[Any] = []

        def look() -> Any:
            while self.diagnostics:
                message = self.diagnostics.pop(0)
                for status in message.status:
                    values = {entry.key: entry.value for entry in status.values}
                    seen.append((status.level, status.message, values))
                    if condition(status, values):
                        return message, status, values
            return None

        try:
            return self.until(look, "the expected diagnostics")
        except AssertionError as error:
            raise AssertionError(f"{error}\nlast diagnostics: {seen[-1:]}") from None

    def send(self, camera: int, stamp: float, image: np.ndarray | Any, encoding: str = "") -> None:
        """Publish an array (mono8, rgb8 or as `encoding` says) or a ready message with a stamp in seconds."""
        message = image if not isinstance(image, np.ndarray) else image_message(image, encoding)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(stamp * 1e9), 10**9)
        message.header.frame_id = f"camera{camera}"
        self.images[camera].publish(message)

    def match(self, stamp: float, image0: Any, image1: Any) -> tuple[Correspondences, Homography]:
        """Publish a pair and return its answer, found by its stamp."""
        self.send(0, stamp, image0)
        self.send(1, stamp, image1)
        return self.answer(stamp)

    def answer(self, stamp: float) -> tuple[Correspondences, Homography]:
        """The answer to the pair whose image 0 has this stamp."""

        return self.until(lambda: self._answered(round(stamp * 1e9)), f"an answer to the pair of {stamp} s")

    def _answered(self, nanoseconds: int) -> Any:
        for points, homography in itertools.product(self.points, self.homographies):
            if stamp_of(points.header0) == stamp_of(homography.header0) == nanoseconds:
                return points, homography
        return None


def answer_of_a_node(
    settings: dict[str, object], log: Path, image0: np.ndarray, image1: np.ndarray
) -> tuple[Correspondences, Homography]:
    """What a node with these parameters, started for it and stopped in order, answers to one pair."""
    domain = new_domain()
    settings = {"backend": "onnxruntime-cpu", "image_qos": "reliable", **settings}
    client = Client(domain, NodeProcess(domain, log, settings))
    try:
        client.connected()
        return client.match(100.0, image0, image1)
    finally:
        client.close()
        status = client.process.stop()
        assert status == 0 and "Traceback" not in client.process.log, client.process.log


def image_message(pixels: np.ndarray, encoding: str = "") -> Image:
    height, width = pixels.shape[:2]
    return Image(
        height=height,
        width=width,
        encoding=encoding or ("mono8" if pixels.ndim == 2 else "rgb8"),
        step=pixels.nbytes // height,
        data=array.array("B", np.ascontiguousarray(pixels).tobytes()),
    )


def compressed_message(data: bytes, format_: str = "jpeg") -> CompressedImage:
    return CompressedImage(format=format_, data=array.array("B", data))
