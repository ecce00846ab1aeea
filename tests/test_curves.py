"""The pictures of chapter 7: how many curves carry their intervals, and what they are drawn against."""
from importlib import import_module

import numpy as np
import pytest
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
