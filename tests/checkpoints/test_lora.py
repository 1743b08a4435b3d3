"""LoRA merging against float64, in every form that adapters come in."""

import json

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.checkpoints import from_torch
from longlive_jax.errors import InputError
from tests.checkpoints import tiny, torch_file
from tests.checkpoints.test_from_torch import _diffusers, tree

BASE = tiny.weights("dit")
TARGETS = [
    f"blocks.{i}.{m}"
    for i in range(2)
    for m in (
        *(f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"),
        "ffn.0",
        "ffn.2",
    )
]
RANK = 4


def adapters(seed=0):
    rng = np.random.default_rng(seed)
    result = {}
    for name in TARGETS:
        out, into = BASE[f"{name}.weight"].shape
        a = rng.normal(size=(RANK, into)).astype(np.float32)
        result[name] = (a, rng.normal(size=(out, RANK)).astype(np.float32))
    return result


def peft(pairs=None, prefix="base_model.model.", suffix=""):
    pairs = adapters() if pairs is None else pairs
    return {
        f"{prefix}{name}.lora_{side}{suffix}.weight": t
        for name, pair in pairs.items()
        for side, t in zip("AB", pair)
    }


def _merged(tmp_path, lora, alpha=None, base=BASE, dtype=np.float32, file="lora.pt"):
    torch_file.save(tmp_path / "base.pt", {k: v.astype(dtype) for k, v in base.items()})
    if file.endswith(".pt"):
        torch_file.save(tmp_path / file, lora)
    source = from_torch.open_part(
        "dit",
        str(tmp_path / "base.pt"),
        tiny.config(),
        lora_source=str(tmp_path / file),
        lora_alpha=alpha,
    )
    return source, {k: t.read() for k, t in source.tensors.items()}


def _check(found, scale, dtype=np.float32):
    for key, base in BASE.items():
        base = base.astype(dtype)
        expected = base.astype(np.float64)
        if key.removesuffix(".weight") in TARGETS and key.endswith(".weight"):
            a, b = adapters()[key.removesuffix(".weight")]
            expected = expected + scale * (b.astype(np.float64) @ a.astype(np.float64))
        assert found[key].dtype == dtype
        if dtype == np.float32:
            np.testing.assert_allclose(found[key], expected, rtol=1e-6, atol=4e-6)
        else:  # rounded once: the number nearest to the exact sum
            assert np.mean(found[key] == expected.astype(dtype)) > 0.998, key


@pytest.mark.parametrize(
    ("lora", "alpha", "scale"),
    [
        ({"generator_lora": peft(), "critic_lora": peft(), "step": 3}, None, 1),
        ({"generator_lora": peft(), "step": 3}, 2.0, 0.5),
        ({"generator_lora": peft(), "lora_alpha": 8}, None, 2),
        ({"generator_lora": peft(), "lora_alpha": 8}, 4.0, 1),
        ({"generator_lora": peft(), "adapter": {"type": "lora", "alpha": 2}}, None, 0.5),
        (peft(), None, 1),
        (peft(suffix=".default"), None, 1),
        (peft(prefix="base_model.model.model._fsdp_wrapped_module."), None, 1),
        (
            peft(prefix="diffusion_model.")
            | {f"diffusion_model.{n}.alpha": np.array(2.0) for n in TARGETS},
            None,
            0.5,
        ),
        (
            {
                k.replace("base_model.model.", "transformer."): v
                for k, v in peft(
                    {
                        _diffusers(n + ".weight").removesuffix(".weight"): p
                        for n, p in adapters().items()
                    }
                ).items()
            },
            None,
            1,
        ),
    ],
)
def test_forms_and_scales(tmp_path, lora, alpha, scale):
    _check(_merged(tmp_path, lora, alpha)[1], scale)


def test_bfloat16_is_rounded_once(tmp_path):
    _check(_merged(tmp_path, peft(), dtype=ml_dtypes.bfloat16)[1], 1, ml_dtypes.bfloat16)


def test_peft_folder(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    tiny.write_safetensors(folder / "adapter_model.safetensors", peft())
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    _check(_merged(tmp_path, None, file="lora")[1], 2)
    config.write_text(json.dumps({"r": RANK, "lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(InputError, match="rank-stabilised"):
        _merged(tmp_path, None, file="lora")


def test_fused_result(tmp_path):
    """Merged q, k and v end side by side in our fused matrix."""
    source, found = _merged(tmp_path, peft())
    fused = tree(source)["blocks/self_attn/qkv/weight"][1]
    parts = [found[f"blocks.1.self_attn.{p}.weight"].T for p in "qkv"]
    np.testing.assert_array_equal(fused, np.concatenate(parts, axis=1))


_ONE = {TARGETS[0]: adapters()[TARGETS[0]]}
_A, _B = _ONE[TARGETS[0]]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {k: v for k, v in peft().items() if "lora_B" not in k},
            "has lora_A but not its other half",
        ),
        (peft({"blocks.7.ffn.0": (_A, _B)}), r"adapts blocks\.7\.ffn\.0\.weight, which"),
        (peft({TARGETS[0]: (_A[:2], _B)}), r"lora_B \(48, 4\) x lora_A \(2, 48\) do not give"),
        (peft({TARGETS[0]: (_A * np.nan, _B)}), "lora_A of .* not finite"),
        (peft(_ONE) | {"diff.bias": _A}, "'diff.bias' is no part of a LoRA"),
        ({"generator": BASE}, "holds no LoRA"),
    ],
)
def test_refusals(tmp_path, lora, message):
    with pytest.raises(InputError, match=message):
        _merged(tmp_path, lora)
