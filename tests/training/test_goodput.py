"""Goodput over the starts of a run, told by a clock of our own."""

import pytest

from longlive_jax.training import goodput


class Run:
    """A run whose clocks are moved by hand; a start is a process with a clock of its own."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.day = folder, 1e9
        monkeypatch.setattr(goodput, "clock", lambda: self.day - self.zero)

    def start(self, step):
        self.zero = self.day - 5  # of perf_counter
        self.now = goodput.Goodput(self.folder, step, goodput.clock(), self.day)
        self.now.write(self.day)

    def works(self, seconds):
        self.day += seconds
        self.now.useful += seconds

    def idles(self, seconds):
        self.day += seconds

    def saves(self, step):
        self.now.write(self.day, step)

    def ends(self):
        self.now.write(self.day, over=True)

    @property
    def share(self):
        return self.now.share(goodput.clock())


@pytest.fixture
def run(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_of_one_start(run):
    run.start(0)
    run.idles(10)
    run.works(30)
    assert run.share == pytest.approx(30 / 40)


def test_work_that_a_restart_repeats_does_not_count(run):
    run.start(0)
    run.idles(10)
    run.works(20)
    run.saves(2)
    run.works(30)  # lost
    run.idles(100)  # hung, killed, and not started again
    run.start(2)
    run.idles(10)
    run.works(30)
    assert run.share == pytest.approx((20 + 30) / (10 + 20 + 30 + 100 + 10 + 30))


def test_the_pause_after_a_run_that_ended_by_itself_does_not_count(run):
    run.start(0)
    run.works(20)
    run.saves(2)
    run.ends()
    run.idles(3600)
    run.start(2)
    run.works(10)
    assert run.share == 1.0
    run.idles(10)
    run.start(2)  # killed before it saved again
    assert run.share == pytest.approx(20 / 40)


def test_on_from_an_older_state(run):
    run.start(0)
    for step in (2, 4, 6):
        run.works(10)
        run.saves(step)
    run.start(4)  # the state of step 6 was not whole
    assert run.share == pytest.approx(20 / 30)
    run.start(3)
    assert run.share == pytest.approx(10 / 30)
    run.start(0)
    assert run.share == 0.0


@pytest.mark.parametrize("text", ["", "[]", '{"format": "longlive_jax.goodput", "version": 1}'])
def test_a_damaged_file_is_none(run, text):
    (run.folder / goodput.FILE).write_text(text)
    run.start(5)
    run.works(1)
    assert run.share == 1.0


def test_times_of_day_that_go_back(run):
    run.start(0)
    run.works(20)
    run.saves(2)
    run.day -= 50
    run.start(2)
    assert run.share == 1.0
