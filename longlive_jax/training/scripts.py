"""Scripts of videos for distillation: prompts alone, or those of cached training data."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data import records
from longlive_jax.data.source import Health, Sample, Source
from longlive_jax.errors import InputError
from longlive_jax.files import remote
from longlive_jax.files.names import as_bytes
from longlive_jax.files.remote import AnyPath
from longlive_jax.prompts import shots
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.prompts.walks import Walks
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import prefetch
from longlive_jax.training.batch import Scripts


def open_source(cfg: config_lib.Config) -> tuple[Source, str]:
    """What data.path holds, and what tells it from other data: cached training data, or prompts in
    any form that launch.sample reads.

    Raises:
      InputError: nothing there, or it does not fit the config.
    """
    if cfg.data.cached:
        # Records check themselves against a training config.
        train = dataclasses.replace(
            cfg.train, latent_frames=cfg.distill.latent_frames, text_encoder=False
        )
        source = records.Records(cfg.data.path, dataclasses.replace(cfg, train=train))
        content = remote.join(cfg.data.path, records.MANIFEST).read_bytes()
    else:
        if cfg.video.image_to_video:
            raise InputError(
                "config: video.image_to_video=True distils from first frames, which prompts alone "
                "have not; encode videos with python -m launch.encode_dataset, and give "
                "--config.data.cached=True"
            )
        if not cfg.data.path:
            raise InputError("config: data.path is missing; give prompts, or cached training data")
        source = Prompts(cfg)
        content = as_bytes(repr(source.videos) + source.driven_by)
    return source, f"{len(source)} records, {hashlib.sha256(content).hexdigest()[:16]}"


class Prompts:
    """A `Source` of scripts: each video of data.path is a record, as long as a rollout.

    A longer one is cut, and the last prompt of a shorter one goes on. For a model with an action
    path they are driven as `prompts.walks` says.

    Attributes:
      driven_by: names of the sidecars.
    """

    def __init__(self, cfg: config_lib.Config):
        self._chunks = cfg.distill.latent_frames // cfg.model.chunk_frames
        self._latents = cfg.distill.latent_frames
        self._prefix = cfg.sample.scene_cut_prefix
        self.videos = shots.read(
            cfg.data.path, chunks=self._chunks, chunk_frames=cfg.model.chunk_frames,
            scene_cut_prefix=cfg.sample.scene_cut_prefix,
        )  # fmt: skip
        acts = cfg.model.actions.kind != "none"
        self._walks = Walks(cfg, cfg.data.path, self.videos) if acts else None
        files = self._walks.files if self._walks else {}
        self.driven_by = "".join(file.name for found in files.values() for file in found)

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, index: int, key: int) -> Sample:
        """The prompts of video `index`; its actions alone are random."""
        video = self.videos[index]
        prompts = [chunk.prompt for chunk in video.chunks[: self._chunks]]
        plain = prompts[-1].removeprefix(self._prefix)
        prompts += [plain] * (self._chunks - len(prompts))
        actions = None
        if self._walks is not None:
            actions = self._walks.rows(video, self._latents, np.random.default_rng(key))
        return Sample(video.name, tuple(prompts), self._chunks, actions=actions)


class Prefetcher(prefetch.Prefetcher):
    """Yields (Scripts, names) of each of `steps`, as `batch.abstract_scripts` says.

    Args:
      encoder: of prompts; None: samples have their embeddings.
      failures: the file that lists what could not be read.
    """

    def __init__(
        self, cfg: config_lib.Config, mesh: jax.sharding.Mesh, source: Source,
        encoder: PromptEncoder | None, failures: AnyPath, steps: range,
    ):  # fmt: skip
        self._cfg, self._encoder = cfg, encoder
        self._like = batch_lib.abstract_scripts(cfg, mesh)
        health = Health(cfg.data.max_bad_share, failures)
        workers = cfg.data.workers if cfg.data.cached else 0  # prompts are in memory
        super().__init__(self._like.cut, source, cfg.distill.seed, workers, health, steps)

    def build(self, samples: Mapping[int, Sample]) -> Scripts:
        like, place = self._like, functools.partial(prefetch.place, samples)
        return Scripts(
            text=place(like.text, prefetch.texts(samples, self._encoder)),
            cut=place(like.cut, self._cuts),
            first_frame=None if like.first_frame is None else place(like.first_frame, _first),
            actions=prefetch.actions(self._cfg.model, like.actions, samples),
        )

    def _cuts(self, sample):
        """A cut reaches the model as a prefix; at the start of a video it means nothing."""
        prefix = self._cfg.sample.scene_cut_prefix
        cuts = [bool(prefix) and prompt.startswith(prefix) for prompt in sample.prompts]
        return np.asarray([False, *cuts[1:]])


def _first(sample):
    assert sample.latents is not None
    return np.asarray(sample.latents[:1], np.float32)
