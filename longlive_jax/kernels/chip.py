"""The first checks of every kernel's `supports`: for which chip, and whether an array is local."""

import jax


def platform(x: jax.Array) -> str:
    """Of the devices that x's program is compiled for: "cpu", "gpu" or "tpu".

    Those of x's mesh, which a machine may compile for without having them; without a mesh JAX's
    default ones. x may be any shape and dtype, or a `jax.ShapeDtypeStruct`.
    """
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    if device is None:
        return jax.default_backend()
    # jax 0.11 knows its kind alone.
    return getattr(device, "platform", None) or (
        "tpu" if device.device_kind.startswith("TPU") else jax.default_backend()
    )


def is_hopper() -> bool:
    """Whether JAX computes on a Hopper GPU, of compute capability 9.x."""
    if jax.default_backend() != "gpu":
        return False
    # Not every GPU says what it is: AMD's have no such number.
    return str(getattr(jax.local_devices()[0], "compute_capability", None)).startswith("9.")


def is_local(x: jax.Array) -> bool:
    """Whether x is on one device: of no mesh, or inside a manual `jax.shard_map`.

    A kernel is compiled for one device and cannot be partitioned. x may be any shape and dtype, or
    a `jax.ShapeDtypeStruct`.
    """
    mesh = jax.typeof(x).sharding.mesh
    return mesh.empty or mesh.are_all_axes_manual


def takes(*arrays: object) -> bool:
    """Whether a kernel may run on these pytrees of arrays: all local, on a Hopper GPU."""
    return is_hopper() and all(map(is_local, jax.tree.leaves(arrays)))
