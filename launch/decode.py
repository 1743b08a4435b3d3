"""Normalised latents into a video.

    python -m launch.decode --config=configs/sample_5b.py --checkpoint=CKPT --latents=L.npz --output=V.mp4|V.npz

L.npz holds latents [batch, latent frame, channel, h, w]; V.npz gets video [batch, 3, frame, height,
width], before clamping to [-1, 1]. A batch of mp4s is numbered: V-000.mp4, V-001.mp4, ...
"""

import contextlib

import numpy as np
from absl import flags

from launch import command, parts
from longlive_jax import mesh as mesh_lib
from longlive_jax.data.arrays import load_npz, save_npz
from longlive_jax.data.atomic import partial_file
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError
from longlive_jax.sampling import decode

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("latents", None, "The .npz to decode.")
flags.DEFINE_string("output", None, "The .mp4 or .npz to write.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.latents or not FLAGS.output:
        raise InputError("--latents and --output are both needed")
    partial_file(FLAGS.output).unlink()
    latents = load_npz(FLAGS.latents, required=("latents",))["latents"]
    if latents.ndim != 5 or latents.shape[2] != cfg.vae.z_dim or not latents.shape[1]:
        raise InputError(
            f"--latents: latents of shape {latents.shape} must be [batch, latent frame, channel, h, "
            f"w] with vae.z_dim={cfg.vae.z_dim} channels"
        )
    latents = np.moveaxis(latents, 2, -1).astype(np.float32)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = parts.load(FLAGS.checkpoint, "vae", cfg, mesh, parts.DECODER)
    decoder = decode.Decoder(cfg, params, mesh)
    if FLAGS.output.endswith(".npz"):
        pieces = [np.asarray(piece, np.float32) for piece in decoder.unclamped(latents)]
        save_npz(FLAGS.output, video=np.moveaxis(np.concatenate(pieces, axis=1), -1, 1))
        return
    size = latents.shape[2] * 16, latents.shape[3] * 16
    with contextlib.ExitStack() as stack:
        paths = [command.numbered(FLAGS.output, i, len(latents)) for i in range(len(latents))]
        writers = [stack.enter_context(VideoWriter(path, *size)) for path in paths]
        for piece in decoder(latents):
            for i, writer in enumerate(writers):
                writer.write(piece[i])


if __name__ == "__main__":
    command.run(main)
