"""What clients may ask of a server; each limit is named where it refuses."""

import dataclasses


class Refused(Exception):
    """A request that is refused: the status and a message for the client."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Limits:
    """Counts, bytes, pixels and seconds.

    streams: that are made at the same time, by turns; others wait.
    waiting: in the queue.
    chunks: of one stream. idle_s: without a viewer or with one that does not read. total_s: of one
      stream, from its beginning.
    unseen_chunks: that are made before a viewer says that it has seen pictures.
    turn_s: how long an active stream that is paused keeps its place while others wait.
    """

    streams: int = 2
    waiting: int = 64
    chunks: int = 2000
    idle_s: float = 120.0
    total_s: float = 3600.0
    unseen_chunks: int = 2
    turn_s: float = 10.0
    viewers: int = 8
    prompt: int = 1000
    shots: int = 200
    message_bytes: int = 16 * 1024
    body_bytes: int = 4 * 2**20  # half an hour of a world's actions in a script
    messages_per_s: float = 120.0
    message_burst: int = 240
    upload_bytes: int = 32 * 2**20
    uploads: int = 16
    pixels: int = 2**25
    clip_frames: int = 24 * 20  # the last ones of a clip are taken
    clip_s: float = 600.0  # of a clip: what is before the last ones is decoded too
    decode_s: float = 20.0
    decode_bytes: int = 2 * 2**30
    kept: int = 200  # ended streams whose videos can still be fetched
