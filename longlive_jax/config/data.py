"""Settings of training data."""

import dataclasses
from typing import Annotated

from longlive_jax.config.section import Count, Index, OneOf, Probability, Range, Section


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """Training data. Frames are resized to video.height x video.width."""

    NAME = "data"

    path: str = ""  # folder with video/ and caption/, or one that launch.encode_dataset wrote
    cached: bool = False  # `path` holds latents and text embeddings, already encoded
    eval_path: str = ""  # held-out captions, in any form that launch.sample reads
    # Processes that decode, on each host; 0: the trainer itself decodes.
    workers: Annotated[int, Range(0, 1024)] = 2
    # Longer shots are cut after this number, and one second is skipped; 0: no limit.
    max_chunks_per_shot: Index = 0
    single_shot: bool = False  # a sample is one video file, not a row of them
    allow_padding: bool = False  # folders too short for a sample are padded, the rest masked
    min_chunks: Count = 1  # least valid chunks of a padded sample
    max_bad_share: Probability = 0.1  # unreadable samples, of those read, before the run stops
    # How the VAE is sharded over `seq`: by the frames' width, or by whole chunks.
    encode: Annotated[str, OneOf(("width", "halo"))] = "width"
