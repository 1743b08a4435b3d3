"""What tests of several kernels share."""

import fractions
import math

import jax
import numpy as np


def pretend_hopper(monkeypatch, capability="9.0"):
    """JAX says that this machine has such a GPU: enough to trace and lower for one."""
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def error(out, expected):
    """Relative, of the whole."""
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def check_quotients(parts, divisor):
    """Products with two parts of 1 / divisor are rounded once, contracted or not.

    For all mantissas that a bfloat16 has.
    """
    high, low = map(fractions.Fraction, parts)

    def rounded(q):  # to 24 bits, to nearest; no ties here
        unit = fractions.Fraction(2) ** (math.frexp(q)[1] - 24)
        return round(q / unit) * unit

    for mantissa in range(128, 256):
        exact = rounded(fractions.Fraction(mantissa, divisor))
        assert rounded(mantissa * high) == mantissa * high
        assert rounded(mantissa * high + rounded(mantissa * low)) == exact
        assert rounded(mantissa * high + mantissa * low) == exact
