"""A small model on a mesh, and its training step."""

import dataclasses

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.step import Step

NETWORK = lib.Model(
    dim=64, ffn_dim=128, num_heads=4, num_layers=2, in_dim=8, out_dim=8, text_dim=32, text_len=16,
    freq_dim=16,
)  # fmt: skip
VAE = lib.VAE(z_dim=8, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8)
RECYCLING = lib.ErrorRecycling(enabled=True, buckets=2, slots=2)


def config(mesh, model=NETWORK, height=64, width=64, **train):
    """Four chunks a video, a video on each data x fsdp."""
    train = {
        "latent_frames": 32, "batch_size": mesh.data * mesh.fsdp, "error_recycling": RECYCLING,
        **train,
    }  # fmt: skip
    vae = dataclasses.replace(
        VAE, z_dim=model.in_dim, latent_mean=(0.0,) * model.in_dim, latent_std=(1.0,) * model.in_dim
    )
    video = lib.Video(height=height, width=width)
    return lib.Config(model=model, vae=vae, video=video, mesh=mesh, train=lib.Train(**train))


def traced(cfg, devices=None):
    """The step of this config, on fake CPU devices or on given ones."""
    mesh = mesh_lib.make_mesh(cfg.mesh, devices)
    return Step(TeacherForcing(cfg, mesh)).trace((MODEL,))
