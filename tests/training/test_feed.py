"""From samples to batches on a mesh: rows, chunks, prompts, and pictures encoded in two ways."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.data.images import to_float
from longlive_jax.data.source import Sample
from longlive_jax.errors import InputError
from longlive_jax.models import tokenizer, umt5, vae
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import feed, prefetch
from tests.launch.commands import PROMPTS
from tests.training import tiny_run


class Pictures:
    """A source of random videos; the last chunk of each is padding."""

    def __init__(self, cfg, count=5):
        self.shape = (4 * cfg.train.latent_frames - 3, cfg.video.height, cfg.video.width, 3)
        self.chunks = cfg.train.latent_frames // cfg.model.chunk_frames
        self.count = count

    def __len__(self):
        return self.count

    def sample(self, index, key):
        frames = np.random.default_rng(index).integers(0, 256, self.shape).astype(np.uint8)
        prompts = tuple(PROMPTS[(index + chunk) % 2] for chunk in range(self.chunks))
        return Sample(f"säure-{index}", prompts, self.chunks - 1, frames=frames)


def random_params(spec, scale=0.1):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * draw.standard_normal(s.shape), jnp.float32), spec,
        is_leaf=params_lib.is_spec,
    )  # fmt: skip


def step_batches(cfg, source, encoders, tmp_path, start=0, stop=2):
    """(batch, names) of steps, on the host."""
    mesh = mesh_lib.make_mesh(cfg.mesh)
    like = batch_lib.abstract(cfg, mesh)
    failures = tmp_path / "failures.jsonl"
    prefetcher = feed.Prefetcher(cfg, mesh, source, encoders, failures, range(start, stop))
    with contextlib.closing(prefetcher) as batches:
        for batch, names in batches:
            jax.tree.map(lambda x, y: x.sharding == y.sharding or 1 / 0, batch, like)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
                lambda x: (x.shape, x.dtype), like
            )
            yield jax.device_get(batch), prefetch.decode_names(np.asarray(names))


def cached(data, tmp_path, **overrides):
    cfg = tiny_run.config(data__path=str(data), **overrides)
    return list(step_batches(cfg, feed.open_source(cfg)[0], feed.Encoders(), tmp_path, 1, 4))


def test_batches_are_the_same_on_every_mesh(tmp_path):
    data = tiny_run.write_cached(tmp_path / "cached")
    one = cached(data, tmp_path)
    many = cached(data, tmp_path, mesh__data=2, mesh__fsdp=2, mesh__seq=2)
    assert len(one) == 3
    for (ours, our_names), (theirs, their_names) in zip(one, many, strict=True):
        assert our_names == their_names and len(our_names) == 8
        assert tiny_run.equal(ours, theirs)
    source, _ = feed.open_source(tiny_run.config(data__path=str(data)))
    by_name = {s.name: s for s in (source.sample(i, 0) for i in range(len(source)))}
    for batch, names in one:
        for i, name in enumerate(names):
            row, sample = divmod(i, 4), by_name[name]
            np.testing.assert_array_equal(
                batch.latents[row].reshape(sample.latents.shape), sample.latents
            )
            np.testing.assert_array_equal(batch.text[row], sample.text)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    cfg = tiny_run.config()
    read = tokenizer.train_tiny(
        PROMPTS, cfg.umt5.vocab_size, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    )
    texts = PromptEncoder(cfg, random_params(umt5.spec(cfg.umt5)), read)
    return feed.Encoders(random_params(vae.spec(cfg.vae)), texts, read)


@pytest.mark.slow
@pytest.mark.parametrize("encode", ["width", "halo"])
def test_pictures_are_encoded_as_whole_videos_are(encode, encoders, tmp_path):
    # Long enough that the second half does not depend on the beginning.
    cfg = tiny_run.config(
        mesh__fsdp=2, mesh__seq=2, data__cached=False, data__encode=encode,
        train__latent_frames=60, train__batch_size=2, train__accumulation=1,
    )  # fmt: skip
    assert feed.window(cfg, 2) == (59, [0, 1])
    source = Pictures(cfg)
    ((batch, names),) = step_batches(cfg, source, encoders, tmp_path, 0, 1)
    texts = encoders.texts(PROMPTS)
    for row, name in enumerate(names):
        index = int(name.removeprefix("säure-"))
        frames = jnp.asarray(to_float(source.sample(index, 0).frames))
        whole = vae.encode_video(encoders.vae, cfg.vae, frames[None], 1)[0]
        ours = batch.latents[0, row].reshape(whole.shape)
        np.testing.assert_allclose(ours, whole, atol=1e-5 * float(jnp.abs(whole).max()))
        assert batch.valid[0, row].tolist() == [True] * 29 + [False]
        for chunk in range(30):
            np.testing.assert_array_equal(batch.text[0, row, chunk], texts[(index + chunk) % 2])


def test_prompts_are_embedded_once(encoders, monkeypatch):
    cfg = tiny_run.config()
    counts = []
    real = umt5.encode_prompts
    monkeypatch.setattr(umt5, "encode_prompts", lambda *a: counts.append(len(a[2])) or real(*a))
    texts = PromptEncoder(cfg, encoders.texts._params, encoders.tokenizer)
    a, b = texts([PROMPTS[0], PROMPTS[0]]), texts([PROMPTS[1], PROMPTS[0]])
    assert counts == [1, 1]
    np.testing.assert_array_equal(a[1], b[1])


def test_tokens_for_a_text_encoder_that_is_trained(encoders, tmp_path):
    data = tiny_run.write_cached(tmp_path / "cached")
    cfg = tiny_run.config(data__path=str(data), train__text_encoder=True, mesh__seq=2)
    source, _ = feed.open_source(cfg)
    ((batch, _),) = step_batches(
        cfg, source, encoders._replace(vae=None, texts=None), tmp_path, 0, 1
    )
    ids, mask = encoders.tokenizer(["a boat", "a cat"], 8)
    assert batch.text is None
    assert {row.tobytes() for row in batch.ids.reshape(-1, 8)} == {row.tobytes() for row in ids}
    assert {row.tobytes() for row in batch.mask.reshape(-1, 8)} <= {row.tobytes() for row in mask}


def test_too_many_bad_samples_stop_the_feed(tmp_path):
    class Bad(Pictures):
        def sample(self, index, key):
            return Sample("x", (), 1, failures=(("a.mp4", "torn"),))

    cfg = tiny_run.config(train__batch_size=20, train__accumulation=1)
    with pytest.raises(InputError, match=r"20 of 20 samples read met something .*a\.mp4: torn"):
        next(step_batches(cfg, Bad(cfg), feed.Encoders(), tmp_path))


def test_what_tells_data_from_other_data(tmp_path):
    a, b = (tiny_run.write_cached(tmp_path / name) for name in "ab")
    c = tiny_run.write_cached(tmp_path / "c", names=tiny_run.NAMES[1:])
    one, same, other = (feed.open_source(tiny_run.config(data__path=str(p)))[1] for p in (a, b, c))
    assert one == same != other
