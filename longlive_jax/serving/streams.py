"""A stream of the server: what it is to show, and how far it is."""

import collections
import dataclasses
import json
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import Actions
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path
from longlive_jax.prompts import scripts, shots
from longlive_jax.sampling.session import Direction, Session
from longlive_jax.serving.keys import Commands, Record, of_script
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.messages import prompt, whole
from longlive_jax.serving.models import Model
from longlive_jax.serving.uploads import Upload
from longlive_jax.serving.video_out import Encoder
from longlive_jax.serving.viewers import Viewer

WAITING, ACTIVE, ENDED = "queued", "active", "ended"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a stream was asked to be; with its script all that its latents depend on.

    shots: as in a file of shots. scripted: it is made without a viewer, as long as they are.
    given: "image" or "clip" that it begins with, or "". clip_chunks: of a clip.
    steps, guidance: that it begins with; guidance None: the server's.
    actions: of a script, for a model that takes keys; kept in a file of their own.
    """

    model: str
    shots: tuple[Mapping[str, Any], ...]
    seed: int
    steps: int
    scripted: bool
    given: str = ""
    actions: Actions | None = None
    guidance: float | None = None
    clip_chunks: int = 0


@dataclasses.dataclass(frozen=True)
class Change:
    """Steps, guidance or both from the next chunk on; None: as it was. since: when it came."""

    steps: int | None
    guidance: float | None
    event: int
    since: float
    at: int = 0


@dataclasses.dataclass
class Order:
    """A prompt on its way to a chunk. at: the chunk, 0 for the next. since: when it came."""

    text: str
    mode: str
    chunks: int
    at: int
    event: int
    since: float


class Stream:
    """One stream; its fields are the scheduler's, changed under its lock.

    made: pictures that were handed to the encoder. replayed: chunks that a killed server had made.
    """

    def __init__(self, model: Model, request: Request, folder: pathlib.Path, number: int,
                 id: str | None = None):  # fmt: skip
        self.id, self.number = id or secrets.token_urlsafe(9), number
        self.model, self.request, self.folder = model, request, folder
        self.state, self.reason = WAITING, ""
        self.session: Session | None = None
        self.encoder: Encoder | None = None
        self.viewers: list[Viewer] = []
        self.orders: list[Order | Change] = []
        self.paused = self.parked = False
        self.event = self.made = self.turn = 0
        self.born = self.active_since = self.lively = time.monotonic()
        self.replayed, self._past = 0, tuple[Direction, ...]()
        self.last_end, self.rested = 0.0, True  # of the newest chunk; whether it paused since
        self.first_at = 0.0  # when the first picture was encoded
        # From which picture each message acts, and when it came, until that picture is encoded.
        self.awaited = collections.deque[tuple[int, float]]()
        self.action_s = 0.0
        self.encoded: list[float] = []  # when the newest pictures were
        entries = [dict(shot) for shot in request.shots]
        video = model.pipeline.videos(entries)[0]
        # Behind a clip, whose chunks are made under the first prompt.
        clip = request.clip_chunks
        under = dataclasses.replace(video.chunks[0], recache=False, toward="", weight=0.0)
        self._plan, self._starts, start = (under,) * clip + video.chunks, set(), clip
        for shot in request.shots:
            self._starts.add(start)
            start += shot.get("chunks", 1)
        self._free = False  # a live prompt goes on until the plan's next entry
        self._blend: tuple[str, str, int, int] | None = None
        self.commands = Commands()
        self.next_at = 0.0  # when a world's next chunk is due
        self.record: Record | None = None
        if model.kind == "world":
            actions = model.cfg.model.actions
            self.record = Record(actions, model.cfg.model.chunk_frames, self.rows)

    # Files.

    @property
    def video(self) -> pathlib.Path:
        return self.folder / f"{self.id}.mp4"

    @property
    def given(self) -> pathlib.Path:
        return self.folder / f"{self.id}.npy"

    @property
    def rows(self) -> pathlib.Path:
        return self.folder / f"{self.id}.rows"

    @property
    def sidecar(self) -> pathlib.Path:
        """Of the script that it was asked to be."""
        return self.folder / f"{self.id}.actions.npz"

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        return self.video, self.given, self.rows, self.sidecar, self.folder / f"{self.id}.json"

    @property
    def index(self) -> int:
        if self.session is not None:
            return self.session.index
        return self.replayed if self.state == ENDED else 0

    @property
    def recorded(self) -> int:
        """Chunks of which a script can tell, behind a clip's."""
        made = self.index if self.record is None else min(self.index, self.record.chunks)
        return max(0, made - self.request.clip_chunks)

    @property
    def steps(self) -> int:
        """Of the next chunk."""
        return self.request.steps if self.session is None else self.session.steps

    @property
    def guidance(self) -> float:
        """Of the next chunk."""
        if self.session is not None:
            return self.session.guidance[0]
        own = self.request.guidance
        return self.model.cfg.sample.guidance_scale if own is None else own

    def script(self) -> dict[str, Any]:
        """What `launch.sample` makes the same latents from."""
        chunks, clip = self.recorded, self.request.clip_chunks
        own = [dataclasses.replace(d, chunk=max(0, d.chunk - clip)) for d in self._directions]
        return scripts.make(
            self.model.cfg, [d for d in own if d.chunk < chunks], chunks,
            seed=self.request.seed, begins_with=self.request.given or None,
            actions=self.record.whole(chunks) if self.record is not None and chunks else None,
        )  # fmt: skip

    @property
    def _directions(self):
        made = self.session.script if self.session is not None else ()
        return self._past if self.index < self.replayed or not made else made

    def close(self, reason: str) -> None:
        """Keeps the script, and lets go of the arrays."""
        if self.session is not None and self.index >= self.replayed:
            self._past, self.replayed = tuple(self.session.script), self.index
        self.state, self.reason, self.session = ENDED, reason, None

    def save(self) -> None:
        """Writes what another server needs to go on with the stream."""
        actions = self.request.actions
        if actions is not None and not self.sidecar.exists():
            sidecars.write(self.sidecar, actions)
        request = dataclasses.asdict(dataclasses.replace(self.request, actions=None))
        content = {
            "format": "longlive_jax stream", "version": 1, "id": self.id, "number": self.number,
            "request": request, "index": max(self.index, self.replayed),
            "script": [dataclasses.asdict(d) for d in self._directions],
            "ended": self.reason,
        }  # fmt: skip
        with atomic_path(self.folder / f"{self.id}.json") as path:
            path.write_text(json.dumps(content))

    @classmethod
    def load(cls, path: pathlib.Path, models: Mapping[str, Model]) -> "Stream":
        """A stream that a server left; it replays its script and goes on.

        Raises:
          ValueError, KeyError, TypeError: a file of another kind.
        """
        content = json.loads(path.read_text())
        request = Request(**content["request"])
        sidecar = path.with_suffix(".actions.npz")
        if sidecar.exists():
            request = dataclasses.replace(request, actions=sidecars.read(sidecar))
        stream = cls(models[request.model], request, path.parent, content["number"], content["id"])
        stream._past = tuple(Direction.read(fields) for fields in content["script"])
        stream.replayed = content["index"]
        if stream.record is not None:
            stream.replayed = stream.record.load(stream.replayed)
        if content["ended"]:
            stream.state, stream.reason = ENDED, content["ended"]
        return stream

    # Directing: from the device's thread.

    def begin(self, session: Session) -> None:
        """Takes a session that has not stepped; under the scheduler's lock."""
        self.session = session
        if self.record is not None:
            if (plan := self.record.plan(self.request.actions)) is not None:
                session.plan([plan])
            self.commands.begin(session)

    def events_of(self, first: int, count: int, applied: Sequence[tuple[int, int]]) -> list[int]:
        """The newest event of each of `count` pictures from picture `first` on, of a chunk.

        applied: (picture, event), in their order.
        """
        events = []
        for picture in range(first, first + count):
            self.event = max((e for at, e in applied if at <= picture), default=self.event)
            events.append(self.event)
        return events

    def take(self) -> list[Order | Change]:
        """The orders that are due with the next chunk.

        Behind a clip, with the second: a script has no words for a clip under other prompts than
        its first chunk's.
        """
        index, clip = self.index, self.request.clip_chunks
        if index < self.replayed or (clip and index <= clip):
            return []
        due = [order for order in self.orders if order.at <= index]
        self.orders = [order for order in self.orders if order.at > index]
        return due

    def direct(
        self, session: Session, due: list[Order | Change]
    ) -> tuple[list[Order | Change], list[tuple[Order, str]]]:
        """Gives the session what the next chunk is made under.

        Returns:
          The orders that act with this chunk, and those that are refused with why.
        """
        index = session.index
        if index < self.replayed:
            self._follow(session, index)
            return [], []
        if index == self.replayed and index:
            self._go_on(session)
        if index in self._starts:
            self._free, self._blend = False, None
        if not self._free and index < len(self._plan):
            c = self._plan[index]
            recache = c.recaches(self.model.cfg.sample.recache)
            session.direct([c.prompt], [c.cut], recache, [c.toward or c.prompt], [c.weight])
        elif not self._free and self._plan and index == len(self._plan):
            session.direct([self._plain(self._plan[-1].prompt)])
        self._adjust(session, index, [order for order in due if isinstance(order, Change)])
        refused = []
        prompts = [order for order in due if isinstance(order, Order)]
        for order in list(prompts):
            try:  # also whether the text encoder can read it: it stays embedded
                session.texts([order.text])
            except InputError as error:
                due.remove(order)
                prompts.remove(order)
                refused.append((order, str(error)))
        if prompts:
            self._obey(session, prompts[-1])
        if self._blend is not None:
            here, there, done, steps = self._blend
            done += 1
            self._blend = (here, there, done, steps)
            if done < steps:
                session.direct([here], None, False, [there], [done / steps])
            else:
                session.prompt(there, recache=False)
                self._blend = None
        return due, refused

    def _adjust(self, session, index, changes):
        """Steps and guidance of the plan where they change in it, and of viewers."""
        if index < len(self._plan):
            now, request, sample = self._plan[index], self.request, self.model.cfg.sample
            before = self._plan[index - 1] if index else None
            if before is None or (now.steps, now.guidance) != (before.steps, before.guidance):
                guidance = request.guidance if now.guidance is None else now.guidance
                session.adjust(
                    steps=now.steps or request.steps,
                    guidance=sample.guidance_scale if guidance is None else guidance,
                )
        for change in changes:
            session.adjust(steps=change.steps, guidance=change.guidance)

    def _obey(self, session, order):
        self._blend = None
        current = session.script[-1].prompts[0] if session.script else ""
        if order.mode == "blend" and current and order.chunks > 1:
            self._blend = (self._plain(current), order.text, 0, order.chunks)
        else:
            recache = {"recache": True, "blend": False}.get(order.mode)
            session.prompt(order.text, cut=order.mode == "cut", recache=recache)
        self._free = True

    def _follow(self, session, index):
        """As `Session.replay`, from what the file says."""
        there = {direction.chunk: direction for direction in self._past}
        session.follow(there.get(index) or session.script[-1])

    def _go_on(self, session):
        """After the replay: plain prompts; a blend that was under way has arrived."""
        last = session.script[-1]
        session.direct([self._plain(p) for p in last.toward or last.prompts])
        before = [start for start in self._starts if start <= self.replayed - 1]
        here = [self._plain(c.prompt) for c in self._plan[max(before, default=0) : self.replayed]]
        self._free = not here or here[-1] != self._plain(last.prompts[0])

    def _plain(self, prompt: str) -> str:
        return prompt.removeprefix(self.model.cfg.sample.scene_cut_prefix).strip()

    # Whether it may run.

    def runnable(self, limits: Limits) -> bool:
        if self.state != ACTIVE or self.paused:
            return False
        if self.encoder is not None and self.encoder.backlog > 16:
            return False
        if self.index < self.replayed:
            return True
        if not self.viewers:
            return self.request.scripted and self.index < len(self._plan)
        if time.monotonic() < self.next_at:
            return False
        unseen = self.made - max(viewer.seen for viewer in self.viewers)
        return unseen <= (limits.unseen_chunks - 1) * self.model.pictures

    def pace(self, begin: float, pictures: int) -> None:
        """A world's chunks begin as far apart as they play, so that keys act in the next picture
        that is seen, and time goes by as on a clock. A film is made ahead.

        begin: s, of a chunk of `pictures`.
        """
        if self.model.kind == "world":
            since = self.next_at if begin - self.next_at < 0.1 else begin  # no drift
            self.next_at = since + pictures / FRAMES_PER_SECOND

    @property
    def done(self) -> bool:
        """A script without a viewer is at its end."""
        at_end = self.request.scripted and self.index >= max(len(self._plan), self.replayed)
        return at_end and not self.viewers and not self.orders

    def describe(self, position: int) -> dict[str, Any]:
        return {
            "id": self.id, "number": self.number, "state": self.state, "position": position,
            "reason": self.reason, "model": self.model.name, "chunk": self.index,
            "frame": self.made, "viewers": len(self.viewers), "paused": self.paused,
            "seed": self.request.seed, "steps": self.steps, "guidance": self.guidance,
        }  # fmt: skip

    def stats(self, chunk_s: float, memory_gb: float) -> dict[str, Any]:
        now = time.monotonic()
        self.encoded = [t for t in self.encoded if now - t < 10][-1000:]
        span = now - self.encoded[0] if len(self.encoded) > 1 else 0
        return {
            "type": "stats", "chunk_s": round(chunk_s, 4),
            "playing_s": round(self.model.playing_s, 4),
            "denoised_fps": round(self.model.pictures / max(chunk_s, 1e-9), 2),
            "delivered_fps": round(len(self.encoded) / span, 2) if span else 0.0,
            "action_to_picture_s": round(self.action_s, 4), "memory_gb": round(memory_gb, 3),
            "viewers": len(self.viewers),
        }  # fmt: skip


def read_request(
    body: Any, models: Mapping[str, Model], limits: Limits, given: Upload | None
) -> Request:
    """The request in the body of POST /streams.

    given: the upload that it names.

    Raises:
      Refused: anything wrong with it.
    """
    known = ("model", "prompt", "seed", "steps", "guidance", "shots", "image", "script")
    if not isinstance(body, dict) or not set(body) <= set(known):
        raise Refused(400, f"a stream is a JSON object with some of: {', '.join(known)}")
    name = body.get("model") or next(iter(models))
    if not isinstance(name, str) or name not in models:
        raise Refused(400, f"no such model; there are {', '.join(models)}")
    model = models[name]
    script = body.get("script")
    if script is not None and (
        not isinstance(script, dict) or script.get("format") != shots.SCRIPT
    ):
        raise Refused(400, f"script must be an object of format {shots.SCRIPT!r}")
    script = script or {}
    _check_given(given, script.get("begins_with"), model)
    settings = dict(script.get("settings") or {})
    steps = body.get("steps") or settings.get("sample.steps") or model.choices[0]
    guidance = body.get("guidance", settings.get("sample.guidance_scale"))
    model.check(steps, guidance)
    seed = whole("seed", body.get("seed", script.get("seed", 0)), 0, 2**31 - 1)
    entries = body.get("shots", script.get("shots"))
    listed = _entries(entries, limits) if entries is not None else []
    if not listed:
        listed = [{"prompt": prompt(body.get("prompt"), limits), "chunks": 1}]
    try:  # what `launch.sample` would say of it
        video = model.pipeline.videos([dict(shot) for shot in listed])[0]
    except InputError as error:
        raise Refused(400, str(error)) from error
    for chunk in dict.fromkeys((c.steps, c.guidance) for c in video.chunks):
        model.check(*chunk)
    actions = None
    if entries is not None and (rows := script.get("actions")) is not None:
        pictures = model.pictures * len(video.chunks) - (config_lib.TEMPORAL_COMPRESSION - 1)
        actions = of_script(rows, model.cfg.model.actions, pictures)
    return Request(
        model.name, tuple(listed), seed, steps, entries is not None, given.kind if given else "",
        actions, None if guidance is None else float(guidance), given.chunks if given else 0,
    )  # fmt: skip


def _check_given(given: Upload | None, begins_with: object, model: Model) -> None:
    kinds = {"image": "an image", "clip": "a clip"}
    if begins_with and (given is None or given.kind != begins_with):
        what = kinds.get(str(begins_with), "something else than an image or a clip")
        raise Refused(400, f"the script begins with {what}: upload it, and give its id as image")
    if given is None:
        return
    if given.model != model.name:
        raise Refused(400, f"the upload was made for {given.model}: upload it for {model.name}")
    if given.kind == "clip" and model.kind == "world":
        raise Refused(
            400, f"{model.name} walks under keys, which a clip does not have: begin from a picture"
        )


def _entries(entries: Sequence[Any], limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= limits.shots:
        raise Refused(400, f"shots must be a list of 1 to {limits.shots} shots")
    listed = []
    for entry in entries:
        known = {"prompt", "chunks", "cut", "recache", "toward", "weight", "steps", "guidance"}
        if not isinstance(entry, dict) or not set(entry) <= known:
            raise Refused(400, f"a shot is an object with some of: {', '.join(sorted(known))}")
        shot: dict[str, Any] = dict(entry, prompt=prompt(entry.get("prompt"), limits))
        if "toward" in shot:
            shot["toward"] = prompt(shot["toward"], limits)
        shot["chunks"] = whole("chunks", shot.get("chunks", 1), 1, limits.chunks)
        listed.append(shot)
    if (total := sum(shot["chunks"] for shot in listed)) > limits.chunks:
        raise Refused(400, f"{total} chunks; the limit is {limits.chunks}")
    return listed
