"""LongLive-2.0 in JAX: train, distil and stream multi-shot video of any length."""
