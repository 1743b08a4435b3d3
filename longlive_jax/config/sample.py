"""Settings of the sampler."""

import dataclasses
from typing import Annotated

from longlive_jax.config.memory import Memory
from longlive_jax.config.model import Model
from longlive_jax.config.section import (
    INT32_MAX,
    Count,
    Index,
    OneOf,
    Range,
    Section,
    divides,
    refuse,
)


@dataclasses.dataclass(frozen=True)
class WindowSize:
    """How many chunks are visible together; `sampling.window` says which."""

    chunks: int  # in all, with the one being denoised
    sinks: int  # first chunks of the video, which are always visible
    shots: int  # 1: the newest shot's first chunk is always visible too; else 0
    references: int = 0  # reference images, one a chunk
    landmarks: int = 0  # chunks of before the window, where one is near again

    @property
    def slots(self) -> int:
        """Slots of the KV cache: the chunk being denoised needs none."""
        return self.chunks - 1

    @property
    def past_slots(self) -> int:
        """The first slots, of all but landmarks, which have the last ones."""
        return self.slots - self.landmarks

    @property
    def least(self) -> int:
        """The least `chunks`: all that stay, one recent chunk and the one being denoised."""
        return self.sinks + self.shots + self.references + self.landmarks + 2


@dataclasses.dataclass(frozen=True)
class Sample(Section):
    """How a video is streamed. Frames here are latent frames."""

    NAME = "sample"

    steps: Annotated[int, Range(1, 1000)] = 4
    solver: Annotated[str, OneOf(("unipc", "x0_renoise"))] = "unipc"  # see diffusion/solvers.py
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
    # A start image of other proportions than the video's: stretched as in the original, cut to the
    # middle, or with black bars.
    image_fit: Annotated[str, OneOf(("stretch", "crop", "pad"))] = "stretch"
    vae_latents_per_call: Count = 2  # latents decoded at once: speed against memory
    memory: Memory = Memory()  # "memory" on the command line

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on (Ho and Salimans, arXiv 2207.12598)."""
        return self.guidance_scale != 1.0

    def window(self, model: Model) -> WindowSize:
        """The window in chunks of `model`."""
        sinks = self.sink_frames // model.chunk_frames
        shots = int(self.multi_shot_sink and sinks > 0)
        memory = self.memory
        return WindowSize(
            self.window_frames // model.chunk_frames, sinks, shots, memory.references,
            memory.landmarks,
        )  # fmt: skip

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
        size, memory = self.window(model), self.memory
        named, parts = "", ""
        for name, count in (("reference", size.references), ("landmark", size.landmarks)):
            if count:
                named += f", memory.{name}s={count}"
                parts += f" {count} {name}(s),"
        if size.chunks < size.least:
            refuse(
                f"sample.window_frames={self.window_frames} with sample.sink_frames="
                f"{self.sink_frames} and sample.multi_shot_sink={self.multi_shot_sink}{named}",
                f"must be at least {size.least * m}: {size.sinks + size.shots} sink chunk(s),"
                f"{parts} one recent chunk and the one being denoised, of {m} frames each",
            )
        if memory.landmarks and model.actions.kind == "none":
            refuse(
                f"memory.landmarks={memory.landmarks}",
                "needs a model with an action path (actions.kind), whose actions say where the "
                "player is; 0 turns landmarks off",
            )
