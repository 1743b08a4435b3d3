"""Text to video: three shots of the tiny world of moving shapes, on a laptop in a minute.

python -m examples.generate out.mp4
"""

import sys

from longlive_jax import Pipeline, load_config
from longlive_jax.data.video import VideoWriter

SHOTS = [
    {"prompt": "A yellow star moves to the right over a black background.", "chunks": 1},
    {"prompt": "A pink moon gets bigger over a dark blue background.", "chunks": 1},
    {"prompt": "Over a white background, a red triangle bounces up and down.", "chunks": 1},
]


def main(path: str, **settings) -> None:
    cfg = load_config("configs/train_ar_tiny_world.py", {"sample.steps": 10} | settings)
    pipeline = Pipeline.from_checkpoint("assets/tiny_world/checkpoint", cfg)
    with VideoWriter(path, *pipeline.pixels) as video:
        for chunk in pipeline.generate(SHOTS, seed=0):
            chunk.check()  # weights that have diverged would make it black
            for frames in chunk.frames:  # uint8 [row, frame, height, width, 3]
                video.write(frames[0])


if __name__ == "__main__":
    main(sys.argv[1])
