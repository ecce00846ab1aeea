r"""What it brings that many runs share each pass (appendix/batching.py): problems per minute.

hogwild:2 one problem at a time, 8 and 16 at a time; and the baseline 16 at a time, beside transformers'
own batched `generate` (prompts padded on the left, the same number of new tokens, greedy; the stock
model). All take the same number of passes on the generated lists of chapter 7, prompts included; nobody
may end earlier, and nobody is asked. Medians of rounds in which the contestants take turns, after a
short one that is not counted. The times are those of the processor, on one thread (speed.py says why).

    python tests/speed_batch.py            (--dtype bfloat16, --json FILE; an hour or less)
"""
import copy
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from appendix import batching, command, journal, methods, models, products, protocol, tasks  # noqa: E402
from appendix.command import option  # noqa: E402

speed, generate = import_module("speed"), import_module("06_generate")
shared_cache, query_rotation = import_module("02_shared_cache"), import_module("04_query_rotation")
TEAM = {"workers": protocol.NAMES[:2]}  # hogwild:2
ALONE = {"workers": protocol.NAMES[:1], **methods.SOLO, "forbid_special": True}  # nobody ends its text


@dataclass
class Options:
    """What is measured."""

    model: str = option(models.BUNDLED, "hub name, local folder or GGUF file")
    dtype: str = option("float32", "of the weights")
    passes: int = option(256, "of each run")
    rounds: int = option(5, "of all contestants")
    json: str | None = option(None, "write all figures to this file")

    def __post_init__(self):
        """Raise ValueError, one sentence, if something makes no sense."""
        command.at_least(self, passes=1, rounds=1)
        if self.json:
            journal.own_picture(self.json, b'[{"passes"')


def job(make, passes):
    """A run of so many passes: a job that returns the ids that each worker has sampled."""
    run = make()
    while len(run.passes) < passes:
        run.take(run.sample((yield run.writers())))
    run.release()
    return [[record["sampled"][w.name] for record in run.passes] for w in run.workers]


def shared(model, tokenizer, settings, questions, at_once, passes):
    """Do the questions, `at_once` of them side by side: per run and worker, the ids that it sampled."""
    cache = shared_cache.SharedCache(query_rotation.attach(model))
    told = generate.Settings(max_passes=passes, greedy=True, **settings)
    jobs = (job(lambda one=one: generate.Hogwild(model, tokenizer, one, told, None, cache), passes)
            for one in questions)
    return list(batching.side_by_side(jobs, lambda groups: generate.feed(model, cache, groups), at_once))


def stock(model, tokenizer, questions, passes):
    """The same questions by the stock model's `generate`, in one batch: the new ids of each."""
    told = generate.Settings(**ALONE)
    prompt = models.chat(tokenizer, *protocol.instructions(told, False))
    rows = [models.encode_prompt(tokenizer, prompt, one) for one in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    never = models.forbidden_ids(model, tokenizer, told).tolist()
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=passes,
                         min_new_tokens=passes, suppress_tokens=never, pad_token_id=0)
    return [[row] for row in out[:, longest:].tolist()]


def contestants(model, tokenizer):
    """{name: (how many problems at a time, a function of (questions, passes))}."""
    fast = products.fast_products(copy.deepcopy(model, {id(p): p for p in model.parameters()}))

    def ours(settings, at_once):
        return at_once, lambda questions, passes: shared(fast, tokenizer, settings, questions, at_once,
                                                         passes)
    return {"hogwild:2": ours(TEAM, 1), "hogwild:2, 8": ours(TEAM, 8), "hogwild:2, 16": ours(TEAM, 16),
            "baseline, 16": ours(ALONE, 16),
            "generate, 16": (16, lambda questions, passes: stock(model, tokenizer, questions, passes))}


def measure(options):
    """Print the table; returns its rows, as dicts."""
    model, tokenizer = models.load(options.model, "cpu", options.dtype)
    model.set_attn_implementation("sdpa")
    questions = [problem["question"] for problem in tasks.load("lists")[:16]]
    all_of_them = contestants(model, tokenizer)
    seconds, written = {name: [] for name in all_of_them}, {}
    for number in range(options.rounds + 1):
        turned = questions[number:] + questions[:number]  # who does one gets another one each time
        for name, (at_once, do) in all_of_them.items():
            begin = speed.clock()
            said = do(turned[:at_once], options.passes if number else min(8, options.passes))
            seconds[name].append((speed.clock() - begin) / at_once)
            written[name] = sum(len(ids) for run in said for ids in run)
    taken = {name: median(times[1:]) for name, times in seconds.items()}
    rows = [{}]
    for name, (at_once, _) in all_of_them.items():
        other = "hogwild:2" if name.startswith("hogwild") else "generate, 16"
        speed.add(rows, contestant=f"{name:14}", at_once=at_once, tokens=written[name],
                  problems_per_minute=60 / taken[name], ratio=taken[other] / taken[name],
                  to=f"{other:12}")
    return rows[1:]


def main(argv=None):
    """Run the command line; returns the exit code."""
    options, = command.Parser(Options, description=__doc__.split("\n")[0]).read(argv)
    torch.set_num_threads(1)
    rows = [{"passes": options.passes, "rounds": options.rounds, "model": options.model,
             "dtype": options.dtype, "torch": torch.__version__}]
    with torch.no_grad():
        rows += measure(options)
    if options.json:
        Path(options.json).write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
