"""A stream as a value: directed, copied, moved, saved, restored and replayed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError
from longlive_jax.models import vae
from longlive_jax.sampling import stream
from longlive_jax.sampling.decode import Decoder
from longlive_jax.sampling.session import Engine, Session, Start
from tests.sampling import test_quantized_cache, test_stream

SIZE = test_stream.SIZE
PREFIX = "The scene transitions. "


class Texts:
    """An embedding by the prompt's letters; `asked` are the prompts that were embedded."""

    def __init__(self, model=test_stream.MODEL):
        self.shape, self.asked = (model.text_len, model.text_dim), []
        self.negative = np.ones(self.shape, np.float32)

    def __call__(self, prompts):
        self.asked += prompts
        seeds = [int.from_bytes(prompt.encode()[-8:]) for prompt in prompts]
        rows = [np.random.default_rng(s).standard_normal(self.shape, np.float32) for s in seeds]
        for row in rows:
            row[3:] = 0  # padding
        return np.stack(rows)


@functools.cache
def engine_of(cfg, decodes=True):
    mesh = mesh_lib.make_mesh(cfg.mesh)
    weights = test_stream.draw_params(cfg.model)
    weights = jax.tree.map(lambda w: w.astype(cfg.compute_dtype), weights)
    params = stream.sampler(cfg, mesh).prepare(weights)
    if not decodes:
        return Engine(cfg, mesh, params)
    draw = np.random.default_rng(0)
    specs = {name: tree for name, tree in vae.spec(cfg.vae).items() if name in networks.DECODER}
    weights = jax.tree.map(
        lambda s: 0.1 * draw.standard_normal(s.shape, np.float32), specs,
        is_leaf=params_lib.is_spec,
    )  # fmt: skip
    return Engine(cfg, mesh, params, Decoder(cfg, weights, mesh))


def begin(cfg, texts=None, decodes=True, **start):
    height, width = SIZE
    texts = texts or Texts(cfg.model)
    return Session(engine_of(cfg, decodes), texts, Start(height=height, width=width, **start))


def direct(session):
    """Six chunks: a prompt, another one inside the shot, a cut. Latents and frames of each."""
    made = []
    for index in range(6):
        if index in (0, 2):
            session.prompt(f"prompt {index}")
        if index == 4:
            session.prompt("prompt 4", cut=True)
        made.append(session.step())
    return made


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.index, a.applied) == (b.index, b.applied)
        np.testing.assert_array_equal(a.latents, b.latents)
        for x, y in zip(a.frames, b.frames, strict=True):
            np.testing.assert_array_equal(x, y)


@functools.cache
def made():
    cfg = test_stream.make_config(recache=True, vae_latents_per_call=8)
    session = begin(cfg)
    return session, direct(session)


def test_the_script_is_what_was_applied():
    session, chunks = made()
    assert [chunk.index for chunk in chunks] == list(range(6))
    rows = [(d.chunk, *d.prompts, *d.cut, d.recache) for d in session.script]
    assert rows == [
        (0, "prompt 0", False, False),
        (2, "prompt 2", False, True),
        (4, PREFIX + "prompt 4", True, False),
        (5, "prompt 4", False, False),
    ]
    assert chunks[3].applied.prompts == ("prompt 2",)
    assert [sum(x.shape[1] for x in chunk.frames) for chunk in chunks] == [29] + [32] * 5
    assert session.texts.asked == ["prompt 0", "prompt 2", PREFIX + "prompt 4", "prompt 4"]


def test_a_replay_is_the_same_to_the_bit():
    session, chunks = made()
    equal(chunks, session.replay())


@pytest.mark.slow
def test_a_replay_by_the_solver_that_renoises(tmp_path):
    """New noise is a function of seed, sample, chunk and step; a saved stream goes on with it."""
    cfg = test_stream.make_config(solver="x0_renoise")
    session = begin(cfg, decodes=False, samples=(0, 7))
    session.prompt(["a boat", "a boat"])
    chunks = [session.step() for _ in range(2)]
    equal(chunks, session.replay())
    session.save(tmp_path / "s")
    again = Session.restore(engine_of(cfg, False), None, tmp_path / "s")
    (ours,), (theirs,) = [session.step()], [again.step()]
    equal([ours], [theirs])
    one = begin(cfg, decodes=False, samples=(7,))
    one.prompt("a boat")
    test_stream.close(one.step().latents[0], chunks[0].latents[1])
    assert np.abs(chunks[0].latents[0] - chunks[0].latents[1]).max() > 0.1
    unipc = engine_of(test_stream.make_config(), False)
    with pytest.raises(InputError, match=r"with sample\.solver='?x0_renoise'?, now it is '?unipc"):
        Session.restore(unipc, None, tmp_path / "s")


class Spy:
    """A sampler that notes which of its programs is dispatched."""

    def __init__(self, sampler, calls):
        self._sampler, self._calls = sampler, calls

    def __getattr__(self, name):
        self._calls.append(name)
        return getattr(self._sampler, name)


def test_frames_leave_before_the_clean_pass():
    session, _ = made()
    session, calls = session.copy(), []
    expected = session.copy().step()
    session._sampler = Spy(session._sampler, calls)
    chunk = session.step()
    assert "denoise" in calls and "commit" not in calls
    first, *rest = (np.asarray(piece) for piece in chunk.frames[:1])
    assert not rest and "commit" not in calls
    for piece in chunk.frames:
        calls.append(piece.shape[1])
    assert calls[-3:] == [4, 28, "commit"]
    np.testing.assert_array_equal(chunk.frames[0], first)
    equal([expected], [chunk])
    calls.clear()
    session.step()  # nobody asks for its frames
    session.copy()
    assert calls.count("commit") == 1


def test_a_blend_of_two_prompts(tmp_path):
    cfg = test_stream.make_config()
    session = begin(cfg, decodes=False)
    session.prompt("a boat")
    session.step()
    for weight in (0.5, 0.5, 1.0):
        session.direct(["a boat"], toward=["a cat"], weights=[weight])
        last = session.step()
    session.prompt("a cat")
    session.step()
    other = begin(cfg, decodes=False)
    other.prompt("a boat")
    other.step()
    other.direct(["a boat"], toward=["a cat"], weights=[0.5])
    assert [d.weights for d in session.script] == [(), (0.5,), (1.0,), ()]
    session.save(tmp_path / "s")
    again = list(Session.restore(engine_of(cfg, False), None, tmp_path / "s").replay())
    equal([last], [again[3]])
    half, plain = other.copy().step(), other
    plain.direct(["a boat"])
    assert np.abs(np.asarray(half.latents) - plain.step().latents).max() > 1e-4
    np.testing.assert_array_equal(half.latents, again[1].latents)


def test_a_stream_by_whole_chunks_is_the_same():
    cfg = test_stream.make_config(recache=True, vae_latents_per_call=8)
    equal(made()[1], direct(begin(cfg, whole=True)))


def test_copies_go_their_own_ways():
    session, _ = made()
    session = session.copy()
    one, other = session.copy(), session.copy()
    other.prompt("another")
    a, b = one.step(), other.step()
    assert np.abs(np.asarray(a.latents) - b.latents).max() > 1e-3
    equal([a], [session.step()])
    assert len(one.script) + 1 == len(other.script)


def test_on_the_host_and_back():
    session, _ = made()
    here, there = session.copy(), session.copy()
    there.to_host()
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(there.carried))
    resting = there.copy()
    equal([here.step()], [there.step()])
    equal([here.step()], [there.step()])
    assert resting.index == 6
    resting.step()


@pytest.mark.parametrize("kv", [pytest.param("bf16", marks=pytest.mark.slow), "fp8", "nvfp4"])
def test_a_saved_stream_goes_on(kv, tmp_path):
    cfg = dataclasses.replace(test_quantized_cache.make_config(kv), dtype="bfloat16")
    session = begin(cfg, decodes=False, seed=3, whole=True)  # one program is compiled, not two
    session.prompt("a boat")
    chunks = [session.step() for _ in range(2)]
    session.prompt("a cat", cut=True)
    session.save(tmp_path / "a.session")
    expected = [session.step() for _ in range(2)]
    texts = Texts(cfg.model)
    again = Session.restore(engine_of(cfg, False), texts, tmp_path / "a.session")
    equal(expected, [again.step() for _ in range(2)])
    assert texts.asked == [PREFIX + "a cat", "a cat"]
    equal([*chunks, *expected], again.replay())
    assert session.script == again.script


@pytest.mark.parametrize("given", ["first_frame", "past", "noise"])
def test_what_a_stream_began_with_is_saved(given, tmp_path):
    cfg = test_stream.make_config()
    draw = np.random.default_rng(0)
    frames = {"first_frame": 1, "past": 8, "noise": 24}[given]
    start = draw.standard_normal((2, frames, *SIZE, 4), np.float32)
    session = begin(cfg, decodes=False, samples=(0, 7), **{given: start})
    session.prompt(["a boat", "a cat"], cut=[True, False])
    chunks = [session.step() for _ in range(2)]
    if given != "noise":
        np.testing.assert_array_equal(chunks[0].latents[:, :frames], start)
    session.save(tmp_path / "s")
    again = Session.restore(engine_of(cfg, False), None, tmp_path / "s")
    equal(chunks, again.replay())
    equal([session.step()], [again.step()])
    if given == "noise":
        with pytest.raises(InputError, match="the noise given is for 3 chunks only"):
            session.step()


def test_a_stream_moves_to_another_mesh(tmp_path):
    one, many = (
        test_stream.make_config(config_lib.Mesh(seq=seq), vae_latents_per_call=8) for seq in (1, 4)
    )
    session = begin(one, decodes=False)
    session.prompt("a boat")
    for _ in range(2):
        session.step()
    session.save(tmp_path / "s")
    there = Session.restore(engine_of(many, False), None, tmp_path / "s")
    test_stream.close(there.step().latents, session.step().latents)


def test_bad_directions():
    session = begin(test_stream.make_config(), decodes=False)
    with pytest.raises(InputError, match=r"no prompt yet; call session\.prompt"):
        session.step()
    with pytest.raises(InputError, match="2 values for 1 rows"):
        session.prompt(["a", "b"])


def test_bad_files(tmp_path):
    cfg = test_stream.make_config()
    session = begin(cfg, decodes=False)
    session.prompt("a boat")
    session.save(tmp_path / "s")
    engine = engine_of(cfg, False)

    def refused(name, pattern, engine=engine):
        with pytest.raises(InputError, match=pattern):
            Session.restore(engine, None, tmp_path / name)

    refused("none", "none: no such file")
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-100])
    refused("short", "short: not a .npz file")
    (tmp_path / "wrong").write_bytes(
        whole.replace(b"longlive_jax session", b"longlive_jax SESSION")
    )
    refused("wrong", "array 'session' cannot be read: Bad CRC-32")
    np.savez(
        tmp_path / "other.npz", session=np.frombuffer(b'{"format": "x", "version": 2}', np.uint8)
    )
    refused("other.npz", "has format 'x' version 2, this program reads 'longlive_jax session' vers")
    steps = engine_of(test_stream.make_config(steps=1), False)
    refused("s", r"was begun with sample\.steps=2, now it is 1", steps)
