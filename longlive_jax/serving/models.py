"""What a server streams: networks with a name, and how a stream of them begins."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import networks
from longlive_jax.data.images import to_float
from longlive_jax.pipeline import Pipeline
from longlive_jax.prompts import pictures
from longlive_jax.sampling.session import Session, Start
from longlive_jax.serving import keys, video_out
from longlive_jax.serving.limits import Refused

GUIDANCE = 30  # that a stream may ask for; usual are 1 to 10


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A pipeline to stream from.

    prompts: examples.
    steps: of the solver, that a stream may ask for; each is compiled at the start.
    """

    name: str
    title: str
    pipeline: Pipeline
    prompts: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def cfg(self) -> config_lib.Config:
        return self.pipeline.cfg

    @property
    def kind(self) -> str:
        """ "film", directed by prompts, or "world", by keys too."""
        return "film" if self.cfg.model.actions.kind == "none" else "world"

    @property
    def pictures(self) -> int:
        """Of a chunk, but for a video's first, which has three less."""
        return self.cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION

    @property
    def playing_s(self) -> float:
        """How long a chunk plays."""
        return self.pictures / config_lib.FRAMES_PER_SECOND

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of steps."""
        return tuple(dict.fromkeys((self.cfg.sample.steps, *self.steps)))

    @functools.cached_property
    def codec(self) -> str:
        return video_out.codec(*self.pipeline.pixels)

    def info(self) -> dict[str, Any]:
        """What a page shows of it."""
        height, width = self.pipeline.pixels
        return {
            "name": self.name, "title": self.title, "kind": self.kind, "height": height,
            "width": width, "fps": config_lib.FRAMES_PER_SECOND, "chunk_frames": self.pictures,
            "steps": self.cfg.sample.steps, "steps_choices": list(self.choices),
            "guidance": self.cfg.sample.guidance_scale, "guided": self.cfg.sample.guided,
            "actions": keys.describe(self.cfg.model.actions), "prompts": list(self.prompts),
        }  # fmt: skip

    def check(self, steps: object = None, guidance: object = None) -> None:
        """Steps and guidance that a stream asks for; None: none.

        Raises:
          Refused: steps that are not compiled, guidance where the server samples without.
        """
        if steps is not None and (type(steps) is not int or steps not in self.choices):
            raise Refused(
                400, f"steps must be one of {', '.join(map(str, self.choices))}, which this server "
                "has compiled (--steps)",
            )  # fmt: skip
        own = self.cfg.sample.guidance_scale
        if guidance is None or guidance == own:
            return
        if not self.cfg.sample.guided:
            raise Refused(
                400, f"guidance is {own:g} on this server, which makes no pass under the negative "
                "prompt; start it with --config.sample.guidance_scale=3, say",
            )  # fmt: skip
        number = guidance if isinstance(guidance, int | float) else -1
        if isinstance(guidance, bool) or not 0 <= number <= GUIDANCE:
            raise Refused(400, f"guidance must be a number from 0 to {GUIDANCE}")

    def begin(
        self, seed: int, given: tuple[str, pathlib.Path] | None = None, *,
        steps: int | None = None, guidance: float | None = None,
    ) -> Session:  # fmt: skip
        """A stream. `given`: "image" or "clip", and the .npy of its frames, uint8 [f, h, w, 3]."""
        engine = self.pipeline.engine
        height, width = self.cfg.video.latent_size
        latents = {}
        if given is not None:
            kind, path = given
            latents["first_frame" if kind == "image" else "past"] = self._encode(path)
        start = Start(height=height, width=width, seed=seed, **latents)
        session = Session(engine, self.pipeline.texts, start)
        session.adjust(steps=steps, guidance=guidance)
        return session

    def _encode(self, path: pathlib.Path) -> np.ndarray:
        mesh = self.pipeline.vae_mesh
        frames = np.load(path, mmap_mode="r", allow_pickle=False)

        def read(first, last):
            return to_float(np.asarray(frames[None, first:last]))

        return pictures.encode(self.cfg, self._encoder, mesh, read, len(frames))

    @functools.cached_property
    def _encoder(self):
        pipeline = self.pipeline
        return networks.load(
            pipeline.checkpoint, "vae", self.cfg, pipeline.vae_mesh, networks.ENCODER
        )

    def warm(self) -> None:
        """Compiles all that a stream of prompts needs."""
        prompt = self.prompts[0] if self.prompts else "a picture"
        for steps in self.choices:
            session = self.begin(0, steps=steps)
            for index in range(3):
                session.prompt(prompt, recache=index == 2)
                session.step().check()
