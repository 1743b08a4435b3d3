"""The table of recipes."""

import pytest

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.errors import InputError
from longlive_jax.models import dit


def test_the_table_names_all_matrices_of_a_block():
    model = config_lib.Model()
    blocks = params_lib.flatten(dit.spec(model)["blocks"])
    paths = {".".join(path[:-1]) for path in blocks if len(blocks[path].shape) == 3} - {""}
    assert paths == set(recipe_lib.LINEARS)
    assert model.num_layers * sum(recipe_lib.LINEARS.values()) == 300


def test_recipes_are_data():
    assert recipe_lib.get("bf16") is None
    names = ["fp8", "fp8_train", "nvfp4_ar", "nvfp4_dmd", "nvfp4_w4a4", "nvfp4_te"]
    assert len({recipe_lib.get(name) for name in names}) == len(names)
    ours = recipe_lib.get("nvfp4_ar").at("cross_attn.kv")
    assert (ours.parts, ours.weight.rule, ours.activation.rule) == (2, "static_6", "mse")


def test_an_unknown_recipe_is_refused_with_the_names():
    with pytest.raises(InputError, match=r"'nvfp8'.*bf16, fp8, fp8_train, nvfp4_ar"):
        recipe_lib.get("nvfp8")
