"""Recordings of two cameras in every format, written from given pictures without ROS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

START = 1_700_000_000_000_000_000
TOPICS = ("/left/image_raw", "/right/image_raw")
Frames = Sequence[tuple[int, int, np.ndarray]]  # camera, nanoseconds since START, RGB or gray uint8


def record(path: Path, kind: str, frames: Frames, compressed: bool = False, extra: bool = False) -> Path:
    """Write a recording. kind: "mcap" or "sqlite3" (folders of rosbag2) or "ros1"; extra: with a topic of strings.

    Returns the path to give to a reader. Time of receipt is the stamp and a millisecond.
    """
    store = get_typestore(Stores.ROS1_NOETIC if kind == "ros1" else Stores.ROS2_JAZZY)
    name = f"sensor_msgs/msg/{'CompressedImage' if compressed else 'Image'}"
    if kind == "ros1":
        writer: Any = Ros1Writer(path.with_suffix(".bag"))
        serialise = store.serialize_ros1
    else:
        plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
        writer = Writer(path, version=9, storage_plugin=plugin)
        serialise = store.serialize_cdr
    with writer:
        connections = [writer.add_connection(topic, name, typestore=store) for topic in TOPICS]
        if extra:
            string = "std_msgs/msg/String"
            chatter = writer.add_connection("/chatter", string, typestore=store)
            writer.write(chatter, START, serialise(store.types[string](data="hello"), string))
        for camera, time, image in frames:
            stamp = START + time
            message = _message(store, image, stamp, f"camera{camera}", compressed, ros1=kind == "ros1")
            writer.write(connections[camera], stamp + 1_000_000, serialise(message, name))
    return path.with_suffix(".bag") if kind == "ros1" else path


def _message(store: Any, image: np.ndarray, stamp: int, frame: str, compressed: bool, ros1: bool) -> Any:
    types = store.types
    time = types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
    header = types["std_msgs/msg/Header"](stamp=time, frame_id=frame, **({"seq": 7} if ros1 else {}))
    if compressed:
        # PNG, so that what is read is what was written.
        data = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1].reshape(-1)
        return types["sensor_msgs/msg/CompressedImage"](header=header, format="png", data=data)
    return types["sensor_msgs/msg/Image"](
        header=header,
        height=image.shape[0],
        width=image.shape[1],
        encoding="mono8" if image.ndim == 2 else "rgb8",
        is_bigendian=0,
        step=image[0].nbytes,
        data=np.ascontiguousarray(image).reshape(-1),
    )
