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
from longlive_jax.sampling.session import Engine, Session, Start
from longlive_jax.serving import keys, video_out


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
            "guidance": self.cfg.sample.guidance_scale,
            "actions": keys.describe(self.cfg.model.actions), "prompts": list(self.prompts),
        }  # fmt: skip

    def configured(self, steps: int) -> config_lib.Config:
        sample = dataclasses.replace(self.cfg.sample, steps=steps)
        return dataclasses.replace(self.cfg, sample=sample)

    def begin(self, seed: int, steps: int, given: tuple[str, pathlib.Path] | None) -> Session:
        """A stream. `given`: "image" or "clip", and the .npy of its frames, uint8 [f, h, w, 3]."""
        engine = self.pipeline.engine
        if steps != self.cfg.sample.steps:
            engine = Engine(self.configured(steps), engine.mesh, engine.params, engine.decoder)
        height, width = self.cfg.video.latent_size
        latents = {}
        if given is not None:
            kind, path = given
            latents["first_frame" if kind == "image" else "past"] = self._encode(path)
        start = Start(height=height, width=width, seed=seed, **latents)
        return Session(engine, self.pipeline.texts, start)

    def _encode(self, path: pathlib.Path) -> np.ndarray:
        mesh, frames = self.pipeline.vae_mesh, np.load(path, allow_pickle=False)

        def read(first, last):
            return to_float(frames[None, first:last])

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
            session = self.begin(0, steps, None)
            for index in range(3):
                session.prompt(prompt, recache=index == 2)
                session.step().check()
