"""Normalised latents into a video.

    python -m launch.decode --config=configs/sample_5b.py --checkpoint=CKPT \\
        --latents=L.npz --output=V.mp4|V.npz

L.npz holds latents [batch, latent frame, channel, h, w]; V.npz gets video [batch, 3, frame, height,
width], before clamping to [-1, 1]. A batch of mp4s is numbered: V-000.mp4, V-001.mp4, ...
"""

import contextlib

import numpy as np
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.sampling import decode, render
from longlive_jax.sampling.batches import channels_last

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("latents", None, "The .npz to decode.")
flags.DEFINE_string("output", None, "The .mp4 or .npz to write.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.latents:
        raise InputError("--latents is missing; give the .npz to decode")
    command.check_output("output", ".mp4", ".npz")
    latents = load_npz(FLAGS.latents, required=("latents",))["latents"]
    sizes = f"vae.z_dim={cfg.vae.z_dim} channels"
    latents = channels_last(latents, f"{FLAGS.latents}: latents", cfg.vae.z_dim, sizes)
    networks.check(FLAGS.checkpoint, "vae", cfg, networks.DECODER)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    check_mesh(mesh, len(latents), latents.shape[3])
    params = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, networks.DECODER)
    decoder = decode.Decoder(cfg, params, mesh)
    if FLAGS.output.endswith(".npz"):
        unclamped = render.ahead(decoder(None, latents, finish=None))
        pieces = [np.asarray(piece, np.float32) for _, piece in unclamped]
        save_npz(FLAGS.output, video=np.moveaxis(np.concatenate(pieces, axis=1), -1, 1))
        return
    size = [n * config_lib.SPATIAL_COMPRESSION for n in latents.shape[2:4]]
    with contextlib.ExitStack() as stack:
        paths = [command.numbered(FLAGS.output, i, len(latents)) for i in range(len(latents))]
        writers = [stack.enter_context(VideoWriter(path, *size)) for path in paths]
        for _, piece in render.ahead(decoder(None, latents)):
            for frames, writer in zip(np.asarray(piece), writers):
                writer.write(frames)


if __name__ == "__main__":
    command.run(main)
