r"""Chapter 7: does collaboration help? Accuracy against the budget of sequential forward passes.

The problem. Two workers write two tokens per pass. That is worth something only if, after the same number of passes, the
answer is right more often (paper, section 4). So: many problems, several methods, the same budgets for all, and a curve.

Every method is chapter 6's loop with another layout, or another prompt:

    hogwild:W            workers who see each other, in the combined layout; contiguous:W, interleaved:W (step by step only)
    no-check:W           hogwild without the question about redundant work     } the paper's ablations (appendix E.1);
    re-encode:W          finished steps are encoded anew, not rotated          } hogwild:1 is one worker with the rules
    baseline             one worker, the plain prompt; asked for its answer when the budget ends (early stopping)
    no-early-stop        the same, but an answer counts only if it was written in time
    self-consistency:W   independent workers; the answer is given with all their text in view
    skeleton, skeleton:W Skeleton-of-Thought: an outline, a thread per point (all at once, or W taking turns), then one
                         worker who reads all threads and continues

One run answers at every budget on its way: the answer is asked for in the cache that is there, and then the run goes on as
though nobody had asked (chapter 6). Results are written as they come, a line each, and what is there is not done again.

What to notice: the report says with how many problems, and gives intervals; with a handful of problems they are wide, and a
model of 135 million parameters solves next to nothing, alone or in company. Left out: LiveCodeBench, which runs code.

Run it: python 07_eval_limo.py                              (a minute: three methods on problems that stand in this file)
        python 07_eval_limo.py --task limo --model Qwen/QwQ-32B --methods baseline hogwild:2 hogwild:4 --out limo.jsonl
        python 07_eval_limo.py --report limo.jsonl --png limo.png
"""
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

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

    answer_tokens: int  # at most so many tokens for the answer when the budget ends (paper, appendix C)
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
    """The answer alone: GSM8K writes a solution before it, OlympiadBench a list with one answer around it."""
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return str(answer).split("####")[-1].strip()


def read_jsonl_problems(path):
    """(question, answer) of each line of a JSONL file."""
    rows, seen = [], {}
    for number, line in enumerate(generate.read_text(path, "data file").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path!r} is not JSON ({error}); each line has to be an object with the fields "
                             "question and answer") from error
        missing = [key for key in ("question", "answer") if not isinstance(row, dict) or not str(row.get(key, "")).strip()]
        if missing:
            raise ValueError(f"line {number} of {path!r} has no {missing[0]}; each line needs the fields question and answer")
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
        from datasets import load_dataset  # here, because it takes seconds and only this task needs it
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
    given = [answer] if len(golds) == 1 else positions(answer.strip("()[]{} "), len(golds))
    understood = [parse(tidy(part)) for part in given]
    scores = [bool(mine) and verify(parse(tidy(gold)), mine) and digit_base(gold) in (None, digit_base(part))
              for gold, mine, part in zip(golds, understood, given)]
    return sum(scores) / len(golds), any(map(bool, understood))


def tidy(answer):
    """The answer as math-verify wants it: boxed, without small spaces and the full stop of its sentence, and e as e."""
    answer = re.sub(r"\\[,!;:]|~", "", answer).replace(r"\mathrm{e}", "e")
    return f"\\boxed{{{answer.strip().rstrip('.')}}}"


def digit_base(answer):
    """The base of a numeral such as 120_5, which math-verify does not look at; None for other answers."""
    numeral = re.fullmatch(r"\s*\w+_\{?(\d+)\}?\s*", answer)
    return numeral and numeral[1]


def positions(answer, count):
    """Cut "18, 3, 70,000" into its parts; a comma may also stand between thousands, if the count asks for it."""
    parts = [part.strip() for part in answer.split(",")]
    return parts if len(parts) == count else [part.strip() for part in re.split(r",(?!\d{3}(?!\d))", answer)]


# ------------------------------------------------------------------------------------------------------------- methods

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
        self.prompts, self.at_once = prompts, at_once
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
        if self.at_once is None or len(writing) <= self.at_once:
            return writing
        first = len(self.passes) * self.at_once
        return [writing[(first + i) % len(writing)] for i in range(self.at_once)]


class Samples(Prompted):
    """The same, where a worker is done with its own \\boxed{}: the answer is asked for with all their text in view."""

    def _answered(self, w, answer):
        w.finished = w.finished or answer is not None


class Skeleton:
    """Skeleton-of-Thought (paper, section 4.1 and appendix D.2), in three stages, each a run of chapter 6's loop.

    An outline; a thread per point of it, which do not see each other; then one worker who has read all threads goes on.
    To the evaluation it looks like any other run: advance, answer, ending, passes.
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
        self.passes, self.generated, self.texts, self.points = [], 0, [], None
        self.arguments, self.tokenizer = (model, tokenizer, problem), tokenizer
        self.forward = forward
        self._begin(Samples, [self._chat(self.OUTLINE) + "1."], min(self.LONGEST_OUTLINE, settings.max_passes))

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
    def last(self):
        """Is this the last stage?"""
        return not isinstance(self.stage, Samples)

    @property
    def ending(self):
        """As of a run: None while it goes on."""
        return "passes" if len(self.passes) >= self.settings.max_passes else self.stage.ending if self.last else None

    @property
    def boxed(self):
        """The answer of the last stage, once it is written."""
        return self.stage.boxed if self.last else None

    def advance(self):
        """One forward pass of the present stage, and on to the next one where that is over."""
        record = self.stage.advance()
        self.passes.append(record)
        self.generated += len(record["sampled"])
        if self.stage.ending is not None and self.ending is None:
            self._next_stage(self.settings.max_passes - len(self.passes))
        return record

    def _next_stage(self, passes):
        texts = [self.stage.decode([i for i in w.ids if i not in self.stage.end_ids]).strip() for w in self.stage.workers]
        self.texts += texts
        if self.points is None:  # the outline is there
            outline = "1. " + texts[0]
            self.points = (re.findall(r"^\s*\d+[.)]\s*(\S.*)$", outline, re.MULTILINE) or [outline])[:self.MOST_POINTS]
            prompts = [self._chat(self.POINT, outline=outline, number=str(k)) + f"{k}. {point}"
                       for k, point in enumerate(self.points, start=1)]
            self._begin(Samples, prompts, passes, self.at_once)
        else:
            threads = "\n\n".join(f"{k}. {point} {text}" for k, (point, text) in enumerate(zip(self.points, texts), start=1))
            self._begin(Prompted, [self._chat(generate.SOLO_PROMPT) + threads + "\n\n"], passes)

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
    """"hogwild:4" -> ("hogwild", 4). Raises ValueError if there is no such method."""
    name, _, count = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose among {', '.join(METHODS)}, with :W for W workers where wanted")
    workers = METHODS[name][2]
    if count:
        most = 1 if workers == 1 else len(generate.NAMES)
        if not count.isdigit() or not 1 <= int(count) <= most:
            raise ValueError(f"{spec!r} asks for {count!r} workers; there can be 1 to {most}")
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
    finished = [closed["text"] for record in run.passes for closed in record["closed"]]
    return finished + [run.decode(w.ids) for w in run.workers if w.ids]


class Results:
    """A JSONL file that grows by a line per run: first the settings, then results.

    Args:
        path: the file; of several processes each writes one of its own beside it, and all of them are read.
        settings: what all results in the file have in common (a dict). If the file is there, it has to be the same.
    Raises:
        ValueError: the file belongs to other settings (the message names the difference), or is none of ours.
    """

    def __init__(self, path, settings, rank=0, processes=1, read_only=False):
        self.path = Path(path) if rank == 0 else Path(path).with_suffix(f".rank{rank}-of-{processes}.jsonl")
        self.found = []
        for file in files_of(path):
            theirs, results, whole = read_results(file)
            for key in sorted({*settings, *(theirs or {})}):
                if theirs is not None and theirs.get(key) != settings.get(key):
                    raise ValueError(f"{str(file)!r} holds results with {key} {theirs.get(key)!r}, not {settings.get(key)!r}: "
                                     "write to another file (--out)")
            self.found += results
            if file == self.path and not read_only and whole < file.stat().st_size:  # a crash cut the last line short
                with open(file, "r+b") as damaged:
                    damaged.truncate(whole)
        self.file = None if read_only else open(self.path, "a", encoding="utf-8")
        if self.file and self.file.tell() == 0:
            self._line({"format": FORMAT, **settings})

    @property
    def done(self):
        """(method, problem, seed) of all results that are there."""
        return {key_of(result) for result in self.found}

    def add(self, result):
        """Write a result, down to the disk."""
        self.found.append(result)
        if self.file:
            self._line(result)

    def _line(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())


FORMAT = "hogwild-eval-1"


def key_of(result):
    """What a result is the result of."""
    return result["method"], result["problem"], result["seed"]


def files_of(path):
    """The files of an evaluation: the one of that name, and those of other processes beside it."""
    path = Path(path)
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.rank*-of-*.jsonl"))) if file.exists()]


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
            if (rows[0]["format"] != FORMAT) or (number > 1 and "method" not in rows[-1]):
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is no line of an evaluation's results; write to another file "
                             "(--out)") from error
    settings = {key: value for key, value in rows[0].items() if key != "format"} if rows else None
    return settings, rows[1:], whole


def run_all(todo, problems, model, tokenizer, settings, budgets, results, console, forward):
    """Run (method, problem, seed) for each in `todo`; a fault in one of them is recorded, and the others go on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("", total=len(todo))
        for spec, number, seed in todo:
            progress.update(bar, description=running_accuracy(results.found, budgets[-1]) + f"now: {spec}, problem {number}")
            problem, result = problems[number], {"method": spec, "problem": number, "seed": seed}
            try:
                run = start_run(spec, model, tokenizer, problem["question"], replace(settings, seed=seed), forward)
                result.update(evaluate(run, problem["answers"], budgets, early_stop=spec != "no-early-stop"))
            except Exception as error:  # whatever it is: one problem of a thousand
                result["error"] = f"{type(error).__name__}: {error}"
            results.add(result)
            progress.advance(bar)


def running_accuracy(results, budget):
    """What is right so far, in a few words, for the progress bar."""
    scores = {}
    for result in results:
        scores.setdefault(result["method"], []).append(0.0 if "error" in result else result["answers"][str(budget)]["score"])
    return "".join(f"{method} {sum(s) / len(s):.0%} · " for method, s in scores.items())


# ---------------------------------------------------------------------------------------------------------- the report

def interval(mean, count):
    """95 % interval of a share `mean` seen in `count` trials (Wilson's): (low, high)."""
    z = 1.959964
    middle, spread = mean + z * z / (2 * count), z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def summary(results, budgets):
    """Per method: count, faults, and for each budget accuracy, seconds and answers not understood; passes of right answers."""
    table = {}
    for method in dict.fromkeys(result["method"] for result in results):
        mine = [result for result in results if result["method"] == method]
        good = [result for result in mine if "error" not in result]
        columns = {key: [sum(float(result["answers"][str(b)][key]) for result in good) for b in budgets]
                   for key in ("score", "seconds", "understood")}
        right = [next((result["answers"][str(b)]["passes"] for b in budgets if result["answers"][str(b)]["score"] == 1), None)
                 for result in good]
        right = [passes for passes in right if passes is not None]
        table[method] = {
            "count": len(mine), "faults": len(mine) - len(good),
            "accuracy": [score / len(mine) for score in columns["score"]],  # a fault is no right answer
            "seconds": [seconds / max(1, len(good)) for seconds in columns["seconds"]],
            "not_understood": [len(good) - int(understood) for understood in columns["understood"]],
            "passes_to_right": sum(right) / len(right) if right else None,
        }
    return table


def passes_to_reach(level, budgets, accuracy):
    """The budget at which `accuracy` (at `budgets`) first reaches `level`, between two budgets in proportion; or None."""
    before = (0, 0.0)
    for point in zip(budgets, accuracy):
        if point[1] >= level:
            share = (level - before[1]) / (point[1] - before[1]) if point[1] > before[1] else 1.0
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def relative_passes(budgets, accuracy, baseline):
    """Passes that a method takes to the accuracy that it and the baseline reach, as a multiple of the baseline's."""
    level = min(max(accuracy), max(baseline)) if baseline else 0.0
    if level == 0.0 or accuracy is baseline:
        return "–"
    return f"{passes_to_reach(level, budgets, accuracy) / passes_to_reach(level, budgets, baseline):.2f} (at {level:.0%})"


def report(console, settings, results, png=None):
    """Print the tables of an evaluation, and draw its curves."""
    budgets, table = settings["budgets"], summary(results, settings["budgets"])
    data = f" from {settings['data']}" if settings["data"] else ""
    lines = [f"{settings['model']} on {settings['task']}{data}", "",
             "right after so many passes, with the 95 % interval:",
             f"  {'method':20}{'runs':>5}" + "".join(f"{budget:>16,}" for budget in budgets)]
    for method, row in table.items():
        spans = [interval(accuracy, row["count"]) for accuracy in row["accuracy"]]
        cells = [f"{accuracy:.0%} ({low:.0%}–{high:.0%})" for accuracy, (low, high) in zip(row["accuracy"], spans)]
        lines.append(f"  {method:20}{row['count']:>5}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", "at the largest budget; passes as a multiple of the baseline's, at the accuracy that both reach:",
              f"  {'method':20}{'not understood':>16}{'faults':>8}{'passes to a right answer':>26}{'passes / baseline':>20}"]
    for method, row in table.items():
        needed = "–" if row["passes_to_right"] is None else f"{row['passes_to_right']:.0f}"
        ratio = relative_passes(budgets, row["accuracy"], table.get("baseline", {}).get("accuracy"))
        lines.append(f"  {method:20}{row['not_understood'][-1]:>16}{row['faults']:>8}{needed:>26}{ratio:>20}")
    console.print("\n" + "\n".join(lines) + "\n", soft_wrap=True, markup=False)
    if png:
        draw(png, settings, table)


DASHED = ("baseline", "no-early-stop", "self-consistency", "skeleton")


def draw(png, settings, table):
    """Accuracy against passes, and against seconds (the paper's figures 3 to 6, and 19), as a PNG."""
    import matplotlib  # here, because it takes a second
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    for number, (method, row) in enumerate(table.items()):
        low, high = zip(*(interval(accuracy, row["count"]) for accuracy in row["accuracy"]))
        style = {"color": f"C{number % 10}", "linestyle": "--" if method.startswith(DASHED) else "-", "marker": "o"}
        for axis, x in zip(axes, (settings["budgets"], row["seconds"])):
            axis.plot(x, row["accuracy"], label=f"{method} (n = {row['count']})", **style)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.12)
    for axis, label in zip(axes, ("sequential forward passes", "mean seconds per problem, on the machine of the run")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_xticks(settings["budgets"])
    axes[0].set_ylabel("accuracy, with 95 % intervals")
    axes[0].legend(fontsize="small")
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
    what.add_argument("--methods", nargs="+", default=["baseline", "hogwild:2", "self-consistency:2"], metavar="METHOD",
                      help=f"{', '.join(METHODS)}; with :W for W workers")
    what.add_argument("--budgets", type=int, nargs="+", metavar="PASSES", help="default: 32 64 96, with --model 256 ... 4096")
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
    args.budgets = args.budgets or ([32, 64, 96] if args.model is None else [256, 512, 1024, 2048, 4096])
    if args.budgets[0] < 1 or any(b <= a for a, b in zip(args.budgets, args.budgets[1:])):
        raise ValueError(f"budgets have to be increasing numbers of passes, not {' '.join(map(str, args.budgets))}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
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
            "answer_tokens": args.answer_tokens or TASKS[args.task].answer_tokens}


def run_command(args, console):
    """Run what is not there yet, and report on everything.

    Under torchrun, either every process takes its share of the runs and writes a file of its own; or (tensor parallel) each
    holds a share of every weight, all go through the same runs, and the first one writes.
    """
    team = PartialState(cpu=not torch.cuda.is_available()) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    rank, processes = (team.process_index, team.num_processes) if team else (0, 1)
    if args.tensor_parallel and not team:
        raise ValueError("--tensor-parallel shards a model over several processes: start it with torchrun --nproc-per-node N")
    console.quiet = rank > 0
    problems = load_problems(args.task, args.data)
    common = common_settings(args)
    settings = generate.Settings(max_passes=args.budgets[-1], greedy=args.greedy, check_every=args.check_every,
                                 answer_tokens=common["answer_tokens"])
    for seed in args.seeds:
        replace(settings, seed=seed)  # says what is wrong with it
    limit = args.limit or (3 if args.task == "own" and not args.data else len(problems))
    problems = problems[:limit]
    wanted = [(method, problem["id"], seed) for problem in problems for seed in args.seeds for method in args.methods]
    results = Results(args.out, common, rank, processes, read_only=args.tensor_parallel and rank > 0)
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
        else:
            model, tokenizer = shared_cache.load_model(args.model, device, args.dtype)
            shared_cache.pack_linears(model)
        with team.split_between_processes(todo) if team and not args.tensor_parallel else nullcontext(todo) as mine:
            run_all(mine, problems, model, tokenizer, settings, args.budgets, results, console, forward)
    if team:
        team.wait_for_everyone()
        torch.distributed.destroy_process_group()
    if rank:
        return
    found = [result for file in files_of(args.out) for result in read_results(file)[1]]
    report(console, common, found, args.png)
    assert set(wanted) <= {key_of(result) for result in found}
    console.print(f"[OK] {len(wanted)} runs are in {args.out}, each answered at {len(args.budgets)} budgets", markup=False,
                  soft_wrap=True)


def main(argv=None):
    """Run the command line; returns the exit code."""
    console = Console(highlight=False)
    try:
        args = parse_arguments(argv)
        if args.report:
            found = [read_results(file) for path in args.report for file in files_of(path) or [path]]
            if len({json.dumps(settings) for settings, _, _ in found}) > 1 or found[0][0] is None:
                raise ValueError("these files hold results of different settings: report on one at a time")
            report(console, found[0][0], [result for _, results, _ in found for result in results], args.png)
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
# 2. From which number of problems on could two methods with 60 % and 70 % be told apart? Check with `interval`.
# 3. Majority voting needs three workers and no model. Compare it with the answer that self-consistency gives.

if __name__ == "__main__":
    sys.exit(main())
