r"""Appendix: a tiny model that has learned to collaborate, so that one can see what concurrent attention is good for.

The problem. The paper asks large models to collaborate and finds that they can, more or less, without training. On a laptop
there is no such model. But collaboration is a skill like others: a transformer of 0.9 million parameters can learn it in
minutes, if the task needs nothing else. Then the paper's claim can be watched: *faster at equal accuracy*, with a cause.

The task. A list of numbers; each is replaced by the sum of the squares of its digits until that is 1 or 4. How many steps
does that take for all numbers together (last digit)? Nobody can tell how long a number takes without doing it, so dividing
the list in advance leaves somebody idle. Instead:
- a worker who is free *claims* the number after the last one claimed, as seen in the shared cache at that very moment;
- those who are free in the same pass see each other: who comes first by name takes the first number, and so on;
- each carries the sum of its own steps along. When nothing is left, workers count themselves off (`1 done`, `2 done` ...)
  and pass the sum on like a baton: the second to be done adds the first one's, the third the second's; the last answers.

    Puzzle, ideal          the task, and what an ideal worker writes next, given what it sees: the rules above, as a function
    play                   a whole run of an ideal team, with the bookkeeping of chapter 6's loop, without a model
    make_model, train      a stock LlamaForCausalLM, trained on such runs through replay.py; only the workers' tokens count
    solve, METHODS         the trained model in chapter 6's own loop, in several ways that differ in who sees what
    report, draw           one table, one figure

What to notice: training needs no code for attention, and decoding none for collaboration. The ablations are layouts.
Left out: reinforcement learning, and any model that was not made for this task. appendix/collaboration.md has the results.

    python appendix/learn_to_collaborate.py                   a few problems with the weights in appendix/team, half a minute
    python appendix/learn_to_collaborate.py --problems 200 --out results.jsonl --png curves.png
    python appendix/learn_to_collaborate.py --train team2     trains from scratch: 2 processes, about a quarter of an hour
"""
import json
import os
import random
import re
import sys
import time
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

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
DONE = [f"{number} done" for number in range(1, 5)]  # what is claimed when no number is left: to be done first, second ...
STEPS = {number: len(chain(number)) - 1 for number in range(10, 100) if 4 <= len(chain(number)) <= 11}  # 3 to 10


class Puzzle:
    """A list of numbers, each with a label. `work[label]` are the words of working on it, `answer` is the last digit."""

    def __init__(self, chance, least=8, most=10, starts=tuple(STEPS)):
        numbers = dict(zip(LABELS, chance.sample(starts, chance.randint(least, most))))
        chains = {label: chain(number) for label, number in numbers.items()}
        self.text = "\n".join(f"{label}: {number}" for label, number in numbers.items())
        self.work = {label: [*(f" {n}" for n in numbers), f", {len(numbers) - 1} steps"] for label, numbers in chains.items()}
        self.answer = str(sum(len(numbers) - 1 for numbers in chains.values()) % 10)


def ideal(puzzle, me, own, others, past):
    """The next word of worker `me`, who sees what the arguments hold and nothing else.

    The words of a step: first the one that ended the worker's step before (it carries the sum), then what comes after the
    header; of these the first says what the step is for.

    Args:
        own: words of its unfinished step; others: {worker: words of its unfinished step}, of those that can be seen.
        past: [(worker, words)], finished steps.
    """
    seen = [*past, *others.items(), (me, own)]
    begun = [(w, words[1]) for w, words in seen if len(words) > 1]
    rank = {w: word for w, word in begun if word in DONE}
    match own[1:]:
        case [] if me not in rank:  # free: claim what comes next; who is free in this very pass too goes in order of names
            ladder = [f"{label}:" for label in puzzle.work] + DONE
            ahead = sum(w < me and w not in rank and len(words) == 1 for w, words in others.items())
            return ladder[max([ladder.index(word) for _, word in begun if word in ladder], default=-1) + 1 + ahead]
        case []:
            last = {w for w, _ in seen} == rank.keys() and rank[me] == max(rank.values())
            return ", \\boxed{" if last else ", wait"
        case [claim, *work] if is_claim(claim) and len(work) < len(puzzle.work[claim[0]]):
            return puzzle.work[claim[0]][len(work)]
        case [done, *waits] if done in DONE[1:] and {*waits} <= {", wait"}:  # the baton, as soon as it can be seen
            before = f", sum of {int(done[0]) - 1}:"
            return next((f", {carried(words)} steps" for _, words in seen if words[0].startswith(before)), ", wait")
        case [", wait", *_]:
            return ", wait"
        case [", \\boxed{"]:
            return str(carried(own))
        case [", \\boxed{", _]:
            return "}"
        case [first, *rest]:  # the step is done
            total = (carried(own) + int(rest[-1].split()[-2] if rest else 0)) % 10
            return f", sum of {first[0]}: {total}.\n\n" if first in DONE else f", sum {total}.\n\n"


def is_claim(word):
    """Is it `C:`?"""
    return len(word) == 2 and word[1] == ":"


def carried(words):
    """The sum that a worker carries along: it stands in the word that ended the step before this one."""
    return int(words[0][-4]) if words[0].startswith(", sum") else 0


def play(puzzle, tokenizer, workers, layout):
    """A run of an ideal team, as chapter 6 would record it. Returns the arguments of `replay.record`."""
    plan, word_id = layouts.layout(layout, workers), vocabulary(tokenizer)
    prompt = tokenizer.encode(f"{puzzle.text}\n\n" + (generate.PAST_STEPS if plan.moves else ""))
    pending = [opening(tokenizer, "\n\n", name, 1) for name in NAMES[:workers]]
    if not plan.headers:
        prompt, pending = prompt[:-1], [prompt[-1:]] * workers
    own, past, step, passes, words = [["\n\n"] for _ in range(workers)], [], [1] * workers, [], []
    while "}" not in words:
        words = []
        for w in range(workers):
            others = {v: own[v] for v in range(workers) if v != w and layout == "combined"}
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
    words += [f"{label}:" for label in LABELS] + [f", {steps} steps" for steps in range(11)]
    words += [f" {number}" for number in sorted({number for start in STEPS for number in chain(start)})]
    words += [word for digit in range(10)
              for word in (f"{digit}", f", sum {digit}.\n\n", *(f", sum of {rank}: {digit}.\n\n" for rank in range(1, 5)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    tokenizer.decoder = decoders.Fuse()  # the text is the words, side by side
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@cache
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
GROWING = 0.4  # lists grow from 4 to 10 numbers over the first 40 % of the steps; half of them stay short, to teach endings


def lesson(tokenizer, chance, progress):
    """Recordings of ideal teams for one step of one process. progress: 0 ... 1, how much of the training is over."""
    recordings = []
    while sum(len(recording.ids) for recording in recordings) < TOKENS:
        most = 5 if chance.random() < 0.5 else 4 + round(6 * min(1, progress / GROWING))
        steps = chance.randint(3, 9)  # numbers that take equally long make workers free in the same pass: that is hard
        alike = [number for number in STEPS if STEPS[number] in (steps, steps + 1)]
        puzzle = Puzzle(chance, 1, most, alike if chance.random() < 0.5 else [*STEPS])
        layout = chance.choices(["combined", "interleaved", "independent"], [28, 1, 1])[0]
        workers = chance.choice({"combined": [1, 2, 2, 3, 4, 4, 4], "interleaved": [2, 4], "independent": [1]}[layout])
        recordings.append(replay.record(*play(puzzle, tokenizer, workers, layout)))
    return recordings


def learn(rank, folder, seed, steps):
    """One process of the training. Whatever it draws depends on seed, step and rank alone, so it can go on at any step."""
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
    """Adam on the mean gradient of all processes. Returns the log: a dict for each time that the state was kept."""
    ropes, parameters = query_rotation.attach(model), [*model.parameters()]
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    decision = r"[A-J]:|\d done|, wait|, \d+ steps|, sum of .*\s*|, .boxed{|\d"  # rare or hard
    weight = torch.tensor([3.0 if re.fullmatch(decision, word) else 1.0 for word in words])
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
        sampled = sampled[sampled != replay.NOTHING]
        logits, _ = replay.encode(model, ropes, recordings, frugal=False)
        loss = F.cross_entropy(logits, sampled, weight)
        optimizer.zero_grad()
        loss.backward()
        gradient = parameters_to_vector([parameter.grad for parameter in parameters])
        dist.all_reduce(gradient)  # the sum; what is used is the mean, and its norm is 1 at most
        vector_to_parameters(gradient * min(1 / PROCESSES, 1 / gradient.norm().item()), [p.grad for p in parameters])
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        optimizer.step()
        if rank == 0 and ((step + 1) % KEEP_EVERY == 0 or step + 1 == steps):
            log.append({"step": step + 1, "seconds": round(time.perf_counter() - start), "loss": round(loss.item(), 4),
                        **agreement(logits.argmax(-1), sampled, words)})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "log": log}
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
            print("   ".join(f"{name} {value}" for name, value in log[-1].items()), flush=True)
    return log


def agreement(chosen, sampled, words):
    """By kind of word, the share of words that the model would have written as the ideal team did."""
    kinds = {"claims": r"[A-J]:|\d done", "numbers": r" \d+", "sums": r", sum.*\n\n",
             "answers": r"\d"}
    same = {kind: [a == b for a, b in zip(chosen.tolist(), sampled.tolist()) if re.fullmatch(pattern, words[b])]
            for kind, pattern in kinds.items()}
    return {kind: round(sum(hits) / max(1, len(hits)), 3) for kind, hits in same.items()}


def keep_model(model, tokenizer, folder, log, options):
    """Write weights, config and tokenizer as transformers does, and how they were made; the checkpoint is not needed then."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"command": f"python appendix/learn_to_collaborate.py --train {folder.name} {options}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()), "torch": torch.__version__, "log": log}
    (folder / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink()


def train(folder, seed, steps):
    """Train from scratch, or go on from folder/checkpoint.pt, and write the model into `folder`."""
    folder = Path(folder).resolve()
    if (folder / "model.safetensors").exists():
        raise ValueError(f"{str(folder)!r} has a trained model already; name another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting-point").unlink(missing_ok=True)  # where the processes find each other
    try:
        processes.spawn(learn, (folder, seed, steps), nprocs=PROCESSES)
    finally:
        (folder / "meeting-point").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- measuring

METHODS = {  # workers, layout, how finished steps get to the history
    "1 worker": (1, "combined", generate.Hogwild),
    "2 workers": (2, "combined", generate.Hogwild),
    "4 workers": (4, "combined", generate.Hogwild),
    "2, step-wise": (2, "interleaved", generate.Hogwild),
    "4, step-wise": (4, "interleaved", generate.Hogwild),
    "2, independent": (2, "independent", generate.Hogwild),
    "4, independent": (4, "independent", generate.Hogwild),
    "2, re-encoded": (2, "combined", evaluation.Reencode),
    "4, re-encoded": (4, "combined", evaluation.Reencode),
}


def solve(model, tokenizer, puzzle, method):
    """Let a team work on a puzzle, in chapter 6's loop, each word the likeliest. Returns what the report needs."""
    workers, layout, kind = METHODS[method]
    settings = generate.Settings(NAMES[:workers], layout, max_passes=300, check_every=0, greedy=True, prompt="{problem}")
    run = kind(model, tokenizer, puzzle.text, settings)
    start = time.perf_counter()
    while run.ending is None:
        run.advance()
    seconds = time.perf_counter() - start
    lines, begun = [""] * workers, []
    for record in run.passes:
        for w, token in record["sampled"].items():
            word = tokenizer.convert_ids_to_tokens(token)
            lines[w] += (word[0] if is_claim(word) else "." if word in (*DONE, ", wait")
                         else "=" if re.fullmatch(r", sum of .*\s*|, .boxed{|\d|}", word) else lines[w][-1:])
    for w in range(workers):
        written = [tokenizer.convert_ids_to_tokens(record["sampled"][w]) for record in run.passes]
        begun += [claim for claim, word in pairwise(written) if is_claim(claim) and word[0] == " "]
    return {"method": method, "answer": run.boxed, "right": run.boxed == puzzle.answer, "passes": len(run.passes),
            "seconds": seconds, "lines": lines, "twice": len(begun) - len(set(begun)),
            "never": len(puzzle.work) - len(set(begun))}


def ratio(results, base, key, draws=2000):
    """Mean of `key` over that of `base` on the same problems, and its 95 % interval from redrawing problems (bootstrap)."""
    chance, pairs = random.Random(0), [(mine[key], theirs[key]) for mine, theirs in zip(results, base)]
    drawn = sorted((lambda some: sum(a for a, _ in some) / sum(b for _, b in some))(chance.choices(pairs, k=len(pairs)))
                   for _ in range(draws))
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs), drawn[round(0.025 * draws)], drawn[round(0.975 * draws) - 1]


def report(console, results):
    """Print the table. results: {method: [result per problem]}"""
    base, count = results["1 worker"], len(results["1 worker"])
    console.print(f"\n{count} fresh problems; 95 % intervals. Passes and seconds: relative to 1 worker. Per problem:\n"
                  "how often a number was worked on again (twice), and how many were left out (never).\n", soft_wrap=True)
    console.print(f"  {'':16}{'right':>22}{'passes':>8}{'relative passes':>22}{'relative seconds':>22}{'twice':>7}{'never':>7}",
                  style="bold", soft_wrap=True)
    for method, rows in results.items():
        share = sum(row["right"] for row in rows) / count
        cells = ["{:.1%} ({:.1%}–{:.1%})".format(share, *evaluation.interval(share, count))]
        cells += ["{:.3f} ({:.3f}–{:.3f})".format(*ratio(rows, base, key)) for key in ("passes", "seconds")]
        passes, twice, never = (sum(row[key] for row in rows) / count for key in ("passes", "twice", "never"))
        console.print(f"  {method:16}{cells[0]:>22}{passes:8.1f}{cells[1]:>22}{cells[2]:>22}{twice:7.2f}{never:7.2f}",
                      soft_wrap=True)


def draw(png, results):
    """Share of problems with a right answer after so many passes, as a PNG (in the manner of the paper's figure 4)."""
    import matplotlib  # here, because it takes a second
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(9, 4.8), constrained_layout=True)
    for number, (method, rows) in enumerate(results.items()):
        after = range(0, 1 + max(row["passes"] for rows in results.values() for row in rows))
        share = [sum(row["right"] and row["passes"] <= passes for row in rows) / len(rows) for passes in after]
        low, high = zip(*(evaluation.interval(value, len(rows)) for value in share))
        style = ["-", "--", ":", "-."][0 if number < 3 else 1 + (number - 3) // 2]
        colour = {"1": "black", "2": "tab:blue", "4": "tab:red"}[method[0]]
        axis.plot(after, share, style, color=colour, label=method)
        axis.fill_between(after, low, high, color=colour, alpha=0.05)
    axis.set(xlabel="sequential forward passes", ylabel="share of problems with the right answer, 95 % intervals",
             title=f"A tiny model that has learned to collaborate ({len(rows)} problems)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(png, dpi=130)
    pyplot.close(figure)


def show(console, result):
    """One line per worker: which number it works on in each pass."""
    answer = f"{result['answer']}, {'right' if result['right'] else 'wrong'}"
    console.print(f"{result['method']}: {result['passes']} passes, {result['seconds']:.2f} s, answer {answer}"
                  f"{', done twice: ' + str(result['twice']) if result['twice'] else ''}", style="bold", soft_wrap=True)
    for name, line in zip(NAMES, result["lines"]):
        text = Text(f"  {name:6}")
        for letter in line[::2]:
            style = f"black on {COLOURS[LABELS.index(letter) % 6]}" if letter in LABELS else "dim"
            text.append(letter, style)
        console.print(text, soft_wrap=True)


COLOURS = ["cyan", "magenta", "green", "yellow", "bright_blue", "white"]


def measure(console, folder, count, out=None, png=None):
    """Show one problem, then solve `count` fresh ones in all ways, taking turns, and print the table."""
    torch.set_num_threads(1)
    try:
        model, tokenizer = generate.shared_cache.load_model(str(folder))
    except ValueError as error:
        raise ValueError(f"there is no trained model in {str(folder)!r} ({error})") from error
    path, results = Path(out) if out else None, []
    if path and path.exists():
        results = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    known = {(result["problem"], result["method"]) for result in results}
    console.print("Which number (A, B, C ...) each worker works on, one letter for two passes.\n"
                  "A dot: nothing is left to claim. =: adding up.\n")
    for number in range(count):
        puzzle = Puzzle(random.Random(f"fresh {number}"))
        for method in METHODS:
            if (number, method) not in known:
                results.append({"problem": number, **solve(model, tokenizer, puzzle, method)})
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
            if number == 0:
                show(console, next(r for r in results if (r["problem"], r["method"]) == (0, method)))
        if console.is_terminal:
            console.print(f"\r{number + 1} of {count} problems", end="", style="dim")
    table = {method: sorted((r for r in results if r["method"] == method and r["problem"] < count), key=lambda r: r["problem"])
             for method in METHODS}
    report(console, table)
    if png:
        draw(png, table)
    return table


def main(argv=None):
    """The command line; returns the exit code."""
    parser = generate.Parser(description="A tiny model that has learned to work in a team.")
    parser.add_argument("--problems", type=int, default=8, metavar="N", help="how many fresh problems (default: 8)")
    parser.add_argument("--model", default=str(TEAM), metavar="FOLDER", help="the trained model (default: the one in here)")
    parser.add_argument("--out", metavar="FILE", help="keep results, one JSON line each; what is in there is not solved again")
    parser.add_argument("--png", metavar="FILE", help="draw the curves")
    parser.add_argument("--train", metavar="FOLDER", help="train from scratch instead; goes on where it was stopped")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--steps", type=int, default=1650, help="of the training (default: 1650)")
    args, console = parser.parse_args(argv), Console(highlight=False)
    try:
        if args.train:
            train(args.train, args.seed, args.steps)
            return 0
        if args.problems < 1:
            raise ValueError(f"--problems is {args.problems}; it must be at least 1")
        for path in filter(None, (args.out, args.png)):
            generate.check_writable(path)
        table = measure(console, args.model, args.problems, args.out, args.png)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was kept", file=sys.stderr)
        return 130
    means = {method: sum(row["passes"] for row in rows) / len(rows) for method, rows in table.items()}
    two, four = (means[method] / means["1 worker"] for method in ("2 workers", "4 workers"))
    fast = two < 0.62 and four < 0.45
    console.print(f"\n{'[OK]' if fast else 'Not as it should be:'} 2 workers take {two:.2f} of the passes of one, "
                  f"4 workers {four:.2f}", markup=False, soft_wrap=True)
    return 0 if fast else 1


# Exercises
# 1. Give every number to a worker in advance (A, C, E ... to Alice) and change `ideal` accordingly. How many passes does
#    the same list take, and who waits for whom?
# 2. Nobody in the training data ever makes a mistake. Let some claim a number that is taken (and give it up one pass
#    later), with `replay.NOTHING` as the label of the mistake itself. Is less done twice then, or more?
# 3. Five names: what has to change so that Erin can join? Does a model trained on four workers do without training?

if __name__ == "__main__":
    sys.exit(main())
