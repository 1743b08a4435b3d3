"""Checkpoints of quantised weights: as made at load, to the bit; the original's files, both ways."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import (
    four_over_six,
    from_torch,
    layout,
    quantized,
    safetensors,
    store,
    to_torch,
)
from longlive_jax.errors import InputError
from longlive_jax.formats import quantize_nvfp4
from longlive_jax.models import dit
from longlive_jax.quant import weights as weights_lib
from tests.checkpoints import tiny, torch_file

# No side is a multiple of a tile's 128 x 64.
CONFIG = config_lib.Config(
    model=config_lib.Model(
        dim=96, ffn_dim=160, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=8,
        text_len=16, freq_dim=32,
    )
)  # fmt: skip
SPEC = dit.spec(CONFIG.model)
LINEARS = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q",
           "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"]  # fmt: skip
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def weights():
    """The original's tensors in bfloat16; do not change them."""
    draw = np.random.default_rng(0)
    shapes = layout.torch_shapes(SPEC)
    return {key: draw.standard_normal(shape).astype(BF16) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def plain(weights, tmp_path_factory):
    """A checkpoint that is not quantised."""
    root = tmp_path_factory.mktemp("plain")
    convert(root / "ckpt", tiny.write_safetensors(root / "f.safetensors", weights))
    return root / "ckpt"


def original(weights, rule, block=(1, 16)):
    """What `model_4o6.pt` holds, by the reference and not by the code."""
    result = {}
    for key, t in weights.items():
        module = key.removesuffix(".weight")
        if key == module or module.split(".", 2)[-1] not in LINEARS:
            result[f"model.{key}"] = t
            continue
        q = quantize_nvfp4(jnp.asarray(t), rule, block)
        (n, k), rows, columns = t.shape, -(-t.shape[0] // 128) * 128, -(-t.shape[1] // 64) * 64
        values = np.zeros((rows, columns // 2), np.uint8)
        values[:n, : k // 2] = q.packed()
        scales = np.zeros(rows * columns // 16, ml_dtypes.float8_e4m3fn)
        r, c = np.indices((n, k // 16))
        tile = (r // 128) * (columns // 64) + c // 4
        scales[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = q.scales
        result |= {
            f"model.{module}.quantized_weight_{name}": array
            for name, array in (
                ("values", values),
                ("scale_factors", scales),
                ("amax", np.asarray(q.amax).reshape(1)),
                ("metadata", np.array([n, k, rows, columns], np.int32)),
            )
        }
    return result


def saved(tensors, rule="mse"):
    return {
        "generator": tensors,
        "checkpoint_format": "longlive_generator_nvfp4",
        "checkpoint_version": 1,
        "merged_lora": True,
        "quantization": {"format": "nvfp4", "scale_rule": "static_4", "weight_scale_rule": rule},
    }


def convert(directory, file, config=CONFIG, **kwargs):
    source = from_torch.open_part("dit", str(file), config, **kwargs)
    return store.save(
        directory, "dit", source.pieces(), source.spec, section=source.section,
        sources=source.files, recipe=source.recipe,
    )  # fmt: skip


def load(directory, name, mesh=None, **kwargs):
    return store.load(
        directory, "dit", SPEC, mesh, "bfloat16", mesh_lib.SAMPLING_RULES, config=CONFIG.model,
        recipe=recipe_lib.get(name), **kwargs,
    )  # fmt: skip


@functools.cache  # compiled once; nobody changes it
def at_load(plain, name):
    return weights_lib.quantize_params(load(plain, "bf16"), SPEC, recipe_lib.get(name))


def equal(a, b):
    def bits(x):
        return np.asarray(x).reshape(-1).view(np.uint8)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize(
    "name",
    ["fp8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fp8_train", "nvfp4_w4a4"))],
)
def test_converting_quantises_as_loading_does(plain, weights, name, tmp_path):
    """From float32, which is cast first; and then on a mesh."""
    exact = {k: t.astype(np.float32) * np.float32(1 + 2**-12) for k, t in weights.items()}
    assert all((exact[k].astype(BF16) == t).all() for k, t in weights.items())
    file = tiny.write_safetensors(tmp_path / "f.safetensors", exact)
    summary = convert(tmp_path / "ckpt", file, recipe=name)
    assert summary.parameters == params_lib.count(SPEC)
    info = json.loads((tmp_path / "ckpt/metadata.json").read_text())["parts"]["dit"]
    assert info["recipe"] == name
    expected = at_load(plain, name)
    equal(load(tmp_path / "ckpt", name), expected)

    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=2))
    specs = weights_lib.quantize_specs(SPEC, recipe_lib.get(name))
    placed = load(tmp_path / "ckpt", name, mesh)
    equal(jax.device_get(placed), jax.device_get(expected))
    where = params_lib.shardings(specs, mesh, mesh_lib.SAMPLING_RULES)
    for x, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(where)):
        assert x.sharding == sharding


@pytest.mark.slow
def test_codes_lie_two_a_byte(plain, weights, tmp_path):
    file = tiny.write_safetensors(tmp_path / "f.safetensors", weights)
    convert(tmp_path / "ckpt", file, recipe="nvfp4_w4a4")
    stored = store.Stored(tmp_path / "ckpt", "dit")
    dtypes = {"/".join(p): d.name for p, d in stored.dtypes().items()}
    assert dtypes["blocks/self_attn/qkv/weight/values"] == "uint8"
    assert dtypes["blocks/self_attn/qkv/weight/scales"] == "float8_e4m3fn"
    assert dtypes["blocks/self_attn/qkv/weight/amax"] == "float32"
    assert dtypes["blocks/self_attn/qkv/bias"] == "bfloat16"
    shapes = {"/".join(p): s.shape for p, s in params_lib.flatten(stored.spec()).items()}
    assert shapes["blocks/self_attn/qkv/weight/values"] == (2, 3, 96, 48)
    assert shapes["blocks/cross_attn/kv/weight/scales"] == (2, 2, 96, 6)
    assert shapes["blocks/ffn/2/weight/amax"] == (2, 1)


def test_full_size_by_shape():
    recipe = recipe_lib.get("nvfp4_w4a4")
    spec = dit.spec(config_lib.Model())
    stored = quantized.spec(spec, recipe)
    size = sum(
        math.prod(s.shape) * jnp.dtype(s.dtype).itemsize
        for s in params_lib.flatten(stored).values() if s.dtype
    )  # fmt: skip
    assert 2.76e9 < size < 2.77e9
    keys = {}
    for w in layout.weights(stored):
        field = quantized.is_field(w.path)
        keys |= four_over_six.entries(w) if field else dict.fromkeys(w.keys)
    linear = {f"blocks.{i}.{name}" for i in range(30) for name in LINEARS}
    plain = set(layout.torch_shapes(spec))
    assert len(linear) == 300 and {f"{module}.weight" for module in linear} <= plain
    names = ("values", "scale_factors", "amax", "metadata")
    assert set(keys) == plain - {f"{module}.weight" for module in linear} | {
        f"{module}.quantized_weight_{name}" for module in linear for name in names
    }
    assert keys["blocks.7.ffn.0.quantized_weight_values"] == ((14336, 1536), np.uint8)
    assert keys["blocks.7.ffn.2.quantized_weight_scale_factors"][0] == (3072 * 14336 // 16,)


# The original's files.


def same_tensors(file, tensors):
    found, header = safetensors.read(file)
    assert sorted(found) == sorted(tensors)
    for key, array in tensors.items():
        got = found[key].read()
        assert (got.dtype, got.shape) == (array.dtype, array.shape), key
        assert got.tobytes() == array.tobytes(), key
    return header


def test_the_originals_file_there_and_back(plain, weights, tmp_path):
    tensors = original(weights, "mse")
    torch_file.save(tmp_path / "model_4o6.pt", saved(tensors))
    summary = convert(tmp_path / "ckpt", tmp_path)  # the folder
    assert summary.parameters == params_lib.count(SPEC)
    expected = at_load(plain, "nvfp4_w4a4")
    equal(load(tmp_path / "ckpt", "nvfp4_w4a4"), expected)

    back = tmp_path / "back.safetensors"
    assert to_torch.export_store(tmp_path / "ckpt", "dit", back) == len(tensors)
    header = same_tensors(back, tensors)
    assert header["checkpoint_format"] == "longlive_generator_nvfp4"
    assert json.loads(header["quantization"])["weight_scale_rule"] == "mse"
    convert(tmp_path / "again", back)
    equal(load(tmp_path / "again", "nvfp4_w4a4"), expected)


def test_an_amax_may_have_no_axis(plain, weights, tmp_path):
    tensors = original(weights, "mse")
    tensors = {k: t.reshape(()) if k.endswith("amax") else t for k, t in tensors.items()}
    torch_file.save(tmp_path / "f.pt", saved(tensors))
    convert(tmp_path / "ckpt", tmp_path / "f.pt")
    equal(load(tmp_path / "ckpt", "nvfp4_w4a4"), at_load(plain, "nvfp4_w4a4"))


@pytest.mark.slow
def test_square_blocks_there_and_back(plain, weights, tmp_path):
    """What was trained in nvfp4_ar; the recipe must be named, and fit."""
    tensors = original(weights, "static_6", (16, 16))
    torch_file.save(tmp_path / "f.pt", saved(tensors, "static_6"))
    with pytest.raises(InputError, match=r"'static_6'.*nvfp4_ar or nvfp4_te, give that"):
        convert(tmp_path / "ckpt", tmp_path / "f.pt")
    convert(tmp_path / "ckpt", tmp_path / "f.pt", recipe="nvfp4_ar")
    equal(load(tmp_path / "ckpt", "nvfp4_ar"), at_load(plain, "nvfp4_ar"))
    to_torch.export_store(tmp_path / "ckpt", "dit", tmp_path / "back.safetensors")
    same_tensors(tmp_path / "back.safetensors", tensors)
    torch_file.save(tmp_path / "rows.pt", saved(original(weights, "static_6"), "static_6"))
    source = from_torch.open_part("dit", str(tmp_path / "rows.pt"), CONFIG, recipe="nvfp4_ar")
    with pytest.raises(InputError, match="of single rows, recipe 'nvfp4_ar' has blocks of 16 x 16"):
        list(source.pieces())


def test_a_file_that_says_no_rule_needs_a_recipe(weights, tmp_path):
    torch_file.save(tmp_path / "f.pt", original(weights, "mse"))
    with pytest.raises(InputError, match="does not say by which scale rule"):
        convert(tmp_path / "ckpt", tmp_path / "f.pt")
    assert convert(tmp_path / "ckpt", tmp_path / "f.pt", recipe="nvfp4_w4a4")


ONE = "model.blocks.1.ffn.2.quantized_weight_"
_E4M3 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (lambda s: s["quantization"].update(weight_scale_rule="static_6"), {}, "factor of up to"),
        (
            lambda s: s["quantization"].update(weight_scale_rule="mae"),
            {},
            "'mae'.*'mse'.*no recipe has that one.*model_bf16.pt",
        ),
        (lambda s: None, {"recipe": "nvfp4_ar"}, "rule 'mse'.*'nvfp4_ar' decodes by 'static_6'"),
        (lambda s: None, {"recipe": "fp8"}, "--recipe=fp8: .*NVFP4 already"),
        (lambda s: None, {"recipe": "bf16"}, "--recipe=bf16: .*NVFP4 already"),
        (lambda s: None, {"recipe": "int4"}, "unknown recipe 'int4'; recipes: bf16, fp8"),
        (lambda s: None, {"lora_source": "f"}, "cannot be merged into quantised weights"),
        (lambda s: s["generator"].pop(f"{ONE}amax"), {}, "ffn.2.quantized_weight_amax: is missing"),
        (
            lambda s: s["generator"].update({f"{ONE}values": np.zeros((96, 80), np.uint8)}),
            {},
            r"values: has shape \(96, 80\); for a weight of \(96, 160\) it must be \(128, 96\)",
        ),
        (
            lambda s: s["generator"].update({f"{ONE}amax": np.ones(1, np.float64)}),
            {},
            "amax: is float64; it must be float32",
        ),
        (
            lambda s: s["generator"].update(
                {f"{ONE}metadata": np.array([96, 160, 96, 160], np.int32)}
            ),
            {},
            r"padded to \(96, 160\); it must be \(128, 192\)",
        ),
        (
            lambda s: s["generator"].update(
                {"model.blocks.1.ffn.2.weight": np.zeros((96, 160), BF16)}
            ),
            {},
            "blocks.1.ffn.2.weight twice",
        ),
        (
            lambda s: [s["generator"].pop(ONE + n) for n in four_over_six._DTYPES]
            and s["generator"].update({"model.blocks.1.ffn.2.weight": np.zeros((96, 160), BF16)}),
            {},
            "quantises 19 of the 20 weights.*blocks.1.ffn.2.weight",
        ),
        (
            lambda s: s["generator"].update({f"{ONE}amax": np.full(1, np.nan, np.float32)}),
            {},
            "ffn.2.quantized_weight_amax: 1 of 1 values are not finite",
        ),
        (
            lambda s: s["generator"].update({f"{ONE}scale_factors": np.full(1536, np.nan, _E4M3)}),
            {},
            "ffn.2.quantized_weight_scale_factors: 1536 of 1536 values are not finite",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(original_tensors, change, kwargs, message, tmp_path):
    value = saved(dict(original_tensors))
    change(value)
    torch_file.save(tmp_path / "f.pt", value)
    with pytest.raises(InputError, match=message):
        list(from_torch.open_part("dit", str(tmp_path / "f.pt"), CONFIG, **kwargs).pieces())


@pytest.fixture(scope="module")
def original_tensors(weights):
    return original(weights, "mse")


def test_the_message_names_the_sizes_that_fit(original_tensors, tmp_path):
    torch_file.save(tmp_path / "f.pt", saved(original_tensors))
    with pytest.raises(InputError, match=r"The file fits with --config.model.dim=96 .*ffn_dim=160"):
        from_torch.open_part("dit", str(tmp_path / "f.pt"), config_lib.Config())


def test_no_file_of_the_originals_is_fp8(plain, weights, tmp_path):
    file = tiny.write_safetensors(tmp_path / "f.safetensors", weights)
    convert(tmp_path / "ckpt", file, recipe="fp8")
    with pytest.raises(InputError, match="recipe 'fp8', and the original has no files of that"):
        to_torch.export_store(tmp_path / "ckpt", "dit", tmp_path / "back.safetensors")
    # Nor is it what another recipe, or none, wants.
    for name in ("bf16", "fp8_train"):
        with pytest.raises(InputError, match=rf"by recipe 'fp8', and '{name}' is .*recipe=fp8, "):
            load(tmp_path / "ckpt", name)
    with pytest.raises(InputError, match=r"is not quantised.*--recipe=fp8 --output=DIR"):
        load(plain, "fp8")


def test_values_that_are_not_finite(plain, weights, tmp_path):
    bad = dict(weights) | {"blocks.1.cross_attn.k.weight": np.full((96, 96), np.inf, BF16)}
    file = tiny.write_safetensors(tmp_path / "f.safetensors", bad)
    with pytest.raises(InputError, match=r"blocks\.1\.cross_attn\.k\.weight: 9216 of 9216"):
        convert(tmp_path / "ckpt", file, recipe="fp8")
    # Finite in float32, not in the dtype that they are quantised from.
    large = {k: t.astype(np.float32) for k, t in weights.items()}
    large["blocks.1.ffn.0.weight"][3, 4] = np.finfo(np.float32).max
    file = tiny.write_safetensors(tmp_path / "f.safetensors", large)
    with pytest.raises(InputError, match=r"ffn/0/weight of layer 1 in bfloat16: 1 of 15360"):
        convert(tmp_path / "ckpt", file, recipe="fp8")
    for name in ("fp8", "nvfp4_w4a4"):
        params = load(plain, "bf16")
        where = params["blocks"]["self_attn"]["o"]
        where["weight"] = where["weight"].at[1, 2, 3].set(jnp.nan)
        params = weights_lib.quantize_params(params, SPEC, recipe_lib.get(name))
        with pytest.raises(InputError, match="CKPT: blocks/self_attn/o/weight has values that are"):
            quantized.check(params, "CKPT")


def test_sides_that_blocks_do_not_divide(tmp_path):
    model = config_lib.Model(
        dim=40, ffn_dim=64, num_heads=4, num_layers=1, in_dim=4, out_dim=4, text_dim=8, freq_dim=32
    )
    config = config_lib.Config(model=model)
    tensors = {k: np.ones(s, BF16) for k, s in layout.torch_shapes(dit.spec(model)).items()}
    file = tiny.write_safetensors(tmp_path / "f.safetensors", tensors)
    with pytest.raises(InputError, match="multiple of 16"):
        from_torch.open_part("dit", file, config, recipe="nvfp4_w4a4")
