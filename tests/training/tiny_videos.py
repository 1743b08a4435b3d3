"""Folders of short videos with captions."""

import json
import pathlib

import numpy as np

from longlive_jax.data.video import VideoWriter
from tests.launch.commands import PROMPTS


def write_videos(root: pathlib.Path, folders: int = 3, frames: int = 20, size=(32, 64)):
    draw = np.random.default_rng(0)
    for i in range(folders):
        name = f"v{i}"
        (root / "caption" / name).mkdir(parents=True)
        caption = json.dumps({"caption": PROMPTS[i % 2]})
        (root / "caption" / name / "000000.json").write_text(caption)
        with VideoWriter(root / "video" / name / "000000.mp4", *size) as writer:
            writer.write(draw.integers(0, 256, (frames, *size, 3)).astype(np.uint8))
    return root
