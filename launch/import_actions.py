"""Public recordings of games to sidecars, NAME.actions.npz beside each NAME.mp4.

    python -m launch.import_actions --format=gamefactory --input=GF-Minecraft/data_2003
    python -m launch.import_actions --format=canonical --input=DIR --output=DIR24 --fps=24

Formats: gamefactory, vpt, mind, abot, fastvideo, and canonical, our own at another rate. Each
recording is held against its video: as many pictures, and their rate. See docs/actions.md.
"""

import collections
import pathlib

from absl import flags, logging

from launch import command
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars.importers import FORMATS, Options, Recording
from longlive_jax.data.video_reader import VideoInfo, probe
from longlive_jax.errors import InputError
from longlive_jax.files.names import as_text

FLAGS = flags.FLAGS
flags.DEFINE_enum("format", None, list(FORMATS), "What the recordings are of.")
flags.DEFINE_string("input", None, "A recording, or a folder of them.")
flags.DEFINE_string("output", None, "A folder for the sidecars; default: beside the videos.")
flags.DEFINE_float(
    "fps", None, "Resample to so many pictures a second; needs --output.", 0.1, 1000.0
)
flags.DEFINE_float(
    "source_fps", None, "Of recordings without a video, where they do not say.", 0.1, 1000.0
)
flags.DEFINE_string("keys", None, "Of arrays: the key of each column, KeyW,KeyS,KeyA,KeyD.")
flags.DEFINE_enum("view", None, sidecars.VIEWS, "Default: as the format has it.")
flags.DEFINE_bool("skip_bad", False, "Leave out recordings that do not fit, with a warning.")


def main() -> None:
    for name, what in (("format", "one of " + ", ".join(FORMATS)), ("input", "file or folder")):
        if not FLAGS[name].value:
            raise InputError(f"--{name} is missing; give the {what}")
    if FLAGS.fps and not FLAGS.output:
        raise InputError("--fps needs --output: beside a video are the actions of its own rate")
    source = pathlib.Path(FLAGS.input)
    recordings = FORMATS[FLAGS.format].find(source)
    paths = [_path(recording, source) for recording in recordings]
    path, count = collections.Counter(paths).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: the sidecar of {count} recordings; give one of them at a time")
    read = [path for one in recordings for path in (one.actions, one.video)]
    command.check_apart(map(str, paths), read)
    made = pictures = clipped = 0
    for recording, path in zip(recordings, paths):
        try:
            actions = _read(recording)
        except InputError as error:
            if not FLAGS.skip_bad:
                raise
            logging.warning("left out: %s", error)
            continue
        sidecars.write(path, actions)
        made, pictures, clipped = made + 1, pictures + len(actions), clipped + actions.clipped
    if not made:
        raise InputError(f"--input={source}: none of {len(recordings)} recordings can be taken")
    print(
        f"{made} of {len(recordings)} recordings, {pictures} pictures, the mouse cut in {clipped} "
        f"of them: {as_text(FLAGS.output or source)}"
    )


def _path(recording: Recording, source: pathlib.Path) -> pathlib.Path:
    """Beside the video, or the recording without one; in --output below the same folders."""
    beside = recording.video or recording.actions
    name = beside.with_name(beside.stem.removesuffix(".actions"))
    if not FLAGS.output:
        return sidecars.path_for(f"{name}.mp4")
    root = source if source.is_dir() else recording.actions.parent
    below = name.parent.relative_to(root) if name.is_relative_to(root) else pathlib.Path()
    return sidecars.path_for(pathlib.Path(FLAGS.output) / below / f"{name.name}.mp4")


def _read(recording: Recording) -> sidecars.Actions:
    info: VideoInfo | None = probe(recording.video) if recording.video else None
    keys = FLAGS.keys and tuple(name.strip() for name in FLAGS.keys.split(","))
    fps = float(info.fps) if info else FLAGS.source_fps
    actions = FORMATS[FLAGS.format].read(
        recording.actions, Options(fps=fps, keys=keys, view=FLAGS.view)
    )
    if info:
        actions.check_video(info.frames, float(info.fps))
    if FLAGS.fps:
        frames = len(info.indices(fps=FLAGS.fps)) if info else None
        actions = sidecars.to_rate(actions, FLAGS.fps, frames)
    return actions


if __name__ == "__main__":
    command.run(main)
