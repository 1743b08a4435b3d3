"""Trains a small VAE of the Wan2.2 architecture, from scratch, on videos that fit into memory.

    python -m launch.train_vae --config=configs/train_vae_tiny_world.py --workdir=DIR

Reads data.path/video/*/*.mp4; the last train_vae.held_out of those folders are for measuring only.
DIR gets
  checkpoint/            the weights' moving average, in compute dtype: --checkpoint of
                         launch.encode, launch.decode and launch.sample
  reconstructions.png    held-out frames, each beside what the VAE makes of it
  metrics.jsonl          a line every train_vae.log_every steps
  state/, config.json    from which the same command goes on, with the same numbers
"""

import os

import jax
import numpy as np
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import store
from longlive_jax.data.images import contact_sheet
from longlive_jax.errors import InputError
from longlive_jax.models import vae
from longlive_jax.training import autoencoder, autoencoder_run

_SHEET_CLIPS = 8
_SHEET_FRAMES = (0, 0.5, 1)  # of a clip, as shares of its length

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the run; a run that is in it goes on.")


def main() -> None:
    cfg = command.config()
    config_lib.validate_vae_training(cfg)
    if not FLAGS.workdir:
        raise InputError("--workdir is missing; give the folder of the run")
    mesh = mesh_lib.make_mesh(cfg.mesh)
    videos, held_out = autoencoder_run.read_videos(cfg)
    print(
        f"{len(videos.paths)} files, {len(videos.frames)} frames; held out: "
        f"{len(held_out.paths)} files; {params_lib.count(vae.spec(cfg.vae)):,} parameters",
        flush=True,
    )
    state = autoencoder_run.fit(cfg, mesh, videos, FLAGS.workdir, _show)
    params = _save(autoencoder.tree(np.asarray(state.average), cfg.vae), cfg, mesh, videos)
    _measure(params, cfg, mesh, held_out)


def _save(average, cfg, mesh, videos):
    """Writes the checkpoint and gives its weights: what is measured is what is kept."""
    mean, std = autoencoder_run.statistics(average, cfg, mesh, videos)
    params = autoencoder.fold(average, cfg.vae, mean, std)
    params = jax.tree.map(lambda x: x.astype(cfg.compute_dtype), params)
    directory, spec = os.path.join(FLAGS.workdir, "checkpoint"), vae.spec(cfg.vae)
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
    for pictures, made in autoencoder_run.reconstructions(params, cfg, mesh, held_out):
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
    sheet = os.path.join(FLAGS.workdir, "reconstructions.png")
    contact_sheet(sheet, cells, 2 * len(shown), labels)
    print(
        f"held out: {clips} clips of {length} frames, PSNR "
        f"{autoencoder_run.psnr(np.mean(errors)):.2f} dB, the worst clip "
        f"{autoencoder_run.psnr(np.max(errors)):.2f} dB; {sheet}",
        flush=True,
    )


def _psnr(difference) -> float:
    return autoencoder_run.psnr(float(np.mean(difference**2)))


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    command.run(main)
