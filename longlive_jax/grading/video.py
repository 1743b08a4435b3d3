"""Grades a video of the world of shapes: chunk by chunk, its cuts, and what returns in it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from longlive_jax.config import FRAMES_PER_SECOND, TEMPORAL_COMPRESSION
from longlive_jax.data.worlds.shapes import COLOURS
from longlive_jax.errors import InputError
from longlive_jax.grading import caption, cuts, segment
from longlive_jax.grading.caption import Asked
from longlive_jax.grading.look import Seen, look
from longlive_jax.grading.verdict import Verdict, judge, paired

_SAME_SIZE, _SAME_PLACE = 1.15, 0.1  # a factor, and heights: what returns counts as the same

Read = Callable[[int, int], np.ndarray]  # (start, stop) -> uint8 [frame, height, width, 3]


@dataclasses.dataclass(frozen=True)
class Line:
    """A chunk in a script: its prompt, without the words of a cut, and whether a shot begins."""

    prompt: str
    cut: bool


@dataclasses.dataclass
class _Shot:
    first: int  # chunk
    asked: Asked
    seen: list[Seen] = dataclasses.field(default_factory=list)
    right: list[Verdict] = dataclasses.field(default_factory=list)
    shown: list[np.ndarray] = dataclasses.field(default_factory=list)


def frames_of(chunks: int, chunk_frames: int) -> int:
    """Frames of the first `chunks` chunks: a video's first latent covers one frame, not four."""
    return max(0, chunks * chunk_frames * TEMPORAL_COMPRESSION - (TEMPORAL_COMPRESSION - 1))


def script_of(chunks: Iterable[Any], prefix: str) -> list[Line]:
    """The script of chunks with a `prompt` and a `cut`. prefix: the words of a cut.

    Raises:
      InputError: a prompt is not of the world.
    """
    lines = [Line(chunk.prompt.removeprefix(prefix), chunk.cut) for chunk in chunks]
    for line in lines:
        caption.parse(line.prompt)
    return lines


def check(name: str, length: int, script: Sequence[Line], chunk_frames: int) -> list[Asked]:
    """What each chunk shall show.

    Raises:
      InputError: as `grade`.
    """
    needed = frames_of(len(script), chunk_frames)
    if length < needed:
        raise InputError(
            f"{name}: has {length} frames, its script of {len(script)} chunks needs {needed}; give "
            "the prompts that it was made of, or make it again"
        )
    return [caption.parse(line.prompt) for line in script]


def grade(
    name: str, read: Read, length: int, script: Sequence[Line], chunk_frames: int
) -> dict[str, Any]:
    """The record of a video, of numbers, texts and lists alone; see docs/grading.md.

    Args:
      read: its frames, asked for once and in order. length: how many there are.
      chunk_frames: latent frames of a chunk.

    Raises:
      InputError: it is shorter than its script, or a prompt is not of the world.
    """
    asked = check(name, length, script, chunk_frames)
    shots: list[_Shot] = []
    chunks = []
    for i, (line, what) in enumerate(zip(script, asked)):
        start, stop = frames_of(i, chunk_frames), frames_of(i + 1, chunk_frames)
        original = read(start, stop)
        frames = segment.tell_apart(segment.to_height(original))
        seen = look(frames, original)
        if line.cut or not shots or shots[-1].asked != what:
            shots.append(_Shot(i, what))
        shot = shots[-1]
        seconds = (start - frames_of(shot.first, chunk_frames)) / FRAMES_PER_SECOND
        verdict = judge(seen, what, seconds)
        shot.seen.append(seen)
        shot.right.append(verdict)
        if len(shots) > 1 and cuts.is_measured(shots[-2].asked, what):
            shot.shown.append(cuts.shows(frames, shots[-2].asked, what))
        chunks.append(
            {"chunk": i, "second": round(start / FRAMES_PER_SECOND, 3), "prompt": line.prompt}
            | {"right": verdict.right, "all_right": verdict.all_right}
            | {"content_right": verdict.content_right, "wrong": list(verdict.wrong)}
            | {"sharpness": _number(_mean([thing.sharpness for thing in seen.things]))}
            | {
                "colour_error": _number(_colour_error(seen)),
                "background_error": _number(seen.error),
            }
        )
    return {
        "name": name,
        "frames": frames_of(len(script), chunk_frames),
        "chunks": chunks,
        "cuts": [_cut(shot, chunk_frames) for shot in shots[1:]],
        "returns": [found for i in range(len(shots)) if (found := _returned(shots, i))],
    }


def _cut(shot: _Shot, chunk_frames: int) -> dict[str, Any]:
    frames = cuts.latency(np.concatenate(shot.shown)) if shot.shown else None
    whole = chunk_frames * TEMPORAL_COMPRESSION
    return {
        "chunk": shot.first,
        "measured": bool(shot.shown),
        "frames": frames,
        "chunks": None if frames is None else frames // whole,
        "right_within_a_chunk": any(verdict.content_right for verdict in shot.right[:2]),
    }


def _returned(shots: Sequence[_Shot], number: int) -> dict[str, Any] | None:
    """How far a shot is the same as the last one before it of the same prompt."""
    now = shots[number]
    before = next((s for s in reversed(shots[:number]) if s.asked == now.asked), None)
    if before is None:
        return None
    same: dict[str, list[bool]] = {
        name: [] for name in ("objects", "colours", "backgrounds", "sizes", "places")
    }
    distance = []
    for old, new in zip(before.seen, now.seen):
        same["backgrounds"].append(old.background == new.background and old.background is not None)
        for a, b in zip(paired(old, now.asked), paired(new, now.asked)):
            if a is None or b is None:
                same["objects"].append(False)
                same["colours"].append(False)
                continue
            same["objects"].append(a.shape == b.shape != "")
            same["colours"].append(a.colour == b.colour)
            distance.append(float(np.linalg.norm(a.rgb - b.rgb)))
            sizes = a.track.middle_size, b.track.middle_size
            if np.isfinite(sizes).all():
                same["sizes"].append(max(sizes) <= _SAME_SIZE * min(sizes))
            if a.motion == b.motion and a.motion in ("still", "spin", "grow", "shrink"):
                far = np.abs(np.subtract(a.track.middle, b.track.middle)).max()
                same["places"].append(bool(far <= _SAME_PLACE))
    shares = {name: _number(_mean(found)) for name, found in same.items()}
    return {
        "chunk": now.first,
        "of_chunk": before.first,
        "same": shares,
        "identity": _number(_mean([share for share in shares.values() if share is not None])),
        "colour_distance": _number(_mean(distance)),
    }


def _colour_error(seen: Seen) -> float:
    return _mean([float(np.linalg.norm(t.rgb - COLOURS[t.colour])) for t in seen.things])


def _mean(values) -> float:
    known = [float(value) for value in values if np.isfinite(value)]
    return sum(known) / len(known) if known else float("nan")


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
