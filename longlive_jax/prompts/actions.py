"""The actions of videos to make: given for all of them, by a script's entries, or by a script."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from absl import logging

from longlive_jax import config as config_lib
from longlive_jax.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from longlive_jax.data import sidecars
from longlive_jax.errors import InputError
from longlive_jax.prompts.shots import Video

_STILL = "still"
Given = str | os.PathLike | sidecars.Actions  # a line of text, a sidecar's path, or what it holds


def check(cfg: config_lib.Config, videos: Iterable[Video], given: Given | None) -> None:
    """Refuses actions for a model without an action path, and none for a model that has one.

    Raises:
      InputError: also for actions that are given twice, or a model whose keys nothing names.
    """
    model = cfg.model.actions
    for video in videos:
        own = bool(video.actions or (video.script or {}).get("actions"))
        if own and given is not None:
            raise InputError(
                f"actions: video {video.name!r} has its own, and others are given; drop one"
            )
        has = own or given is not None
        if has and model.kind == "none":
            raise InputError(
                f"actions: given for video {video.name!r} and a model without an action path "
                "(actions.kind='none'); leave them out, or take a config and a checkpoint that has "
                "one"
            )
        if not has and model.kind != "none":
            raise InputError(
                f"actions: none for video {video.name!r}, and the model has an action path "
                f"(actions.kind={model.kind!r}); give --actions, a sidecar or a line such as "
                f"'w*48, {_STILL}' ('{_STILL}' alone stands still), or \"actions\" in the entries "
                "of a .json file"
            )
    if model.kind != "none":
        sidecars.model_keys(model)


def files(videos: Iterable[Video], given: Given | None) -> list[str]:
    """The sidecars that are read for them."""
    texts = [what for video in videos for what, _ in video.actions]
    if isinstance(given, str | os.PathLike):
        texts.append(os.fspath(given))
    return [text for text in texts if sidecars.is_file(text)]


def of_video(
    cfg: config_lib.Config,
    video: Video,
    given: Given | None = None,
    past: sidecars.Actions | None = None,
) -> sidecars.Actions:
    """The actions of all pictures of a video, in the model's keys and alignment.

    Args:
      given: in place of the video's own. A sidecar may be that of the new pictures, or of all.
      past: of the video that it goes on from.

    Raises:
      InputError: as `check`; unreadable ones; more or fewer than pictures; another rate; keys or a
        mouse that the model does not have.
    """
    check(cfg, [video], given)
    model = cfg.model
    chunk, before = TEMPORAL_COMPRESSION * model.chunk_frames, 0 if past is None else len(past)
    # A video's first latent is one picture, not four.
    new = chunk * len(video.chunks) - (0 if before else TEMPORAL_COMPRESSION - 1)
    script = (video.script or {}).get("actions")
    if given is not None:
        own = _read(given, new, before + new)
    elif script:
        own = sidecars.of_rows(script, f"prompts: {video.name}: actions")
        own.check_video(before + new, FRAMES_PER_SECOND)
    else:
        own = _of_entries(model.actions, video, chunk, new)
    own = sidecars.aligned(own, model.actions)
    if past is None or len(own) == before + new:
        return own
    return sidecars.join([sidecars.aligned(past, model.actions), own])


def of_clip(
    path: str | os.PathLike, length: int, count: int, cfg: config_lib.Actions
) -> sidecars.Actions:
    """The actions of the last `count` pictures of a clip of `length`, of the sidecar beside it.

    Without one they are none, with a warning.
    """
    file = sidecars.beside(path)
    if file is not None:
        return sidecars.read(file, length, FRAMES_PER_SECOND).cut(length - count, length)
    logging.warning("%s: no sidecar beside it; in its pictures nothing is held or moved", path)
    still = sidecars.parse(_STILL, count, FRAMES_PER_SECOND)
    return dataclasses.replace(still, pad=cfg.pad)


def _read(given: Given, new: int, whole: int) -> sidecars.Actions:
    """Given actions, of the new pictures of a video or of all."""
    if isinstance(given, sidecars.Actions):
        own = given
    elif sidecars.is_file(os.fspath(given)):
        own = sidecars.read(given)
    else:
        return sidecars.parse(os.fspath(given), new, FRAMES_PER_SECOND)
    own.check_video(whole if len(own) == whole else new, FRAMES_PER_SECOND)
    return own


def _of_entries(
    cfg: config_lib.Actions, video: Video, chunk: int, pictures: int
) -> sidecars.Actions:
    """Each entry's own; the first one has fewer pictures if it begins the video."""
    parts, missing = list[sidecars.Actions](), chunk * len(video.chunks) - pictures
    for i, (what, chunks) in enumerate(video.actions):
        count = chunk * chunks - (missing if i == 0 else 0)
        where = f"prompts: {video.name}, entry {i + 1} of {len(video.actions)}"
        try:
            if sidecars.is_file(what):
                part = sidecars.read(pathlib.Path(what), count, FRAMES_PER_SECOND)
            else:
                part = sidecars.parse(what or _STILL, count, FRAMES_PER_SECOND)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        parts.append(sidecars.aligned(dataclasses.replace(part, where=where), cfg))
    return sidecars.join(parts).cut(0, pictures)
