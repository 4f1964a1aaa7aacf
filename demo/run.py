"""The demo: a recorded flight through the real node, in its own process, over real DDS.

    python demo/run.py --out out/demo

Makes a recording of demo/sequence, starts match_node, plays the recording into it as two camera drivers would, and
keeps everything the node publishes: an mcap, pictures of the matches, a report. Needs the package with [ros,replay].

"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import rclpy
from make_bag import TOPICS, make_bag
from player import Player
from results import write_results

from matchanything_ros.errors import UserError

HERE = Path(__file__).resolve().parent
CAMERA_PROFILE = HERE.parent / "config" / "fastdds_large_images.xml"
NODE = "match_node"


def start_node(log: Path) -> subprocess.Popen[bytes]:
    """Start the node, remapped to the recording's topics. Its output goes to `log`."""
    remaps = [word for index, topic in enumerate(TOPICS) for word in ("-r", f"image{index}:={topic}")]
    command = [sys.executable, str(HERE.parent / "scripts" / NODE), "--ros-args", "-r", f"__node:={NODE}", *remaps]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def stop_node(node: subprocess.Popen[bytes]) -> int:
    """Ask the node to stop (as Ctrl-C does) and return its exit status."""
    if node.poll() is None:
        node.send_signal(signal.SIGINT)
    try:
        return node.wait(timeout=15)
    except subprocess.TimeoutExpired:
        node.kill()
        return node.wait()


def run(out: Path, rate: float) -> int:
    """The whole demo; see the module. Returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    pairs = make_bag(out / "sequence", rate)
    print(f"Recording: {pairs} image pairs at {rate:g} per second -> {out / 'sequence'}")
    log = out / "node.log"
    node = start_node(log)
    print(f"Node: {NODE}, process {node.pid}, log in {log}")
    os.environ.setdefault(
        "FASTRTPS_DEFAULT_PROFILES_FILE", str(CAMERA_PROFILE)
    )  # for the player alone: it is the camera
    rclpy.init()
    player = Player(TOPICS, NODE)
    try:
        player.wait_for_node(node.poll)
        print(f"Playing {pairs / rate:.0f} s of images into {' and '.join(TOPICS)} ...", flush=True)
        player.play(out / "sequence")
        player.wait_for_last_answer()
    except UserError as error:
        print(f"demo: {error}\n{log.read_text()[-3000:]}", file=sys.stderr)
        return 1
    finally:
        recording = player.recording
        player.close()
        status = stop_node(node)
    if status != 0 or not recording.homographies:
        print(f"demo: the node answered {len(recording.homographies)} pairs and exited with {status}:", file=sys.stderr)
        print(log.read_text()[-3000:], file=sys.stderr)
        return 1
    print(write_results(recording, pairs, rate, out))
    print(f"({time.monotonic() - started:.0f} s)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the results (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=0.5, help="image pairs per second (default %(default)s)")
    arguments = parser.parse_args()
    # Read by ROS when it starts, here and in the node: a domain of its own, and nothing leaves this machine.
    os.environ.setdefault("ROS_DOMAIN_ID", str(os.getpid() % 100 + 1))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return run(arguments.out, arguments.rate)


if __name__ == "__main__":
    sys.exit(main())
