r"""Chapter 7: does collaboration help? Accuracy against the budget of sequential forward passes.

The problem. Two workers write two tokens per pass. That is worth something only if, after the same
number of passes, the answer is right more often (paper, section 4). So: many problems, several methods,
the same budgets for all, and a curve. The methods are chapter 6's loop with other settings, or a few
lines more:

    hogwild:W            workers who see each other; hogwild:1 is one worker who is told the rules
    contiguous:W         the same in the contiguous layout (this and the next three: appendix E.1)
    interleaved:W        the same, but they see each other's steps only when these are finished
    no-check:W           hogwild without the question about redundant work
    re-encode:W          hogwild, but finished steps are encoded anew, not rotated
    baseline             one worker, the plain prompt; asked for an answer at the budget (early stop).
                         The report also says what it had written in time, unasked: no-early-stop
    self-consistency:W   independent workers; the answer is given with all their text in view
    vote:W               the same, but the most frequent of their answers wins
    debate:W             the same twice: in the second round, everybody has read the others (debate-3:W
                         to debate-9:W: so many rounds; each has its share of the largest budget)
    skeleton, skeleton:W an outline; a thread per point, all at once or W taking turns; then one worker
    fork-join            one worker, who hands parts over to others while it writes on

What is counted: passes in which somebody writes. Prompts, re-encoding and asking are not (section 4.1).
Many runs share every pass (appendix/batching.py), and none of them notices. What to notice: the
intervals. With a handful of problems they are wide. Left out: problems and grading (appendix/tasks.py),
the rivals (appendix/methods.py), intervals and pictures (appendix/curves.py).
Run it: python 07_eval_limo.py       (a minute: one worker and two, two lists; --help has the rest)
"""
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from time import perf_counter
from traceback import extract_tb

import numpy as np
import torch
from tqdm import tqdm

from appendix import (
    adapters,
    batching,
    command,
    curves,
    engine,
    journal,
    models,
    programs,
    protocol,
    screen,
    tasks,
)
from appendix.command import option
from appendix.results import NOTHING, ROW, asked_at, files_of, key_of, one_each, read, summary

shared_cache = import_module("02_shared_cache")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")
methods = import_module("appendix.methods")
Hogwild, SOLO, written = generate.Hogwild, methods.SOLO, methods.written

# ------------------------------------------------------------------------- runs, asked at every budget

def evaluate(runs, problem, budgets):  # exercise
    """A job (appendix/batching.py): runs one after the other, asked at every budget on the way.

    The answer is asked for in the cache that is there, and the run goes on as though nobody had asked.
    What that takes counts for nobody as passes (paper, section 4.1), and not as the run's seconds.

    Args:
        runs: an iterator, usually over one run.
        problem: see tasks.load.
        budgets: increasing numbers of passes, a list of ints.
    Returns:
        a dict, ready for JSON: "answers": {a budget, as a text: {"answer": text, "in_time": was it
        written before anybody asked? "score": 0 to 1, "understood": bool, "passes", "tokens",
        "seconds"}}; these three in all (others use seconds, too, if jobs go on side by side) of all
        runs; "ending" of the last one; "step_ends": [(pass, worker)]; "text": [all that a worker has
        written], run after run.
    """
    answers, step_ends, texts = {}, [], []
    passes, tokens, seconds = 0, 0, 0.0

    def asked(run):
        in_time, answer = run.written_answer() is not None, (yield from run.asking())
        score, understood = tasks.mark(answer, problem)
        return {"answer": answer, "in_time": in_time, "score": score, "understood": understood,
                "passes": passes, "tokens": tokens, "seconds": seconds}

    try:
        for run in runs:
            while run.ending is None and passes < budgets[-1]:
                begin = perf_counter()
                record = run.take(run.sample((yield run.writers())))
                passes, tokens = passes + 1, tokens + len(record["sampled"])
                seconds += perf_counter() - begin
                step_ends += [(passes, closed["worker"]) for closed in record["closed"]]
                if passes in budgets:
                    answers[str(passes)] = yield from asked(run)
            ending, texts = run.ending or "passes", texts + written(run)
            if passes >= budgets[-1]:
                break
    except generate.TooLong:  # more than the model's context is what the next one would read
        if not texts:
            raise
        ending = "context"
    late = [str(budget) for budget in budgets if budget > passes]
    if late:
        answers |= dict.fromkeys(late, (yield from asked(run)))
    return {"answers": answers, "passes": passes, "tokens": tokens, "ending": ending,
            "step_ends": step_ends, "seconds": seconds, "text": texts}


# ---------------------------------------------------------------------------------------------- methods

# name -> (what runs it, settings that differ, workers unless the name says otherwise). What runs it is a
# class, for one run; or a function like `skeleton`, which is called with (start, problem, workers) and
# yields runs. Results are found again by these names: whoever changes a method takes another --out.
METHODS = {
    "hogwild": (Hogwild, {}, 2), "contiguous": (Hogwild, {"layout": "contiguous"}, 2),
    "interleaved": (Hogwild, {"layout": "interleaved"}, 2), "no-check": (Hogwild, {"check_every": 0}, 2),
    "re-encode": (methods.Reencode, {}, 2), "baseline": (Hogwild, SOLO, 1),
    "self-consistency": (methods.Samples, SOLO, 2),
    "vote": (methods.vote, SOLO, 3), "debate": (methods.debate, SOLO, 2),
    **{f"debate-{rounds}": (partial(methods.debate, rounds=rounds), SOLO, 2) for rounds in range(3, 10)},
    "skeleton": (methods.skeleton, SOLO, None), "fork-join": (methods.fork_join, SOLO, 1)}


def method(spec):  # exercise
    """Take a method's name apart: hogwild:4 -> (its one name in tables and files, what runs it, settings
    that differ, 4). Raises ValueError if there is no such method.

    The one name: hogwild is hogwild:2, with the usual number of workers; baseline:1 is baseline, as that
    is always one; skeleton stays skeleton, whose usual number of workers is None.
    """
    name, colon, count = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose among {', '.join(METHODS)}, with :W "
                         "for W workers where wanted")
    kind, differs, usual = METHODS[name]
    most = 1 if usual == 1 else len(protocol.NAMES)
    if colon and count not in map(str, range(1, most + 1)):
        raise ValueError(f"{spec[:40]!r} does not name a number of workers from 1 to {most}")
    workers = int(count) if colon else usual
    return name if workers is None or most == 1 else f"{name}:{workers}", kind, differs, workers


def runs_of(spec, model, tokenizer, problem, settings, forward=None, cache=None):  # exercise
    """The runs of a method on a problem, one after the other (usually there is one). The method changes
    those of `settings` (chapter 6) that are its own."""
    _, kind, differs, workers = method(spec)

    def start(loop, workers, **others):
        """A run of a class (or of partial(a class, arguments of its own)), with other settings."""
        some = replace(settings, workers=protocol.NAMES[:workers], **{**differs, **others})
        return loop(model, tokenizer, problem["question"], some, forward, cache)
    if isinstance(kind, type):
        return iter([start(kind, workers)])
    asked = methods.Problem(problem["question"], len(problem["answers"]), settings.max_passes)
    return kind(start, asked, workers)


# ------------------------------------------------------------------------------------------ processes

FIRST = 12  # passes, after which we can say how long all of it will take
# Chapter 6's settings, the same for all methods.
COMMON = ["greedy", "check_every", "answer_tokens", "context", "marks", "opening"]


def run_missing(what, header, problems, wanted):
    """Run those of `wanted` that are not in the files yet; returns all results.

    Under torchrun, either every process takes its share of the runs and writes a file of its own; or
    (tensor parallel) each holds a share of every weight, all go through the same runs, and the first one
    writes.
    """
    team = models.processes()
    rank, count = (team.process_index, team.num_processes) if team else (0, 1)
    shares = 1 if what.tensor_parallel else count  # the runs are divided into so many
    file = what.out if rank == 0 else f"{what.out}.rank{rank}-of-{count}" if shares > 1 else None
    # (Rounds of a debate are shares of the largest budget: other budgets, other debates.)
    may_differ = [] if any(spec.startswith("debate") for spec in what.methods) else ["budgets"]
    with journal.Journal(file, "evaluation", header, ROW, may_differ, durable=True) as results:
        todo = missing(what, header, wanted)
        if not rank:
            print(f"{len(problems)} problems, {len(what.methods)} methods, {len(what.seeds)} seeds: "
                  f"{len(todo)} runs to do; results in {what.out}")
        if team:  # before anybody writes: all have to find the same runs to do
            team.wait_for_everyone()
        if todo:
            mine = todo[rank % shares::shares]
            with tqdm(total=len(mine), disable=rank > 0, file=sys.stdout, unit="run") as bar:
                run_all(mine, what, team, problems, results, bar)
        if team:
            team.wait_for_everyone()
            torch.distributed.destroy_process_group()
        return [] if rank else one_each([*read(files_of(what.out), header)[1], *results.rows])


def missing(what, header, wanted):
    """Those of `wanted` that are not in the files, at all budgets and without an error."""
    rows = one_each(read(files_of(what.out), header)[1])
    done = {key_of(row) for row in rows if asked_at(row, what.budgets)}
    return [key for key in wanted if key not in done]


def run_all(todo, what, team, problems, results, bar):
    """Do the runs, several side by side. A fault in one of them is kept as its result, and the others go
    on."""
    model, tokenizer = models.prepared(what, team)
    forward = engine.best_forward(model, what.attention)
    cache = shared_cache.SharedCache(query_rotation.attach(model))

    def runs(begun, spec, number, seed):
        """The runs of a job, which are noted as they begin."""
        settings = what.settings(spec, seed)
        for run in runs_of(spec, model, tokenizer, problems[number], settings, forward, cache):
            begun.append(run)
            yield run

    def job(spec, number, seed):
        """Do a run: returns its row."""
        at_work.append((spec, number, seed))
        row, begun = {"method": spec, "problem": number, "seed": seed, "error": None}, []
        try:
            row |= yield from evaluate(runs(begun, spec, number, seed), problems[number], what.budgets)
        except Exception as error:  # whatever it is: one problem of a thousand
            place = extract_tb(error.__traceback__)[-1]
            row |= {"error": f"{type(error).__name__} ({place.name}:{place.lineno}): {error}",
                    "ending": "fault", "text": [],
                    "answers": {str(budget): NOTHING for budget in what.budgets}}
        for run in begun:
            run.release()
        at_work.remove((spec, number, seed))
        return row

    def feed(groups):
        """A pass, unless somebody wants this process to stop."""
        if stopping.asked:
            raise KeyboardInterrupt
        if len(times) < FIRST:
            times.append(perf_counter())
            if len(times) == FIRST and not bar.disable:
                each = (times[-1] - times[1]) / (FIRST - 2)  # (the first one makes the memory)
                most = each * what.budgets[-1] * len(todo) / len(groups)
                bar.write(f"passes of {len(groups)} runs take {each:.2f} s: all will take about "
                          f"{timedelta(seconds=round(most))}, if no run ends early")
        return generate.feed(model, cache, groups, forward)

    at_once, faults, at_work, times, last = what.batch, 0, [], [], str(what.budgets[-1])
    if at_once is None:
        at_once = batching.as_memory_allows(cache, partial(
            models.free_memory, model.device, what.tensor_parallel))
    with screen.Stopping() as stopping:
        for row in batching.side_by_side((job(*key) for key in todo), feed, at_once):
            results.add(row)
            past = [other["answers"][last]["score"] for other in one_each(results.rows)
                    if other["method"] == row["method"] and last in other["answers"]]
            bar.set_description(f"{row['method']}: {np.mean(past or 0):.0%} right so far")
            bar.update()
            faults = faults + 1 if row["error"] else 0
            if faults >= 5 and faults > len(at_work):  # (others may be about to do better)
                raise command.Failed(f"{faults} runs in a row failed, so the others would, too: "
                                     f"{row['error']}")


# ---------------------------------------------------------------------------------------------- report

def unasked(row):
    """The row of the same run, if nobody had asked: an answer counts if it was written in time."""
    answers = {budget: entry if entry["in_time"] else {**entry, "answer": None, "score": 0}
               for budget, entry in row["answers"].items()}
    return {**row, "method": "no-early-stop", "answers": answers}


def report(header, rows, png=None):
    """Print the tables of an evaluation, at the budgets that all results have, and draw its curves."""
    rows = one_each(rows)
    common = set.intersection(*({*row["answers"]} for row in rows))
    if not common:
        raise ValueError("these results have no budget in common: run their command with all budgets")
    rows += [unasked(row) for row in rows if row["method"] == "baseline"]
    budgets = sorted(map(int, common))
    curves.report({**header, "budgets": budgets}, summary(rows, budgets), png)


# -------------------------------------------------------------------------------------- the command line

@dataclass
class Evaluation(models.Options):
    """What is run, with which model, and where the results are."""

    task: str = option("lists", f"{', '.join(tasks.TASKS)}")
    data: str | None = option(None, "problems: a JSONL file with question and answer")
    methods: list[str] = option(["hogwild:1", "hogwild:2"],
                                f"{', '.join(METHODS)}; with :W: workers")
    budgets: list[int] | None = option(None, "passes (default: 80 ... 240; with --model 256 ... 4096)")
    limit: int | None = option(None, "the first N problems only (default: 2; with --model all)")
    batch: int | None = option(None, "so many runs share each pass (default: what memory allows)")
    seeds: list[int] = option([0], "all of it once per seed")
    greedy: bool = option(False, "always the likeliest token")
    answer_tokens: int | None = option(None, "longest answer (default: the task's)")
    check_every: int = option(1024, "generated tokens between checks for redundant work; 0: never")
    marks: str = option(protocol.MARKS, "what ends a sentence; a blank line behind it ends a step")
    opening: str | None = option(None, "how everybody in a team begins; {name} is filled in")
    prompt: str | None = option(None, "another prompt for teams, with {problem} in it (here: its file)")
    context: int | None = option(None, "tokens that may be in view (default: what the config says)")
    out: str = option("eval.jsonl", "results are kept, and found, here")
    report: list[str] | None = option(None, "only report on these results")
    png: str | None = option(None, "draw the curves")

    def __post_init__(self):
        """Raise ValueError, one sentence, if something makes no sense."""
        self.methods = list(dict.fromkeys(method(spec)[0] for spec in self.methods))
        small = self.model == adapters.COLLABORATOR
        self.budgets = self.budgets or ([80, 160, 240] if small else [256, 512, 1024, 2048, 4096])
        self.limit = 2 if self.limit is None and small and not self.data else self.limit
        if sorted({0, *self.budgets})[1:] != self.budgets:
            raise ValueError(f"budgets have to be increasing numbers of passes, not {self.budgets}")
        if len({*self.seeds}) < len(self.seeds) or self.greedy and len(self.seeds) > 1:
            raise ValueError("a seed is given twice, or greedy runs have several, and do not depend on "
                             "them: give one")
        if self.greedy:
            methods.refuse_copies(self.methods)
        command.at_least(self, limit=1, answer_tokens=1, batch=1)
        command.distinct(out=self.out, png=self.png, data=self.data)

    def settings(self, spec, seed):
        """Chapter 6's, before a method changes some. Who is alone gets the plain prompt."""
        common = {name: getattr(self, name) for name in COMMON}
        common = {**adapters.settings(self.model), **common}
        if self.prompt and method(spec)[2] is not SOLO:
            common["prompt"] = self.prompt
        form = tasks.TASKS[self.task].form
        return generate.Settings(seed=seed, max_passes=self.budgets[-1], form=form, **common)


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser(Evaluation, description=__doc__.split("\n")[0])
    what, = parser.read(argv, ["prompt"], adapters.settings)
    journal.own_png(what.png)
    if what.report:
        files = [file for path in what.report for file in files_of(path) or [path]]
        header, rows = read(files)
        if not rows:
            raise ValueError(f"there are no results in {', '.join(what.report)}")
        report(header, rows, what.png)
        return 0
    import_module("math_verify")  # else every run would fail, and only at its end
    problems = tasks.load(what.task, what.data)[:what.limit]
    if tasks.TASKS[what.task].form == "code":
        programs.check()
    what.answer_tokens = what.answer_tokens or tasks.TASKS[what.task].answer_tokens
    names = ["model", "dtype", "task", "data", "budgets", "prompt", *COMMON]
    header = {name: getattr(what, name) for name in names}
    header["data"] = what.data and tasks.label(what.data)
    wanted = [(spec, number, seed) for number in range(len(problems)) for seed in what.seeds
              for spec in what.methods]
    for spec, _, seed in wanted:  # says what is wrong with one of them
        what.settings(spec, seed)
    rows = run_missing(what, header, problems, wanted)
    if rows:
        report(header, rows, what.png)
        if failed := missing(what, header, wanted):
            why = next((row["error"] for row in rows if row["error"] and key_of(row) in failed),
                       "its answers are not in the file, or are those of other budgets")
            raise command.Failed(f"{len(failed)} of {len(wanted)} runs failed (the same command tries "
                                 f"them again), the first one: {why}")
        print(f"[OK] {len(wanted)} runs are in {what.out}, each answered at {len(what.budgets)} budgets")
    return 0


# To rebuild this file and be checked: make exercise CHAPTER=7 DIR=mine. Questions, which
# `python appendix/solutions.py 7.1` and so on answer by measuring:
# 1. How many problems does it take to tell methods with 60 % and 70 % apart? Why does it help if both
#    do the same ones? (curves.interval, curves.difference)
# 2. When is a vote of three better than one sample? And than all three read by somebody?

if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
