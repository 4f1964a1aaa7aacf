"""The way into the node: `match_node`, `ros2 run matchanything_ros match_node` and the launch file."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the node; its exit status, or 1 and one sentence where ROS or our messages are missing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the node has its own handler: no traceback out of the imports
    try:
        from matchanything_ros.node import main as run_node
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("matchanything_ros") and missing != "matchanything_ros.msg":
            raise
        what = "Our ROS messages are" if missing == "matchanything_ros.msg" else f"The Python package {missing} is"
        print(
            f"match_node: {what} not here. With a ROS 2 installation: build this package with colcon and source "
            "install/setup.bash; without one, on x86-64: pip install '.[ros]' in a clone of matchanything_ros.",
            file=sys.stderr,
        )
        return 1
    return run_node()
