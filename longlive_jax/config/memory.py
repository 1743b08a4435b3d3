"""Settings of a stream's memory of places: slots of the window for what is long past."""

import dataclasses
from typing import Annotated

from longlive_jax.config.section import Count, Decay, Index, NotNegative, Positive, Range, Section


@dataclasses.dataclass(frozen=True)
class Memory(Section):
    """Slots beside the sinks, and which past chunks are shown in them. Off by default.

    They are part of `sample.window_frames`. Lengths are in the unit of the world.
    """

    NAME = "memory"

    references: Index = 0  # reference images, each a chunk that is always visible
    references_past_cuts: bool = True  # False: from the first cut on they leave the window
    landmarks: Index = 0  # chunks of before the window that are visible where one is near again
    # Of the player's pose to that of a landmark, at most; degrees between the directions of view.
    distance: Positive = 100.0
    angle: Annotated[float, Range(above=0, most=180)] = 30.0
    kept: Count = 1024  # chunks that a stream keeps as landmarks, on the host
    # Dead reckoning, where no poses are given. Defaults: Doom, as launch.record_doom plays it.
    speed: NotNegative = 8.33  # of who holds a key, a picture
    glide: Decay = 0.90625  # share of the speed that is left from one picture to the next
