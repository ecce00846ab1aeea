"""The statistics of chapter 7 and its pictures: how many curves carry their intervals, and what they
are drawn against."""
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from appendix import curves, tasks

math_verify = import_module("math_verify")


@pytest.mark.parametrize("methods", [curves.FEW_METHODS, curves.FEW_METHODS + 1])
def test_intervals_are_drawn_of_a_few_curves_only(methods, tmp_path, monkeypatch):
    """Of many they would hide each other; seconds have their quantiles, in the other direction."""
    bars, drawn = Axes.errorbar, []
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, up, across, **how: (
        drawn.append((x, up, across)), bars(axes, x, y, up, across, **how))[1])
    row = {"accuracy": np.array([0.2, 0.6]), "count": 20, "tokens": np.array([20, 40]),
           "seconds": np.array([3.0, 7.0]), "spread": np.array([[1.0, 4.0], [5.0, 9.0]])}
    curves.draw(str(tmp_path / "x.png"), "x", [10, 20], {f"m{k}": row for k in range(methods)},
                [*curves.OTHERS])
    assert len(drawn) == 3 * methods and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    for (x, up, across), wanted in zip(drawn[::methods], ([10, 20], [20, 40], [3, 7])):
        assert list(x) == wanted
        if methods > curves.FEW_METHODS:
            assert up is None and across is None
        else:
            assert np.allclose(up[0], [0.2 - 0.0807, 0.6 - 0.3866], atol=1e-3)
            assert (across is None) == (wanted != [3, 7])
    if methods == curves.FEW_METHODS:
        assert np.allclose(drawn[-1][2], [[2, 3], [2, 2]])


def test_a_mean_beside_its_quantiles_has_one_arm(tmp_path, monkeypatch):
    """A few long runs draw the mean of the seconds beyond the 90 % quantile: nothing reaches further."""
    bars, drawn = Axes.errorbar, []
    monkeypatch.setattr(Axes, "errorbar", lambda axes, x, y, up, across, **how: (
        drawn.append(across), bars(axes, x, y, up, across, **how))[1])
    row = {"accuracy": np.array([0.2, 0.6]), "count": 20, "seconds": np.array([3.0, 7.0]),
           "spread": np.array([[1.0, 8.0], [2.0, 9.0]])}
    curves.draw(str(tmp_path / "x.png"), "x", [10, 20], {"m": row})
    assert np.allclose(drawn[-1], [[2, 0], [0, 2]])


def test_titles_are_names_and_equals_do_not_differ(capsys):
    """Of a model's folder the last part; where all scores are the same, no interval of a difference."""
    scores = np.eye(20, 2)
    row = {"runs": 20, "count": 20, "scores": scores, "accuracy": scores.mean(0), "none": 0, "faults": 0,
           "not_understood": 0, "context": 0, "passes_to_right": None}
    table = {"baseline": row, "same": {**row}, "other": {**row, "scores": 1 - scores}}
    header = {"model": "/data/me/models/Qwen3-8B/", "task": "own", "data": None, "budgets": [10, 20]}
    curves.report(header, table)
    said = capsys.readouterr().out
    assert "\nQwen3-8B on own, its own data" in said and "/data/me" not in said
    assert "no problem differs" in said and "+0%" not in said and "+90%" in said


def test_the_same_text_is_right_without_a_parser(monkeypatch):
    """math-verify gives up after some seconds on a busy machine; nobody's right answer hangs on that."""
    monkeypatch.setattr(math_verify, "parse", lambda *_, **others: [])
    assert tasks.grade("37, 4", ["37", "4"]) == (1.0, True)
    assert tasks.grade("37, 5", ["37", "4"]) == (0.5, True) and tasks.grade("5", ["4"]) == (0.0, False)


SHARES = st.floats(0, 1)


@settings(deadline=None)
@given(SHARES, st.integers(1, 10**6))
def test_intervals(share, count):
    """Within 0 and 1, around the share; narrower with more problems; what is wrong has the mirrored
    one."""
    low, high = curves.interval(share, count)
    assert -1e-12 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 + 1e-12 and high > low
    assert curves.interval(1 - share, count) == (pytest.approx(1 - high), pytest.approx(1 - low))
    less, more = curves.interval(share, 2 * count)
    assert more - less < high - low
    # Wilson's interval is where the share lies within z standard errors of what is supposed.
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.959964 ** 2 * end * (1 - end) / count, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=20))
def test_differences(pairs):
    """The interval is around the mean and within what was seen; exchanged methods have the mirrored
    one."""
    mine, theirs = map(np.array, zip(*pairs))
    mean, low, high = curves.difference(mine, theirs)
    assert mean == pytest.approx(np.mean(mine - theirs)) and low <= mean + 1e-9 and mean <= high + 1e-9
    assert min(mine - theirs) - 1e-9 <= low and high <= max(mine - theirs) + 1e-9
    assert curves.difference(theirs, mine) == tuple(map(pytest.approx, (-mean, -high, -low)))
    assert curves.difference(mine, mine) == (0, 0, 0)


@settings(deadline=None)
@given(st.lists(SHARES, min_size=2, max_size=6), SHARES)
def test_passes_to_reach(accuracy, level):
    """On the line between two budgets, where it reaches the level for the first time."""
    budgets = [2 ** k for k in range(len(accuracy))]
    at = curves.passes_to_reach(level, budgets, accuracy)
    if at is None:
        assert not any(low < level <= high for low, high in zip(accuracy, accuracy[1:]))
    else:
        assert np.interp(at, budgets, accuracy) == pytest.approx(level)
        assert budgets[0] < at + 1e-9 and at <= budgets[-1] + 1e-9
