"""The UMT5 encoder against the original's numbers, its own definition and its full size."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import umt5

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "umt5_tiny.npz"


@pytest.fixture(scope="module")
def golden():
    """(arrays, config, parameters) of the original at tiny size."""
    arrays = dict(np.load(GOLDEN))
    values = json.loads(str(arrays["config"]))
    assert values.pop("shared_pos") is False
    cfg = config_lib.UMT5(**values)

    def one(path, spec):
        def read(name):
            value = arrays[f"weights/{name}"]
            return value.T if is_linear else value

        is_linear = {"attn", "ffn"} & set(path)
        name = ".".join(path)
        if path[0] == "blocks":
            rest = name.removeprefix("blocks.")
            value = np.stack([read(f"blocks.{i}.{rest}") for i in range(cfg.num_layers)])
        else:
            value = read(name)
        assert value.shape == spec.shape, path
        return jnp.asarray(value)

    leaves = params_lib.flatten(umt5.spec(cfg))
    params = params_lib.unflatten({path: one(path, spec) for path, spec in leaves.items()})
    return arrays, cfg, params


def test_matches_the_original(golden):
    arrays, cfg, params = golden
    ids, mask = arrays["ids"], arrays["mask"]
    hidden = umt5.encode(params, cfg, ids, mask, jnp.float32)
    valid = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[valid], arrays["hidden"][valid], atol=1e-4)
    assert np.isfinite(hidden).all()
    embeds = umt5.prompt_embeddings(params, cfg, ids, mask, ids.shape[1], jnp.float32)
    np.testing.assert_allclose(embeds, arrays["prompt_embeds"], atol=1e-4)


def test_bfloat16_is_near_float32(golden):
    arrays, cfg, params = golden
    ids, mask = arrays["ids"], arrays["mask"]
    out = umt5.prompt_embeddings(params, cfg, ids, mask, 40, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - arrays["prompt_embeds"]
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(arrays["prompt_embeds"])


def test_padding_length_does_not_matter(golden):
    arrays, cfg, params = golden
    ids, mask = arrays["ids"][1:], arrays["mask"][1:]
    short = umt5.prompt_embeddings(params, cfg, ids[:, :29], mask[:, :29], 64, jnp.float32)
    # What stands in the padding does not matter either.
    wide = np.pad(ids, ((0, 0), (0, 24)), constant_values=7)
    wide_mask = np.pad(mask, ((0, 0), (0, 24)))
    long = umt5.prompt_embeddings(params, cfg, wide, wide_mask, 64, jnp.float32)
    np.testing.assert_allclose(short, long, atol=1e-5)
    assert short.shape == (2, 64, cfg.dim)
    assert not np.asarray(short)[1, 5:].any()


def test_encode_prompts(golden, monkeypatch):
    """Any order, any lengths, repeated prompts: the golden rows, each encoded once."""
    arrays, cfg, params = golden
    seen = []
    compiled = umt5.encode_program

    def counted(params, ids, mask, **static):
        seen.append(ids.shape)
        return compiled(params, ids, mask, **static)

    monkeypatch.setattr(umt5, "encode_program", counted)
    order = [2, 0, 2, 1, 0, 2]
    out = umt5.encode_prompts(
        params, cfg, arrays["ids"][order], arrays["mask"][order], 40, jnp.float32
    )
    np.testing.assert_allclose(out, arrays["prompt_embeds"][order], atol=1e-4)
    assert sorted(seen) == [(1, 32), (1, 32), (1, 40)]
    assert out.dtype == np.float32


def test_encode_prompts_in_bounded_batches(golden, monkeypatch):
    _, cfg, params = golden
    shapes = []

    def fake(params, ids, mask, *, cfg, text_len, dtype):
        shapes.append(ids.shape)
        return np.broadcast_to(ids[:, :1, None].astype(dtype), (len(ids), text_len, cfg.dim))

    monkeypatch.setattr(umt5, "encode_program", fake)
    lengths = [1, 32, 33, 64, 65, 128, 129, 256, 257, 400] * 5
    ids = np.zeros((50, 512), np.int32)
    ids[:, 0] = np.arange(50)
    mask = (np.arange(512)[None] < np.asarray(lengths)[:, None]).astype(np.int32)
    out = umt5.encode_prompts(params, cfg, ids, mask, 400, jnp.float32)
    assert {t for _, t in shapes} == {32, 64, 128, 256, 400}
    assert {b for b, _ in shapes} == {1, 8}
    assert sum(b for b, _ in shapes) == 50
    np.testing.assert_array_equal(out[:, 0, 0], np.arange(50))
    assert umt5.encode_prompts(params, cfg, ids[:0], mask[:0], 400).shape == (0, 400, cfg.dim)


def test_bad_input_is_refused(golden):
    arrays, cfg, params = golden
    ids, mask = arrays["ids"], arrays["mask"]
    with pytest.raises(InputError, match=r"prompt 1 has 40 tokens.*text_len=39"):
        umt5.encode_prompts(params, cfg, ids, mask, 39, jnp.float32)
    with pytest.raises(InputError, match=r"token id 100 .*= 99"):
        umt5.encode_prompts(params, cfg, np.where(ids == 1, 100, ids), mask, 40, jnp.float32)
    broken = jax.tree.map(lambda x: x, params)
    broken["norm"] = {"weight": params["norm"]["weight"] * jnp.nan}
    with pytest.raises(InputError, match="prompt 1 of 3 is not finite"):
        umt5.encode_prompts(broken, cfg, ids, mask, 40, jnp.float32)


def test_bucket_thresholds():
    # The original's, for 32 buckets and distances up to 128.
    assert umt5.bucket_starts(32).tolist() == [*range(9), 12, 16, 23, 32, 46, 64, 91]


@pytest.mark.parametrize("num_buckets", [4, 6, 8, 14, 16, 32, 64, 128, 508])
def test_buckets_follow_the_logarithm(num_buckets):
    half = num_buckets // 2
    exact = half // 2
    table = umt5.relative_buckets(512, num_buckets)
    assert table.dtype == np.int32 and table.min() == 0 and table.max() < num_buckets
    for d in range(512):
        if d < exact:
            want = d
        else:
            position = math.log(d / exact) / math.log(128 / exact) * (half - exact)
            if abs(position - round(position)) < 1e-9:
                continue  # a tie: rounding decides in floating point
            want = min(half - 1, exact + math.floor(position))
        assert table[511, 511 - d] == want
        assert table[0, d] == (want + half if d else 0)


def test_too_many_buckets_are_refused():
    with pytest.raises(InputError, match=r"num_buckets=512 .* below 512"):
        umt5.bucket_starts(512)


def test_full_size():
    """UMT5-XXL: 242 tensors of the original, 5,680,910,336 parameters, and it traces."""
    cfg = config_lib.UMT5()
    specs = umt5.spec(cfg)
    assert params_lib.count(specs) == 5_680_910_336
    leaves = params_lib.flatten(specs)
    per_layer = [path for path in leaves if path[0] == "blocks"]
    assert len(per_layer) == 10 and len(leaves) == 12
    assert len(per_layer) * cfg.num_layers + 2 == 242
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    out = jax.eval_shape(
        lambda p, i, m: umt5.encode(p, cfg, i, m, jnp.bfloat16),
        params_lib.abstract(specs),
        ids,
        ids,
    )
    assert (out.shape, out.dtype) == ((2, 512, 4096), jnp.bfloat16)


def test_logical_axes():
    cfg = config_lib.UMT5()
    for path, spec in params_lib.flatten(umt5.spec(cfg)).items():
        body = spec.axes[1:] if path[0] == "blocks" else spec.axes
        assert (spec.axes[0] == "layer") == (path[0] == "blocks")
        matrix = len(body) == 2 and path[1] != "pos_embedding"
        assert body.count("embed") == (1 if matrix else 0), path
        if matrix:
            shape = spec.shape[-2:]
            assert shape[body.index("embed")] == cfg.dim


@pytest.mark.slow
def test_initial_values_give_useful_numbers():
    cfg = config_lib.UMT5(
        vocab_size=50, dim=32, dim_attn=48, dim_ffn=64, num_heads=4, num_layers=2, num_buckets=8
    )
    params = params_lib.init(umt5.spec(cfg), jax.random.key(0))
    ids = np.arange(20, dtype=np.int32).reshape(2, 10)
    out = np.asarray(umt5.encode(params, cfg, ids, np.ones_like(ids), jnp.float32))
    assert out.shape == (2, 10, 32)
    np.testing.assert_allclose((out**2).mean(-1), 1.0, rtol=1e-3)  # the last norm
    # A row that sees nothing stays finite.
    assert np.isfinite(umt5.encode(params, cfg, ids, np.zeros_like(ids), jnp.float32)).all()


def test_runs_on_an_explicit_mesh(golden):
    """Parameters whole on every device of an explicitly sharded mesh, as a sampler has them."""
    arrays, cfg, params = golden
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, seq=2))
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, mesh_lib.sharding(mesh, ()))
        ids, mask = arrays["ids"][[0, 1, 2, 0]], arrays["mask"][[0, 1, 2, 0]]
        out = umt5.encode_prompts(whole, cfg, ids, mask, 40, jnp.float32)
    np.testing.assert_allclose(out, arrays["prompt_embeds"][[0, 1, 2, 0]], atol=1e-4)
