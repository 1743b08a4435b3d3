"""A stream's WebSocket: a viewer's messages up, pictures and receipts down."""

import asyncio
import contextlib
import time
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.serving import messages
from longlive_jax.serving.keys import Reader
from longlive_jax.serving.limits import Refused
from longlive_jax.serving.scheduler import Scheduler
from longlive_jax.serving.streams import Change, Order, Stream
from longlive_jax.serving.viewers import Viewer

_SEND_S = 30.0  # a viewer that takes nothing for so long is let go
_BAD_MESSAGES = 20


class Live:
    """One connection, until either side ends it."""

    def __init__(self, scheduler: Scheduler, stream: Stream, socket: WebSocket):
        self._scheduler, self._stream, self._socket = scheduler, stream, socket
        jpeg = socket.query_params.get("format") == "jpeg"
        self._viewer = Viewer(asyncio.get_running_loop(), stream.number, jpeg, stream.made)
        limits = scheduler.limits
        self._tokens, self._filled = float(limits.message_burst), time.monotonic()
        self._bad = 0
        model = stream.model
        self._reader = Reader(model.name, model.cfg.model.actions)

    async def run(self) -> None:
        self._scheduler.join(self._stream, self._viewer)
        try:
            await self._socket.send_json(self._hello())
            position = self._scheduler.position(self._stream)
            await self._socket.send_json({"type": "queue", "position": position})
            tasks = [asyncio.create_task(self._up()), asyncio.create_task(self._down())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await asyncio.wait_for(self._socket.close(), 2)
        except (WebSocketDisconnect, RuntimeError, TimeoutError):
            pass  # it has gone
        finally:
            if (keys := self._reader.let_go(time.monotonic())) is not None:
                with contextlib.suppress(Refused):  # it has ended
                    self._scheduler.act(self._stream, keys)
            self._scheduler.leave(self._stream, self._viewer)

    def _hello(self) -> dict[str, Any]:
        stream = self._stream
        height, width = stream.model.pipeline.pixels
        frame = stream.encoder.frames if stream.encoder is not None else 0
        return {
            "type": "hello", "codec": "jpeg" if self._viewer.jpeg else stream.model.codec,
            "width": width, "height": height, "fps": FRAMES_PER_SECOND,
            "model": stream.model.name, "frame": frame, "stream": stream.number,
        }  # fmt: skip

    async def _down(self):
        while (item := await self._viewer.next()) is not None and not self._viewer.lost:
            if isinstance(item, bytes):
                sending = self._socket.send_bytes(item)
            else:
                sending = self._socket.send_json(item)
            await asyncio.wait_for(sending, _SEND_S)

    async def _up(self):
        while True:
            try:
                text = await self._socket.receive_text()
            except KeyError:  # a binary message
                text = ""
            message = None
            try:
                self._spend()
                message = messages.parse(text, self._scheduler.limits)
                self._act(message)
            except Refused as error:
                self._scheduler.metrics.refused.labels(str(error.status)).inc()
                self._bad += 1
                event = (
                    {"event_id": message["event_id"]} if message and "event_id" in message else {}
                )
                self._viewer.send({"type": "error", "message": error.message} | event)
                if error.status == 429 or self._bad >= _BAD_MESSAGES:
                    self._viewer.send(None)
                    await asyncio.sleep(1)
                    return

    def _spend(self):
        """A bucket of messages that fills with time."""
        limits, now = self._scheduler.limits, time.monotonic()
        gained = (now - self._filled) * limits.messages_per_s
        self._tokens, self._filled = min(self._tokens + gained, limits.message_burst), now
        if self._tokens < 1:
            raise Refused(429, f"over {limits.messages_per_s:g} messages a second: goodbye")
        self._tokens -= 1

    def _act(self, message: dict[str, Any]) -> None:
        scheduler, stream, kind = self._scheduler, self._stream, message["type"]
        if kind == "seen":
            scheduler.seen(stream, self._viewer, message["frame"])
            return
        event = message.get("event_id", 0)
        if kind == "keys":
            scheduler.act(stream, self._reader.read(message, time.monotonic()))
        if kind == "settings":
            scheduler.order(stream, self._change(message, event))
        if kind == "prompt":
            order = Order(
                message["text"], message["mode"], message["chunks"], message.get("at", 0), event,
                time.monotonic(),
            )  # fmt: skip
            scheduler.order(stream, order)
        self._viewer.send({"type": "accepted", "event_id": event})
        if kind == "keyframe" and stream.encoder is not None:
            stream.encoder.request_key()
        if kind == "pause":
            scheduler.pause(stream, message["paused"])
        if kind == "pause":
            self._viewer.send(
                {"type": "applied", "event_id": event, "chunk": stream.index, "frame": stream.made}
            )

    def _change(self, message, event):
        steps, guidance = message.get("steps"), message.get("guidance")
        if steps is None and guidance is None:
            raise Refused(400, "settings: give steps, guidance, or both")
        self._stream.model.check(steps, guidance)
        return Change(steps, guidance, event, time.monotonic())
