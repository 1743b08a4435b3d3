"""Settings of the action path: a keyboard and a mouse beside the prompt."""

import dataclasses
from typing import Annotated

from longlive_jax.config.section import (
    Count,
    Index,
    OneOf,
    Positive,
    Probability,
    Range,
    Section,
    refuse,
)

ROTATED = 8  # components of a head that turn with time, in pairs; the others stay
PADS = (12, 11, 8)
# The keys of Matrix-Game 2's presets "gta" and "universal", by keyboard_dim.
_PRESETS = {2: ("KeyW", "KeyS"), 4: ("KeyW", "KeyS", "KeyA", "KeyD")}


@dataclasses.dataclass(frozen=True)
class Actions(Section):
    """How actions enter the transformer. Defaults: Matrix-Game 2's module (arXiv 2508.13009).

    An action is one vector a picture for the keyboard, and one for the mouse.
    """

    NAME = "actions"

    # "module": attention over time in the first `layers` blocks; "token": one residual before all.
    kind: Annotated[str, OneOf(("none", "module", "token"))] = "none"
    keyboard_dim: Count = 4
    mouse_dim: Index = 2  # 0: there is no mouse
    # W3C codes of the keyboard's entries, "KeyW,KeyS,KeyA,KeyD"; empty: Matrix-Game 2's of 2 or 4.
    keys: str = ""
    mouse_degrees: Positive = 15.0  # of a picture, that the mouse's vector has as 1
    heads: Count = 16
    head_dim: Count = 64
    keyboard_embed: Count = 128  # what the module embeds a picture's keys in
    # Latents that are visible, up to the chunk's last; 0: all, in a stream sample.window_frames.
    window: Index = 6
    # Of a video's pictures the one that action f drives: 12: f + 1; 11: f. 8: as 11, but of a
    # video of 4 pictures a latent, the first one's too.
    pad: Annotated[int, OneOf(PADS)] = 12
    layers: Count = 15
    # In training, the share of clips whose actions are all zero.
    dropout: Probability = 0.0
    # In sampling, away from the velocity under actions of zero; 1.0: off, one forward a step.
    guidance: Annotated[float, Range(hint="1.0 turns it off")] = 1.0

    @property
    def guided(self) -> bool:
        """Whether actions have guidance of their own."""
        return self.kind != "none" and self.guidance != 1.0

    @property
    def key_names(self) -> tuple[str, ...]:
        """The name of each of the keyboard's entries; empty if nothing says them."""
        if self.keys:
            return tuple(name.strip() for name in self.keys.split(","))
        return _PRESETS.get(self.keyboard_dim, ())

    @property
    def width(self) -> int:
        """Width of the module within: that of all heads."""
        return self.heads * self.head_dim

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim % 2 or self.head_dim < ROTATED:
            refuse(
                f"actions.head_dim={self.head_dim}",
                f"must be even and at least {ROTATED}, the components that rotary positions turn",
            )

        if self.keys and len(self.key_names) != self.keyboard_dim:
            refuse(
                f"actions.keys={self.keys!r}",
                f"names {len(self.key_names)} keys, actions.keyboard_dim is {self.keyboard_dim}; "
                "name one key for each of the keyboard's entries",
            )

    def past(self, chunk_frames: int, all_frames: int) -> int:
        """Latents before a chunk that it sees; `all_frames`: visible ones if window is 0."""
        return (self.window or all_frames) - chunk_frames

    def check(self, chunk_frames: int, num_layers: int) -> None:
        """Refuses a window in which a chunk does not see itself, and layers that are not there."""
        if self.kind != "module":
            return
        if self.window and self.window < chunk_frames:
            refuse(
                f"actions.window={self.window}",
                f"must be at least model.chunk_frames={chunk_frames}, so that a chunk sees itself; "
                f"0 shows everything",
            )
        if self.layers > num_layers:
            refuse(
                f"actions.layers={self.layers}", f"must be at most model.num_layers={num_layers}"
            )
