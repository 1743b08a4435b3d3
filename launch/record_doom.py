"""Films walks through Doom as training data: videos with their actions, poses and captions.

    python -m launch.record_doom --output=DIR --clips=256 --seed=0

DIR/video and DIR/caption are what `data.path` of a training config names; beside each video lies
its sidecar. DIR/eval/routes has walks that never occur in them, DIR/eval/map those in a map that
never does, each in the same layout. ViZDoom is an extra: `pip install vizdoom`. See docs/worlds.md.
"""

import os
import pathlib
import time

from absl import flags

from launch import command, processes
from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data.worlds import takes
from longlive_jax.data.worlds.doom import game, places, record
from longlive_jax.errors import InputError
from longlive_jax.files import folders

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Folder to write; it must hold no such data yet.")
flags.DEFINE_integer("clips", 64, "Training clips, of one shot or two.")
flags.DEFINE_integer("seed", 0, "Decides everything.")
flags.DEFINE_float("seconds", 10, "Length of a clip.")
flags.DEFINE_integer("height", 160, "Pixels.")
flags.DEFINE_integer("width", 256, "Pixels.")
flags.DEFINE_integer("supersample", 2, "A pixel is the mean of so many by so many of the game's.")
flags.DEFINE_float("cuts", 0.25, "Share of clips with a second shot: another place or view.")
flags.DEFINE_list("places", [], f"Of {', '.join(places.PLACES)}; none: all.")
flags.DEFINE_integer("eval_clips", 16, "Clips in each folder of eval/.")
flags.DEFINE_float("eval_seconds", 0, "Length of a clip in eval/; 0: as --seconds.")

CHUNK = 32  # frames of a chunk: eight latents
FOLDERS = {"train": "", "routes": "eval/routes", "map": "eval/map"}

_games: game.Games  # of a process that films


def main() -> None:
    size = _check_flags()
    output, begun = pathlib.Path(FLAGS.output), time.monotonic()
    tasks = [
        (output / FOLDERS[split], f"clip-{number:06d}", shots, split != "train")
        for split in record.SPLITS
        for number, shots in enumerate(_clips(split))
    ]
    frames = processes.run(write, tasks, start=_start, given=(size,))
    seconds, cores = time.monotonic() - begun, min(os.cpu_count() or 1, len(tasks))
    print(
        f"wrote {FLAGS.clips} clips, {sum(frames[: FLAGS.clips]) / FRAMES_PER_SECOND:.0f} s of "
        f"video, and {len(tasks) - FLAGS.clips} held-out ones in {output / 'eval'}: "
        f"{sum(frames) / seconds / cores:.0f} pictures a second on each of {cores} cores"
    )


def write(folder: pathlib.Path, name: str, shots: tuple[record.Shot, ...], held_out: bool) -> int:
    """Films a clip and writes it; returns the number of its frames."""
    frames = takes.write(folder, name, [record.film(_games, shot) for shot in shots])
    if held_out:
        takes.write_durations(folder / "caption" / name, [shot.frames for shot in shots], CHUNK)
    return frames


def _start(size: game.Size) -> None:
    global _games
    _games = game.Games(size)


def _clips(split: str):
    seconds = FLAGS.seconds if split == "train" else FLAGS.eval_seconds or FLAGS.seconds
    return record.clips(
        FLAGS.seed,
        FLAGS.clips if split == "train" else FLAGS.eval_clips,
        # The first latent is of one frame, the others of four.
        frames=4 * round(seconds * FRAMES_PER_SECOND / 4) + 1,
        split=split,
        places=FLAGS.places,
        cuts=FLAGS.cuts,
    )


def _check_flags() -> game.Size:
    """Refuses bad flags, before anything is written.

    Raises:
      InputError: the flag, its value and the limit; the game is not installed.
    """
    if not FLAGS.output:
        raise InputError("--output is missing; give the folder to write")
    for name, least in (("clips", 1), ("seed", 0), ("eval_clips", 0)):
        if FLAGS[name].value < least:
            raise InputError(f"--{name}={FLAGS[name].value} must be at least {least}")
    for name, least, most in (("seconds", 1, 600), ("eval_seconds", 1, 600), ("cuts", 0, 1)):
        value = FLAGS[name].value
        if not least <= value <= most and (name, value) != ("eval_seconds", 0):
            raise InputError(f"--{name}={value:g} must be {least} to {most}")
    try:
        size = game.Size(FLAGS.height, FLAGS.width, FLAGS.supersample)
        size.drawn(game.sizes())
    except InputError as error:
        flag = str(error).partition("=")[0] in ("height", "width", "supersample")
        raise InputError(f"{'--' * flag}{error}") from error
    for name in FLAGS.places:
        if name not in places.PLACES:
            raise InputError(f"--places={name}: must be of {', '.join(places.PLACES)}")
    if not record.places_of("train", FLAGS.places):
        raise InputError(
            f"--places={','.join(FLAGS.places)}: held out, so nothing is left to train on; give "
            f"one of {', '.join(record.places_of('train'))} too"
        )
    # Clips of another run would be mixed with these.
    for part in ("video", "caption", "eval"):
        if (pathlib.Path(FLAGS.output) / part).exists():
            raise InputError(f"--output={FLAGS.output} already holds {part}; give another folder")
    folders.make(FLAGS.output, "--output")
    return size


if __name__ == "__main__":
    command.run(main)
