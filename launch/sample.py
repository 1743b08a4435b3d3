"""Streams videos from a checkpoint: prompts in, mp4 out, decoded and written while it denoises.

    python -m launch.sample --config=configs/sample_5b.py --checkpoint=CKPT --prompts=FILE \\
        --output=out.mp4

Several videos go to out-000.mp4, out-001.mp4 and so on. With --layout=vbench, vbench2 or
vbench_long --output is a folder of --samples videos of each prompt, by the benchmark's names.
`--noise` and `--prompt_embeds` replace random noise and the text encoder, for comparison with other
implementations; see docs/sampling.md.
"""

import contextlib
import dataclasses
import functools
import sys
import time

import numpy as np
import tqdm
from absl import flags

from launch import command, compile_cache
from launch.layout import Folder
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import networks, workdir
from longlive_jax.data import photographs, sidecars
from longlive_jax.data.images import ContactSheet
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.files import remote
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.pipeline import Pipeline, vae_mesh
from longlive_jax.prompts import actions as actions_lib
from longlive_jax.prompts import embeddings, layouts, pictures, scripts
from longlive_jax.quant import matmul
from longlive_jax.sampling import batches as batches_lib
from longlive_jax.sampling import memory

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert or launch.train.")
flags.DEFINE_enum(
    "weights", "average", list(workdir.WEIGHTS),
    "Of a training run: the weights' moving average, or the last step's.",
)  # fmt: skip
flags.DEFINE_string("prompts", None, "A .txt or .json file, or a folder of captions.")
flags.DEFINE_string("output", None, "The .mp4 to write.")
flags.DEFINE_string("noise", None, "An .npz with noise [batch, frame, channel, h, w].")
flags.DEFINE_string("prompt_embeds", None, "An .npz with ctx [chunk, token, dim], neg, cut.")
flags.DEFINE_string("image", None, "First frame of the video (image-to-video).")
flags.DEFINE_list(
    "references", [], "Images that every chunk sees, memory.references of them at most."
)
flags.DEFINE_string("continue_from", None, "A video to go on from.")
flags.DEFINE_string(
    "actions", None, "Keys and mouse: a sidecar, or a line such as 'w*48, yaw+3*24, still'."
)
flags.DEFINE_integer("continue_frames", None, "How many of its last frames.", lower_bound=1)
flags.DEFINE_string(
    "save_latents", None, "An .npz for the latents, in the layout of --noise; without, one a video."
)
flags.DEFINE_string("contact_sheet", None, "A .png with a frame of every second.")
flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**31 - 1)
flags.DEFINE_integer("batch", 1, "Videos denoised together.", lower_bound=1)
flags.DEFINE_integer("chunks_per_shot", 0, "Of captions without durations.", lower_bound=0)
flags.DEFINE_enum("layout", None, layouts.LAYOUTS, "Names of the videos, in the folder --output.")
flags.DEFINE_integer("samples", 5, "With --layout: videos of a prompt.", lower_bound=1)
flags.DEFINE_integer("vae_device", None, "Index of a device that is the VAE's alone.")
flags.DEFINE_string("compile_cache", None, "Folder of compiled programs, by launch.compile.")


def main() -> None:
    start = time.monotonic()
    cfg = command.config()
    _check_flags()
    with contextlib.ExitStack() as stack:
        folder = None
        if FLAGS.layout:
            folder = _layout(cfg)
            stack.enter_context(folder.opened())
        _sample(cfg, folder, start)


def _sample(cfg, folder: Folder | None, start: float) -> None:
    mesh = mesh_lib.make_mesh(cfg.mesh)
    pipeline = Pipeline(
        FLAGS.checkpoint, cfg, mesh, vae_mesh=vae_mesh(mesh, FLAGS.vae_device),
        weights=FLAGS.weights, decodes=bool(FLAGS.output),
    )  # fmt: skip
    if FLAGS.compile_cache:
        compile_cache.use(FLAGS.compile_cache, cfg, FLAGS.batch, FLAGS.vae_device)
    noise = batches_lib.read_noise(FLAGS.noise, cfg.model) if FLAGS.noise else None
    seed = FLAGS.seed
    if folder:
        videos, texts = folder.videos(cfg), None
    else:
        videos, texts = _videos(pipeline, noise.chunks if noise else None)
        if videos[0].script:
            seed = _follow_script(cfg, videos[0].script)
    batches = batches_lib.make(cfg, videos, noise, FLAGS.batch)
    if folder:
        batches = [batch for batch in batches if not folder.is_whole(batch)]
        remaining = sum(len(batch.videos) for batch in batches)
        print(f"{len(videos) - remaining} of {len(videos)} videos are there", flush=True)
        if not batches:
            return
        videos = [video for batch in batches for video in batch.videos]
    for batch in batches:
        batch.check_images()
    clip = _open_clip(cfg, batches)
    batches = pipeline.acting(batches, FLAGS.actions, clip)
    pictured = clip is not None or any(batch.pictured for batch in batches)
    pictured = _check_references(cfg) or pictured
    pipeline.check(batches, text=bool(FLAGS.prompts), pictured=pictured)
    if not folder:
        _check_apart(cfg, batches)
    if texts is None:
        texts = pipeline.embed(embeddings.distinct(videos))
    batches = pipeline.encoded(batches, clip, FLAGS.references)
    if recipe := recipe_lib.get(cfg.quant.recipe):
        print(f"linear layers by {matmul.backend(recipe)}", flush=True)
    count = sum(len(batch.videos) for batch in batches)
    frames = 0
    for number, batch in enumerate(batches):
        chunks = pipeline.render(batch, texts, seed)
        paths = folder.paths(batch) if folder else _numbered(FLAGS.output, batch, count)
        frames += _write(cfg, chunks, batch, count, (number, len(batches)), start, paths)
        if folder:
            folder.record(batch)
    seconds = time.monotonic() - start
    if folder:
        print(f"{count} videos, {frames} frames, {seconds:.1f} s: {FLAGS.output}")
        return
    path = FLAGS.output or FLAGS.save_latents
    files = count if FLAGS.output else _latent_files(count, batches)
    where = " to ".join(dict.fromkeys(command.numbered(path, i, files) for i in (0, files - 1)))
    print(
        f"{count} video{'s' if count > 1 else ''}, {frames} frames, {seconds:.1f} s, "
        f"{frames / seconds:.1f} frames/s: {where}"
    )


def _layout(cfg):
    """The folder of --layout, with all that its files depend on."""
    if remote.is_remote(FLAGS.output):
        raise InputError(
            f"--output={FLAGS.output}: a folder of --layout is on a local disk; copy it there when "
            "it is whole"
        )
    items = layouts.items(FLAGS.layout, FLAGS.prompts, FLAGS.samples)
    command.check_apart([FLAGS.output], [FLAGS.prompts], networks.folders(FLAGS.checkpoint))
    names = ("layout", "samples", "seed", "batch", "weights")
    settings = {name: FLAGS[name].value for name in names}
    if FLAGS.actions:
        settings["actions"] = FLAGS.actions
    folder = Folder(FLAGS.output, items, cfg, settings | {"checkpoint": str(FLAGS.checkpoint)})
    videos = folder.videos(cfg)
    actions_lib.check(cfg, videos, FLAGS.actions)
    if FLAGS.actions:
        actions_lib.of_video(cfg, videos[0], FLAGS.actions)  # refused before there is a folder
    return folder


def _check_flags():
    if FLAGS.layout:
        for name, what in (("output", "folder of the videos"), ("prompts", "file of the prompts")):
            if not FLAGS[name].value:
                raise InputError(f"--layout={FLAGS.layout} needs --{name}, the {what}")
        for name in ("noise", "prompt_embeds", "image", "references", "continue_from",
                     "save_latents", "contact_sheet", "chunks_per_shot"):  # fmt: skip
            if FLAGS[name].value:
                raise InputError(f"--layout={FLAGS.layout} and --{name} exclude each other")
        return
    if not FLAGS.output and not FLAGS.save_latents:
        raise InputError("--output is missing; give the .mp4 to write, or --save_latents")
    if FLAGS.contact_sheet and not FLAGS.output:
        raise InputError("--contact_sheet needs --output=FILE.mp4, whose frames it shows")
    if bool(FLAGS.prompts) == bool(FLAGS.prompt_embeds):
        raise InputError("give --prompts, a file or folder of prompts, or else --prompt_embeds")
    if FLAGS.continue_frames and not FLAGS.continue_from:
        raise InputError("--continue_frames needs --continue_from, the video it is about")
    for name, suffix in (("output", ".mp4"), ("save_latents", ".npz"), ("contact_sheet", ".png")):
        if FLAGS[name].value:
            command.check_output(name, suffix)


def _videos(pipeline, chunks):
    """All videos to make, and the embeddings of their prompts if these are given."""
    if FLAGS.prompt_embeds:
        arrays = load_npz(FLAGS.prompt_embeds, ("ctx",), ("cut", "neg"))
        one, texts = embeddings.from_embeddings(arrays, pipeline.cfg, chunks)
        videos = [one]
    else:
        videos, texts = pipeline.videos(FLAGS.prompts, chunks, FLAGS.chunks_per_shot), None
    if FLAGS.image:
        videos = [dataclasses.replace(one, image=FLAGS.image) for one in videos]
    return videos, texts


def _follow_script(cfg, script):
    """The seed of a stream's script; refuses a config under which it is another video."""
    values = scripts.settings(cfg)
    for name, value in dict(script.get("settings", {})).items():
        if name in values and values[name] != value:
            raise InputError(
                f"--prompts={FLAGS.prompts}: the stream had {name}={value!r}, the config has "
                f"{values[name]!r}; give --config.{name}={value}"
            )
    flags_of = {"image": "image", "clip": "continue_from"}
    flag = flags_of.get(script.get("begins_with"))
    if flag and not FLAGS[flag].value:
        raise InputError(
            f"--prompts={FLAGS.prompts}: the stream began with an {script['begins_with']} that the "
            f"script does not hold; give it as --{flag}"
        )
    seed = script.get("seed", 0)
    return FLAGS.seed if FLAGS["seed"].present or type(seed) is not int else seed


def _latent_files(videos, batches):
    """How many files --save_latents makes."""
    return len(batches) if FLAGS.noise else videos


def _check_apart(cfg, batches):
    videos = [video for batch in batches for video in batch.videos]
    images = dict.fromkeys(video.image for video in videos)
    made = {
        FLAGS.output: len(videos),
        FLAGS.contact_sheet: len(videos),
        FLAGS.save_latents: _latent_files(len(videos), batches),
    }
    written = [command.numbered(path, i, n) for path, n in made.items() if path for i in range(n)]
    read = actions_lib.files(videos, FLAGS.actions)
    if cfg.model.actions.kind != "none":
        written += [str(sidecars.path_for(path)) for path in written if path.endswith(".mp4")]
        if FLAGS.continue_from and (beside := sidecars.beside(FLAGS.continue_from)):
            read.append(str(beside))
    command.check_apart(
        written,
        [
            FLAGS.prompts,
            FLAGS.noise,
            FLAGS.prompt_embeds,
            FLAGS.continue_from,
            *images,
            *read,
            *FLAGS.references,
        ],
        [*networks.folders(FLAGS.checkpoint), FLAGS.compile_cache],
    )


def _check_references(cfg):
    """Whether there are references; refuses too many, and those that cannot be read."""
    memory.check_references(cfg, len(FLAGS.references))
    for path in FLAGS.references:
        photographs.read(path)
    return bool(FLAGS.references)


def _open_clip(cfg, batches):
    """The video to continue, opened and checked, or None."""
    if not FLAGS.continue_from:
        return None
    if any(batch.pictured or batch.first_frame is not None for batch in batches):
        raise InputError(
            "--continue_from and a first frame exclude each other: the continued video has one "
            "already; drop --continue_from or the image"
        )
    clip = pictures.Clip(FLAGS.continue_from, *batches[0].pixels, FLAGS.continue_frames)
    clip.check_continues(cfg.model.chunk_frames)
    return clip


def _numbered(path, batch, videos):
    """The files of a batch, of so many videos in all; none without a path."""
    count = len(batch.videos) if path else 0
    return [command.numbered(path, batch.index + i, videos) for i in range(count)]


def _write(cfg, chunks, batch, videos, number, start, paths):
    """Writes a batch as it is made, with a progress bar; returns the number of frames.

    `number`: the batch's number, and the number of batches. `start`: when the command began.
    `paths`: the mp4s.
    """
    count = len(batch.videos)
    total = batches_lib.frames(batch.latent_frames(cfg.model))

    def outputs(path):
        return _numbered(path, batch, videos)

    sheets = [ContactSheet() for _ in range(count)] if FLAGS.contact_sheet else []
    kept, latent_frames, shown = [], 0, 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm.tqdm(total=total, unit=" frames", desc="streaming"))
        writers = list[VideoWriter]()
        if batch.actions is not None:  # behind the videos, of which it says how many pictures
            stack.push(functools.partial(_write_records, writers, batch.actions))
        for path in paths:
            writers.append(stack.enter_context(VideoWriter(path, *batch.pixels, frames=total)))
        for chunk in chunks:
            if number[0] == chunk.index == 0 and chunk.frames:
                np.asarray(chunk.frames[0])
                seconds = time.monotonic() - start
                bar.write(f"first frames after {seconds:.1f} s", file=sys.stderr)
                bar.update(shown := 1)
            chunk.check()
            for piece in map(np.asarray, chunk.frames):
                for i, writer in enumerate(writers):
                    writer.write(piece[i])
                for i, sheet in enumerate(sheets):
                    sheet.add(piece[i])
            if FLAGS.save_latents:
                kept.append(np.asarray(chunk.latents, np.float32))
            latent_frames += chunk.latents.shape[1]
            shown, before = batches_lib.frames(latent_frames), shown
            bar.update(shown - before)
    if kept:
        _save_latents(np.moveaxis(np.concatenate(kept, axis=1), -1, 2), number, outputs)
    for sheet, path in zip(sheets, outputs(FLAGS.contact_sheet) if sheets else ()):
        sheet.save(path)
    return total * count


def _write_records(writers, actions, kind, *_):
    """The sidecar of each video that is there, however it ended: what was applied in it."""
    if kind is not None and issubclass(kind, Exception) and kind is not NotFiniteError:
        return
    for writer, one in zip(writers, actions):
        if writer.frames_written:
            sidecars.write(sidecars.path_for(writer.path), one.cut(0, writer.frames_written))


def _save_latents(latents, number, outputs):
    if FLAGS.noise:
        save_npz(command.numbered(FLAGS.save_latents, *number), latents=latents)
        return
    for path, one in zip(outputs(FLAGS.save_latents), latents):
        save_npz(path, latents=one[None])


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output", "save_latents", "contact_sheet"))
