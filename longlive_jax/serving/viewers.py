"""One open WebSocket of a stream: what waits to be sent, within bounds."""

import asyncio
import collections
from typing import Any

from longlive_jax.serving import messages
from longlive_jax.serving.video_out import Picture

_PICTURES = 128  # that may wait; a viewer who is further behind goes on with a key frame
_TEXTS = 256


class Viewer:
    """Called from any thread; sends from the event loop that it was made in.

    jpeg: whether pictures go as JPEG. seen: the first picture that it has not said to have seen.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: int, jpeg: bool, seen: int):
        self.jpeg, self.seen, self.dropped = jpeg, seen, 0
        self._loop, self._stream = loop, stream
        self._waiting: collections.deque[dict[str, Any] | Picture | None] = collections.deque()
        self._ready = asyncio.Event()
        self._pictures = 0
        self._needs_key = not jpeg
        self.lost = False  # it does not read at all

    def send(self, item: dict[str, Any] | Picture | None) -> None:
        """A message, a picture, or None: the stream has ended, close."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._add, item)

    def _add(self, item):
        if isinstance(item, Picture):
            if self._needs_key and not item.key:
                self.dropped += 1
                return
            if self._pictures >= _PICTURES:
                self._waiting = collections.deque(
                    x for x in self._waiting if not isinstance(x, Picture)
                )
                self.dropped += self._pictures
                self._pictures, self._needs_key = 0, not self.jpeg
                if self._needs_key and not item.key:
                    return
            self._needs_key = False
            self._pictures += 1
        elif len(self._waiting) - self._pictures >= _TEXTS:
            self.lost = True
            return
        self._waiting.append(item)
        self._ready.set()

    async def next(self) -> str | bytes | dict[str, Any] | None:
        """What to send next: bytes of a picture, or a message; None at the end."""
        while not self._waiting:
            self._ready.clear()
            await self._ready.wait()
        item = self._waiting.popleft()
        if isinstance(item, Picture):
            self._pictures -= 1
            return self._packed(item)
        return item

    def _packed(self, picture: Picture) -> bytes:
        payload = picture.jpeg if self.jpeg else picture.h264
        flags = (
            messages.KEY * (picture.key or self.jpeg) | messages.FIRST * picture.first
            | messages.JPEG * self.jpeg | messages.CUT * picture.cut
        )  # fmt: skip
        header = messages.Header(
            flags, self._stream, picture.chunk, picture.frame, picture.event, len(payload),
            1000 * picture.time,
        )  # fmt: skip
        return header.pack() + payload
