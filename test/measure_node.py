"""What the node costs: pairs a second that it sustains, and latency by stage, over real DDS.

PYTHONPATH=test python test/measure_node.py                        a network that costs nothing: our own path
PYTHONPATH=test python test/measure_node.py --bundle aliked-n16    the packaged network

Keeps a few pairs in flight, so that the node is never idle and nothing is dropped; then sends at a slow rate, for the
latencies of a node that is not flooded.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
from dds import Client, NodeProcess, image_message, new_domain
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image
from trivial_bundle import write_trivial_bundle

from matchanything_ros.bundle import load_bundle

STAGES = ("wait", "decode", "preprocess", "network", "postprocess", "homography", "publish", "total")


def pictures(source: str | None, colour: bool, size: tuple[int, int]) -> list[np.ndarray]:
    import cv2

    if source is None:
        with np.load(load_bundle().golden) as golden:
            images = [golden["image0"], golden["image1"]]
    else:
        images = [cv2.cvtColor(cv2.imread(name), cv2.COLOR_BGR2RGB) for name in source.split(",")]
    images = [cv2.resize(image, size) for image in images]
    return images if colour else [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]


class Sender:
    """Publishes one pair again and again as prepared bytes: only the stamp changes, so the client costs little."""

    def __init__(self, client: Client, images: list[np.ndarray]) -> None:
        self.client, self.sent = client, 0
        self._bytes = [bytearray(serialize_message(image_message(image))) for image in images]

    def send(self) -> None:
        self.sent += 1
        stamp = 100_000_000_000 + self.sent * 200_000_000
        for data, publisher in zip(self._bytes, self.client.images, strict=True):
            data[4:12] = struct.pack("<iI", *divmod(stamp, 10**9))  # CDR: four bytes, then the header's stamp
            publisher.publish(bytes(data))

    def flood(self, seconds: float, in_flight: int) -> float:
        """Answers a second with so many pairs in flight."""
        client = self.client
        client.homographies.clear()
        start, first = time.perf_counter(), self.sent
        while time.perf_counter() - start < seconds:
            while self.sent - first - len(client.homographies) < in_flight:
                self.send()
            before = len(client.homographies)
            client.until(lambda before=before: len(client.homographies) > before, "an answer")
        return len(client.homographies) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="default: one that costs nothing to run")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--images", help="two files, with a comma; default: the packaged bundle's own pair")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--colour", action="store_true", help="rgb8 instead of mono8")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--pairs", type=int, default=200, help="for the latencies, which are over the last 200")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    images = pictures(args.images, args.colour, (width, height))
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or write_trivial_bundle(Path(folder) / "trivial.onnx")
        domain = new_domain()
        settings = {"bundle": bundle, "backend": args.backend, "image_qos": "reliable", "queue_size": 100}
        node = NodeProcess(domain, Path(folder) / "log", settings)
        client = Client(domain, node, image_type=Image)
        client.connected()
        sender = Sender(client, images)
        sender.flood(2.0, 1)
        for in_flight in (1, 2, 8):
            print(f"{in_flight} in flight: {sender.flood(args.seconds, in_flight):.1f} pairs/s")
        client.homographies.clear()
        for count in range(args.pairs):
            sender.send()
            client.until(lambda count=count: len(client.homographies) > count, "an answer")
        _, _, values = client.status(lambda _, values: "total p50 [ms]" in values)
        for stage in STAGES:
            print(f"{stage:12} p50 {values[f'{stage} p50 [ms]']:>8} ms   p95 {values[f'{stage} p95 [ms]']:>8} ms")
        dropped = {key: value for key, value in values.items() if "dropped" in key and value != "0"}
        print(f"{values['backend']}; dropped: {dropped or 'nothing'}")
        client.close()
        node.stop()


if __name__ == "__main__":
    main()
