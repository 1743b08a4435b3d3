"""FP8 training's products on a Hopper GPU, whose library scales its sums, against float32 ones.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_fp8_train_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant import matmul
from tests.quant.test_linear import error, layer, recipe, step, tokens, traced_anew

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]


@pytest.mark.parametrize(
    "path, inputs, outputs",
    (("ffn.0", 1024, 4096), ("ffn.2", 4096, 1024), ("self_attn.qkv", 1024, 3072)),
)
@pytest.mark.parametrize("samples", (1, 2))
def test_a_layer_and_its_gradients(monkeypatch, path, inputs, outputs, samples):
    r = recipe("fp8_train", path)
    p = layer(inputs, outputs)
    x, dy = tokens(samples, 1, 2048, inputs), tokens(samples, 1, 2048, outputs, seed=8)
    got = traced_anew(step)(r, p, x, dy)

    monkeypatch.setattr(matmul, "_capability", lambda: 0.0)
    monkeypatch.setattr(matmul, "operand", lambda q: q.values.astype(jnp.float32))
    want = traced_anew(step)(r, p, x, dy)
    names = ("y", *(f"gradient of {name}" for name in (*sorted(p), "x")))
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(z, np.float64) for z in (a, b))
        slope = np.sum(a * b) / np.sum(b * b)
        print(f"{path} of {samples}, {name}: error {error(a, b):.2e}, slope 1 + {slope - 1:.1e}")
        assert error(a, b) < 2.0**-7
        # A scale that bfloat16 had rounded would turn it by up to 2^-8.
        assert abs(slope - 1) < 2.0**-12
