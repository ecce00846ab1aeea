r"""Appendix: the problems of chapter 7, and when an answer is right.

The problems stand here, are generated (puzzles.py), come from the Hugging Face hub, or from a JSONL file
with the fields question and answer. Answers are compared as mathematics by math-verify, not as text.
"""
import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from appendix import puzzles
from appendix.command import first_line, read_text

OWN = [  # (tests/test_tasks.py finds the answers by trying everything)
    ("A shelf holds 12 books. How many books do 4 shelves hold?", "48"),
    ("Ann has 15 coins, Bob has 8 coins more than Ann. How many coins do they have together?", "38"),
    ("How many whole numbers from 1 to 100 can be divided by 3 or by 5?", "47"),
    ("What is the sum of all whole numbers from 1 to 20?", "210"),
    ("How many ways are there to pay 20 cents with coins of 1, 5 and 10 cents?", "9"),
    ("Two dice are rolled. What is the probability that the two numbers add up to 7?", "\\frac{1}{6}"),
    ("The sides of a rectangle are whole numbers, and its perimeter is 20. What is the largest area it "
     "can have?", "25"),
    ("What is the smallest whole number above 1 that leaves the remainder 1 when divided by 2, by 3, by "
     "4 and by 5?", "61"),
    ("What is the last digit of 7^{100}?", "1"),
]


@dataclass(frozen=True)
class Task:
    """Where the problems are, and how long an answer may be."""

    answer_tokens: int  # paper, appendix C (five numbers may want --answer-tokens)
    # A data set on the Hugging Face hub: (name, configuration, split). Or what is generated: (kind of
    # puzzle, patterns).
    source: tuple = ()
    question: str = "question"  # its columns
    answer: str = "answer"
    group: int = 1  # so many questions make one problem, scored position by position


OLYMPIAD, TEST = "Hothan/OlympiadBench", (None, "test")
TASKS = {
    # What the collaborator has learned, fresh ones; "reworded": asked in words that it has never met.
    "lists": Task(40, ("list", "trained")), "races": Task(16, ("race", "trained")),
    "plans": Task(40, ("plan", "trained")), "reworded": Task(40, ("list", "kept")),
    "own": Task(16),
    "limo": Task(16, ("GAIR/LIMO", None, "train")),
    "aime25": Task(16, ("math-ai/aime25", *TEST), question="problem"),
    "olympiad-maths": Task(64, (OLYMPIAD, "OE_TO_maths_en_COMP", "train"), answer="final_answer"),
    "olympiad-physics": Task(64, (OLYMPIAD, "OE_TO_physics_en_COMP", "train"), answer="final_answer"),
    "gsm8k-x5": Task(16, ("openai/gsm8k", "main", "test"), group=5),
    "math500": Task(64, ("HuggingFaceH4/MATH-500", *TEST), question="problem"),
}
FIVE = "Solve these problems and return comma-separated answers \\boxed{answer1,..., answer5} :\n"
FRESH = 200  # generated problems of a task
SAMPLES = 128  # problems of five questions, none of them twice (this and the words above: the paper's)


def load(name, data=None):
    """The problems of a task as a list of {"question": str, "answers": [str]}.

    Args:
        name: one of TASKS.
        data: a JSONL file with the fields question and answer, instead of the task's own source.
    Raises:
        ValueError: one sentence on what is wrong with the file (and in which line), or that the hub is
            out of reach.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    if len(task.source) == 2 and data is None:
        kind, patterns = task.source
        drawn = [puzzles.fresh(kind, number, patterns) for number in range(FRESH)]
        return [{"question": puzzle.text, "answers": puzzle.answer.split(", ")} for puzzle in drawn]
    rows = from_file(data) if data is not None else from_hub(task) if task.source else OWN
    rows, size = [(question, clean(answer)) for question, answer in rows], task.group
    if size == 1:
        return [{"question": question, "answers": [answer]} for question, answer in rows]
    if len(rows) < size:
        raise ValueError(f"task {name!r} puts {size} questions into a problem, and there are only "
                         f"{len(rows)}")
    rows = random.Random(0).sample(rows, len(rows))
    groups = [rows[i:i + size] for i in range(0, len(rows) - size + 1, size)][:SAMPLES]
    return [{"question": FIVE + "\n".join(f" {k}. {asked}" for k, (asked, _) in enumerate(group, 1)),
             "answers": [answer for _, answer in group]} for group in groups]


def clean(answer):
    """The answer alone, or "" if there is none: GSM8K writes a solution before it, OlympiadBench a list
    around it."""
    parts = answer if isinstance(answer, list) else [answer]
    known = all(type(part) in (str, int, float) for part in parts)
    return ", ".join(map(str, parts)).split("####")[-1].strip() if known else ""


def from_file(path):
    """(question, answer) of each line of a JSONL file."""
    seen = {}  # question -> (the number of its line, answer)
    for number, line in enumerate(read_text(path, "data file").lstrip("\ufeff").split("\n"), start=1):
        where, fields = f"line {number} of {path!r}", "each line needs the fields question and answer"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({first_line(error)}); {fields}") from error
        row = row if isinstance(row, dict) else {}
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where} has no question; {fields}")
        if not clean(answer):
            raise ValueError(f"{where} has no answer: the field answer has to be a text or a number")
        if question in seen:
            raise ValueError(f"{where} asks the same as line {seen[question][0]}: remove one of them")
        seen[question] = number, answer
    return [(question, answer) for question, (_, answer) in seen.items()]


def label(path):
    """A file's name, and a few characters that tell its content from others'."""
    return f"{Path(path).name} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]})"


def from_hub(task):
    """(question, answer) of each row of a data set on the Hugging Face hub."""
    name, configuration, split = task.source
    try:
        # Here, because it takes seconds, and only the hub's tasks need it.
        from datasets import load_dataset
        rows = load_dataset(name, configuration, split=split)
        return [(row[task.question], row[task.answer]) for row in rows]
    except Exception as error:  # its errors differ with the version
        raise ValueError(f"the data set {name!r} could not be loaded from the Hugging Face hub "
                         f"({first_line(error)}); give a local file with --data FILE") from error


# ---------------------------------------------------------------------------------------------- grading

def grade(answer, golds):
    """Compare an answer with the right ones, position by position.

    Numbers, LaTeX, sets, intervals and so on are compared as mathematics. What cannot be understood is
    wrong.

    Returns:
        (score from 0 to 1, was there anything to compare?)
    """
    from math_verify import parse, verify
    if not (answer or "").strip():
        return 0.0, False
    given = [answer] if len(golds) == 1 else positions(answer, len(golds))
    understood = [parse(tidy(part)) for part in given]
    scores = [bool(mine) and verify(parse(tidy(gold)), mine) and same_kind(gold, part)
              for gold, mine, part in zip(golds, understood, given)]
    return sum(scores) / len(golds), any(map(bool, understood))


def tidy(answer):
    """The answer as math-verify wants it: boxed, without small spaces and the full stop of its sentence,
    and e as e."""
    answer = re.sub(r"\\[,!;:]|~", "", answer).replace(r"\mathrm{e}", "e")
    return f"\\boxed{{{answer.strip().rstrip(' .')}}}"


def same_kind(gold, answer):
    """Two things that math-verify does not look at: the base of a numeral (120_5), and relations
    (x <= 14 is not 14)."""
    wanted, base = (re.fullmatch(r"[0-9A-F]+_\{?(\d+)\}?", text.strip(" $.")) for text in (gold, answer))
    if base and base[1] != (wanted[1] if wanted else "10"):
        return False
    relation = re.compile(r"\\(?:leq?|geq?|to|neq?|approx)\b|[<>]")
    return bool(relation.search(gold)) or not relation.search(answer)


def positions(answer, count):
    """Split "18, 3, 70,000" into its parts, but not (1, 2). A comma may stand between thousands, if the
    count asks for it."""
    answer = re.sub(r"\\left|\\right", "", answer).replace("{,}", "")
    answer = re.sub(r"\\([{}])", r"\1", answer).strip()
    outer = r",(?![^()\[\]{}]*[)\]}])"  # a comma that no closing bracket follows before an opening one
    if len(re.split(outer, answer)) == 1:
        answer = answer.strip("()[]{} ")  # all of it in brackets
    parts = re.split(outer, answer)
    parts = parts if len(parts) <= count else re.split(r",(?!\d{3}(?!\d))", answer)
    return [part.strip() for part in parts]
