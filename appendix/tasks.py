r"""Appendix: the problems of chapter 7, and when an answer is right.

The problems stand here, are generated (puzzles.py), come from the Hugging Face hub, or from a JSONL file
with the fields question and answer. Answers are compared as mathematics by math-verify, not as text.
"""
import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appendix import programs, puzzles
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


def plain_row(row):
    """A problem from a row with the fields question (or problem) and answer."""
    question, answer = row.get("question", row.get("problem")), clean(row.get("answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("has no question; the fields question and answer are needed")
    if not answer:
        raise ValueError("has no answer: the field answer has to be a text or a number")
    return {"question": question, "answers": [answer]}


KINDS = {"Numerical": "a number", "Expression": "an expression", "Equation": "an equation",
         "Tuple": "a tuple", "Interval": "an interval"}


def olympiad(row):
    """A problem of OlympiadBench: what it refers to stands before it, and behind it what is wanted (in
    the structure of its official prompts); some answers may be off by an error.

    Columns: context, question, final_answer (a list), is_multiple_answer, unit, answer_type, error.
    """
    kind, unit, many = KINDS.get(row["answer_type"]), row["unit"], row["is_multiple_answer"]
    wanted = [f"There are several answers{', each of them ' + kind if kind else ''}: give all of them, "
              "separated by commas." if many else f"The answer is {kind}." if kind else ""]
    wanted += [f"It is in units of {unit}; leave the unit out."] if unit else []
    parts = [row["context"], row["question"], " ".join(filter(None, wanted))]
    errors = [float(part) for part in str(row["error"] or "0").split(",")]
    if not clean(row["final_answer"]):
        raise ValueError("has no answer: final_answer has to be a list of texts")
    return {"question": "\n\n".join(part.strip() for part in parts if (part or "").strip()),
            "answers": [clean(row["final_answer"])], "error": max(errors)}


PROGRAM = r"""{question}

{how} When the program is final, give it in one block of code that begins with ```python, and behind it
write \boxed{{done}}."""
READS = "Write a Python program that reads standard input and prints to standard output."
STARTS = "Complete this Python program:\n```python\n{}\n```\n"


def live_code(row):
    """A problem of LiveCodeBench, or None: it is not of the months that the paper evaluates."""
    if not "2024-08-01" <= row["contest_date"][:10] < "2025-02-01":
        return None
    start = row["starter_code"].strip()
    how = STARTS.format(start) if start else READS
    return {"question": PROGRAM.format(question=row["question_content"].strip(), how=how),
            "answers": [], "tests": programs.tests_of(row)}


@dataclass(frozen=True)
class Task:
    """Where the problems are, and how long an answer may be."""

    answer_tokens: int  # paper, appendix C (five numbers may want --answer-tokens)
    # A data set on the Hugging Face hub: (name, arguments of load_dataset). If there is none: OWN.
    source: tuple = ()
    fresh: tuple = ()  # generated ones: (kind of puzzle, patterns)
    read: Callable = plain_row  # a row -> a problem, or None
    group: int = 1  # so many questions make one problem, scored position by position
    form: str = "box"  # how an answer is written (protocol.FORMS)


def hub(name, configuration=None, split="test", **others):
    """A data set on the Hugging Face hub."""
    return name, {"name": configuration, "split": split, **others}


def bench(subject):
    """A part of OlympiadBench."""
    return Task(64, hub("Hothan/OlympiadBench", f"OE_TO_{subject}_en_COMP", "train"), read=olympiad)


CODE_FILES = ["test.jsonl", *(f"test{part}.jsonl" for part in range(2, 6))]  # release_v5
TASKS = {
    # What the collaborator has learned, fresh ones; "reworded": asked in words that it has never met.
    "lists": Task(40, fresh=("list", "trained")), "races": Task(16, fresh=("race", "trained")),
    "plans": Task(40, fresh=("plan", "trained")), "reworded": Task(40, fresh=("list", "kept")),
    "own": Task(16),
    "limo": Task(16, hub("GAIR/LIMO", split="train")),
    "aime25": Task(16, hub("math-ai/aime25")),
    "olympiad-maths": bench("maths"), "olympiad-physics": bench("physics"),
    "gsm8k-x5": Task(16, hub("openai/gsm8k", "main"), group=5),
    "math500": Task(64, hub("HuggingFaceH4/MATH-500")),
    "livecodebench": Task(1024, hub("livecodebench/code_generation_lite", split="train",
                                    data_files=CODE_FILES), read=live_code, form="code"),
}
FIVE = "Solve these problems and return comma-separated answers \\boxed{answer1,..., answer5} :\n"
FRESH = 200  # generated problems of a task
SAMPLES = 128  # problems of five questions, none of them twice (this and the words above: the paper's)


def load(name, data=None):
    """The problems of a task as a list of {"question": str, "answers": [str]}; some have "error", a
    number by which an answer may be off, or "tests" (programs.py) instead of answers.

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
    if task.fresh and data is None:
        kind, patterns = task.fresh
        drawn = [puzzles.fresh(kind, number, patterns) for number in range(FRESH)]
        return [{"question": puzzle.text, "answers": puzzle.answer.split(", ")} for puzzle in drawn]
    own = [(question, {"question": question, "answer": answer}) for question, answer in OWN]
    for where, row in from_file(data) if data is not None else from_hub(task) if task.source else own:
        try:
            problem = task.read(row)
        except KeyError as error:
            raise ValueError(f"{where} has no field {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} {first_line(error)}") from error
        if problem and problem["question"] in seen:
            raise ValueError(f"{where} asks the same as {seen[problem['question']][0]}: remove one of "
                             "them")
        if problem:
            seen[problem["question"]] = where, problem
    problems, size = [problem for _, problem in seen.values()], task.group
    if size == 1:
        return problems
    if len(problems) < size:
        raise ValueError(f"task {name!r} puts {size} questions into a problem, and there are only "
                         f"{len(problems)}")
    problems = random.Random(0).sample(problems, len(problems))
    groups = [problems[i:i + size] for i in range(0, len(problems) - size + 1, size)][:SAMPLES]
    return [{"question": FIVE + "\n".join(f" {k}. {one['question']}" for k, one in enumerate(group, 1)),
             "answers": [one["answers"][0] for one in group]} for group in groups]


def clean(answer):
    """The answer alone, or "" if there is none: GSM8K writes a solution before it, OlympiadBench a list
    around it."""
    parts = answer if isinstance(answer, list) else [answer]
    known = all(type(part) in (str, int, float) for part in parts)
    return ", ".join(map(str, parts)).split("####")[-1].strip() if known else ""


def from_file(path):
    """(where it stands, row) of each line of a JSONL file."""
    for number, line in enumerate(read_text(path, "data file").lstrip("\ufeff").split("\n"), start=1):
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


def from_hub(task):
    """(where it stands, row) of each row of a data set on the Hugging Face hub."""
    name, arguments = task.source
    try:
        # Here, because it takes seconds, and only the hub's tasks need it.
        from datasets import load_dataset
        rows = load_dataset(name, **arguments)
    except Exception as error:  # its errors differ with the version
        raise ValueError(f"the data set {name!r} could not be loaded from the Hugging Face hub "
                         f"({first_line(error)}); give a local file with --data FILE") from error
    return [(f"row {number} of {name!r}", row) for number, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------- grading

def mark(answer, problem):
    """How good is an answer (or a program, or None) to a problem of `load`? (score from 0 to 1, was
    there anything to look at?)"""
    if "tests" in problem and (answer or "").strip():
        return float(all(programs.passes(answer, test) for test in problem["tests"])), True
    return grade(answer, problem["answers"], problem.get("error", 0))


def grade(answer, golds, error=0):
    """Compare an answer with the right ones, position by position.

    Numbers, LaTeX, sets, intervals and so on are compared as mathematics. What cannot be understood is
    wrong. error: so far may a number be off.

    Returns:
        (score from 0 to 1, was there anything to compare?)
    """
    if not golds or not (answer or "").strip():
        return 0.0, False
    given = [answer] if len(golds) == 1 else positions(answer, len(golds))
    found = [same(gold, part, error) for gold, part in zip(golds, given)]
    return sum(filter(None, found)) / len(golds), any(one is not None for one in found)


def same(gold, answer, error=0):
    """Is an answer right? None: it cannot be understood."""
    from math_verify import parse, verify
    mine, theirs = parse(tidy(answer)), parse(tidy(gold))
    if not mine:
        return None
    with contextlib.suppress(TypeError, ValueError, IndexError, AttributeError):
        if error and abs(float(mine[0]) - float(theirs[0])) <= 1.01 * error:
            return True
    return verify(theirs, mine) and same_kind(gold, answer)


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
