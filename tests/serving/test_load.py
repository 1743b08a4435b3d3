"""Many viewers at once, half of them rude: the polite ones are served by turns."""

import pytest

from tests.serving import load


@pytest.mark.slow
def test_half_of_them_rude(tmp_path):
    """The short form; `python -m tests.serving.load --minutes=10` has 50 streams."""
    figures = load.run(12, 25, tmp_path)
    print(figures.text())
    figures.check(grown=0.1)  # so early it is still warming up
    assert all(figures.rude.values())
    assert {"400", "429"} <= set(figures.refused)


def test_what_the_figures_say():
    memory = [100_000_000 + 1_000_000 * (i < 4) for i in range(12)]
    made = load.Figures([8, 9, 10], 54, 6, memory, 60.0, {}, {}, {}, [])
    made.check()
    assert made.share == 8 / 9 and made.fair == 9 and made.slope == 0
    for change in (
        {"made": [5, 10, 10]},
        {"made": [1, 1, 1]},
        {"memory": [100_000_000 + 500_000 * i for i in range(12)]},
        {"answers": ["exit code 1"]},
    ):
        with pytest.raises(AssertionError):
            load.dataclasses.replace(made, **change).check()
