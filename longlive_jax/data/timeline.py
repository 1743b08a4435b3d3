"""When a video's pictures are shown: at a constant rate, or each at a time of its own."""

import dataclasses
import math
from fractions import Fraction

import numpy as np

# Of a picture's interval: by how much it may be off the beat of a constant rate. The clocks of
# cameras tremble; a change of rate soon drifts further than this.
_TREMBLE = Fraction(1, 4)
# Seconds by which a picture may come early, if a tick is longer: timestamps are rounded to ticks.
_EARLY = Fraction(1, 200)


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """The times of pictures that no constant rate describes.

    ticks: int64 [picture + 1], ascending from 0: when each appears, and when the last one ends.
    tick: in seconds.
    even: the pictures have a constant rate, only the last one is shown for longer.
    """

    ticks: np.ndarray
    tick: Fraction
    even: bool = False

    @property
    def seconds(self) -> Fraction:
        return int(self.ticks[-1]) * self.tick

    def shown(self, count: int | None, fps: Fraction, start: int) -> np.ndarray:
        """The picture that is shown at k / fps seconds after picture `start` appears: int64 [k].

        count: how many; None: all before the end. After the end it is the last picture.
        """
        first, end = int(self.ticks[start]), int(self.ticks[-1])
        # Two timestamps are each rounded by half a tick at most.
        step, early = 1 / (fps * self.tick), min(Fraction(1), _EARLY / self.tick)
        if count is None:
            count = max(1, math.ceil((end - first - early) / step))
        # first + floor(k step + early), in integers: floats would be wrong at the borders.
        scale = step.denominator * early.denominator
        k = np.arange(count, dtype=np.int64)
        ticks = first + (k * int(step * scale) + int(early * scale)) // scale
        return np.searchsorted(self.ticks[:-1], ticks, side="right") - 1


def describe(
    ticks: np.ndarray, tick: Fraction, declared: Fraction | None
) -> tuple[Fraction | None, Timeline | None]:
    """(frames a second, Timeline if that is not all there is to say).

    Args:
      ticks: as of a Timeline.
      declared: the rate in the file's header; it counts only if the times agree.
    """
    times, count = ticks[:-1], len(ticks) - 1
    measured = None
    if count > 1:
        measured = Fraction(count - 1, int(times[-1])) / tick
    for fps in (declared, measured):
        if not fps:
            continue
        interval = 1 / (fps * tick)
        slack = max(1, interval * _TREMBLE)
        if np.abs(times - np.arange(count) * float(interval)).max() > slack:
            continue
        if count > 1 and ticks[-1] - times[-1] > interval * Fraction(3, 2) + 1:
            return fps, Timeline(ticks, tick, even=True)
        return fps, None
    return measured, Timeline(ticks, tick)


def frame_indices(
    source_frames: int,
    source_fps: float | Fraction,
    num_frames: int | None = None,
    fps: float = 24,
    start: int = 0,
) -> np.ndarray:
    """The source frames that show a video at `fps`, chosen as the original does: int64 [frame].

    Frame k is source frame round(start + k * source_fps / fps), halves to even, or the last source
    frame if that is past the end. `num_frames` None: all frames before the end.
    """
    interval = float(source_fps) / float(fps)
    count = num_frames
    if count is None:
        count = max(1, int((source_frames - start) / interval) + 2)
    indices = np.round(start + np.arange(count) * interval).astype(np.int64)
    if num_frames is None:
        indices = indices[indices < source_frames]
    return np.minimum(indices, source_frames - 1)
