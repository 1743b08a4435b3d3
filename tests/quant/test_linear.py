"""The quantised linear layer: the original's numbers, error bounds, any mesh, bad input."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import formats
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.config import Mesh
from longlive_jax.errors import InputError
from longlive_jax.formats import FP8, PendingMatmul
from longlive_jax.kernels import dequantize_nvfp4, quantize_nvfp4, quantize_nvfp4_columns
from longlive_jax.ops import linear as plain
from longlive_jax.quant import linear as linear_lib
from longlive_jax.quant import matmul as matmul_lib
from longlive_jax.quant import operands
from longlive_jax.quant.linear import linear, product, quantize_activation, quantize_weight

TRAINING = ("fp8_train", "nvfp4_te", pytest.param("nvfp4_ar", marks=pytest.mark.slow))
INFERENCE = ("fp8", "fp8_train", pytest.param("nvfp4_w4a4", marks=pytest.mark.slow))


def recipe(name, path="ffn.0"):
    return recipe_lib.get(name).at(path)


def to_nearest(r):
    """The recipe without its random numbers."""
    g = r.gradients
    fixed = {n: dataclasses.replace(getattr(g, n), stochastic=False) for n in ("dgrad", "wgrad")}
    return dataclasses.replace(r, gradients=dataclasses.replace(g, **fixed))


def layer(inputs, outputs, dtype=jnp.bfloat16, seed=0):
    w, b = jax.random.split(jax.random.key(seed))
    return {
        "weight": jax.random.normal(w, (inputs, outputs), dtype) / inputs**0.5,
        "bias": jax.random.normal(b, (outputs,), dtype),
    }


def tokens(*shape, dtype=jnp.bfloat16, seed=7):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def fused():
    return layer(64, 96), tokens(2, 32, 64), tokens(2, 32, 96, seed=8)


@functools.partial(jax.jit, static_argnums=0)
def step(r, p, x, dy, key=None):
    """y, and the gradients of parameters and x."""
    y, vjp = jax.vjp(lambda p, x: linear(p, x, r, key), p, x)
    return y, *vjp(dy)


forward = jax.jit(linear, static_argnums=2)


def error(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def traced_anew(step):
    """`step`, but that JAX does not find what it traced before something was patched."""
    return jax.jit(lambda *args: step.__wrapped__(*args), static_argnums=0)


def near_share(got, want):
    """Share of entries within one bfloat16 step."""

    def steps(x):
        bits = np.asarray(x).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.mean(np.abs(steps(got) - steps(want)) <= 1)


def test_the_originals_training_step():
    file = np.load(pathlib.Path(__file__).parents[1] / "golden" / "nvfp4.npz")
    names = ("w", "b", "x", "gy", "y", "gx", "gw", "gb")
    g = {n: jnp.asarray(file[f"step|ar|{n}"].view(jnp.bfloat16)) for n in names}
    x, dy = (g[n].reshape(1, -1, g[n].shape[-1]) for n in ("x", "gy"))
    p = {"weight": g["w"].T, "bias": g["b"]}
    y, dp, dx = step(to_nearest(recipe("nvfp4_ar")), p, x, dy)
    assert near_share(y, g["y"].reshape(y.shape)) > 0.995
    assert near_share(dx, g["gx"].reshape(x.shape)) > 0.995
    assert near_share(dp["weight"].T, g["gw"]) > 0.995
    # The original rounds its sum over two samples to bfloat16 on the way.
    exact = np.sum(np.asarray(dy, np.float64), axis=(0, 1))
    assert near_share(dp["bias"], exact.astype(jnp.bfloat16)) == 1
    steps = np.sum(np.abs(np.asarray(g["gy"], np.float32)), axis=(0, 1)) * 2.0**-8
    assert np.all(np.abs(np.asarray(g["gb"], np.float64) - exact) < steps)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_are_near_the_unquantised_ones(name):
    p, x, dy = layer(96, 64), tokens(2, 48, 96), tokens(2, 48, 64, seed=8)
    y, dp, dx = step(recipe(name), p, x, dy, jax.random.key(3))
    want, want_dp, want_dx = step(None, p, x, dy)
    y_bound, dx_bound, dw_bound = (0.04, 0.06, 0.06) if "fp8" in name else (0.15, 0.19, 0.22)
    no_bias = p["bias"].astype(jnp.float32).reshape(1, 1, -1)
    assert error(y.astype(jnp.float32) - no_bias, want.astype(jnp.float32) - no_bias) < y_bound
    assert error(dx, want_dx) < dx_bound
    assert error(dp["weight"], want_dp["weight"]) < dw_bound
    assert error(dp["bias"], want_dp["bias"]) < 0.01
    assert (y.dtype, dx.dtype, dp["weight"].dtype) == (jnp.bfloat16,) * 3


def test_no_recipe_is_the_plain_layer():
    p, x = layer(32, 16), tokens(1, 4, 32)
    ours, plains = jax.make_jaxpr(linear)(p, x), jax.make_jaxpr(plain.linear)(p, x)
    assert str(ours) == str(plains)


def stored(p, r):
    return p | {"weight": quantize_weight(p["weight"], r)}


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_train", "nvfp4_w4a4"])
def test_a_product_is_the_layer_where_no_kernel_finishes_it(name):
    p, x, r = layer(32, 16), tokens(1, 4, 32), recipe_lib.get(name)
    if r is not None:
        r = r.at("ffn.0")
        p, x = stored(p, r), quantize_activation(x, r)
    ours, layers = (jax.make_jaxpr(f, static_argnums=2)(p, x, r) for f in (product, linear))
    assert str(ours) == str(layers)


@pytest.mark.parametrize("name", ["fp8", "nvfp4_w4a4"])
@pytest.mark.parametrize("path", ["ffn.0", "self_attn.qkv"])
@pytest.mark.parametrize("quantised", [True, False])
def test_a_product_before_its_scales(monkeypatch, name, path, quantised):
    """On Hopper, for inference. It is the layer but for the latter's roundings."""
    monkeypatch.setattr(linear_lib, "is_hopper", lambda: True)
    p, x, r = layer(64, 96), tokens(2, 3, 5, 64), recipe(name, path)
    p = stored(p, r)
    if quantised:
        x = quantize_activation(x, r)
    y, want = (jax.jit(f, static_argnums=2)(p, x, r) for f in (product, linear))
    assert isinstance(y, PendingMatmul) and y.shape == want.shape and y.dtype == want.dtype
    assert y.sums.dtype == y.bias.dtype == jnp.bfloat16 and y.column.shape == (96,)
    assert y.row.dtype == y.column.dtype == jnp.float32 and y.row.shape == (2, 3, 5, 1)
    assert 0 < error(y.astype(jnp.float32), want) < 2.0**-8
    no_weight = y.replace(sums=jnp.zeros_like(y.sums)).astype(jnp.float32)
    np.testing.assert_array_equal(no_weight[0, 0, 0], p["bias"].astype(jnp.float32))


@pytest.mark.parametrize("quantised", [True, False])
def test_a_product_with_a_gradient_is_the_layer(monkeypatch, quantised):
    monkeypatch.setattr(linear_lib, "is_hopper", lambda: True)
    p, x, r = layer(64, 96), tokens(2, 3, 5, 64), recipe("fp8_train")
    if quantised:
        x = quantize_activation(x, r)
    assert isinstance(jax.eval_shape(lambda: product(p, x, r)), jax.ShapeDtypeStruct)


@pytest.mark.parametrize(
    "samples, path, outputs",
    [
        (1, "ffn.2", 32),
        (2, "self_attn.qkv", 96),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, "ffn.0", 96),
                (1, "self_attn.qkv", 96),
                (2, "ffn.0", 96),
                (2, "ffn.2", 32),
            )
        ),
    ],
)
def test_a_library_that_scales_is_the_same_but_for_roundings(monkeypatch, samples, path, outputs):
    p, x, dy = layer(64, outputs), tokens(samples, 32, 64), tokens(samples, 32, outputs, seed=8)
    r = recipe("fp8_train", path)
    want = step(r, p, x, dy)
    monkeypatch.setattr(matmul_lib, "_capability", lambda: 9.0)
    got = traced_anew(step)(r, p, x, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and error(a, b) < 2.0**-7


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_product_of_two_tensors_scales_is_exact_in_bfloat16(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.exp(5 * jax.random.normal(keys[0], (500, 1))) * jax.random.normal(keys[1], (500, 32))
    q = operands.quantize(FP8(dtype), x, 1)
    top = float(jnp.finfo(dtype).max)
    filled = np.abs(np.asarray(q.values, np.float32)).max(axis=1) / top
    assert filled.min() >= 0.5 and filled.max() <= 1
    np.testing.assert_array_equal(np.frexp(q.scale)[0], 0.5)  # powers of two
    # None saturates, but for a quotient's rounding.
    assert (np.abs(x).max(axis=1) <= np.asarray(q.scale, np.float64) * top * (1 + 2**-23)).all()
    products = np.multiply.outer(q.scale, q.scale)
    np.testing.assert_array_equal(products, products.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["ffn.0", "self_attn.qkv"])
def test_a_gradient_by_kernels_is_the_same(monkeypatch, path):
    """A training step whose operands are quantised and dequantised by the kernels, interpreted."""
    outputs = 128 * recipe_lib.LINEARS[path]
    p, x, dy = layer(128, outputs), tokens(2, 64, 128), tokens(2, 64, outputs, seed=8)
    r, key = recipe("nvfp4_ar", path), jax.random.key(3)
    want = step(r, p, x, dy, key)
    called = []
    monkeypatch.setattr(dequantize_nvfp4, "supports", lambda *_: True)
    for lib in (quantize_nvfp4, quantize_nvfp4_columns):
        monkeypatch.setattr(lib, "supports", lambda x, rule, block, *_: tuple(block) == (1, 16))
    for lib in (dequantize_nvfp4, quantize_nvfp4, quantize_nvfp4_columns):
        one = lib.kernel
        monkeypatch.setattr(lib, "kernel", lambda *x, f=one, **k: called.append(f) or f(*x, **k))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = traced_anew(step)(r, p, x, dy, key)
    # Samples of each operand, and what was saved of the activation.
    assert len(called) == 2 * (2 + 2 * recipe_lib.LINEARS[path]) + 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("value", [0.0, 3.3e38, np.inf, np.nan])
def test_scales_of_a_tensor_out_of_the_ordinary(value):
    decoded = operands.quantize(FP8(), jnp.asarray([[value, -value, 0.0]]), 1)[0].dequantize()
    if np.isfinite(value):
        np.testing.assert_allclose(decoded, [value, -value, 0], rtol=2**-4)
    else:
        assert np.isnan(decoded).all()


def test_with_their_largest_magnitudes_kept_tensors_are_read_once_less():
    p, x, r = layer(64, 64), tokens(1, 32, 64), recipe("fp8_train")

    def maxima(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = jax.checkpoint(lambda p, x: linear(p, jnp.sin(x), r).sum(), policy=policy)
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(p, x).as_text()
        return text.count("stablehlo.reduce") - text.count("stablehlo.reduce_precision")

    # Those of the activation and of the weight.
    assert maxima(operands.AMAX) == maxima() - 2


@pytest.mark.slow
def test_fused_matrices_are_tensors_of_their_own():
    p, x, dy = fused()
    p["weight"] = p["weight"] * jnp.repeat(jnp.asarray([0.01, 1, 30], jnp.bfloat16), 32)[None]
    y, dp, dx = step(to_nearest(recipe("nvfp4_te", "self_attn.qkv")), p, x, dy)
    single = to_nearest(recipe("nvfp4_te", "self_attn.o"))
    split = [slice(32 * i, 32 * i + 32) for i in range(3)]
    apart = [
        step(single, {"weight": p["weight"][:, s], "bias": p["bias"][s]}, x, dy[..., s])
        for s in split
    ]
    np.testing.assert_array_equal(y, jnp.concatenate([a[0] for a in apart], -1))
    for s, a in zip(split, apart):
        np.testing.assert_array_equal(dp["weight"][:, s], a[1]["weight"])
    # The original rounds each of the three to bfloat16 before it adds them.
    assert error(dx, sum(a[2].astype(jnp.float32) for a in apart)) < 2.0**-8


def test_samples_do_not_depend_on_each_other():
    p, x = layer(32, 32), tokens(3, 16, 32)
    x = x.at[1].multiply(100)
    r = recipe("nvfp4_w4a4")
    other = x.at[0].set(x[2])
    np.testing.assert_array_equal(forward(p, x, r)[2], forward(p, other, r)[0])


@pytest.mark.parametrize("name", ["nvfp4_te", pytest.param("nvfp4_ar", marks=pytest.mark.slow)])
def test_stochastic_gradients_are_unbiased(name):
    p, x, dy = layer(32, 32), tokens(1, 32, 32), tokens(1, 32, 32, seed=8)
    p, x, dy = jax.tree.map(lambda y: y.astype(jnp.float32), (p, x, dy))
    r = recipe(name)
    keys = jax.random.split(jax.random.key(0), 200)
    _, dp, dx = jax.jit(jax.vmap(lambda k: step(r, p, x, dy, k)))(keys)
    w = quantize_weight(p["weight"], r).dequantize()[0]  # [out, in]
    one, mean = error(dx[0], dy @ w), error(jnp.mean(dx, axis=0), dy @ w)
    # An adaptive rule takes the better of two drawn roundings, which are then not quite unbiased.
    bound = 0.02 if name == "nvfp4_te" else 0.03
    assert one > 0.08 and mean < bound
    x_seen = quantize_activation(x, r).dequantize() if name == "nvfp4_ar" else x
    exact = error(jnp.mean(dp["weight"], axis=0), x_seen[0].T @ dy[0])
    assert exact < 0.2 and not np.array_equal(dx[0], dx[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nvfp4_te", "fp8_train"])
def test_any_mesh_under_scan_and_remat(name):
    """Chunks over seq, samples over data and fsdp, weights gathered layer by layer."""
    r = recipe(name, "cross_attn.kv")
    layers, batch, chunk, row, dim = 2, 4, 2, 20, 64  # 20: chunks are no whole blocks
    # All weights of one float32 tree, stacked; output halves are added to come back to `dim`.
    specs = {"weight": params_lib.ParamSpec((dim, 2 * dim), ("embed", None), params_lib.normal(0.1)),
             "bias": params_lib.ParamSpec((2 * dim,), (None,))}  # fmt: skip
    params = params_lib.init(params_lib.stack(specs, layers), jax.random.key(0))
    x = tokens(batch, chunk, row, dim, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(1), (batch, chunk))

    def loss(params, x, keys, gather, axes):
        policy = jax.checkpoint_policies.save_only_these_names(linear_lib.SAVED)

        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def body(x, scanned):
            p, number = scanned
            folded = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys.reshape(-1))
            y = linear(gather(p), x, r, folded.reshape(keys.shape), axes)
            return x + jnp.tanh(sum(jnp.split(y, 2, axis=-1))), None

        y, _ = jax.lax.scan(body, x, (params, jnp.arange(layers)))
        return jnp.sum(jnp.sin(y))

    want = jax.jit(jax.value_and_grad(lambda p: loss(p, x, keys, lambda p: p, ())))(params)

    mesh = mesh_lib.make_mesh(Mesh(data=2, fsdp=2, seq=2))
    where = params_lib.partition_specs(params_lib.stack(specs, layers))
    split = mesh_lib.spec(("batch", "chunk"))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(where, split, split), out_specs=(jax.P(), where),
        check_vma=False,
    )  # fmt: skip
    def sharded(params, x, keys):
        gather = functools.partial(params_lib.gather, specs=specs, rules=mesh_lib.RULES)
        value, grad = jax.value_and_grad(loss)(params, x, keys, lambda p: gather(p), ("seq",))
        grad["weight"] = jax.lax.psum(grad["weight"], "data")
        grad["bias"] = jax.lax.psum(grad["bias"], mesh_lib.AXES)
        return jax.lax.psum(value, mesh_lib.AXES), grad

    def put(tree, specs):
        return jax.tree.map(lambda y, s: jax.device_put(y, jax.NamedSharding(mesh, s)), tree, specs)

    got = jax.jit(sharded)(put(params, where), *(put(y, split) for y in (x, keys)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert error(a, b) < 1e-5


def test_what_is_kept_is_packed():
    p, x = layer(64, 64), tokens(1, 32, 64)
    r, key = recipe("nvfp4_ar"), jax.random.key(0)
    _, vjp = jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: linear(p, x, r, key), p, x), p, x)
    kept = [y for y in jax.tree.leaves(vjp) if getattr(y, "size", 0) >= 32 * 64]
    assert kept and all(y.dtype == jnp.float4_e2m1fn for y in kept)


@pytest.mark.parametrize("name", INFERENCE)
def test_quantised_weights_and_shared_activations_change_nothing(name):
    r = recipe(name, "self_attn.qkv")
    p, x = layer(64, 96), tokens(2, 5, 3, 64)
    want = forward(p, x, r)
    stored = {
        "weight": jax.jit(quantize_weight, static_argnums=1)(p["weight"], r),
        "bias": p["bias"],
    }
    assert stored["weight"].shape == (3, 32, 64)
    np.testing.assert_array_equal(forward(stored, x, r), want)
    np.testing.assert_array_equal(
        forward(stored, jax.jit(quantize_activation, static_argnums=1)(x, r), r), want
    )
    assert error(want, plain.linear(p, x)) < (0.04 if "fp8" in name else 0.15)


def test_a_frozen_weight_passes_gradients_on():
    p, x, dy = fused()
    r = to_nearest(recipe("nvfp4_te", "self_attn.qkv"))
    _, _, want = step(r, p, x, dy)
    frozen = p | {"weight": quantize_weight(p["weight"], r)}
    got = jax.jit(lambda x, dy: jax.vjp(lambda x: linear(frozen, x, r), x)[1](dy)[0])(x, dy)
    np.testing.assert_array_equal(got, want)


def test_native_fp4_is_the_same(monkeypatch):
    p, x, dy = fused()
    r = to_nearest(recipe("nvfp4_te", "self_attn.qkv"))
    want = step(r, p, x, dy)
    monkeypatch.setattr(matmul_lib, "_capability", lambda: 10.0)
    got = traced_anew(step)(r, p, x, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert error(a, b) < 1e-3


@pytest.mark.parametrize(
    "capability, nvfp4, fp8",
    [(0.0, "as bfloat16", "conversion"), (9.0, "as bfloat16", "are"), (10.0, "as they", "are")],
)
def test_the_backend_is_chosen_by_capability(monkeypatch, capability, nvfp4, fp8):
    monkeypatch.setattr(matmul_lib, "_capability", lambda: capability)
    get = recipe_lib.get
    assert matmul_lib.backend(get("nvfp4_ar")).startswith(f"nvfp4_ar: NVFP4, multiplied {nvfp4}")
    assert matmul_lib.backend(get("fp8")).endswith(fp8)
    assert matmul_lib.backend(None) == "not quantised"


def test_not_a_number_stays_in_its_sample():
    p, x = layer(32, 32), tokens(3, 16, 32)
    y = forward(p, x.at[0, 3, 5].set(jnp.nan), recipe("nvfp4_w4a4"))
    assert np.all(np.isnan(y[0])) and np.all(np.isfinite(np.asarray(y[1:], np.float32)))
    y = forward(p, jnp.zeros_like(x), recipe("nvfp4_w4a4"))
    np.testing.assert_array_equal(y, jnp.broadcast_to(p["bias"].reshape(1, 1, -1), y.shape))


def trace(p, x, r, key=None, gradient=True):
    def loss(x):
        return jnp.sum(linear(p, x, r, key).astype(jnp.float32))

    jax.eval_shape(jax.grad(loss) if gradient else loss, x)


def test_bad_input():
    p, x, key = layer(64, 48), tokens(2, 4, 64), jax.random.key(0)
    with pytest.raises(InputError, match="'fp8' is for inference"):
        trace(p, x, recipe("fp8"))
    with pytest.raises(InputError, match="'nvfp4_te' rounds gradients by a key"):
        trace(p, x, recipe("nvfp4_te"))
    with pytest.raises(InputError, match=r"keys of shape \(3,\)"):
        trace(p, x, recipe("nvfp4_te"), jax.random.split(key, 3))
    with pytest.raises(InputError, match="multiple of 16"):
        trace(layer(40, 32), tokens(1, 4, 40), recipe("nvfp4_te"), gradient=False)

    def stored(name):
        return p | {"weight": quantize_weight(p["weight"], recipe(name))}

    with pytest.raises(InputError, match="FP8Tensor, recipe 'nvfp4_w4a4'"):
        trace(stored("fp8"), x, recipe("nvfp4_w4a4"), gradient=False)
    with pytest.raises(InputError, match="quantised by rows has no gradient"):
        trace(stored("nvfp4_w4a4"), x, recipe("nvfp4_te"), key)


def test_samples_are_quantised_as_the_formats_do():
    x = tokens(2, 3, 5, 32)
    q = quantize_activation(x, recipe("nvfp4_w4a4"))
    for i in range(2):
        want = formats.quantize_nvfp4(x[i], "mse")
        jax.tree.map(np.testing.assert_array_equal, q[i].packed(), want.packed())
        assert q[i].amax == want.amax
