"""The device mesh: its axes, which array axis goes to which mesh axis, multi-host start.

Axis names of arrays are logical ("embed", "heads", "batch"); `RULES` below is the only place that
maps them to mesh axes. A mesh of one device is the same code as a mesh of many.
"""

import contextlib
import functools
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError

AXES = ("data", "fsdp", "seq")
SEQ = "seq"  # the axis that shards a chunk's frames, the cache's heads, the VAE's width

# Logical axis -> mesh axes. An axis that is absent here is never sharded.
RULES = {
    "batch": ("data", "fsdp"),
    "chunk": "seq",  # training: whole chunks
    "frame": "seq",  # sampling: the frames of the chunk being denoised
    "heads": "seq",  # of the KV cache
    "width": "seq",  # of the VAE's pictures
    "embed": ("fsdp", "seq"),  # of parameters in training, with their optimiser state and EMA
}
# A sampler reads each weight five times a chunk and never writes it: each device has a whole copy,
# unless `fsdp` saves memory.
SAMPLING_RULES = RULES | {"embed": "fsdp"}

# When a process has sent no heartbeat for so long, all others end. Threads of their own send them,
# whatever Python does; a network may be away for some tens of seconds.
HEARTBEAT_SECONDS = 60
# So long a process waits for all others to start: hosts get their images and their turn minutes
# apart, and one that gives up ends all.
JOIN_SECONDS = 900
_ANSWER_SECONDS = 30  # after that, until a process that has not learned who is missing ends, too


def make_mesh(
    config: config_lib.Mesh,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> jax.sharding.Mesh:
    """A mesh with axes `AXES` over the first `config.size` of `devices` (default: all of JAX's).

    Raises:
      InputError: there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < config.size:
        raise InputError(
            f"config: mesh data={config.data} x fsdp={config.fsdp} x seq={config.seq} needs "
            f"{config.size} devices, {len(devices)} found; lower one of them, or on a CPU set "
            f"JAX_NUM_CPU_DEVICES={config.size}"
        )
    shape, devices = (config.data, config.fsdp, config.seq), devices[: config.size]
    if devices[0].platform == "tpu":  # neighbours on the mesh are neighbours in the torus
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(axes: Sequence[str | None], rules: dict = RULES) -> P:
    """The PartitionSpec of an array whose axes have these logical names."""
    return P(*(rules.get(name) for name in axes))


def sharding(
    mesh: jax.sharding.Mesh, axes: Sequence[str | None], rules: dict = RULES
) -> NamedSharding:
    """The NamedSharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, spec(axes, rules))


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of a multi-host run; call it before any other JAX call.

    Without arguments JAX detects the cluster (SLURM, Kubernetes, TPU, MPI); if there is none, the
    process runs alone. If a process dies, or does not come within JOIN_SECONDS, JAX ends the others
    with a message that names it.
    """
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise InputError("--num_processes and --process_id need --coordinator=HOST:PORT")
    if coordinator is not None and (num_processes is None or process_id is None):
        raise InputError("--coordinator needs --num_processes=N and --process_id=I too")
    with _missing_are_named():
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=JOIN_SECONDS + _ANSWER_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except ValueError:
            if coordinator is not None:
                raise
            return  # JAX found no cluster to ask for a coordinator


@contextlib.contextmanager
def _missing_are_named() -> Iterator[None]:
    """Processes that do not come in the meantime are named before JAX ends this one.

    Process 0 knows who has come, and would wait for the others for an hour, while they give up. It
    is to give up first, so that they learn it. When it is missing itself, a timer says so.
    """
    of_jax: Any = distributed
    library, make = getattr(of_jax, "_jax", None), "get_distributed_runtime_service"
    late = threading.Timer(JOIN_SECONDS + _ANSWER_SECONDS / 2, _name_the_first)
    late.daemon = True
    late.start()
    if hasattr(library, make):  # private: with another JAX, process 0 names nobody
        service = functools.partial(getattr(library, make), cluster_register_timeout=JOIN_SECONDS)
        of_jax._jax = types.SimpleNamespace(**vars(library) | {make: service})
    try:
        yield
    finally:
        if hasattr(library, make):
            of_jax._jax = library
        late.cancel()


def _name_the_first() -> None:
    address = distributed.global_state.coordinator_address or ""
    host, _, port = address.rpartition(":")
    found = "does not answer; look whether it was started"
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), 5):
        found = "answers, but has not met all others; look whether they were started"
    print(
        f"error: process 0 ({address}) {found}, and start all processes again",
        file=sys.stderr, flush=True,
    )  # fmt: skip
