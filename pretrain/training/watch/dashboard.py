"""Event files for TensorBoard, made as bytes that are appended to a file."""

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

_numbers = count()  # numbers the event files of this process


def event_file(folder: Path) -> Path:
    """The path of a new event file in `folder`."""
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
    return folder / name


def first_events(purge: int) -> bytes:
    """The beginning of an event file: its version, and a mark that removes points from `purge` on in older files."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    version = Event(wall_time=time.time(), file_version="brain.Event:2")
    start = Event(wall_time=time.time(), step=purge, session_log=SessionLog(status=SessionLog.START))
    return _framed(version) + _framed(start)


def event(summary: "Summary", step: int) -> bytes:
    """The bytes of a summary at `step`."""
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(wall_time=time.time(), step=step, summary=summary))


def _framed(event: "Event") -> bytes:
    """The bytes of an event in a file. Torch's SummaryWriter writes in a thread, and its errors cannot be caught."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
