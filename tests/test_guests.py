"""Guests: who comes, leaves or says something is where the oracle has it, alone and beside other runs;
what is refused has not happened; and workers react to what they are told."""
from functools import partial
from importlib import import_module

import oracle
import pytest
from helpers import (
    EVENTS,
    PROBLEM,
    SHORT,
    happen,
    often,
    random_model,
    run_and_record,
    settings_for,
    tokenizer,
    waiting_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import batching, guests, recording

generate = import_module("06_generate")
layouts, query_rotation = import_module("03_layouts"), import_module("04_query_rotation")
shared_cache = import_module("02_shared_cache")


@settings(deadline=None, max_examples=8)
@given(st.sampled_from([*layouts.LAYOUTS, "combined"]), st.integers(1, 3), st.integers(0, 99),
       st.integers(5, 20), EVENTS)
def test_every_pass_with_guests_equals_the_oracle(layout, workers, seed, every, events):
    """Logits within 1e-3 of the stock attention's on views that are put together anew."""
    model, told = random_model("llama"), settings_for(layout, workers, seed)
    events = [(when % 15, what) for when, what in events]
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        run, history, logits = run_and_record(model, tokenizer(), told, 16,
                                              between=partial(happen, events))
    model.set_attn_implementation("sdpa")
    naive = oracle.follow(model, tokenizer(), layout, told.workers, history, run.passes)
    for ours, theirs in zip(logits, naive, strict=True):
        assert (ours - theirs).abs().max() < 1e-3 and theirs.std() > 0.05


def without_seconds(run):
    """The records of a run, without what differs from time to time."""
    return [{**record, "seconds": 0} for record in run.passes]


@settings(deadline=None, max_examples=3)
@given(st.lists(st.tuples(st.sampled_from([*layouts.LAYOUTS]), st.integers(1, 3), EVENTS), min_size=2,
                max_size=4), st.integers(5, 20))
def test_guests_of_one_run_do_not_disturb_others_in_its_passes(drawn, every):
    """Runs that share every pass, and a cache: each writes and answers what it does alone."""
    model = random_model("llama")
    ropes = query_rotation.attach(model)

    def job(number, cache):
        layout, workers, events = drawn[number]
        run = generate.Hogwild(model, tokenizer(), PROBLEM + " Go on." * number,
                               settings_for(layout, workers, number, answer_tokens=2), None, cache)
        for now in range(12):
            happen([(when % 12, what) for when, what in events], run, now)
            logits = yield run.writers()
            run.take(run.sample(logits))
        answer = yield from run.asking()
        return number, answer, [{**record, "seconds": 0} for record in run.passes]

    def all_of(numbers):
        cache = shared_cache.SharedCache(ropes)
        feed = partial(generate.feed, model, cache)
        return sorted(batching.side_by_side((job(number, cache) for number in numbers), feed,
                                            len(numbers)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        alone = [result for number in range(len(drawn)) for result in all_of([number])]
        assert all_of(range(len(drawn))) == alone


def in_a_small_context(wrong):
    """The same, where the context is so small that the run can just go on as it is."""
    def there(run):
        while run.ending is None:
            run.context -= 1
        run.context += 1
        wrong(run)
    return there


COME = partial(guests.add, name="Carol")


@pytest.mark.parametrize("layout, wrong", [
    ("combined", partial(guests.say, name="Eve", text="too long " * 4000)),
    ("contiguous", in_a_small_context(partial(guests.say, name="Eve", text="Yes."))),
    ("combined", in_a_small_context(COME)), ("contiguous", in_a_small_context(COME)),
    ("interleaved", partial(guests.dismiss, name="Zed")),
    ("independent", partial(guests.say, name="Alice", text="It is me."))])
def test_what_is_refused_has_not_happened(layout, wrong, monkeypatch):
    """The run goes on as one that nobody has asked, and so does one that is restored from it."""
    often(monkeypatch, 29)
    start = partial(generate.Hogwild, random_model("llama"), tokenizer(), PROBLEM,
                    settings_for(layout, 2))
    calm, asked = start(), start()
    for number in range(12):
        for run in (calm, asked):
            if run is asked and number in (6, 9):
                context, events = run.context, [*run.events]
                with pytest.raises(ValueError, match="^[^\n]+$"):
                    wrong(run)
                assert run.events == events
                run.context = context
            if number == 10:
                guests.add(run, "Dave")
            run.advance()
    other = recording.restored(start(), asked.passes)
    assert other.advance()["sampled"] == asked.advance()["sampled"] == calm.advance()["sampled"]
    for run in (asked, other):
        assert without_seconds(run) == without_seconds(calm)
        assert [*map(vars, run.cache.blocks)] == [*map(vars, calm.cache.blocks)]
    assert calm.answer() == asked.answer()


def test_somebody_has_to_go_on():
    """Of a worker who has written the end of its text and one who has not, the latter cannot leave."""
    told = generate.Settings(prompt=SHORT, layout="independent", forbid_special=False, max_passes=20)
    run = generate.Hogwild(random_model("llama"), tokenizer(), PROBLEM, told)
    run.advance([tokenizer().eos_token_id, 50])
    with pytest.raises(ValueError, match="'Bob' cannot leave"):
        guests.dismiss(run, "Bob")
    guests.dismiss(run, "Alice")
    assert run.ending is None


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_workers_who_wait_for_somebody_s_words_react_to_them(layout):
    """A model that writes ` wait` until ` pears` is in view, and then ` count`: so it does in the very
    pass that reads the word, in every layout, and so does who comes later."""
    model, told = waiting_model(), generate.Settings(layout=layout, greedy=True, max_passes=50)
    run = generate.Hogwild(model, tokenizer(), PROBLEM, told)
    wait, count = (run.encode(word)[0] for word in (" wait", " count"))
    for _ in range(5):
        assert {*run.advance()["sampled"].values()} == {wait}
    for words, why in (("\ud800", "UTF-8"), (" ", "empty")):
        with pytest.raises(ValueError, match=why):
            guests.say(run, "Teacher", words)
    guests.say(run, "Teacher", "Now mind the apples.")
    assert {*run.advance()["sampled"].values()} == {wait}
    guests.say(run, "Teacher", "Now count the pears.")
    assert {*run.advance()["sampled"].values()} == {count}
    guests.add(run, "Carol")
    guests.dismiss(run, "Alice")
    assert run.advance()["sampled"] == {"Bob": count, "Carol": count}
