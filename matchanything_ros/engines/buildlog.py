"""What TensorRT says while it parses and builds, reduced to what matters: the node, the reason, what to do."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What to do about operators that TensorRT's parser is known to refuse.
ADVICE = {
    "DeformConv": "export with this package's exporter, which writes it as GridSample and a 1x1 convolution",
    "NonZero": "the network must select a fixed number of keypoints (top-K), as this package's exporter does",
    "Resize": "antialiased resizing is not supported; it must be two constant matrices, as this package exports it",
    "ScatterND": "scattering with a reduction is not supported; export with this package's exporter",
    "ScatterElements": "scattering with a reduction is not supported; export with this package's exporter",
    "TopK": "TensorRT takes at most 3840 of them at once; export with fewer --keypoints",
    "GridSample": "image and grid must have one type; export with this package's exporter",
    "Attention": "export with opset 20, as this package's exporter does",
}
DEFAULT_ADVICE = "export the bundle again with this package, or update TensorRT"


class BuildLog:
    """Collects messages from TensorRT's threads. `verbose` gets every line as it comes."""

    def __init__(self, verbose: Callable[[str], None] | None = None) -> None:
        self._verbose = verbose
        self._lock = threading.Lock()
        self._lines: dict[str, list[str]] = {"WARNING": [], "ERROR": [], "INTERNAL_ERROR": []}
        self._memory: int | None = None

    def add(self, severity: str, message: str) -> None:
        if self._verbose is not None:
            self._verbose(f"{severity.lower()}: {message}")
        with self._lock:
            if severity in self._lines and message not in self._lines[severity]:
                self._lines[severity].append(message)
            elif found := re.match(r"Total Activation Memory: (\d+) bytes", message):
                self._memory = int(found.group(1))

    def errors(self) -> list[str]:
        return [*self._lines["INTERNAL_ERROR"], *self._lines["ERROR"]]

    def last_error(self) -> str:
        errors = self.errors()
        return _short(errors[-1]) if errors else "TensorRT gave no reason"

    def warnings(self) -> tuple[str, ...]:
        """The first line of each different warning, at most ten."""
        return tuple(_short(line) for line in self._lines["WARNING"][:10])

    def device_memory(self) -> int | None:
        """Bytes of activations and scratch that the plan will need, if the build said so."""
        return self._memory

    def failure(self, onnx: Path) -> str:
        """One sentence for a build that gave no plan."""
        text = "\n".join(self.errors())
        advice = "use --verbose for its whole log"
        if re.search(
            r"out of memory|OutOfMemory|insufficient.*memory|cudaError(MemoryAllocation)|bad_alloc", text, re.I
        ):
            advice = (
                "free memory on the device (close other programs, add swap on a Jetson) or set a smaller --workspace"
            )
        elif re.search(r"workspace", text, re.I):
            advice = "allow more with --workspace MIB"
        elif re.search(r"cudaError|CUDA (initialization|error)|driver version", text, re.I):
            advice = "check the driver with 'matchanything doctor'"
        return f"TensorRT cannot build {onnx.name} ({self.last_error()}): {advice}."


def trt_logger(trt: Any, log: BuildLog) -> Any:
    """A logger for TensorRT's objects that writes to `log`. It must live as long as they do."""

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()


def parser_sentence(onnx: Path, errors: list[Any], log: BuildLog) -> str:
    """One sentence for an ONNX file that the parser refuses: which node, which operator, why, what to do.

    errors: the parser's ParserError objects.
    """
    if not errors or errors[0].node() < 0:  # not a node's fault: the file
        return f"TensorRT cannot read {onnx} ({log.last_error()}): copy the bundle again or export it again."
    first = errors[0]
    operator, name = _operator(first, log), first.node_name() or f"number {first.node()}"
    advice = ADVICE.get(operator, DEFAULT_ADVICE)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (
        f"TensorRT refuses the node '{name}' of {onnx.name}, operator {operator}{more} "
        f"({_short(first.desc())}): {advice}."
    )


def _operator(error: Any, log: BuildLog) -> str:
    """The operator's type; older parsers tell it only in the log."""
    operator = getattr(error, "node_operator", str)()
    if operator:
        return str(operator)
    for line in log.errors():
        if found := re.search(r"While parsing node number \d+ \[(\w+)", line):
            return found.group(1)
    return "unknown"


def _short(text: str, limit: int = 200) -> str:
    """The message's first line without the source positions in front, and not too long."""
    line = next((line for line in text.strip().splitlines() if line.strip()), "")
    line = re.sub(r"^\S+\.(cpp|h):\d+:? ?", "", line)
    line = re.sub(r"^\[\w+\.(cpp|h)::\w+::\d+\] ?", "", line)
    line = line.strip().rstrip(".")
    return line if len(line) <= limit else line[: limit - 1] + "…"
