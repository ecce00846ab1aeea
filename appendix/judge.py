r"""Appendix: how well do they collaborate? A model judges runs, on levels from 1 to 6.

Paper, section 4.3 and appendix H. The runs are those of chapter 7's files: workers who do not see each
other (self-consistency), who see finished steps (interleaved), who see every token (hogwild). A judge is
given all that each worker wrote, one worker after the other (whoever writes short steps must not look
livelier than who does not), three times with different randomness; the level of a run is the mean.

Who judges: any model of transformers, or whatever speaks OpenAI's protocol (--endpoint, with the key in
OPENAI_API_KEY; pip install openai). A judge that cannot put our own six conversations
(judge_examples.json) into their order is worth little: --calibrate shows what it makes of them.

    python appendix/judge.py limo.jsonl --model Qwen/Qwen3-8B --device cuda --out levels.jsonl
"""
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean

import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import (  # noqa: E402
    adapters,
    command,
    curves,
    engine,
    journal,
    models,
    protocol,
    results,
    tasks,
)
from appendix.command import option  # noqa: E402

generate = import_module("06_generate")
methods = import_module("appendix.methods")

EXAMPLES = Path(__file__).resolve().parent / "judge_examples.json"
LEVELS = """\
1. Nothing in common. They may greet each other, or mention that somebody is there. Each of them solves
   the problem from beginning to end, as if alone.
2. First words. They tell each other things, but nobody does anything with what was told. The same work
   is done twice, often without anybody noticing.
3. Attention. Now and then (one to three times each) somebody takes up what another one said, mostly in
   order to confirm it or to compare results. Work is hardly divided, or at the beginning only.
4. Conversation. Taking up each other's results, asking, answering, correcting happens regularly (four
   times each, or more), and not only at the beginning somebody proposes who does what, beyond one who
   calculates and one who checks. Some work is still done twice.
5. A team that adapts. Hardly anything is done twice, and no words are wasted. They divide the work,
   change the plan when a result or a mistake asks for it, find out where a mistake came from, and go on
   like that to the end.
6. As one. Everybody grasps at once what the others need, and the problem is solved in the best way that
   so many could. Very rare: only for what surpasses all that one could have wished for."""
RULES = r"""You judge how well several workers collaborate. Below is what they wrote while they solved a
problem together. All of them wrote at the same time, and could perhaps read what others were writing,
word by word. Here, everything that one worker wrote stands together, worker after worker. It may look
like a conversation and be several monologues; or the reverse.

These are the levels:
{levels}

A level is reached only if all levels below it are. To work on the same problem, even with the same
result, is level 1: without any exchange it is no more. An attempt to exchange that comes to nothing is
level 2. When in doubt, choose the lower one, and keep level 6 for the extraordinary. Judge how they work
together, not whether they are right, and do not solve the problem.

What they were asked:
{problem}

What they wrote:
{text}

That was all. Your task is to judge their collaboration, not to go on with theirs. Say briefly, for each
level from 1 upwards, what shows that it is reached, until one is not. End with the highest level that is
reached, a number from 1 to 6 within \boxed{{}}."""
VOTES = 3
SYNC = {"self-consistency": "no sync", "vote": "no sync", "interleaved": "step-wise", **dict.fromkeys(
    ("hogwild", "contiguous", "no-check", "re-encode"), "token-wise")}  # teams (in one stage), by method
ROW = {"method": str, "problem": int, "seed": int, "text": str, "levels": [(int, None)]}  # text: a hash


@dataclass
class Options(models.Options):
    """The command line."""

    endpoint: str | None = option(None, "URL of a server with OpenAI's protocol; --model: which of its")
    calibrate: bool = option(False, "judge the six examples instead")
    limit: int | None = option(None, "the first N problems only")
    seed: int = option(0, "of the judge's randomness")
    verdict_tokens: int = option(1024, "longest verdict")
    out: str | None = option(None, "keep verdicts in this file; what is in there is not judged again")
    png: str | None = option(None, "draw the levels (the paper's figure 7)")

    def __post_init__(self):
        """Raise ValueError, one sentence, if something makes no sense."""
        command.at_least(self, limit=1, seed=0, verdict_tokens=1)
        command.distinct(out=self.out, png=self.png)
        if self.tensor_parallel:
            raise ValueError("a judge runs in one process, without --tensor-parallel: --device-map auto "
                             "spreads a large one over all GPUs, and --endpoint asks a server")
        if self.endpoint and self.model == adapters.COLLABORATOR:
            raise ValueError("--endpoint needs --model, too: which of the server's models is to judge")


def page(texts):
    """All that was written, worker after worker: a list of texts -> one text."""
    return "\n\n".join(f"--- {name} ---\n{text.strip()}" for name, text in zip(protocol.NAMES, texts))


def level_of(verdict):
    """The level that a verdict ends with, or None."""
    said = protocol.find_boxed(verdict) or ""
    return int(said) if said in list("123456") else None


# ------------------------------------------------------------------------------------------ who judges

def local(options):
    """A judge: a model of transformers, in chapter 6's loop. prompt, seed -> verdict."""
    model, tokenizer = models.prepared(options)
    forward = engine.best_forward(model, options.attention)

    def judge(prompt, seed):
        """Let one worker write a verdict, to its end."""
        settings = generate.Settings(["1"], max_passes=options.verdict_tokens, check_every=0, seed=seed,
                                     prompt="{problem}", **methods.SOLO)
        run = generate.Hogwild(model, tokenizer, prompt, settings, forward)
        run.boxed_by = lambda *_: None  # a level that is named on the way is none
        while run.ending is None:
            run.advance()
        return methods.written(run)[0]
    return judge


def remote(options):
    """A judge behind an endpoint. prompt, seed -> verdict."""
    try:
        from openai import OpenAI, OpenAIError
    except ImportError as error:
        raise ValueError("--endpoint needs another package: pip install openai") from error
    client = OpenAI(base_url=options.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def judge(prompt, seed):
        """Ask for a verdict."""
        try:
            said = client.chat.completions.create(
                model=options.model, messages=[{"role": "user", "content": prompt}], seed=seed,
                max_tokens=options.verdict_tokens)
            return said.choices[0].message.content or ""
        except (OpenAIError, AttributeError, IndexError, TypeError) as error:  # (nothing may be said)
            raise ValueError(f"the judge at {options.endpoint} did not answer: "
                             f"{command.first_line(error)}") from error
    return judge


def levels(judge, problem, texts, seed):
    """What the judge says of a run, VOTES times: a list of levels; None: a verdict without one, or the
    run is too long for this judge."""
    prompt = RULES.format(levels=LEVELS, problem=problem, text=page(texts))
    try:
        return [level_of(judge(prompt, seed + vote)) for vote in range(VOTES)]
    except generate.TooLong:
        return [None] * VOTES


def judged(row):
    """What a verdict is about: a run, and a hash of what was written in it."""
    return results.key_of(row), hashlib.sha256(json.dumps(row["text"]).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------- the command line

def examples(judge, seed):
    """What the judge makes of the six examples: prints it; returns whether it found their order."""
    given = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    found = [levels(judge, given["problem"], texts, seed) for texts in given["levels"]]
    means = [mean(filter(None, votes)) if any(votes) else 0 for votes in found]
    for number, (votes, one) in enumerate(zip(found, means), 1):
        print(f"level {number}: judged {one:.2f}  {votes}")
    return means == sorted(means) and len({*means}) == len(means)


def report(rows, png):
    """Print, and draw, the mean level of each method with its 95 % interval; and how many of its runs
    got no level, and are not in the mean, or got one by a single vote."""
    table = {}
    for row in rows:
        name = f"{row['method']} {SYNC[row['method'].partition(':')[0]]}"
        votes, found = table.setdefault(name, ([], {}))
        given = [*filter(None, row["levels"])]
        votes.append(len(given))
        if given:
            found.setdefault(row["problem"], []).append(mean(given))
    print(f"{'method':30}{'runs':>6}{'no level':>10}{'one vote':>10}{'level':>8}{'95 % interval':>18}")
    bars = {}
    for name, (votes, found) in table.items():
        # (0: below the levels, so that there is a place in the picture, and no bar in it)
        middle, low, high = curves.difference([*map(mean, found.values())] or [0], 0)
        level, wide = f"{middle:.2f}", f"{low:.2f} – {high:.2f}"
        if len(found) < curves.FEW:
            low, high, wide = np.nan, np.nan, "too few problems"
        if not found:
            level = wide = "–"
        bars[name] = middle, low, high
        print(f"{name:30}{len(votes):6}{votes.count(0):10}{votes.count(1):10}{level:>8}{wide:>18}")
    if png and bars:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        middle, low, high = np.array([*bars.values()]).T
        axis.bar([*bars], middle, yerr=[middle - low, high - middle])
        axis.set(ylim=(1, 6), ylabel="level of collaboration (1 to 6), with 95 % intervals")
        figure.savefig(png)


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser(Options, description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="results of chapter 7")
    parser.add_argument("--data", help="the file of problems, if chapter 7 was given one")
    options, rest = parser.read(argv)
    journal.own_png(options.png)
    if bool(rest.files) == options.calibrate:
        raise ValueError("give files of results of chapter 7, or else --calibrate")
    judge = remote if options.endpoint else local
    if options.calibrate:
        if not examples(judge(options), options.seed):
            raise command.Failed("this judge does not put the examples into their order")
        print("[OK] this judge puts the examples into their order")
        return 0
    files = [file for path in rest.files for file in results.files_of(path) or [path]]
    header, rows = results.read(files)
    rows = [row for row in results.one_each(rows) if not row["error"] and len(row["text"]) > 1
            and row["method"].partition(":")[0] in SYNC]
    if not rows:
        raise ValueError(f"there is no run of several workers in {', '.join(rest.files)}")
    problems = tasks.load(header["task"], rest.data)[:options.limit]
    if header["data"] != (label := rest.data and tasks.label(rest.data)):
        raise ValueError(f"these are runs on {header['data'] or 'problems of the task itself'}, not on "
                         f"{label or 'those of the task itself'}: give --data as chapter 7 was given it")
    rows = [row for row in rows if row["problem"] < len(problems)]
    about = {name: getattr(options, name) for name in ("model", "endpoint", "dtype", "seed",
                                                     "verdict_tokens")}
    about |= {f"judged_{name}": header[name] for name in ("model", "task", "data")}
    with journal.Journal(options.out, "levels", about, ROW, durable=True) as out:
        known = {(results.key_of(row), row["text"]): row["levels"] for row in out.rows}
        todo = [row for row in rows if judged(row) not in known]
        judge = judge(options) if todo else None
        for row in track(todo, "judging", disable=not sys.stdout.isatty()):
            key, text = judged(row)
            known[key, text] = found = levels(judge, problems[row["problem"]]["question"], row["text"],
                                              options.seed)
            out.add(dict(zip(ROW, (*key, text, found))))
    report([{**row, "levels": known[judged(row)]} for row in rows], options.png)
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
