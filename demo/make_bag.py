"""The image sequence in demo/sequence as a rosbag2 recording (mcap) of two cameras.

    python demo/make_bag.py out/demo/bag

Topics: /cam0/image_raw (bgr8) and /cam1/image_raw (mono8), sensor_msgs/Image. The pictures are real, the stamps are
made: `rate` frames per second, cam1 4 ms after cam0 (as two cameras without a common trigger).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

SEQUENCE = Path(__file__).resolve().parent / "sequence"
TOPICS = ("/cam0/image_raw", "/cam1/image_raw")
START_NS = 1_700_000_000_000_000_000
OFFSET_NS = 4_000_000


def make_bag(folder: Path, rate: float = 0.5) -> int:
    """Write the recording to `folder` (replaced if it exists). Returns the number of image pairs."""
    store = get_typestore(Stores.ROS2_JAZZY)
    image_type, header_type, time_type = (
        store.types[name] for name in ("sensor_msgs/msg/Image", "std_msgs/msg/Header", "builtin_interfaces/msg/Time")
    )
    names = sorted(path.name for path in (SEQUENCE / "cam0").glob("*.jpg"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        cameras = [bag.add_connection(topic, image_type.__msgtype__, typestore=store) for topic in TOPICS]
        for index, name in enumerate(names):
            for camera, connection in enumerate(cameras):
                picture = cv2.imread(str(SEQUENCE / f"cam{camera}" / name), cv2.IMREAD_UNCHANGED)
                assert picture is not None, name
                stamp = START_NS + round(index * 1e9 / rate) + camera * OFFSET_NS
                header = header_type(
                    stamp=time_type(sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id=f"cam{camera}_optical"
                )
                height, width = picture.shape[:2]
                message = image_type(
                    header=header,
                    height=height,
                    width=width,
                    encoding="bgr8" if picture.ndim == 3 else "mono8",
                    is_bigendian=0,
                    step=picture.strides[0],
                    data=np.ascontiguousarray(picture).reshape(-1),
                )
                bag.write(connection, stamp, store.serialize_cdr(message, connection.msgtype))
    return len(names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="recording to write")
    parser.add_argument("--rate", type=float, default=0.5, help="frames per second (default %(default)s)")
    arguments = parser.parse_args()
    print(f"{make_bag(arguments.folder, arguments.rate)} image pairs in {arguments.folder}")
