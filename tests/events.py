"""Reads event files of TensorBoard: what its own reader would keep of them, without the package."""
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def records(data):
    """The whole records of a file: length, its checksum, content, its checksum. One that a crash cut short ends it."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield data[at + 12:at + 12 + length]
        at += 16 + length


def read(folder):
    """{tag: [(step, value), ...]} of a run's event files; a later start drops what was said of its first step and later ones."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        events = [Event.FromString(one) for one in records(path.read_bytes())]
        assert not events or events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                found = {tag: [one for one in points if one[0] < event.step] for tag, points in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {tag: points for tag, points in found.items() if points}
