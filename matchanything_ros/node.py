"""The ROS 2 node: two image topics in, correspondences and a homography out. A lifecycle node that starts by itself."""

from __future__ import annotations

import functools
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

from matchanything_ros import parameters
from matchanything_ros.answer import answer
from matchanything_ros.diagnostics import Level, Statistics, describe
from matchanything_ros.engines.background_build import BackgroundBuild, plan_is_missing
from matchanything_ros.errors import UserError
from matchanything_ros.homography import Status
from matchanything_ros.inputs import ImageInputs
from matchanything_ros.matcher import Matcher
from matchanything_ros.messages import correspondences, homography, image, stamp_of
from matchanything_ros.msg import Correspondences, Homography
from matchanything_ros.pairing import Pair, Pairing
from matchanything_ros.worker import Worker

DONE, FAILED = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


def transition(method: Callable[..., TransitionCallbackReturn]) -> Callable[..., TransitionCallbackReturn]:
    """Say what a transition raised: rclpy itself goes to on_error without a word."""

    @functools.wraps(method)
    def told(self: MatchNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return method(self, state)
        except Exception as error:
            self._problem = f"{method.__name__} failed ({type(error).__name__}: {error})."
            self.get_logger().error(f"{self._problem} {traceback.format_exc()}")
            return TransitionCallbackReturn.ERROR

    return told


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
        self._inputs: ImageInputs | None = None
        self._publishers_of_results: list[Any] = []
        self._state, self._problem, self._said = "unconfigured", "", ""
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

    @transition
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

    @transition
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._inputs = ImageInputs(self, self._settings, self._on_image)
        self._state = "active"
        self.get_logger().info(f"Matching {' and '.join(self._inputs.topics)}.")
        return super().on_activate(state)

    @transition
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._unsubscribe()
        if self._worker is not None:
            self._worker.clear()
        self._state = "inactive"
        return super().on_deactivate(state)

    @transition
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        for publisher in self._publishers_of_results:
            self.destroy_lifecycle_publisher(publisher)
        self._publishers_of_results = []
        self._state = "unconfigured"
        return DONE

    @transition
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.on_cleanup(state)
        self._state = "finalized"
        return DONE

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
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
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None

    # Callbacks of the executor's thread

    def _on_image(self, camera: int, message: Any) -> None:
        if self._worker is not None:
            self._worker.add(camera, stamp_of(message.header), (message, time.perf_counter()))

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
        """Publish diagnostics; a warning also goes to the log, once."""
        report = describe(self._state, self._problem, self._worker, self._statistics, self._inputs, self._build)
        if report.level == Level.WARN and report.sentence != self._said:
            self.get_logger().warning(report.sentence)
        self._said = report.sentence
        status = DiagnosticStatus(
            level=bytes([report.level]),
            name=f"{self.get_fully_qualified_name()}: matching",
            hardware_id=report.matcher,
            message=report.sentence,
            values=[KeyValue(key=key, value=value) for key, value in report.values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    # The worker's thread

    def _work(self, matcher: Matcher, pair: Pair) -> None:
        try:
            self._use_new_plan(matcher)
            self._answer(matcher, pair)
        except Exception as error:  # a defect must not end the thread: the node would seem alive
            self._statistics.record({}, Status.NOT_COMPUTED, f"A pair is lost ({type(error).__name__}: {error}).")
            self.get_logger().error(traceback.format_exc(), throttle_duration_sec=5.0)

    def _answer(self, matcher: Matcher, pair: Pair) -> None:
        """Answer a pair: what is published does not depend on what went wrong, only its status does."""
        p, manifest = self._settings, matcher.bundle.manifest
        (message0, arrival0), (message1, arrival1) = pair.image0, pair.image1
        arrival, start = max(arrival0, arrival1), time.perf_counter()
        matcher.score_threshold = manifest.score_threshold if p.score_threshold < 0 else p.score_threshold
        matcher.max_matches = p.max_matches or manifest.max_matches
        result = answer(matcher, message0, message1, p.stretch, **p.estimate_options)
        if result.failure:
            self.get_logger().error(result.failure, throttle_duration_sec=5.0)
            self.get_logger().debug(result.trace)
        answered = time.perf_counter()
        content = (message0.header, message1.header, result.matches, result.estimate, matcher.bundle)
        self._points.publish(correspondences(Correspondences, *content))
        self._homography.publish(homography(Homography, *content))
        done = time.perf_counter()
        seconds = {"wait": start - arrival, "publish": done - answered, "total": done - arrival}
        if not result.failure and self._picture.get_subscription_count() > 0:
            self._picture.publish(image(Image, message0.header, result.picture()))
            seconds["picture"] = time.perf_counter() - done
        timings = result.timings_ms | {stage: 1e3 * value for stage, value in seconds.items()}
        self._statistics.record(timings, result.estimate.status, result.failure)

    def _use_new_plan(self, matcher: Matcher) -> None:
        if self._build is not None and self._build.succeeded:
            self._build = None
            matcher.reopen()
            self.get_logger().info(f"The TensorRT plan is built; {matcher.engine.backend} matches from now on.")


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM. Returns the process's exit status."""
    stop: list[int] = []
    # Our own handlers: Ctrl-C in a terminal and `ros2 launch` deliver SIGINT twice, and a second KeyboardInterrupt in
    # the midst of cleaning up would end in a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # its type is private to rclpy: ROS arguments or a parameters file that it cannot read
        print(f"match_node: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
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
