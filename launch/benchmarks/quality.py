"""What number formats cost in quality: recipes and caches on the same weights and inputs.

    python -m launch.bench quality --config=configs/sample_5b.py --chunks=50 [--checkpoint=CKPT]
        [--plot=FILE.png]

Relative errors (of the norm) against the unquantised model in compute dtype: after each layer of
one denoising forward with a full window, and of the latents of chunks 1, 10 and 50 of a video, in
which errors accumulate. The row "noise rounded", the unquantised model with its noise rounded to
bfloat16, shows how far a harmless difference grows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch.benchmarks import measure
from launch.benchmarks.stream import chunk_inputs
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from longlive_jax.sampling import stream

ROUNDED = "noise rounded"
QUANTISED = {
    "fp8": config_lib.Quant(recipe="fp8"),
    "nvfp4_w4a4": config_lib.Quant(recipe="nvfp4_w4a4"),
    "nvfp4_ar": config_lib.Quant(recipe="nvfp4_ar"),
    "kv fp8": config_lib.Quant(kv="fp8"),
    "kv nvfp4": config_lib.Quant(kv="nvfp4"),
    "fp8, kv fp8": config_lib.Quant(recipe="fp8", kv="fp8"),
    "nvfp4_w4a4, kv nvfp4": config_lib.Quant(recipe="nvfp4_w4a4", kv="nvfp4"),
}
CHUNKS = (1, 10, 50)
TIMESTEP = 750.0


def run(cfg: config_lib.Config) -> dict:
    if flags.FLAGS.plot and not flags.FLAGS.plot.endswith(".png"):
        raise InputError(f"--plot={flags.FLAGS.plot}: must end in .png")
    mesh = mesh_lib.make_mesh(cfg.mesh)
    if flags.FLAGS.checkpoint:
        params = networks.load(flags.FLAGS.checkpoint, "dit", cfg, mesh)
    else:
        params = measure.random_params(dit.spec(cfg.model), mesh, cfg.compute_dtype)
    exact = _outputs(cfg, mesh, params)
    rows = {ROUNDED: _errors(_outputs(cfg, mesh, params, rounded=True), exact)}
    for name, quant in QUANTISED.items():
        made = _outputs(dataclasses.replace(cfg, quant=quant), mesh, params)
        rows[name] = _errors(made, exact)
        made = None  # its latents, before the next one's
    _show(rows)
    if flags.FLAGS.plot:
        _plot(rows, flags.FLAGS.plot)
    return {
        "errors": {name: {"layers": a, "chunks": b} for name, (a, b) in rows.items()},
        "weights": flags.FLAGS.checkpoint or "random",
        "steps": cfg.sample.steps,
        "dtype": cfg.dtype,
    } | measure.device_figures()


def _outputs(cfg, mesh, params, rounded=False):
    """Hidden states by layer, and latents by chunk, on the host."""
    sampler = stream.Sampler(cfg, mesh)
    params = sampler.prepare(params)
    size = cfg.video.latent_size

    def inputs(chunk):
        made = sampler.place(chunk_inputs(cfg, chunk, size))
        if rounded:
            made = made.replace(noise=made.noise.astype(jnp.bfloat16).astype(jnp.float32))
        return made

    # A window of given latents, the same for all recipes but for the cache's format.
    batch = cfg.mesh.data * cfg.mesh.fsdp
    state = sampler.init_state(batch, *size)
    for chunk in range(cfg.sample.window(cfg.model).slots):
        given = inputs(chunk)
        state = sampler.commit(params, state, given.noise, given)
    layers = _hidden(cfg, sampler, params, state, inputs(100))
    state = sampler.init_state(batch, *size)
    latents = []
    for chunk in range(flags.FLAGS.chunks):
        state, made = sampler.step(params, state, inputs(chunk))
        latents.append(np.asarray(made))
    return layers, latents


def _hidden(cfg, sampler, params, state, inputs):
    recipe = recipe_lib.get(cfg.quant.recipe)
    on = dict(
        sharding=dit.Sharding.sampling(recipe_lib.PAYLOADS[cfg.quant.all_to_all]),
        precision=dit.Precision(recipe, cfg.compute_dtype),
    )
    model = cfg.model

    def states(params, state, inputs):
        latents, text = (x.astype(cfg.compute_dtype) for x in (inputs.noise, inputs.text))
        local = latents.shape[1]
        here = jax.lax.axis_index(mesh_lib.SEQ) * local + jnp.arange(local, dtype=jnp.int32)
        positions = state.window.next_position(cfg)[:, None] + here[None, :]
        timesteps = jnp.full(positions.shape, TIMESTEP)
        text = dit.text_keys_values(params, model, text, **on)
        return dit.hidden_states(
            params, model, latents, timesteps, positions, text=text, cache=state.past, **on
        )

    specs = (
        jax.tree.map(lambda s: s.spec, sampler.param_shardings),
        stream.state_specs(cfg),
        sampler.input_specs,
    )
    out = mesh_lib.spec((None, "batch", None, "frame", None, None), mesh_lib.SAMPLING_RULES)
    states = jax.shard_map(
        states, mesh=sampler.mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    return np.asarray(jax.jit(states)(params, state, inputs).astype(jnp.float32))


def _errors(made, exact):
    return tuple(
        [round(float(np.linalg.norm(a - b) / np.linalg.norm(b)), 5) for a, b in zip(*pair)]
        for pair in zip(made, exact)
    )


def _show(rows):
    layers, chunks = (len(x) for x in next(iter(rows.values())))
    shown = [i for i in CHUNKS if i <= chunks]
    heads = ["layer 1", f"layer {layers}", *(f"chunk {i}" for i in shown)]
    print(f"  {'relative error of':24}" + "".join(f"{head:>11}" for head in heads))
    for name, (by_layer, by_chunk) in rows.items():
        cells = [by_layer[0], by_layer[-1], *(by_chunk[i - 1] for i in shown)]
        print(f"  {name:24}" + "".join(f"{cell:11.4f}" for cell in cells), flush=True)


def _plot(rows, path):
    from matplotlib import figure  # a tool of development, and needed here only

    fig = figure.Figure(figsize=(11, 4), layout="constrained")
    for axes, index, what in zip(fig.subplots(1, 2), (0, 1), ("layer", "chunk")):
        for name, errors in rows.items():
            axes.plot(range(1, len(errors[index]) + 1), errors[index], label=name)
        axes.set(xlabel=what, ylabel="relative error", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    fig.savefig(path, dpi=120)
