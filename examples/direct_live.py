"""A stream that is directed while it is made: a prompt, another one, a cut; saved and replayed.

python -m examples.direct_live FOLDER
"""

import pathlib
import sys

import numpy as np

from longlive_jax import Pipeline, load_config
from longlive_jax.data.video import VideoWriter

# By the chunk that each of them begins with.
DIRECTIONS = {
    0: dict(text="A red circle moves to the right over a grey background."),
    # Inside the shot; the visible past is brought under the new prompt.
    1: dict(text="A red circle gets smaller over a grey background.", recache=True),
    2: dict(text="A blue star falls over a black background.", cut=True),
}


def main(folder: str, **settings) -> None:
    cfg = load_config("configs/train_ar_tiny_world.py", {"sample.steps": 10} | settings)
    pipeline = Pipeline.from_checkpoint("assets/tiny_world/checkpoint", cfg)
    session, latents = pipeline.session(seed=0), []
    with VideoWriter(pathlib.Path(folder, "live.mp4"), *pipeline.pixels) as video:
        for index in range(3):
            if index in DIRECTIONS:
                session.prompt(**DIRECTIONS[index])
            chunk = session.step()
            for frames in chunk.frames:  # there before the chunk's clean pass has run
                video.write(frames[0])
            latents.append(np.asarray(chunk.latents))

    # The stream is a value: what a file keeps of it goes on, or begins again, anywhere.
    session.save(pathlib.Path(folder, "live.session"))
    restored = pipeline.restore(pathlib.Path(folder, "live.session"))
    for chunk in restored.replay():
        print(f"chunk {chunk.index}: {chunk.applied.prompts[0]}")
        assert np.array_equal(chunk.latents, latents[chunk.index])


if __name__ == "__main__":
    main(sys.argv[1])
