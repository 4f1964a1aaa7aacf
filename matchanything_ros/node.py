"""The ROS 2 node: two image topics in, correspondences and a homography out. A lifecycle node that starts by itself."""

from __future__ import annotations

import array
import signal
import sys
import time
import traceback
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSHistoryPolicy, QoSProfile, QoSReliabilityPolicy, qos_policy_name_from_kind
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image

from matchanything_ros import parameters
from matchanything_ros.diagnostics import Statistics
from matchanything_ros.engines.background_build import BackgroundBuild, plan_is_missing
from matchanything_ros.errors import UserError
from matchanything_ros.homography import HomographyEstimate, estimate_homography
from matchanything_ros.images import to_array
from matchanything_ros.matcher import Matcher, Matches
from matchanything_ros.messages import correspondences, homography, not_computed, stamp_of
from matchanything_ros.msg import Correspondences, Homography
from matchanything_ros.pairing import Pair, Pairing
from matchanything_ros.viz import draw_matches
from matchanything_ros.worker import Worker

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # ROS 2 Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

DONE, FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class MatchNode(LifecycleNode):
    """Callbacks only put images into the worker's pairing; the worker's thread matches and publishes (`_work`)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("match_node", **kwargs)
        parameters.declare(self)
        for sentence in parameters.misspelt(self):
            self.get_logger().warning(sentence)
        self._settings = parameters.read(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._worker: Worker | None = None
        self._build: BackgroundBuild | None = None
        self._statistics = Statistics()
        self._subscriptions_of_images: list[Any] = []
        self._publishers_of_results: list[Any] = []
        self._state, self._problem, self._qos_problem = "unconfigured", "", ["", ""]
        if (service := getattr(self, "_service_change_state", None)) is not None:
            change_state = service.callback
            service.callback = lambda request, response: self._guard(change_state, request, response)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Reports go on while the simulated clock stands still.
        self.create_timer(1.0, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def autostart(self) -> None:
        """Configure and activate, if the parameter says so. On failure the node stays, unconfigured, and reports it."""
        if self._settings.autostart and self.trigger_configure() == DONE:
            self.trigger_activate()

    def close(self) -> None:
        """Stop the worker; the node publishes no more."""
        self._unsubscribe()
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        if self._build is not None:
            self._build.close()
            self._build = None

    # Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._settings = parameters.read(self)
        p = self._settings
        self._statistics = Statistics()
        builds = p.build_if_missing and p.backend in ("auto", "tensorrt")
        try:
            self._worker = Worker(
                lambda: Matcher(p.bundle or None, "auto" if builds else p.backend),
                Pairing(p.approximate_sync_tolerance_seconds, not p.approximate_sync, p.queue_size),
                self._work,
            )
        except UserError as error:
            return self._refuse(str(error))
        except Exception as error:
            self.get_logger().debug(traceback.format_exc())
            return self._refuse(f"The matcher cannot be opened ({type(error).__name__}: {error}).")
        self._points = self.create_lifecycle_publisher(Correspondences, "~/correspondences", 10)
        self._homography = self.create_lifecycle_publisher(Homography, "~/homography", 10)
        self._picture = self.create_lifecycle_publisher(Image, "~/matches/image", 2)
        self._publishers_of_results = [self._points, self._homography, self._picture]
        self._state, self._problem = "inactive", ""
        matcher = self._worker.matcher
        assert matcher is not None
        self.get_logger().info(f"{matcher.bundle.manifest.name} ({matcher.bundle.hash}) on {matcher.engine.backend}")
        if builds and matcher.engine.backend != "tensorrt" and plan_is_missing(matcher.bundle):
            self._build = BackgroundBuild(matcher.bundle)
            self.get_logger().info(self._build.status())
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        compressed = self._settings.image_transport == "compressed"
        reliable = self._settings.image_qos == "reliable"
        for camera in (0, 1):
            topic = self.resolve_topic_name(f"image{camera}")
            if compressed and not topic.endswith("/compressed"):
                topic += "/compressed"
            subscription = self.create_subscription(
                CompressedImage if compressed else Image,
                topic,
                lambda message, camera=camera: self._on_image(camera, message),
                QoSProfile(
                    history=QoSHistoryPolicy.KEEP_LAST,
                    depth=self._settings.queue_size,
                    reliability=QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT,
                ),
                event_callbacks=SubscriptionEventCallbacks(
                    incompatible_qos=lambda event, camera=camera: self._on_incompatible_qos(camera, event)
                ),
                qos_overriding_options=parameters.qos_overrides(self, topic),
            )
            self._subscriptions_of_images.append(subscription)
        self._state = "active"
        topics = " and ".join(subscription.topic_name for subscription in self._subscriptions_of_images)
        self.get_logger().info(f"Matching {topics}.")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unsubscribe()
        if self._worker is not None:
            self._worker.clear()
        self._state = "inactive"
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        for publisher in self._publishers_of_results:
            self.destroy_lifecycle_publisher(publisher)
        self._publishers_of_results = []
        self._state = "unconfigured"
        return DONE

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.on_cleanup(state)
        self._state = "finalized"
        return DONE

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._problem = f"A transition from {state.label} failed: see the log, then configure again."
        self.get_logger().error(self._problem)
        return self.on_cleanup(state)

    def _guard(self, change_state: Any, request: Any, response: Any) -> Any:
        """rclpy raises, which would end the process, when asked for a transition that this state does not have."""
        try:
            return change_state(request, response)
        except Exception as error:
            wanted = request.transition.label or request.transition.id
            self.get_logger().error(f"There is no transition {wanted} from state {self._state} ({error}).")
            response.success = False
            return response

    def _refuse(self, sentence: str) -> TransitionCallbackReturn:
        self._problem = sentence
        self.get_logger().error(sentence)
        return FAILED

    def _unsubscribe(self) -> None:
        for subscription in self._subscriptions_of_images:
            self.destroy_subscription(subscription)
        self._subscriptions_of_images, self._qos_problem = [], ["", ""]

    # Callbacks of the executor's thread

    def _on_image(self, camera: int, message: Any) -> None:
        if self._worker is not None:
            self._worker.add(camera, stamp_of(message.header), (message, time.perf_counter()))

    def _on_incompatible_qos(self, camera: int, event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        self._qos_problem[camera] = f" (a publisher's QoS does not fit, policy {policy}: set image_qos to sensor_data)"
        self.get_logger().warning(f"No images from a publisher of image{camera}{self._qos_problem[camera]}.")

    def _on_set_parameters(self, changes: list[Any]) -> SetParametersResult:
        ours = {change.name: change.value for change in changes if change.name in parameters.FIELDS}
        for name, value in ours.items():
            if (sentence := parameters.problem(name, value)) is not None:
                return SetParametersResult(successful=False, reason=sentence)
            if self._worker is not None and not parameters.FIELDS[name].metadata["run_time"]:
                reason = f"{name} is read when the node is configured: deactivate it and clean it up first."
                return SetParametersResult(successful=False, reason=reason)
        self._settings = parameters.replaced(self._settings, ours)
        return SetParametersResult(successful=True)

    def _report(self) -> None:
        status = DiagnosticStatus(name=f"{self.get_fully_qualified_name()}: matching", level=DiagnosticStatus.OK)
        status.message = self._state
        values = {"state": self._state}
        worker = self._worker
        if worker is not None and worker.matcher is not None:
            bundle = worker.matcher.bundle
            status.hardware_id = bundle.manifest.name
            values |= {"bundle": str(bundle.onnx), "bundle sha256": bundle.manifest.onnx_sha256}
            values |= {"backend": worker.matcher.engine.backend}
            with worker.lock:
                values |= self._statistics.values(worker.pairing)
                received = list(worker.pairing.received)
            rates = self._statistics.rates(time.monotonic(), received)
            if self._state == "active" and rates is not None:
                values |= {
                    f"{name} rate [Hz]": f"{rate:.2f}"
                    for name, rate in zip(("image0", "image1", "pairs"), rates, strict=True)
                }
                status.message = f"{rates[2]:.1f} pairs a second"
                if warning := self._warning(rates):
                    status.level, status.message = DiagnosticStatus.WARN, warning
        if (build := self._build) is not None:
            values |= {"TensorRT plan": build.status()}
            if build.failed:
                status.level, status.message = DiagnosticStatus.WARN, build.status()
        if failure := self._problem or self._statistics.failure:
            status.level, status.message = DiagnosticStatus.ERROR, failure
        status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _warning(self, rates: tuple[float, float, float]) -> str:
        silent = [camera for camera in (0, 1) if rates[camera] == 0]
        if silent:
            names = [self._subscriptions_of_images[camera].topic_name + self._qos_problem[camera] for camera in silent]
            return f"No images on {' and '.join(names)}."
        if rates[2] == 0:
            return "Images come, but no pair was answered: compare their stamps with the tolerance."
        return ""

    # The worker's thread

    def _work(self, matcher: Matcher, pair: Pair) -> None:
        p = self._settings
        (message0, arrival0), (message1, arrival1) = pair.image0, pair.image1
        start = time.perf_counter()
        timings, failure, images = {"wait": 1e3 * (start - max(arrival0, arrival1))}, "", []
        try:
            if self._build is not None and self._build.succeeded:
                self._build = None
                matcher.reopen()
                self.get_logger().info(f"The TensorRT plan is built; {matcher.engine.backend} matches from now on.")
            for camera, message in enumerate((message0, message1)):
                try:
                    images.append(to_array(message, p.stretch))
                except UserError as error:
                    raise UserError(f"image{camera}: {error}") from error
            timings["decode"] = 1e3 * (time.perf_counter() - start)
            manifest = matcher.bundle.manifest
            matcher.score_threshold = manifest.score_threshold if p.score_threshold < 0 else p.score_threshold
            matcher.max_matches = p.max_matches or manifest.max_matches
            matches = matcher.match(images[0], images[1])
            timings |= matches.timings_ms
            matched = time.perf_counter()
            estimate = estimate_homography(
                matches.keypoints0,
                matches.keypoints1,
                matches.size0,
                matches.size1,
                threshold_px=p.ransac_threshold,
                min_inlier_ratio=p.min_inlier_ratio,
                min_significance=p.min_significance,
            )
            timings["homography"] = 1e3 * (time.perf_counter() - matched)
        except Exception as error:
            failure = str(error)
            if not isinstance(error, UserError):
                failure = f"Matching failed ({type(error).__name__}: {error})."
                self.get_logger().debug(traceback.format_exc())
            self.get_logger().error(failure, throttle_duration_sec=5.0)
            sizes = [(getattr(m, "width", 0), getattr(m, "height", 0)) for m in (message0, message1)]
            matches, estimate = not_computed(sizes[0], sizes[1])
        answered = time.perf_counter()
        content = (message0.header, message1.header, matches, estimate, matcher.bundle)
        self._points.publish(correspondences(Correspondences, *content))
        self._homography.publish(homography(Homography, *content))
        done = time.perf_counter()
        timings |= {"publish": 1e3 * (done - answered), "total": 1e3 * (done - max(arrival0, arrival1))}
        if not failure and self._picture.get_subscription_count() > 0:
            self._publish_picture(message0.header, images, matches, estimate)
            timings["picture"] = 1e3 * (time.perf_counter() - done)
        self._statistics.record(timings, estimate.status, failure)

    def _publish_picture(self, header: Any, images: list[Any], matches: Matches, estimate: HomographyEstimate) -> None:
        caption = f"{estimate.status.name}  {estimate.num_inliers}/{estimate.num_matches} inliers"
        picture = draw_matches(
            images[0],
            images[1],
            matches.keypoints0,
            matches.keypoints1,
            inliers=estimate.inliers,
            homography=estimate.matrix,
            caption=caption,
        )
        height, width = picture.shape[:2]
        self._picture.publish(
            Image(
                header=header,
                height=height,
                width=width,
                encoding="rgb8",
                step=3 * width,
                data=array.array("B", picture.tobytes()),
            )
        )


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM. Returns the process's exit status."""
    stop: list[int] = []
    # Our own handlers: Ctrl-C in a terminal and `ros2 launch` deliver SIGINT twice, and a second KeyboardInterrupt in
    # the midst of cleaning up would end in a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    node: MatchNode | None = None
    try:
        node = MatchNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.autostart()
        while rclpy.ok() and not stop:
            executor.spin_once(timeout_sec=0.2)
    except UserError as error:
        rclpy.logging.get_logger("match_node").fatal(str(error))
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # while Python ends, it would put the fatal defaults back
            signal.signal(number, signal.SIG_IGN)
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
