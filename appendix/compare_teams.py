r"""Appendix: what is a team worth that sees everything? Fair rivals, on problems that nobody has seen.

    hogwild:1 ... 4   so many workers who see each other write, token by token
    fixed:2, 4        the parts are dealt out beforehand, and nobody looks; when all are done, one reads
                      everything and gives the answer (fork and join)
    step-wise:2, 4    they see each other's steps only when these are finished, and begin at different
                      places of the list: the best rule we know for who sees no more
    independent:2, 4  nobody sees anybody; whoever is first gives the answer
    re-encode:2, 4    like hogwild, but finished steps are encoded anew, not rotated
    untaught:2        the same model before it learned, with chapter 6's own prompt

Several problems share every pass (batching.py), which changes no result; seconds count only where they
go one at a time (--batch 1).

    python appendix/compare_teams.py --kind race --problems 200 --batch 16 --out races.jsonl
"""
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import (  # noqa: E402
    adapters,
    batching,
    command,
    curves,
    engine,
    ideal_team,
    journal,
    models,
    products,
    puzzles,
    tasks,
)
from appendix.command import option  # noqa: E402

query_rotation = import_module("04_query_rotation")
shared_cache = import_module("02_shared_cache")
generate = import_module("06_generate")
methods = import_module("appendix.methods")

WAYS = {"step-wise": ("interleaved", generate.Hogwild), "independent": ("independent", generate.Hogwild),
        "re-encode": ("combined", methods.Reencode)}
METHODS = ["hogwild:1", "hogwild:2", "hogwild:3", "hogwild:4", "untaught:2", *(
    f"{way}:{workers}" for way in ("fixed", *WAYS) for workers in (2, 4))]
ROW = {"problem": int, "method": str, "score": float, "passes": int, "tokens": int, "seconds": float,
       "again": int, "never": int, "answer": str}


@dataclass
class Options:
    """The command line."""

    kind: Literal[tuple(puzzles.KINDS)] = option("list", "of problem")
    patterns: Literal[tuple(puzzles.PATTERNS)] = option("trained", "words of the questions")
    methods: list[str] = option(["hogwild:1", "hogwild:2", "hogwild:4"], ", ".join(METHODS))
    problems: int = option(8, "how many fresh problems")
    batch: int = option(1, "so many share a pass")
    model: str = option(adapters.COLLABORATOR, "folder of an adapter that learn_to_collaborate.py made")
    out: str | None = option(None, "keep results in this file; what is in there is not solved again")
    png: str | None = option(None, "draw the curves")

    def __post_init__(self):
        """Raise ValueError, one sentence, if something makes no sense."""
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"there is no method {method!r}; choose among {', '.join(METHODS)}")
        command.at_least(self, problems=1, batch=1)
        command.distinct(out=self.out, png=self.png)


# ---------------------------------------------------------------------------------------------- methods

def own_words(run):
    """The text of each step without its header: finished ones in their order, then unfinished ones."""
    closed = [step["text"] for record in run.passes for step in record["closed"]]
    return [text.split(":** ", 1)[-1].strip() for text in [*closed, *(w.text for w in run.workers)]]


def has_done(run, labels, target):
    """Whether all of these parts have an answer, none of which is what a race looks for: then the run
    goes on, and says so."""
    text = "\n".join(own_words(run))
    return f"={target}." not in text and all(re.search(rf"\b{label}=\d+\.", text) for label in labels)


def stages_of(method, start, puzzle):
    """A generator of stages: ([runs that go side by side], is one of them over?). The last one answers.

    start: (loop, puzzle, layout, names) -> a run.
    """
    way, _, count = method.partition(":")
    names = ideal_team.NAMES[:int(count)]
    if way != "fixed":
        layout, loop = WAYS.get(way, ("combined", generate.Hogwild))
        yield [start(loop, puzzle, layout, names)], lambda run: run.ending
        return
    runs, shares = [], {}
    for who, name in enumerate(names):
        share = [*puzzle.parts][who::len(names)]
        runs.append(start(generate.Hogwild, puzzle.share(share), "combined", [name]))
        shares[runs[-1]] = share
    yield runs, lambda run: run.ending or has_done(run, shares[run], puzzle.target)
    if not (puzzle.target and any(run.boxed for run in runs)):
        joined = start(generate.Hogwild, puzzle, "combined", names[:1])
        steps = [step["text"] for run in runs for record in run.passes for step in record["closed"]]
        joined.said += joined.encode("".join(steps + [w.text for run in runs for w in run.workers]))
        yield [joined], lambda run: run.ending


def solve(stages):
    """A job (see batching.py): all stages, to their ends. Returns {"runs", "passes", "tokens",
    "seconds"}; others' work counts as seconds, too, where jobs go on side by side."""
    figures = {"runs": [], "passes": 0, "tokens": 0, "seconds": 0.0}
    for runs, over in stages:
        figures["runs"] += runs
        while live := [run for run in runs if not over(run)]:
            begin = perf_counter()
            writers = [run.writers() for run in live]
            logits = yield sum(writers, [])
            for run, some in zip(live, logits.split([*map(len, writers)])):
                figures["tokens"] += len(run.take(run.sample(some))["sampled"])
            figures["passes"] += 1
            figures["seconds"] += perf_counter() - begin
    return figures


def judged(puzzle, runs, figures):
    """A row of results (see ROW) from a job's runs and figures; problem and method are the caller's."""
    answer = next(filter(None, (run.written_answer() for run in runs[::-1])), "")
    begun = [label for run in runs for text in own_words(run)
             for label in re.findall(r"^([A-Z]):(?! Stop)", text)
             + re.findall(r"^[A-Z]: ([A-Z]) first", text)]
    never = {*puzzle.parts} - {*begun} if puzzle.target is None else ()
    score, _ = tasks.grade(answer, puzzle.answer.split(", "))
    return {"score": score, "answer": answer, "again": len(begun) - len({*begun}), "never": len(never),
            **figures}


def solved(todo, options, model, tokenizer, told):
    """Solve problems, several side by side; yields rows of results.

    todo: pairs (method, number of a problem); told: settings of chapter 6.
    """
    forward = engine.best_forward(model)
    cache = shared_cache.SharedCache(query_rotation.attach(model))

    def start(loop, puzzle, layout, names):
        """A run of some workers on a puzzle, in the cache that all share."""
        some = generate.Settings(names, layout, max_passes=ideal_team.MOST, **told)
        return loop(model, tokenizer, puzzle.text, some, forward, cache)

    def job(method, number):
        """Solve a problem: returns its row."""
        puzzle = puzzles.fresh(options.kind, number, options.patterns)
        figures = yield from solve(stages_of(method, start, puzzle))
        runs = figures.pop("runs")
        for run in runs:
            run.release()
        return {"problem": number, "method": method, **judged(puzzle, runs, figures)}
    yield from batching.side_by_side((job(*key) for key in todo), lambda groups: generate.feed(
        model, cache, groups, forward), options.batch)


def measure(options, console):
    """Solve what is not in the file yet: {method: [row of each problem]}."""
    taught, tokenizer = models.load(options.model)
    base = adapters.base_of(adapters.folder_of(options.model))
    about = {"kind": options.kind, "patterns": options.patterns, "batch": options.batch,
             "weights": models.fingerprint(taught)}
    with journal.Journal(options.out, "teams", about, ROW, durable=True) as out:
        done = {(row["method"], row["problem"]) for row in out.rows}
        wanted = [(method, number) for number in range(options.problems) for method in options.methods
                  if (method, number) not in done]
        for untaught in (False, True):
            if todo := [key for key in wanted if key[0].startswith("untaught") == untaught]:
                model = products.fast_products(models.load(base)[0] if untaught else taught)
                told = {"greedy": True} if untaught else adapters.settings(options.model)
                rows = solved(todo, options, model, tokenizer, told)
                for row in track(rows, "teams at work", len(todo), disable=not console.is_terminal):
                    out.add(row)
        kept = {(row["method"], row["problem"]): row for row in out.rows}
    return {method: [kept[method, number] for number in range(options.problems)]
            for method in options.methods}


def report(table, timed, console):
    """Print the table. table: {method: [row per problem]}"""
    base = next(iter(table.values()))
    console.print(f"{len(base)} fresh problems; 95 % intervals; relative: to the first line. Again: how "
                  "often\na part was begun once more than needed; never: parts that nobody began.\n")
    console.print(f"{'':14}{'questions right':>24}{'all right':>11}{'passes':>8}{'relative':>22}"
                  f"{'tokens':>8}{'seconds':>22}{'again':>7}{'never':>7}")
    for method, rows in table.items():
        score, passes, tokens, again, never = (
            mean(row[key] for row in rows) for key in ("score", "passes", "tokens", "again", "never"))
        low, high = curves.difference([row["score"] for row in rows], 0)[1:]
        # Ratios of sums, each problem weighing what it takes.
        ratios = {key: ratio([row[key] for row in rows], [row[key] for row in base])
                  for key in ("passes", "seconds")}
        seconds = "{:.3f} ({:.3f}–{:.3f})".format(*ratios["seconds"]) if timed else "–"
        relative = "{:.3f} ({:.3f}–{:.3f})".format(*ratios["passes"])
        console.print(f"{method:14}{score:8.1%} ({low:6.1%}–{high:6.1%})"
                      f"{mean(row['score'] == 1 for row in rows):11.1%}{passes:8.1f}{relative:>22}"
                      f"{tokens:8.0f}{seconds:>22}{again:7.2f}{never:7.2f}")


def ratio(mine, theirs):
    """Sum of mine over sum of theirs, with its 95 % interval (bootstrap over problems)."""
    mine, theirs = torch.tensor(mine, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    drawn = torch.randint(len(mine), (2000, len(mine)), generator=torch.Generator().manual_seed(0))
    low, high = (mine[drawn].sum(1) / theirs[drawn].sum(1)).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(mine.sum() / theirs.sum()), low, high


def draw(png, title, table):
    """Questions that are right after so many passes, and after so many tokens of all workers."""
    budgets = np.arange(20, max(row["passes"] for rows in table.values() for row in rows) + 20, 20)
    lines = {method: {
        "accuracy": np.mean([row["score"] * (row["passes"] <= budgets) for row in rows], 0),  # [budgets]
        "tokens": budgets * mean(row["tokens"] / row["passes"] for row in rows),
        "count": len(rows)} for method, rows in table.items()}
    curves.draw(png, title, budgets, lines, ["tokens"])


def main(argv=None):
    """Run the command line; returns the exit code."""
    options, = command.Parser([Options], description=__doc__.split("\n")[0]).read(argv)
    if not adapters.folder_of(options.model):
        raise ValueError(f"{options.model!r} is no folder of an adapter; learn_to_collaborate.py makes "
                         "one")
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    journal.own_png(options.png)
    table = measure(options, console)
    report(table, options.batch == 1, console)
    if options.png:
        draw(options.png, f"{Path(options.model).name} on {options.kind}s that it has not seen", table)
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
