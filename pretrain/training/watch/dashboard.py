"""Event files for TensorBoard, as bytes to be appended."""

import io
import os
import socket
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

_numbers = count()  # of event files of this process


def event_file(folder: Path) -> Path:
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
    return folder / name


def first_events(purge: int) -> bytes:
    """The beginning of an event file: its version, and that points from `purge` on in older files do not count."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    start = Event(wall_time=time.time(), step=purge, session_log=SessionLog(status=SessionLog.START))
    return _framed(version) + _framed(start)


def event(summary: "Summary", step: int) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(wall_time=time.time(), step=step, summary=summary))


def _framed(event: "Event") -> bytes:
    """An event as it stands in a file. Torch's SummaryWriter has a thread, whose errors nobody can catch."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
