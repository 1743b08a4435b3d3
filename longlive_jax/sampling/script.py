"""What a video is made from, chunk by chunk: which prompt, and where the cuts are."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.sampling.shots import Video
from longlive_jax.sampling.stream import guided


@dataclasses.dataclass(frozen=True)
class Script:
    """One video to make.

    which: the prompt of each chunk, as a row of `Text.rows`.
    cut: whether each chunk starts a new shot.
    turn: whether each chunk's prompt differs from that of the chunk before it, inside a shot.
    image: the video's first frame, or None.
    """

    name: str
    which: tuple[int, ...]
    cut: tuple[bool, ...]
    turn: tuple[bool, ...]
    image: pathlib.Path | None = None

    @property
    def chunks(self) -> int:
        return len(self.which)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Prompt embeddings of all scripts of a run.

    rows: [distinct prompt, text_len, text_dim]; negative: [text_len, text_dim], or None without
    classifier-free guidance.
    """

    rows: np.ndarray
    negative: np.ndarray | None = None


def from_videos(videos: Sequence[Video], scene_cut_prefix: str) -> tuple[list[Script], list[str]]:
    """Scripts of videos read by `shots.read`, and the distinct prompts that their rows stand for.

    Each prompt is there once, however many chunks of however many videos use it.
    """
    texts = list(dict.fromkeys(chunk.prompt for video in videos for chunk in video.chunks))
    row = {text: i for i, text in enumerate(texts)}

    def script(video: Video) -> Script:
        cut = tuple(chunk.cut for chunk in video.chunks)
        plain = [chunk.prompt.removeprefix(scene_cut_prefix).strip() for chunk in video.chunks]
        turn = tuple(i > 0 and not cut[i] and plain[i] != plain[i - 1] for i in range(len(cut)))
        which = tuple(row[chunk.prompt] for chunk in video.chunks)
        return Script(video.name, which, cut, turn, video.image)

    return [script(video) for video in videos], texts


def from_embeddings(
    arrays: Mapping[str, np.ndarray], cfg: config_lib.Config, chunks: int | None
) -> tuple[Script, Text]:
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
    turn = tuple(
        i > 0 and not cut[i] and not cut[i - 1] and not np.array_equal(rows[i], rows[i - 1])
        for i in range(chunks)
    )
    script = Script("embeddings", tuple(range(chunks)), tuple(map(bool, cut[:chunks])), turn)
    if not guided(cfg):
        return script, Text(rows)
    if "neg" not in arrays:
        raise InputError(
            "prompt embeddings: neg is missing, which guidance needs with "
            f"sample.guidance_scale={cfg.sample.guidance_scale}; add neg [1, token, dim], or set "
            "the scale to 1.0"
        )
    negative = _pad(arrays["neg"], cfg.model, "neg")
    if len(negative) != 1:
        raise InputError(f"prompt embeddings: neg has {len(negative)} rows, must have 1")
    return script, Text(rows, negative[0])


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
    fields = {name: getattr(script, name)[:chunks] for name in ("which", "cut", "turn")}
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
