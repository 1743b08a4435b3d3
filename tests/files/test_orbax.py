"""Orbax in folders of any name."""

import numpy as np
import pytest

from longlive_jax.files.orbax import ocp

NAMES = ["run[lr=1e-5]", "a*b", "what?", "[!a]", "[", "**", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_found_again(tmp_path, name):
    folder = tmp_path / name / "1"
    ocp.save(str(folder), {"net": {"w": np.arange(3.0)}})
    (there,) = ocp.metadata(str(folder)).metadata["net"].values()
    assert there.shape == (3,)
    assert np.array_equal(ocp.load(str(folder))["net"]["w"], [0, 1, 2])


def test_a_runs_newest_state(tmp_path):
    folder = tmp_path / "run[lr=1e-5]"
    for step in (1, 2):
        with ocp.training.Checkpointer(str(folder), cleanup_tmp_directories=True) as saved:
            saved.save(step, {"w": np.full(3, step)})
    with ocp.training.Checkpointer(str(folder)) as saved:
        assert saved.latest.step == 2
        assert saved.load(2)["w"][0] == 2
