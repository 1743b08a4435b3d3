"""What a video is made from, chunk by chunk: its prompts, and where the cuts are."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.prompts.shots import Video


@dataclasses.dataclass(frozen=True)
class Script:
    """One video to make.

    prompts: the prompt of each chunk, as the model reads it.
    cut: whether each chunk starts a new shot.
    changed: whether each chunk's prompt differs from that of the chunk before it, inside a shot.
    image: the video's first frame, or None.
    """

    name: str
    prompts: tuple[str, ...]
    cut: tuple[bool, ...]
    changed: tuple[bool, ...]
    image: pathlib.Path | None = None

    @property
    def chunks(self) -> int:
        return len(self.prompts)


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


def from_videos(videos: Sequence[Video], scene_cut_prefix: str) -> list[Script]:
    """Scripts of videos read by `shots.read`."""

    def script(video: Video) -> Script:
        prompts, cut = zip(*((chunk.prompt, chunk.cut) for chunk in video.chunks))
        plain = [prompt.removeprefix(scene_cut_prefix).strip() for prompt in prompts]
        changed = tuple(i > 0 and not cut[i] and plain[i] != plain[i - 1] for i in range(len(cut)))
        return Script(video.name, prompts, cut, changed, video.image)

    return [script(video) for video in videos]


def distinct(scripts: Iterable[Script]) -> list[str]:
    """The prompts of scripts, each once, however many chunks use it."""
    return list(dict.fromkeys(prompt for script in scripts for prompt in script.prompts))


def from_embeddings(
    arrays: Mapping[str, np.ndarray], cfg: config_lib.Config, chunks: int | None
) -> tuple[Script, Embeddings]:
    """A script from `ctx` [chunk, token, dim] and, if there, `cut` [chunk], `neg` [1, token, dim].

    Args:
      chunks: how many the video has; None: as many as there are embeddings.

    Raises:
      InputError: shapes that do not fit the config, fewer embeddings than chunks, or no `neg` where
        guidance needs it.
    """
    rows = _pad(arrays["ctx"], cfg.model, "ctx")
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
    # The chunk after a cut drops the scene-cut prefix, so its embedding differs all the same.
    changed = tuple(
        i > 0 and not cut[i] and not cut[i - 1] and not np.array_equal(rows[i], rows[i - 1])
        for i in range(chunks)
    )
    names = tuple(f"row {i} of ctx" for i in range(len(rows)))
    script = Script("embeddings", names[:chunks], tuple(map(bool, cut[:chunks])), changed)
    if not cfg.sample.guided:
        return script, Embeddings(names, rows, None)
    if "neg" not in arrays:
        raise InputError(
            "prompt embeddings: neg is missing, which guidance needs with "
            f"sample.guidance_scale={cfg.sample.guidance_scale}; add neg [1, token, dim], or set "
            "the scale to 1.0"
        )
    negative = _pad(arrays["neg"], cfg.model, "neg")
    if len(negative) != 1:
        raise InputError(f"prompt embeddings: neg has {len(negative)} rows, must have 1")
    return script, Embeddings(names, rows, negative[0])


def shorten(script: Script, chunks: int) -> Script:
    """The script's first `chunks` chunks.

    Raises:
      InputError: it has fewer.
    """
    if script.chunks < chunks:
        raise InputError(
            f"prompts: video {script.name!r} has {script.chunks} chunks, the noise has {chunks}; "
            "give more prompts or shorter noise"
        )
    fields = {name: getattr(script, name)[:chunks] for name in ("prompts", "cut", "changed")}
    return dataclasses.replace(script, **fields)


def _pad(rows: np.ndarray, cfg: config_lib.Model, name: str) -> np.ndarray:
    """[n, token, dim] with zero rows up to `text_len`, as the transformer was trained."""
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
    return np.pad(rows, ((0, 0), (0, cfg.text_len - rows.shape[1]), (0, 0)))
