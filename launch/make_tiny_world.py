"""A small world of moving shapes with captions, as training data: videos of a few seconds a shot.

    python -m launch.make_tiny_world --output=DIR --clips=64 --seed=0

DIR/video and DIR/caption are what `data.path` of a training config names. DIR/eval holds captions
of combinations that never occur in them, for `data.eval_path` and `launch.sample --prompts`.

With --figure a shape is driven by keys and a mouse: beside each video lies its sidecar of actions,
and DIR/eval has video/ and caption/ of figures that never occur in training (docs/worlds.md).
"""

import json
import pathlib

from absl import flags

from launch import command, processes
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.worlds import figure, shapes, takes
from longlive_jax.errors import InputError
from longlive_jax.files import folders

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Folder to write; it must hold no such data yet.")
flags.DEFINE_integer("clips", 64, "Training clips, of 2 to 4 shots each; of a figure, 1 or 2.")
flags.DEFINE_integer("seed", 0, "Decides everything.")
flags.DEFINE_integer("height", shapes.HEIGHT, "Pixels.")
flags.DEFINE_integer("width", shapes.WIDTH, "Pixels.")
flags.DEFINE_bool("figure", False, "Clips of a figure that is driven, with its actions.")

EVAL_CLIPS = 16
CHUNK = 32  # frames of a chunk: eight latents


def main() -> None:
    _check_flags()
    output, size = pathlib.Path(FLAGS.output), (FLAGS.height, FLAGS.width)
    frames = (_make_figures if FLAGS.figure else _make_shapes)(output, size)
    what = "clips" if FLAGS.figure else "captions"
    print(
        f"wrote {FLAGS.clips} clips, {frames / FRAMES_PER_SECOND:.0f} s of video, and "
        f"{EVAL_CLIPS} held-out {what} in {output / 'eval'}"
    )


def _make_shapes(output: pathlib.Path, size: tuple[int, int]) -> int:
    clips = enumerate(shapes.clips(FLAGS.seed, FLAGS.clips))
    frames = sum(processes.run(write, [(output, clip_name(n), shots, size) for n, shots in clips]))
    for number, shots in enumerate(shapes.clips(FLAGS.seed, EVAL_CLIPS, held_out=True)):
        folder = output / "eval" / clip_name(number)
        _write_captions(folder, shots)
        takes.write_durations(folder, [shot.frames for shot in shots], CHUNK)
    return frames


def _make_figures(output: pathlib.Path, size: tuple[int, int]) -> int:
    tasks = [
        (folder, clip_name(number), shots, size, folder != output)
        for folder, count in ((output, FLAGS.clips), (output / "eval", EVAL_CLIPS))
        for number, shots in enumerate(figure.clips(FLAGS.seed, count, held_out=folder != output))
    ]
    return sum(processes.run(write_figure, tasks)[: FLAGS.clips])


def clip_name(number: int) -> str:
    """The folder of a clip."""
    return f"clip-{number:06d}"


def write(
    output: pathlib.Path, name: str, shots: tuple[shapes.Shot, ...], size: tuple[int, int]
) -> int:
    """Writes a clip's videos and captions; returns the number of its frames."""
    for number, shot in enumerate(shots):
        with VideoWriter(output / "video" / name / f"{number:06d}.mp4", *size) as writer:
            writer.write(shapes.render(shot, 0, shot.frames, *size))
    _write_captions(output / "caption" / name, shots)
    return sum(shot.frames for shot in shots)


def write_figure(
    output: pathlib.Path,
    name: str,
    shots: tuple[figure.Shot, ...],
    size: tuple[int, int],
    held_out: bool,
) -> int:
    """Writes a clip's videos, sidecars and captions; returns the number of its frames."""
    frames = takes.write(output, name, [figure.film(shot, *size) for shot in shots])
    if held_out:
        counts = [shot.frames for shot in shots]
        takes.write_durations(output / "caption" / name, counts, CHUNK)
    return frames


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
