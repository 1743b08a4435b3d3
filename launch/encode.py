"""A video into normalised latents.

    python -m launch.encode --config=configs/sample_5b.py --checkpoint=CKPT --video=V.mp4|V.npz --output=L.npz

V.npz holds video [batch, 3, frame, height, width] in [-1, 1]; L.npz gets latents
[batch, latent frame, channel, height / 16, width / 16].
"""

import numpy as np
from absl import flags

from launch import command, parts
from longlive_jax import mesh as mesh_lib
from longlive_jax.data.arrays import load_npz, save_npz
from longlive_jax.data.atomic import partial_file
from longlive_jax.data.images import to_float
from longlive_jax.data.video import read_video
from longlive_jax.errors import InputError
from longlive_jax.sampling import decode

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("video", None, "A video file, resized to the config's size, or an .npz.")
flags.DEFINE_string("output", None, "The .npz to write.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.video or not FLAGS.output:
        raise InputError("--video and --output are both needed")
    partial_file(FLAGS.output).unlink()
    frames = _frames(cfg)
    count = frames.shape[1]
    if count % 4 != 1:
        near = [n for n in (count - (count - 1) % 4, count + 3 - (count - 1) % 4 + 1) if n > 0]
        raise InputError(
            f"--video: {count} frames must be 1 + a multiple of 4, since a latent covers 4 frames and "
            f"the first one 1; cut or pad the clip, nearest: {near}"
        )
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = parts.load(FLAGS.checkpoint, "vae", cfg, mesh, parts.ENCODER)
    latents = decode.encode(cfg, params, mesh, lambda a, b: _float(frames[:, a:b]), count)
    save_npz(FLAGS.output, latents=np.moveaxis(latents, -1, 2))


def _frames(cfg):
    """[batch, frame, height, width, 3], uint8 of a video file or float of an .npz."""
    if not FLAGS.video.endswith(".npz"):
        return read_video(FLAGS.video, cfg.sample.height, cfg.sample.width)[None]
    video = load_npz(FLAGS.video, required=("video",))["video"]
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % 16 or video.shape[4] % 16:
        raise InputError(
            f"--video: video of shape {video.shape} must be [batch, 3, frame, height, width] with "
            "height and width multiples of 16"
        )
    return np.moveaxis(video, 1, -1)


def _float(frames):
    return to_float(frames) if frames.dtype == np.uint8 else frames.astype(np.float32)


if __name__ == "__main__":
    command.run(main)
