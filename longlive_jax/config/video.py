"""Settings of the video itself: what trainers, samplers and data have to agree on."""

import dataclasses
from typing import Annotated

from longlive_jax.config.model import PATCH
from longlive_jax.config.section import Range, Section, divides
from longlive_jax.config.vae import SPATIAL_COMPRESSION

FRAMES_PER_SECOND = 24
_MOST_PIXELS = 2**14  # a side; H.264 takes no more
_SHIFT = "the published models use 5.0"

Side = Annotated[int, Range(1, _MOST_PIXELS)]


@dataclasses.dataclass(frozen=True)
class Video(Section):
    """Size of the pictures, noise levels of the flow, and whether the first frame is given."""

    NAME = "video"

    height: Side = 704  # pixels
    width: Side = 1280  # pixels
    # Of the noise schedule. Above 1000 float32 rounds every sigma to pure noise.
    shift: Annotated[float, Range(above=0, most=1000, hint=_SHIFT)] = 5.0
    image_to_video: bool = False

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latents."""
        return self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION

    @property
    def patches(self) -> int:
        """Tokens of one latent frame."""
        height, width = self.latent_size
        return (height // PATCH) * (width // PATCH)

    def __post_init__(self):
        super().__post_init__()
        for name in ("height", "width"):
            side = getattr(self, name)
            divides(f"video.{name}", side, "pixels a token", SPATIAL_COMPRESSION * PATCH)
