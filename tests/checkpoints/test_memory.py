"""Converting takes the memory of a group of tensors, however large the model."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from longlive_jax.checkpoints import safetensors
from tests.checkpoints import torch_file

LAYERS, SIDE = 64, 1024  # 64 layers of 2 x 4 MB: 512 MB stacked
ROOT = pathlib.Path(__file__).parents[2]

_PROGRAM = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
from longlive_jax import params
from longlive_jax.checkpoints import from_torch, parts, store, to_torch

LAYERS, SIDE = {layers}, {side}


def spec(cfg):
    weight = params.ParamSpec((SIDE, SIDE), (None, None))
    layer = {{"ffn": {{"0": {{"weight": weight}}, "2": {{"weight": weight}}}}}}
    return {{"blocks": params.stack(layer, LAYERS)}}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


from longlive_jax import config
import dataclasses
parts.PARTS["dit"] = dataclasses.replace(parts.PARTS["dit"], spec=spec)
config = config.Config()
start = peak()
source = from_torch.open_part("dit", sys.argv[1], config)
store.save(sys.argv[2], "dit", source.pieces(), source.spec, section=source.section)
saved = peak()
to_torch.export_store(sys.argv[2], "dit", sys.argv[3])
print(saved - start, peak() - start)
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(SIDE, SIDE)).astype(np.float32)
    names = [f"blocks.{i}.ffn.{j}.weight" for i in range(LAYERS) for j in (0, 2)]
    file = tmp_path / "f.safetensors"
    entries = {k: (base.shape, base.dtype) for k in names}
    safetensors.write(file, entries, ((k, base + np.float32(i)) for i, k in enumerate(names)))
    program = _PROGRAM.format(layers=LAYERS, side=SIDE)
    run = subprocess.run(
        [sys.executable, "-c", program, file, tmp_path / "ckpt", tmp_path / "back"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    saved, exported = map(float, run.stdout.split())
    stacked = LAYERS * SIDE * SIDE * 4 / 2**20
    assert saved < 200 < stacked, f"{saved:.0f} MB to save what is {2 * stacked:.0f} MB"
    assert exported < 250, f"{exported:.0f} MB to export"
    back, _ = safetensors.read(tmp_path / "back")
    for i, name in ((0, names[0]), (101, names[101])):
        np.testing.assert_array_equal(back[name].read(), base + np.float32(i))


def test_opening_a_large_file_reads_none_of_it(tmp_path):
    """A sparse file of 1 TB is opened as fast as a small one."""
    file = tmp_path / "f.pt"
    torch_file.save(file, {"w": np.zeros((4, 4), np.float32)})
    sparse = tmp_path / "sparse.safetensors"
    side = 1 << 19
    header = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % (
        side,
        side,
        4 * side**2,
    )
    sparse.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(sparse, 8 + len(header) + 4 * side**2)
    tensor = safetensors.read(sparse)[0]["w"]
    assert not tensor.read(side - 2, side).any()
