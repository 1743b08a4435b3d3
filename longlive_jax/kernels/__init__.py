"""Pallas kernels, one a file, each with a plain-JAX oracle; how to add one: docs/kernels.md."""
