"""What a small VAE does otherwise on a GPU than on a CPU.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu tests/gpu/test_vae_gpu.py
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models import vae_blocks as blocks
from longlive_jax.models import vae_fp8
from longlive_jax.ops.attention import attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_gpu")]


@pytest.mark.parametrize(("channels", "out"), [(12, 16), (32, 32), (33, 16), (12, 160)])
def test_a_causal_convolution_of_few_channels(channels, out):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 7, 16, 24, channels), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (3, 3, 3, channels, out), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (2, 5, 16, 24, out), jnp.bfloat16)

    @jax.jit
    def ours(weight, x):
        params = {"weight": weight, "bias": jnp.zeros(out, x.dtype)}
        return blocks.causal_conv(params, x[:, :2], x[:, 2:], axis=None)[1]

    def whole(weight, x):
        with jax.default_matmul_precision("highest"):
            return blocks._conv_3d(weight, x, 1, ((1, 1), (1, 1)))

    wide = (weight.astype(jnp.float32), x.astype(jnp.float32))
    y, back = jax.vjp(ours, weight, x)
    expected, back_expected = jax.vjp(whole, *wide)
    for got, wanted in zip((y, *back(dy)), (expected, *back_expected(dy.astype(jnp.float32)))):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted)
        assert np.linalg.norm(got - wanted) < 6e-3 * np.linalg.norm(wanted)
    text = ours.lower(weight, x).compile().as_text()
    by_frame = re.search(r"dim_labels=\w*012", text) is None
    assert by_frame == (max(channels, out) <= blocks._FEW_CHANNELS)


def test_a_convolution_of_codes_is_cudnns():
    """`vae_fp8`: the library multiplies the codes, and the sums are those of their values."""
    keys = jax.random.split(jax.random.key(0), 2)
    codes = jax.random.normal(keys[0], (1, 4, 16, 24, 64)).astype(vae_fp8.FORMAT)
    weight = jax.random.normal(keys[1], (3, 3, 3, 64, 64)).astype(vae_fp8.FORMAT)
    scale = jnp.linspace(0.5, 1.5, 64, dtype=jnp.float32)

    @jax.jit
    def ours(weight, codes):
        sums = blocks._conv_codes(weight, codes, jnp.bfloat16, None)
        return sums * scale.reshape(1, 1, 1, 1, -1)

    got = np.asarray(ours(weight, codes))
    with jax.default_matmul_precision("highest"):
        wide = (weight.astype(jnp.float32), codes.astype(jnp.float32))
        sums = blocks._conv_3d(*wide, 1, ((1, 1), (1, 1)))
        wanted = np.asarray(sums * scale.reshape(1, 1, 1, 1, -1))
    assert np.linalg.norm(got - wanted) < 6e-3 * np.linalg.norm(wanted)
    text = ours.lower(weight, codes).compile().as_text()
    assert re.search(r"custom-call\(.*f8e4m3fn|cudnn\$convForwardGraph", text), text


def test_attention_of_an_odd_number_of_tokens_has_a_gradient():
    q = jax.random.normal(jax.random.key(0), (2, 35, 1, 64), jnp.bfloat16)

    def total(q):
        return jnp.sum(attention(q, q, q).astype(jnp.float32) ** 2)

    got = np.asarray(jax.jit(jax.grad(total))(q), np.float32)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.grad(total)(q.astype(jnp.float32)))
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted)
