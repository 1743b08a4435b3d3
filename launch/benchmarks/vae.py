"""The VAE's decoder and encoder, by latents a call; of `quant.vae`, the error of its pictures.

With --checkpoint weights are its VAE's, and the pictures whose error is measured are shots of the
tiny world; else both are random.
"""

import math

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
_CLIPS, _LATENTS = 3, 9  # whose error is measured


def run(cfg: config_lib.Config) -> dict:
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = _params(cfg, mesh)
    prepared = decode.prepare(cfg, params)
    batch, dtype = cfg.mesh.data * cfg.mesh.fsdp, cfg.compute_dtype
    size = cfg.video.latent_size
    where = mesh_lib.sharding(mesh, ("batch", None, None, "width", None))
    per_call = cfg.sample.vae_latents_per_call
    repeats = max(3, flags.FLAGS.chunks // 4)
    figures = {"latents_per_call": per_call}

    def timed(name, program, params, state, x, latents):
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
    timed("decode", program, prepared, state, jax.device_put(latents, where), per_call)
    if "encoder" in params:
        shape = (batch, 4 * per_call, cfg.video.height, cfg.video.width, 3)
        frames = jnp.tanh(jax.random.normal(jax.random.key(2), shape, dtype))
        state = vae.init_encode_state(cfg.vae, batch, *size, dtype, mesh)
        program = vae.encode_on_mesh(mesh, cfg.vae, False)
        timed("encode", program, params, state, jax.device_put(frames, where), per_call)
    if cfg.vae == config_lib.VAE() and (cfg.video.height, cfg.video.width) == (704, 1280):
        for name, work in (("decode", DECODE_TFLOP), ("encode", ENCODE_TFLOP)):
            rate = work / figures[f"{name}_ms_per_latent"] * 1e3 * batch / cfg.mesh.size
            figures[f"{name}_tflops_per_device"] = round(rate, 1)
    if cfg.quant.vae != "bf16":
        figures |= _error(cfg, params, prepared)
    figures |= measure.device_figures()
    measure.show(figures)
    return figures


def _params(cfg, mesh):
    if not flags.FLAGS.checkpoint:
        return measure.random_params(vae.spec(cfg.vae), mesh, cfg.compute_dtype)
    from longlive_jax.checkpoints import networks

    return networks.load(flags.FLAGS.checkpoint, "vae", cfg, mesh)


def _error(cfg, params, prepared) -> dict:
    """dB of the decoder's pictures against those of float32, of all frames and of the worst one."""
    errors = []
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for latents in _clips(cfg, wide):
        exact = vae.decode_video(wide, cfg.vae, latents)
        made = vae.decode_video(prepared, cfg.vae, latents.astype(cfg.compute_dtype))
        difference = jnp.clip(exact, -1, 1) - jnp.clip(made.astype(jnp.float32), -1, 1)
        errors += [float(x) for x in jnp.mean(jnp.square(difference), axis=(0, 2, 3, 4))]
    worst, mean = max(errors), sum(errors) / len(errors)
    return {
        name: round(-10 * math.log10(max(x, 1e-12) / 4), 2)  # pixels are -1 to 1
        for name, x in (("psnr_db", mean), ("worst_frame_db", worst))
    }


def _clips(cfg, params):
    """Normalised latents, [1, _LATENTS, h, w, z_dim] each."""
    height, width = cfg.video.height, cfg.video.width
    if not flags.FLAGS.checkpoint:
        shape = (1, _LATENTS, *cfg.video.latent_size, cfg.vae.z_dim)
        yield jax.random.normal(jax.random.key(3), shape)
        return
    from longlive_jax.data.images import to_float
    from longlive_jax.data.worlds import shapes

    frames = 1 + (_LATENTS - 1) * vae.FRAMES
    for shots in shapes.clips(777, _CLIPS, held_out=True):
        pictures = shapes.render(shots[0], 0, frames, height, width)
        yield vae.encode_video(params, cfg.vae, to_float(pictures)[None])
