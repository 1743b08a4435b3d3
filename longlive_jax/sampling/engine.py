"""What makes streams, what reads their prompts, and what each of them begins with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.sampling import finite, stream
from longlive_jax.sampling.decode import Decoder

ARRAYS = ("noise", "first_frame", "past", "references")  # those of a Start


class Texts(Protocol):
    """Prompts to embeddings: a `prompts.encoder.PromptEncoder`, or what it made before."""

    @property
    def negative(self) -> np.ndarray | None:
        """[text_len, text_dim] of the negative prompt, or None without guidance."""

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompt, text_len, text_dim]."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """What steps streams, any number of them: the transformer and the VAE's decoder on a mesh.

    params: of `stream.Sampler.prepare`. decoder: None where no frames are wanted.
    """

    cfg: config_lib.Config
    mesh: jax.sharding.Mesh
    params: params_lib.Tree
    decoder: Decoder | None = None

    def sampler(self, image_to_video: bool, steps: int | None = None) -> stream.Sampler:
        """The programs for videos with, or without, a first frame.

        steps: of the solver; None: the config's. What is denoised by others is committed by the
          same programs.
        """
        cfg = self.cfg
        video = dataclasses.replace(cfg.video, image_to_video=image_to_video)
        sample = dataclasses.replace(cfg.sample, steps=steps or cfg.sample.steps)
        return stream.sampler(dataclasses.replace(cfg, video=video, sample=sample), self.mesh)

    def cause(
        self, start: "Start", rows: Mapping[str, np.ndarray], negative: np.ndarray | None
    ) -> str:
        """The likely cause of a chunk that is not finite. rows: embeddings by their prompts."""
        weights = {"the transformer": self.params}
        if self.decoder is not None:
            weights["the VAE"] = self.decoder.params
        arrays: dict[str, np.ndarray | None] = {
            f"the embedding of {prompt!r}": row for prompt, row in rows.items()
        }
        arrays["the embedding of the negative prompt"] = negative
        arrays |= {f"the given {name}": getattr(start, name) for name in ARRAYS}
        return finite.cause(
            weights, arrays,
            "weights, prompt embeddings and noise are finite, so numbers grew past what their "
            f"format holds: lower sample.guidance_scale={self.cfg.sample.guidance_scale}, or "
            "train on",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """What a stream begins with: its latents depend on this, its script and its actions alone.

    height, width: of the latents.
    samples: for each row, which of the seed's samples it is.
    whole: a chunk is denoised and committed by one program, for those who wait for all of it;
      otherwise by two, so that its frames are there before the clean pass.
    noise: in place of the seed's, float32 [row, frame, h, w, channel].
    first_frame: [row, 1, h, w, channel], the latent of a picture to begin with.
    past: [row, frame, h, w, channel], latents of a video to go on from: the first chunks.
    references: [row, reference, frame, h, w, channel], a chunk of latents of each reference image.
    """

    height: int
    width: int
    seed: int = 0
    samples: tuple[int, ...] = (0,)
    whole: bool = False
    noise: np.ndarray | None = None
    first_frame: np.ndarray | None = None
    past: np.ndarray | None = None
    references: np.ndarray | None = None
