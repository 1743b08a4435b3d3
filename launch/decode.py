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
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.models import vae
from longlive_jax.models.vae_spec import check_mesh
from longlive_jax.sampling import decode, finite, render
from longlive_jax.sampling.batches import channels_last
from longlive_jax.sampling.batches import frames as frames_of

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("latents", None, "The .npz to decode.")
flags.DEFINE_string("output", None, "The .mp4 or .npz to write.")


def main() -> None:
    cfg = command.config()
    if not FLAGS.latents:
        raise InputError("--latents is missing; give the .npz to decode")
    command.check_output("output", ".mp4", ".npz")
    latents = load_npz(FLAGS.latents, ("latents",), ())["latents"]
    sizes = f"vae.z_dim={cfg.vae.z_dim} channels"
    latents = channels_last(latents, f"{FLAGS.latents}: latents", cfg.vae.z_dim, sizes)
    video = FLAGS.output.endswith(".mp4")
    count = len(latents) if video else 1
    paths = [command.numbered(FLAGS.output, i, count) for i in range(count)]
    command.check_apart(paths, [FLAGS.latents], networks.folders(FLAGS.checkpoint))
    finite.warn_of_latents(FLAGS.latents, np.abs(latents).max())
    networks.check(FLAGS.checkpoint, "vae", cfg, networks.DECODER)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    check_mesh(mesh, len(latents), latents.shape[3])
    params = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, networks.DECODER)
    decoder = decode.Decoder(cfg, params, mesh)
    parts = vae.pieces(latents.shape[1], cfg.sample.vae_latents_per_call)
    if not video:
        pieces = []
        for part, (_, piece) in zip(parts, render.ahead(decoder(None, latents, finish=None))):
            pieces.append(np.asarray(piece, np.float32))
            _check(np.isfinite(pieces[-1]).all(), cfg, part, decoder, latents)
        save_npz(FLAGS.output, video=np.moveaxis(np.concatenate(pieces, axis=1), -1, 1))
        return
    size = [n * config_lib.SPATIAL_COMPRESSION for n in latents.shape[2:4]]
    with contextlib.ExitStack() as stack:
        total = frames_of(latents.shape[1])
        writers = [stack.enter_context(VideoWriter(p, *size, frames=total)) for p in paths]
        for part, (_, piece) in zip(parts, render.ahead(decoder(None, latents))):
            _check(np.asarray(piece.finite), cfg, part, decoder, latents)
            for frames, writer in zip(np.asarray(piece.frames), writers):
                writer.write(frames)


def _check(is_finite, cfg, part, decoder, latents):
    """Refuses frames that are not finite. `part`: the slice of the latents that they are of."""
    if is_finite:
        return
    largest = f"latents up to {np.abs(latents).max():.3g} are more than it can decode"
    raise NotFiniteError(
        f"{FLAGS.latents}: chunk {part.start // cfg.model.chunk_frames}, latent frames "
        f"{part.start} to {part.stop - 1}: frames are not finite, and not written: "
        + finite.cause({"the VAE": decoder.params}, {}, largest)
    )


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint", "output"))
