"""Streams videos from a checkpoint: prompts in, mp4 out, decoded and written while it denoises.

    python -m launch.sample --config=configs/sample_5b.py --checkpoint=CKPT --prompts=FILE --output=out.mp4

Several videos go to out-000.mp4, out-001.mp4 and so on. `--noise` and `--prompt_embeds` replace
random noise and the text encoder, for comparison with other implementations; see docs/sampling.md.
"""

import contextlib
import dataclasses
import os

import jax
import numpy as np
import tqdm
from absl import flags

from launch import command, parts
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.data.arrays import load_npz, save_npz
from longlive_jax.data.atomic import partial_file
from longlive_jax.data.images import ContactSheet, read_image, to_float
from longlive_jax.data.video import VideoWriter, read_video
from longlive_jax.errors import InputError
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.sampling import decode, render, script, shots, stream

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert or launch.train.")
flags.DEFINE_string("prompts", None, "A .txt or .json file, or a folder of captions.")
flags.DEFINE_string("output", None, "The .mp4 to write.")
flags.DEFINE_string("noise", None, "An .npz with noise [batch, frame, channel, h, w].")
flags.DEFINE_string("prompt_embeds", None, "An .npz with ctx [chunk, token, dim], neg, cut.")
flags.DEFINE_string("image", None, "First frame of the video (image-to-video).")
flags.DEFINE_string("continue_from", None, "A video to go on from.")
flags.DEFINE_integer("continue_frames", None, "How many of its last frames; default all.")
flags.DEFINE_string("save_latents", None, "An .npz for the latents, in the layout of --noise.")
flags.DEFINE_string("contact_sheet", None, "A .png with a frame of every second.")
flags.DEFINE_integer("seed", 0, "Of the noise.")
flags.DEFINE_integer("batch", 1, "Videos denoised together.", lower_bound=1)
flags.DEFINE_integer("chunks_per_shot", 0, "Of a folder of captions without durations.")
flags.DEFINE_integer("vae_device", None, "Index of a device that is the VAE's alone.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.output and not FLAGS.save_latents:
        raise InputError("--output is missing; give the .mp4 to write, or --save_latents")
    for path in (FLAGS.output, FLAGS.save_latents, FLAGS.contact_sheet):
        if path:
            partial_file(path).unlink()  # an output that cannot be written is found out now
    mesh = mesh_lib.make_mesh(cfg.mesh)
    encoder = parts.text_encoder(FLAGS.checkpoint, cfg, mesh) if FLAGS.prompts else None
    batches = _batches(cfg, encoder)
    vae_mesh = parts.vae_mesh(cfg, mesh, FLAGS.vae_device)
    for _, batch in batches:
        render.check(cfg, batch)
        if FLAGS.output:
            check_mesh(vae_mesh, len(batch.scripts), batch.width)
    pictures = FLAGS.continue_from or any(images for images, _ in batches)
    needed = (parts.DECODER if FLAGS.output else ()) + (parts.ENCODER if pictures else ())
    vae_params = parts.load(FLAGS.checkpoint, "vae", cfg, vae_mesh, needed) if needed else None
    params = parts.load(FLAGS.checkpoint, "dit", cfg, mesh)
    total = sum(len(batch.scripts) for _, batch in batches)
    for images, batch in batches:
        batch = _with_pictures(cfg, batch, images, vae_params, vae_mesh)
        held = batch.first_frame is not None
        sample = dataclasses.replace(cfg.sample, image_to_video=held)
        sampler = stream.Sampler(dataclasses.replace(cfg, sample=sample), mesh)
        decoder = decode.Decoder(cfg, vae_params, vae_mesh) if FLAGS.output else None
        _write(cfg, render.render(sampler, params, batch, FLAGS.seed, decoder), batch, total)


def _batches(cfg, encoder):
    """[(image of each video or None, Batch)] of videos of equal length."""
    noise = _npz(FLAGS.noise, "noise") if FLAGS.noise else {}
    size = cfg.sample.height // 16, cfg.sample.width // 16
    chunks = None
    if noise:
        array = _channels_last(noise["noise"], "noise", cfg)
        noise = noise | {"noise": array}
        size = array.shape[2:4]
        if array.shape[1] % cfg.model.chunk_frames or not array.shape[1]:
            raise InputError(
                f"--noise: {array.shape[1]} latent frames must be a multiple of "
                f"model.chunk_frames={cfg.model.chunk_frames}; cut or extend the noise"
            )
        chunks = array.shape[1] // cfg.model.chunk_frames
    scripts, images, negative = _scripts(cfg, encoder, chunks)
    if noise:
        if len(scripts) == 1:
            scripts, images = scripts * len(noise["noise"]), images * len(noise["noise"])
        if len(scripts) != len(noise["noise"]):
            raise InputError(
                f"--noise has {len(noise['noise'])} video(s), --prompts {len(scripts)}; they must match"
            )
    first = _channels_last(noise["init"], "init", cfg) if "init" in noise else None
    if cfg.sample.image_to_video and first is None and not any(images):
        raise InputError(
            "config: sample.image_to_video=True without an image; give --image, prompts with images, "
            "or init in --noise"
        )
    group = len(scripts) if noise else FLAGS.batch
    batches, start = [], 0
    while start < len(scripts):
        stop = start + 1
        while stop < min(start + group, len(scripts)) and _alike(scripts, images, start, stop):
            stop += 1
        batch = render.Batch(
            scripts[start:stop], *size, index=start, negative=negative,
            noise=noise["noise"][start:stop] if noise else None,
            first_frame=None if first is None else first[start:stop],
        )  # fmt: skip
        batches.append((images[start:stop] if images[start] else [], batch))
        start = stop
    return batches


def _alike(scripts, images, a, b):
    return scripts[a].chunks == scripts[b].chunks and bool(images[a]) == bool(images[b])


def _scripts(cfg, encoder, chunks):
    """Scripts of all videos, an image path or None for each, and the negative embedding."""
    guided = stream.guided(cfg)
    if FLAGS.prompt_embeds:
        arrays = _npz(FLAGS.prompt_embeds, "ctx")
        if guided and "neg" not in arrays:
            raise InputError(
                f"--prompt_embeds: {FLAGS.prompt_embeds} has no neg, which guidance with "
                f"sample.guidance_scale={cfg.sample.guidance_scale} needs; add it or set 1.0"
            )
        negative = script.pad_text(arrays["neg"], cfg.model, "neg")[0] if guided else None
        return [script.from_embeddings(arrays, cfg.model, chunks)], [FLAGS.image], negative
    if not FLAGS.prompts:
        raise InputError("--prompts is missing; give a file of prompts, or --prompt_embeds")
    videos = shots.read(
        FLAGS.prompts,
        chunks=chunks or cfg.sample.chunks,
        chunk_frames=cfg.model.chunk_frames,
        scene_cut_prefix=cfg.sample.scene_cut_prefix,
        chunks_per_shot=FLAGS.chunks_per_shot,
    )
    scripts = script.from_videos(videos, encoder, cfg.sample.scene_cut_prefix)
    if chunks:
        scripts = [script.shorten(s, chunks) for s in scripts]
    negative = encoder([cfg.sample.negative_prompt], allow_empty=True)[0] if guided else None
    return scripts, [FLAGS.image or video.image for video in videos], negative


def _with_pictures(cfg, batch, images, vae_params, mesh):
    """The batch with its images, or the video it continues, encoded."""
    height, width = batch.height * 16, batch.width * 16
    if images:
        pictures = np.stack([to_float(read_image(path, height, width)[None]) for path in images])
        first = decode.encode(cfg, vae_params, mesh, lambda a, b: pictures[:, a:b], 1)
        return dataclasses.replace(batch, first_frame=first)
    if not FLAGS.continue_from:
        return batch
    frames = read_video(FLAGS.continue_from, height, width)
    chunk = cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION
    count = FLAGS.continue_frames or len(frames)
    if count > len(frames) or (count + 3) % chunk:
        fits = [n for n in range(chunk - 3, len(frames) + 1, chunk)]
        raise InputError(
            f"--continue_from: {count} frames of {len(frames)} (at 24 frames a second); a chunk is "
            f"{cfg.model.chunk_frames} latent frames, so the number must be {chunk} k - 3; give "
            f"--continue_frames={fits[-1]}"
            if fits
            else f"--continue_from: {len(frames)} frames, at least {chunk - 3} are needed; give a longer video"
        )
    frames = to_float(frames[-count:])[None].repeat(len(batch.scripts), axis=0)
    latents = decode.encode(cfg, vae_params, mesh, lambda a, b: frames[:, a:b], count)
    return dataclasses.replace(batch, prefix=latents)


def _write(cfg, chunks, batch, total):
    """Consumes a rendering: mp4s, latents, contact sheets, a progress bar."""
    count = len(batch.scripts)
    sheets = [ContactSheet() for _ in range(count)] if FLAGS.contact_sheet else []
    latents = []
    known = 0 if batch.prefix is None else batch.prefix.shape[1]
    per_chunk = cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION
    frames = batch.chunks * per_chunk + known * config_lib.TEMPORAL_COMPRESSION - 3
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm.tqdm(total=frames, unit=" frames", desc="streaming"))
        writers = []
        if FLAGS.output:
            size = batch.height * 16, batch.width * 16
            paths = [command.numbered(FLAGS.output, batch.index + i, total) for i in range(count)]
            writers = [stack.enter_context(VideoWriter(path, *size)) for path in paths]
        for chunk, pieces in chunks:
            if FLAGS.save_latents:
                latents.append(np.asarray(chunk, np.float32))
            if not FLAGS.output:
                jax.block_until_ready(chunk)
                bar.update(min(per_chunk, frames - bar.n))
            for piece in pieces:
                for i, writer in enumerate(writers):
                    writer.write(piece[i])
                if sheets:
                    host = np.asarray(piece)
                    for i, sheet in enumerate(sheets):
                        sheet.add(host[i])
                bar.update(piece.shape[1])
    if FLAGS.save_latents:
        path = command.numbered(FLAGS.save_latents, batch.index, 1 if total == count else total)
        save_npz(path, latents=np.moveaxis(np.concatenate(latents, axis=1), -1, 2))
    for i, sheet in enumerate(sheets):
        sheet.save(command.numbered(FLAGS.contact_sheet, batch.index + i, total))


def _npz(path, name):
    return load_npz(os.fspath(path), required=(name,))


def _channels_last(array, name, cfg):
    """[batch, frame, channel, h, w] of a file -> [batch, frame, h, w, channel] float32."""
    if (
        array.ndim != 5
        or array.shape[2] != cfg.model.in_dim
        or array.shape[3] % 2
        or array.shape[4] % 2
    ):
        raise InputError(
            f"--noise: {name} of shape {array.shape} must be [batch, frame, channel, h, w] with "
            f"model.in_dim={cfg.model.in_dim} channels and even h and w"
        )
    return np.moveaxis(array, 2, -1).astype(np.float32)


if __name__ == "__main__":
    command.run(main)
