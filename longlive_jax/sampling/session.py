"""A stream as a value: all that it carries from chunk to chunk, and the script that led there.

A `Session` can be stepped, copied, moved to the host and back, saved, restored on another machine
and replayed from its script, to the same bits. It is one stream, or a few rows of equal age that
are denoised together.
"""

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax import mesh as mesh_lib
from longlive_jax.data.sidecars import Actions
from longlive_jax.errors import InputError
from longlive_jax.files import folders
from longlive_jax.models import vae, vae_spec
from longlive_jax.sampling import draws, memory, saved, stream
from longlive_jax.sampling import finite as finite_lib
from longlive_jax.sampling.chunk import Chunk, Direction, Frames, Making
from longlive_jax.sampling.controls import Accepted
from longlive_jax.sampling.engine import ARRAYS, Engine, Start, Texts
from longlive_jax.sampling.landmarks import Landmarks
from longlive_jax.sampling.track import Keys, Track


@struct.dataclass
class Carried:
    """The arrays that a chunk leaves to the next; decoding is None before the first frames."""

    stream: stream.StreamState
    decoding: vae.DecodeState | None = None


class Session:
    """A stream.

        session.prompt("A lighthouse at dusk.")
        chunk = session.step()
        session.prompt("Inside, a keeper lights the lamp.", cut=True)

    Attributes:
      index: of the next chunk.
      script: the directions of the chunks so far, where they changed.
      actions: those of the stream; None for a model without an action path.
      landmarks: of its past; None if `memory.landmarks` is 0.

    Raises:
      InputError: more references than the window has slots for.
    """

    def __init__(self, engine: Engine, texts: Texts, start: Start):
        self.engine, self.texts, self.start = engine, texts, start
        self.index, self.script = 0, []
        self._next: Direction | None = None
        self._later: tuple[str, ...] = ()  # prompts of the chunks after the next
        self._steps: int | None = None  # None, (): the config's
        self._guidance: tuple[float, ...] = ()
        self._rows: dict[str, np.ndarray] = {}  # embeddings of all prompts of the script
        self._negative: np.ndarray | None = None
        self._placed: tuple[Any, ...] | None = None  # prompts, and their embeddings on the mesh
        model = engine.cfg.model
        self.actions: Track | None = None
        if model.actions.kind != "none":
            self.actions = Track(model.actions, model.chunk_frames, len(start.samples))
        references = 0 if start.references is None else start.references.shape[1]
        memory.check_references(engine.cfg, references)
        self.landmarks: Landmarks | None = None
        if engine.cfg.sample.memory.landmarks and self.actions is not None:
            self.landmarks = Landmarks(engine.cfg, self.actions, self.rows, references)
        self._sampler = engine.sampler(start.first_frame is not None)
        state = self._sampler.init_state(len(start.samples), start.height, start.width)
        self._carried = Carried(state)
        self._making: Making | None = None  # the last chunk, until all of it is dispatched
        self._on_host = False

    @property
    def carried(self) -> Carried:
        """The arrays of the stream, a pytree on the mesh or on the host; `step` donates it."""
        if self._making is not None:
            self._making.finish()
        return self._carried

    @carried.setter
    def carried(self, carried: Carried) -> None:
        self._carried = carried

    @property
    def rows(self) -> int:
        return len(self.start.samples)

    def prompt(
        self,
        text: str | Sequence[str],
        *,
        cut: bool | Sequence[bool] = False,
        recache: bool | None = None,
    ) -> None:
        """Sets the prompt from the next chunk on. Of several calls before a chunk the last counts.

        Args:
          text: of all rows, or of each. At a cut `sample.scene_cut_prefix` is put before it.
          cut: the next chunk starts a new shot. (A video's first chunk does anyway.)
          recache: bring the visible past under the new prompt; None: as `sample.recache` says, when
            a prompt changes inside a shot.
        """
        texts = self._each(text, str)
        cuts = tuple(c and self.index > 0 for c in self._each(cut, bool))
        sample = self.engine.cfg.sample
        plain = tuple(t.removeprefix(sample.scene_cut_prefix).strip() for t in texts)
        now = tuple(sample.scene_cut_prefix + t if c else t for t, c in zip(plain, cuts))
        if recache is None:
            recache = sample.recache and not any(cuts) and plain != self._plain()
        self.direct(now if self.index else texts, cuts, recache and self.index > 0)
        self._later = plain

    def direct(
        self,
        prompts: Sequence[str],
        cut: Sequence[bool] | None = None,
        recache: bool = False,
        toward: Sequence[str] = (),
        weights: Sequence[float] = (),
    ) -> None:
        """As `prompt`, of prompts as the model reads them: one a row, with prefixes or without.

        Args:
          toward, weights: of `Direction`, for the next chunk alone.
        """
        cut = (False,) * self.rows if cut is None else tuple(cut)
        if not any(weights):
            toward, weights = (), ()
        self._next = Direction(
            self.index, tuple(prompts), cut, recache, tuple(toward), tuple(weights)
        )
        self._later = self._next.prompts

    def adjust(
        self, *, steps: int | None = None, guidance: float | Sequence[float] | None = None
    ) -> None:
        """Sets the solver's steps, and the guidance, from the next chunk on; None: as it was.

        Args:
          steps: programs of a number that is new are compiled when the next chunk is made.
          guidance: of all rows, or of each.

        Raises:
          InputError: no such number of steps; guidance where `sample.guidance_scale` is 1.
        """
        sample = self.engine.cfg.sample
        if steps is not None:
            dataclasses.replace(sample, steps=steps)  # refuses what is no number of steps
            self._steps = steps if steps != sample.steps else None
        if guidance is not None:
            values = self._each(guidance, int | float)
            for value in values:
                dataclasses.replace(sample, guidance_scale=float(value))
            changed = any(value != sample.guidance_scale for value in values)
            if changed and not sample.guided:
                raise InputError(
                    f"session: guidance {values[0]:g} for a sampler without guidance, which makes "
                    "no pass under the negative prompt; give --config.sample.guidance_scale=3"
                )
            self._guidance = tuple(map(float, values)) if changed else ()

    @property
    def steps(self) -> int:
        """Of the solver, in the next chunk."""
        return self._steps or self.engine.cfg.sample.steps

    @property
    def guidance(self) -> tuple[float, ...]:
        """Of each row, in the next chunk."""
        return self._guidance or (self.engine.cfg.sample.guidance_scale,) * self.rows

    def follow(self, made: Direction) -> None:
        """Makes the next chunk under what another one was made under."""
        self._steps, self._guidance = made.steps, made.guidance
        cut, recache = (made.cut, made.recache) if made.chunk == self.index else (None, False)
        self.direct(made.prompts, cut, recache, made.toward, made.weights)

    def act(
        self,
        keys: Keys = (),
        mouse: tuple[float, float] = (0.0, 0.0),
        t: float | None = None,
        *,
        row: int | None = None,
    ) -> Accepted:
        """What is held from now on, and how far the mouse was moved since the last call.

        It acts in the next chunk whose cut-off is not before `t`; `Chunk.receipts` says in which,
        and from which picture. A model without commands stands still.

        Args:
          keys: W3C codes of the model's keys; or how far each is down, 0 to 1.
          mouse: degrees of pitch (up is positive) and yaw (right is positive).
          t: s, when this was so, on the clock of `step`'s `now`; None: now.
          row: of rows that are denoised together; None: all.

        Raises:
          InputError: keys or a mouse that the model does not have, or no action path.
        """
        return self._track().act(keys, mouse, time.monotonic() if t is None else t, row)

    def plan(self, actions: Sequence[Actions]) -> None:
        """The actions of each row's whole video; behind their end those of `act`.

        Raises:
          InputError: keys or a mouse that the model does not have, or no action path.
        """
        self._track().plan(actions)

    def record(self, row: int = 0) -> Actions:
        """The actions of all chunks so far, one row a picture: `plan` of it repeats them.

        Raises:
          InputError: no action path, or no chunk yet.
        """
        made = self._track().record(self.index, row)
        if self.landmarks is not None:
            made = dataclasses.replace(made, pose=self.landmarks.poses(row))
        return made

    def step(self, now: float | None = None) -> Chunk:
        """Makes the next chunk: of the past that the stream goes on from, or a new one.

        Its latents are dispatched; its frames when they are asked for, and the clean pass behind
        the last of them, or when the stream goes on. (With `Start.whole` all of it at once.)

        Args:
          now: s, the cut-off of its actions; None: when its first denoising pass is dispatched, by
            `time.monotonic`.

        Raises:
          InputError: there is no prompt yet, or no noise left.
        """
        if self._next is None:
            raise InputError("session: no prompt yet; call session.prompt(text) before step")
        carried = self.carried  # donated; what is left of the chunk before is dispatched here
        if self._on_host:
            self.to_device()
            carried = self._carried
        direction = dataclasses.replace(self._next, steps=self._steps, guidance=self._guidance)
        sampler, denoiser, params = self._sampler, self._denoiser(), self.engine.params
        cfg, start = self.engine.cfg, self.start
        past = draws.past(cfg, start, self.index)
        noise = (
            draws.noise(cfg, start, self.index) if past is None else jnp.asarray(past, jnp.float32)
        )
        inputs, receipts = self._inputs(direction, noise, now)
        state = self._remember(carried.stream, inputs, direction)
        committed = self.start.whole and past is None
        if committed:
            state, latents = denoiser.step(params, state, inputs)
        else:
            latents = inputs.noise if past is not None else denoiser.denoise(params, state, inputs)
        finite, largest = finite_lib.measure(latents)

        def finish(decoding):
            after = state if committed else sampler.commit(params, state, latents, inputs)
            if self.landmarks is not None:
                self.landmarks.keep(sampler, after, direction)
            self._carried, self._making = Carried(after, decoding), None

        decoder, pieces, decoding = self.engine.decoder, 0, iter(())
        if decoder is not None:
            pieces, decoding = decoder.pieces(latents), decoder(carried.decoding, latents)
        making = self._making = Making(pieces, decoding, finish)
        del carried, decoding
        if self.start.whole:
            making.finish()
        changes = any(direction.cut) or direction.recache
        if changes or not self.script or direction.lasting != self.script[-1].lasting:
            self.script.append(direction)
        self.index += 1
        self.direct(self._later)
        rows = {prompt: self._rows[prompt] for prompt in direction.prompts}
        cause = functools.partial(self.engine.cause, self.start, rows, self._negative)
        return Chunk(
            direction.chunk, Frames(making), latents, direction, finite, largest, cause, making,
            decoder, receipts,
        )  # fmt: skip

    def _remember(self, state, inputs, direction):
        """The state in which the next chunk is made: its past, under its prompt if need be."""
        sampler, params, landmarks = self._sampler, self.engine.params, self.landmarks
        if not self.index and self.start.references is not None:
            programs = memory.programs(sampler)
            given = programs.place(self.start.references, programs.reference_specs)
            state = programs.pin(params, state, inputs, given)
        if direction.recache:
            if landmarks is not None:
                state = landmarks.hide(sampler, state)
            state = sampler.recache(params, state, inputs)
        if landmarks is not None:
            state = landmarks.show(sampler, params, state, inputs, direction, self._track())
        return state

    def replay(self) -> Iterator[Chunk]:
        """The same stream once more, from its beginning to where this one stands."""
        again = Session(self.engine, self.texts, self.start)
        again._rows, again._negative = self._rows, self._negative
        if again.actions is not None and self.index:
            again.plan([self.record(row) for row in range(self.rows)])
        script = {direction.chunk: direction for direction in self.script}
        for index in range(self.index):
            again.follow(script.get(index) or again.script[-1])
            yield again.step()

    def copy(self) -> "Session":
        """A stream that goes its own way from here."""
        carried = self.carried  # all that is left of the last chunk is dispatched
        other = copy.copy(self)
        other.script, other._rows = list(self.script), dict(self._rows)
        other.actions = self.actions and self.actions.copy()
        other.landmarks = self.landmarks and self.landmarks.copy()
        other.carried = jax.tree.map(lambda x: x.copy(), carried)
        return other

    def to_host(self) -> None:
        """Moves what the stream carries to the host's memory; the next `step` moves it back."""
        self.carried, self._placed = jax.device_get(self.carried), None
        self._on_host = True

    def to_device(self) -> None:
        """Moves it back, to the engine's mesh."""
        specs = stream.state_specs(self._sampler.cfg)
        place = jax.tree.map(lambda spec: jax.NamedSharding(self.engine.mesh, spec), specs)
        decoding = self.carried.decoding
        if decoding is not None and self.engine.decoder is not None:
            there = mesh_lib.sharding(self.engine.decoder.mesh, vae_spec.SHARDED)
            decoding = jax.device_put(decoding, there)
        self.carried = Carried(jax.device_put(self.carried.stream, place), decoding)
        self._on_host = False

    def save(self, path: str | os.PathLike) -> None:
        """Writes the stream, in one step, to a file that `restore` reads on any mesh.

        Raises:
          InputError: nothing can be written there.
        """
        given = {name: getattr(self.start, name) for name in ARRAYS}
        arrays = {f"start/{name}": x for name, x in given.items() if x is not None}
        arrays |= {f"carried/{name}": x for name, x in saved.leaves(self.carried).items()}
        if self._negative is not None:
            arrays["negative"] = self._negative
        arrays |= {f"prompt/{i}": saved.trim(x) for i, x in enumerate(self._rows.values())}
        facts = {
            "settings": saved.settings(self.engine.cfg),
            "start": {k: v for k, v in vars(self.start).items() if k not in ARRAYS},
            "script": [dataclasses.asdict(d) for d in self.script],
            "index": self.index,
            "next": self._next and dataclasses.asdict(self._next),
            "later": self._later,
            "steps": self._steps,
            "guidance": self._guidance,
            "prompts": list(self._rows),
        }
        if self.actions is not None:
            facts["actions"], more = self.actions.saved()
            arrays |= {f"actions/{name}": x for name, x in more.items()}
        if self.landmarks is not None:
            facts["landmarks"], more = self.landmarks.saved()
            arrays |= {f"landmarks/{name}": x for name, x in more.items()}
        saved.write(path, facts, arrays)

    @classmethod
    def restore(cls, engine: Engine, texts: Texts, path: str | os.PathLike) -> "Session":
        """A stream that `save` wrote, on the engine's mesh.

        Raises:
          InputError: no such file, a damaged one, or one of other settings than the engine's.
        """
        facts, arrays = saved.read(path)
        folders.check_settings(os.fspath(path), facts["settings"], saved.settings(engine.cfg))
        given = {name: arrays.get(f"start/{name}") for name in ARRAYS}
        samples = tuple(facts["start"]["samples"])
        start = dataclasses.replace(Start(**facts["start"]), samples=samples, **given)
        session = cls(engine, texts, start)
        session.index = facts["index"]
        session.script = [Direction.read(fields) for fields in facts["script"]]
        session._next = facts["next"] and Direction.read(facts["next"])
        session._later = tuple(facts["later"])
        session._steps, session._guidance = facts.get("steps"), tuple(facts.get("guidance", ()))
        session._negative = arrays.get("negative")
        if session.actions is not None:
            session.actions.restore(facts["actions"], saved.below("actions/", arrays))
        for i, prompt in enumerate(facts["prompts"]):
            row = arrays[f"prompt/{i}"]
            rest = engine.cfg.model.text_len - len(row)
            session._rows[prompt] = np.pad(row, ((0, rest), (0, 0)))
        decodes = engine.decoder is not None and session.index > 0
        if not decodes:
            arrays = {k: x for k, x in arrays.items() if not k.startswith("carried/decoding")}
        like = jax.eval_shape(lambda: session._like(decodes))
        session.carried = saved.tree(path, like, "carried/", arrays)
        if session.landmarks is not None:
            own = saved.below("landmarks/", arrays)
            session.landmarks.restore(path, facts["landmarks"], own, like.stream)
        session.to_device()
        return session

    def _like(self, decodes):
        """What a stream carries in its beginning; `decodes`: with the decoder's state."""
        cfg, size = self._sampler.cfg, (self.rows, self.start.height, self.start.width)
        state = stream.init_state(cfg, *size)
        if not decodes:
            return Carried(state)
        return Carried(state, vae.init_decode_state(cfg.vae, *size, cfg.compute_dtype))

    def _current(self):
        """The prompts that the last chunk was made under."""
        return self.script[-1].prompts if self.script else None

    def _plain(self):
        prefix = self.engine.cfg.sample.scene_cut_prefix
        return tuple(t.removeprefix(prefix).strip() for t in self._current() or ())

    def _each(self, value: Any, kind: Any) -> tuple[Any, ...]:
        """`value` of each row."""
        values = (value,) * self.rows if isinstance(value, kind) else tuple(value)
        if len(values) != self.rows:
            raise InputError(
                f"session: {len(values)} values for {self.rows} rows; give one for all, or as many"
            )
        return values

    def _track(self):
        if self.actions is None:
            raise InputError(
                "session: actions for a model without an action path (actions.kind='none'); take "
                "a config and a checkpoint that has one"
            )
        return self.actions

    def _inputs(self, direction, noise, now):
        """What the sampler is given, and the receipts of the actions in it."""
        placed = self._placed
        if placed is None or placed[0] != direction.text:
            placed = direction.text, *self._embed(*direction.text)
        first, given, receipts = self.start.first_frame, None, ()
        if self.actions is not None:
            cut_off = time.monotonic() if now is None else now
            made, receipts = self.actions.take(self.index, cut_off)
            given = {name: jnp.asarray(x) for name, x in made.items()}
        inputs = self._sampler.place(
            stream.ChunkInput(
                noise=noise,
                text=placed[1],
                cut=jnp.asarray(direction.cut),
                negative=placed[2],
                first_frame=None if first is None else jnp.asarray(first, jnp.float32),
                renoise=draws.renoise(self.engine.cfg, self.start, self.index, self.steps),
                actions=given,
                guidance=self._scales(),
            )
        )
        self._placed = direction.text, inputs.text, inputs.negative
        return inputs, receipts

    def _embed(self, prompts, toward, weights) -> tuple[Any, Any]:
        """Embeddings of each row, and of the negative prompt, in compute dtype."""
        if new := [p for p in dict.fromkeys(prompts + toward) if p not in self._rows]:
            self._rows.update(zip(new, self.texts(new)))
        dtype = self.engine.cfg.compute_dtype
        text = np.stack([self._rows[prompt] for prompt in prompts])
        if toward:
            there = np.stack([self._rows[prompt] for prompt in toward]).astype(np.float32)
            share = np.asarray(weights, np.float32)[:, None, None]
            text = (1 - share) * text.astype(np.float32) + share * there
        text = text.astype(dtype)
        if not self.engine.cfg.sample.guided:
            return text, None
        if self._negative is None:
            self._negative = self.texts.negative
        assert self._negative is not None
        return text, np.broadcast_to(self._negative, text.shape).astype(dtype)

    def _denoiser(self):
        if self.steps == self.engine.cfg.sample.steps:
            return self._sampler
        return self.engine.sampler(self.start.first_frame is not None, self.steps)

    def _scales(self):
        return jnp.asarray(self.guidance, jnp.float32) if self.engine.cfg.sample.guided else None
