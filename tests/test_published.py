"""Chapter 7's methods against the published algorithms, done naively: the stock model's `generate`,
prompts put together by hand, plain sampling, majorities counted; and tests/oracle.py where views are
shared."""
import copy
import random
import re
from collections import Counter
from importlib import import_module

import pytest
import torch
from helpers import evaluated, keeping, often, tiny, tokenizer
from oracle import NaiveCache, follow, naive_pass

from appendix import methods, protocol

evaluation, generate = import_module("07_eval_limo"), import_module("06_generate")
QUESTION = "How much is 3 + 4?"
TASK = "\n\nReason step by step, and put your final answer within \\boxed{}."
PROBLEM = {"question": QUESTION, "answers": ["7"]}


@pytest.fixture(scope="module")
def toy():
    """(a tiny random model, a tokenizer, the same model with its stock attention)."""
    model = tiny("llama")
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    return model, tokenizer(), stock


def start(toy, spec, **others):
    """The runs of a method."""
    told = generate.Settings(**{"max_passes": 400, "answer_tokens": 3, **others})
    return evaluation.runs_of(spec, *toy[:2], PROBLEM, told)


def chat(toy, user):
    """Token ids of what a user says, up to where the reply begins."""
    told = [{"role": "user", "content": user}]
    return toy[1].apply_chat_template(told, add_generation_prompt=True, return_dict=False)


def ids_of(text):
    """Token ids of a text."""
    return tokenizer()(text, add_special_tokens=False).input_ids


def greedily(toy, ids, count):
    """What `generate` writes behind these ids."""
    told = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    return toy[2].generate(torch.tensor([ids]), **told)[0, len(ids):].tolist()


@torch.no_grad()
def sampled(toy, ids, count, name, seed):
    """Sampling as in a textbook: temperature 0.6, the 50 likeliest tokens, of these the first ones that
    make 95 %; a worker draws a number for each pass."""
    new = []
    while len(new) < count and new[-1:] != [toy[1].eos_token_id]:
        logits = toy[2](torch.tensor([ids + new])).logits[0, -1].double() / 0.6
        best, tokens = logits.sort(descending=True)
        chances = best[:50].softmax(-1)
        sums = (chances * (chances.cumsum(-1) - chances < 0.95)).cumsum(-1)
        draw = random.Random(f"{seed} {name} {len(new)}").random() * sums[-1]
        new.append(int(tokens[int((sums < draw).sum())]))
    return new


def asked(toy, ids):
    """What is answered behind these ids, by who is made to conclude at once."""
    said = greedily(toy, ids + ids_of(protocol.FINISHER), 3)
    return toy[1].decode([i for i in said if i != toy[1].eos_token_id]).split("}")[0].strip()


def tokens_of(run, passes):
    """Advance so often; returns per worker the tokens that it has sampled."""
    records = [run.advance() for _ in range(passes)]
    return {w.name: [record["sampled"][w.name] for record in records if w.name in record["sampled"]]
            for w in run.workers}


def test_samples_and_their_votes(toy):
    """Self-consistency: independent samples, and one who reads all of them; votes: each is asked, and
    the most frequent answer wins."""
    samples = {name: sampled(toy, chat(toy, QUESTION + TASK), 8, name, 3) for name in protocol.NAMES[:3]}
    assert len({*map(tuple, samples.values())}) == 3
    run, = start(toy, "vote:3", seed=3)
    assert tokens_of(run, 8) == samples
    answers = [asked(toy, chat(toy, QUESTION + TASK) + ids) for ids in samples.values()]
    assert run.answer() == Counter(answers).most_common(1)[0][0] and len({*answers}) > 1
    run, = start(toy, "self-consistency:3", seed=3)
    assert tokens_of(run, 8) == samples
    # Nobody has seen the others so far; now all texts stand one behind the other.
    cache, (*prompt, last) = NaiveCache(toy[2], 4), chat(toy, QUESTION + TASK)
    naive_pass(toy[2], cache, [([0], prompt)])
    for block, ids in enumerate(samples.values(), start=1):
        naive_pass(toy[2], cache, [([0, block], [last, *ids])])
    said, coming = [], ids_of(protocol.FINISHER)
    while len(said) < 3 and said[-1:] != [toy[1].eos_token_id]:
        logits, = naive_pass(toy[2], cache, [([0, 1, 2, 3], coming)])
        said, coming = [*said, int(logits.argmax())], [int(logits.argmax())]
    assert run.answer() == toy[1].decode(said).split("}")[0].strip()


def test_a_debate(toy):
    """Two rounds of sampling; in the second, everybody's prompt has the others' texts and its own."""
    names, stages = protocol.NAMES[:2], start(toy, "debate:2", seed=5, max_passes=12)
    first = [sampled(toy, chat(toy, QUESTION + TASK), 6, name, 5) for name in names]
    run = next(stages)
    assert [*tokens_of(run, 6).values()] == first and run.ending == "passes"
    one, two = (toy[1].decode(ids).strip() for ids in first)
    prompts = [chat(toy, methods.AGAIN.format(problem=QUESTION, own=own, others=others))
               for own, others in ((one, two), (two, one))]
    second = [sampled(toy, ids, 6, name, 5) for ids, name in zip(prompts, names)]
    run = next(stages)
    assert [*tokens_of(run, 6).values()] == second != first and run.ending == "passes"
    answers = [asked(toy, ids + new) for ids, new in zip(prompts, second)]
    assert run.answer() == Counter(answers).most_common(1)[0][0] and next(stages, None) is None


def forced(monkeypatch, run, words, end):
    """The named workers write these words; others, and they later on, what the model would; who has
    written `end` tokens ends its text."""
    own, sample = {name: iter(ids_of(text)) for name, text in words.items()}, run.sample
    counts = Counter()

    def write(logits):
        tokens = []
        for w, token in zip(run.next_writers(), sample(logits)):
            counts[w.name] += 1
            token = next(own.get(w.name, iter(())), token)
            tokens.append(run.tokenizer.eos_token_id if counts[w.name] > end.get(w.name, 999) else token)
        return tokens
    monkeypatch.setattr(run, "sample", write)


@pytest.mark.parametrize("spec, passes", [("skeleton", 7), ("skeleton:1", 21)])
def test_a_skeleton(toy, monkeypatch, spec, passes):
    """An outline; each of its points continued by `generate`; then one who has read that goes on."""
    stages, plan = start(toy, spec, greedy=True), "1. Take three.\n2. Take four.\n3. Add."
    outline = next(stages)
    assert tokens_of(outline, 6)["Alice"] == greedily(toy, chat(toy, methods.OUTLINE.format(
        problem=QUESTION)) + ids_of("1."), 6)
    stages = start(toy, spec, greedy=True)
    outline = next(stages)
    forced(monkeypatch, outline, {"Alice": plan[2:]}, {"Alice": len(ids_of(plan[2:]))})
    while outline.ending is None:
        outline.advance()
    threads, read = tokens_of(next(stages), passes), ""
    for k, (point, new) in enumerate(zip(plan.split("\n"), threads.values()), start=1):
        told = methods.POINT.format(problem=QUESTION, outline=plan, number=k)
        assert new == greedily(toy, chat(toy, told) + ids_of(point), 7)
        read += f"{point} {toy[1].decode([i for i in new if i != toy[1].eos_token_id]).strip()}\n\n"
    last = next(stages)
    assert len(threads) == 3 and tokens_of(last, 6)["Alice"] == greedily(
        toy, chat(toy, QUESTION + TASK) + ids_of(read), 6)
    assert next(stages, None) is None


def test_fork_and_join(toy, monkeypatch):
    """A part is what `generate` says of it; who writes waits, and goes on as if that stood there."""
    run, = start(toy, "fork-join", greedy=True)
    words = "Let us see. <part>3 + 4</part> Well: <join/>"
    forced(monkeypatch, run, {"Alice": words}, {"Bob": 6})
    while not run.joined:
        run.advance()
    part = greedily(toy, chat(toy, methods.PART.format(problem=QUESTION, part="3 + 4")), 6)
    assert toy[1].decode(part).strip() == methods.written(run)[0].strip()
    before = chat(toy, methods.FORK.format(problem=QUESTION)) + ids_of(words)
    text = greedily(toy, before + ids_of(f"\n3 + 4: {toy[1].decode(part).strip()}\n\n"), 9)
    assert tokens_of(run, 9)["Alice"] == text


@pytest.mark.parametrize("spec", ["hogwild:1", "hogwild:3", "contiguous:2", "interleaved:2",
                                  "no-check:2", "re-encode:2"])
def test_ablations(toy, monkeypatch, spec):
    """Each pass has the logits of the stock attention on views that are laid out by hand."""
    often(monkeypatch, 4)
    run, = start(toy, spec, greedy=True, check_every=8, prompt="{names}: {problem}")
    prompt, logits, passes = run.ids[run.history], [], []
    run.forward = keeping(run.forward, logits)
    for _ in range(20):
        logits.clear()
        run.advance()
        passes.append(logits[0])
    layout = spec.split(":")[0] if spec[0] in "ci" else "combined"
    names, cache = run.settings.workers, []
    if spec != "re-encode:2":
        cache = follow(toy[2], toy[1], layout, names, prompt, run.passes)
    else:
        cache = encoded_anew(toy, names, prompt, run.passes)
    for ours, theirs in zip(passes, cache, strict=True):
        assert (ours - theirs).abs().max() < 1e-3 < 0.1 < theirs.abs().max()
    closed = [step for record in run.passes for step in record["closed"]]
    said = any(protocol.CHECK in step["opened"] for step in closed)
    assert len(closed) > 1 and (spec == "hogwild:1" or said == (spec != "no-check:2"))


def encoded_anew(toy, names, prompt, records):
    """As oracle.follow in the combined layout, but finished steps are encoded behind the history."""
    class Anew(NaiveCache):
        def move(self, source, target):
            self.keys[source], self.values[source], self.length[source] = {}, {}, 0
            naive_pass(toy[2], self, [([target], steps.pop(0))])
    steps, fed = [], {name: [] for name in names}
    for record in records:
        for name, ids in record["fed"].items():
            fed[name] += ids
        for closed in record["closed"]:
            steps.append(fed.pop(closed["worker"]))
            fed[closed["worker"]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("oracle"), "NaiveCache", Anew)
        yield from follow(toy[2], toy[1], "combined", names, prompt, records)


def test_early_stop_and_none(toy, monkeypatch):
    """At each budget: the box that stands in the first so many tokens; or else what `generate` concludes
    behind them, which without early stop is nothing."""
    words = "We add 3 and 4.\n\nThat makes \\boxed{7} in all.\n\nReally."
    monkeypatch.setattr(generate.Hogwild, "sample", lambda run, _: [ids_of(words)[len(run.passes)]])
    budgets = list(range(1, len(ids_of(words)), 3))
    found = evaluated(start(toy, "baseline", max_passes=budgets[-1]), budgets)
    unasked = evaluation.unasked({**found, "method": "baseline"})
    assert unasked["method"] == "no-early-stop" and {**found, **unasked}.keys() == unasked.keys()
    for budget in budgets:
        ids, entries = ids_of(words)[:budget], [row["answers"][str(budget)] for row in (found, unasked)]
        boxes = re.findall(r"\\boxed\{(.*?)\}", toy[1].decode(ids))
        late = asked(toy, chat(toy, QUESTION + TASK) + ids)
        assert entries[0]["answer"] == (boxes or [late])[0] and entries[0]["in_time"] == bool(boxes)
        assert entries[1]["answer"] == (boxes or [None])[0]
        assert entries[1]["score"] == bool(boxes)
        assert entries[1]["passes"] == entries[0]["passes"] <= budget
    assert boxes and late
