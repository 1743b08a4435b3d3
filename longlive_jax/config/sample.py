"""Settings of the sampler."""

import dataclasses
from typing import Annotated

from longlive_jax.config.model import Model
from longlive_jax.config.section import INT32_MAX, Count, Index, Range, Section, divides, refuse


@dataclasses.dataclass(frozen=True)
class Sample(Section):
    """How a video is streamed. Frames here are latent frames."""

    NAME = "sample"

    steps: Annotated[int, Range(1, 1000)] = 4
    # 1.0: no classifier-free guidance, one forward a step.
    guidance_scale: Annotated[float, Range(hint="1.0 turns it off")] = 1.0
    negative_prompt: str = ""
    window_frames: Count = 32  # visible: sinks, recent chunks and the chunk being denoised
    sink_frames: Index = 8  # first frames of the video that are always visible
    multi_shot_sink: bool = True  # the newest shot's first chunk is always visible too
    # Temporal positions skipped at a cut; positions are int32, and a video has many cuts.
    rope_offset: Annotated[float, Range(0, INT32_MAX // 2**10)] = 8.0
    scene_cut_prefix: str = "The scene transitions. "  # put before a new shot's first prompt
    recache: bool = False  # on a prompt change inside a shot, run the visible past again
    chunks: Count = 16  # length of a plain-text prompt's video, in chunks
    vae_latents_per_call: Count = 2  # latents decoded at once: speed against memory

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho and Salimans, arXiv 2207.12598)."""
        return self.guidance_scale != 1.0

    def __post_init__(self):
        super().__post_init__()
        if not float(self.rope_offset).is_integer():
            refuse(
                f"sample.rope_offset={self.rope_offset}",
                "must be a whole number of latent frames, 0 or more: positions are integers, "
                "which keeps them exact in a video of any length",
            )

    def check(self, model: Model) -> None:
        """Refuses a window that has no place for the chunks that must be visible."""
        m = model.chunk_frames
        divides("sample.window_frames", self.window_frames, "model.chunk_frames", m)
        divides("sample.sink_frames", self.sink_frames, "model.chunk_frames", m)
        sinks = self.sink_frames // m + (1 if self.multi_shot_sink and self.sink_frames else 0)
        least = (sinks + 2) * m
        if self.window_frames < least:
            refuse(
                f"sample.window_frames={self.window_frames} with sample.sink_frames="
                f"{self.sink_frames} and sample.multi_shot_sink={self.multi_shot_sink}",
                f"must be at least {least}: {sinks} sink chunk(s), one recent chunk and the one "
                f"being denoised, of {m} frames each",
            )
