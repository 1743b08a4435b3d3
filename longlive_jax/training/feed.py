"""From videos to a step's batches on the mesh."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.data import records
from longlive_jax.data.clips import VideoFolder, sample_folders
from longlive_jax.data.images import to_float
from longlive_jax.data.source import Health, Sample, Source
from longlive_jax.errors import InputError
from longlive_jax.files import remote
from longlive_jax.files.names import as_bytes
from longlive_jax.files.remote import AnyPath
from longlive_jax.models import vae
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import prefetch
from longlive_jax.training.batch import Batch

HALO = 28  # latents before its own that an encoder sees: all that the first of its own depends on


def open_source(cfg: config_lib.Config) -> tuple[Source, str]:
    """What the config's data.path holds, and what tells it from other data, wherever it lies.

    Raises:
      InputError: nothing there, or it does not fit the config.
    """
    if cfg.data.cached:
        source = records.Records(cfg.data.path, cfg)
        content = remote.join(cfg.data.path, records.MANIFEST).read_bytes()
    else:
        source = VideoFolder(cfg)
        names = [path.name for path in sample_folders(pathlib.Path(cfg.data.path) / "video")]
        content = as_bytes("\n".join(names))
    return source, f"{len(source)} records, {hashlib.sha256(content).hexdigest()[:16]}"


class Encoders(NamedTuple):
    """What turns pictures and prompts into a batch; None what the config does not need.

    vae: parameters of the encoder, in compute dtype, whole on every device of the mesh.
    texts: prompts to embeddings. tokenizer: for a text encoder that is trained.
    """

    vae: params_lib.Tree | None = None
    texts: PromptEncoder | None = None
    tokenizer: Tokenizer | None = None


class Prefetcher(prefetch.Prefetcher):
    """Yields (Batch, names) of each of `steps`, as `batch.abstract` says.

    Args:
      failures: the file that lists what could not be read.
    """

    def __init__(
        self,
        cfg: config_lib.Config,
        mesh: jax.sharding.Mesh,
        source: Source,
        encoders: Encoders,
        failures: AnyPath,
        steps: range,
    ):
        self._cfg, self._encoders = cfg, encoders
        self._like = like = batch_lib.abstract(cfg, mesh)
        self._pictures = picture_abstract(cfg, like) if encoders.vae is not None else None
        self._encode = make_encode(cfg, mesh) if encoders.vae is not None else None
        health = Health(cfg.data.max_bad_share, failures)
        super().__init__(like.valid, source, cfg.train.seed, cfg.data.workers, health, steps)

    def finish(self, batch: Batch) -> Batch:
        if self._encode is None:
            return batch
        return batch.replace(latents=self._encode(self._encoders.vae, batch.latents))

    def build(self, samples: Mapping[int, Sample]) -> Batch:
        like, place = self._like, functools.partial(prefetch.place, samples)
        latents = (
            place(like.latents, functools.partial(_latents, like.latents))
            if self._pictures is None
            else place(self._pictures, functools.partial(_window, self._cfg, self._pictures))
        )
        chunks = like.valid.shape[2]
        return Batch(
            latents=latents,
            valid=place(like.valid, lambda sample: np.arange(chunks) < sample.chunks),
            actions=prefetch.actions(self._cfg.model, like.actions, samples),
            **self._text(samples, place),
        )

    def _text(self, samples: Mapping[int, Sample], place: Callable) -> dict[str, Any]:
        """Embeddings of the batch's prompts, or their tokens: ids and mask."""
        like, cfg = self._like, self._cfg
        if cfg.train.text_encoder:
            prompts = {id(s): s.prompts for s in samples.values()}
            assert self._encoders.tokenizer is not None
            read = functools.partial(self._encoders.tokenizer, text_len=cfg.model.text_len)
            pairs = {key: read(texts) for key, texts in prompts.items()}
            return {
                "ids": place(like.ids, lambda sample: pairs[id(sample)][0]),
                "mask": place(like.mask, lambda sample: pairs[id(sample)][1]),
            }
        return {"text": place(like.text, prefetch.texts(samples, self._encoders.texts))}


def _latents(like: prefetch.Like, sample: Sample) -> np.ndarray:
    assert sample.latents is not None
    shape = like.shape[2:]
    wanted = (shape[0] * shape[1], *shape[2:])
    if sample.latents.shape != wanted:
        raise InputError(
            f"data: {sample.name}: latents of shape {sample.latents.shape}, the config says "
            f"{wanted}; encode the data again"
        )
    return sample.latents.reshape(shape)


# Pictures to latents on the mesh.


def picture_abstract(cfg: config_lib.Config, like: Batch) -> jax.ShapeDtypeStruct:
    """Of the pictures that `make_encode` takes, uint8 [accumulation, batch, rank, frame, height,
    width, 3]: with data.encode="halo" each rank of `seq` has a window of its own, with "width" a
    share of the width.
    """
    assert isinstance(like.latents.sharding, jax.NamedSharding)
    mesh, ranks, latents = like.latents.sharding.mesh, 1, cfg.train.latent_frames
    if cfg.data.encode == "halo":
        ranks = mesh.shape[mesh_lib.SEQ]
        latents = window(cfg, ranks)[0]
    frames = 1 + (latents - 1) * config_lib.TEMPORAL_COMPRESSION
    return jax.ShapeDtypeStruct(
        (*like.latents.shape[:2], ranks, frames, cfg.video.height, cfg.video.width, 3),
        jnp.uint8,
        sharding=jax.NamedSharding(mesh, _pictures(cfg)),
    )


def _pictures(cfg) -> jax.P:
    halo = cfg.data.encode == "halo"
    spread = ("chunk", None, None, None) if halo else (None, None, None, "width")
    return jax.P(None, *mesh_lib.spec(("batch", *spread, None)))


def window(cfg: config_lib.Config, ranks: int) -> tuple[int, list[int]]:
    """How many latents each of `ranks` encodes of a video, and which one is the first it does.

    Its own, the HALO before them, and one more: a window that begins inside the video begins with
    the last frame of a latent, which encoded alone is none, but puts the groups of four frames
    after it where they are in the whole video.
    """
    own = cfg.train.latent_frames // ranks
    count = min(cfg.train.latent_frames, HALO + 1 + own)
    return count, [max(0, rank * own - HALO - 1) for rank in range(ranks)]


def _window(cfg: config_lib.Config, like: jax.ShapeDtypeStruct, sample: Sample) -> "_Windows":
    assert sample.frames is not None
    ranks, frames = like.shape[2:4]
    starts = window(cfg, ranks)[1] if cfg.data.encode == "halo" else [0]
    return _Windows(sample.frames, [config_lib.TEMPORAL_COMPRESSION * s for s in starts], frames)


class _Windows(NamedTuple):
    """[rank, frame, ...] of a video, without a copy of it: windows overlap."""

    frames: np.ndarray
    starts: Sequence[int]
    length: int

    def __getitem__(self, index):
        ranks, *rest = index
        starts = self.starts[ranks]
        return np.stack([self.frames[s : s + self.length][tuple(rest)] for s in starts])


def make_encode(cfg: config_lib.Config, mesh: jax.sharding.Mesh):
    """(params, pictures) -> latents [accumulation, batch, chunk, frame, h, w, channel], compiled.

    With data.encode="width" the devices of `seq` encode a video together, and exchange columns;
    with "halo" each encodes its own chunks and what they depend on, and nothing is exchanged. One
    batch after the other, so that memory does not depend on train.accumulation.
    """
    dtype, seq = cfg.compute_dtype, mesh.shape[mesh_lib.SEQ]
    # By a table: XLA would turn the division by 127.5 into a product, which rounds otherwise.
    table = to_float(np.arange(256, dtype=np.uint8)).astype(dtype)
    own = cfg.train.latent_frames // seq
    starts = window(cfg, seq)[1]

    def encode(params, pictures, axis):
        pixels = jnp.asarray(table)[pictures[:, 0]]
        return vae.encode_video(params, cfg.vae, pixels, cfg.sample.vae_latents_per_call, axis)

    def width(params, pictures):
        latents = encode(params, pictures, mesh_lib.SEQ)
        return jax.lax.all_to_all(latents, mesh_lib.SEQ, split_axis=1, concat_axis=3, tiled=True)

    def halo(params, pictures):
        rank = jax.lax.axis_index(mesh_lib.SEQ)
        first = rank * own - jnp.asarray(starts, jnp.int32)[rank]
        return jax.lax.dynamic_slice_in_dim(encode(params, pictures, None), first, own, axis=1)

    one = halo if cfg.data.encode == "halo" else width

    def local(params, pictures):
        latents = jax.lax.map(functools.partial(one, params), pictures)
        chunked = (*latents.shape[:2], -1, cfg.model.chunk_frames, *latents.shape[3:])
        return latents.reshape(chunked)

    latents = jax.P(None, *mesh_lib.spec(("batch", "chunk", None, None, None, None)))
    # Nothing is differentiated, so varying-axes types have nothing to check.
    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(jax.P(), _pictures(cfg)), out_specs=latents, check_vma=False
        )
    )
