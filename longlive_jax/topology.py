"""Devices that this machine compiles for without having them: a slice of TPUs, by libtpu alone.

XLA's compiler for GPUs asks the chip and its driver, so there is none without one: on a machine
with GPUs `launch.compile` compiles for them.
"""

import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError

FORM = "KIND:AxB or KIND:AxBxC, like v5e:4x4, v6e:2x4 or v5p:2x2x4"


def mesh(config: config_lib.Mesh, name: str | None) -> jax.sharding.Mesh:
    """`mesh.make_mesh` over such a slice, all of it; over JAX's devices if there is no name.

    Raises:
      InputError: a slice that is unknown, or of another number of chips than the mesh.
    """
    if name is None:
        return mesh_lib.make_mesh(config)
    chips = devices(name)
    if len(chips) != config.size:
        raise InputError(
            f"--topology={name}: has {len(chips)} chips, and mesh data={config.data} x "
            f"fsdp={config.fsdp} x seq={config.seq} has {config.size}; make them equal"
        )
    return mesh_lib.make_mesh(config, chips)


def devices(name: str) -> Sequence[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """The chips of a slice like v5p:2x2x4, for `mesh.make_mesh`. Call it before any computation.

    Raises:
      InputError: a name that libtpu does not know, or no libtpu.
    """
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise InputError(f"--topology={name}: must be {FORM}")
    # Or libtpu asks a cloud where it is, and is one process's alone, as chips are.
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(variable, "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except ImportError as error:
        missing = error
    except (RuntimeError, ValueError) as error:
        if not any(words in str(error) for words in ("libtpu", "not installed")):
            line = str(error).splitlines()[0]
            raise InputError(f"--topology={name}: {line}; it must be {FORM}") from error
        missing = error
    raise InputError(
        f"--topology={name}: the compiler for TPUs is missing ({missing}); pip install libtpu, of "
        "the version that pip install 'jax[tpu]' would take"
    ) from missing
