"""Streams by turns: one thread owns the device and makes a chunk of one stream after another's.

A stream's turn comes when it may run (`Stream.runnable`) and was served longest ago; a new one is
taken as just served. What goes wrong in one stream ends that one.
"""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.sampling.chunk import Chunk
from longlive_jax.serving import metrics as metrics_lib
from longlive_jax.serving.keys import Keys
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.models import Model
from longlive_jax.serving.streams import (
    ACTIVE,
    ENDED,
    WAITING,
    Change,
    Order,
    Request,
    Stream,
)  # fmt: skip
from longlive_jax.serving.video_out import Encoder, Picture, Piece
from longlive_jax.serving.viewers import Viewer

_TICK_S = 0.25


class Scheduler:
    """All streams of a server.

    Args:
      folder: for videos and scripts; streams that a killed server left there go on.
      observe: called with each chunk, in the device's thread, before the next one.

    Attributes:
      ready: set once everything is compiled. failed: why it never will be.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        folder: pathlib.Path,
        observe: Callable[[Stream, Chunk], None] | None = None,
    ):
        self.models, self.limits, self.folder = dict(models), limits, folder
        self.metrics = metrics_lib.Metrics()
        self.ready, self.failed = threading.Event(), ""
        self.streams: dict[str, Stream] = {}
        self._observe = observe
        self._wake = threading.Condition(threading.RLock())
        self._stopping, self._parked = False, list[Stream]()
        self._number = self._turn = 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Compiles, restores streams of the folder, and begins."""
        self._thread.start()

    def stop(self, timeout: float = 6.0) -> None:
        """Finishes the chunk that is being made, and completes all videos."""
        until = time.monotonic() + timeout
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout * 0.7)
        for stream in list(self.streams.values()):
            for viewer in list(stream.viewers):
                viewer.send({"type": "end", "reason": "the server stops"})
                viewer.send(None)
            if stream.encoder is not None:
                stream.encoder.close(max(0.1, until - time.monotonic()))

    @property
    def busy(self) -> bool:
        """Whether the device's thread still runs."""
        return self._thread.is_alive()

    # From the event loop.

    def create(self, request: Request, given: pathlib.Path | None = None) -> Stream:
        """Adds a stream; `given`: the frames that it begins with, which are moved.

        Raises:
          Refused: the queue is full.
        """
        with self._wake:
            self._check_room()
            self._number += 1
            stream = Stream(self.models[request.model], request, self.folder, self._number)
            if given is not None:
                given.rename(stream.given)
            stream.save()
            self.streams[stream.id] = stream
            self._admit()
            self._wake.notify_all()
        return stream

    def _check_room(self):
        waiting = sum(stream.state == WAITING for stream in self.streams.values())
        if waiting >= self.limits.waiting:
            raise Refused(503, f"{waiting} streams wait already; try again later")
        if self._stopping:
            raise Refused(503, "the server stops")

    def get(self, id: str) -> Stream:
        """A stream. Raises Refused: there is none."""
        if (stream := self.streams.get(id)) is None:
            raise Refused(404, "no such stream; it may have ended long ago")
        return stream

    def position(self, stream: Stream) -> int:
        """Place in the queue, from 1; 0: it is active, or has ended."""
        with self._wake:
            queue = [s.id for s in self._queue()]
            return queue.index(stream.id) + 1 if stream.id in queue else 0

    def describe(self, stream: Stream) -> dict:
        with self._wake:
            return stream.describe(self.position(stream))

    def order(self, stream: Stream, order: Order | Change) -> None:
        """Raises Refused: the stream has ended, or too many wait."""
        with self._wake:
            if stream.state == ENDED:
                raise Refused(410, f"the stream has ended: {stream.reason}")
            if len(stream.orders) >= self.limits.shots:
                raise Refused(429, f"{len(stream.orders)} prompts and changes wait already")
            stream.orders.append(order)
            stream.lively = time.monotonic()
            self._wake.notify_all()

    def act(self, stream: Stream, keys: Keys) -> None:
        """Raises Refused: the stream has ended, or too many commands wait."""
        with self._wake:
            if stream.state == ENDED:
                raise Refused(410, f"the stream has ended: {stream.reason}")
            stream.commands.give(stream.session, keys)
            stream.lively = time.monotonic()

    def pause(self, stream: Stream, paused: bool) -> None:
        with self._wake:
            stream.paused = paused
            stream.lively = time.monotonic()
            self._wake.notify_all()

    def seen(self, stream: Stream, viewer: Viewer, frame: int) -> None:
        with self._wake:
            viewer.seen = max(viewer.seen, min(frame + 1, stream.made))
            stream.lively = time.monotonic()
            self._wake.notify_all()

    def join(self, stream: Stream, viewer: Viewer) -> None:
        """Raises Refused: the stream has ended, or has its viewers."""
        with self._wake:
            if stream.state == ENDED:
                raise Refused(410, f"the stream has ended: {stream.reason}")
            if len(stream.viewers) >= self.limits.viewers:
                raise Refused(429, f"{len(stream.viewers)} viewers; the limit of one stream")
            viewer.seen = stream.made
            stream.viewers.append(viewer)
            stream.lively = time.monotonic()
            if stream.encoder is not None:
                stream.encoder.request_key()
            self.metrics.viewers.inc()
            self._wake.notify_all()

    def leave(self, stream: Stream, viewer: Viewer) -> None:
        with self._wake:
            if viewer in stream.viewers:
                stream.viewers.remove(viewer)
                self.metrics.viewers.dec()
            self._wake.notify_all()

    def end(self, stream: Stream, reason: str) -> None:
        """Ends a stream; its video is completed, and stays for a while."""
        with self._wake:
            if stream.state == ENDED:
                return
            stream.close(reason)
            stream.save()
            if stream.encoder is not None:
                stream.encoder.finish()
            for viewer in stream.viewers:
                viewer.send({"type": "end", "reason": reason})
                viewer.send(None)
            self.metrics.ended.labels(reason.split(":")[0]).inc()
            self._forget()
            self._admit()
            self._wake.notify_all()

    # From the device's thread.

    def _run(self):
        try:
            for model in self.models.values():
                model.warm()
                _ = model.codec
            self._restore()
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            logging.exception("the server cannot stream")
            return
        self.ready.set()
        while True:
            with self._wake:
                while not self._stopping and (stream := self._choose()) is None:
                    self._wake.wait(self._rest())
                if self._stopping:
                    return
                parked, self._parked = self._parked, []
            assert stream is not None
            try:
                for other in parked:
                    if (session := other.session) is not None and session.index:
                        session.to_host()
                self._chunk(stream)
            except (InputError, NotFiniteError) as error:
                logging.warning("stream %d ends: %s", stream.number, type(error).__name__)
                self.end(stream, f"error: {error}")
            except Exception as error:
                logging.error("stream %d ends: %s", stream.number, _where(error))
                self.end(stream, "error: the server could not make the next chunk")

    def _restore(self):
        for path in sorted(self.folder.glob("*.json")):
            try:
                stream = Stream.load(path, self.models)
            except (ValueError, KeyError, TypeError, InputError, OSError) as error:
                logging.warning("%s is left alone: %s", path.name, type(error).__name__)
                continue
            with self._wake:
                self._number = max(self._number, stream.number)
                self.streams[stream.id] = stream
        with self._wake:
            self._admit()

    def _queue(self):
        return sorted(
            (s for s in self.streams.values() if s.state == WAITING), key=lambda s: s.active_since
        )

    def _admit(self):
        """Fills the places from the queue, and tells those who wait."""
        active = sum(s.state == ACTIVE for s in self.streams.values())
        queue = self._queue()
        for stream in queue[: max(0, self.limits.streams - active)]:
            stream.state = ACTIVE
            # Behind those who wait: or who begins again and again would be served alone.
            stream.turn = self._turn
            stream.active_since = stream.lively = time.monotonic()
            for viewer in stream.viewers:
                viewer.send({"type": "queue", "position": 0})
        for position, stream in enumerate(self._queue(), start=1):
            for viewer in stream.viewers:
                viewer.send({"type": "queue", "position": position})
        for state in (WAITING, ACTIVE, ENDED):
            count = sum(s.state == state for s in self.streams.values())
            self.metrics.streams.labels(state).set(count)

    def _choose(self) -> Stream | None:
        """The stream whose turn it is; ends and parks those whose time is over."""
        now, limits = time.monotonic(), self.limits
        for stream in list(self.streams.values()):
            if (stream.state == WAITING and stream.viewers) or stream.runnable(limits):
                stream.lively = now  # it waits for the device, not for a viewer
            if stream.state != ENDED and (reason := self._over(stream, now)):
                self.end(stream, reason)
        ready = [s for s in self.streams.values() if s.runnable(limits)]
        for stream in self.streams.values():
            stream.rested |= not stream.runnable(limits)
        self._rotate(now)
        return min(ready, key=lambda s: s.turn, default=None)

    def _rest(self) -> float:
        """Seconds until some stream may be due."""
        now = time.monotonic()
        due = [s.next_at - now for s in self.streams.values() if s.next_at > now]
        return min([_TICK_S, *due])

    def _over(self, stream: Stream, now: float) -> str:
        """Why a stream is at its end, or ""."""
        limits = self.limits
        if stream.done and stream.state == ACTIVE:
            return "done"
        if stream.index >= limits.chunks:
            return f"limit: {limits.chunks} chunks"
        if now - stream.born > limits.total_s:
            return f"limit: {limits.total_s:g} s"
        in_queue = stream.state == WAITING and stream.request.scripted
        return "idle" if now - stream.lively > limits.idle_s and not in_queue else ""

    def _rotate(self, now):
        """A stream that cannot run for a while gives its place to one that waits."""
        queue = [s for s in self._queue() if s.viewers or s.request.scripted]
        for stream in list(self.streams.values()) if queue else ():
            still = stream.state == ACTIVE and not stream.runnable(self.limits)
            if still and now - max(stream.lively, stream.active_since) > self.limits.turn_s:
                stream.state, stream.active_since = WAITING, now
                self._parked.append(stream)
                self._admit()
                return

    def _chunk(self, stream: Stream):
        begin = time.monotonic()
        model, session = stream.model, stream.session
        if session is None:
            given = (stream.request.given, stream.given) if stream.request.given else None
            request = stream.request
            session = model.begin(
                request.seed, given, steps=request.steps, guidance=request.guidance
            )
            with self._wake:
                if stream.state == ENDED:
                    return
                stream.begin(session)
                stream.encoder = Encoder(
                    stream.video, *model.pipeline.pixels,
                    deliver=lambda picture: self._deliver(stream, picture),
                    failed=lambda error: self._fail(stream, error),
                    wants_jpeg=lambda: any(v.jpeg for v in stream.viewers),
                )  # fmt: skip
        encoder = stream.encoder
        assert encoder is not None
        with self._wake:
            if stream.state == ENDED:
                return
            self._turn += 1
            stream.turn = self._turn
            replayed = session.index < stream.replayed
            due = stream.take()
        applied, refused = stream.direct(session, due)  # encodes new prompts
        chunk = session.step()
        events = self._apply(stream, chunk, applied, refused)
        count = 0
        for number, pictures in enumerate(chunk.frames.pictures()):
            pictures.frames.copy_to_host_async()
            finite = (chunk.latents_finite, pictures.finite)
            length = pictures.frames.shape[1]
            encoder.put(
                Piece(
                    pictures.frames, finite, chunk.index, number == 0,
                    any(chunk.applied.cut), tuple(stream.events_of(stream.made, length, events)),
                    not replayed,
                )
            )  # fmt: skip
            count += length
            stream.made += length
        if not np.asarray(chunk.finite):
            chunk.check()
        if self._observe is not None:
            self._observe(stream, chunk)
        if stream.record is not None:
            stream.record.extend(session)
        if not replayed:
            stream.pace(begin, count)
        seconds = time.monotonic() - begin
        self._count(stream, begin, seconds, replayed)
        if not replayed:
            with contextlib.suppress(FileNotFoundError), self._wake:
                if stream.state != ENDED:
                    stream.save()

    def _apply(self, stream, chunk, orders, refused) -> list[tuple[int, int]]:
        """Tells viewers from which picture of a chunk their messages act: (picture, event)."""
        with self._wake:
            commands = stream.commands.applied(chunk.receipts)
        given = [(stream.made, order.event, order.since) for order in orders]
        given += [(picture, keys.event, keys.since) for picture, keys in commands]
        events = [(picture, event) for picture, event, _ in given if event]
        stream.awaited.extend(sorted((picture, since) for picture, _, since in given))
        for viewer in list(stream.viewers):
            for picture, event in events:
                viewer.send(
                    {"type": "applied", "event_id": event, "chunk": chunk.index, "frame": picture}
                )
            for order, why in refused:
                viewer.send({"type": "error", "message": why, "event_id": order.event})
        return events

    def _count(self, stream, begin, seconds, replayed):
        m, playing = self.metrics, stream.model.playing_s
        stream.lively = time.monotonic()
        if replayed:
            return
        m.chunks.inc()
        m.chunk.observe(seconds)
        m.in_time.inc(seconds <= playing)
        end = begin + seconds
        m.underruns.inc(not stream.rested and end - stream.last_end > playing)
        stream.last_end, stream.rested = end, False
        message = stream.stats(seconds, metrics_lib.memory() / 1e9)
        for viewer in list(stream.viewers):
            viewer.send(message)

    # From an encoder's thread.

    def _deliver(self, stream: Stream, picture: Picture):
        now = time.monotonic()
        self.metrics.pictures.inc()
        if not stream.first_at:
            stream.first_at = now
            self.metrics.first_frame.observe(now - stream.born)
        while stream.awaited and stream.awaited[0][0] <= picture.frame:
            stream.action_s = now - stream.awaited.popleft()[1]
            self.metrics.action.observe(stream.action_s)
        stream.encoded.append(now)
        for viewer in list(stream.viewers):
            viewer.send(picture)

    def _fail(self, stream: Stream, error: BaseException):
        logging.warning("stream %d: its encoder ends: %s", stream.number, type(error).__name__)
        reason = str(error) if isinstance(error, NotFiniteError) else "its video cannot be written"
        self.end(stream, f"error: {reason}")

    def _forget(self):
        """Drops the oldest of the ended streams, with their files."""
        ended = [s for s in self.streams.values() if s.state == ENDED]
        for stream in ended[: max(0, len(ended) - self.limits.kept)]:
            del self.streams[stream.id]
            for path in stream.files:
                path.unlink(missing_ok=True)


def _where(error: Exception) -> str:
    """The kind of an error and the lines that it passed: no values, so no prompts."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        lines.append(f"{pathlib.Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' '.join(lines)}"
