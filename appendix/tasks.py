r"""Appendix: the problems of chapter 7, and when an answer is right.

The problems are generated (puzzles.py), come from the Hugging Face hub, or from a JSONL file with the
fields question and answer, like own.jsonl. Answers are compared as mathematics by math-verify, not as
text.
"""
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appendix import programs, puzzles
from appendix.command import first_line, read_text

# (tests/test_tasks.py finds its answers by trying everything)
OWN = Path(__file__).with_name("own.jsonl")


def plain_row(row):
    """A problem from a row with the fields question (or problem) and answer."""
    question, answer = row.get("question", row.get("problem")), clean(row.get("answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("has no question; the fields question and answer (or final_answer) are needed")
    if not answer:
        raise ValueError("has no answer: answer (or final_answer) has to be a text or a number")
    return {"question": question, "answers": [answer]}


KINDS = {"Numerical": "a number", "Expression": "an expression", "Equation": "an equation",
         "Interval": "an interval"}


def olympiad(row):
    """A problem of OlympiadBench: what it refers to stands before it, and behind it what is wanted (in
    the structure of its official prompts); some answers may be off by an error, each by its own.

    Columns: context, question, final_answer (a list), is_multiple_answer, unit, answer_type, error.
    """
    problem = plain_row({**row, "answer": row["final_answer"]})
    kinds = [KINDS.get(kind, "") for kind in str(row["answer_type"]).split(",")]
    alike = len({*kinds}) == 1
    kind = ", ".join(kinds[:1] if alike else kinds) if all(kinds) else ""
    each = f", {'each of them' if alike else 'in this order'} {kind}" if kind else ""
    wanted = f"The answer is {kind}." if kind else ""
    if row["is_multiple_answer"]:
        wanted = f"There are several answers{each}: give all of them, separated by commas."
    unit = f"It is in units of {row['unit']}; leave the unit out." if row["unit"] else ""
    parts = [row["context"] or "", row["question"], f"{wanted} {unit}"]
    errors = [float(part or 0) for part in str(row["error"] or 0).split(",")]
    return {**problem, "question": "\n\n".join(filter(None, map(str.strip, parts))), "errors": errors}


PROGRAM = r"""{}

{} When the program is final, give it in one block of code that begins with ```python, and behind it
write \boxed{{done}}."""
READS = "Write a Python program that reads standard input and prints to standard output."
STARTS = "Complete this Python program:\n```python\n{}\n```\n"


def live_code(row):
    """A problem of LiveCodeBench, or None: it is not of the months that the paper evaluates."""
    if not "2024-08-01" <= str(row["contest_date"])[:10] < "2025-02-01":
        return None
    start = (row["starter_code"] or "").strip()
    how = STARTS.format(start) if start else READS
    return {"question": PROGRAM.format(row["question_content"].strip(), how),
            "answers": [], "tests": programs.tests_of(row)}


@dataclass(frozen=True)
class Task:
    """Where the problems are, and how long an answer may be."""

    answer_tokens: int  # paper, appendix C (five numbers may want --answer-tokens)
    # A data set on the Hugging Face hub: (name, how many problems it has, arguments of load_dataset). If
    # there is none: OWN.
    source: tuple = ()
    fresh: str = ""  # a kind of puzzle, if they are generated
    patterns: str = "trained"  # how such a puzzle is asked
    read: Callable = plain_row  # a row -> a problem, or None
    group: int = 1  # so many questions make one problem, scored position by position
    form: str = "box"  # how an answer is written (protocol.FORMS)


def hub(name, size, configuration=None, split="test"):
    """A data set on the Hugging Face hub."""
    return name, size, {"path": name, "name": configuration, "split": split}


LIVE = "livecodebench/code_generation_lite"
TASKS = {
    # What the collaborator has learned, fresh ones; "reworded": asked in words that it has never met.
    "lists": Task(40, fresh="list"), "races": Task(16, fresh="race"),
    "plans": Task(40, fresh="plan"), "reworded": Task(40, fresh="list", patterns="held-out"),
    "own": Task(16),
    "limo": Task(16, hub("GAIR/LIMO", 817, split="train")),
    "aime25": Task(16, hub("math-ai/aime25", 30)),
    "olympiad-maths": Task(64, hub("Hothan/OlympiadBench", 674, "OE_TO_maths_en_COMP", "train"),
                           read=olympiad),
    "olympiad-physics": Task(64, hub("Hothan/OlympiadBench", 236, "OE_TO_physics_en_COMP", "train"),
                             read=olympiad),
    "gsm8k-x5": Task(16, hub("openai/gsm8k", 1319, "main"), group=5),
    "math500": Task(64, hub("HuggingFaceH4/MATH-500", 500)),
    # Its files up to release_v5: its repository has a script, which load_dataset refuses.
    "livecodebench": Task(1024, (LIVE, 279, {"path": "json", "split": "train", "data_files": [
        f"hf://datasets/{LIVE}/test{part}.jsonl" for part in ["", 2, 3, 4, 5]]}),
                          read=live_code, form="code"),
}
FIVE = "Solve these problems and return comma-separated answers \\boxed{answer1,..., answer5} :\n"
FRESH = 200  # generated problems of a task
SAMPLES = 128  # problems of five questions, none of them twice (this and the words above: the paper's)


def load(name, data=None):
    """The problems of a task as a list of {"question": str, "answers": [str]}; some have "errors", the
    numbers by which an answer's parts may be off, or "tests" (programs.py) instead of answers.

    Args:
        name: one of TASKS.
        data: a JSONL file in the place of the task's own source: with the fields question and answer, or
            with those of OlympiadBench or LiveCodeBench.
    Raises:
        ValueError: one sentence on what is wrong with the file (and in which line), or that the hub is
            out of reach.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    task, seen = TASKS[name], {}  # seen: question -> (where it stands, problem)
    if task.fresh and not data:
        drawn = [puzzles.fresh(task.fresh, number, task.patterns) for number in range(FRESH)]
        return [{"question": puzzle.text, "answers": puzzle.answer.split(", ")} for puzzle in drawn]
    if not data and not task.source:
        data = OWN
    for where, row in from_file(data) if data else from_hub(*task.source):
        try:
            problem = task.read(row)
        except KeyError as error:
            raise ValueError(f"{where} has no field {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} {first_line(error)}") from error
        if problem:
            first = seen.setdefault(problem["question"], (where, problem))
            if data and first[1] is not problem:
                raise ValueError(f"{where} asks the same as {first[0]}: remove one of them")
    problems, size = [problem for _, problem in seen.values()], task.group
    if not data and len(problems) != task.source[1]:
        print(f"note: {task.source[0]!r} has {len(problems)} different problems, and not "
              f"{task.source[1]}: what others measured may be of other ones", file=sys.stderr)
    if len(problems) < size:
        raise ValueError(f"a problem of task {name!r} takes {size} questions (of LiveCodeBench those of "
                         f"the paper's months), and there are only {len(problems)}")
    if size == 1:
        return problems
    drawn = iter(random.Random(0).sample(problems, len(problems)))
    # (zip: each takes the next ones of the same iterator.)
    return [{"question": FIVE + "\n".join(f" {k}. {one['question']}" for k, one in enumerate(group, 1)),
             "answers": [one["answers"][0] for one in group]}
            for group in [*zip(*[drawn] * size)][:SAMPLES]]


def clean(answer):
    """The answer alone, or "" if there is none: GSM8K writes a solution before it, OlympiadBench a list
    around it."""
    parts = answer if isinstance(answer, list) else [answer]
    known = {*map(type, parts)} <= {str, int, float}
    return ", ".join(map(str, parts)).split("####")[-1].strip() if known else ""


def from_file(path):
    """(where it stands, row) of each line of a JSONL file."""
    for number, line in enumerate(read_text(path, "data file").lstrip("\ufeff").split("\n"), 1):
        where = f"line {number} of {path!r}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({first_line(error)}); each line needs the fields "
                             "of a problem") from error
        yield where, row if isinstance(row, dict) else {}


def label(path):
    """A file's name, and a few characters that tell its content from others'."""
    return f"{Path(path).name} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]})"


def from_hub(name, _, arguments):
    """(where it stands, row) of each row of a data set on the Hugging Face hub."""
    try:
        # Here, because it takes seconds, and only the hub's tasks need it.
        from datasets import load_dataset
        rows = load_dataset(**arguments)
    except Exception as error:  # its errors differ with the version
        raise ValueError(f"the data set {name!r} could not be loaded from the Hugging Face hub "
                         f"({first_line(error)}); give a local file with --data FILE") from error
    return ((f"row {number} of {name!r}", row) for number, row in enumerate(rows))


# ---------------------------------------------------------------------------------------------- grading

PATIENCE = 60  # seconds for math-verify, which loads much with the first answer (a machine may be busy)


def mark(answer, problem):
    """How good is an answer (or a program, or None) to a problem of `load`? (score from 0 to 1, was
    there anything to look at?)"""
    if "tests" in problem and (answer or "").strip():
        return float(all(programs.passes(answer, test) for test in problem["tests"])), True
    return grade(answer, problem["answers"], problem.get("errors", []))


def grade(answer, golds, errors=()):
    """Compare an answer with the right ones, position by position; what is too much counts as wrong.

    Numbers, LaTeX, sets, intervals and so on are compared as mathematics. What cannot be understood is
    wrong. errors: so far may the numbers of an answer be off (one holds for all of them).

    Returns:
        (score from 0 to 1, was there anything to compare?)
    """
    if not golds or not (answer or "").strip():
        return 0.0, False
    given = [answer] if len(golds) == 1 else positions(answer, len(golds))
    found = [same(gold, part, errors) for gold, part in zip(golds, given)]
    return sum(filter(None, found)) / max(len(golds), len(given)), set(found) != {None}


def same(gold, answer, errors=()):
    """Is an answer right? None: it cannot be understood."""
    from math_verify import verify
    gold, answer = tidy(gold), tidy(answer)
    if answer == gold:
        return True
    mine = parsed(answer)
    right = errors and near(gold, answer, errors) or verify(parsed(gold), mine,
                                                            timeout_seconds=PATIENCE)
    return right and same_kind(gold, answer) if mine else None


def parsed(text):
    """What math-verify makes of a text, best first; an empty list if it cannot be understood."""
    from math_verify import parse
    return parse(f"\\boxed{{{tidy(text)}}}", parsing_timeout=PATIENCE)


def near(gold, answer, errors):
    """Are the numbers of an answer, in any order, as near to the right ones as the errors allow?"""
    golds = positions(gold, 1)
    golds = sorted(zip(map(number, golds), errors * len(golds)))
    found = sorted(map(number, positions(answer, len(golds))))
    return len(found) == len(golds) and all(
        abs(mine - right) <= 1.01 * error for mine, (right, error) in zip(found, golds))


def number(text):
    """The number that a text gives (x = 2 gives 2, and x < 2 none), or nan."""
    from math_verify import errors, utils
    try:
        value = parsed(text)[0]
        return utils.timeout(PATIENCE)(float)(value.rhs if value.is_Equality else value)
    except (Exception, errors.TimeoutException):  # sympy's errors differ with what is no number
        return float("nan")


def tidy(answer):
    """The answer as math-verify wants it: without small spaces and the full stop of its sentence, and e
    as e."""
    answer = re.sub(r"\\[,!;:]|~", "", answer).replace(r"\mathrm{e}", "e")
    return answer.strip().rstrip(" .")


def same_kind(gold, answer):
    """Two things that math-verify does not look at: the base of a numeral (120_5), and relations
    (x <= 14 is not 14)."""
    base = r"(?:^|[,=])[ $]*[0-9A-F.]+_\{?(\d+)\}?[ $.]*(?=,|$)"
    relation = r"\\(?:[lg]eq?(?:slant)?|to|neq?)\b|[<>≤≥≠→]"
    return set(re.findall(base, answer)) <= set(re.findall(base, gold) or ["10"]) and (
        bool(re.search(relation, gold)) or not re.search(relation, answer))


def positions(answer, count):
    """Split "18, 3, 70,000" into its parts, but not (1, 2). A comma may stand between thousands, if the
    count asks for it, and brackets around it all, if there are to be several."""
    answer = re.sub(r"\\left|\\right|\\(?=[{}])|\{,\}", "", answer).rstrip(", \n")
    comma = r",(?![^()\[\]{}]*[)\]}])"  # one that no closing bracket follows before an opening one
    if len(re.split(comma, answer)) == 1 < count:
        answer = answer.strip("()[]{} ")
    if len(re.split(comma, answer)) > count:
        comma += r"(?!\d{3}(?!\d))"
    return re.split(comma, answer)
