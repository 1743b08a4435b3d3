"""Embeddings of the prompts of videos."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import narrow
from longlive_jax.prompts.shots import Chunk, Video


class Embeddings:
    """Embeddings of a run's prompts, all of them made before.

    Args:
      rows: [prompt, text_len, text_dim], those of `prompts`.
      negative: [text_len, text_dim] of the negative prompt, or None without guidance.
    """

    def __init__(self, prompts: Sequence[str], rows: np.ndarray, negative: np.ndarray | None):
        self._rows, self.negative = dict(zip(prompts, rows, strict=True)), negative

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompt, text_len, text_dim]."""
        return np.stack([self._rows[prompt] for prompt in prompts])


def distinct(videos: Iterable[Video]) -> list[str]:
    """The prompts of videos, each once, however many chunks use it."""
    chunks = [chunk for video in videos for chunk in video.chunks]
    return list(dict.fromkeys(p for c in chunks for p in (c.prompt, c.toward) if p))


def from_embeddings(
    arrays: Mapping[str, np.ndarray], cfg: config_lib.Config, chunks: int | None
) -> tuple[Video, Embeddings]:
    """A video from `ctx` [chunk, token, dim] and, if there, `cut` [chunk], `neg` [1, token, dim].

    Args:
      chunks: how many the video has; None: as many as there are embeddings.

    Raises:
      InputError: shapes that do not fit the config, numbers that are infinite in its compute dtype,
        fewer embeddings than chunks, or no `neg` where guidance needs it.
    """
    rows = _pad(arrays["ctx"], cfg, "ctx")
    cut = arrays.get("cut", np.zeros(len(rows), bool))
    if cut.shape != rows.shape[:1]:
        raise InputError(
            f"prompt embeddings: cut of shape {cut.shape} must have one entry for each of the "
            f"{len(rows)} rows of ctx"
        )
    chunks = len(rows) if chunks is None else chunks
    if chunks > len(rows) or not chunks:
        raise InputError(
            f"prompt embeddings: {len(rows)} rows of ctx for {max(chunks, 1)} chunks of "
            f"{cfg.model.chunk_frames} latent frames; give one row a chunk, or shorter noise"
        )
    names = tuple(f"row {i} of ctx" for i in range(len(rows)))

    def chunk(i):
        # The chunk after a cut drops the scene-cut prefix, so its embedding differs all the same.
        inside = i > 0 and not cut[i] and not cut[i - 1]
        changed = inside and not np.array_equal(rows[i], rows[i - 1])
        return Chunk(names[i], bool(cut[i]), changed)

    video = Video("embeddings", tuple(map(chunk, range(chunks))))
    if not cfg.sample.guided:
        return video, Embeddings(names, rows, None)
    if "neg" not in arrays:
        raise InputError(
            "prompt embeddings: neg is missing, which guidance needs with "
            f"sample.guidance_scale={cfg.sample.guidance_scale}; add neg [1, token, dim], or set "
            "the scale to 1.0"
        )
    negative = _pad(arrays["neg"], cfg, "neg")
    if len(negative) != 1:
        raise InputError(f"prompt embeddings: neg has {len(negative)} rows, must have 1")
    return video, Embeddings(names, rows, negative[0])


def shorten(video: Video, chunks: int) -> Video:
    """The video's first `chunks` chunks.

    Raises:
      InputError: it has fewer.
    """
    if len(video.chunks) < chunks:
        raise InputError(
            f"prompts: video {video.name!r} has {len(video.chunks)} chunks, the noise has "
            f"{chunks}; give more prompts or shorter noise"
        )
    return dataclasses.replace(video, chunks=video.chunks[:chunks])


def _pad(rows: np.ndarray, whole: config_lib.Config, name: str) -> np.ndarray:
    """[n, token, dim] with zero rows up to `text_len`, as the transformer was trained."""
    cfg = whole.model
    if (
        rows.ndim != 3
        or rows.shape[2] != cfg.text_dim
        or rows.shape[1] > cfg.text_len
        or rows.dtype.kind != "f"
    ):
        raise InputError(
            f"prompt embeddings: {name} {rows.dtype}{list(rows.shape)} must be floating point "
            f"[n, token, dim] with dim model.text_dim={cfg.text_dim} and at most "
            f"model.text_len={cfg.text_len} tokens; embed the prompts with this config"
        )
    narrow(rows, whole.compute_dtype, f"prompt embeddings: {name}")
    return np.pad(rows, ((0, 0), (0, cfg.text_len - rows.shape[1]), (0, 0)))
