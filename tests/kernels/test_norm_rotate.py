"""Norm and rotation of queries and keys by the kernel.

The bits are the composition's. What may differ is the order of the norm's sum: it moves a row's
rate by float32's last bits, and a number to bfloat16's next one where it was near a tie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import norm_rotate
from longlive_jax.ops import rope, rotated
from longlive_jax.ops.norm import rms_norm
from tests.kernels.checks import RACES, Case, Chunk, Public, f32, kernel_tests, shaped
from tests.kernels.rows import shaped_product

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


def extreme_product():
    """The sums in a thousandth, times a row's thousand; a row's scale that is NaN."""
    sums, *rest = extremes(1024)
    row = jnp.full((7, 1), 1000.0).at[3].set(jnp.nan)
    column, bias = jnp.full(3072, 0.001), jnp.zeros(3072, jnp.bfloat16)
    return PendingMatmul(sums, row, column, bias), *rest


def kernel(qkv, weight_q, weight_k, angle, **options):
    return norm_rotate.kernel(qkv, weight_q, weight_k, jnp.cos(angle), jnp.sin(angle), **options)


def composed(qkv, weight_q, weight_k, angle, eps=1e-6):
    """In several programs: in one, XLA may leave out the rounding in between."""
    qkv = jax.jit(lambda x: x.astype(x.dtype))(qkv)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    q, k = (jax.jit(rms_norm, static_argnums=2)(*x, eps) for x in ((q, weight_q), (k, weight_k)))
    q, k, v = (x.reshape(*x.shape[:-1], -1, norm_rotate.HEAD_DIM) for x in (q, k, v))
    return *(jax.jit(rope.rotate)(x, angle) for x in (q, k)), v


def check(result, expected, others_in_v=0.0, rows=None):
    """Equal, NaN included; but for a share, which is a step of bfloat16 away. Returns those.

    rows: (q, k, v) are float32 numbers, by row, that it asserts things of.
    """
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, expected)
    result, expected = ([np.asarray(x, np.float32) for x in y] for y in (result, expected))
    if rows:
        rows(*(x.reshape(len(x), -1) for x in result))
    shares = []
    for a, b in zip(result, expected):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        a, b = (np.nan_to_num(x, nan=0.0).reshape(-1, 2) for x in (a, b))
        shares.append((a != b).mean())
        # Of a pair: a number that moved before the rotation moves both.
        assert (np.abs(a - b) <= 2.0**-6 * np.linalg.norm(b, axis=1, keepdims=True)).all()
    assert max(shares[:2]) <= OTHERS and shares[2] <= others_in_v
    return shares


def rows_of_extremes(*qkv):
    for y in qkv[:2]:
        nan = np.isnan(y)
        assert nan[5].all() and not nan[:5].any()
        assert np.flatnonzero(nan[6]).tolist() == [1000, 1001]  # of an infinity, its pair alone
        assert not y[[1, 4]].any()


def a_row_of_nan(_, __, v):
    assert np.isnan(v[3]).all()


def layers(*x):
    """Of which a program has the kernel once."""
    return [rotated.norm_rotate(*x) for _ in range(3)]


SHAPE = (1, 1, 8, 880)
QKV, WEIGHT, ANGLE = shaped(*SHAPE, 9216), shaped(3072), f32(*SHAPE, 64)
SPEC = jax.P(None, None, "seq")
X, W, A = shaped(4, 3072), f32(1024), f32(4, 64)
SIZES = ((1024, jnp.bfloat16), (2048, jnp.float32))

TestNormRotate = kernel_tests(
    norm_rotate,
    composed,
    check,
    kernel=kernel,
    cases={
        **{
            f"{dim}": Case(lambda n=(dim, dtype): arguments((1, 2, 2), *n), {"eps": 1e-3})
            for dim, dtype in SIZES
        },
        **{
            f"product, {dim}": Case(
                lambda n=(dim, dtype): product((1, 2, 2), *n), others_in_v=OTHERS
            )
            for dim, dtype in SIZES
        },
        "extremes": Case(lambda: extremes(1024), rows=rows_of_extremes),
        "extreme product": Case(extreme_product, others_in_v=OTHERS, rows=a_row_of_nan),
    },
    publics={
        "array": Public(rotated.norm_rotate, composed, lambda: arguments((1, 1, 2, 2), 1024)),
        "product": Public(
            rotated.norm_rotate,
            composed,
            lambda: product((1, 1, 2, 2), 1024),
            {"others_in_v": OTHERS},
        ),
    },
    chunks={
        "layers": Chunk(
            layers,
            (QKV, WEIGHT, WEIGHT, ANGLE),
            specs=(SPEC, jax.P(), jax.P(), SPEC),
            out_specs=SPEC,
        ),
        "layers of products": Chunk(layers, (shaped_product(*QKV.shape), WEIGHT, WEIGHT, ANGLE)),
    },
    left=[
        (f32(*SHAPE, 9216), WEIGHT, WEIGHT, ANGLE),
        (shaped(*SHAPE, 4608), WEIGHT, WEIGHT, ANGLE),
        (QKV, shaped(1024), WEIGHT, ANGLE),
        (QKV, WEIGHT, WEIGHT, f32(*SHAPE, 32)),
        (QKV, WEIGHT, WEIGHT, f32(1, 1, 8, 1, 64)),
    ],
    refused=[
        ("must be bfloat16", f32(4, 3072), W, W, A, A),
        ("multiple of 1024", shaped(4, 3000), W, W, A, A),
        ("up to 6144", shaped(4, 21504), W, W, A, A),
        ("must end in", shaped(0, 3072), W, W, A, A),
        (r"must be \(1024,\)", X, f32(3072), W, A, A),
        (r"must be \(1024,\)", X, W, f32(1, 1024), A, A),
        ("broadcast them", X, W, W, f32(2, 64), A),
        ("broadcast them", X, W, W, A, f32(4, 32)),
        ("must be float32", X, W, W, A, shaped(4, 64)),
    ],
)


def test_the_pair_is_two_neighbours():
    """A quarter of a turn: (a, b) to (-b, a), exactly."""
    x, *weights, angle = extremes(1024)
    zero, one = jnp.zeros_like(angle), jnp.ones_like(angle)
    run = functools.partial(norm_rotate.kernel, interpret=RACES)
    turned, straight = (
        np.asarray(run(x, *weights, *angles)[0], np.float32).reshape(-1, 2)
        for angles in ((zero, one), (one, zero))
    )
    np.testing.assert_array_equal(turned, np.stack([-straight[:, 1], straight[:, 0]], axis=1))


def test_the_public_function_elsewhere():
    """Heads of another size, angles of one batch for all, and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = jax.random.normal(keys[0], (2, 5, 3 * 48))
    weight_q, weight_k = 1 + jax.random.normal(keys[1], (2, 48))
    angle = jax.random.normal(keys[2], (1, 5, 8))
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
