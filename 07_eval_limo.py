r"""Chapter 7: does collaboration help? Accuracy against the budget of sequential forward passes.

The problem. Two workers write two tokens per pass. That is worth something only if, after the same number of passes, the
answer is right more often (paper, section 4). So: many problems, several methods, the same budgets for all, and a curve.

Every method is made of chapter 6's loop. The first five rows are the paper's method and its ablations (appendix E.1):

    hogwild:W            workers who see each other, in the combined layout; hogwild:1 is one worker who is told the rules
    contiguous:W         the same in the contiguous layout
    interleaved:W        the same, but they see each other's steps only when they are finished
    no-check:W           hogwild without the question about redundant work
    re-encode:W          hogwild, but finished steps are encoded anew, not rotated
    baseline             one worker, the plain prompt; asked for its answer when the budget ends (early stopping)
    no-early-stop        the same, but an answer counts only if it was written in time
    self-consistency:W   independent workers; the answer is given with all their text in view
    skeleton, skeleton:W Skeleton-of-Thought: an outline, a thread per point (all at once, or W taking turns), then one
                         worker who reads all threads and continues

One run answers at every budget on its way: the answer is asked for in the cache that is there, and then the run goes on as
though nobody had asked (chapter 6). Results are written as they come, a line each, and what is there is not done again.

What is counted are passes in which somebody writes. Prompts, re-encoding and asking are not (paper, section 4.1); seconds
leave out the first prompt and the asking.

What to notice: the report gives intervals. With a handful of problems they are wide, and a model of 135 million parameters
solves next to nothing, alone or in company. Left out: LiveCodeBench, which runs code.

Run it: python 07_eval_limo.py                              (a minute: two methods, a few problems that stand in this file)
        python 07_eval_limo.py --task limo --model Qwen/QwQ-32B --methods baseline hogwild:2 hogwild:4 --out limo.jsonl
        python 07_eval_limo.py --report limo.jsonl --png limo.png
"""
import glob
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from writing to one file
    fcntl = None

import torch
from accelerate import PartialState
from math_verify import parse, verify
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.distributed import DistributedConfig

shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
generate = import_module("06_generate")

# --------------------------------------------------------------------------------------------------------------- tasks

PROBLEMS = [  # (tests/test_07_eval_limo.py finds the answers by trying everything)
    ("A shelf holds 12 books. How many books do 4 shelves hold?", "48"),
    ("Ann has 15 coins, Bob has 8 coins more than Ann. How many coins do they have together?", "38"),
    ("How many whole numbers from 1 to 100 can be divided by 3 or by 5?", "47"),
    ("What is the sum of all whole numbers from 1 to 20?", "210"),
    ("How many ways are there to pay 20 cents with coins of 1, 5 and 10 cents?", "9"),
    ("Two dice are rolled. What is the probability that the two numbers add up to 7?", "\\frac{1}{6}"),
    ("The sides of a rectangle are whole numbers, and its perimeter is 20. What is the largest area it can have?", "25"),
    ("What is the smallest whole number above 1 that leaves the remainder 1 when divided by 2, by 3, by 4 and by 5?", "61"),
    ("What is the last digit of 7^{100}?", "1"),
]
GSM8K_PROMPT = "Solve these problems and return comma-separated answers \\boxed{answer1,..., answer5} :\n"  # the paper's


@dataclass(frozen=True)
class Task:
    """Where the problems are, and how long an answer may be."""

    answer_tokens: int  # most tokens of an answer that is asked for (paper, appendix C; five numbers may want --answer-tokens)
    source: tuple = ()  # data set on the Hugging Face hub: (name, configuration, split)
    question: str = "question"  # its columns
    answer: str = "answer"
    group: int = 1  # so many questions make one problem, scored position by position


TASKS = {
    "own": Task(16),
    "limo": Task(16, ("GAIR/LIMO", None, "train")),
    "aime25": Task(16, ("math-ai/aime25", None, "test"), question="problem"),
    "olympiad-maths": Task(64, ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), answer="final_answer"),
    "olympiad-physics": Task(64, ("Hothan/OlympiadBench", "OE_TO_physics_en_COMP", "train"), answer="final_answer"),
    "gsm8k-x5": Task(16, ("openai/gsm8k", "main", "test"), group=5),
    "math500": Task(64, ("HuggingFaceH4/MATH-500", None, "test"), question="problem"),
}
GSM8K_SAMPLES = 128


def load_problems(name, data=None):
    """The problems of a task as a list of {"id": int, "question": str, "answers": [str]}.

    Args:
        name: one of TASKS.
        data: a JSONL file with the fields question and answer, instead of the task's own source.
    Raises:
        ValueError: one sentence on what is wrong with the file (and in which line), or that the hub is out of reach.
    """
    task = TASKS[name]
    if data is not None:
        rows = read_jsonl_problems(data)
    elif name == "own":
        rows = PROBLEMS
    else:
        rows = [(row[task.question], row[task.answer]) for row in hub_rows(task)]
    rows = [(question, clean_answer(answer)) for question, answer in rows]
    if task.group > 1:  # the paper: 128 samples of 5 questions, none of them twice
        rows = random.Random(0).sample(rows, len(rows))[:GSM8K_SAMPLES * task.group]
        groups = [rows[i:i + task.group] for i in range(0, len(rows) - task.group + 1, task.group)]
        if not groups:
            raise ValueError(f"task {name!r} puts {task.group} questions into a problem, and there are only {len(rows)}")
        rows = [(GSM8K_PROMPT + "\n".join(f" {k}. {question}" for k, (question, _) in enumerate(group, start=1)),
                 [answer for _, answer in group]) for group in groups]
    return [{"id": i, "question": question, "answers": answer if isinstance(answer, list) else [answer]}
            for i, (question, answer) in enumerate(rows)]


def clean_answer(answer):
    """The answer alone, or "" if it is none: GSM8K writes a solution before it, OlympiadBench a list around it."""
    parts = answer if isinstance(answer, list) else [answer]
    known = all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in parts)
    return ", ".join(map(str, parts)).split("####")[-1].strip() if known else ""


def read_jsonl_problems(path):
    """(question, answer) of each line of a JSONL file."""
    rows, seen = [], {}
    for number, line in enumerate(generate.read_text(path, "data file").lstrip("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path!r} is not JSON ({error}); each line has to be an object with the fields "
                             "question and answer") from error
        row = row if isinstance(row, dict) else {}
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError(f"line {number} of {path!r} has no question; each line needs the fields question and answer")
        if not clean_answer(row.get("answer")):
            raise ValueError(f"line {number} of {path!r} has no answer: the field answer has to be a text or a number")
        if row["question"] in seen:
            raise ValueError(f"line {number} of {path!r} asks the same as line {seen[row['question']]}: remove one of them")
        seen[row["question"]] = number
        rows.append((row["question"], row["answer"]))
    if not rows:
        raise ValueError(f"there is no problem in {path!r}; each line has to be an object with the fields question and answer")
    return rows


def hub_rows(task):
    """Rows of a data set on the Hugging Face hub."""
    name, configuration, split = task.source
    try:
        from datasets import load_dataset  # here, because it takes seconds and only the hub's tasks need it
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # its errors differ with the version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"the data set {name!r} could not be loaded from the Hugging Face hub ({reason}); give a local file "
                         "with --data FILE") from error


# ------------------------------------------------------------------------------------------------------------- grading

def grade(answer, golds):
    """Compare an answer with the right ones, position by position: (score from 0 to 1, was there anything to compare?).

    Numbers, LaTeX, sets, intervals and so on are compared as mathematics by math-verify, not as text. What cannot be
    understood is wrong.
    """
    if answer is None or not answer.strip():
        return 0.0, False
    given = [answer] if len(golds) == 1 else positions(answer, len(golds))
    understood = [parse(tidy(part)) for part in given]
    scores = [bool(mine) and verify(parse(tidy(gold)), mine) and same_kind(gold, part)
              for gold, mine, part in zip(golds, understood, given)]
    return sum(scores) / len(golds), any(map(bool, understood))


def tidy(answer):
    """The answer as math-verify wants it: boxed, without small spaces and the full stop of its sentence, and e as e."""
    answer = re.sub(r"\\[,!;:]|~", "", answer).replace(r"\mathrm{e}", "e")
    return f"\\boxed{{{answer.strip().rstrip('.')}}}"


def same_kind(gold, answer):
    """Two things that math-verify does not look at: the base of a numeral (120_5), and relations (x <= 14 is not 14)."""
    bases = [re.fullmatch(r"[0-9A-F]+_\{?(\d+)\}?", text.strip(" $.")) for text in (gold, answer)]
    relations = [re.findall(r"\\(?:leq?|geq?|to|neq?|approx)\b|[<>]", text) for text in (gold, answer)]
    named = [base[1] if base else "10" for base in bases]
    return (named[0] == named[1] or (bases[1] is None and bases[0] is not None)) and (bool(relations[0]) or not relations[1])


def positions(answer, count):
    """Cut "18, 3, 70,000" into its parts, but not (1, 2). A comma may stand between thousands, if the count asks for it."""
    answer = re.sub(r"\\left|\\right", "", answer).replace("{,}", "").replace("\\{", "{").replace("\\}", "}").strip()
    outer = r",(?![^()\[\]{}]*[)\]}])"  # a comma that no closing bracket follows before an opening one
    if len(re.split(outer, answer)) == 1:
        answer = answer.strip("()[]{} ")  # all of it in brackets
    parts = re.split(outer, answer)
    parts = parts if len(parts) <= count else re.split(r",(?!\d{3}(?!\d))", answer)
    return [part.strip() for part in parts]


# ------------------------------------------------------------------------------------------------------------- methods

# One writer may end its thoughts, its text, and write headings; there are no steps to keep apart.
SOLO = {"layout": "independent", "forbid": [], "forbid_special": False, "check_every": 0}


class Reencode(generate.Hogwild):
    """Ablation: a finished step is encoded anew at the end of the history. It sees the history then, and nothing else."""

    def _to_history(self, w):
        self.cache.cut(w.block, 0)
        self._feed([([layouts.HISTORY], w.ids[:-1])])


class Prompted(generate.Hogwild):
    """Workers who do not see each other, each with a prompt of its own.

    Args:
        prompts: one text per worker, all that stands before its own words. None: the usual prompt, for all.
        at_once: so many workers write in a pass, taking turns. None: all.
    """

    def __init__(self, *arguments, prompts=None, at_once=None, **others):
        self.prompts, self.at_once, self.next = prompts, at_once, 0  # next: whose turn it is
        super().__init__(*arguments, **others)

    def _openings(self):
        """What all prompts have in common is encoded once, for all; the rest of a prompt opens its worker's block."""
        if self.prompts is None:
            return super()._openings()
        ids = [self.encode(prompt, special=self.tokenizer.chat_template is None) for prompt in self.prompts]
        shortest = min(map(len, ids)) - 1  # a block opens with a token at least
        common = next((i for i in range(shortest) if len({sequence[i] for sequence in ids}) > 1), shortest)
        return ids[0][:common], [sequence[common:] for sequence in ids]

    def _writing(self):
        writing = super()._writing()
        if self.at_once is None:
            return writing
        chosen = sorted(writing, key=lambda w: (w.index - self.next) % len(self.workers))[:self.at_once]
        self.next = chosen[-1].index + 1
        return chosen


class Samples(Prompted):
    """Independent samples: a \\boxed{} ends its worker, not the run. The answer is asked for with all their text in view."""

    def _answered(self, w, answer):
        w.finished = w.finished or answer is not None


class Skeleton:
    """Skeleton-of-Thought (paper, section 4.1 and appendix D.2), in three stages, each a run of chapter 6's loop.

    An outline; a thread per point of it, which do not see each other; then one worker who has read all threads goes on.
    To the evaluation it looks like any other run: advance, answer, ending, passes. While the threads are being written, an
    answer is given by the last one, with the others' prompts and words in view.
    """

    OUTLINE = r"""Plan how to answer the question below, without answering it. Write a numbered list of 3 to 10 points (1., 2.,
3., ...) that can be worked on independently of each other, each of 3 to 5 words.

{problem}"""
    POINT = r"""This question is answered by several writers, each of whom works on one point of a plan.

{problem}

The plan:
{outline}

You work on point {number} and on no other. Reason step by step, and put the result of your point within \boxed{}."""
    LONGEST_OUTLINE, MOST_POINTS = 128, 10

    def __init__(self, model, tokenizer, problem, settings, forward=None, at_once=None):
        self.problem, self.settings, self.at_once = problem, settings, at_once
        self.arguments, self.tokenizer, self.forward = (model, tokenizer, problem), tokenizer, forward
        self.passes, self.generated, self.texts = [], 0, []  # texts: what the stages before this one wrote
        self.stage_number, self.points, self.stuck = 1, None, None  # stuck: why the next stage could not begin
        self._begin(Prompted, [self._chat(self.OUTLINE) + "1."], min(self.LONGEST_OUTLINE, settings.max_passes))

    def _chat(self, template, **fill):
        """A template, filled in, in the model's chat format."""
        for key, value in {**fill, "problem": self.problem}.items():
            template = template.replace("{" + key + "}", value)
        return template + "\n" if self.tokenizer.chat_template is None else generate.chat(self.tokenizer, "", template)

    def _begin(self, kind, prompts, passes, at_once=None):
        """Start a stage of so many passes at most, with a worker per prompt."""
        settings = replace(self.settings, workers=generate.NAMES[:len(prompts)], max_passes=passes)
        self.stage = kind(*self.arguments, settings, self.forward, prompts=prompts, at_once=at_once)

    @property
    def ending(self):
        """As of a run: None while it goes on."""
        if len(self.passes) >= self.settings.max_passes:
            return "passes"
        return self.stage.ending if self.stage_number == 3 else self.stuck

    @property
    def boxed(self):
        """The answer of the last stage, once it is written."""
        return self.stage.boxed if self.stage_number == 3 else None

    def advance(self):
        """One forward pass of the present stage, and on to the next one where that is over."""
        record = self.stage.advance()
        self.passes.append(record)
        self.generated += len(record["sampled"])
        if self.stage.ending is not None and self.ending is None:
            try:
                self._next_stage(self.settings.max_passes - len(self.passes))
            except ValueError:  # its prompt is longer than the model's context
                self.stuck = "context"
        return record

    def _next_stage(self, passes):
        texts = [text_of(self.stage, w).strip() for w in self.stage.workers]
        if self.stage_number == 1:  # the outline is there
            outline = "1. " + texts[0]
            self.points = (re.findall(r"^\s*\d+[.)]\s*(\S.*)$", outline, re.MULTILINE) or [outline])[:self.MOST_POINTS]
            prompts = [self._chat(self.POINT, outline=outline, number=str(k)) + f"{k}. {point}"
                       for k, point in enumerate(self.points, start=1)]
            self._begin(Samples, prompts, passes, self.at_once)
        else:
            threads = "\n\n".join(f"{k}. {point} {text}" for k, (point, text) in enumerate(zip(self.points, texts), start=1))
            self._begin(Prompted, [self._chat(generate.SOLO_PROMPT) + threads + "\n\n"], passes)
        self.texts += texts
        self.stage_number += 1

    def answer(self):
        """The answer now, from what the present stage has in view."""
        return self.stage.answer()


METHODS = {  # name -> (what runs it, settings that differ, workers unless the name says otherwise)
    "hogwild": (generate.Hogwild, {}, 2),
    "contiguous": (generate.Hogwild, {"layout": "contiguous"}, 2),
    "interleaved": (generate.Hogwild, {"layout": "interleaved"}, 2),
    "no-check": (generate.Hogwild, {"check_every": 0}, 2),
    "re-encode": (Reencode, {}, 2),
    "baseline": (generate.Hogwild, SOLO, 1),
    "no-early-stop": (generate.Hogwild, SOLO, 1),
    "self-consistency": (Samples, SOLO, 2),
    "skeleton": (Skeleton, SOLO, None),
}


def method_of(spec):
    """Take a method's name apart: hogwild:4 is ("hogwild", 4). Raises ValueError if there is no such method."""
    name, colon, count = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose among {', '.join(METHODS)}, with :W for W workers where wanted")
    workers = METHODS[name][2]
    if colon:
        most = 1 if workers == 1 else len(generate.NAMES)
        if not re.fullmatch("[0-9]{1,2}", count) or not 1 <= int(count) <= most:
            raise ValueError(f"{spec[:40]!r} does not name a number of workers from 1 to {most}")
        workers = int(count)
    return name, workers


def canonical(spec):
    """The one name of a method in tables and files."""
    name, workers = method_of(spec)
    return name if workers is None or METHODS[name][2] == 1 else f"{name}:{workers}"


def start_run(spec, model, tokenizer, question, settings, forward=None):
    """A run of a method on a question; `settings` as of chapter 6, of which the method changes what is its own."""
    name, workers = method_of(spec)
    kind, differs, _ = METHODS[name]
    settings = replace(settings, workers=generate.NAMES[:workers or 1], **differs)
    forward = forward or generate.best_forward(model.device)
    extra = {"at_once": workers} if kind is Skeleton else {}
    return kind(model, tokenizer, question, settings, forward, **extra)


# ------------------------------------------------------------------------------------------------------ the evaluation

def evaluate(run, golds, budgets, early_stop=True):
    """One run of a method on a problem, asked at every budget (in passes, increasing) on its way: a JSON-ready dict.

    What the asking takes counts for nobody: neither as passes (paper, section 4.1) nor as seconds.
    """
    answers, seconds, step_ends = {}, 0.0, []
    for budget in budgets:
        while run.ending is None and len(run.passes) < budget:
            start = time.perf_counter()
            record = run.advance()
            seconds += time.perf_counter() - start
            step_ends += [(len(run.passes), closed["worker"]) for closed in record["closed"]]
        answer = run.answer() if early_stop else run.boxed
        score, understood = grade(answer, golds)
        answers[str(budget)] = {"answer": answer, "score": score, "understood": understood, "passes": len(run.passes),
                                "seconds": seconds}
    return {"answers": answers, "passes": len(run.passes), "tokens": run.generated, "ending": run.ending,
            "step_ends": step_ends, "seconds": seconds, "text": transcript(run)}


def transcript(run):
    """What was written: finished steps in their order, then what every worker has unfinished."""
    if isinstance(run, Skeleton):
        return run.texts + transcript(run.stage)
    if not run.layout.moves:
        return [text_of(run, w) for w in run.workers]
    finished = [closed["text"] for record in run.passes for closed in record["closed"]]
    return finished + [run.decode(w.ids) for w in run.workers]


def text_of(run, w):
    """All that worker w has written, without the end of text."""
    closed = [closed["text"] for record in run.passes for closed in record["closed"] if closed["worker"] == w.index]
    return "".join(closed) + run.decode([i for i in w.ids if i not in run.end_ids])


class Results:
    """A JSONL file that grows by a line per run: first the settings, then results.

    Args:
        path: the file; of several processes each writes one of its own beside it, and all of them are read.
        settings: what all results in the file have in common (a dict). If the file is there, it has to be the same.
    Raises:
        ValueError: the file belongs to other settings (the message names the difference), or is none of ours.
    """

    def __init__(self, path, settings, rank=0, processes=1, read_only=False):
        self.path = Path(path) if rank == 0 else Path(f"{path}.rank{rank}-of-{processes}")
        self.found, self.file = [], None
        if not read_only:
            self.file = open(self.path, "a", encoding="utf-8")
            try:
                if fcntl:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or this process ends
            except OSError as error:
                raise ValueError(f"another process is writing to {str(self.path)!r}: wait for it, or take another "
                                 "--out") from error
        for file in files_of(path):
            theirs, results, whole = read_results(file)
            for key in sorted({*settings, *(theirs or {})}):
                if theirs is not None and theirs.get(key) != settings.get(key):
                    raise ValueError(f"{str(file)!r} holds results with {key} {theirs.get(key)!r}, not {settings.get(key)!r}: "
                                     "write to another file (--out)")
            self.found += results
            if file == self.path and not read_only and whole < file.stat().st_size:  # a crash cut the last line short
                self.file.truncate(whole)
        if self.file and self.path.stat().st_size == 0:
            self._line({"format": FORMAT, **settings})

    @property
    def done(self):
        """(method, problem, seed) of all results that are there. What failed is tried again."""
        return {key_of(result) for result in self.found if "error" not in result}

    def add(self, result):
        """Write a result, down to the disk."""
        self.found.append(result)
        if self.file:
            self._line(result)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.file:
            self.file.close()

    def _line(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


FORMAT = "hogwild-eval-1"


def key_of(result):
    """What a result is the result of."""
    return result["method"], result["problem"], result["seed"]


def one_each(results):
    """Every result once; where a run failed and was tried again, the later one."""
    found = {}
    for result in results:
        if "error" not in result or key_of(result) not in found:
            found[key_of(result)] = result
    return list(found.values())


def files_of(path):
    """The files of an evaluation: the one of that name, and those of other processes beside it."""
    path = Path(path)
    return [file for file in (path, *sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*-of-*"))) if file.exists()]


def read_results(path):
    """(settings, results, bytes that are whole) of a file. settings is None if there is not even a whole first line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            if rows[0]["format"] != FORMAT or not rows[0]["budgets"]:
                raise KeyError("format")
            if number > 1 and "error" not in rows[-1]:
                key_of(rows[-1]), [rows[-1]["answers"][str(budget)]["score"] for budget in rows[0]["budgets"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is no line of an evaluation's results; write to another file "
                             "(--out)") from error
    start = f'{{"format": "{FORMAT}"'.encode()
    if not rows and data[:len(start)] != start[:len(data)]:
        raise ValueError(f"{str(path)!r} is no file of an evaluation's results; write to another file (--out)")
    settings = {key: value for key, value in rows[0].items() if key != "format"} if rows else None
    return settings, rows[1:], whole


def run_all(todo, problems, model, tokenizer, settings, budgets, results, console, forward):
    """Run (method, problem, seed) for each in `todo`; a fault in one of them is recorded, and the others go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar, faults = progress.add_task("", total=len(todo)), 0
        for spec, number, seed in todo:
            progress.update(bar, description=running_accuracy(results.found, budgets[-1]) + f"now: {spec}, problem {number}")
            problem, result = problems[number], {"method": spec, "problem": number, "seed": seed}
            try:
                # (worker i draws with the run's seed + i, so the seeds of two runs are as far apart as there can be workers)
                drawn = replace(settings, seed=seed * len(generate.NAMES))
                run = start_run(spec, model, tokenizer, problem["question"], drawn, forward)
                result.update(evaluate(run, problem["answers"], budgets, early_stop=spec != "no-early-stop"))
                faults = 0
            except Exception as error:  # whatever it is: one problem of a thousand
                result["error"] = f"{type(error).__name__}: {error}"
                faults += 1
            results.add(result)
            progress.advance(bar)
            if faults == 5:
                raise RuntimeError(f"five runs in a row failed, so the others would, too: {result['error']}")


def running_accuracy(results, budget):
    """What is right so far, in a few words, for the progress bar."""
    scores = {}
    for result in results:
        scores.setdefault(result["method"], []).append(0.0 if "error" in result else result["answers"][str(budget)]["score"])
    return "".join(f"{method} {mean(column):.0%} · " for method, column in scores.items())


# ---------------------------------------------------------------------------------------------------------- the report

def interval(share, count):
    """95 % interval of a share seen in `count` trials (Wilson's): (low, high)."""
    z = 1.959964
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def summary(results, budgets):
    """Per method, over the problems that all methods have done: what the report prints.

    Several seeds of one problem are no new problem: they are averaged first, and intervals count problems.
    """
    methods = list(dict.fromkeys(result["method"] for result in results))
    common = set.intersection(*({key_of(r)[1:] for r in results if r["method"] == method} for method in methods))
    if not common:
        raise ValueError("there is no problem yet that all methods have done, so there is nothing to compare")
    problems = sorted({problem for problem, _ in common})
    table = {}
    for method in methods:
        mine = [result for result in results if result["method"] == method and key_of(result)[1:] in common]
        good = [result for result in mine if "error" not in result]
        scores = [[mean([0.0 if "error" in r else r["answers"][str(b)]["score"] for r in mine if r["problem"] == problem])
                   for problem in problems] for b in budgets]  # [budgets][problems]; a fault is no right answer
        final = [result["answers"][str(budgets[-1])] for result in good]
        right = [[entry["passes"] for entry in result["answers"].values() if entry["score"] == 1] for result in good]
        table[method] = {
            "runs": len(mine), "count": len(problems), "scores": scores, "accuracy": [mean(row) for row in scores],
            "seconds": [mean([result["answers"][str(b)]["seconds"] for result in good]) for b in budgets],
            "none": sum(not (entry["answer"] or "").strip() for entry in final),
            "not_understood": sum(bool((entry["answer"] or "").strip()) and not entry["understood"] for entry in final),
            "faults": len(mine) - len(good), "context": sum(result["ending"] == "context" for result in good),
            "passes_to_right": mean([passes[0] for passes in right if passes]) if any(right) else None,
        }
    return table


def mean(numbers):
    """The mean; 0 of nothing."""
    return sum(numbers) / len(numbers) if numbers else 0.0


def passes_to_reach(level, budgets, accuracy):
    """The number of passes at which `accuracy` (measured at `budgets`) reaches `level`, between two budgets in proportion.

    None if that is not between two budgets that were measured.
    """
    points = list(zip(budgets, accuracy))
    for (before, low), (after, high) in zip(points, points[1:]):
        if low < level <= high:
            return before + (level - low) / (high - low) * (after - before)
    return None


def relative_passes(budgets, accuracy, baseline):
    """Passes that a method takes to the accuracy that it and the baseline reach, as a multiple of the baseline's."""
    level = min(max(accuracy), max(baseline))
    mine, theirs = (passes_to_reach(level, budgets, curve) for curve in (accuracy, baseline))
    return "–" if mine is None or theirs is None else f"{mine / theirs:.2f} (at {level:.0%})"


def difference(scores, baseline, draws=2000):
    """Mean of score minus baseline's over the same problems, and its 95 % interval from redrawing problems (bootstrap)."""
    pairs = [mine - theirs for mine, theirs in zip(scores, baseline)]
    chance = random.Random(0)
    means = sorted(mean(chance.choices(pairs, k=len(pairs))) for _ in range(draws))
    return mean(pairs), means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def report(console, settings, results, png=None):
    """Print the tables of an evaluation, and draw its curves."""
    budgets, table = settings["budgets"], summary(results, settings["budgets"])
    base, count = table.get("baseline"), next(iter(table.values()))["count"]
    data = f" from {settings['data']}" if settings["data"] else ""
    lines = [f"{settings['model']} on {settings['task']}{data}, the {count} problems that all methods have done", "",
             "right after so many passes, with the 95 % interval of the share:",
             f"  {'method':20}{'runs':>5}" + "".join(f"{budget:>16,}" for budget in budgets)]
    for method, row in table.items():
        spans = [interval(accuracy, row["count"]) for accuracy in row["accuracy"]]
        cells = [f"{accuracy:.0%} ({low:.0%}–{high:.0%})" for accuracy, (low, high) in zip(row["accuracy"], spans)]
        lines.append(f"  {method:20}{row['runs']:>5}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", "At the largest budget: difference from the baseline on the same problems (95 % interval); passes to the",
              "accuracy that both reach, as a multiple of the baseline's; mean passes to a right answer, of the runs that gave",
              "one; runs without an answer, with one that was not understood, that failed, that the model's context ended:",
              f"  {'method':20}{'difference':>22}{'passes':>16}{'to right':>10}{'none':>6}{'not understood':>16}{'faults':>8}"
              f"{'context':>9}"]
    for method, row in table.items():
        needed = "–" if row["passes_to_right"] is None else f"{row['passes_to_right']:.0f}"
        ratio = change = "–"
        if base and row is not base:
            ratio = relative_passes(budgets, row["accuracy"], base["accuracy"])
            change = "{:+.0%} ({:+.0%} – {:+.0%})".format(*difference(row["scores"][-1], base["scores"][-1]))
        lines.append(f"  {method:20}{change:>22}{ratio:>16}{needed:>10}{row['none']:>6}{row['not_understood']:>16}"
                     f"{row['faults']:>8}{row['context']:>9}")
    console.print("\n" + "\n".join(lines) + "\n", soft_wrap=True, markup=False)
    if png:
        draw(png, settings, table)


DASHED = ("baseline", "no-early-stop", "self-consistency", "skeleton")


def draw(png, settings, table):
    """Accuracy against passes, and against seconds (the paper's figures 3 to 6, and 19), as a PNG."""
    import matplotlib  # here, because it takes a second
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), sharey=True, constrained_layout=True)
    colours = matplotlib.colormaps["tab20"].colors
    for number, (method, row) in enumerate(table.items()):
        low, high = zip(*(interval(accuracy, row["count"]) for accuracy in row["accuracy"]))
        # (the strong colours of the palette first, then its pale ones)
        style = {"color": colours[2 * number % 20 + number // 10 % 2], "marker": "o",
                 "linestyle": "--" if method.startswith(DASHED) else "-"}
        for axis, x in zip(axes, (settings["budgets"], row["seconds"])):
            axis.plot(x, row["accuracy"], label=f"{method} (n = {row['count']})", **style)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.06)
    for axis, label in zip(axes, ("sequential forward passes", "mean seconds per problem, on the machine of the run")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_xticks(settings["budgets"])
    axes[0].set_ylabel("accuracy, with 95 % intervals")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(f"{settings['model']} on {settings['task']}")
    figure.savefig(png, dpi=130)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------- the command line

def parse_arguments(argv):
    """The command line, checked as far as that goes without a model."""
    parser = generate.Parser(description="Accuracy of Hogwild! Inference and its baselines against the budget of passes.")
    what = parser.add_argument_group("what")
    what.add_argument("--task", default="own", help=f"{', '.join(TASKS)} (default: own, the problems in this file)")
    what.add_argument("--data", metavar="FILE", help="a local JSONL file with question and answer, instead of the hub's data")
    what.add_argument("--methods", nargs="+", default=["baseline", "hogwild:2"], metavar="METHOD",
                      help=f"{', '.join(METHODS)}; with :W for W workers")
    what.add_argument("--budgets", type=int, nargs="+", metavar="PASSES", help="default: 32 64; with --model 256 ... 4096")
    what.add_argument("--limit", type=int, metavar="N", help="the first N problems only (default: 3 of task own, else all)")
    what.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="all of it once per seed (default: 0)")
    how = parser.add_argument_group("how")
    how.add_argument("--model", metavar="NAME", help="hub name, local folder, or GGUF file (default: the bundled SmolLM2-135M)")
    how.add_argument("--device", help="cpu, cuda, mps (default: the best one there is)")
    how.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    how.add_argument("--attention", default="auto", choices=["auto", "torch", "triton"])
    how.add_argument("--tensor-parallel", action="store_true",
                     help="under torchrun: shard the model over the processes, instead of the problems")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--answer-tokens", type=int, metavar="N", help="length of an answer (default: the task's)")
    how.add_argument("--check-every", type=int, default=1024, metavar="N", help="tokens between checks for redundant work")
    files = parser.add_argument_group("files")
    files.add_argument("--out", default="eval.jsonl", metavar="FILE", help="results are kept, and found, here (eval.jsonl)")
    files.add_argument("--report", nargs="+", metavar="FILE", help="only report on these results")
    files.add_argument("--png", metavar="FILE", help="draw the curves")
    args = parser.parse_args(argv)
    if args.task not in TASKS:
        raise ValueError(f"there is no task {args.task!r}; choose one of {', '.join(TASKS)}")
    args.methods = list(dict.fromkeys(map(canonical, args.methods)))
    args.budgets = args.budgets or ([32, 64] if args.model is None else [256, 512, 1024, 2048, 4096])
    if args.budgets[0] < 1 or any(b <= a for a, b in zip(args.budgets, args.budgets[1:])):
        raise ValueError(f"budgets have to be increasing numbers of passes, not {' '.join(map(str, args.budgets))}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
    if args.greedy and len(args.seeds) > 1:
        raise ValueError("greedy runs do not depend on the seed: give one")
    if args.png and Path(args.png).suffix != ".png":
        raise ValueError(f"--png draws a PNG, so the file has to end in .png, not as {args.png!r} does")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"a seed is given twice: {' '.join(map(str, args.seeds))}")
    for path in filter(None, (args.png, None if args.report else args.out)):
        generate.check_writable(path)
    return args


def common_settings(args):
    """What all results of a file must have in common."""
    data = None
    if args.data:
        data = f"{Path(args.data).name} ({hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:12]})"
    return {"model": args.model or shared_cache.BUNDLED, "dtype": args.dtype, "task": args.task, "data": data,
            "budgets": args.budgets, "greedy": args.greedy, "check_every": args.check_every,
            "answer_tokens": TASKS[args.task].answer_tokens if args.answer_tokens is None else args.answer_tokens}


def run_command(args, console):
    """Run what is not there yet, and report on everything.

    Under torchrun, either every process takes its share of the runs and writes a file of its own; or (tensor parallel) each
    holds a share of every weight, all go through the same runs, and the first one writes.
    """
    # (whoever is ready first waits for the others, however long they take)
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1  # set by torchrun
    team = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)) if many else None
    rank, processes = (team.process_index, team.num_processes) if team else (0, 1)
    if args.tensor_parallel and not team:
        raise ValueError("--tensor-parallel shards a model over several processes: start it with torchrun --nproc-per-node N")
    console.quiet = rank > 0
    problems = load_problems(args.task, args.data)
    common = common_settings(args)
    settings = generate.Settings(max_passes=args.budgets[-1], greedy=args.greedy, check_every=args.check_every,
                                 answer_tokens=common["answer_tokens"])
    for seed in args.seeds:
        replace(settings, seed=seed * len(generate.NAMES))  # says what is wrong with it
    limit = args.limit or (3 if args.task == "own" and not args.data else len(problems))
    problems = problems[:limit]
    wanted = [(method, problem["id"], seed) for problem in problems for seed in args.seeds for method in args.methods]
    with Results(args.out, common, rank, processes, read_only=args.tensor_parallel and rank > 0) as results:
        run_missing(args, common, settings, problems, wanted, results, team, console)
    if rank:
        return
    found = one_each(result for file in files_of(args.out) for result in read_results(file)[1])
    report(console, common, found, args.png)
    failed = [result for result in found if "error" in result and key_of(result) in wanted]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(wanted)} runs failed (the same command tries them again), the first one: "
                           f"{failed[0]['error']}")
    console.print(f"[OK] {len(wanted)} runs are in {args.out}, each answered at {len(args.budgets)} budgets", markup=False,
                  soft_wrap=True)


def run_missing(args, common, settings, problems, wanted, results, team, console):
    """Load the model and run those of `wanted` that are not among the results yet."""
    todo = [key for key in wanted if key not in results.done]
    console.print(f"{len(problems)} problems, {len(args.methods)} methods, {len(args.seeds)} seeds: {len(todo)} runs to "
                  f"do; results in {args.out}", soft_wrap=True, markup=False)
    if team:
        team.wait_for_everyone()  # before anybody writes: all have to find the same runs to do
    if todo:
        device = args.device or (str(team.device) if team else generate.best_device())
        if device == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # as in chapter 6
        forward = generate.best_forward(device, args.attention)
        if args.tensor_parallel:
            plan = DistributedConfig(tp_plan="auto")  # transformers' own: which weight is cut in which direction
            model, tokenizer = shared_cache.load_model(args.model, device, args.dtype, distributed_config=plan)
            heads = model.config.get_text_config().num_key_value_heads
            if heads % team.num_processes:
                raise ValueError(f"{heads} key heads cannot be shared evenly by {team.num_processes} processes")
        else:
            model, tokenizer = shared_cache.load_model(args.model, device, args.dtype)
            shared_cache.pack_linears(model)
        with team.split_between_processes(todo) if team and not args.tensor_parallel else nullcontext(todo) as mine:
            run_all(mine, problems, model, tokenizer, settings, args.budgets, results, console, forward)
    if team:
        team.wait_for_everyone()
        torch.distributed.destroy_process_group()


def main(argv=None):
    """Run the command line; returns the exit code."""
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat it like Ctrl-C
    try:
        args = parse_arguments(argv)
        if args.report:
            files = dict.fromkeys(file for path in args.report for file in files_of(path) or [path])  # each once
            found = [read_results(file) for file in files]
            results = one_each(result for _, rows, _ in found for result in rows)
            if not results:
                raise ValueError(f"there are no results in {', '.join(args.report)}")
            if any(settings != found[0][0] for settings, _, _ in found):
                raise ValueError("these files hold results of different settings: report on one at a time")
            report(console, found[0][0], results, args.png)
        else:
            run_command(args, console)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was done is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


# Exercises
# 1. Add a method: workers who see each other, but are told nothing about it. What do you expect?
# 2. From which number of problems on could two methods with 60 % and 70 % be told apart? Why does it help that both have done
#    the same problems? (`interval`, `difference`)
# 3. Majority voting needs three workers and no model. Compare it with the answer that self-consistency gives.

if __name__ == "__main__":
    sys.exit(main())
