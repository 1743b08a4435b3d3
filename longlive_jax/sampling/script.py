"""What a video is made from, chunk by chunk: prompt embeddings and cuts, checked against the config."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.sampling.shots import Video


@dataclasses.dataclass(frozen=True)
class Script:
    """One video to make.

    contexts: [distinct prompt, text_len, text_dim]; which: the row of it that each chunk uses.
    cut: whether each chunk starts a new shot.
    turn: whether each chunk's prompt differs from that of the chunk before it, inside a shot.
    """

    name: str
    contexts: np.ndarray
    which: tuple[int, ...]
    cut: tuple[bool, ...]
    turn: tuple[bool, ...]

    @property
    def chunks(self) -> int:
        return len(self.which)


def from_embeddings(
    arrays: Mapping[str, np.ndarray], cfg: config_lib.Model, chunks: int | None
) -> Script:
    """A script from `ctx` [chunk, token, dim] and, if there, `cut` [chunk].

    Args:
      chunks: how many the video has; None: as many as there are embeddings.

    Raises:
      InputError: shapes that do not fit the config, or fewer embeddings than chunks.
    """
    contexts = pad_text(arrays["ctx"], cfg, "ctx")
    cut = arrays.get("cut", np.zeros(len(contexts), bool))
    if cut.shape != contexts.shape[:1]:
        raise InputError(
            f"prompt embeddings: cut of shape {cut.shape} must have one entry for each of the "
            f"{len(contexts)} rows of ctx"
        )
    chunks = len(contexts) if chunks is None else chunks
    if chunks > len(contexts):
        raise InputError(
            f"prompt embeddings: {len(contexts)} rows of ctx for {chunks} chunks of "
            f"{cfg.chunk_frames} latent frames; give one row a chunk, or shorter noise"
        )
    # The chunk after a cut drops the scene-cut prefix, so its embedding differs all the same.
    turn = tuple(
        i > 0 and not cut[i] and not cut[i - 1] and not np.array_equal(contexts[i], contexts[i - 1])
        for i in range(chunks)
    )
    cut = tuple(map(bool, cut[:chunks]))
    return Script("embeddings", contexts, tuple(range(chunks)), cut, turn)


def from_videos(
    videos: Sequence[Video], encode: Callable[[list[str]], np.ndarray], scene_cut_prefix: str
) -> list[Script]:
    """Scripts of videos read by `shots.read`; `encode` turns texts into [text, text_len, text_dim].

    Each distinct prompt is encoded and held once, however many chunks of however many videos use it.
    """
    texts = list(dict.fromkeys(chunk.prompt for video in videos for chunk in video.chunks))
    contexts = encode(texts)
    row = {text: i for i, text in enumerate(texts)}

    def script(video: Video) -> Script:
        cut = tuple(chunk.cut for chunk in video.chunks)
        plain = [chunk.prompt.removeprefix(scene_cut_prefix).strip() for chunk in video.chunks]
        turn = tuple(i > 0 and not cut[i] and plain[i] != plain[i - 1] for i in range(len(cut)))
        which = tuple(row[chunk.prompt] for chunk in video.chunks)
        return Script(video.name, contexts, which, cut, turn)

    return [script(video) for video in videos]


def pad_text(context: np.ndarray, cfg: config_lib.Model, name: str) -> np.ndarray:
    """[n, token, dim] with zero rows up to `text_len`, as the transformer was trained.

    Raises:
      InputError: another rank or width, or more tokens than `text_len`.
    """
    if context.ndim != 3 or context.shape[2] != cfg.text_dim or context.shape[1] > cfg.text_len:
        raise InputError(
            f"prompt embeddings: {name} of shape {context.shape} must be [n, token, dim] with dim "
            f"model.text_dim={cfg.text_dim} and at most model.text_len={cfg.text_len} tokens; "
            "embed the prompts with this config"
        )
    rest = cfg.text_len - context.shape[1]
    return np.pad(context, ((0, 0), (0, rest), (0, 0)))


def shorten(script: Script, chunks: int) -> Script:
    """The script's first `chunks` chunks.

    Raises:
      InputError: it has fewer.
    """
    if script.chunks < chunks:
        raise InputError(
            f"prompts: video {script.name!r} has {script.chunks} chunks, the noise has {chunks}; "
            "give more prompts or a shorter noise"
        )
    fields = {name: getattr(script, name)[:chunks] for name in ("which", "cut", "turn")}
    return dataclasses.replace(script, **fields)
