"""Seconds that states and datasets take on an S3 server on loopback.

    python -m tests.storage.measure [PARAMETERS]

A state of so many float32 parameters (default 7,000,000) is saved and restored, and must have the
same bits. 128 records of latents, in 8 files, are read in random order: by way of copies of the
files, as training does, and by ranges of bytes.
"""

import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoints import workdir
from longlive_jax.data import records
from longlive_jax.training.checkpoint import Checkpoints
from longlive_jax.training.plan import Plan
from longlive_jax.training.state import NetworkState, TrainState
from tests.storage import servers
from tests.training.tiny_run import equal

FILES, RECORDS, LATENTS = 8, 16, (32, 22, 40, 16)


def main() -> None:
    parameters = int(sys.argv[1]) if len(sys.argv) > 1 else 7_000_000
    with servers.s3() as server, tempfile.TemporaryDirectory() as folder:
        os.environ |= server.environment | {"LONGLIVE_CACHE_DIR": folder}
        _state(server, parameters)
        _dataset(server)


def _state(server: servers.Server, parameters: int) -> None:
    draw = np.random.default_rng(0)
    tree = {
        str(i): jnp.asarray(draw.standard_normal(parameters // 20, np.float32)) for i in range(20)
    }
    networks = {"model": NetworkState(tree, (), None)}
    state = TrainState(jnp.int32(1), networks, None, jnp.zeros((2,), jnp.int32))
    root, plan = server.path("measured"), Plan("train", steps=1, save_every=1)
    start = time.monotonic()
    states = Checkpoints(root, plan)
    states.save(1, state)
    states.close()
    print(f"{parameters:,} parameters: saved in {time.monotonic() - start:.1f} s", flush=True)
    assert workdir.whole(root) == [1]
    start = time.monotonic()
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    back = jax.block_until_ready(Checkpoints(root, plan).restore(template))
    print(
        f"restored in {time.monotonic() - start:.1f} s, equal bits: {equal(back, state)}",
        flush=True,
    )


def _dataset(server: servers.Server) -> None:
    root, draw = server.path("dataset"), np.random.default_rng(0)

    def packed():
        for i in range(RECORDS):
            yield records.pack({"name": str(i)}, draw.standard_normal(LATENTS, np.float32))

    shards = [
        records.write_shard(root / f"latents-{i:05d}.arrayrecord", packed()) for i in range(FILES)
    ]
    (root / records.MANIFEST).write_bytes(b"{}")
    order = draw.permutation(FILES * RECORDS).tolist()
    for epoch in ("first epoch, by copies", "second epoch, by copies"):
        start = time.monotonic()
        read = records.Shards(root, shards)
        for index in order:
            read.read(index)
        print(f"{epoch}: {time.monotonic() - start:.2f} s", flush=True)
    start = time.monotonic()
    for index in order:
        file, row = divmod(index, RECORDS)
        size = shards[file].bytes // RECORDS
        root.joinpath(shards[file].file).read_range(row * size, size)
    print(f"each epoch, by ranges: {time.monotonic() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
