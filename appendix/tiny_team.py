r"""Appendix: a tiny model that has learned to collaborate: what concurrent attention is good for.

A transformer of 0.9 million parameters can learn to collaborate in minutes, if the task needs nothing
else. Then the paper's claim can be watched: *faster at equal accuracy*, with a cause. The task: each
number of a list is replaced by the sum of the squares of its digits until that is 1 or 4; how many
rounds does that take for all together (last digit)? Nobody can tell how long a number takes without
doing it, so dividing the list in advance leaves somebody idle. Instead:
- a worker who is free *claims* the number after the last one claimed, as seen in the cache right then;
- who become free in the same pass see each other's headers, and claim in order of names;
- each carries the sum of its own rounds along. When nothing is left, workers count themselves off
  (`1 done`, `2 done` ...) and pass the sum on like a baton; the last one answers.

Training needs no code for attention, and decoding none for collaboration. The ablations are layouts: who
cannot see unfinished steps claims what others have claimed, and everybody does everything.

    python appendix/tiny_team.py                          with the weights in appendix/team
    python appendix/tiny_team.py --problems 200 --out results.jsonl --png curves.png
    torchrun --nproc-per-node 2 appendix/tiny_team.py --train team2      quarter of an hour
"""
import random
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import command, compare_teams, journal, models, recording, training  # noqa: E402
from appendix.command import option  # noqa: E402
from appendix.ideal_team import MOST, NAMES, start  # noqa: E402

query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")

TEAM = Path(__file__).resolve().parent / "team"  # the trained model


@dataclass
class Options:
    """The command line."""

    problems: int = option(8, "how many fresh problems")
    model: str = option(str(TEAM), "folder of the trained model")
    out: str | None = option(None, "keep results in this file; what is in there is not solved again")
    png: str | None = option(None, "draw the curves")
    train: str | None = option(None, "train from scratch into this folder; goes on where it was stopped")
    seed: int = option(0, "of the training")
    steps: int = option(1800, "of the training")


# ------------------------------------------------------------------------------------------ the task

def chain(number):
    """The number, the sum of the squares of its digits, and so on until 1 or 4 (all get there)."""
    return [number] if number in (1, 4) else [number, *chain(sum(int(d) ** 2 for d in str(number)))]


LABELS = [f"{letter}:" for letter in "ABCDEFGHIJ"]
DONE = [f"{rank} done" for rank in range(1, len(NAMES) + 1)]  # claimed when no number is left
ROUNDS = {start: len(chain(start)) - 1 for start in range(10, 100) if 3 <= len(chain(start)) - 1 <= 10}


class Puzzle:
    """A list of numbers of two digits, each with a label, that take 3 to 10 rounds.

    text: the problem. work: {label: words of working on that number}. answer: last digit of all rounds.
    """

    def __init__(self, chance, least=8, most=10, starts=tuple(ROUNDS)):
        numbers = dict(zip(LABELS, chance.sample(starts, chance.randint(least, most))))
        self.text = "\n".join(f"{label} {number}" for label, number in numbers.items())
        self.work = {label: [*(f" {n}" for n in chain(number)), f", {ROUNDS[number]} rounds"]
                     for label, number in numbers.items()}
        self.answer = str(sum(ROUNDS[number] for number in numbers.values()) % 10)


def ideal(puzzle, me, steps, past):
    r"""The next word of worker `me`, who sees what the arguments hold and nothing else.

    A step is a list of words without its header: [", sum 7.\n\n", "C:", " 23", " 13"]. The first one
    ended the worker's step before, and carries its sum; the second says what the step is for.

    Args:
        steps: {worker: unfinished step}, its own and those of others that it sees.
        past: [(worker, step)], finished ones, its own too.
    """
    own, seen = steps[me], [*past, *steps.items()]
    begun = [(w, words[1]) for w, words in seen if len(words) > 1]
    rank = {w: word for w, word in begun if word in DONE}
    match own[1:]:
        # Free: claim what comes next, after those of earlier name who have only a header, too.
        case [] if me not in rank:
            ladder = [*puzzle.work, *DONE]
            ahead = sum(w < me and w not in rank and len(words) == 1 for w, words in steps.items())
            claimed = [ladder.index(word) for _, word in begun if word in ladder]
            return ladder[max(claimed, default=-1) + 1 + ahead]
        # Done. (Step-wise, several may be `1 done`, and the last: all did everything, and all answer.)
        case [] | [", wait", *_]:
            last = {w for w, _ in seen} == rank.keys() and rank[me] == max(rank.values())
            return ", \\boxed{" if last else ", wait"
        case [claim, *work] if len(work) < len(puzzle.work.get(claim, "")):
            return puzzle.work[claim][len(work)]
        # Take over the baton as soon as it is seen: `, 7 rounds`, like one's own, as it is added alike.
        case [done, *waits] if done in DONE[1:] and {*waits} <= {", wait"}:
            before = f", sum of {int(done[0]) - 1}:"
            batons = [f", {carried(words)} rounds" for _, words in seen if words[0].startswith(before)]
            return [*batons, ", wait"][0]
        case [", \\boxed{", *digit]:
            return "}" if digit else str(carried(own))
        # The step is done; its last word is `, 7 rounds`, except that `1 done` takes over nothing.
        case [first, *rest]:
            total = (carried(own) + int(rest[-1].split()[-2] if rest else 0)) % 10
            return f", sum of {first[0]}: {total}.\n\n" if first in DONE else f", sum {total}.\n\n"


def carried(words):
    """The sum that a worker carries along: it stands in the word that ended the step before this one."""
    return int(words[0][-4]) if words[0].startswith(", sum") else 0  # the digit before `.\n\n`


def play(model, tokenizer, puzzle, layout, workers):
    """A run of an ideal team: (run, its Ledger). The model has no say in it, and computes nothing.

    Workers who do not see unfinished steps begin alike and stay alike: all do everything. So what those
    write who see nothing of each other is what one alone writes.
    """
    ledger, vocabulary = recording.Ledger(ropes=[]), tokenizer.get_vocab()
    run = start(generate.Hogwild, model, tokenizer, puzzle, layout, workers, ledger.forward, ledger)
    steps, past, words = {w: ["\n\n"] for w in range(workers)}, [], {}
    while "}" not in words.values():
        for w in steps:
            words[w] = ideal(puzzle, w, steps if layout == "combined" else {w: steps[w]}, past)
        tokens = [vocabulary[word] for word in words.values()]
        record = run.advance(tokens)
        ledger.label(tokens, weights=[1.0 if re.fullmatch(EASY, w) else 3.0 for w in words.values()])
        steps = {w: [*step, words[w]] for w, step in steps.items()}
        for closed in record["closed"]:
            w = NAMES.index(closed["worker"])
            past.append((w, steps[w][:-1]))
            steps[w] = steps[w][-1:]
    return run, ledger


# ---------------------------------------------------------------------------------------- training

TOKENS = 1200  # each process takes whole runs until it has so many tokens; gradients are averaged
KEEP_EVERY = 100  # steps between two checkpoints
RATE, WARM_UP = 3e-3, 60
GROWING = 0.4  # the longest list grows from 4 to 10 numbers in this share of the steps
# Whose lessons, how often. (Who sees nothing of others writes what one alone does.)
TEAMS = (27 * [("combined", workers) for workers in (1, 2, 2, 3, 4, 4, 4, 4)]
         + 4 * [("interleaved", 2), ("interleaved", 4)] + 16 * [("independent", 1)])
EASY = r" \d+|, sum \d\.\n\n|}"  # words that weigh 1 in the loss; others, hard or rare, weigh 3


def lesson(model, tokenizer, chance, progress):
    """Recordings of ideal teams for one step. progress: 0 ... 1, how much of the training is over."""
    recordings = []
    while sum(len(recorded.ids) for recorded in recordings) < TOKENS:
        most = 5 if chance.random() < 0.5 else 4 + round(6 * min(1, progress / GROWING))
        rounds = chance.randint(3, 9)
        # Numbers that take equally long make workers free in the same pass, which is hard.
        alike = [number for number in ROUNDS if ROUNDS[number] in (rounds, rounds + 1)]
        puzzle = Puzzle(chance, 1, most, alike if chance.random() < 0.5 else [*ROUNDS])
        _, ledger = play(model, tokenizer, puzzle, *chance.choice(TEAMS))
        recordings.append(ledger.recording())
    return recordings


def train(folder, seed, steps):
    """Train a model like that in TEAM from scratch, or go on from the folder's checkpoint (see
    training.py)."""
    def build():
        tokenizer = AutoTokenizer.from_pretrained(TEAM)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEAM)).train()
        ropes = query_rotation.attach(model)

        def loss_of(chance, progress):  # so short a row needs no frugality
            return recording.loss(model, ropes, lesson(model, tokenizer, chance, progress), frugal=False)

        def keep(about):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return [*model.parameters()], loss_of, keep
    training.train(folder, seed, steps, build, "model.safetensors", RATE, WARM_UP, KEEP_EVERY,
                   decay=0.01)


# --------------------------------------------------------------------------------------- measuring

# Workers see all; or finished steps of others; nothing of them; finished steps that are encoded anew.
WAYS = {" workers": ("combined", generate.Hogwild),
        **{f", {name}": how for name, how in compare_teams.WAYS.items()}}
METHODS = {"1 worker": ("combined", generate.Hogwild, 1)} | {
    f"{workers}{way}": (*how, workers) for way, how in WAYS.items() for workers in (2, 4)}


def solve(model, tokenizer, puzzle, method):
    """Let a team work on a puzzle. Returns what the report needs."""
    layout, loop, workers = METHODS[method]
    run = start(loop, model, tokenizer, puzzle, layout, workers)
    while run.ending is None and run.written_answer() is None:
        run.advance()
    written = [tokenizer.convert_ids_to_tokens([record["sampled"][name] for record in run.passes])
               for name in NAMES[:workers]]
    # A claim counts once work on it has begun.
    begun = [claim for words in written for claim, word in pairwise(words)
             if claim in puzzle.work and word[0] == " "]
    answer = run.written_answer()
    return {"method": method, "answer": answer or "", "score": float(answer == puzzle.answer),
            "passes": len(run.passes), "tokens": sum(len(record["sampled"]) for record in run.passes),
            "seconds": sum(record["seconds"] for record in run.passes),
            "again": len(begun) - len({*begun}), "never": len(puzzle.work) - len({*begun})}


def measure(console, options):
    """Solve fresh problems in all ways, which take turns: {method: [row of each problem]}."""
    if not Path(options.model, "model.safetensors").exists():
        raise ValueError(f"there is no trained model in {options.model!r}; --train makes one")
    model, tokenizer = models.load(options.model)
    about = {"weights": models.fingerprint(model)}
    with journal.Journal(options.out, "team", about, compare_teams.ROW, durable=True) as out:
        kept = {(row["problem"], row["method"]): row for row in out.rows}
        for number in track(range(options.problems), disable=not console.is_terminal):
            for method in METHODS:
                if (number, method) not in kept:
                    puzzle = Puzzle(random.Random(f"fresh {number}"))
                    out.add({"problem": number, **solve(model, tokenizer, puzzle, method)})
                    kept[number, method] = out.rows[-1]
    return {method: [kept[number, method] for number in range(options.problems)] for method in METHODS}


def main(argv=None):
    """Run the command line; returns the exit code."""
    options, = command.Parser([Options], description=__doc__.split("\n")[0]).read(argv)
    command.at_least(options, problems=1, seed=0, steps=1)
    command.distinct(out=options.out, png=options.png)
    torch.set_num_threads(1)
    if options.train:
        train(Path(options.train), options.seed, options.steps)
        return 0
    journal.own_png(options.png)
    console = Console(highlight=False, soft_wrap=True)
    table = measure(console, options)
    compare_teams.report(table, True, console)
    if options.png:
        compare_teams.draw(options.png, "A tiny model that has learned to collaborate", table)
    some = [table[method] for method in ("1 worker", "2 workers", "4 workers")]
    one, two, four = (median(row["passes"] for row in rows) for rows in some)
    # A few hundred problems show more than three quarters right, but eight may be hard ones.
    right = min(mean(row["score"] for row in rows) for rows in some)
    good = right >= 0.75 and two <= 0.6 * one and four <= 0.4 * one
    console.print(f"\n{'[OK]' if good else 'Not as it should be:'} 2 workers take {two:.0f} passes, 4 "
                  f"workers {four:.0f}, one {one:.0f} (medians)")
    return not good


# Exercises
# 1. Give every number to a worker in advance (A, C, E ... to Alice): change `ideal`. How many passes
#    does the same list take, and who waits for whom?
# 2. Let some claim a number that is taken, and give it up a pass later, with recording.IGNORE as the
#    label of the mistake. Is less done twice then, or more?
# 3. Five names: what has to change so that Erin can join? Can a model trained on four be five?

if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
