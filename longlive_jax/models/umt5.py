"""The UMT5 text encoder (Chung et al., arXiv 2304.09151), as pure functions.

A T5 v1.1 encoder whose every layer has its own relative position bias. The released one is XXL:
5,680,910,336 parameters, 11.4 GB in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.ops.norm import rms_norm
from longlive_jax.params import ParamSpec

MAX_DISTANCE = 128  # tokens; all distances from a little under this share the last bucket
TOKEN_BUCKETS = (32, 64, 128, 256, 512)  # lengths that programs are compiled for
BATCHES = (8, 1)  # batch sizes that programs are compiled for


def spec(cfg: config_lib.UMT5) -> params_lib.Tree:
    """Parameter specs. Paths follow the original's; weights of linear layers are [in, out].

    Initial values are T5's (Raffel et al., arXiv 1910.10683): since logits are not divided
    by sqrt(head_dim), the initial q is smaller by that factor.
    """
    d, inner, ffn = cfg.dim, cfg.dim_attn, cfg.dim_ffn
    head_dim = inner // cfg.num_heads

    def norm():
        return {"weight": ParamSpec((d,), (None,), params_lib.ones)}

    def dense(inputs, outputs, axes, std):
        return {"weight": ParamSpec((inputs, outputs), axes, params_lib.normal(std))}

    wide, narrow = ("embed", None), (None, "embed")
    layer = {
        "norm1": norm(),
        "attn": {
            "q": dense(d, inner, wide, (d * head_dim) ** -0.5),
            "k": dense(d, inner, wide, d**-0.5),
            "v": dense(d, inner, wide, d**-0.5),
            "o": dense(inner, d, narrow, inner**-0.5),
        },
        "norm2": norm(),
        "ffn": {
            "gate": {"0": dense(d, ffn, wide, d**-0.5)},
            "fc1": dense(d, ffn, wide, d**-0.5),
            "fc2": dense(ffn, d, narrow, ffn**-0.5),
        },
        "pos_embedding": {
            "embedding": dense(cfg.num_buckets, cfg.num_heads, (None, None), d**-0.5)
        },
    }
    return {
        "token_embedding": {
            "weight": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), params_lib.normal(1.0))
        },
        "blocks": params_lib.stack(layer, cfg.num_layers),
        "norm": norm(),
    }


def bucket_starts(num_buckets: int, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """The smallest distance of each bucket of one direction: int64 [num_buckets / 2].

    The first half of them are one distance wide; the rest are spaced evenly in log(distance), up to
    `max_distance`. (T5, arXiv 1910.10683, section 2.1.)

    Raises:
      InputError: so many buckets that the logarithmic half would begin past `max_distance`.
    """
    buckets = num_buckets // 2
    exact = buckets // 2
    if not 1 <= exact < max_distance:
        raise InputError(
            f"config: umt5.num_buckets={num_buckets} must be at least 4 and below "
            f"{4 * max_distance}; the released text encoder has 32"
        )
    starts = list(range(exact + 1))
    steps = buckets - exact
    for k in range(1, steps):
        # The smallest d with log(d / exact) / log(max / exact) * steps >= k. Powers are compared in
        # integers: a bucket may begin exactly at a power of two, where a rounded log misses.
        bound = exact ** (steps - k) * max_distance**k
        d = starts[-1]
        while d**steps < bound:
            d += 1
        starts.append(d)
    return np.asarray(starts)


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
    """Bucket of key - query: int32 [query, key]. Keys after the query have the upper half."""
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    starts = bucket_starts(num_buckets)
    bucket = np.searchsorted(starts, np.abs(relative), side="right") - 1
    return (bucket + (relative > 0) * (num_buckets // 2)).astype(np.int32)


def encode(
    params: params_lib.Tree,
    cfg: config_lib.UMT5,
    ids: jax.Array,
    mask: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Hidden states of a batch of texts.

    Args:
      params: of `spec(cfg)`, in any dtype; each layer is cast to `dtype` as it is used.
      ids: int32 [batch, token], 0 <= id < vocab_size.
      mask: int32 or bool [batch, token]; no token attends to those where it is 0, and their
        rows of the result are finite but meaningless.
      dtype: of the matrix products. The sum over layers, norms and softmax are float32.

    Returns:
      `dtype` [batch, token, dim].
    """
    batch, length = ids.shape
    buckets = jnp.asarray(relative_buckets(length, cfg.num_buckets))
    seen = (mask != 0)[:, None, None, :]

    def attention(p, h):
        def heads(name):
            return _linear(p["attn"][name], h).reshape(batch, length, cfg.num_heads, -1)

        q, k, v = heads("q"), heads("k"), heads("v")
        # T5 does not scale by 1 / sqrt(head_dim).
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        table = p["pos_embedding"]["embedding"]["weight"].astype(jnp.float32)
        logits = logits + table.T[:, buckets][None]
        # Not -inf: a row that sees nothing stays finite.
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return _linear(p["attn"]["o"], out.reshape(batch, length, -1))

    def ffn(p, h):
        gate = _linear(p["ffn"]["gate"]["0"], h).astype(jnp.float32)
        gate = jax.nn.gelu(gate, approximate=True).astype(dtype)
        return _linear(p["ffn"]["fc2"], _linear(p["ffn"]["fc1"], h) * gate)

    def layer(x, p):
        # The sum over layers grows to thousands times one layer's share: float32 keeps it.
        for norm, branch in (("norm1", attention), ("norm2", ffn)):
            h = rms_norm(x, p[norm]["weight"]).astype(dtype)
            x = x + branch(p, h).astype(jnp.float32)
        return x, None

    x = params["token_embedding"]["weight"][ids].astype(jnp.float32)
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    return rms_norm(x, params["norm"]["weight"]).astype(dtype)


def _linear(p: params_lib.Tree, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, p["weight"].astype(x.dtype))


def prompt_embeddings(
    params: params_lib.Tree,
    cfg: config_lib.UMT5,
    ids: jax.Array,
    mask: jax.Array,
    text_len: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Embeddings for the video transformer: `encode`, zero past each prompt's length.

    The transformer attends to all `text_len` rows without a mask, so the zeros are part of the
    model. Valid rows do not depend on how far the ids are padded.

    Args: as for `encode`, with token <= text_len and `mask` ones first, then zeros.

    Returns:
      `dtype` [batch, text_len, dim].
    """
    hidden = encode(params, cfg, ids, mask, dtype)
    valid = jnp.arange(ids.shape[1])[None, :] < jnp.sum(mask != 0, axis=1, keepdims=True)
    hidden = jnp.where(valid[:, :, None], hidden, jnp.zeros((), hidden.dtype))
    return jnp.pad(hidden, ((0, 0), (0, text_len - ids.shape[1]), (0, 0)))


@functools.partial(jax.jit, static_argnames=("cfg", "text_len", "dtype"))
def encode_program(params, ids, mask, *, cfg, text_len, dtype):
    """`prompt_embeddings`, compiled once for each batch and number of tokens."""
    return prompt_embeddings(params, cfg, ids, mask, text_len, dtype)


def encode_prompts(
    params: params_lib.Tree,
    cfg: config_lib.UMT5,
    ids: np.ndarray,
    mask: np.ndarray,
    text_len: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> np.ndarray:
    """`prompt_embeddings` of any number of prompts of any lengths, as a numpy array.

    Equal prompts are encoded once. A prompt is padded to the next of `TOKEN_BUCKETS` and not to
    `text_len`, and goes in a batch of one of `BATCHES`, so that few programs are compiled and
    memory is bounded.

    Args:
      ids, mask: int [prompt, token], as from `tokenizer.Tokenizer`.
      text_len: rows of the result; no prompt may be longer.

    Returns:
      `dtype` [prompt, text_len, dim], a numpy array.

    Raises:
      InputError: an id that the vocabulary lacks, a prompt longer than `text_len`, or a result that
        is not finite.
    """
    ids, mask, dtype = np.asarray(ids, np.int32), np.asarray(mask), jnp.dtype(dtype)
    lengths = (mask != 0).sum(axis=1)
    _check(ids, lengths, cfg, text_len)
    prompts = [tuple(row[:n].tolist()) for row, n in zip(ids, lengths)]
    unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    out = np.empty((len(unique), text_len, cfg.dim), dtype)
    for bucket, group in _by_bucket(unique, text_len).items():
        for batch in _batches(group):
            padded = np.zeros((len(batch), bucket), np.int32)
            valid = np.zeros((len(batch), bucket), np.int32)
            for row, prompt in enumerate(batch):
                padded[row, : len(prompt)] = prompt
                valid[row, : len(prompt)] = 1
            result = encode_program(params, padded, valid, cfg=cfg, text_len=text_len, dtype=dtype)
            out[[unique[prompt] for prompt in batch]] = np.asarray(result)
    which = np.asarray([unique[prompt] for prompt in prompts], np.int64)
    finite = np.asarray([np.isfinite(e.astype(np.float32)).all() for e in out], bool)
    if not finite.all():
        first = int(np.flatnonzero(~finite[which])[0]) + 1
        raise InputError(
            f"the text encoder's result for prompt {first} of {len(prompts)} is not finite (NaN or "
            f"infinity) in {dtype.name}: its weights are damaged or do not belong to this config; "
            f"convert the checkpoint again"
        )
    return out[which]


def _check(ids: np.ndarray, lengths: np.ndarray, cfg: config_lib.UMT5, text_len: int) -> None:
    if lengths.size and lengths.max() > text_len:
        raise InputError(
            f"prompt {int(lengths.argmax()) + 1} has {lengths.max()} tokens, the limit is "
            f"model.text_len={text_len}; shorten it or let the tokenizer truncate to {text_len}"
        )
    # JAX would clamp such an index and give a wrong but plausible embedding.
    bad = ids[(ids < 0) | (ids >= cfg.vocab_size)]
    if bad.size:
        raise InputError(
            f"token id {bad[0]} is outside of the text encoder's vocabulary, 0 to "
            f"umt5.vocab_size - 1 = {cfg.vocab_size - 1}; the tokenizer and the checkpoint do not "
            f"belong together"
        )


def _by_bucket(prompts, text_len: int) -> dict[int, list[tuple[int, ...]]]:
    groups: dict[int, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        fits = [b for b in TOKEN_BUCKETS if len(prompt) <= b < text_len]
        groups.setdefault(fits[0] if fits else text_len, []).append(prompt)
    return groups


def _batches(group: list):
    """Splits into batches of the sizes in `BATCHES`, largest first; none is ever padded."""
    start = 0
    for size in BATCHES:
        while len(group) - start >= size:
            yield group[start : start + size]
            start += size
