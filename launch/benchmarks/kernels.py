"""The Pallas kernels: right or wrong, then fast or slow beside XLA and the roofline.

`kernel_entries` has the calls. On a CPU kernels run in JAX's interpreter, at the config's
sizes: give a tiny one, and heed no times there.
"""

import functools
import math

import jax
import jax.numpy as jnp

from launch.benchmarks import measure
from launch.benchmarks.kernel_entries import ENTRIES
from launch.benchmarks.kernel_entry import SQUARE, on_cpu
from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.kernels import chip
from longlive_jax.training import cost

TOGETHER = 4  # calls a program: to launch one takes as long as a short kernel


def run(cfg: config_lib.Config) -> dict:
    if not on_cpu() and not chip.is_hopper():
        capability = getattr(jax.devices()[0], "compute_capability", "")
        raise InputError(
            f"bench kernels: {jax.devices()[0].device_kind}, of capability {capability or 'none'}; "
            "kernels need a Hopper GPU (9.0), or a CPU (JAX_PLATFORMS=cpu) to be interpreted"
        )
    copied = jax.ShapeDtypeStruct((64, 64) if on_cpu() else SQUARE, jnp.bfloat16)
    copy = _milliseconds(jnp.negative, (jnp.ones(copied.shape, copied.dtype),))
    figures = {"copy_ms": copy, "copy_gb_s": 4 * math.prod(copied.shape) / copy / 1e6}
    print(f"copy of {copied.shape} bfloat16: {copy:.4f} ms, {figures['copy_gb_s']:.0f} GB/s")
    for entries in ENTRIES:
        for entry in entries(cfg):
            figures[entry.name] = _measure(entry, figures["copy_gb_s"])
    return figures | measure.device_figures()


def _measure(entry, copy_gb_s):
    result = jax.jit(entry.call)(*entry.arguments)
    expected = jax.jit(entry.oracle or entry.baseline)(*entry.arguments)
    error = float(entry.error(result, expected))
    del result, expected
    ms = _milliseconds(entry.call, entry.arguments)
    # The roofline: the data sheet's peak for products, the measured rate of a copy for memory.
    peak = cost.PEAK_TFLOPS.get(jax.devices()[0].device_kind, math.inf) * (1 + entry.fp8)
    bounds = {"memory": entry.bytes / copy_gb_s / 1e6, "products": entry.flops / peak / 1e9}
    bound = max(bounds, key=bounds.get)
    figures = {
        "error": error,
        "right": error <= entry.limit,
        "ms": ms,
        "gb_s": entry.bytes / ms / 1e6,
        "tflops": entry.flops / ms / 1e9,
        "bound_by": bound,
        "bound_ms": bounds[bound],
        "roofline_share": bounds[bound] / ms,
        "xla_ms": _milliseconds(entry.baseline, entry.arguments),
        "copy_of_the_same_bytes_ms": bounds["memory"],
        "details_ms": {},
    }
    print(
        f"{entry.name}: {'right' if figures['right'] else 'WRONG'}, error {error:.3g}", flush=True
    )
    print(
        f"  {ms:.4f} ms, {figures['gb_s']:.0f} GB/s, {figures['tflops']:.0f} TFLOP/s: "
        f"{100 * figures['roofline_share']:.0f} % of what {bound} allows; "
        f"XLA {figures['xla_ms']:.4f} ms; a copy of as many bytes {bounds['memory']:.4f} ms"
    )
    for name, call in entry.details.items():
        figures["details_ms"][name] = _milliseconds(call, entry.arguments)
        print(f"  {name:28} {figures['details_ms'][name]:.4f} ms", flush=True)
    return figures


def _milliseconds(call, arguments):
    calls, repeats = (1, 1) if on_cpu() else (TOGETHER, 15)
    program = functools.partial(_several(call), [arguments] * calls)
    measure.seconds(program, 1 if on_cpu() else 3)
    return 1e3 * measure.mean_seconds(program, repeats) / calls


def _several(call):
    """All results of a call of each of some arguments, as one program.

    Each call has its own parameters: the compiler would merge calls of the same ones.
    """
    call = jax.jit(call)  # lowered once
    return jax.jit(lambda several: [call(*arguments) for arguments in several])
