"""Teacher-forcing attention through cuDNN, on a GPU: accuracy and speed.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_teacher_forcing_gpu.py
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.ops import dense_attention
from longlive_jax.ops import teacher_forcing as tf

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_gpu")]


def draw(shape, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape, dtype) for key in keys)


def out_and_gradients(attention):
    """(q, k, v, dout) -> (out, dq, dk, dv), compiled."""

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)

    return run


def reference(attention, args):
    """The XLA backend in float32."""
    with jax.default_matmul_precision("highest"):
        run = out_and_gradients(functools.partial(attention, backend="xla"))
        return run(*(x.astype(jnp.float32) for x in args))


def check(results, references, limit=5e-3):
    for name, x, exact in zip(("out", "dq", "dk", "dv"), results, references):
        assert x.dtype == jnp.bfloat16
        x, exact = np.asarray(x, np.float32), np.asarray(exact)
        error = np.linalg.norm(x - exact) / np.linalg.norm(exact)
        print(f"{name}: relative error {error:.1e}")
        assert error < limit, name


@pytest.mark.parametrize("chunks", (1, 6, 7))
def test_teacher_forcing_by_cudnn(chunks):
    args = draw((1, chunks, 2, 256, 4, 128))
    assert dense_attention.choose_backend(args[0]) == "cudnn"
    check(out_and_gradients(tf.teacher_forcing)(*args), reference(tf.teacher_forcing, args))


def test_block_causal_by_cudnn():
    args = draw((2, 6, 256, 4, 128))
    check(out_and_gradients(tf.block_causal)(*args), reference(tf.block_causal, args))


def test_tokens_that_fill_no_tile():
    args = draw((2, 3, 2, 100, 3, 64))
    check(out_and_gradients(tf.teacher_forcing)(*args), reference(tf.teacher_forcing, args))


def test_inside_shard_map_scan_and_remat():
    """As the model calls it: three layers, checked manual mesh, saved out and lse."""
    q, *_ = draw((1, 6, 2, 256, 4, 128))
    weights = jnp.asarray([0.5, 1.0, 1.5], jnp.bfloat16)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    spec = P("data", None, None, None, "seq", None)

    def gradient(x, weights, backend):
        attend = jax.shard_map(
            functools.partial(tf.teacher_forcing, backend=backend),
            in_specs=(spec,) * 3,
            out_specs=spec,
        )

        @functools.partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.save_only_these_names(tf.OUT, tf.LSE),
            prevent_cse=False,
        )
        def layer(x, weight):
            return x + attend(x * weight, x, jnp.tanh(x)), None

        def loss(x):
            return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)))

        return jax.jit(jax.grad(loss))(x)

    with jax.set_mesh(mesh):
        x = jax.device_put(q, jax.NamedSharding(mesh, spec))
        weights = jax.device_put(weights, jax.NamedSharding(mesh, P()))
        result = gradient(x, weights, None)
        with jax.default_matmul_precision("highest"):
            exact = gradient(x.astype(jnp.float32), weights.astype(jnp.float32), "xla")
    check([result], [exact], limit=2e-2)  # three layers of bfloat16 residuals


@pytest.mark.parametrize("chunks, tokens, heads", ((12, 7040, 3), (48, 7040, 3)))
def test_speed(chunks, tokens, heads):
    """The 16 s and 64 s shapes of one of eight sequence ranks; dense cuDNN does about 623 and 566.

    Needs about 20 GB at 48 chunks. The floors are far below what an H200 does: they are there to
    notice a fall back to XLA.
    """
    head_dim = 128
    q, k, v, dout = draw((1, chunks, 2, tokens, heads, head_dim))
    pairs = (chunks**2 + chunks) * tokens**2 * heads
    forward = 4 * pairs * head_dim  # two products of the forward, seven of both
    for name, flops, function, arguments in (
        ("forward", forward, jax.jit(tf.teacher_forcing), (q, k, v)),
        (
            "forward + backward",
            3.5 * forward,
            out_and_gradients(tf.teacher_forcing),
            (q, k, v, dout),
        ),
    ):
        start = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        compiling = time.perf_counter() - start
        jax.block_until_ready(compiled(*arguments))
        repeats = 3
        start = time.perf_counter()
        for _ in range(repeats):
            result = compiled(*arguments)
        jax.block_until_ready(result)
        seconds = (time.perf_counter() - start) / repeats
        temp = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(
            f"{chunks} chunks of {tokens} tokens, {heads} heads, {name}: {1e3 * seconds:.1f} ms, "
            f"{flops / seconds / 1e12:.0f} TFLOP/s, temp {temp:.1f} GiB, compiled {compiling:.0f} s"
        )
        assert flops / seconds > 100e12
