"""TensorBoard's files of events, as bytes: who writes the rows writes them too, so a full disk is met in one place.

tensorboardX has the messages and checksums; its own writer is a thread whose errors nobody hears.
"""

import os
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar


def new_file(folder: Path) -> Path:
    """The path of a file of events that does not exist, in the folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names.
    return folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"


def start(step: int) -> bytes:
    """What a file begins with. What other files have of `step` and later no longer counts."""
    version = _record(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return version + _record(event_pb2.Event(wall_time=time.time(), step=step, session_log=session))


def scalars(step: int, values: dict[str, float]) -> bytes:
    """A point of each curve, by its tag."""
    now = time.time()
    return b"".join(
        _record(event_pb2.Event(wall_time=now, step=step, summary=scalar(tag, value))) for tag, value in values.items()
    )


def _record(event: event_pb2.Event) -> bytes:
    """TFRecord's frame: length, its checksum, the event, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
