"""bfloat16 attention over the cache by the kernel."""

import jax
import jax.numpy as jnp

from longlive_jax.kernels import attention_bf16
from longlive_jax.ops import cached_attention
from tests.kernels.attention import beyond, check, chunks, flat, inputs, supports, window
from tests.kernels.checks import Case, kernel_tests

TUNINGS = {
    "64 keys": attention_bf16.Tuning(tile=64, stages=4),
    "3 stages": attention_bf16.Tuning(stages=3),
    "default": attention_bf16.Tuning(),
}
MANY = {"rows": 2, "tokens": 256, "slots": 3, "heads": 2}


def case(make=inputs, tuning="default", **how):
    return Case(make, {"tuning": TUNINGS[tuning]}, limit=3e-3, **how)


def growing():
    """Each tile's largest logit is far above the last one's: the past all but vanishes."""
    q, fresh, (past_k, past_v), *rest = inputs()
    size = jnp.asarray([4, 16], jnp.bfloat16).reshape(1, 1, 2, 1, 1, 1)
    return q, fresh, (past_k * size, past_v), *rest


def reference(*arguments, tuning=None):
    return cached_attention.reference(*arguments)


HALF = jax.tree.leaves(jax.eval_shape(lambda: inputs(tokens=64)))

TestAttentionBF16 = kernel_tests(
    attention_bf16,
    reference,
    check,
    kernel=flat(attention_bf16),
    supports=supports(attention_bf16),
    cases={
        **{name: case(tuning=name) for name in TUNINGS},
        "rows, heads and slots": case(lambda: inputs(rows=2, heads=2)),
        "blocks of queries, tiles of slots": case(lambda: inputs(queries=256, tokens=256, slots=1)),
        "empty": case(lambda: beyond(inputs(), filled=0)),
        "half empty": case(lambda: beyond(inputs())),
        "growing": case(growing),
        **{
            f"many tiles, {name}": case(lambda: inputs(**MANY), name, slow=True) for name in TUNINGS
        },
    },
    chunks=chunks(cached_attention.attend, attention_bf16, inputs, TUNINGS),
    left=[
        window(tokens=7000),
        window(queries=7000),
        window(head_dim=64),
        window(dtype=jnp.float32),
        window(past=jnp.float32),
    ],
    refused=[("128 queries and slots of 64 tokens", *HALF)],
)
