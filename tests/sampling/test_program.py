"""What the compiler is given, and makes of it: guards on memory, communication and arithmetic.

Counts are of the traced program of the full 5B, loops multiplied out; what only the compiler decides
is looked up in the optimised program of a tiny model.
"""

import collections
import dataclasses
import functools
import math
import numbers
import re

import jax
import jax.numpy as jnp
import pytest

from longlive_jax import collectives
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit
from longlive_jax.sampling import cost, memory, programs, stream

# No two matrices of different uses have one shape, but for the square ones.
TINY = config_lib.Model(
    dim=128, ffn_dim=320, num_heads=8, num_layers=5, in_dim=4, out_dim=4, text_dim=48, text_len=6,
    freq_dim=16,
)  # fmt: skip
FULL = config_lib.Model()
LATENTS = {TINY: (4, 4), FULL: (44, 80)}


@functools.cache
def trace(model, seq=1, **sample):
    """The config of a sampler, the abstract arguments of a chunk, and its trace."""
    cfg = config_lib.Config(
        model=model,
        vae=config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        sample=config_lib.Sample(**sample),
        mesh=config_lib.Mesh(seq=seq),
    )
    mesh = mesh_lib.make_mesh(cfg.mesh)
    arguments = programs.step_arguments(cfg, mesh, 1, *LATENTS[model])
    return cfg, arguments, stream.Sampler(cfg, mesh).step.trace(*arguments)


@functools.cache
def compiled(seq):
    """The tiny model's chunk and what goes into it, compiled for so many devices."""
    _, arguments, traced = trace(TINY, seq)
    return arguments, traced.lower().compile()


def equations(jaxpr):
    """(times it runs, equation) of a program and of all that it calls."""
    for times, equation in collectives.equations(jaxpr):
        assert equation.primitive.name not in ("while", "cond")  # these say nothing of how often
        yield times, equation


@functools.cache
def dots(*args, **kwargs):
    """(times, FLOPs of one, shapes of the operands) of every matrix product of a chunk."""
    found = []
    for times, equation in equations(trace(*args, **kwargs)[2].jaxpr):
        if equation.primitive.name == "dot_general":
            left, right = (x.aval.shape for x in equation.invars)
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape)
            flops = 2 * size * math.prod(left[i] for i in contracted)
            found.append((times, flops, left, right))
    return found


def by_weight(found):
    """How often each shape of a weight is multiplied by."""
    counts = collections.Counter()
    for times, _, _, right in found:
        counts[right] += times
    return counts


# Arithmetic.


@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize("sample", [{}, {"steps": 2, "guidance_scale": 3.0}], ids=str)
def test_flops_are_those_of_the_formula(seq, sample):
    cfg = trace(FULL, seq, **sample)[0]
    traced = seq * sum(times * flops for times, flops, _, _ in dots(FULL, seq, **sample))
    assert traced == pytest.approx(cost.chunk_flops(cfg, *LATENTS[FULL]), rel=0.03)


def test_flops_of_a_landmark_are_those_of_the_formula():
    cfg = config_lib.Config(
        model=dataclasses.replace(FULL, actions=config_lib.Actions(kind="token")),
        sample=config_lib.Sample(
            window_frames=48, memory=config_lib.Memory(references=1, landmarks=1)
        ),
    )
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params, state, inputs = programs.step_arguments(cfg, mesh, 1, *LATENTS[FULL])
    made = memory.programs(stream.Sampler(cfg, mesh))
    number, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    shapes = jax.eval_shape(memory.newest, state), count
    kept, count = jax.tree.map(
        lambda x, spec: x.update(sharding=jax.NamedSharding(mesh, spec)),
        shapes, (made.kept_specs, memory.BATCH),
    )  # fmt: skip
    found = sum(
        times * 2 * math.prod(e.outvars[0].aval.shape) * _contracted(e)
        for times, e in equations(made.show.trace(params, state, inputs, kept, number, count).jaxpr)
        if e.primitive.name == "dot_general"
    )
    # What is traced attends to all slots; that it sees two of five only is known when it runs.
    unseen = 3 * 4 * 7040**2 * FULL.dim * (FULL.num_layers - 1)
    expected = cost.landmark_flops(cfg, *LATENTS[FULL])
    assert found - unseen == pytest.approx(expected, rel=0.03)


def _contracted(equation):
    shape = equation.invars[0].aval.shape
    return math.prod(shape[i] for i in equation.params["dimension_numbers"][0][0])


def test_text_is_read_once_a_chunk_and_not_once_a_step():
    counts, m = by_weight(dots(FULL)), FULL
    assert counts[m.text_dim, m.dim] == 1
    assert counts[m.dim, 2 * m.dim] == m.num_layers


def test_the_clean_passs_last_layer_makes_keys_and_values_only():
    counts, m = by_weight(dots(FULL)), FULL
    steps, layers = config_lib.Sample().steps, m.num_layers
    blocks = steps * layers + layers - 1  # that run whole
    assert counts[m.dim, 3 * m.dim] == blocks + 1
    assert counts[m.dim, m.ffn_dim] == counts[m.ffn_dim, m.dim] == blocks
    # Outputs of both attentions and queries of the second; text once; time at every forward.
    assert counts[m.dim, m.dim] == 3 * blocks + 1 + (steps + 1)


def test_a_bfloat16_program_multiplies_bfloat16():
    """As lowered: a CPU's compiler puts its own types in."""
    text = trace(TINY)[2].lower().as_text()
    operands = re.findall(r"stablehlo\.dot_general.*: \((\S+), (\S+)\) ->", text)
    assert len(operands) > 20
    wide = [pair for pair in operands if any(not x.endswith("xbf16>") for x in pair)]
    assert not wide


# Communication.


def is_collective(equation):
    """Whether an equation names axes of the mesh, and so other devices."""
    if equation.primitive.name == "axis_index":
        return False
    axes = equation.params.get("axis_name", equation.params.get("axes", ()))
    return bool(axes) and not all(isinstance(axis, numbers.Integral) for axis in axes)


@pytest.mark.parametrize("seq", [1, 4])
def test_devices_exchange_heads_and_nothing_else(seq):
    counts, largest = collections.Counter(), 0
    for times, equation in equations(trace(FULL, seq)[2].jaxpr):
        if is_collective(equation):
            counts[equation.primitive.name] += times
            largest = max(largest, *(x.aval.size * x.aval.dtype.itemsize for x in equation.invars))
    if seq == 1:
        assert not counts
        return
    blocks = config_lib.Sample().steps * FULL.num_layers + FULL.num_layers - 1
    # q, k, v and the output; of the clean pass's last layer k and v.
    assert counts == {"all_to_all": 4 * blocks + 2}
    assert largest == 7040 // seq * FULL.dim * 2  # a device's tokens of one of them, in bfloat16


@pytest.mark.parametrize("seq, expected", [(1, {}), (4, {"all-to-all": 4 * 5 + 4 * 4 + 2})])
def test_the_compiler_adds_no_communication(seq, expected):
    """Of the denoising loop's five layers, the clean pass's, and its last one."""
    text = compiled(seq)[1].as_text()
    names = (
        "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
    )
    assert collections.Counter(re.findall(rf" ({names})(?:-start)?\(", text)) == expected


# Memory.


@pytest.mark.parametrize("seq", [1, 4])
def test_the_whole_state_is_updated_in_place(seq):
    (_, state, _), program = compiled(seq)
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    assert program.memory_analysis().alias_size_in_bytes == held


def test_no_copy_of_the_cache():
    """Neither as it is nor in another layout or dtype; a layer's share of it may be."""
    (_, state, _), program = compiled(1)
    made = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", program.as_text())
    large = {
        name for shape, name in made if math.prod(map(int, shape.split(","))) >= state.cache.k.size
    }
    # A write in place is a fusion around an update.
    free = {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice", "fusion"}
    assert "dynamic-update-slice" in large
    assert large <= free


def test_full_size_chunk_step_traces_and_fits():
    cfg = config_lib.Config()
    state = jax.eval_shape(lambda: stream.init_state(cfg, 1, 44, 80))
    cache = sum(x.size * x.dtype.itemsize for x in (state.cache.k, state.cache.v))
    assert cache == 2 * 30 * 3 * 7040 * 3072 * 2  # 7.8 GB: three chunks, not the original's 10.4
    params = params_lib.abstract(dit.sampling_spec(cfg.model, None, None), dtype=jnp.bfloat16)
    inputs = stream.ChunkInput(
        noise=jax.ShapeDtypeStruct((1, 8, 44, 80, 48), jnp.float32),
        text=jax.ShapeDtypeStruct((1, 512, 4096), jnp.bfloat16),
        cut=jax.ShapeDtypeStruct((1,), bool),
    )
    step = functools.partial(stream.chunk_step, cfg=cfg)
    new, latents = jax.eval_shape(step, params, state, inputs)
    assert latents.shape == (1, 8, 44, 80, 48) and latents.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
