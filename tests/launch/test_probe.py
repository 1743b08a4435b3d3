"""launch.probe: the action module by the command that other implementations are compared with."""

import numpy as np

from longlive_jax.checkpoints import safetensors
from longlive_jax.files.arrays import load_npz
from tests.launch import commands

FLAGS = [
    "--config.actions.keyboard_dim=4", "--config.actions.mouse_dim=2", "--config.actions.heads=2",
    "--config.actions.head_dim=64", "--config.actions.keyboard_embed=16",
    "--config.actions.window=6", "--config.actions.pad=12", "--config.model.dim=48",
    "--config.model.chunk_frames=3",
]  # fmt: skip


def probe(folder, arrays, mode, *flags, check=True):
    golden = commands.golden("actions_tiny")
    weights = {k.split("/")[-1]: v for k, v in golden.items() if k.startswith("weights/universal")}
    shapes = {k: (v.shape, v.dtype) for k, v in weights.items()}
    safetensors.write(folder / "W.safetensors", shapes, weights.items())
    np.savez(folder / "I.npz", **arrays)
    return commands.run(
        "probe", "actions", f"--weights={folder / 'W.safetensors'}", f"--inputs={folder / 'I.npz'}",
        f"--output={folder / 'O.npz'}", f"--mode={mode}", *(flags or FLAGS), check=check,
    )  # fmt: skip


def case(name, *keys):
    return {key: commands.golden("actions_tiny")[f"{name}/{key}"] for key in keys}


def test_a_stream_and_its_gradients(tmp_path):
    given = case("universal/causal", "x", "keyboard", "mouse", "cotangent")
    given |= case("universal/stream", "x_noisy")
    probe(tmp_path, given, "stream")
    found = load_npz(tmp_path / "O.npz", required=("out", "out_noisy"))
    expected = case("universal/causal", "out", "grad_x", "grad_keyboard", "grad_mouse")
    expected |= case("universal/stream", "out_noisy")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert np.abs(found[name] - x).max() < 1e-5 * np.abs(x).max(), name


def test_bad_input(tmp_path):
    done = commands.run("probe", "mouse", check=False)
    assert done.code == 2 and "must name a probe (actions: " in done.stderr
    given = case("universal/full", "x", "keyboard")
    done = probe(tmp_path, given, "causal", *FLAGS, "--config.actions.keyboard_dim=6", check=False)
    assert done.code == 2 and "keyboard_embed.0.weight must have shape (16, 6)" in done.stderr
    done = probe(tmp_path, given, "causal", *FLAGS, "--config.actions.wheel=6", check=False)
    assert done.code == 2 and "wheel" in done.stderr
