"""Grades videos of a world: of shapes against their prompts, of Doom against their actions.

    python -m launch.grade --videos=DIR --prompts=FILE [--output=DIR]

prints a table, and writes grade.json and grade.png: which objects, colours, sizes, backgrounds,
places and motions are right, how sharp, when cuts take effect, whether what returns is the same,
and how all of it drifts. FILE is what launch.sample had as --prompts. See docs/grading.md.

    python -m launch.grade --clips=200 --seed=1
    python -m launch.grade --clips=40 --config=configs/train_ar_tiny_world.py --checkpoint=CKPT

grade the world's own clips, as they are drawn, or through a checkpoint's VAE: the grader's own
accuracy, and the most that a model with this VAE can reach.

    python -m launch.grade --world=doom --videos=DIR [--simulator]
    python -m launch.grade --world=doom --clips=20 --seed=1

grade walks by the sidecars beside them: turns, moves and walls from pixels alone, and with
--simulator against the game's own pictures of the same actions.

    python -m launch.grade --world=doom --simulator --videos=WITH --against=WITHOUT --window=2.7

grades two folders of the same walks, as with landmarks and without, and compares them: returns to
the same place from within the window's seconds and from beyond.

    python -m launch.grade --cuts=scenedetect --videos=DIR --prompts=FILE

looks for the scripts' cuts in any footage, whatever its prompts, and writes cuts.json.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import flags
from scipy import ndimage

from launch import command
from longlive_jax import config as config_lib
from longlive_jax.data.video_reader import VideoFile
from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError
from longlive_jax.files import folders, versioned
from longlive_jax.grading import folder as folder_lib
from longlive_jax.grading import plot, scenes, summary, video
from longlive_jax.grading.walk import flow as walk_flow
from longlive_jax.grading.walk import folder as walk_folder
from longlive_jax.grading.walk import summary as walk_summary
from longlive_jax.prompts import shots

FLAGS = flags.FLAGS
flags.DEFINE_enum("world", "shapes", ["shapes", "doom"], "Of which world the videos are.")
flags.DEFINE_enum("cuts", None, ["scenedetect"], "Look for the cuts alone, in any footage.")
flags.DEFINE_bool("simulator", False, "Of doom: run the game beside each video. Needs ViZDoom.")
flags.DEFINE_string("against", None, "Of doom: a folder of the same walks, to compare with.")
flags.DEFINE_float("window", None, "Of doom: seconds of its past that the model sees.")
flags.DEFINE_float("focal", walk_flow.FOCAL, "Of doom: focal length, in heights of the picture.")
flags.DEFINE_string("videos", None, "Folder of .mp4 files.")
flags.DEFINE_string("prompts", None, "A .txt or .json file, or a folder of captions.")
flags.DEFINE_string("output", None, "Folder for grade.json and grade.png; default: --videos.")
flags.DEFINE_integer("chunks_per_shot", 0, "Of captions without durations.", lower_bound=0)
flags.DEFINE_integer("clips", None, "Grade so many clips of the world itself.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of --clips.", lower_bound=0)
flags.DEFINE_float("blur", 0.0, "With --clips: blur them, by so many pixels.", lower_bound=0)
flags.DEFINE_string("checkpoint", None, "With --clips: encode and decode them by its VAE.")

CHUNKS = 2  # of each shot of a clip


def main() -> None:
    if FLAGS.cuts:
        _cuts()
    elif FLAGS.world == "doom":
        _walks()
    else:
        _shapes()


def _shapes() -> None:
    if FLAGS.simulator:
        raise InputError("--simulator is for --world=doom; leave it out")
    if FLAGS.clips is None:
        if not FLAGS.videos or not FLAGS.prompts:
            missing = "prompts" if FLAGS.videos else "videos"
            raise InputError(
                f"--{missing} is missing; give --videos=DIR --prompts=FILE, or --clips=N to grade "
                "the world's own clips"
            )
        if FLAGS.checkpoint or FLAGS.blur:
            name = "checkpoint" if FLAGS.checkpoint else "blur"
            raise InputError(f"--{name} is for --clips, the world's own clips; leave it out")
        records, output = _videos(command.config(config_lib.Config())), FLAGS.output or FLAGS.videos
    else:
        if FLAGS.videos or FLAGS.prompts:
            raise InputError("--clips grades the world's own clips; leave out --videos, --prompts")
        if FLAGS.checkpoint:  # it needs the config of its networks
            records = _clips(command.config())
        else:
            records = _clips(command.config(config_lib.Config()))
        output = FLAGS.output
    if output:
        folders.make(output, "--output")
    done = list(tqdm.tqdm(records, desc="grading", unit=" videos", disable=None))
    total = summary.summarise(done)
    print(summary.table(total))
    for record in done if FLAGS.videos else ():
        wrong = sum(not chunk["all_right"] for chunk in record["chunks"])
        print(f"{record['name']}: {len(record['chunks']) - wrong} of {len(record['chunks'])} right")
    if output:
        content = {"summary": total, "videos": done}
        _write(output, content, summary, "share of chunks that are right, over time")


def _walks() -> None:
    """Grades videos of Doom, or the game's own clips."""
    if FLAGS.prompts:
        raise InputError("--prompts is for --world=shapes; walks are graded by their sidecars")
    if not 0.1 <= FLAGS.focal <= 10:
        raise InputError(f"--focal={FLAGS.focal:g} must be 0.1 to 10 heights of the picture")
    if FLAGS.window is not None and not 0 < FLAGS.window < 1e6:
        raise InputError(f"--window={FLAGS.window:g} must be above 0 seconds")
    against = None
    if FLAGS.clips is None:
        if not FLAGS.videos:
            raise InputError(
                "--videos is missing; give --videos=DIR, with a sidecar beside each video, or "
                "--clips=N to grade the game's own clips"
            )
        if FLAGS.checkpoint or FLAGS.blur:
            name = "checkpoint" if FLAGS.checkpoint else "blur"
            raise InputError(f"--{name} is for --clips, the world's own clips; leave it out")
        if FLAGS.against:
            walk_folder.check_same(pathlib.Path(FLAGS.videos), pathlib.Path(FLAGS.against))
            against = _walk_videos(FLAGS.against)
        records = _walk_videos(FLAGS.videos)
    else:
        for name in ("videos", "against"):
            if FLAGS[name].value:
                raise InputError(f"--clips grades the game's own clips; leave out --{name}")
        cfg = command.config() if FLAGS.checkpoint else command.config(config_lib.Config())
        given = FLAGS.checkpoint or cfg != config_lib.Config()
        size = (cfg.video.height, cfg.video.width) if given else walk_folder.SIZE
        records = walk_folder.clips(
            FLAGS.seed, FLAGS.clips, size=size, simulate=FLAGS.simulator,
            change=_changes(_vae(cfg) if FLAGS.checkpoint else None),
        )  # fmt: skip
    output = FLAGS.output or FLAGS.videos
    if output:
        folders.make(output, "--output")
    done = list(tqdm.tqdm(records, desc="grading", unit=" videos", disable=None))
    total = walk_summary.summarise(done, FLAGS.window)
    print(walk_summary.table(total))
    content = {"summary": total, "videos": done}
    if against is not None:
        theirs = list(tqdm.tqdm(against, desc="grading", unit=" videos", disable=None))
        other = walk_summary.summarise(theirs, FLAGS.window)
        print(f"{FLAGS.against}:\n{walk_summary.table(other)}")
        print(walk_summary.compared((FLAGS.videos, FLAGS.against), (total, other)))
        content["against"] = {"folder": FLAGS.against, "summary": other, "videos": theirs}
    if output:
        _write(output, content, walk_summary, "share of seconds that are right, over time")


def _walk_videos(folder):
    return walk_folder.videos(pathlib.Path(folder), simulate=FLAGS.simulator, focal=FLAGS.focal)


def _changes(through):
    """What happens to clips before they are graded: uint8 [frame, height, width, 3] to the same."""

    def change(frames):
        frames = through(frames) if through else frames
        if FLAGS.blur:
            frames = ndimage.gaussian_filter(frames, (0, FLAGS.blur, FLAGS.blur, 0))
        return frames

    return change


def _write(output, content, kind, title) -> None:
    """Writes grade.json and grade.png. kind: the module of the summary."""
    place = pathlib.Path(output)
    versioned.write(place / "grade.json", kind.FORMAT, kind.VERSION, content)
    plot.save(place / "grade.png", title, *kind.over_time(content["videos"]))
    print(f"{place / 'grade.json'}, {place / 'grade.png'}")


def _cuts() -> None:
    """Compares the cuts that PySceneDetect sees with those of the scripts."""
    if FLAGS.clips is not None or not FLAGS.videos or not FLAGS.prompts:
        raise InputError("--cuts takes --videos=DIR --prompts=FILE, and no --clips")
    cfg, done = command.config(config_lib.Config()), []
    within = cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION
    for file, _, script in tqdm.tqdm(list(_scripts(cfg)), unit=" videos", disable=None):
        asked = [
            video.frames_of(i, cfg.model.chunk_frames)
            for i, chunk in enumerate(script.chunks)
            if chunk.cut and i
        ]
        done.append({"name": file.stem, **scenes.compare(asked, scenes.detected(file), within)})
    total = scenes.summarise(done)
    print(scenes.table(total))
    place = pathlib.Path(FLAGS.output or FLAGS.videos)
    folders.make(place, "--output")
    content = {"summary": total, "videos": done}
    versioned.write(place / "cuts.json", scenes.FORMAT, scenes.VERSION, content)
    print(place / "cuts.json")


def _scripts(cfg: config_lib.Config) -> Iterator[tuple[pathlib.Path, int, shots.Video]]:
    """Each video, its frames and the script that it was made of."""
    opened = {}
    for file in folder_lib.videos(pathlib.Path(FLAGS.videos)):
        with VideoFile(file) as one:
            opened[file] = len(one)
    frames = cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION
    # The length of a script that has none of its own is that of the videos that were made of it.
    chunks = max(1, *((n + config_lib.TEMPORAL_COMPRESSION - 1) // frames for n in opened.values()))
    scripts = shots.read(
        FLAGS.prompts, chunks=chunks, chunk_frames=cfg.model.chunk_frames,
        scene_cut_prefix=cfg.sample.scene_cut_prefix, chunks_per_shot=FLAGS.chunks_per_shot,
    )  # fmt: skip
    matched = folder_lib.matched(opened, [(one.name, one.chunks[0].prompt) for one in scripts])
    return ((file, length, scripts[matched[file]]) for file, length in opened.items())


def _videos(cfg: config_lib.Config) -> Iterator[dict[str, Any]]:
    """The record of each video; all names and prompts are checked before the first."""
    graded, prefix = [], cfg.sample.scene_cut_prefix
    for file, length, script in _scripts(cfg):
        lines = video.script_of(script.chunks, prefix)
        video.check(str(file), length, lines, cfg.model.chunk_frames)
        graded.append((file, lines))
    return (_graded(file, lines, cfg.model.chunk_frames) for file, lines in graded)


def _graded(file, lines, chunk_frames):
    with VideoFile(file) as one:
        return video.grade(file.stem, one.read, len(one), lines, chunk_frames)


def _clips(cfg: config_lib.Config) -> Iterator[dict[str, Any]]:
    """Records of held-out clips of the world, at the config's size; each has two shots."""
    size = cfg.video.height, cfg.video.width
    if not FLAGS.checkpoint and cfg == config_lib.Config():
        size = shapes.HEIGHT, shapes.WIDTH
    change = _changes(_vae(cfg) if FLAGS.checkpoint else None)
    length = cfg.model.chunk_frames
    for number, clip in enumerate(shapes.clips(FLAGS.seed, FLAGS.clips, held_out=True)):
        first = video.frames_of(CHUNKS, length)
        second = video.frames_of(2 * CHUNKS, length) - first
        parts = [shapes.render(s, 0, n, *size) for s, n in zip(clip, (first, second))]
        frames = change(np.concatenate(parts))
        lines = [
            video.Line(s.caption, k == 0 and i > 0)
            for i, s in enumerate(clip[:2])
            for k in range(CHUNKS)
        ]
        yield video.grade(
            f"clip-{number:06d}", lambda a, b, f=frames: f[a:b], len(frames), lines, length
        )


def _vae(cfg):
    """A function that encodes and decodes frames, uint8 [frame, height, width, 3]."""
    import jax

    from longlive_jax import mesh as mesh_lib
    from longlive_jax.checkpoints import networks
    from longlive_jax.data.images import to_float
    from longlive_jax.models import vae

    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, networks.ENCODER + networks.DECODER)

    @jax.jit
    def both(params, frames):
        latents = vae.encode_video(params, cfg.vae, frames)
        return vae.to_uint8(vae.decode_video(params, cfg.vae, latents))

    return lambda frames: np.asarray(both(params, to_float(frames)[None]))[0]


if __name__ == "__main__":
    command.run(main)
