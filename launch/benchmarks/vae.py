"""The VAE's decoder and encoder, by latents a call."""

import jax
import jax.numpy as jnp
from absl import flags

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import vae
from longlive_jax.sampling import decode

# Matrix and convolution work of the full VAE at 704 x 1280 for one latent after the first.
DECODE_TFLOP, ENCODE_TFLOP = 66.352, 12.614


def run(cfg: config_lib.Config) -> dict:
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = measure.random_params(vae.spec(cfg.vae), mesh, cfg.compute_dtype)
    batch, dtype = cfg.mesh.data * cfg.mesh.fsdp, cfg.compute_dtype
    size = cfg.video.latent_size
    where = mesh_lib.sharding(mesh, ("batch", None, None, "width", None))
    per_call = cfg.sample.vae_latents_per_call
    repeats = max(3, flags.FLAGS.chunks // 4)
    figures = {"latents_per_call": per_call}

    def timed(name, program, state, x, latents):
        compiled = program.lower(params, state, x).compile()
        figures[f"{name}_temp_gb"] = round(compiled.memory_analysis().temp_size_in_bytes / 1e9, 2)
        box = [state]

        def call():
            box[0], out = compiled(params, box[0], x)
            return out

        measure.seconds(call, 2)
        times = measure.seconds(call, repeats)
        figures[f"{name}_ms_per_latent"] = round(measure.percentile(times, 50) * 1e3 / latents, 2)
        figures[f"{name}_p90_ms_per_latent"] = round(
            measure.percentile(times, 90) * 1e3 / latents, 2
        )

    latents = jax.random.normal(jax.random.key(1), (batch, per_call, *size, cfg.vae.z_dim), dtype)
    state = vae.init_decode_state(cfg.vae, batch, *size, dtype, mesh)
    program = decode.decode_program(cfg.vae, mesh, False, decode.pictures)
    timed("decode", program, state, jax.device_put(latents, where), per_call)
    if "encoder" in params:
        shape = (batch, 4 * per_call, cfg.video.height, cfg.video.width, 3)
        frames = jnp.tanh(jax.random.normal(jax.random.key(2), shape, dtype))
        state = vae.init_encode_state(cfg.vae, batch, *size, dtype, mesh)
        program = vae.encode_on_mesh(mesh, cfg.vae, False)
        timed("encode", program, state, jax.device_put(frames, where), per_call)
    if cfg.vae == config_lib.VAE() and (cfg.video.height, cfg.video.width) == (704, 1280):
        for name, work in (("decode", DECODE_TFLOP), ("encode", ENCODE_TFLOP)):
            rate = work / figures[f"{name}_ms_per_latent"] * 1e3 * batch / cfg.mesh.size
            figures[f"{name}_tflops_per_device"] = round(rate, 1)
    figures |= measure.device_figures()
    measure.show(figures)
    return figures
