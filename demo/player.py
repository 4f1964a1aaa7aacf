"""The camera side of the demo: plays a recording of two cameras into a running node and keeps what the node answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import Image

from matchanything_ros.errors import UserError
from matchanything_ros.messages import stamp_of
from matchanything_ros.msg import Correspondences, Homography

TYPES = {
    Correspondences: "matchanything_ros/msg/Correspondences",
    Homography: "matchanything_ros/msg/Homography",
    DiagnosticArray: "diagnostic_msgs/msg/DiagnosticArray",
}
RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)


@dataclass
class Recording:
    """What came from the node. messages: (topic, type, time of receipt [ns], serialised), in order of arrival."""

    messages: list[tuple[str, type, int, bytes]] = field(default_factory=list)
    homographies: list[Homography] = field(default_factory=list)
    pictures: list[Image] = field(default_factory=list)
    diagnostics: DiagnosticArray | None = None
    latencies_ms: dict[int, float] = field(
        default_factory=dict
    )  # stamp of image 0 [ns] -> second image out to answer in


class Player(Node):
    """Publishes the images of a recording and subscribes to all outputs of the node called `node`."""

    def __init__(self, topics: tuple[str, str], node: str) -> None:
        super().__init__("demo_player")
        self.recording = Recording()
        self._sent: dict[int, float] = {}
        self._cameras = {topic: self.create_publisher(Image, topic, RELIABLE) for topic in topics}
        self._topics = [f"/{node}/correspondences", f"/{node}/homography", f"/{node}/matches/image", "/diagnostics"]
        types = (Correspondences, Homography, Image, DiagnosticArray)
        for topic, kind in zip(self._topics, types, strict=True):
            self.create_subscription(
                kind, topic, lambda raw, t=topic, k=kind: self._keep(t, k, raw), RELIABLE, raw=True
            )
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)

    def _keep(self, topic: str, kind: type, raw: bytes) -> None:
        now, record = time.perf_counter(), self.recording
        message = deserialize_message(raw, kind)
        if kind is Image:
            record.pictures.append(message)  # kept as pictures, not in the mcap: 50 MB of drawings help nobody there
            return
        record.messages.append((topic, kind, time.time_ns(), raw))
        if kind is DiagnosticArray:
            record.diagnostics = message
        elif kind is Homography:
            record.homographies.append(message)
            stamp = stamp_of(message.header0)
            if stamp in self._sent:
                record.latencies_ms[stamp] = 1e3 * (now - self._sent[stamp])

    def spin_for(self, seconds: float) -> None:
        """Handle what arrives during this time."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_for_node(self, ended: Callable[[], int | None], timeout: float = 60.0) -> None:
        """Until the node listens to both cameras and its outputs are there. `ended` is None as long as it runs."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            listening = all(camera.get_subscription_count() > 0 for camera in self._cameras.values())
            if listening and all(self.count_publishers(topic) > 0 for topic in self._topics[:2]):
                self.spin_for(0.5)  # let the other direction of the discovery finish as well
                return
            if ended() is not None:
                raise UserError("The node ended before it was ready: its log is above.")
            self.spin_for(0.1)
        raise UserError(f"The node did not listen to {' and '.join(self._cameras)} within {timeout:.0f} s.")

    def play(self, bag: Path) -> int:
        """Publish the recording with its own timing. Returns the number of image pairs."""
        with AnyReader([bag]) as reader:
            start, first, count = time.perf_counter(), reader.start_time, 0
            for connection, stamp, raw in reader.messages():
                self.spin_for(max(0.0, start + (stamp - first) * 1e-9 - time.perf_counter()))
                camera = list(self._cameras).index(connection.topic)
                if camera == 0:
                    image_stamp, count = stamp, count + 1
                else:
                    self._sent[image_stamp] = time.perf_counter()
                self._cameras[connection.topic].publish(bytes(raw))
        return count

    def wait_for_last_answer(self, timeout: float = 60.0) -> None:
        """Until the last pair was answered: a busy node skips pairs, but never the newest."""
        end, last = time.monotonic() + timeout, max(self._sent)
        while last not in self.recording.latencies_ms and time.monotonic() < end:
            self.spin_for(0.1)
        self.spin_for(1.2)  # the last diagnostics (1 Hz) and the last picture

    def close(self) -> None:
        self._executor.shutdown()
        self.destroy_node()
        rclpy.try_shutdown()
