"""The networks of a checkpoint on a mesh: videos from shots, and streams to direct."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks, quantized
from longlive_jax.errors import InputError
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.prompts import actions as actions_lib
from longlive_jax.prompts import embeddings, pictures, shots
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.sampling import batches as batches_lib
from longlive_jax.sampling import finite, memory, render, stream
from longlive_jax.sampling.batches import Batch
from longlive_jax.sampling.decode import Decoder
from longlive_jax.sampling.session import Chunk, Engine, Session, Start, Texts


class Pipeline:
    """What samples from a checkpoint. Networks are read when they are first needed, and stay.

    Args:
      checkpoint: made by launch.convert or launch.train.
      mesh: default: that of the config.
      vae_mesh: where the VAE runs; default: the same mesh.
      weights: of a training run, the moving "average" or the "latest".
      decodes: without, chunks have latents and no frames, and the VAE is not read for them.

    Raises:
      InputError: from the constructor a mesh that the machine has no devices for; from a network's
        first use a checkpoint that lacks it, or does not fit the config.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | None,
        cfg: config_lib.Config,
        mesh: jax.sharding.Mesh | None = None,
        *,
        vae_mesh: jax.sharding.Mesh | None = None,
        weights: str = "average",
        decodes: bool = True,
    ):
        self.checkpoint = os.fspath(checkpoint) if checkpoint else None
        self.cfg, self.weights, self.decodes = cfg, weights, decodes
        self.mesh = mesh_lib.make_mesh(cfg.mesh) if mesh is None else mesh
        self.vae_mesh = self.mesh if vae_mesh is None else vae_mesh

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike,
        cfg: config_lib.Config | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> "Pipeline":
        """A pipeline, checked before any weight is read.

        Args:
          cfg: default: the networks' settings that the checkpoint keeps, and defaults for the rest.
          overrides: settings by "section.key".
          options: of `Pipeline`.

        Raises:
          InputError: no checkpoint there, or one that does not fit the config, or no devices.
        """
        stored = {} if cfg is not None else networks.stored_config(os.fspath(checkpoint))
        cfg = config_lib.with_overrides(cfg or config_lib.Config(), stored | dict(overrides or {}))
        pipeline = cls(checkpoint, cfg, **options)
        pipeline.check()
        return pipeline

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.cfg.video.height, self.cfg.video.width

    def check(self, batches: Sequence[Batch] = (), text: bool = True, pictured: bool = False):
        """Refuses a checkpoint, or a mesh, that a run would stumble over later.

        Args:
          batches: videos to make. text: of prompts. pictured: from images, or a video.
        """
        cfg = self.cfg
        finite.warn_of_guidance(cfg)
        if text:
            networks.read_tokenizer(self.checkpoint, cfg)
        networks.check(self.checkpoint, "dit", cfg, quantized=True)
        needed = (networks.DECODER if self.decodes else ()) + (networks.ENCODER if pictured else ())
        if not needed:
            return
        networks.check(self.checkpoint, "vae", cfg, needed)
        if cfg.vae.z_dim != cfg.model.in_dim:
            raise InputError(
                f"config: vae.z_dim={cfg.vae.z_dim} must equal model.in_dim={cfg.model.in_dim}: "
                "the VAE decodes what the transformer makes"
            )
        for batch in batches:
            try:
                check_mesh(self.vae_mesh, len(batch.videos), batch.width)
            except InputError as error:
                raise InputError(
                    f"{error}; or give the VAE a device of its own, --vae_device=0"
                ) from error

    @functools.cached_property
    def texts(self) -> PromptEncoder:
        """The text encoder, for prompts that are not known yet."""
        return self._encoder()

    def _encoder(self):
        tokenizer = networks.read_tokenizer(self.checkpoint, self.cfg)
        params = networks.load(self.checkpoint, "umt5", self.cfg, self.mesh, weights=self.weights)
        return PromptEncoder(self.cfg, params, tokenizer)

    def embed(self, prompts: Sequence[str], guided: bool | None = None) -> embeddings.Embeddings:
        """Embeddings of all prompts of a run.

        The text encoder is there during the call only, unless `texts` has it: it would take as much
        memory as the transformer.

        Args:
          guided: also of the negative prompt; None: if the config has guidance.
        """
        texts = vars(self).get("texts") or self._encoder()
        return texts.all(prompts, self.cfg.sample.guided if guided is None else guided)

    @functools.cached_property
    def engine(self) -> Engine:
        """The transformer and the VAE's decoder."""
        cfg = self.cfg
        params = networks.load(
            self.checkpoint, "dit", cfg, self.mesh, quantized=True, weights=self.weights
        )
        params = stream.sampler(cfg, self.mesh).prepare(params)
        params = quantized.check(params, f"--checkpoint={self.checkpoint}")
        decoder = None
        if self.decodes:
            vae = networks.load(self.checkpoint, "vae", cfg, self.vae_mesh, networks.DECODER)
            decoder = Decoder(cfg, vae, self.vae_mesh)
        return Engine(cfg, self.mesh, params, decoder)

    def videos(
        self,
        path: str | os.PathLike | Sequence[Mapping[str, Any]],
        chunks: int | None = None,
        chunks_per_shot: int = 0,
    ) -> list[shots.Video]:
        """The videos that `shots.read` finds; `chunks`: in place of sample.chunks."""
        return shots.read(
            path,
            chunks=chunks or self.cfg.sample.chunks,
            chunk_frames=self.cfg.model.chunk_frames,
            scene_cut_prefix=self.cfg.sample.scene_cut_prefix,
            chunks_per_shot=chunks_per_shot,
        )

    def acting(
        self,
        batches: Sequence[Batch],
        given: actions_lib.Given | None = None,
        clip: pictures.Clip | None = None,
    ) -> list[Batch]:
        """The batches with the actions of their videos, if the model has an action path.

        Args:
          given: for all videos, in place of their own: a sidecar or a line of text.
          clip: that they go on from; its own actions are in the sidecar beside it.

        Raises:
          InputError: actions that do not fit, or none for a model that has the path, and the other
            way round; as `prompts.actions.of_video`.
        """
        cfg, own = self.cfg, self.cfg.model.actions
        for batch in batches:
            actions_lib.check(cfg, batch.videos, given)
        if own.kind == "none":
            return list(batches)
        past = clip and actions_lib.of_clip(clip.path, clip.length, clip.count, own)
        return [
            dataclasses.replace(
                batch,
                actions=[actions_lib.of_video(cfg, one, given, past) for one in batch.videos],
            )
            for batch in batches
        ]

    def encoded(
        self,
        batches: Sequence[Batch],
        clip: pictures.Clip | None = None,
        references: Sequence[str | os.PathLike] = (),
    ) -> list[Batch]:
        """The batches with their images, or with the video that they go on from, as latents.

        Args:
          references: images that every chunk of all videos sees, `memory.references` at most.

        Raises:
          InputError: more references than that, or images that cannot be read.
        """
        if clip is None and not references and not any(batch.pictured for batch in batches):
            return list(batches)
        memory.check_references(self.cfg, len(references))
        vae = networks.load(self.checkpoint, "vae", self.cfg, self.vae_mesh, networks.ENCODER)
        if references:
            own = pictures.references(self.cfg, vae, self.vae_mesh, references, batches[0].pixels)
            batches = [batch.referring(own) for batch in batches]
        if clip is not None:
            prefix = clip.encode(self.cfg, vae, self.vae_mesh)
            return [batch.continuing(prefix) for batch in batches]
        return [b.with_images(self.cfg, vae, self.vae_mesh) if b.pictured else b for b in batches]

    def render(self, batch: Batch, texts: Texts, seed: int = 0) -> Iterator[Chunk]:
        """The chunks of a batch of videos, each yielded when the next one is under way.

        None has been waited for: `Chunk.check` waits, and refuses frames that must not be shown.
        Where the caller does not, the chunk is checked when the next one is asked for.

        Raises:
          NotFiniteError: the last chunk that was given has numbers that are not finite.
        """
        return _checked(render.render(self.engine, texts, batch, seed))

    def generate(
        self,
        path: str | os.PathLike | Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        actions: actions_lib.Given | None = None,
        references: Sequence[str | os.PathLike] = (),
    ) -> Iterator[Chunk]:
        """The chunks of one video, from its first to its last.

        Args:
          path: a file of shots, or the list that such a file holds: see docs/sampling.md.
          seed: default: that of a stream's script, else 0.
          actions: for a model with an action path, a sidecar or a line of text; default: those of
            the shots.
          references: images that every chunk sees, `memory.references` at most.

        Raises:
          InputError: shots that cannot be read, or several videos in place of one.
          NotFiniteError: from the iterator, as `render`.
        """
        videos = self.videos(path)
        if len(videos) > 1:
            raise InputError(f"{path}: {len(videos)} videos; give the shots of one at a time")
        batches = self.acting(batches_lib.make(self.cfg, videos), actions)
        texts = self.embed(embeddings.distinct(videos))
        if seed is None:
            seed = int((videos[0].script or {}).get("seed", 0))
        return self.render(self.encoded(batches, references=references)[0], texts, seed)

    def session(
        self,
        *,
        seed: int = 0,
        image: str | os.PathLike | None = None,
        references: Sequence[str | os.PathLike] = (),
        rows: int = 1,
    ) -> Session:
        """A stream of the config's size, to be directed while it is made.

        Args:
          image: its first frame.
          references: images that every chunk sees, `memory.references` at most.
          rows: how many streams are denoised together, with one prompt each.

        Raises:
          InputError: more references than that, or images that cannot be read.
        """
        cfg = self.cfg
        memory.check_references(cfg, len(references))
        first = pinned = None
        if image is not None or references:
            vae = networks.load(self.checkpoint, "vae", cfg, self.vae_mesh, networks.ENCODER)
            size = cfg, vae, self.vae_mesh
            if image is not None:
                first = pictures.first_frames(*size, [image] * rows, self.pixels)
            if references:
                pinned = pictures.references(*size, references, self.pixels)
                pinned = np.stack([pinned] * rows)
        height, width = cfg.video.latent_size
        start = Start(
            height=height, width=width, seed=seed, samples=tuple(range(rows)), first_frame=first,
            references=pinned,
        )  # fmt: skip
        return Session(self.engine, self.texts, start)

    def restore(self, path: str | os.PathLike) -> Session:
        """A stream that `Session.save` wrote, on any machine, of these networks and settings.

        Raises:
          InputError: no such file, a damaged one, or one of other settings.
        """
        return Session.restore(self.engine, self.texts, path)


def _checked(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        chunk.check()


def vae_mesh(mesh: jax.sharding.Mesh, device: int | None) -> jax.sharding.Mesh:
    """The sampler's mesh, or a mesh of `device` alone (`--vae_device`)."""
    if device is None:
        return mesh
    devices = jax.devices()
    if not 0 <= device < len(devices):
        raise InputError(
            f"--vae_device={device}: must be 0 to {len(devices) - 1}, the devices there are; leave "
            "it out to share the sampler's"
        )
    return mesh_lib.make_mesh(config_lib.Mesh(), devices[device : device + 1])
