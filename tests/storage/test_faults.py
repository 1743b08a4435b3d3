"""Storage that refuses requests, lets them wait, or loses them or their answers."""

import itertools
import time

import numpy as np
import pytest

from longlive_jax.checkpoints import workdir
from longlive_jax.errors import StorageError
from longlive_jax.files import folders
from longlive_jax.training.checkpoint import Checkpoints
from tests.storage import faults
from tests.storage.test_states import PLAN, state, template
from tests.training.tiny_run import equal


def once(kind):
    """The first request of each method and path meets the fault."""
    seen = set()

    def fault(method, path, number):
        del number
        first = (method, path.partition("?")[0]) not in seen
        seen.add((method, path.partition("?")[0]))
        return kind if first else None

    return fault


@pytest.mark.parametrize("kind", [faults.REFUSE, faults.LOSE, faults.LOSE_ANSWER])
def test_a_request_that_fails_is_made_again(faulty, kind):
    faulty.fault = once(kind)
    path = faulty.path(f"once/{kind}")
    path.write_bytes(b"1")
    assert path.read_bytes() == b"1" and faulty.met == 2
    if kind == faults.LOSE_ANSWER:
        with folders.locked(path.parent / "lock", "taken"):  # whose write is conditional
            pass
        assert faulty.met > 2


def test_a_save_whose_answers_are_lost_is_whole(faulty):
    again = once(faults.LOSE_ANSWER)
    faulty.fault = lambda method, path, number: (
        again(method, path, number) if method == "PUT" and "manifest.ocdbt" in path else None
    )
    states = Checkpoints(faulty.path("answers"), PLAN)
    states.save(1, state(1, 1000))
    states.close()
    assert workdir.whole(faulty.path("answers")) == [1] and faulty.met


def test_a_request_that_is_not_answered_is_given_up_and_made_again(faulty):
    faulty.fault = once(faults.STALL)
    start = time.monotonic()
    faulty.path("stalled").write_bytes(b"1")
    assert faulty.met == 1 and 3 < time.monotonic() - start < 60


def test_a_storage_that_refuses_all_is_named(faulty):
    faulty.fault = lambda *request: faults.REFUSE
    with pytest.raises(StorageError, match=r"does not answer .*503"):
        faulty.path("refused").write_bytes(b"1")


@pytest.mark.slow
def test_a_state_is_saved_on_bad_days(faulty):
    draw, kinds = np.random.default_rng(0), [faults.REFUSE, faults.LOSE, faults.LOSE_ANSWER]
    count = itertools.count()
    # Never two in a row: three tries are all there are here.
    faulty.fault = lambda *_: draw.choice(kinds) if next(count) % 4 == 1 else None
    root = faulty.path("bad-days")
    states = Checkpoints(root, PLAN)
    for step in (1, 2, 3):
        states.save(step, state(step, 1000))
    states.close()
    assert workdir.whole(root) == [2, 3] and faulty.met > 5
    again = Checkpoints(root, PLAN)
    assert equal(again.restore(template(state(0, 1000))), state(3, 1000))
    again.close()
