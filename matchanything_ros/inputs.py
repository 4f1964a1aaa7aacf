"""The two image subscriptions: their quality of service, and why they may be silent.

Best effort hears every publisher, but with the default settings of Fast DDS it loses most images above some 300 kB;
reliable loses none, but hears no best-effort publisher. So `auto` does as the publishers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.qos import QoSHistoryPolicy, QoSProfile, QoSReliabilityPolicy, qos_policy_name_from_kind
from sensor_msgs.msg import CompressedImage, Image

from matchanything_ros.parameters import Parameters, qos_overrides

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # ROS 2 Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError


class ImageInputs:
    """Subscribes to both cameras on a node; on_image(camera, message) is called by the node's executor.

    lost: messages of each camera that the middleware knows it lost on the way.
    """

    def __init__(self, node: Any, settings: Parameters, on_image: Callable[[int, Any], None]) -> None:
        self._node = node
        self._compressed = settings.image_transport == "compressed"
        self._reliable = [settings.image_qos == "reliable"] * 2
        self._depth, self._on_image = settings.queue_size, on_image
        self.lost = [0, 0]
        self._misfit = ["", ""]
        self._names: list[str] = []
        for camera in (0, 1):
            topic = node.resolve_topic_name(f"image{camera}")
            if self._compressed and not topic.endswith("/compressed"):
                topic += "/compressed"
            self._names.append(topic)
        self._timer: Any = None
        self._subscriptions: list[Any] = []
        try:
            for camera in (0, 1):
                self._subscriptions.append(self._subscribe(camera))
        except Exception:  # such as a QoS override that does not exist: leave nothing behind
            self.close()
            raise
        self.topics = [str(subscription.topic_name) for subscription in self._subscriptions]
        if settings.image_qos == "auto":
            self._follow_publishers()
            steady = Clock(clock_type=ClockType.STEADY_TIME)
            self._timer = node.create_timer(0.1, self._follow_publishers, clock=steady)

    def close(self) -> None:
        """Unsubscribe."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def silence(self, camera: int) -> str:
        """A sentence for a camera from which nothing comes, with what can be known of the reason."""
        topic, wanted = self.topics[camera], "CompressedImage" if self._compressed else "Image"
        publishers = self._node.get_publishers_info_by_topic(topic)
        others = {entry.topic_type for entry in publishers} - {f"sensor_msgs/msg/{wanted}"}
        reason = "its publisher is silent"
        if not publishers:
            reason = "nobody publishes it"
        elif others:
            reason = f"it is a {' and '.join(sorted(others))}: choose the topic, or the parameter image_transport"
        elif self._misfit[camera]:
            reason = f"its publisher's QoS does not fit ({self._misfit[camera]}): set image_qos to sensor_data"
        elif not self._reliable[camera]:
            reason += ", or best effort loses its images: let it publish reliably, or see fastdds_large_images.xml"
        return f"No images on {topic}: {reason}."

    def _follow_publishers(self) -> None:
        """Subscribe again where all publishers have become reliable, or one of them best effort."""
        for camera, topic in enumerate(self.topics):
            kinds = {entry.qos_profile.reliability for entry in self._node.get_publishers_info_by_topic(topic)}
            if kinds and (kinds == {QoSReliabilityPolicy.RELIABLE}) != self._reliable[camera]:
                self._reliable[camera] = not self._reliable[camera]
                self._node.destroy_subscription(self._subscriptions[camera])
                self._subscriptions[camera] = self._subscribe(camera)

    def _subscribe(self, camera: int) -> Any:
        reliability = QoSReliabilityPolicy.RELIABLE if self._reliable[camera] else QoSReliabilityPolicy.BEST_EFFORT
        topic = self._names[camera]
        self._misfit[camera] = ""  # whatever did not fit the subscription before

        def subscribe(events: Any) -> Any:
            return self._node.create_subscription(
                CompressedImage if self._compressed else Image,
                topic,
                lambda message: self._on_image(camera, message),
                QoSProfile(history=QoSHistoryPolicy.KEEP_LAST, depth=self._depth, reliability=reliability),
                event_callbacks=events,
                qos_overriding_options=qos_overrides(self._node, topic),
            )

        try:
            return subscribe(
                SubscriptionEventCallbacks(
                    incompatible_qos=lambda event: self._on_misfit(camera, event),
                    message_lost=lambda event: self._on_lost(camera, event),
                )
            )
        except UnsupportedEventTypeError:  # some middleware reports neither
            return subscribe(None)

    def _on_misfit(self, camera: int, event: Any) -> None:
        self._misfit[camera] = qos_policy_name_from_kind(event.last_policy_kind)

    def _on_lost(self, camera: int, event: Any) -> None:
        self.lost[camera] += event.total_count_change
