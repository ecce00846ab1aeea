"""Jobs side by side: every run writes what it writes alone, memory is used again, errors stay where they
belong."""
import random
from importlib import import_module

import pytest
import torch
from helpers import tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import batching

evaluation, generate = import_module("07_eval_limo"), import_module("06_generate")
shared_cache, query_rotation = import_module("02_shared_cache"), import_module("04_query_rotation")
METHODS = ["hogwild:2", "hogwild:3", "no-check:2", "contiguous:2", "interleaved:2", "re-encode:2",
           "baseline", "self-consistency:2", "vote:3", "debate:2", "debate-3:2", "skeleton",
           "skeleton:2", "fork-join"]
# What makes something happen: steps end, texts end, boxes, outlines, parts, joins. (None: five tokens of
# the model's own.)
PIECES = [None, None, ".\n\n", ".\n\n", ".\n\n", " \\boxed{7}.\n\n", "\n2. two\n3. three\n",
          "<part>a</part>", "<part>b</part><join/>", "<|im_end|>"]


def scripted(run, logits, sample=generate.Hogwild.sample):
    """The model's own words, and at times others, which depend on the worker and its problem alone."""
    tokens = sample(run, logits)
    for k, w in enumerate(run.next_writers()):
        own = sum(w.name in record["sampled"] for record in run.passes)
        chance = random.Random(f"{run.settings.seed} {w.name} {len(run.prompt)} {type(run).__name__}")
        script = [token for piece in chance.choices(PIECES, k=own + 1)
                  for token in ([None] * 5 if piece is None else run.encode(piece))]
        tokens[k] = tokens[k] if script[own] is None else script[own]
    return tokens


@pytest.fixture(scope="module")
def toy():
    """(a tiny random model, a tokenizer, ropes)"""
    model = tiny("llama")
    return model, tokenizer(), query_rotation.attach(model)


def job_of(toy, cache, number, spec, budgets, greedy):
    """A job: (its number, what `evaluate` returns but for seconds)."""
    problem = {"question": f"How much is {number} + 4?" + " Think." * (number % 5), "answers": ["7"]}
    told = generate.Settings(max_passes=budgets[-1], seed=number, greedy=greedy, check_every=20)
    runs = []
    coming = evaluation.runs_of(spec, *toy[:2], problem, told, None, cache)
    kept = (runs.append(run) or run for run in coming)
    result = yield from evaluation.evaluate(kept, problem, budgets)
    for run in runs:
        run.release()
    del result["seconds"]
    for answer in result["answers"].values():
        answer.pop("seconds", None)  # (late ones are the same one)
    return number, result


def all_of(toy, jobs, at_once):
    """{number: result} of (number, method, budgets, greedy), and the cache."""
    cache = shared_cache.SharedCache(toy[2])
    done = batching.side_by_side((job_of(toy, cache, *job) for job in jobs),
                                 lambda groups: generate.feed(toy[0], cache, groups), at_once)
    return dict(done), cache


def side_by_side(toy, jobs, at_once):
    """The results of jobs, which are those of each alone; all slots are free in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Hogwild, "sample", scripted)
        together, cache = all_of(toy, jobs, at_once)
        assert together == {job[0]: all_of(toy, [job], 1)[0][job[0]] for job in jobs}
    assert not cache.blocks and [(span.start, span.stop) for span in cache.free] == [(0, cache.slots)]
    return together


@settings(deadline=None, max_examples=6)
@given(st.lists(st.tuples(st.sampled_from(METHODS), st.booleans(),
                          st.sets(st.integers(1, 40), min_size=1, max_size=3).map(sorted)),
                min_size=2, max_size=8), st.integers(2, 5))
def test_each_run_writes_what_it_writes_alone(toy, drawn, at_once):
    """Methods, budgets, greedy and sampled runs mixed."""
    jobs = [(number, spec, budgets, greedy) for number, (spec, greedy, budgets) in enumerate(drawn)]
    side_by_side(toy, jobs, at_once)


def test_all_methods_side_by_side(toy):
    """Steps move, texts and boxes end, parts are handed over and joined, one stage follows another."""
    jobs = [(number, spec, [20, 60], False) for number, spec in enumerate(METHODS, 80)]
    together = side_by_side(toy, jobs, 4)
    found = {spec: together[number] for number, spec, *_ in jobs}
    assert all(len(found[spec]["step_ends"]) > 1 for spec in METHODS[:6])
    assert {result["ending"] for result in found.values()} == {"answer", "end of text", "passes"}
    texts = {spec: len(result["text"]) for spec, result in found.items()}  # of all workers and stages
    assert texts["debate:2"] == 4 and texts["debate-3:2"] == 6
    assert texts["skeleton:2"] == 3 and texts["fork-join"] == 3


def test_memory_is_used_again(toy):
    """Twelve runs, three at a time, take the memory of few more than three."""
    jobs = [(number, "hogwild:2", [5], True) for number in range(12)]
    _, one = all_of(toy, jobs[4:5], 1)  # (the longest problem)
    _, many = all_of(toy, jobs, 3)
    assert many.slots <= 3.5 * one.slots and many.keys[0].shape[1] == many.slots


def test_a_beginning_that_is_known_is_not_encoded_again(toy, monkeypatch):
    """Of prompts that differ in the end, the second one's beginning is copied: keys are the same, and
    nothing of a run that has been released is used."""
    fed, feed = [], generate.Hogwild.fed
    monkeypatch.setattr(generate.Hogwild, "fed",
                        lambda run, writers: fed.append(writers) or feed(run, writers))
    caches = [shared_cache.SharedCache(toy[2]) for _ in range(2)]

    def run_on(question, cache):
        fed.clear()
        run = generate.Hogwild(*toy[:2], question, generate.Settings(max_passes=20), None, cache)
        return run, sum(len(ids) for view, ids in sum(fed, []) if view == [run.history])
    one, took = run_on("How much is 3 + 4?", caches[0])
    two, less = run_on("How much is 3 + 5?", caches[0])
    alone, all_of_it = run_on("How much is 3 + 5?", caches[1])
    assert took == all_of_it == alone.history.length == two.history.length and 0 < less < took // 4
    for layer in caches[0].keys:
        for memory in ("keys", "values"):
            copied, encoded = (getattr(run.cache, memory)[layer][:, run.history.start:][:, :all_of_it]
                               for run in (two, alone))
            assert torch.allclose(copied, encoded, atol=1e-5)
    assert [run.advance()["sampled"] for run in (two, alone) for _ in range(3)][:3] == [
        record["sampled"] for record in alone.passes]
    for run in (one, two):
        run.release()
    assert not caches[0].prompts and run_on("How much is 3 + 6?", caches[0])[1] == took


def test_a_job_begins_as_soon_as_another_ends():
    """Continuous batching: of three jobs, two at a time, the last begins when the shortest ends."""
    def count(times):
        for _ in range(times):
            yield times
        return times
    fed = []
    done = batching.side_by_side(map(count, [12, 4, 8]), lambda groups: fed.append(groups) or groups, 2)
    assert list(done) == [4, 12, 8] and fed == [[12, 4]] * 4 + [[12, 8]] * 8


class Broken(RuntimeError):
    """Something went wrong in a pass."""


def test_an_error_is_raised_in_the_job_that_it_belongs_to():
    """Who cannot be fed is told so; the others are fed as if nothing had been."""
    def count(name, times, catches=False):
        seen = []
        for _ in range(times):
            try:
                seen.append((yield name))
            except Broken:
                if not catches:
                    raise
                return name, "broken"
        return name, seen

    def feed(groups):
        if "bad" in groups:
            raise Broken
        return [f"fed {group}" for group in groups]
    jobs = [count("a", 3), count("bad", 3, catches=True), count("c", 2)]
    done = dict(batching.side_by_side(jobs, feed, 3))
    assert done == {"a": ["fed a"] * 3, "bad": "broken", "c": ["fed c"] * 2}
    with pytest.raises(Broken):
        list(batching.side_by_side([count("a", 3), count("bad", 3)], feed, 2))
    assert batching.alone(count("x", 0), feed) == ("x", [])


def test_keyboard_interrupts_are_nobodys_fault():
    """Ctrl-C is not tried again one by one."""
    calls = []

    def feed(groups):
        calls.append(groups)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        list(batching.side_by_side([(x for x in "ab"), (x for x in "cd")], feed, 2))
    assert len(calls) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.integers(1, 9), st.just(0)), min_size=1, max_size=40), st.randoms())
def test_blocks_never_overlap(actions, chance):
    """Made and discarded in any order: slots belong to one block or are free, and never to two."""
    cache, live = shared_cache.SharedCache([]), []
    for size in actions:
        if size:
            live.append(cache.block(size))
        elif live:
            cache.discard([live.pop(chance.randrange(len(live)))])
        spans = [range(block.start, block.start + block.capacity) for block in live] + cache.free
        slots = sorted(slot for span in spans for slot in span)
        assert slots == [*range(cache.slots)] and {*cache.blocks} == {*live}


def test_as_many_as_memory_allows(toy):
    """One at first; then as many as half of what is free holds; a number beyond which little is gained;
    and never fewer than there are."""
    cache = shared_cache.SharedCache(toy[2])
    nothing = batching.as_memory_allows(cache, lambda: 10**15)
    assert nothing(0) == 1
    _, cache = all_of(toy, [(0, "hogwild:2", [5], True)], 1)
    taken = sum(memory.nbytes for memory in (*cache.keys.values(), *cache.values.values()))
    for free, live, wanted in [(10 * taken, 1, 6), (10 * taken, 2, 12), (0, 1, 1), (0, 3, 3),
                               (10**15, 1, batching.MOST)]:
        assert batching.as_memory_allows(cache, lambda free=free: free)(live) == wanted
    at_once = batching.as_memory_allows(cache, lambda: 2 * taken)
    assert at_once(3) == 6 and at_once(0) == 6  # (their memory is there, when all have ended)
    live = []

    def count(name):
        live.append(name)
        for _ in range(3):
            yield name
        live.remove(name)
    sizes = []
    jobs = (count(number) for number in range(7))
    list(batching.side_by_side(jobs, lambda groups: sizes.append(len(groups)) or groups,
                               lambda number: 1 if not number else 3))
    assert sizes[0] == 3 == max(sizes) and sum(sizes) == 21


def test_on_the_real_model(smollm):
    """Eight runs of SmolLM2, greedy and sampled, side by side and alone, in float32."""
    model = smollm[0]
    toy = model, smollm[1], query_rotation.attach(model)
    jobs = [(number, ["hogwild:2", "baseline", "self-consistency:2", "hogwild:3"][number % 4], [6, 12],
             number % 2 == 0) for number in range(8)]
    torch.manual_seed(0)
    random.seed(0)
    together, _ = all_of(toy, jobs, 8)
    assert together == {job[0]: all_of(toy, [job], 1)[0][job[0]] for job in jobs}
