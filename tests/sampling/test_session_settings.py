"""Steps and guidance of a running stream."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.prompts.shots import Chunk, Video
from longlive_jax.sampling import batches, render
from longlive_jax.sampling.session import Session
from tests.sampling import test_stream
from tests.sampling.test_session import Texts, begin, engine_of, equal

GUIDED = test_stream.make_config(guidance_scale=3.0)


def latents(session, chunks):
    return [np.asarray(session.step().latents) for _ in range(chunks)]


def stream(cfg, **start):
    session = begin(cfg, decodes=False, **start)
    session.prompt("a boat")
    return session


def of(cfg, **sample):
    return dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, **sample))


@pytest.mark.parametrize(
    "solver, whole", [("unipc", False), ("unipc", True), ("x0_renoise", False)]
)
def test_steps_are_those_of_a_config(solver, whole):
    """From the next chunk on: as in a stream of that config, which goes on from the same past."""
    cfg = test_stream.make_config(solver=solver)
    session = stream(cfg, whole=whole)
    before = latents(session, 2)
    assert session.steps == 2
    session.adjust(steps=3)
    assert session.steps == 3
    after = latents(session, 2)
    other = stream(of(cfg, steps=3), past=np.concatenate(before, axis=1), whole=whole)
    latents(other, 2)
    np.testing.assert_array_equal(latents(other, 2), after)
    assert [(d.chunk, d.steps) for d in session.script] == [(0, None), (2, 3)]
    session.adjust(steps=2)  # the config's: as if nothing had been said
    session.step()
    assert session.script[-1].steps is None


def test_guidance_is_that_of_a_config():
    session = stream(GUIDED)
    before = latents(session, 1)
    session.adjust(guidance=5.5)
    after = latents(session, 1)
    other = stream(of(GUIDED, guidance_scale=5.5), past=before[0])
    latents(other, 1)
    np.testing.assert_array_equal(latents(other, 1), after)
    assert [d.guidance for d in session.script] == [(), (5.5,)]


def test_each_row_has_its_own_guidance():
    def rows(samples, guidance):
        session = stream(GUIDED, samples=samples)
        session.adjust(guidance=guidance)
        return latents(session, 2)[-1]

    both = rows((0, 1), [2.0, 4.0])
    alone = np.concatenate([rows((0,), 2.0), rows((1,), 4.0)])
    np.testing.assert_allclose(both, alone, atol=1e-4)
    assert np.abs(both - rows((0, 1), 2.0))[1].max() > 1e-3


def test_a_changed_stream_is_saved_copied_and_replayed(tmp_path):
    session = stream(GUIDED)
    made = [session.step()]
    session.adjust(steps=1, guidance=2)
    made.append(session.step())
    other = session.copy()
    session.adjust(steps=3)  # not yet in a chunk
    session.save(tmp_path / "a.session")
    made += [session.step(), session.step()]
    assert [(d.chunk, d.steps, d.guidance) for d in session.script] == [
        (0, None, ()), (1, 1, (2.0,)), (2, 3, (2.0,)),
    ]  # fmt: skip
    equal(made, session.replay())
    again = Session.restore(engine_of(GUIDED, False), Texts(), tmp_path / "a.session")
    equal(made[2:], [again.step(), again.step()])
    assert other.steps == 1 and other.guidance == (2.0,)
    assert np.abs(np.asarray(other.step().latents) - made[2].latents).max() > 1e-4


def test_what_is_refused():
    session = stream(test_stream.make_config())
    for wanted, words in [
        ({"steps": 0}, "sample.steps=0"),
        ({"guidance": 3.0}, "give --config.sample.guidance_scale=3"),
        ({"guidance": float("nan")}, "guidance_scale=nan"),
        ({"guidance": [1.0, 1.0]}, "2 values for 1 rows"),
    ]:
        with pytest.raises(InputError, match=words):
            session.adjust(**wanted)
    session.adjust(guidance=1)  # what it is


def test_shots_with_their_own_steps_and_guidance():
    """As `launch.sample` makes them; videos of other steps are not in one batch."""
    plain, own = Chunk("a boat", False), Chunk("a boat", False, steps=3, guidance=5.0)
    videos = [
        Video("a", (plain, own, plain)),
        Video("b", (plain, own, plain)),
        Video("c", (plain,) * 3),
    ]
    made = batches.make(GUIDED, videos, size=3)
    assert [len(batch.videos) for batch in made] == [2, 1]
    one = batches.make(GUIDED, videos[:1])[0]
    chunks = [np.asarray(c.latents) for c in render.render(engine_of(GUIDED, False), Texts(), one)]
    session = stream(GUIDED, whole=True)
    expected = latents(session, 1)
    session.adjust(steps=3, guidance=5.0)
    expected += latents(session, 1)
    session.adjust(steps=2, guidance=3.0)
    expected += latents(session, 1)
    np.testing.assert_allclose(chunks, expected, atol=1e-5)  # of another size than the batch's
    with pytest.raises(InputError, match="b has a shot with guidance 5, and the config has none"):
        batches.make(test_stream.make_config(), videos[1:])
