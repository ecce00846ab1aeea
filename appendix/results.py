r"""Appendix: the files of an evaluation (chapter 7), and the figures of its report.

A row per run, also of one that failed. Of several processes each writes a file of its own, beside the
first one's, and all of them are read.
"""
import glob
import os

import numpy as np

from appendix import journal

HEADER = {"model": str, "task": str, "data": (str, None), "budgets": [int]}
ANSWER = {"answer": (str, None), "in_time": bool, "score": float, "understood": bool, "passes": int,
          "tokens": int, "seconds": float}
ROW = {"method": str, "problem": int, "seed": int, "error": (str, None), "answers": {str: ANSWER},
       "ending": str, "text": [str]}
NOTHING = {"answer": None, "in_time": False, "score": 0, "understood": False, "passes": 0, "tokens": 0,
           "seconds": 0.0}


def key_of(row):
    """What a row is the result of."""
    return row["method"], row["problem"], row["seed"]


def one_each(rows):
    """Every result once: of a run that failed and was tried again, the better row; of one that was asked
    at several lists of budgets, the longest row with all answers."""
    found = {}
    for row in sorted(rows, key=lambda row: (not row["error"], max(map(int, row["answers"])))):
        old = found.get(key_of(row), row)
        if not old["error"]:
            row = {**row, "answers": {**old["answers"], **row["answers"]}}
        found[key_of(row)] = row
    return [*found.values()]


def asked_at(row, budgets):
    """Has a row an answer at all of these budgets, and no error?"""
    return not row["error"] and {*map(str, budgets)} <= {*row["answers"]}


def files_of(path):
    """The files of an evaluation: the one of that name, and those of other processes beside it."""
    own = [path] if os.path.exists(path) else []
    return own + sorted(glob.glob(f"{glob.escape(path)}.rank*-of-*"))


def read(files, header=None):
    """(header, rows) of several files of one evaluation. Raises ValueError if they are not of one. Files
    (and rows) may differ in budgets, but not debates: their rounds are shares of the largest one."""
    rows = []
    for path in files:
        theirs, found, whole = journal.read(path, "evaluation", ROW)
        if not whole:  # another process has only just made it
            continue
        header = header or theirs
        rows += found
        debates = {tuple(row["answers"]) for row in rows if "debate" in row["method"]}  # their budgets
        if len(debates) > 1 or not journal.matches(theirs, HEADER) or (
                {**theirs, "budgets": header["budgets"]} != header) or not all(
                row["answers"] and all(budget.isdigit() and 0 <= entry["score"] <= 1
                                       for budget, entry in row["answers"].items()) for row in found):
            raise ValueError(f"{path!r} is damaged, or holds results of other settings than the others")
    return header, rows


# ---------------------------------------------------------------------------- figures of the report

def summary(rows, budgets):
    """Per method, over the problems that all methods have done: what the report prints."""
    names = sorted({row["method"] for row in rows})
    done = [{key_of(row)[1:] for row in rows if row["method"] == name} for name in names]
    common = set.intersection(*done)  # of (problem, seed)
    if not common:
        raise ValueError("there is no problem yet that all methods have done: nothing to compare")
    return {name: figures([row for row in rows if row["method"] == name and key_of(row)[1:] in common],
                          budgets) for name in names}


def figures(rows, budgets):
    """What the report prints of one method.

    Several seeds of one problem are no new problem: they are averaged first, and intervals count
    problems. A fault is no right answer.
    """
    def column(name):
        return np.array([[row["answers"][str(budget)][name] for budget in budgets] for row in rows])

    problems = np.array([row["problem"] for row in rows])  # [runs]
    scores = column("score")  # [runs, budgets]
    right = scores == 1  # [runs, budgets]
    first = column("passes")[right & (right.cumsum(1) == 1)]  # of each run that gave a right answer
    scores = np.array([scores[problems == number].mean(0) for number in np.unique(problems)])
    final = [row["answers"][str(budgets[-1])] for row in rows if not row["error"]]
    given = [entry["understood"] for entry in final if (entry["answer"] or "").strip()]
    ended = [not row["error"] for row in rows] if final else slice(1)  # (if all have failed: zeros)
    tokens, seconds = (column(name)[ended] for name in ("tokens", "seconds"))  # [ended, budgets]
    return {"runs": len(rows), "count": len(scores), "scores": scores, "accuracy": scores.mean(0),
            "tokens": tokens.mean(0), "seconds": seconds.mean(0), "none": len(final) - len(given),
            "spread": np.quantile(seconds, [0.1, 0.9], axis=0),
            "not_understood": given.count(False), "faults": len(rows) - len(final),
            "context": sum(row["ending"] in ("context", "room") for row in rows),
            "passes_to_right": first.mean() if len(first) else None}
