"""Norm and rotation of queries and keys by the kernel, in interpret mode, and its lowering for Hopper.

The bits are the composition's. What may differ is the order of the norm's sum: it moves a row's rate
by float32's last bits, and a number to bfloat16's next one where it was near a tie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import norm_rotate as lib
from longlive_jax.ops import rope, rotated
from longlive_jax.ops.norm import rms_norm
from tests.kernels.checks import pretend_hopper

OTHERS = 1e-3  # the share of other numbers


def arguments(shape, dim, weights=jnp.bfloat16):
    """qkv bfloat16 [*shape, 3 * dim], both weights [dim], angle [*shape, 64]."""
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = 2 * jax.random.normal(keys[0], (*shape, 3 * dim), jnp.bfloat16)
    weight = 1 + 0.3 * jax.random.normal(keys[1], (2, dim))
    angle = jax.random.uniform(keys[2], (*shape, 64), jnp.float32, -np.pi, np.pi + 1)
    return qkv, *weight.astype(weights), angle


def product(shape, dim, weights=jnp.bfloat16):
    """As `arguments`, with a product of about their numbers for qkv."""
    sums, *rest = arguments(shape, dim, weights)
    keys = jax.random.split(jax.random.key(1), 3)
    scaled = PendingMatmul(
        sums=128 * sums,
        row=jnp.exp(jax.random.normal(keys[0], (*shape, 1))) / 128,
        column=jnp.exp(jax.random.normal(keys[1], (3 * dim,))),
        bias=jax.random.normal(keys[2], (3 * dim,), jnp.bfloat16),
    )
    return scaled, *rest


def composed_of_product(qkv, *rest):
    return composed(jax.jit(lambda x: x.astype(x.dtype))(qkv), *rest)


def extremes(dim):
    """A row of each kind, in q, k and v alike; NaN and infinities at different places."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(3 * dim)
    n = np.arange(3 * dim) % dim
    data = (
        normal * rng.choice(2.0 ** np.arange(-20, 4), 3 * dim),
        np.zeros(3 * dim),
        normal * 2.0**-124,
        normal * 2.0**60,
        np.clip(normal, -1, 1) * 3.3e38,  # the sum of the squares is infinite
        np.where(n == 5, np.nan, normal),
        np.where(n == 1000, -np.inf, normal),
    )
    _, *weights, angle = arguments((len(data),), dim)
    return jnp.asarray(np.stack(data), jnp.bfloat16), *weights, angle


def kernel(eps=1e-6):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return functools.partial(lib.kernel, interpret=interpret, eps=eps)


def interpreted(eps=1e-6):
    return lambda *x: kernel(eps)(*x[:3], jnp.cos(x[3]), jnp.sin(x[3]))


def composed(qkv, weight_q, weight_k, angle, eps=1e-6):
    """In two programs: in one, XLA may leave out the rounding in between."""
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q, k = (jax.jit(rms_norm, static_argnums=2)(*x, eps) for x in ((q, weight_q), (k, weight_k)))
    q, k, v = (x.reshape(*x.shape[:-1], -1, lib.HEAD_DIM) for x in (q, k, v))
    return *(jax.jit(rope.rotate)(x, angle) for x in (q, k)), v


def check(result, expected, others_in_v=0.0):
    """Equal, NaN included; but for a share, which is a step of bfloat16 away. Returns those."""
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, expected)
    result, expected = ([np.asarray(x, np.float32) for x in y] for y in (result, expected))
    shares = []
    for a, b in zip(result, expected):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        a, b = (np.nan_to_num(x, nan=0.0).reshape(-1, 2) for x in (a, b))
        shares.append((a != b).mean())
        # Of a pair: a number that moved before the rotation moves both.
        assert (np.abs(a - b) <= 2.0**-6 * np.linalg.norm(b, axis=1, keepdims=True)).all()
    assert max(shares[:2]) <= OTHERS and shares[2] <= others_in_v
    return shares


@pytest.mark.parametrize("dim, weights", ((1024, jnp.bfloat16), (2048, jnp.float32)))
def test_it_is_the_composition(dim, weights):
    x = arguments((1, 2, 2), dim, weights)
    check(interpreted(1e-3)(*x), composed(*x, 1e-3))


@pytest.mark.parametrize("dim, weights", ((1024, jnp.bfloat16), (2048, jnp.float32)))
def test_of_a_product(dim, weights):
    x = product((1, 2, 2), dim, weights)
    check(interpreted()(*x), composed_of_product(*x), OTHERS)


def test_of_a_product_out_of_the_ordinary():
    """The sums in a thousandth, times a row's thousand; a row's scale that is NaN."""
    sums, *rest = extremes(1024)
    row = jnp.full((7, 1), 1000.0).at[3].set(jnp.nan)
    column, bias = jnp.full(3072, 0.001), jnp.zeros(3072, jnp.bfloat16)
    x = PendingMatmul(sums, row, column, bias), *rest
    result = interpreted()(*x)
    check(result, composed_of_product(*x), OTHERS)
    assert np.isnan(np.asarray(result[2], np.float32)[3]).all()


def test_rows_out_of_the_ordinary():
    x = extremes(1024)
    q, k, v = interpreted()(*x)
    check((q, k, v), composed(*x))
    for y in (q, k):
        nan = np.isnan(np.asarray(y, np.float32)).reshape(7, -1)
        assert nan[5].all() and not nan[:5].any()
        assert np.flatnonzero(nan[6]).tolist() == [1000, 1001]  # of an infinity, its pair alone
        assert not np.asarray(y, np.float32)[[1, 4]].any()


def test_the_pair_is_two_neighbours():
    """A quarter of a turn: (a, b) to (-b, a), exactly."""
    x, *weights, angle = extremes(1024)
    zero, one = jnp.zeros_like(angle), jnp.ones_like(angle)
    run = kernel()
    turned, straight = (
        np.asarray(run(x, *weights, *angles)[0], np.float32).reshape(-1, 2)
        for angles in ((zero, one), (one, zero))
    )
    np.testing.assert_array_equal(turned, np.stack([-straight[:, 1], straight[:, 0]], axis=1))


SHAPE = (1, 1, 8, 880)
CHUNK = (
    jax.ShapeDtypeStruct((*SHAPE, 9216), jnp.bfloat16),
    *[jax.ShapeDtypeStruct((3072,), jnp.bfloat16)] * 2,
    jax.ShapeDtypeStruct((*SHAPE, 64), jnp.float32),
)


PRODUCT = PendingMatmul(
    sums=CHUNK[0],
    row=jax.ShapeDtypeStruct((*SHAPE, 1), jnp.float32),
    column=jax.ShapeDtypeStruct((9216,), jnp.float32),
    bias=jax.ShapeDtypeStruct((9216,), jnp.bfloat16),
)


@pytest.mark.parametrize("qkv", (CHUNK[0], PRODUCT), ids=("array", "product"))
def test_it_lowers_for_hopper_once(monkeypatch, qkv):
    arguments = (qkv, *CHUNK[1:])
    expected = jax.eval_shape(rotated.norm_rotate, *arguments)

    def layers(*x):
        return [rotated.norm_rotate(*x) for _ in range(3)]

    pretend_hopper(monkeypatch)
    assert lib.supports(*arguments)
    traced = jax.jit(layers).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    for out in traced.out_info:
        assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, expected)


def test_it_lowers_in_a_manual_shard_map(monkeypatch):
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=1, seq=8))
    spec, same = jax.P(None, None, "seq"), jax.P()
    specs = (spec, same, same, spec)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s))
        for x, s in zip(CHUNK, specs)
    ]
    pretend_hopper(monkeypatch)
    assert not lib.supports(*arguments)  # outside
    run = jax.shard_map(rotated.norm_rotate, mesh=mesh, in_specs=specs, out_specs=spec)
    with jax.set_mesh(mesh):
        text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    "i, other",
    (
        (0, jax.ShapeDtypeStruct((*SHAPE, 9216), jnp.float32)),
        (0, jax.ShapeDtypeStruct((*SHAPE, 4608), jnp.bfloat16)),
        (1, jax.ShapeDtypeStruct((1024,), jnp.bfloat16)),
        (3, jax.ShapeDtypeStruct((*SHAPE, 32), jnp.float32)),
        (3, jax.ShapeDtypeStruct((1, 1, 8, 1, 64), jnp.float32)),
    ),
)
def test_what_is_left_to_xla(monkeypatch, i, other):
    pretend_hopper(monkeypatch)
    assert not lib.supports(*CHUNK[:i], other, *CHUNK[i + 1 :])


def test_the_public_function_by_the_kernel(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    x = arguments((1, 1, 2, 2), 1024)
    y = product((1, 1, 2, 2), 1024)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        result, of_product = (jax.jit(rotated.norm_rotate)(*z) for z in (x, y))
    check(result, composed(*x))
    check(of_product, composed_of_product(*y), OTHERS)


def test_the_public_function_elsewhere():
    """Heads of another size, angles of one batch for all, and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = jax.random.normal(keys[0], (2, 5, 3 * 48))
    weight_q, weight_k = 1 + jax.random.normal(keys[1], (2, 48))
    angle = jax.random.normal(keys[2], (1, 5, 8))
    assert not lib.supports(qkv, weight_q, weight_k, angle)
    q, k, v = jax.jit(rotated.norm_rotate)(qkv, weight_q, weight_k, angle)
    normed = rms_norm(qkv[..., 48:96], weight_k).reshape(2, 5, 3, 16)
    np.testing.assert_allclose(k, rope.rotate(normed, angle), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(v, qkv[..., 96:].reshape(2, 5, 3, 16))
    assert q.shape == v.shape and q.dtype == v.dtype == qkv.dtype

    @jax.jit
    @jax.grad
    def gradient(x):
        return rotated.norm_rotate(x, weight_q, weight_k, angle)[0].sum()

    g = gradient(qkv)
    assert np.isfinite(np.asarray(g)).all() and g.any()


X = jnp.zeros((4, 3072), jnp.bfloat16), jnp.ones(1024), jnp.ones(1024), *jnp.zeros((2, 4, 64))


@pytest.mark.parametrize(
    "i, other, message",
    (
        (0, jnp.zeros((4, 3072)), "must be bfloat16"),
        (0, jnp.zeros((4, 3000), jnp.bfloat16), "multiple of 1024"),
        (0, jnp.zeros((4, 21504), jnp.bfloat16), "up to 6144"),
        (0, jnp.zeros((0, 3072), jnp.bfloat16), "must end in"),
        (1, jnp.ones(3072), r"must be \(1024,\)"),
        (2, jnp.ones((1, 1024)), r"must be \(1024,\)"),
        (3, jnp.zeros((2, 64)), "broadcast them"),
        (4, jnp.zeros((4, 32)), "broadcast them"),
        (4, jnp.zeros((4, 64), jnp.bfloat16), "must be float32"),
    ),
)
def test_what_the_kernel_refuses(i, other, message):
    with pytest.raises(InputError, match=message):
        lib.kernel(*X[:i], other, *X[i + 1 :])
