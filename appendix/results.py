r"""Appendix: the files of an evaluation (chapter 7).

A row per run, also of one that failed. Of several processes each writes a file of its own, beside the
first one's, and all of them are read.
"""
import glob
import os

from appendix import journal

HEADER = {"model": str, "task": str, "data": (str, None), "budgets": [int]}
ANSWER = {"answer": (str, None), "score": float, "understood": bool, "passes": int, "seconds": float}
ROW = {"method": str, "problem": int, "seed": int, "error": (str, None), "answers": {str: ANSWER},
       "ending": str, "text": [str]}
NOTHING = {"answer": None, "score": 0, "understood": False, "passes": 0, "seconds": 0.0}


def key_of(row):
    """What a row is the result of."""
    return row["method"], row["problem"], row["seed"]


def one_each(rows):
    """Every result once; where a run failed and was tried again, the later one."""
    faults_first = sorted(rows, key=lambda row: not row["error"])
    return list({key_of(row): row for row in faults_first}.values())


def files_of(path):
    """The files of an evaluation: the one of that name, and those of other processes beside it."""
    others = sorted(glob.glob(f"{glob.escape(path)}.rank*-of-*"))
    return [path, *others] if os.path.exists(path) else others


def read(files, header=None):
    """(header, rows) of several files of one evaluation. Raises ValueError if they are not of one."""
    rows = []
    for path in files:
        theirs, found, whole = journal.read(path, "evaluation", ROW)
        if not whole:  # another process has only just made it
            continue
        header = header or theirs
        if theirs != header or not journal.matches(theirs, HEADER) or not all(
                list(row["answers"]) == list(map(str, theirs["budgets"] or [0]))
                and all(0 <= entry["score"] <= 1 for entry in row["answers"].values()) for row in found):
            raise ValueError(f"{path!r} is damaged, or holds results of other settings than the others")
        rows += found
    return header, rows
