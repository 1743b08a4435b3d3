"""A video into normalised latents.

    python -m launch.encode --config=configs/sample_5b.py --checkpoint=CKPT \\
        --video=V.mp4|V.npz --output=L.npz

V.npz holds video [batch, 3, frame, height, width] in [-1, 1]; L.npz gets latents
[batch, latent frame, channel, height / 16, width / 16].
"""

import numpy as np
from absl import flags

from launch import command
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import save_npz
from longlive_jax.prompts import pictures

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("video", None, "A video file, resized to the config's size, or an .npz.")
flags.DEFINE_string("output", None, "The .npz to write.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.video:
        raise InputError("--video is missing; give the video or the .npz to encode")
    command.check_output("output", ".npz")
    read = networks.folders(FLAGS.checkpoint)
    command.check_apart([FLAGS.output], [FLAGS.video], read)
    networks.check(FLAGS.checkpoint, "vae", cfg, networks.ENCODER)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    if FLAGS.video.endswith(".npz"):
        clip = pictures.ArrayClip(FLAGS.video)
    else:
        clip = pictures.Clip(FLAGS.video, cfg.video.height, cfg.video.width)
    clip.check_encodes(mesh)
    params = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, networks.ENCODER)
    save_npz(FLAGS.output, latents=np.moveaxis(clip.encode(cfg, params, mesh), -1, 2))


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
