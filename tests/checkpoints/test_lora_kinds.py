"""LoRAs as trainers publish them: names, scales, whole differences; and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.checkpoints import lora, safetensors
from longlive_jax.errors import InputError

MODULES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "head.head")
DIFFUSERS = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn2.to_out.0",
    "blocks.0.ffn.net.0.proj",
    "proj_out",
)
OUT, IN, RANK = 12, 8, 4
RNG = np.random.default_rng(0)


class Held:
    """A tensor in memory that says what it is, and counts its reads."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.shape, self.dtype, self.reads = self.array.shape, self.array.dtype, 0

    def read(self, start=0, stop=None):
        self.reads += 1
        return self.array[start:stop] if self.shape else self.array


BASE = {
    f"{m}.{leaf}": Held(RNG.normal(size=shape).astype(np.float32))
    for m in MODULES
    for leaf, shape in (("weight", (OUT, IN)), ("bias", (OUT,)))
}
BASE["blocks.0.modulation"] = Held(RNG.normal(size=(1, 6, IN)).astype(np.float32))
BASE["head.modulation"] = Held(RNG.normal(size=(1, 2, IN)).astype(np.float32))
BASE["patch_embedding.weight"] = Held(RNG.normal(size=(OUT, IN)).astype(np.float32))
FACTORS = {
    m: (RNG.normal(size=(RANK, IN)).astype(np.float32), RNG.normal(size=(OUT, RANK)).astype(np.float32))
    for m in MODULES
}  # fmt: skip


def adapters(form="{}", names=MODULES, sides=("lora_A", "lora_B"), suffix=".weight"):
    return {
        f"{form.format(name)}.{side}{suffix}": Held(t)
        for name, module in zip(names, MODULES)
        for side, t in zip(sides, FACTORS[module])
    }


def merge(saved, alpha=None):
    return lora.merge(BASE, saved, alpha, "lora.file")


def scales(saved, alpha=None):
    found = merge(saved, alpha)
    result = []
    for module, (a, b) in FACTORS.items():
        change = found[f"{module}.weight"].read() - BASE[f"{module}.weight"].array
        result.append(round(float((change * (b @ a)).sum() / ((b @ a) ** 2).sum()), 3))
    return result


UNDERSCORED = [m.replace(".", "_") for m in MODULES]
DIFFUSERS_UNDERSCORED = [m.replace(".", "_") for m in DIFFUSERS]
DOWN_UP = ("lora_down", "lora_up")


@pytest.mark.parametrize("sides", [("lora_A", "lora_B"), DOWN_UP, ("lora.down", "lora.up")])
@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("{}", MODULES),
        ("diffusion_model.{}", MODULES),
        ("base_model.model.{}", MODULES),
        ("transformer.{}", DIFFUSERS),
        ("unet.{}", DIFFUSERS),
        ("lora_unet_{}", UNDERSCORED),
        ("lora_unet_{}", DIFFUSERS_UNDERSCORED),
        ("lora_transformer_{}", UNDERSCORED),
        ("lycoris_{}", UNDERSCORED),
    ],
)
def test_names(sides, form, names):
    assert scales(adapters(form, names, sides)) == [1] * 4
    alphas = {f"{form.format(n)}.alpha": Held(np.float32(2.0**i)) for i, n in enumerate(names)}
    assert scales(adapters(form, names, sides) | alphas) == [0.25, 0.5, 1, 2]


def _metadata(**fields):
    return {f"transformer.{key}": value for key, value in fields.items()}


PATTERN = {"blocks.0.self_attn.q": 8, "ffn.0": 2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_alpha": 16}, [4] * 4),
        ({"lora_alpha": "16"}, [4] * 4),
        ({"lora_alpha": " 16.0 "}, [4] * 4),
        ({"lora_alpha": '"16"'}, [4] * 4),
        ({"alpha": "1e1"}, [2.5] * 4),
        ({"network_alpha": "2"}, [0.5] * 4),
        ({"ss_network_alpha": "2", "ss_network_dim": "4"}, [0.5] * 4),
        ({"ss_network_alpha": "None"}, [1] * 4),
        ({"lora_alpha": None}, [1] * 4),
        ({"transformer.lora_alpha": 8}, [2] * 4),
        ({"diffusion_model.lora_alpha": "8"}, [2] * 4),
        ({"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2}, [2] * 4),
        ({"text_encoder.lora_alpha": 2}, [1] * 4),
        ({"transformer.lora_alpha": 8, "lora_alpha": "8"}, [2] * 4),
        ({"lora_adapter_metadata": json.dumps(_metadata(lora_alpha=8, r=4))}, [2] * 4),
        ({"lora_adapter_metadata": json.dumps({"lora_alpha": 8})}, [2] * 4),
        ({"lora_adapter_metadata": {"lora_alpha": 8}}, [2] * 4),
        ({"lora_adapter_metadata": "null"}, [1] * 4),
        ({"adapter_config": {"lora_alpha": 8, "use_rslora": False}}, [2] * 4),
        ({"adapter_config": {"lora_alpha": 8, "use_rslora": "false", "use_dora": "0"}}, [2] * 4),
        ({"adapter_config": {"lora_alpha": 8, "use_rslora": None}}, [2] * 4),
        ({"use_rslora": "False", "lora_alpha": "8"}, [2] * 4),
        ({"use_rslora": "", "lora_alpha": "8"}, [2] * 4),
        ({"adapter_config": {"lora_alpha": 4, "alpha_pattern": PATTERN}}, [2, 1, 0.5, 1]),
        ({"adapter_config": {"alpha_pattern": PATTERN}}, [2, 1, 0.5, 1]),
        ({"alpha_pattern": json.dumps(PATTERN), "alpha": "4"}, [2, 1, 0.5, 1]),
        ({"adapter_config": {"lora_alpha": 4, "alpha_pattern": {}}}, [1] * 4),
        ({"alpha_pattern": "{}", "alpha": "4"}, [1] * 4),
        ({"alpha_pattern": {r"blocks\.\d+\.ffn\.0": 8}}, [1, 1, 2, 1]),
        ({"alpha_pattern": {r".*\.self_attn\.q": 8}}, [2, 1, 1, 1]),
        ({"alpha_pattern": {r"^blocks\.1\..*": 8}}, [1, 2, 1, 1]),
        ({"alpha_pattern": {"attn.q": 8}}, [1] * 4),  # no name that ends so after a dot
        ({"alpha_pattern": {"ffn.0": 8, "blocks.0.ffn.0": 2}}, [1, 1, 2, 1]),  # the first
    ],
)
def test_alpha_in_fields(fields, expected):
    assert scales(adapters() | fields) == expected


def test_patterns_may_have_diffusers_names():
    fields = {"alpha_pattern": {"attn1.to_q": 8, "proj_out": 2}}
    assert scales(adapters("transformer.{}", DIFFUSERS) | fields) == [2, 1, 1, 0.5]


def test_the_word_on_one_layer_outweighs_the_word_on_the_file():
    fields = {"lora_alpha": 16, "alpha_pattern": {"self_attn.q": 8, "ffn.0": 8}}
    beside = {"blocks.0.ffn.0.alpha": Held(np.array([2], np.int64))}
    assert scales(adapters() | fields | beside) == [2, 4, 0.5, 4]
    assert scales(adapters() | fields | beside, alpha=4.0) == [1] * 4  # the user's own word


def test_whole_differences_and_biases():
    draw = {
        "weight": RNG.normal(size=(OUT, IN)).astype(np.float32),
        "bias": RNG.normal(size=OUT).astype(np.float32),
        "modulation": RNG.normal(size=(1, 6, IN)).astype(np.float32),
    }
    a, b = FACTORS["blocks.0.ffn.0"]
    saved = {
        "diffusion_model.blocks.0.self_attn.q.diff": Held(draw["weight"]),
        "diffusion_model.blocks.0.self_attn.q.diff_b": Held(draw["bias"]),
        "diffusion_model.blocks.0.diff_m": Held(draw["modulation"]),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": Held(a),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": Held(b),
        "diffusion_model.blocks.0.ffn.0.diff_b": Held(draw["bias"]),
        "diffusion_model.blocks.1.cross_attn.o.lora_A.weight": Held(a),
        "diffusion_model.blocks.1.cross_attn.o.lora_B.weight": Held(b),
        "diffusion_model.blocks.1.cross_attn.o.lora_B.bias": Held(draw["bias"]),
        "lora_alpha": 8,
    }
    found = merge(saved)
    change = {key: found[key].read() - BASE[key].array for key in BASE}
    expected = {key: np.zeros(BASE[key].shape) for key in BASE} | {
        "blocks.0.self_attn.q.weight": draw["weight"],
        "blocks.0.self_attn.q.bias": draw["bias"],
        "blocks.0.modulation": draw["modulation"],
        "blocks.0.ffn.0.weight": 2 * b @ a,
        "blocks.0.ffn.0.bias": draw["bias"],
        "blocks.1.cross_attn.o.weight": 2 * b @ a,
        "blocks.1.cross_attn.o.bias": 2 * draw["bias"],
    }
    for key, array in expected.items():
        np.testing.assert_allclose(change[key], array, atol=2e-6, err_msg=key)
        np.testing.assert_array_equal(found[key].read(1, 3), found[key].read()[1:3])
    alone = merge({"blocks.0.self_attn.q.diff_b": Held(draw["bias"])})
    np.testing.assert_array_equal(
        alone["blocks.0.self_attn.q.bias"].read(),
        BASE["blocks.0.self_attn.q.bias"].array + draw["bias"],
    )


def one(a=None, b=None, **more):
    own_a, own_b = FACTORS[MODULES[0]]
    key = MODULES[0]
    return {
        f"{key}.lora_A.weight": Held(own_a if a is None else a),
        f"{key}.lora_B.weight": Held(own_b if b is None else b),
    } | {f"{key}.{name}": Held(np.asarray(t)) for name, t in more.items()}


F32 = np.float32


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (one(np.zeros((0, IN), F32), np.zeros((OUT, 0), F32)), "rank 0; it must be from 1 to 12"),
        (one(np.zeros((13, IN), F32), np.zeros((OUT, 13), F32)), "rank 13; it must be from 1"),
        (one(np.zeros(IN, F32), np.zeros(OUT, F32)), "do not give"),
        (one(np.zeros((), F32)), "do not give"),
        (one(np.zeros((RANK, IN, 1), F32)), "do not give"),
        (one(np.zeros((RANK, IN), np.int8)), "is int8; adapters are floats"),
        (one(b=np.zeros((OUT, RANK), np.int64)), "is int64; adapters are floats"),
        (one(np.zeros((RANK, IN), np.bool_)), "is bool; adapters are floats"),
        (one(np.zeros((RANK, IN), np.complex64)), "is complex64; adapters are floats"),
        (one(alpha=F32(-4)), "alpha -4 at rank 4; it must be above 0"),
        (one(alpha=F32(0)), "alpha 0 at rank 4"),
        (one(alpha=F32(np.nan)), "alpha nan"),
        (one(alpha=F32(np.inf)), "alpha inf"),
        (one(alpha=F32(1e9)), r"alpha 1e\+09 at rank 4; .* at most 1024 times the rank"),
        (one(alpha=np.ones(2, F32)), "no part of a LoRA"),
        (one(alpha=np.bool_(True)), "no part of a LoRA"),
        (one() | {"lora_alpha": -1}, "alpha -1"),
        (one() | {"lora_alpha": "-1"}, "alpha -1"),
        (one() | {"lora_alpha": "nan"}, "alpha nan"),
        (one() | {"lora_alpha": "1e99"}, "alpha 1e"),
        (one() | {"lora_alpha": 10**310}, "not a number"),
        (one() | {"lora_alpha": True}, "not a number"),
        (one() | {"lora_alpha": "sixteen"}, "'sixteen', not a number"),
        (one() | {"lora_alpha": [16]}, "a list, not a number"),
        (one() | {"lora_alpha": 8, "network_alpha": "4"}, "several words on alpha"),
        (one() | {"use_rslora": True}, "rank-stabilised"),
        (one() | {"use_rslora": "True"}, "rank-stabilised"),
        (one() | {"adapter_config": {"use_dora": 1}}, "rank-stabilised"),
        (one() | {"lora_adapter_metadata": json.dumps(_metadata(use_rslora=True))}, "stabilised"),
        (one() | {"ss_network_args": '{"rs_lora": "True"}'}, "rank-stabilised"),
        (one() | {"use_rslora": "perhaps"}, "neither true nor false"),
        (one() | {"use_rslora": [0]}, "neither true nor false"),
        (one() | {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON"),
        (one() | {"lora_adapter_metadata": "[" * 100_000}, "nested too deep"),
        (one() | {"alpha_pattern": "x"}, "no object of patterns"),
        (one() | {"alpha_pattern": [1]}, "no object of patterns"),
        (one() | {"alpha_pattern": {"(a+)+$": 1}}, "is not read"),
        (one() | {"alpha_pattern": {".*" * 20 + "x": 1}}, "is not read"),
        (one() | {"alpha_pattern": {"a" * 300: 1}}, "is not read"),
        (one() | {"alpha_pattern": {"": 1}}, "is not read"),
        (one() | {"alpha_pattern": {MODULES[0]: "x"}}, "not a number"),
        (one() | {"alpha_pattern": {MODULES[0]: -2}}, "alpha -2"),
        (one(diff=np.zeros((OUT, IN + 1), F32)), r"has shape \(12, 9\), the weight \(12, 8\)"),
        (one(diff=np.zeros((OUT, IN), np.int32)), "is int32; adapters are floats"),
        (one(diff=np.full((OUT, IN), np.nan, F32)), "not finite"),
        (one(diff_b=np.zeros(OUT + 1, F32)), "has shape"),
        (one(diff_m=np.zeros(OUT, F32)), "which the weights to merge into lack"),
        (one(dora_scale=np.zeros(OUT, F32)), "no part of a LoRA"),
        (one(lora_magnitude_vector=np.zeros(OUT, F32)), "no part of a LoRA"),
        (one(hada_w1_a=np.zeros(OUT, F32)), "no part of a LoRA"),
        (one(**{"lora_A.bias": np.zeros(OUT, F32)}), "no part of a LoRA"),
        (one(**{"lora_down.weight": FACTORS[MODULES[0]][0]}), "twice, by other names"),
        (one(**{"lora_A.other.weight": FACTORS[MODULES[0]][0]}), "twice, by other names"),
        (one() | adapters("lora_unet_{}", UNDERSCORED, DOWN_UP), "twice, by other names"),
        ({f"{MODULES[0]}.lora_B.bias": Held(np.zeros(OUT, F32))}, "not its other half"),
        ({f"lora_te_{k}": v for k, v in one().items()}, "which the weights to merge into lack"),
        ({"lora_unet_blocks_9_ffn_0.lora_down.weight": Held(np.zeros((4, IN), F32)),
          "lora_unet_blocks_9_ffn_0.lora_up.weight": Held(np.zeros((OUT, 4), F32))}, "lack"),
        ({"patch_embedding.lora_B.bias": Held(np.zeros(OUT, F32)),
          "patch_embedding.lora_A.weight": Held(np.zeros((4, IN), F32)),
          "patch_embedding.lora_B.weight": Held(np.zeros((OUT, 4), F32))},
         "adapts patch_embedding.bias, which"),
    ],
)  # fmt: skip
def test_refusals(saved, message):
    with pytest.raises(InputError, match=message) as error:
        merge(saved)
    assert "lora.file" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), 1e9])
def test_the_users_alpha(alpha):
    with pytest.raises(InputError, match="--lora_alpha: blocks"):
        merge(one(), alpha)


def test_the_user_may_add_nothing():
    assert scales(adapters(), alpha=0.0) == [0] * 4


def test_nothing_large_is_read():
    """Ranks past any layer are refused by their shapes."""

    class Huge:
        dtype = np.dtype(np.float32)

        def __init__(self, *shape):
            self.shape = shape

        def read(self, *rows):
            raise AssertionError("read")

    key = MODULES[0]
    saved = {f"{key}.lora_A.weight": Huge(10**8, IN), f"{key}.lora_B.weight": Huge(OUT, 10**8)}
    with pytest.raises(InputError, match="rank 100000000"):
        merge(saved)


def test_nothing_nested_is_printed():
    bomb = ()
    for _ in range(60):
        bomb = (bomb, bomb)
    for field in ("lora_alpha", "use_rslora", "alpha_pattern"):
        with pytest.raises(InputError):
            merge(one() | {field: bomb})


def test_small_floats(tmp_path):
    """Factors of half precision, with an alpha of theirs, in a file."""
    tensors = {k: v.array.astype(ml_dtypes.bfloat16) for k, v in adapters().items()}
    tensors["blocks.0.ffn.0.alpha"] = np.array(8, np.float16)
    entries = {k: (v.shape, v.dtype) for k, v in tensors.items()}
    safetensors.write(tmp_path / "l", entries, tensors.items(), {"lora_alpha": "4"})
    read, metadata = safetensors.read(tmp_path / "l")
    assert np.allclose(scales(metadata | read), [1, 1, 2, 1], atol=0.02)
