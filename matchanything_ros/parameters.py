"""The node's parameters: one dataclass holds names, defaults, ranges, descriptions; the node declares it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matchanything_ros.engines import BACKENDS
from matchanything_ros.errors import UserError
from matchanything_ros.homography import MIN_SIGNIFICANCE
from matchanything_ros.images import Stretch


def _option(
    default: Any,
    description: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    run_time: bool = False,
) -> Any:
    metadata = {"description": description, "choices": choices, "low": low, "high": high, "run_time": run_time}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Parameters:
    """What the node can be told. Those with run_time may change while it works, the others while it is unconfigured."""

    autostart: bool = _option(True, "Configure and activate on start; otherwise wait for the lifecycle services.")
    bundle: str = _option("", "Path of the bundle's .onnx file, or the name of a packaged one; empty: the default one.")
    backend: str = _option("auto", "What runs the network.", choices=BACKENDS)
    build_if_missing: bool = _option(
        False, "Without a fitting TensorRT plan, build one in the background; meanwhile ONNX Runtime matches."
    )
    image_transport: str = _option(
        "raw", "raw: sensor_msgs/Image; compressed: CompressedImage on <topic>/compressed.", ("raw", "compressed")
    )
    image_qos: str = _option(
        "auto",
        "Reliability of the image subscriptions. sensor_data: best effort; reliable: hears no best-effort camera; "
        "auto: sensor_data, until all publishers of the topic are reliable.",
        choices=("auto", "sensor_data", "reliable"),
    )
    approximate_sync: bool = _option(True, "Pair the images nearest in time; false: only equal stamps.")
    approximate_sync_tolerance_seconds: float = _option(
        0.05, "Largest difference of the stamps of a pair [s].", low=0.0, high=10.0
    )
    queue_size: int = _option(
        10, "Images of each camera that wait for the other, and subscription depth.", low=1, high=1000
    )
    score_threshold: float = _option(
        -1.0, "Matches below this score are dropped, 0 to 1; -1: the bundle's own.", low=-1.0, high=1.0, run_time=True
    )
    max_matches: int = _option(
        0, "The best so many matches are kept; 0: all the bundle gives.", low=0, high=1_000_000, run_time=True
    )
    ransac_threshold: float = _option(
        3.0, "Largest reprojection error of an inlier [pixels of image 1].", low=0.1, high=100.0, run_time=True
    )
    min_inlier_ratio: float = _option(
        0.0, "Homographies with a smaller share of inliers are refused.", low=0.0, high=1.0, run_time=True
    )
    min_significance: float = _option(
        MIN_SIGNIFICANCE,
        "Homographies are refused below this: -log10 of the false alarms expected from evenly spread keypoints.",
        low=-1000.0,
        high=1000.0,
        run_time=True,
    )
    intensity_percentiles: tuple[float, float] = _option(
        (0.5, 99.5),
        "16-bit and float images: these percentiles become black and white.",
        low=0,
        high=100,
        run_time=True,
    )
    intensity_range: tuple[float, float] = _option(
        (0.0, 0.0), "16-bit and float images: these values become black and white; equal: percentiles.", run_time=True
    )

    @property
    def stretch(self) -> Stretch:
        """How images of 16 bits and floating point become 8 bits."""
        low, high = self.intensity_range
        return Stretch(self.intensity_percentiles, (low, high) if low < high else None)

    @property
    def estimate_options(self) -> dict[str, float]:
        """Arguments of estimate_homography."""
        return {
            "threshold_px": self.ransac_threshold,
            "min_inlier_ratio": self.min_inlier_ratio,
            "min_significance": self.min_significance,
        }


FIELDS = {entry.name: entry for entry in dataclasses.fields(Parameters)}


def problem(name: str, value: Any) -> str | None:
    """Why a value of the right type is wrong for a parameter, as one sentence; None if it is fine or not ours."""
    if name not in FIELDS:
        return None
    rule = FIELDS[name].metadata
    low, high = rule["low"], rule["high"]
    if rule["choices"] and value not in rule["choices"]:
        return f"{name} is '{value}': use one of {', '.join(rule['choices'])}."
    numbers: list[Any] = list(value) if not isinstance(value, (str, bool, int, float)) else [value]
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            return f"{name} is {number}: give a finite number."
        if low is not None and not low <= number <= high:
            return f"{name} is {number}: give a value from {low:g} to {high:g}."
    if name.startswith("intensity_") and (len(numbers) != 2 or numbers[0] > numbers[1]):
        return f"{name} is {numbers}: give two values, the lower one first."
    if name == "intensity_percentiles" and numbers[0] == numbers[1]:
        return f"{name} is {numbers}: give two different values."
    return None


def declare(node: Any) -> None:
    """Declare all parameters on a ROS node. Raises UserError if a value given at start is wrong."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
    from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException

    defaults = Parameters()
    for name, entry in FIELDS.items():
        default, rule = getattr(defaults, name), entry.metadata
        descriptor = ParameterDescriptor(description=rule["description"])
        if rule["choices"]:
            descriptor.additional_constraints = "one of " + ", ".join(rule["choices"])
        if isinstance(default, tuple):
            default = list(default)
            descriptor.additional_constraints = "two values, the lower first"
        elif isinstance(default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=rule["low"], to_value=rule["high"])]
        elif rule["low"] is not None:
            descriptor.integer_range = [IntegerRange(from_value=rule["low"], to_value=rule["high"])]
        try:
            value = node.declare_parameter(name, default, descriptor).value
        except InvalidParameterTypeException as error:
            wanted = {float: "a number with a point, such as 3.0", list: "two numbers with a point, such as [0.0, 1.0]"}
            hint = wanted.get(type(default), type(default).__name__)
            raise UserError(f"The parameter {name} has the wrong type: give {hint}.") from error
        except InvalidParameterValueException as error:
            raise UserError(f"The parameter {name} is refused: {error}") from error
        if (sentence := problem(name, value)) is not None:
            raise UserError(f"The parameter {sentence}")


def read(node: Any) -> Parameters:
    """The current values on the node."""
    return Parameters(**{name: _plain(node.get_parameter(name).value) for name in FIELDS})


def replaced(settings: Parameters, changes: Mapping[str, Any]) -> Parameters:
    """Settings with some values, as they come from ROS, changed."""
    return dataclasses.replace(settings, **{name: _plain(value) for name, value in changes.items()})


def qos_overrides(node: Any, topic: str) -> Any:
    """The options for an image subscription, with those policies that were given at start as qos_overrides.<topic>.

    rclpy declares each as a read-only parameter that outlives the subscription: all of them, always, would pin the
    first values, and image_qos and queue_size could never change.
    """
    from rclpy.qos_overriding_options import QoSOverridingOptions, QoSPolicyKind

    given = getattr(node, "_parameter_overrides", None)  # rclpy has no public way to ask
    if given is None:
        return QoSOverridingOptions.with_default_policies()
    prefix = f"qos_overrides.{topic}.subscription."
    return QoSOverridingOptions([kind for kind in QoSPolicyKind if prefix + kind.name.lower() in given])


def misspelt(node: Any) -> list[str]:
    """A sentence for each parameter that was given at start and is not ours: ROS itself would ignore it silently."""
    given = getattr(node, "_parameter_overrides", {})
    sentences = []
    for name in given:
        if name not in FIELDS and not name.startswith("qos_overrides.") and not node.has_parameter(name):
            close = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}."
            sentences.append(f"The parameter {name} does not exist and is ignored: {hint}")
    return sentences


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, bool, int, float)) else tuple(float(number) for number in value)
