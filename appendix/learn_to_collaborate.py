r"""Appendix: a tiny model that has learned to collaborate, so that one can see what concurrent attention is good for.

The problem. The paper asks large models to collaborate and finds that they can, more or less, without training. On a laptop
there is no such model. But collaboration is a skill like others: a transformer of 0.9 million parameters can learn it in
minutes, if the task needs nothing else. Then the paper's claim can be watched: *faster at equal accuracy*, with a cause.

The task. A list of numbers; each is replaced by the sum of the squares of its digits until that is 1 or 4. How many rounds
does that take for all numbers together (last digit)? Nobody can tell how long a number takes without doing it, so dividing
the list in advance leaves somebody idle. Instead:
- a worker who is free *claims* the number after the last one claimed, as seen in the shared cache at that very moment;
- workers who become free in the same pass see each other's headers with nothing after them: they claim in order of names;
- each carries the sum of its own rounds along. When nothing is left, workers count themselves off (`1 done`, `2 done` ...)
  and pass the sum on like a baton: the second to be done adds the first one's, the third the second's; the last answers.

    Puzzle, ideal          the task, and what an ideal worker writes next, given what it sees: the rules above, as a function
    play                   a whole run of an ideal team, with the bookkeeping of chapter 6's loop, without a model
    make_model, train      a stock LlamaForCausalLM, trained on such runs through replay.py; only what workers choose counts
    solve, METHODS         the trained model in chapter 6's own loop, in several ways that differ in who sees what
    report, draw           one table, one figure

What to notice: training needs no code for attention, and decoding none for collaboration. The ablations are layouts: the same
rules, with less to see. Who cannot see unfinished steps claims what the others have claimed too, and everybody does everything.
Left out: reinforcement learning, and any model that was not made for this task. appendix/collaboration.md has the results.

    python appendix/learn_to_collaborate.py                   a few problems with the weights in appendix/team, half a minute
    python appendix/learn_to_collaborate.py --problems 200 --out results.jsonl --png curves.png
    python appendix/learn_to_collaborate.py --train team2     trains from scratch: 2 processes, about a quarter of an hour;
                                                              then --model team2 instead of appendix/team
"""
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")
evaluation = import_module("07_eval_limo")
replay = import_module("replay")

TEAM = Path(__file__).resolve().parent / "team"  # the trained model
NAMES = generate.NAMES[:4]  # the model knows these four
disable_progress_bar()  # a file of 3.5 MB needs none

# ------------------------------------------------------------------------------------------------------------- the task


def chain(number):
    """The number, the sum of the squares of its digits, and so on until 1 or 4 (every number gets to one of them)."""
    numbers = [number]
    while numbers[-1] not in (1, 4):
        numbers.append(sum(int(digit) ** 2 for digit in str(numbers[-1])))
    return numbers


LABELS = "ABCDEFGHIJ"
DONE = [f"{rank} done" for rank in range(1, len(NAMES) + 1)]  # claimed when no number is left
ROUNDS = {number: len(chain(number)) - 1 for number in range(10, 100) if 3 <= len(chain(number)) - 1 <= 10}


class Puzzle:
    """A list of numbers of two digits, each with a label, that take 3 to 10 rounds.

    text: the problem. work: {label: words of working on that number}. answer: the last digit of all rounds.
    """

    def __init__(self, chance, least=8, most=10, starts=tuple(ROUNDS)):
        numbers = dict(zip(LABELS, chance.sample(starts, chance.randint(least, most))))
        self.text = "\n".join(f"{label}: {number}" for label, number in numbers.items())
        self.work = {label: [*(f" {n}" for n in chain(number)), f", {ROUNDS[number]} rounds"]
                     for label, number in numbers.items()}
        self.answer = str(sum(ROUNDS[number] for number in numbers.values()) % 10)


def ideal(puzzle, me, own, others, past):
    r"""The next word of worker `me`, who sees what the arguments hold and nothing else.

    A step is a list of words without its header: [", sum 7.\n\n", "C:", " 23", " 13"]. The first one ended the worker's step
    before, and carries its sum; the second says what the step is for.

    Args:
        own: its unfinished step; others: {worker: unfinished step}, of those that can be seen.
        past: [(worker, step)], finished ones, its own too. The word that ended a step is the first of the worker's next one.
    """
    seen = [*past, *others.items(), (me, own)]
    begun = [(w, words[1]) for w, words in seen if len(words) > 1]
    rank = {w: word for w, word in begun if word in DONE}
    match own[1:]:
        case [] if me not in rank:  # free: claim what comes next, after those of earlier name who have only a header too
            ladder = [f"{label}:" for label in puzzle.work] + DONE
            ahead = sum(w < me and w not in rank and len(words) == 1 for w, words in others.items())
            return ladder[max([ladder.index(word) for _, word in begun if word in ladder], default=-1) + 1 + ahead]
        case []:  # step-wise, several may be `1 done`, and the last: then they have all done everything, and all answer
            last = {w for w, _ in seen} == rank.keys() and rank[me] == max(rank.values())
            return ", \\boxed{" if last else ", wait"
        case [claim, *work] if is_claim(claim) and len(work) < len(puzzle.work[claim[0]]):
            return puzzle.work[claim[0]][len(work)]
        case [done, *waits] if done in DONE[1:] and {*waits} <= {", wait"}:  # take over the baton as soon as it can be seen:
            before = f", sum of {int(done[0]) - 1}:"  # ... `, 7 rounds`, like one's own, because it is added like them
            return next((f", {carried(words)} rounds" for _, words in seen if words[0].startswith(before)), ", wait")
        case [", wait", *_]:
            return ", wait"
        case [", \\boxed{"]:
            return str(carried(own))
        case [", \\boxed{", _]:
            return "}"
        case [first, *rest]:  # the step is done; its last word is `, 7 rounds`, except that `1 done` takes over nothing
            total = (carried(own) + int(rest[-1].split()[-2] if rest else 0)) % 10
            return f", sum of {first[0]}: {total}.\n\n" if first in DONE else f", sum {total}.\n\n"


def is_claim(word):
    """Is it `C:`?"""
    return len(word) == 2 and word[1] == ":"


def carried(words):
    """The sum that a worker carries along: it stands in the word that ended the step before this one."""
    return int(words[0][-4]) if words[0].startswith(", sum") else 0  # the digit before `.\n\n`


def play(puzzle, tokenizer, workers, layout):
    """A run of an ideal team, as chapter 6 would record it. Returns the arguments of `replay.record`.

    Workers who do not see unfinished steps all begin alike, so they stay alike: each is the first to be done, and answers.
    """
    plan, word_id = layouts.layout(layout, workers), vocabulary(tokenizer)
    prompt = tokenizer.encode(f"{puzzle.text}\n\n" + (generate.PAST_STEPS if plan.moves else ""))
    pending = [opening(tokenizer, "\n\n", name, 1) for name in NAMES[:workers]]
    if not plan.headers:  # then everybody begins with the last token of the prompt
        prompt, pending = prompt[:-1], [prompt[-1:]] * workers
    own, step, past, passes, words = [["\n\n"] for _ in range(workers)], [1] * workers, [], [], []
    while "}" not in words:
        words = []
        for w in range(workers):
            others = {v: own[v] for v in range(workers) if v != w and layout == "combined"}  # the others hide them
            words.append(ideal(puzzle, w, own[w], others, [(v, done) for v, done in past if v == w or plan.moves]))
        sampled = [word_id[word] for word in words]
        passes.append({"fed": dict(enumerate(pending)), "sampled": dict(enumerate(sampled)), "closed": []})
        pending = [[token] for token in sampled]
        for w, word in enumerate(words):
            own[w] = [*own[w], word]
            if word.endswith(".\n\n"):
                past.append((w, own[w][:-1]))
                own[w], step[w] = [word], step[w] + 1
                passes[-1]["closed"].append({"worker": w})
                if plan.headers:
                    pending[w] = opening(tokenizer, word, NAMES[w], step[w])
    return plan, prompt, {name: tokenizer.encode(generate.SEPARATORS[name]) for name in plan.separator_views}, passes


# -------------------------------------------------------------------------------------------------------------- the model

def make_tokenizer():
    """One token per word of the task; the protocol's strings are one token each, and headers three or four."""
    words = ["<unk>", "<end>", generate.PAST_STEPS, *generate.SEPARATORS.values(), generate.CHECK, generate.FINISHER,
             "\n", "\n\n", "]:** ", *(f"**{name} [" for name in NAMES), *DONE, ", wait", ", \\boxed{", "}"]
    words += [f"{label}:" for label in LABELS] + [f", {rounds} rounds" for rounds in range(11)]
    words += [f" {number}" for number in sorted({number for start in ROUNDS for number in chain(start)})]
    words += [word for digit in range(10)
              for word in (f"{digit}", f", sum {digit}.\n\n", *(f", sum of {done[0]}: {digit}.\n\n" for done in DONE))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    tokenizer.decoder = decoders.Fuse()  # the text is the words, side by side
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@cache  # asking the tokenizer would take most of the time of `play`
def vocabulary(tokenizer):
    """{word: id}"""
    return tokenizer.get_vocab()


@cache
def opening(tokenizer, word, name, step):
    """Token ids with which a step begins: the word that ended the one before, and the header."""
    return tokenizer.encode(word + generate.header(name, step))


def make_model(tokenizer):
    """A Llama of 4 layers and width 128, with random weights."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.08))  # about 1 / sqrt(width); the usual 0.02 is made for wider models and learns later here


# ----------------------------------------------------------------------------------------------------------- training

PROCESSES, TOKENS = 2, 1200  # each process takes whole runs until it has so many tokens; gradients are averaged
KEEP_EVERY = 100  # steps between two checkpoints
RATE, WARM_UP = 3e-3, 60
GROWING = 0.4  # the longest list grows from 4 to 10 numbers over the first 40 % of the steps; one half stays below 6: endings
LESSONS = {  # layout: of 30 lessons how many; with how many workers. Who sees nothing of others writes what one alone does
    "combined": (27, [1, 2, 2, 3, 4, 4, 4, 4]), "interleaved": (1, [2, 4]), "independent": (2, [1])}
KINDS = {"claims": r"[A-J]:|\d done", "rounds": r", \d+ rounds", "batons": r", sum of \d: \d\.\n\n", "sums": r", sum \d\.\n\n",
         "numbers": r" \d+", "endings": r", wait|, \\boxed\{|\d"}  # of words
WEIGHT = {"claims": 3.0, "rounds": 3.0, "batons": 3.0, "endings": 3.0}  # in the loss, others 1: what is hard or rare


def lesson(tokenizer, chance, progress):
    """Recordings of ideal teams for one step of one process. progress: 0 ... 1, how much of the training is over."""
    recordings = []
    while sum(len(recording.ids) for recording in recordings) < TOKENS:
        most = 5 if chance.random() < 0.5 else 4 + round(6 * min(1, progress / GROWING))
        rounds = chance.randint(3, 9)  # numbers that take equally long make workers free in the same pass, which is hard
        alike = [number for number in ROUNDS if ROUNDS[number] in (rounds, rounds + 1)]  # at least 10
        puzzle = Puzzle(chance, 1, most, alike if chance.random() < 0.5 else [*ROUNDS])
        layout, = chance.choices([*LESSONS], [share for share, _ in LESSONS.values()])
        workers = chance.choice(LESSONS[layout][1])
        recordings.append(replay.record(*play(puzzle, tokenizer, workers, layout)))
    return recordings


def learn(rank, folder, seed, steps):
    """One process of the training. What it draws depends on seed, step, steps and rank alone: it can go on at any step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting-point'}", rank=rank, world_size=PROCESSES)
    try:
        tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        model = make_model(tokenizer).train()
        log = descend(model, tokenizer, rank, folder / "checkpoint.pt", seed, steps)
        if rank == 0:
            keep_model(model, tokenizer, folder, log, f"--seed {seed} --steps {steps}")
    finally:
        dist.destroy_process_group()


def descend(model, tokenizer, rank, checkpoint, seed, steps):
    """AdamW on the mean gradient of all processes, its norm clipped to 1. Returns the log: a dict per time state was kept."""
    ropes, parameters = query_rotation.attach(model), [*model.parameters()]
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    weight = torch.tensor([WEIGHT.get(kind_of(word), 1.0) for word in words])
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first, log = 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, log = saved["step"], saved["log"]
    start = time.perf_counter() - (log[-1]["seconds"] if log else 0)
    for step in range(first, steps):
        recordings = lesson(tokenizer, random.Random(f"{seed} {step} {rank}"), step / steps)
        sampled = torch.cat([recording.sampled for recording in recordings])
        sampled = sampled[sampled != replay.NOTHING]  # [M], what workers chose
        logits, _ = replay.encode(model, ropes, recordings, frugal=False)  # [M, vocabulary]; so short a row needs no frugality
        loss = F.cross_entropy(logits, sampled, weight)
        optimizer.zero_grad()
        loss.backward()
        gradient = parameters_to_vector([parameter.grad for parameter in parameters])  # [parameters], in one piece
        dist.all_reduce(gradient)  # DistributedDataParallel would want to wrap the model's own forward pass
        gradient /= PROCESSES
        vector_to_parameters(gradient / max(1, gradient.norm()), [parameter.grad for parameter in parameters])
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        optimizer.step()
        if rank == 0 and ((step + 1) % KEEP_EVERY == 0 or step + 1 == steps):
            log.append({"step": step + 1, "seconds": round(time.perf_counter() - start), "loss": round(loss.item(), 4),
                        **agreement(logits.argmax(-1), sampled, words)})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "log": log,
                     "of": (seed, steps)}
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
            print("   ".join(f"{name} {value}" for name, value in log[-1].items()), flush=True)
    return log


def kind_of(word):
    """The kind of a word (KINDS), or None."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, word)), None)


def agreement(chosen, sampled, words):
    """By kind of word, the share of words that the model would have written as the ideal team did."""
    same = {kind: [] for kind in KINDS}
    for a, b in zip(chosen.tolist(), sampled.tolist()):
        same.get(kind_of(words[b]), []).append(a == b)
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in same.items() if hits}


def keep_model(model, tokenizer, folder, log, options):
    """Write weights, config and tokenizer as transformers does, and how they were made; delete the checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"command": f"python appendix/learn_to_collaborate.py --train {folder.name} {options}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()), "torch": torch.__version__, "log": log}
    (folder / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def train(folder, seed, steps):
    """Train from scratch, or go on from folder/checkpoint.pt, and write the model into `folder`."""
    folder = Path(folder).resolve()
    checkpoint, meeting_point = folder / "checkpoint.pt", folder / "meeting-point"  # where the processes find each other
    if (folder / "model.safetensors").exists() and not checkpoint.exists():
        raise ValueError(f"{str(folder)!r} has a trained model already; name another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        try:
            of = torch.load(checkpoint)["of"]
        except Exception as error:  # of any kind: it may be any file
            raise ValueError(f"{str(checkpoint)!r} is no checkpoint of a training; delete it") from error
        if of != (seed, steps):
            raise ValueError(f"what is in {str(folder)!r} was begun with --seed {of[0]} --steps {of[1]}; go on with these")
    try:
        if evaluation.fcntl:  # until this process ends
            evaluation.fcntl.flock(os.open(folder, os.O_RDONLY), evaluation.fcntl.LOCK_EX | evaluation.fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another process is training in {str(folder)!r}: wait for it, or name another folder") from error
    meeting_point.unlink(missing_ok=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
    try:
        children = processes.spawn(learn, (folder, seed, steps), PROCESSES, join=False, daemon=True)  # which end with it
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        while not children.join():
            pass
    except (processes.ProcessRaisedException, processes.ProcessExitedException) as error:
        raise ValueError(f"the training stopped: {str(error).strip().splitlines()[-1]}") from error
    finally:
        meeting_point.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- measuring

METHODS = {  # workers, layout, loop, line in the figure
    "1 worker": (1, "combined", generate.Hogwild, "-"),
    "2 workers": (2, "combined", generate.Hogwild, "-"),
    "4 workers": (4, "combined", generate.Hogwild, "-"),
    "2, step-wise": (2, "interleaved", generate.Hogwild, "--"),  # sees finished steps of the others only
    "4, step-wise": (4, "interleaved", generate.Hogwild, "--"),
    "2, independent": (2, "independent", generate.Hogwild, ":"),  # sees nothing of them
    "4, independent": (4, "independent", generate.Hogwild, ":"),
    "2, re-encoded": (2, "combined", evaluation.Reencode, "-."),  # encodes a finished step anew instead of moving it
    "4, re-encoded": (4, "combined", evaluation.Reencode, "-."),
}
MOST = 300  # passes; nobody who knows the task needs half as many


def solve(model, tokenizer, puzzle, method):
    """Let a team work on a puzzle, in chapter 6's loop, each word the likeliest. Returns what the report needs."""
    workers, layout, loop, _ = METHODS[method]
    settings = generate.Settings(NAMES[:workers], layout, max_passes=MOST, check_every=0, greedy=True, prompt="{problem}")
    start = time.perf_counter()
    run = loop(model, tokenizer, puzzle.text, settings)
    while run.ending is None:
        run.advance()
    seconds = time.perf_counter() - start
    written = [tokenizer.convert_ids_to_tokens([record["sampled"][w] for record in run.passes if w in record["sampled"]])
               for w in range(workers)]
    # a claim counts once work on it has begun
    begun = [claim for words in written for claim, word in pairwise(words) if is_claim(claim) and kind_of(word) == "numbers"]
    return {"method": method, "answer": run.boxed, "right": run.boxed == puzzle.answer, "passes": len(run.passes),
            "seconds": seconds, "lines": [line_of(words) for words in written], "again": len(begun) - len(set(begun)),
            "never": len(puzzle.work.keys() - {claim[0] for claim in begun})}


def line_of(words):
    """A letter per word of a worker: the label of the number that it works on, `.` if none is left, `=` for the sum."""
    line = ""
    for word in words:
        line += (word[0] if is_claim(word) else "." if word in (*DONE, ", wait")
                 else "=" if kind_of(word) in ("batons", "endings") else line[-1:] or "?")
    return line


def ratio(rows, base, key, draws=2000):
    """Mean of `key` over that of `base` on the same problems, and its 95 % interval from redrawing problems (bootstrap)."""

    def quotient(pairs):
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    pairs, chance = [(row[key], other[key]) for row, other in zip(rows, base)], random.Random(0)
    drawn = sorted(quotient(chance.choices(pairs, k=len(pairs))) for _ in range(draws))
    return quotient(pairs), drawn[round(0.025 * draws)], drawn[round(0.975 * draws) - 1]


def mean(rows, key):
    """Mean of a column."""
    return sum(row[key] for row in rows) / len(rows)


def report(console, table):
    """Print the table. table: {method: [result per problem]}"""
    base = table["1 worker"]
    console.print(f"\n{len(base)} fresh problems; 95 % intervals. Passes and seconds: relative to 1 worker. Per problem:\n"
                  "how often a number was worked on once more than needed (again), and how many nobody worked on (never).\n",
                  soft_wrap=True)
    console.print(f"  {'':16}{'right':>22}{'passes':>8}{'relative passes':>22}{'relative seconds':>22}{'again':>7}{'never':>7}",
                  style="bold", soft_wrap=True)
    for method, rows in table.items():
        share = mean(rows, "right")
        cells = ["{:.1%} ({:.1%}–{:.1%})".format(share, *evaluation.interval(share, len(rows)))]
        cells += ["{:.3f} ({:.3f}–{:.3f})".format(*ratio(rows, base, key)) for key in ("passes", "seconds")]
        console.print(f"  {method:16}{cells[0]:>22}{mean(rows, 'passes'):8.1f}{cells[1]:>22}{cells[2]:>22}"
                      f"{mean(rows, 'again'):7.2f}{mean(rows, 'never'):7.2f}", soft_wrap=True)


def draw(png, table):
    """Share of problems with a right answer after so many passes, as a PNG (in the manner of the paper's figure 4)."""
    import matplotlib  # here, because it takes a second
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(9, 4.8), constrained_layout=True)
    after = range(0, round(1.1 * max(row["passes"] for row in table["1 worker"])))
    for method, rows in table.items():
        share = [sum(row["right"] and row["passes"] <= passes for row in rows) / len(rows) for passes in after]
        low, high = zip(*(evaluation.interval(value, len(rows)) for value in share))
        colour = {1: "black", 2: "tab:blue", 4: "tab:red"}[METHODS[method][0]]
        axis.plot(after, share, METHODS[method][-1], color=colour, label=method)
        axis.fill_between(after, low, high, color=colour, alpha=0.06, linewidth=0)
    axis.set(xlabel="sequential forward passes", ylabel="share of problems with the right answer, 95 % intervals",
             title=f"A tiny model that has learned to collaborate ({len(table['1 worker'])} problems)")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize="small")
    figure.savefig(png, dpi=130)
    pyplot.close(figure)


COLOURS = ["cyan", "magenta", "green", "yellow", "bright_blue", "white"]  # A and G look alike, and so on


def show(console, result):
    """One line per worker: which number it works on, in every second pass."""
    answer = f"{result['answer']}, {'right' if result['right'] else 'wrong'}"
    console.print(f"{result['method']}: {result['passes']} passes, {result['seconds']:.2f} s, answer {answer}"
                  f"{', done again: ' + str(result['again']) if result['again'] else ''}", style="bold", soft_wrap=True)
    for name, line in zip(NAMES, result["lines"]):
        text = Text(f"  {name:6}")
        for letter in line[::2]:
            style = f"black on {COLOURS[LABELS.index(letter) % 6]}" if letter in LABELS else "dim"
            text.append(letter, style)
        console.print(text, soft_wrap=True)


def measure(console, folder, count, out=None):
    """Show an example, then solve `count` fresh problems in all ways, taking turns. What is in `out` is not solved again.

    Returns {method: [result per problem]}.
    """
    torch.set_num_threads(1)
    weights = Path(folder) / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"there is no trained model in {str(folder)!r}; --train makes one")
    model, tokenizer = generate.shared_cache.load_model(str(folder))
    if not vocabulary(tokenizer).keys() >= {*DONE}:
        raise ValueError(f"the model in {str(folder)!r} has not learned this task; --train makes one that has")
    made_by = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    results = {key: row for key, row in kept(out) if key[0] == made_by}
    example = Puzzle(random.Random("example"))  # not counted
    solve(model, tokenizer, example, "1 worker")  # the first run is slow
    console.print("Which number (A, B, C ...) each worker works on, one letter for two passes.\n"
                  "A dot: nothing is left to claim. =: the sum, or the answer.\n")
    for method in METHODS:
        show(console, solve(model, tokenizer, example, method))
    for number in range(count):
        puzzle = Puzzle(random.Random(f"fresh {number}"))
        for method in METHODS:
            key = made_by, number, method
            if key not in results:
                results[key] = {"weights": made_by, "problem": number, **solve(model, tokenizer, puzzle, method)}
                if out:
                    with open(out, "a") as file:
                        file.write(json.dumps(results[key]) + "\n")
        if console.is_terminal:
            console.print(f"\r{number + 1} of {count} problems", end="", style="dim")
    return {method: [results[made_by, number, method] for number in range(count)] for method in METHODS}


RESULT = {"weights", "problem", "method", "answer", "right", "passes", "seconds", "lines", "again", "never"}


def kept(path):
    """((weights, problem, method), result) for each line of the file. A line that was cut short is taken away."""
    path = Path(path or os.devnull)
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        cut = bool(lines) and not lines[-1].endswith("\n") and lines[-1].startswith('{"weights": '[:len(lines[-1])])
        rows = [json.loads(line) for line in lines[:len(lines) - cut]]
        if any(row.keys() != RESULT for row in rows):
            raise KeyError("other keys")
        if cut:
            path.write_text("".join(lines[:-1]))
        return [((row["weights"], row["problem"], row["method"]), row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no file of results; name another one (--out)") from error


ENOUGH = {"1 worker": 1.0, "2 workers": 0.6, "4 workers": 0.4}  # of the passes of one worker, in most problems
RIGHT = 0.75  # of the problems at least: a few hundred show more, but eight may be hard ones


def main(argv=None):
    """The command line; returns the exit code."""
    parser = generate.Parser(description="A tiny model that has learned to work in a team.")
    parser.add_argument("--problems", type=int, default=8, metavar="N", help="how many fresh problems (default: 8)")
    parser.add_argument("--model", default=str(TEAM), metavar="FOLDER", help="the trained model (default: the one in here)")
    parser.add_argument("--out", metavar="FILE", help="keep results, one JSON line each; what is in there is not solved again")
    parser.add_argument("--png", metavar="FILE", help="draw the curves")
    parser.add_argument("--train", metavar="FOLDER", help="train from scratch instead; goes on where it was stopped")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--steps", type=int, default=1800, help="of the training (default: 1800)")
    args, console = parser.parse_args(argv), Console(highlight=False)
    try:
        for name, value in (("--problems", args.problems), ("--steps", args.steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; it must be at least 0, and below 2^63")
        if args.train is not None:
            train(args.train, args.seed, args.steps)
            return 0
        if args.png and Path(args.png).suffix != ".png":
            raise ValueError(f"--png draws a PNG, so the file has to end in .png, not as {args.png!r} does")
        if args.png and args.out and Path(args.png).resolve() == Path(args.out).resolve():
            raise ValueError(f"--out and --png name the same file, {args.png!r}; results and picture need one each")
        for path in filter(None, (args.out, args.png)):
            generate.check_writable(path)
        table = measure(console, args.model, args.problems, args.out)
        report(console, table)
        if args.png:
            draw(args.png, table)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the same command goes on from what was kept" if args.out or args.train else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    relative = {method: median(row["passes"] / base["passes"] for row, base in zip(table[method], table["1 worker"]))
                for method in ENOUGH}
    good = all(relative[method] <= most and mean(table[method], "right") >= RIGHT for method, most in ENOUGH.items())
    console.print(f"\n{'[OK]' if good else 'Not as it should be:'} 2 workers take {relative['2 workers']:.2f} of the passes "
                  f"of one, 4 workers {relative['4 workers']:.2f} (medians)", markup=False, soft_wrap=True)
    return 0 if good else 1


# Exercises
# 1. Give every number to a worker in advance (A, C, E ... to Alice) and change `ideal` accordingly. How many passes does
#    the same list take, and who waits for whom?
# 2. Nobody in the training data ever makes a mistake. Let some claim a number that is taken (and give it up one pass
#    later), with `replay.NOTHING` as the label of the mistake itself. Is less done twice then, or more?
# 3. Five names: what has to change so that Erin can join? Can a model that was trained on four work in a team of five?

if __name__ == "__main__":
    sys.exit(main())
