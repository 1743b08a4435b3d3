"""A small world of moving shapes with captions, as training data: videos of a few seconds a shot.

    python -m launch.make_tiny_world --output=DIR --clips=64 --seed=0

DIR/video and DIR/caption are what `data.path` of a training config names. DIR/eval holds captions
of combinations that never occur in them, for `data.eval_path` and `launch.sample --prompts`.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib

from absl import flags

from launch import command
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError
from longlive_jax.files import folders

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Folder to write; it must hold no such data yet.")
flags.DEFINE_integer("clips", 64, "Training clips, of 2 to 4 shots each.")
flags.DEFINE_integer("seed", 0, "Decides everything.")
flags.DEFINE_integer("height", shapes.HEIGHT, "Pixels.")
flags.DEFINE_integer("width", shapes.WIDTH, "Pixels.")

EVAL_CLIPS = 16
CHUNK = 32  # frames of a chunk: eight latents


def main() -> None:
    _check_flags()
    output = pathlib.Path(FLAGS.output)
    clips = shapes.clips(FLAGS.seed, FLAGS.clips)
    names = [f"clip-{number:06d}" for number in range(FLAGS.clips)]
    size = FLAGS.height, FLAGS.width
    # Each process draws and encodes whole clips. Threads of JAX and absl forbid a fork.
    with concurrent.futures.ProcessPoolExecutor(
        min(os.cpu_count(), FLAGS.clips), multiprocessing.get_context("spawn")
    ) as pool:
        tasks = [pool.submit(write, output, *task, size) for task in zip(names, clips)]
        try:
            frames = sum(task.result() for task in tasks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for number, shots in enumerate(shapes.clips(FLAGS.seed, EVAL_CLIPS, held_out=True)):
        folder = output / "eval" / f"clip-{number:06d}"
        _write_captions(folder, shots)
        durations = " ".join(str(max(1, shot.frames // CHUNK)) for shot in shots)
        (folder / "shot_durations.txt").write_text(f"{durations}\n")
    print(
        f"wrote {FLAGS.clips} clips, {frames / FRAMES_PER_SECOND:.0f} s of video, and "
        f"{EVAL_CLIPS} held-out captions in {output / 'eval'}"
    )


def write(
    output: pathlib.Path, name: str, shots: tuple[shapes.Shot, ...], size: tuple[int, int]
) -> int:
    """Writes a clip's videos and captions; returns the number of its frames."""
    for number, shot in enumerate(shots):
        with VideoWriter(output / "video" / name / f"{number:06d}.mp4", *size) as writer:
            writer.write(shapes.render(shot, 0, shot.frames, *size))
    _write_captions(output / "caption" / name, shots)
    return sum(shot.frames for shot in shots)


def _write_captions(folder: pathlib.Path, shots: tuple[shapes.Shot, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, shot in enumerate(shots):
        (folder / f"{number:06d}.json").write_text(json.dumps({"caption": shot.caption}) + "\n")


def _check_flags() -> None:
    """Refuses bad flags, before anything is written.

    Raises:
      InputError: the flag, its value and the limit.
    """
    if not FLAGS.output:
        raise InputError("--output is missing; give the folder to write")
    for name, least in (("clips", 1), ("seed", 0)):
        if FLAGS[name].value < least:
            raise InputError(f"--{name}={FLAGS[name].value} must be at least {least}")
    for name in ("height", "width"):
        value = FLAGS[name].value
        if value < 32 or value % 2:
            raise InputError(f"--{name}={value} must be even, for the video's colours, and >= 32")
    # Clips of another run would be mixed with these.
    for part in ("video", "caption", "eval"):
        if (pathlib.Path(FLAGS.output) / part).exists():
            raise InputError(f"--output={FLAGS.output} already holds {part}; give another folder")
    folders.make(FLAGS.output, "--output")


if __name__ == "__main__":
    command.run(main)
