"""Every layout and naming that weights come in, ends as the same tree; anything else is refused."""

import dataclasses
import math
import re

import ml_dtypes
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import from_torch, layout
from longlive_jax.checkpoints.tensor import FileTensor
from longlive_jax.errors import InputError
from longlive_jax.models import dit, umt5, vae
from tests.checkpoints import tiny, torch_file


def tree(source):
    """Our arrays of an opened part, by path."""
    result = {}
    for path, start, array in source.pieces():
        result.setdefault("/".join(path), []).append((start, array))
    return {
        k: np.concatenate([a for _, a in sorted(v, key=lambda x: x[0])]) for k, v in result.items()
    }


def check(source, part, only=None):
    found = tree(source)
    expected = {k: v for k, v in tiny.ours(part).items() if only is None or k.split("/")[0] in only}
    assert sorted(found) == sorted(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array, err_msg=key)


# The released sizes, without any array.


@pytest.mark.parametrize(
    ("spec", "tensors", "parameters"),
    [
        (dit.spec(config_lib.Model()), 825, 4_999_787_712),
        (vae.spec(config_lib.VAE()), 196, 704_688_668),
        (umt5.spec(config_lib.UMT5()), 242, 5_680_910_336),
    ],
    ids=["dit", "vae", "umt5"],
)
def test_shapes_at_full_size(spec, tensors, parameters):
    shapes = layout.torch_shapes(spec)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == params_lib.count(spec) == parameters


@pytest.mark.parametrize(
    ("spec", "key", "shape"),
    [
        (dit.spec(config_lib.Model()), "patch_embedding.weight", (3072, 48, 1, 2, 2)),
        (dit.spec(config_lib.Model()), "time_embedding.0.weight", (3072, 256)),
        (dit.spec(config_lib.Model()), "time_projection.1.weight", (18432, 3072)),
        (dit.spec(config_lib.Model()), "head.modulation", (1, 2, 3072)),
        (dit.spec(config_lib.Model()), "head.head.weight", (192, 3072)),
        (dit.spec(config_lib.Model()), "blocks.29.modulation", (1, 6, 3072)),
        (dit.spec(config_lib.Model()), "blocks.29.self_attn.v.bias", (3072,)),
        (dit.spec(config_lib.Model()), "blocks.29.cross_attn.k.weight", (3072, 3072)),
        (dit.spec(config_lib.Model()), "blocks.29.ffn.2.weight", (3072, 14336)),
        (vae.spec(config_lib.VAE()), "encoder.middle.1.norm.gamma", (640, 1, 1)),
        (vae.spec(config_lib.VAE()), "decoder.middle.1.to_qkv.weight", (3072, 1024, 1, 1)),
        (vae.spec(config_lib.VAE()), "decoder.head.0.gamma", (256, 1, 1, 1)),
        (vae.spec(config_lib.VAE()), "decoder.upsamples.1.upsamples.3.time_conv.bias", (2048,)),
        (umt5.spec(config_lib.UMT5()), "token_embedding.weight", (256384, 4096)),
        (umt5.spec(config_lib.UMT5()), "blocks.23.pos_embedding.embedding.weight", (32, 64)),
        (umt5.spec(config_lib.UMT5()), "blocks.23.ffn.gate.0.weight", (10240, 4096)),
    ],
)
def test_some_shapes_at_full_size(spec, key, shape):
    assert layout.torch_shapes(spec)[key] == shape


@pytest.mark.parametrize("part", tiny.SPECS)
def test_shapes_are_the_golden_ones(part):
    assert layout.torch_shapes(tiny.spec(part)) == {
        k: v.shape for k, v in tiny.weights(part).items()
    }


# Layouts.


def _open(part, value, tmp_path, **kwargs):
    torch_file.save(tmp_path / "weights.pt", value)
    return from_torch.open_part(part, str(tmp_path / "weights.pt"), tiny.config(), **kwargs)


def _prefixed(prefix, tensors):
    return {prefix + k: v for k, v in tensors.items()}


_DIT = tiny.weights("dit")
_WRONG = {k: v + 1 for k, v in _DIT.items()}
_MODEL = _prefixed("model.", _DIT)


@pytest.mark.parametrize(
    ("value", "use_ema"),
    [
        ({"generator": _MODEL, "generator_optimizer": {"state": {}}, "step": 3}, False),
        ({"generator": _MODEL, "generator_ema": _WRONG, "step": 3}, False),
        ({"generator": _WRONG, "generator_ema": _MODEL, "step": 3}, True),
        ({"generator_ema": _prefixed("_fsdp_wrapped_module.model.", _DIT)}, True),
        (
            {"generator": _MODEL, "critic": _prefixed("model.", _WRONG), "critic_optimizer": {}},
            False,
        ),
        ({"generator": _MODEL, "checkpoint_format": "longlive_generator_merged_lora"}, False),
        ({"generator": _MODEL, "checkpoint_format": "longlive_generator_merged_bf16"}, False),
        ({"model": _MODEL, "step": np.array(3)}, False),
        ({"model": _DIT}, False),
        ({"state_dict": {"model": _DIT}}, False),
        (_MODEL, False),
        (_DIT, False),
        ({**_DIT, "step": 3, "name": "x"}, False),
        (_prefixed("module.model._orig_mod.", _DIT), False),
        (
            {
                k.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): v
                for k, v in _MODEL.items()
            },
            False,
        ),
        ({k.replace(".ffn.", "._fsdp_wrapped_module.ffn."): v for k, v in _MODEL.items()}, False),
        (_prefixed("model.diffusion_model.", _DIT), False),
    ],
)
def test_layouts_of_the_transformer(tmp_path, value, use_ema):
    check(_open("dit", value, tmp_path, use_ema=use_ema), "dit")


def _diffusers(key):
    """From the original's key to diffusers', as its WanTransformer3DModel names its modules."""
    for old, new in (
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"^head\.modulation", "scale_shift_table"),
        (r"^head\.head", "proj_out"),
        (r"\.modulation$", ".scale_shift_table"),
        (r"\.norm3\.", ".norm2."),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.([qkv])\.", r".to_\1."),
        (r"\.o\.", ".to_out.0."),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
    ):
        key = re.sub(old, new, key)
    return key


def test_diffusers_folder(tmp_path):
    tensors = {_diffusers(k): v for k, v in _DIT.items()}
    assert "blocks.0.attn2.to_out.0.weight" in tensors
    assert "blocks.1.norm2.weight" in tensors
    folder = tmp_path / "transformer"
    folder.mkdir()
    half = len(tensors) // 2
    items = list(tensors.items())
    tiny.write_safetensors(folder / "diffusion_pytorch_model-00001.safetensors", dict(items[:half]))
    tiny.write_safetensors(folder / "diffusion_pytorch_model-00002.safetensors", dict(items[half:]))
    (folder / "config.json").write_text("{}")
    check(from_torch.open_part("dit", str(tmp_path), tiny.config()), "dit")


def _light(key):
    """From the original's VAE key to the diffusers-like one of the LightVAE files."""
    key = re.sub(r"^conv1\.", "quant_conv.", key)
    key = re.sub(r"^conv2\.", "post_quant_conv.", key)
    key = re.sub(r"^(..coder)\.conv1\.", r"\1.conv_in.", key)
    key = re.sub(r"\.head\.0\.", ".norm_out.", key)
    key = re.sub(r"\.head\.2\.", ".conv_out.", key)
    for i, name in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
        key = key.replace(f".middle.{i}.", f".mid_block.{name}.")
    key = re.sub(r"\.downsamples\.(\d)\.downsamples\.2\.", r".down_blocks.\1.downsampler.", key)
    key = re.sub(r"\.upsamples\.(\d)\.upsamples\.3\.", r".up_blocks.\1.upsampler.", key)
    key = re.sub(r"\.downsamples\.(\d)\.downsamples\.", r".down_blocks.\1.resnets.", key)
    key = re.sub(r"\.upsamples\.(\d)\.upsamples\.", r".up_blocks.\1.resnets.", key)
    # The last stage of the encoder has no third block, the last of the decoder no fourth.
    for i, name in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
        key = key.replace(f".residual.{i}.", f".{name}.")
    return key.replace(".shortcut.", ".conv_shortcut.")


_VAE = tiny.weights("vae")
_HEADS = {"dynamic_feature_projection_heads.0.weight": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    "value",
    [
        _VAE,
        {_light(k): v for k, v in _VAE.items()},
        {"state_dict": {"gen_model": {_light(k): v for k, v in _VAE.items()} | _HEADS}},
        {"gen_model": {"generator": _VAE | _HEADS}, "step": 3},
        {"generator": _prefixed("module.", _VAE)},
    ],
)
def test_layouts_of_the_vae(tmp_path, value):
    check(_open("vae", value, tmp_path), "vae")


@pytest.mark.parametrize("conv1", [True, False])
def test_vae_decoder_alone(tmp_path, conv1):
    only = {"decoder", "conv2"} | ({"conv1"} if conv1 else set())
    value = {k: v for k, v in _VAE.items() if k.split(".")[0] in only}
    check(_open("vae", value, tmp_path), "vae", only)


def _hugging_face(key):
    key = re.sub(r"^token_embedding", "shared", key)
    key = re.sub(r"^norm\.", "encoder.final_layer_norm.", key)
    for old, new in (
        ("norm1", "layer.0.layer_norm"),
        ("attn", "layer.0.SelfAttention"),
        ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
        ("norm2", "layer.1.layer_norm"),
        ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
        ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
        ("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ):
        key = re.sub(rf"^blocks\.(\d+)\.{re.escape(old)}\.", rf"encoder.block.\1.{new}.", key)
    return key


_UMT5 = tiny.weights("umt5")


@pytest.mark.parametrize(
    "value",
    [
        _UMT5,
        {_hugging_face(k): v for k, v in _UMT5.items()}
        | {"encoder.embed_tokens.weight": _UMT5["token_embedding.weight"]}
        | {"decoder.final_layer_norm.weight": np.ones(3, np.float32)}
        | {"lm_head.weight": np.ones((3, 3), np.float32)},
    ],
)
def test_layouts_of_the_text_encoder(tmp_path, value):
    check(_open("umt5", value, tmp_path), "umt5")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtype_is_kept(tmp_path, dtype):
    value = {k: v.astype(dtype) for k, v in _UMT5.items()}
    found = tree(_open("umt5", value, tmp_path))
    for key, array in tiny.ours("umt5").items():
        assert found[key].dtype == dtype
        np.testing.assert_array_equal(found[key], array.astype(dtype))


def test_mixed_dtypes_are_held_exactly(tmp_path):
    """Layers of one stacked array must have one dtype: the one that holds them all."""
    value = {k: v.astype(ml_dtypes.bfloat16) for k, v in _UMT5.items()}
    value["blocks.1.norm1.weight"] = _UMT5["blocks.1.norm1.weight"]
    found = tree(_open("umt5", value, tmp_path))
    assert found["blocks/norm1/weight"].dtype == np.float32
    np.testing.assert_array_equal(found["blocks/norm1/weight"][1], value["blocks.1.norm1.weight"])
    assert found["blocks/norm2/weight"].dtype == ml_dtypes.bfloat16


def test_large_tables_come_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(from_torch, "_ROWS_BYTES", 1000)
    source = _open("umt5", _UMT5, tmp_path)
    sizes = [len(a) for path, _, a in source.pieces() if path[0] == "token_embedding"]
    assert sizes == [3] * 33 + [1]
    check(source, "umt5")


# What is refused.


def _refused(part, value, tmp_path, **kwargs):
    with pytest.raises(InputError) as error:
        _open(part, value, tmp_path, **kwargs)
    return str(error.value)


def test_missing_extra_and_misshaped_weights_in_one_message(tmp_path):
    value = dict(_DIT)
    for i in range(2):
        for name in ("norm_q", "norm_k"):
            for attn in ("self_attn", "cross_attn"):
                del value[f"blocks.{i}.{attn}.{name}.weight"]
    value["img_emb.proj.0.weight"] = np.ones(5, np.float32)
    value["head.head.bias"] = np.ones(17, np.float32)
    message = _refused("dit", value, tmp_path)
    assert "of 69 weights, 8 missing (blocks.0.self_attn.norm_k.weight (48,)," in message
    assert message.count("norm_") == 5
    assert "1 not expected (img_emb.proj.0.weight (5,))" in message
    assert "1 of another shape (head.head.bias: expected (16,), found (17,))" in message
    assert "Is it the right file for --dit?" in message


@pytest.mark.parametrize("part", tiny.SPECS)
def test_the_message_names_the_overrides_that_fit(tmp_path, part):
    """The golden file against the config of configs/tiny.py, corrected as the message says."""
    from configs import tiny as tiny_config

    file = tiny.write_safetensors(tmp_path / "f.safetensors", tiny.weights(part))
    values = tiny_config.get_config()
    if part == "vae":
        values.vae.dec_dim = 16
    with pytest.raises(InputError) as error:
        from_torch.open_part(part, file, config_lib.from_config_dict(values))
    assert "The file fits with" in str(error.value)
    section = tiny.SECTIONS[part]
    flags = re.findall(rf"--config\.{section}\.(\w+)=(\d+)", str(error.value))
    assert flags
    for name, value in flags:
        values[section][name] = int(value)
    values.model.num_heads = 4 if part == "dit" else values.model.num_heads  # no shape tells it
    check(from_torch.open_part(part, file, config_lib.from_config_dict(values)), part)


def test_light_vae_message(tmp_path):
    """A LightVAE has the config's encoder, or one of its own, and a narrower decoder."""
    config = config_lib.Config()
    shapes = layout.torch_shapes(vae.spec(dataclasses.replace(config.vae, dim=80, dec_dim=128)))
    for keys, flags in (
        (shapes, "--config.vae.dim=80 --config.vae.dec_dim=128"),
        ([k for k in shapes if k.startswith(("decoder", "conv2"))], "--config.vae.dec_dim=128"),
    ):
        # Shapes alone: no file of this size is needed to read them.
        tensors = {k: _shape_only(shapes[k]) for k in keys}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(from_torch.sources, "read", lambda path, t=tensors: t)
            patch.setattr(from_torch.sources, "locate", lambda source, part: source)
            with pytest.raises(InputError, match=f"The file fits with {flags}$"):
                from_torch.open_part("vae", "light.pth", config)


def _shape_only(shape):
    return FileTensor("none", shape, np.dtype(np.float32), (0,) * len(shape), 0)


def test_nan_and_infinity_are_refused(tmp_path):
    for bad in (np.nan, np.inf):
        value = dict(_DIT) | {"blocks.1.ffn.0.bias": np.full(64, bad, np.float32)}
        source = _open("dit", value, tmp_path)
        with pytest.raises(
            InputError, match=r"blocks\.1\.ffn\.0\.bias: 64 of 64 values are not finite"
        ):
            list(source.pieces())


@pytest.mark.parametrize(
    ("part", "value", "kwargs", "message"),
    [
        (
            "dit",
            {"generator_lora": {"a": np.ones(3)}, "step": 1},
            {},
            "holds only a LoRA; give it as",
        ),
        ("dit", {"generator_ema": _MODEL}, {}, "add --use_ema"),
        (
            "dit",
            {"generator": _MODEL, "step": 1},
            {"use_ema": True},
            "has no generator_ema; its keys are generator, step",
        ),
        (
            "dit",
            {"generator": {}, "checkpoint_format": "longlive_generator_te_nvfp4"},
            {},
            "TransformerEngine.*model_bf16.pt",
        ),
        ("dit", {"a": 3, "b": {"c": 4}}, {}, "holds no weights of the dit; its keys are a, b"),
        ("dit", 3, {}, "holds a int, not a dict"),
        (
            "dit",
            _DIT | {"model.head.modulation": _DIT["head.modulation"]},
            {},
            "are both 'head.modulation'",
        ),
        ("umt5", _UMT5 | {"norm.weight": np.ones(64, np.int32)}, {}, "norm.weight has dtype int32"),
    ],
)
def test_refusals(tmp_path, part, value, kwargs, message):
    assert re.search(message, _refused(part, value, tmp_path, **kwargs))
