"""Trains a small VAE of the Wan2.2 architecture on videos that fit into memory.

    python -m launch.train_vae --config=configs/train_vae_tiny_world.py --workdir=DIR \\
        [--checkpoint=CKPT]

From scratch, or from the weights of CKPT with a new optimiser. Reads data.path/video/*/*.mp4; the
last train_vae.held_out of those folders are for evaluation only.
DIR gets
  checkpoint/             the weights' moving average, in compute dtype: --checkpoint of
                          launch.encode, launch.decode and launch.sample
  reconstructions.png     held-out frames, each beside its reconstruction
  metrics.jsonl           a line every train_vae.log_every steps; tensorboard/ has the same
  checkpoints/, run.json  from which the same command goes on, with the same numbers
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import networks, store
from longlive_jax.data.images import contact_sheet
from longlive_jax.errors import InputError
from longlive_jax.files import remote
from longlive_jax.models import vae
from longlive_jax.training import checkpoint, loop
from longlive_jax.training.objectives import autoencoder
from longlive_jax.training.objectives.videos import Videos, read_videos
from longlive_jax.training.plan import Plan

_SHEET_CLIPS = 8
_SHEET_FRAMES = (0, 0.5, 1)  # of a clip, as shares of its length

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the run; a run that is in it goes on.")
flags.DEFINE_string("checkpoint", None, "Weights that a new run begins with.")


def main() -> None:
    cfg = command.config()
    config_lib.validate_vae_training(cfg)
    if not FLAGS.workdir:
        raise InputError("--workdir is missing; give the folder of the run")
    if FLAGS.checkpoint:
        networks.check(FLAGS.checkpoint, "vae", cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    videos, held_out = read_videos(cfg)
    print(
        f"{len(videos.paths)} files, {len(videos.frames)} frames; held out: "
        f"{len(held_out.paths)} files; {params_lib.count(vae.spec(cfg.vae)):,} parameters",
        flush=True,
    )
    ema = _fit(cfg, mesh, videos)
    if ema is not None:
        _measure(_save(ema, cfg, mesh, videos), cfg, mesh, held_out)


def _fit(cfg: config_lib.Config, mesh: jax.sharding.Mesh, videos: Videos) -> params_lib.Tree | None:
    """The moving average of the weights after the last step, on the host; None: it was stopped."""
    root = remote.path(remote.absolute(FLAGS.workdir))
    objective = autoencoder.Autoencoder(cfg, mesh, videos)
    # Clips are drawn on the device, so that a step's batch is empty.
    inputs = loop.Inputs(
        batches=lambda steps: (((), None) for _ in steps),
        params=functools.partial(_initial, cfg, mesh) if FLAGS.checkpoint else None,
        frozen=objective.frozen_arrays(),
    )
    with checkpoint.acquire(root, autoencoder.settings(cfg, videos), network=None):
        state, done = loop.run(objective, Plan.of(cfg.train_vae), root, inputs, _show)
    if done.stopped:
        _show(f"step {done.step}: stopped by a signal; the same command goes on: {root}")
        return None
    ema = state.networks[autoencoder.NETWORK].ema["vector"]
    return autoencoder.tree(np.asarray(ema), cfg.vae)


def _initial(cfg, mesh) -> dict[str, params_lib.Tree]:
    params = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, dtype=jnp.float32)
    vector = autoencoder.flat(jax.tree.map(np.asarray, params))
    return {autoencoder.NETWORK: {"vector": autoencoder.place(vector, mesh)}}


def _save(ema, cfg, mesh, videos):
    """Writes the checkpoint and returns its weights, so that these are evaluated."""
    mean, std = autoencoder.statistics(ema, cfg, mesh, videos)
    params = autoencoder.fold(ema, cfg.vae, mean, std)
    params = jax.tree.map(lambda x: x.astype(cfg.compute_dtype), params)
    directory, spec = os.fspath(remote.join(FLAGS.workdir, "checkpoint")), vae.spec(cfg.vae)
    pieces = store.tree_pieces(params, spec)
    summary = store.save(directory, "vae", pieces, spec, section=cfg.vae)
    print(
        f"latents before normalising: mean {mean.min():.3f} to {mean.max():.3f}, std "
        f"{std.min():.3f} to {std.max():.3f}\n"
        f"{directory}: {summary.bytes / 2**20:.2f} MiB, {'/'.join(summary.dtypes)}",
        flush=True,
    )
    return params


def _measure(params, cfg, mesh, held_out) -> None:
    length = cfg.train_vae.frames
    clips = len(held_out.windows(length, length))
    every = -(-clips // _SHEET_CLIPS)
    shown = sorted({round(share * (length - 1)) for share in _SHEET_FRAMES})
    errors, cells, labels = [], [], []
    for pictures, made in autoencoder.reconstructions(params, cfg, mesh, held_out):
        for before, after in zip(pictures, made):
            difference = before.astype(np.float32) - after.astype(np.float32)
            if len(errors) % every == 0:
                cells += [frame for i in shown for frame in (before[i], after[i])]
                labels += [
                    text
                    for i in shown
                    for text in (
                        f"clip {len(errors)}, frame {i}",
                        f"{_psnr(difference[i]):.1f} dB",
                    )
                ]
            errors.append(float(np.mean(difference**2)))
    sheet = os.fspath(remote.join(FLAGS.workdir, "reconstructions.png"))
    contact_sheet(sheet, cells, 2 * len(shown), labels)
    print(
        f"held out: {clips} clips of {length} frames, PSNR "
        f"{autoencoder.psnr(np.mean(errors)):.2f} dB, the worst clip "
        f"{autoencoder.psnr(np.max(errors)):.2f} dB; {sheet}",
        flush=True,
    )


def _psnr(difference) -> float:
    return autoencoder.psnr(float(np.mean(difference**2)))


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    command.run(main, addresses=("workdir", "checkpoint"))
