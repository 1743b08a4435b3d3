"""What the benchmarks share: random weights, clocks, figures of the devices."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training import cost


def random_params(specs, mesh, dtype, seed=0, rules=mesh_lib.SAMPLING_RULES):
    """Random weights that keep activations finite and nothing zero: zeros would run faster."""
    flat = params_lib.flatten(specs)

    def one(i, spec):
        fan_in = int(np.prod(spec.shape[1 if spec.axes[0] == "layer" else 0 : -1])) or 1
        scale = min(0.02, fan_in**-0.5)
        sharding = mesh_lib.sharding(mesh, spec.axes, rules)
        if spec.init is params_lib.ones:
            return jnp.ones(spec.shape, dtype, device=sharding)
        return _noise(spec.shape, dtype, sharding)(np.uint32(1000 * seed + i), scale)

    return params_lib.unflatten({path: one(i, s) for i, (path, s) in enumerate(flat.items())})


@functools.cache
def _noise(shape, dtype, sharding):
    """(seed, scale) -> array, uniform of standard deviation `scale`.

    A hash of each element's index (the finaliser of MurmurHash3) rather than `jax.random`, whose
    generators take XLA a second to compile, once a shape.
    """

    def make(seed, scale):
        x = jax.lax.iota(jnp.uint32, int(np.prod(shape))) + seed * np.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        x = jax.lax.bitcast_convert_type(x ^ (x >> np.uint32(16)), jnp.int32).astype(jnp.float32)
        return (x * (scale * (3**0.5 * 2.0**-31))).astype(dtype).reshape(shape)

    return jax.jit(make, out_shardings=sharding)


def seconds(call, repeats: int) -> list[float]:
    """Wall seconds of each call until its result is ready. Call it warm."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def mean_seconds(call, repeats: int) -> float:
    """Mean seconds of a call that is too short to be timed alone. Call it warm."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def device_figures() -> dict:
    """Name, count, memory peak so far and data-sheet peak of the devices."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "peak_memory_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "device_peak_tflops": cost.PEAK_TFLOPS.get(device.device_kind),
    }


def show(figures: dict) -> None:
    """Figures for people, one a line; the command prints them as JSON at its end."""
    for name, value in figures.items():
        print(f"  {name:28} {value}", flush=True)


def percentile(times, q) -> float:
    return float(np.percentile(times, q))
