"""Adapters under PEFT's names: there and back, the original's file, and what is refused."""

import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import names, peft, safetensors
from longlive_jax.errors import InputError
from longlive_jax.models import lora
from tests.checkpoints import tiny, torch_file
from tests.checkpoints.test_lora import adapters

SETTINGS = config_lib.LoRA(rank=4, alpha=8.0)
SPECS = lora.specs(tiny.spec("dit"), SETTINGS)
# As PEFT writes them, of the original's 20 linear layers.
STATE = {
    f"{peft.PREFIX}{module}.lora_{side}.weight": t
    for module, pair in adapters().items()
    for side, t in zip("AB", pair)
}
KEY = f"{peft.PREFIX}blocks.0.self_attn.k.lora_A.weight"


def same(tree, state=STATE):
    back = peft.to_peft(tree)
    assert back.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)


def test_names_there_and_back():
    tree = peft.from_peft(STATE, SPECS)
    for path, spec in params_lib.flatten(SPECS).items():
        assert params_lib.flatten(tree)[path].shape == spec.shape
    same(tree)
    k = STATE[KEY]
    np.testing.assert_array_equal(tree["blocks"]["self_attn"]["qkv"]["a"][0, :, 1], k.T)
    b = STATE[f"{peft.PREFIX}blocks.1.cross_attn.v.lora_B.weight"]
    np.testing.assert_array_equal(tree["blocks"]["cross_attn"]["kv"]["b"][1, 1], b.T)


@pytest.mark.parametrize("network", [names.GENERATOR, names.CRITIC])
def test_files_there_and_back(tmp_path, network):
    file = str(tmp_path / "adapters.safetensors")
    peft.save(file, peft.from_peft(STATE, SPECS), SETTINGS, network)
    tensors, header = safetensors.read(file)
    assert tensors.keys() == STATE.keys() and header["lora_alpha"] == "8"
    same(peft.from_file(file, SPECS, SETTINGS, network))
    other = {names.GENERATOR: names.CRITIC, names.CRITIC: names.GENERATOR}[network]
    with pytest.raises(
        InputError, match=f"the adapters of the {network}, not those of the {other}"
    ):
        peft.from_file(file, SPECS, SETTINGS, other)
    with pytest.raises(InputError, match=r"self_attn.q is 8, distill.lora.alpha is 4; .*alpha=8"):
        peft.from_file(file, SPECS, config_lib.LoRA(rank=4, alpha=4.0), network)


def test_the_originals_file_has_both_networks(tmp_path):
    file, critic = str(tmp_path / "model.pt"), {k: 2 * v for k, v in STATE.items()}
    torch_file.save(file, {"generator_lora": STATE, "critic_lora": critic, "step": 5})
    same(peft.from_file(file, SPECS, SETTINGS))
    same(peft.from_file(file, SPECS, SETTINGS, names.CRITIC), critic)
    torch_file.save(file, {"critic_lora": critic, "step": 5})
    with pytest.raises(InputError, match="holds the adapters of the critic, not those of the gen"):
        peft.from_file(file, SPECS, SETTINGS)


def _without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (_without(STATE, KEY), rf"has no {KEY}, expected \(4, 48\)"),
        (STATE | {KEY: STATE[KEY][:2]}, rf"{KEY} has rank 2, expected 4; set .*lora.rank=2"),
        (STATE | {KEY: STATE[KEY][:, :40]}, rf"{KEY} is \(4, 40\), expected \(4, 48\)"),
        (STATE | {KEY: STATE[KEY][0]}, rf"{KEY} is \(48,\), expected \(4, 48\)"),
        (STATE | {KEY: np.full_like(STATE[KEY], np.nan)}, rf"{KEY}: 192 of 192 values are not fin"),
        (STATE | {KEY: STATE[KEY].astype(np.int32)}, "is int32; adapters are floats"),
        (
            STATE | {KEY.replace("blocks.0", "blocks.7"): STATE[KEY]},
            r"adapts 'blocks.7.self_attn.k'; the network has no adapter there. .* self_attn.q, se",
        ),
        (
            STATE | {KEY.replace("lora_A.weight", "diff"): STATE[KEY]},
            "adapts 'blocks.0.self_attn.k'; the network has no differences",
        ),
        ({"x.weight": STATE[KEY]}, "holds no LoRA"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(state, words):
    with pytest.raises(InputError, match=words):
        peft.from_peft(state, SPECS)
