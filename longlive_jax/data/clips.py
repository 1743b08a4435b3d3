"""Folders of captioned video files as training samples: rows of shots, cut where chunks meet.

`plan` decides which frames of which files make a sample, from their lengths alone. `VideoFolder`
reads the files.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from absl import logging

from longlive_jax import config as config_lib
from longlive_jax.captions import clean
from longlive_jax.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from longlive_jax.data import action_rows, sidecars
from longlive_jax.data.sidecars import canonical
from longlive_jax.data.source import Sample, first
from longlive_jax.data.video_reader import VideoFile, VideoInfo, frame_indices, probe
from longlive_jax.errors import InputError
from longlive_jax.files import regular
from longlive_jax.files.names import entries, spelled

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".gif")  # in any case
LOOKED_AT = 8  # folders whose sidecars are read when data is opened
STARTS = 50  # about how many places in a file a sample may start at
FPS = (1, 1000)  # least and greatest frame rate that a file may declare


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video file: its length in source frames, at `fps` a second.

    shown: int64 [frame], the picture of the file that each source frame shows, if the file has no
      constant rate; its source frames are then those of a sample.
    actions: of the file's pictures, in the model's keys; None: they are not asked for.
    """

    path: pathlib.Path
    caption: str
    frames: int
    fps: Fraction
    shown: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    actions: sidecars.Actions | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def interval(self) -> float:
        """Source frames from one frame of a sample to the next."""
        return float(self.fps) / FRAMES_PER_SECOND

    def holds(self, start: int, frames: int) -> bool:
        """Whether the clip has `frames` frames of a sample, from source frame `start` on."""
        return round(start + (frames - 1) * self.interval) < self.frames


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a sample is made of clips. Fields named as in `config.Data` mean the same."""

    chunks: int
    chunk_frames: int  # latent frames
    min_chunks: int  # valid ones; those after them are padding
    max_chunks_per_shot: int = 0
    single_shot: bool = False

    def frames(self, chunk: int) -> int:
        """Frames of a chunk: the video's first latent covers one frame, not four."""
        return TEMPORAL_COMPRESSION * self.chunk_frames - (0 if chunk else TEMPORAL_COMPRESSION - 1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A chunk of a sample: `frames` of clip number `clip`, from source frame `start` on."""

    clip: int
    start: int
    frames: int
    cut: bool  # a new shot begins with it


def plan(clips: Sequence[Clip], rules: Rules, rng: np.random.Generator) -> list[Segment]:
    """A random sample of these clips: a segment for each valid chunk, or [] if they are too short.

    It starts at a random candidate of `starts` from which the clips fill it. If there is none, it
    starts at a clip's first frame and has at least `min_chunks` segments.
    """
    heads = range(len(clips)) if rules.single_shot else range(1)
    fills = [fill(clips, rules, head, 0) for head in heads]
    # No start gives more chunks than the first frame of the first clip; for a single shot, of the
    # same clip.
    full = [head for head in heads if len(fills[head]) == rules.chunks]
    if full:
        candidates = starts(clips, rules, full if rules.single_shot else range(len(clips)))
        for i in rng.permutation(len(candidates)):
            segments = fill(clips, rules, *candidates[i])
            if len(segments) == rules.chunks:
                return segments
    enough = [segments for segments in fills if len(segments) >= rules.min_chunks]
    return enough[rng.integers(len(enough))] if enough else []


def starts(clips: Sequence[Clip], rules: Rules, indices: Sequence[int]) -> list[tuple[int, int]]:
    """(clip, source frame) of evenly spaced places in these clips where a first chunk may start."""
    found = []
    for i in indices:
        last = int(np.floor(clips[i].frames - 1 - (rules.frames(0) - 1) * clips[i].interval))
        places = range(0, last + 1, max(1, last // STARTS))
        found += [(i, start) for start in places if clips[i].holds(start, rules.frames(0))]
    return found


def fill(clips: Sequence[Clip], rules: Rules, clip: int, start: int) -> list[Segment]:
    """The segments of a sample that starts at this frame: all, or those before the clips end.

    A segment lies in one clip. After `max_chunks_per_shot` segments one second is skipped, so that
    the rest of the clip, if it is long enough, becomes another shot.
    """
    segments, in_shot = [], 0
    while len(segments) < rules.chunks:
        frames, cut = rules.frames(len(segments)), False
        if rules.max_chunks_per_shot and in_shot == rules.max_chunks_per_shot:
            start += round(float(clips[clip].fps))
            in_shot, cut = 0, True
        while not clips[clip].holds(start, frames):
            clip, start = clip + 1, 0
            in_shot, cut = 0, bool(segments)
            if clip == len(clips) or rules.single_shot:
                return segments
        segments.append(Segment(clip, start, frames, cut))
        start = round(start + frames * clips[clip].interval)
        in_shot += 1
    return segments


class VideoFolder:
    """A `Source`: each folder in `<data.path>/video/` is a record, with its shots in their order.

    `video/<sample>/NNNNNN.mp4` is a shot, `caption/<sample>/NNNNNN.json` holds its text under
    "caption". Samples have `train.latent_frames` latent frames of video.height x video.width
    pixels, 24 a second. The prompt of a chunk that begins a shot has `sample.scene_cut_prefix`
    before it, the very first one excepted. For a model with an action path each shot has a sidecar,
    `video/<sample>/NNNNNN.actions.npz`.

    Raises:
      InputError: there is no such folder, or nothing in it; a model with an action path, and no
        folder of those that are looked at has sidecars for it.
    """

    def __init__(self, cfg: config_lib.Config):
        data, chunks = cfg.data, cfg.train.latent_frames // cfg.model.chunk_frames
        self._size = cfg.video.height, cfg.video.width
        self._prefix = cfg.sample.scene_cut_prefix
        self._rules = Rules(
            chunks,
            cfg.model.chunk_frames,
            data.min_chunks if data.allow_padding else chunks,
            data.max_chunks_per_shot,
            data.single_shot,
        )
        self._actions = cfg.model.actions if cfg.model.actions.kind != "none" else None
        self._captions = pathlib.Path(data.path) / "caption"
        videos = pathlib.Path(data.path) / "video"
        self._folders = sample_folders(videos) if data.path and self._captions.is_dir() else []
        if not self._folders:
            raise InputError(
                f"config: data.path={data.path!r} must be a folder with video/NAME/000000.mp4 and "
                "caption/NAME/000000.json files, at least one; launch.make_tiny_world writes one"
            )
        if self._actions is not None:
            self._check_actions(self._actions)

    def __len__(self) -> int:
        return len(self._folders)

    def sample(self, index: int, key: int) -> Sample:
        """A sample of folder `index`, or of the next folder that gives one.

        `key` decides where in the folder the sample starts.

        Raises:
          InputError: no folder gives a sample.
        """
        failures: list[tuple[str, str]] = []
        for tried in range(len(self)):
            folder = self._folders[(index + tried) % len(self)]
            sample = self._try(folder, key, failures)
            if sample is not None:
                return dataclasses.replace(sample, failures=tuple(failures), skipped=tried)
            if tried % 100 == 99:  # a long search must not look like a hang
                where, why = failures[-1]
                logging.warning("data: %d folders give no sample; %s: %s", tried + 1, where, why)
        raise InputError(
            f"data: none of the {len(self)} folders in {self._folders[0].parent} gives a sample of "
            f"{self._rules.chunks} chunks. {first(failures)}. Mend the files, lower "
            "train.latent_frames, or set data.allow_padding=True"
        )

    def _try(self, folder: pathlib.Path, key: int, failures: list) -> Sample | None:
        clips = self._clips(folder, failures)
        while clips:
            segments = plan(clips, self._rules, np.random.default_rng(key))
            if not segments:
                seconds = sum(float(clip.frames / clip.fps) for clip in clips)
                failures.append(
                    (
                        str(folder),
                        f"too short: {len(clips)} usable file(s) of {seconds:.1f} s in all do not "
                        f"give {self._rules.min_chunks} chunks",
                    )
                )
                return None
            frames, bad = self._decode(clips, segments, failures)
            if bad is None:
                prompts, actions = self._prompts(clips, segments), self._rows(clips, segments)
                return Sample(folder.name, prompts, len(segments), frames, actions=actions)
            clips.remove(bad)  # and try the other clips
        failures.append((str(folder), "holds no video that can be used"))
        return None

    def _clips(self, folder: pathlib.Path, failures: list) -> list[Clip]:
        """The usable clips of a folder; other files go to `failures`."""
        clips = []
        for path in _files(folder, failures):
            text = spelled(self._captions / folder.name / f"{path.stem}.json")
            try:
                caption = _caption(text).removeprefix(self._prefix)
                info = probe(path)
                if not FPS[0] <= info.fps <= FPS[1]:
                    raise InputError(
                        f"{path}: says it has {float(info.fps):g} frames a second; must be "
                        f"{FPS[0]} to {FPS[1]}"
                    )
                clip = Clip(path, caption, info.frames, info.fps)
                if info.timeline is not None:
                    shown = info.indices(fps=FRAMES_PER_SECOND)
                    clip = Clip(path, caption, len(shown), Fraction(FRAMES_PER_SECOND), shown)
                if self._actions is not None:
                    clip = dataclasses.replace(clip, actions=_acted(path, info, self._actions))
                clips.append(clip)
            except (InputError, OSError) as error:
                failures.append(_failure(error, path, text, *map(path.with_name, _beside(path))))
        return clips

    def _check_actions(self, cfg: config_lib.Actions) -> None:
        """Refuses data of which no folder, of a few, has actions that the model can be given."""
        sidecars.model_keys(cfg)
        last, number = len(self) - 1, min(len(self), LOOKED_AT)
        failures: list[tuple[str, str]] = []
        for i in np.linspace(0, last, number).astype(int):
            if self._clips(self._folders[i], failures):
                return
        raise InputError(
            f"data: actions.kind={cfg.kind!r}, and none of {number} folders looked at in "
            f"{self._folders[0].parent} can be trained on. {first(failures)}. Give each video a "
            "sidecar beside it, or set actions.kind='none'"
        )

    def _rows(self, clips, segments) -> np.ndarray | None:
        """The actions of a sample's pictures, cut and padded as they are; None without any."""
        if self._actions is None:
            return None
        rows = []
        for segment in segments:
            own = clips[segment.clip].actions
            rows.append(action_rows.of(own, self._actions, segment.start, segment.frames))
        rules = self._rules
        total = sum(rules.frames(chunk) for chunk in range(rules.chunks))
        return action_rows.fitted(np.concatenate(rows), total)

    def _decode(self, clips, segments, failures) -> tuple[np.ndarray | None, Clip | None]:
        """uint8 [frame, height, width, 3] and None, or None and the clip that cannot be read."""
        rules = self._rules
        total = sum(rules.frames(chunk) for chunk in range(rules.chunks))
        frames, done = np.empty((total, *self._size, 3), np.uint8), 0
        for number in dict.fromkeys(segment.clip for segment in segments):
            clip = clips[number]
            indices = np.concatenate(
                [
                    frame_indices(clip.frames, clip.fps, s.frames, FRAMES_PER_SECOND, s.start)
                    for s in segments
                    if s.clip == number
                ]
            )
            try:
                if clip.shown is not None:
                    indices = clip.shown[indices]
                with VideoFile(clip.path, *self._size) as video:
                    for frame in video.pick(indices.tolist()):
                        frames[done] = frame
                        done += 1
            except (InputError, OSError) as error:
                failures.append(_failure(error, clip.path))
                return None, clip
        frames[done:] = frames[done - 1]
        return frames, None

    def _prompts(self, clips, segments) -> tuple[str, ...]:
        prompts = [self._prefix * s.cut + clips[s.clip].caption for s in segments]
        # Padding begins no shot, so it never has the prefix.
        padding = self._rules.chunks - len(segments)
        return (*prompts, *[clips[segments[-1].clip].caption] * padding)


def _acted(path: pathlib.Path, info: VideoInfo, cfg: config_lib.Actions) -> sidecars.Actions:
    """The actions of a file's pictures.

    Raises:
      InputError: it has no sidecar, or one that does not fit the video or the model.
    """
    file = sidecars.beside(path)
    if file is None:
        raise InputError(
            f"{path}: has no sidecar {sidecars.path_for(path).name}, and the model has an action "
            f"path (actions.kind={cfg.kind!r})"
        )
    if info.timeline is not None:
        raise InputError(
            f"{path}: shows its pictures at no constant rate, and nothing says which of them a row "
            f"of {file.name} is of; make it again at a constant rate"
        )
    return sidecars.aligned(sidecars.read(file, info.frames, float(info.fps)), cfg)


def _beside(path: pathlib.Path) -> list[str]:
    """Names that a sidecar of this file may have."""
    return [sidecars.path_for(path, end).name for end in canonical.ENDS]


def sample_folders(videos: pathlib.Path) -> list[pathlib.Path]:
    """The folders of samples in `<data.path>/video`, in their order; [] if there is no such folder.

    Nothing else in it is data.
    """
    if not videos.is_dir():
        return []
    return [path for path in entries(videos) if path.is_dir()]


def _files(folder: pathlib.Path, failures: list) -> list[pathlib.Path]:
    """Video files by number; names that are not a number come last."""

    def order(path: pathlib.Path):
        numeric = re.fullmatch("[0-9]+", path.stem) is not None
        return not numeric, int(path.stem) if numeric else 0, path.name

    try:
        return sorted(entries(folder, *SUFFIXES), key=order)
    except OSError as error:
        failures.append((str(folder), error.strerror))
        return []


def _caption(path: pathlib.Path) -> str:
    """The text under "caption".

    Raises:
      InputError: the file is missing, no JSON object, or its text is empty.
    """
    try:
        value = json.loads(regular.read(path, regular.MAX_TEXT).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, so the video has no caption") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, absurdly deep
        raise InputError(f"{path}: not JSON: {error}") from error
    caption = value.get("caption") if isinstance(value, dict) else None
    if not isinstance(caption, str):
        raise InputError(f'{path}: must be an object with a text under "caption"')
    if not clean(caption):
        raise InputError(f"{path}: the caption is empty")
    return caption.strip()


def _failure(error: Exception, *paths: pathlib.Path) -> tuple[str, str]:
    """(path, reason): the path of `paths` that the error names, else the first."""
    for path in paths:
        if str(error).startswith(f"{path}: "):
            return str(path), str(error).removeprefix(f"{path}: ")
    return str(paths[0]), str(error)
