"""Recorded bags without ROS: images of two topics in, our messages out (by rosbags; rosbag2 and ROS 1)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from matchanything_ros.errors import UserError

try:
    from rosbags.highlevel import AnyReader
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore
except ImportError as error:
    raise UserError("Reading bags needs rosbags: pip install rosbags.") from error

PACKAGE = "matchanything_ros"
CORRESPONDENCES = f"{PACKAGE}/msg/Correspondences"
HOMOGRAPHY = f"{PACKAGE}/msg/Homography"
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


def typestore() -> Any:
    """The message types of ROS 2, and ours from their definitions."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for name in (CORRESPONDENCES, HOMOGRAPHY):
        store.register(get_types_from_msg(_definition(name.split("/")[-1]), name))
    return store


def _definition(name: str) -> str:
    """The text of msg/NAME.msg: beside the code in an installed package, else in the source tree, else in share/."""
    here = Path(__file__).resolve().parent
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    folders = [here / "interfaces", here.parent / "msg", *(prefix / "share" / PACKAGE / "msg" for prefix in prefixes)]
    for folder in folders:
        if (folder / f"{name}.msg").is_file():
            return (folder / f"{name}.msg").read_text(encoding="utf-8")
    raise UserError(f"The definition {name}.msg is missing from this installation: install matchanything_ros again.")


@contextmanager
def open_bag(path: Path) -> Iterator[AnyReader]:
    """Open a rosbag2 folder, a bare .mcap or .db3 file, or a ROS 1 .bag; UserError if it is none of these."""
    if not path.exists():
        raise UserError(f"The bag {path} does not exist: check the path.")
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".mcap", ".db3", ".bag"))
        advice = f"name the file {inside[0]} in it" if inside else "name the folder that 'ros2 bag record' made"
        raise UserError(f"{path} is no bag (it has no metadata.yaml): {advice}.")
    if path.is_file() and path.suffix not in (".bag", ".mcap", ".db3"):
        raise UserError(f"{path} is no bag: name a rosbag2 folder, or a file .mcap, .db3 or .bag.")
    try:
        # Recordings of older ROS 2 hold no definitions: then those of the standard messages are needed.
        reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
        reader.open()
    except Exception as error:  # rosbags lets through what its parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"The bag {path} cannot be read ({reason}): it may be truncated; record or copy it again."
        ) from error
    try:
        yield reader
    finally:
        reader.close()


def image_connections(reader: AnyReader, topics: tuple[str, str]) -> list[Any]:
    """The connections of the two image topics. UserError lists what there is if one is missing or holds no images."""
    if topics[0] == topics[1]:
        raise UserError(f"--image0 and --image1 are both {topics[0]}: name the topics of two cameras.")
    found: list[Any] = []
    for topic in topics:
        here = [connection for connection in reader.connections if connection.topic == topic]
        if not here:
            raise UserError(f"The bag has no topic {topic}; it has {_topics(reader)}.")
        for connection in here:
            if connection.msgtype not in IMAGE_TYPES:
                raise UserError(
                    f"{topic} holds {connection.msgtype}, not images (sensor_msgs Image or CompressedImage); "
                    f"the bag has {_topics(reader)}."
                )
        if not sum(connection.msgcount for connection in here):
            raise UserError(f"{topic} holds no message: check what was recorded.")
        found += here
    return found


def images(reader: AnyReader, connections: list[Any], path: Path) -> Iterator[tuple[Any, int, Any]]:
    """(connection, time of receipt in nanoseconds, image message) in order of receipt."""
    messages = reader.messages(connections)
    while True:
        try:
            connection, received, raw = next(messages)
            message = reader.deserialize(raw, connection.msgtype)
        except StopIteration:
            return
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"The bag {path} is damaged ({reason}): record or copy it again.") from error
        yield connection, received, message


def _topics(reader: AnyReader) -> str:
    """The bag's topics in words, images first."""
    rows = {connection.topic: connection.msgtype for connection in reader.connections}
    names = sorted(rows, key=lambda topic: (rows[topic] not in IMAGE_TYPES, topic))
    shown = [f"{name} ({rows[name].replace('/msg/', '/')})" for name in names[:12]]
    return (
        ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "no topic at all"
    )


class McapRecording:
    """One .mcap file in the making, with the definitions of the messages in it: readers need no registration.

    with McapRecording(path) as recording: recording.write("/topic", message, time_ns)
    """

    def __init__(self, path: Path) -> None:
        self.store = typestore()
        self._path = path
        self._folder = Path(tempfile.mkdtemp(prefix=".mcap.", dir=path.absolute().parent))
        self._writer = Writer(self._folder / "bag", version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[tuple[str, str], Any] = {}

    def write(self, topic: str, message: Any, time_ns: int) -> None:
        """Add a message made from this recording's `store`."""
        self.write_serialised(
            topic, message.__msgtype__, self.store.serialize_cdr(message, message.__msgtype__), time_ns
        )

    def write_serialised(self, topic: str, msgtype: str, data: Any, time_ns: int) -> None:
        """Add a message of type "package/msg/Name" in its serialised form (CDR), as a ROS 2 node sends it."""
        key = (topic, msgtype)
        if key not in self._connections:
            self._connections[key] = self._writer.add_connection(topic, msgtype, typestore=self.store)
        self._writer.write(self._connections[key], time_ns, data)

    def header(self, header: Any) -> Any:
        """A std_msgs/Header of this store with the stamp and frame of any other, ROS 1's included."""
        types = self.store.types
        time = types["builtin_interfaces/msg/Time"](sec=int(header.stamp.sec), nanosec=int(header.stamp.nanosec))
        return types["std_msgs/msg/Header"](stamp=time, frame_id=str(header.frame_id))

    def __enter__(self) -> McapRecording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            made = next((self._folder / "bag").glob("*.mcap"))
            os.replace(made, self._path)
        shutil.rmtree(self._folder, ignore_errors=True)
