"""A server that keeps the latents of its chunks: python -m tests.serving.kept FOLDER"""

import os
import pathlib
import signal
import sys

import numpy as np

from longlive_jax.serving.limits import Limits
from tests.serving import running
from tests.serving.running import until


class Kept(running.Running):
    """Writes FOLDER/latents/STREAM-CHUNK-PROCESS.npy; each is whole, or not there."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder / "latents"
        self._folder.mkdir(exist_ok=True)
        super().__init__(running.shipped(steps=(2,)), folder / "out", Limits())

    def _observe(self, stream, chunk):
        path = self._folder / f"{stream.id}-{chunk.index}-{os.getpid()}.npy"
        with open(path.with_suffix(".part"), "wb") as file:
            np.save(file, np.asarray(chunk.latents))
        path.with_suffix(".part").rename(path)


def main(folder):
    server = Kept(pathlib.Path(folder))
    until(lambda: server.ask("/readyz")[0] == 200, 300)
    print(server.port, flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
