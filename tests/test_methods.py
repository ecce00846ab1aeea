"""The rivals of chapter 7 against what their papers say; workers write what a test tells them."""
from importlib import import_module

import pytest
from helpers import tiny, tokenizer

from appendix import batching, methods, protocol

evaluation, generate = import_module("07_eval_limo"), import_module("06_generate")


@pytest.fixture(scope="module")
def toy():
    """(a tiny random model, a tokenizer)."""
    return tiny("llama"), tokenizer()


def start_with(toy, **others):
    """What a method is given to make runs with; collects them in start.runs."""
    def start(kind, count, **differs):
        told = generate.Settings(**{"workers": protocol.NAMES[:count], "greedy": True, **methods.SOLO,
                                    **others, **differs})
        start.runs.append(kind(*toy, "How much is 3 + 4?", told))
        return start.runs[-1]
    start.runs = []
    return start


def let_write(monkeypatch, run, texts):
    """Workers write these texts (by name), token by token; afterwards, the model's own words."""
    words = {name: iter(run.encode(text)) for name, text in texts.items()}
    pick = type(run).sample

    def sample(logits):
        own = pick(run, logits)
        return [next(words[w.name], token) if w.name in words else token
                for w, token in zip(run.next_writers(), own)]
    monkeypatch.setattr(run, "sample", sample)
    for _ in range(max(len(run.encode(text)) for text in texts.values())):
        if run.ending is None:
            run.advance()


PROBLEM = methods.Problem("How much is 3 + 4?", 1, 60)


def test_a_vote_counts_numbers_not_texts(toy, monkeypatch):
    r"""Three boxed answers, two of them the same number; then a tie; then one who has to be asked."""
    start = start_with(toy)
    for said, wanted in [(("3", "\\frac{1}{2}", "0.5"), "\\frac{1}{2}"), (("5", "3", "3"), "3"),
                         (("4", "5", "6"), "4")]:
        run = start(methods.Votes, 3)
        let_write(monkeypatch, run, {name: f"So \\boxed{{{answer}}}.\n\n"
                                     for name, answer in zip(protocol.NAMES, said)})
        assert all(w.finished for w in run.workers) and run.answer() == wanted
    run = start(methods.Votes, 3)
    let_write(monkeypatch, run, {"Alice": "So \\boxed{9}.\n\n", "Carol": "So \\boxed{9}.\n\n"})
    fed, lengths = [], [block.length for block in run.cache.blocks]
    forward = run.forward
    run.forward = lambda model, cache, tables, ids, *others: (
        fed.append(ids) or forward(model, cache, tables, ids, *others))
    assert run.answer() == "9" and fed[0] == run.workers[1].pending + run.finisher
    assert [block.length for block in run.cache.blocks] == lengths


@pytest.mark.parametrize("parts, form, said, wanted", [
    (2, "box", ["2, 1", "1, 2", "1, 2"], "1, 2"), (2, "box", ["2, 1", "1/2, 4", "0.5, 4.0"], "1/2, 4"),
    (2, "box", ["1, 2, 3", "1", "1", "1, 2"], "1"), (1, "box", ["2, 1", "3", "1, 2"], "2, 1"),
    (1, "box", ["", "", "5"], "5"), (1, "box", ["", ""], ""),
    (1, "code", ["print(1 + 2)", "print(2 + 1)", "print(2 + 1)"], "print(2 + 1)")])
def test_a_vote_is_counted_as_answers_are_graded(toy, parts, form, said, wanted):
    """Several numbers by their positions, a set in any order, programs as texts; silence is no vote."""
    start = start_with(toy, form=form)
    run = next(methods.vote(start, PROBLEM._replace(parts=parts), 2))
    assert run.combined(said) == wanted
    jury = next(methods.debate(start, PROBLEM._replace(parts=parts), 2))
    assert jury.combined(said) == wanted


def test_who_has_not_answered_is_asked_alone(toy):
    """Each of two samples says, side by side, what it says when it is asked alone."""
    both = start_with(toy)(methods.Votes, 2, greedy=False, seed=3)
    alone = [start_with(toy)(methods.Votes, 1, workers=[name], greedy=False, seed=3)
             for name in protocol.NAMES[:2]]
    for run in (both, *alone):
        for _ in range(8):
            run.advance()
    answers = []
    both.combined = lambda said: answers.extend(said)
    both.answer()
    assert answers == [run.answer() for run in alone]


def test_a_skeleton_of_several_numbers_joins_its_threads(toy, monkeypatch):
    r"""The paper's GSM8K x 5: the answers are those within the threads' \boxed{}, in order; no third
    stage. For one number, somebody goes on behind all that was written."""
    start = start_with(toy)
    stages = methods.skeleton(start, PROBLEM._replace(parts=2), None)
    outline = next(stages)
    assert "3 to 10 points" in outline.prompt + outline.decode(outline.ids[outline.history])
    let_write(monkeypatch, outline, {"Alice": " Add three.\n2. Add four.\n"})
    threads = next(stages)
    opened = [threads.decode(threads.ids[threads.history] + w.pending) for w in threads.workers]
    assert len(opened) == 2 and opened[0].endswith("1. Add three.") and "2. Add four" in opened[1]
    let_write(monkeypatch, threads, {"Alice": " It is \\boxed{3}.\n\n", "Bob": " It is \\boxed{4}.\n\n"})
    assert threads.answer() == "3, 4" and next(stages, None) is None
    stages = methods.skeleton(start, PROBLEM, None)
    let_write(monkeypatch, next(stages), {"Alice": " Add three.\n2. Add four.\n"})
    let_write(monkeypatch, next(stages), {"Alice": " Three is \\boxed{3}.\n\n", "Bob": " Four.\n\n"})
    last = next(stages)
    read = last.decode(last.ids[last.history] + last.workers[0].pending)
    assert "Three is \\boxed{3}." in read and "2. Add four. Four." in read.replace("\n", " ")


def test_in_a_debate_everybody_reads_the_others(toy, monkeypatch):
    """Two rounds with half of the passes each; in the second, each has its own text and the others'."""
    stages = methods.debate(start_with(toy), PROBLEM, 3)
    first = next(stages)
    assert first.settings.max_passes == PROBLEM.passes // 2
    let_write(monkeypatch, first, {name: f"I say {name.lower()}.\n\n\\boxed{{1}}.\n\n"
                                   for name in protocol.NAMES[:3]})
    second = next(stages)
    for w, name in zip(second.workers, protocol.NAMES):
        told = second.decode(second.ids[second.history] + w.pending)
        others, own = told.split("And this is what you have written:")
        assert f"I say {name.lower()}" in own and f"I say {name.lower()}" not in others
        assert all(f"I say {other.lower()}" in others for other in protocol.NAMES[:3] if other != name)
    let_write(monkeypatch, second, {name: f"\\boxed{{{7 if name != 'Bob' else 8}}}.\n\n"
                                    for name in protocol.NAMES[:3]})
    assert second.answer() == "7" and next(stages, None) is None


@pytest.mark.parametrize("said", [["7", "7", "8"], ["", "", ""], ["a word", "a word", "a word"]])
def test_who_says_the_same_is_read_all_the_same(toy, monkeypatch, said):
    """Short texts that are equal may be one object: others are those in other places."""
    monkeypatch.setattr(methods, "written", lambda _: said)
    _, second = methods.debate(start_with(toy), PROBLEM, 3)
    for number, (prompt, _) in enumerate(second.prompts):
        others = "\n\n".join(text for place, text in enumerate(said) if place != number)
        assert f"written about it:\n\n{others}\n\nAnd this is" in prompt
        assert f"have written:\n\n{said[number]}\n\nLook" in prompt


def test_a_debate_may_have_more_rounds(toy):
    """Each has its share of the passes."""
    problem, told = {"question": PROBLEM.text, "answers": ["7"]}, generate.Settings(max_passes=12)
    for spec, rounds in [("debate", 2), ("debate-3:2", 3), ("debate-4", 4)]:
        passes = []
        for run in evaluation.runs_of(spec, *toy, problem, told):
            while run.ending is None:
                run.advance()
            passes.append(len(run.passes))
        assert passes == [12 // rounds] * rounds and len(run.workers) == 2, spec


def test_parts_are_worked_on_beside_the_writer(toy, monkeypatch):
    """Who is handed a part begins in the next pass; at <join/>, the writer waits and gets results."""
    run, = methods.fork_join(start_with(toy, max_passes=400), PROBLEM, None)
    words = run.encode("Go. <part>3 + 4</part> and <part>what is 2 x 5?</part> then <join/>")
    bob, carol = ("One, two, three, and four more make five, six, seven: \\boxed{7}.",
                  "Two, four, six, eight, and at last, after five times, ten: \\boxed{10}.")
    parts = {"Bob": iter(run.encode(bob + "\n\n")), "Carol": iter(run.encode(carol + "\n\n"))}
    coming = iter(words)
    filler = run.encode(" so")[0]

    def sample(_):
        return [next(coming, filler) if w.name == "Alice" else next(parts[w.name])
                for w in run.next_writers()]
    monkeypatch.setattr(run, "sample", sample)
    writing = []
    while not run.joined:
        writing.append([w.name for w in run.next_writers()])
        run.advance()
    assert writing[0] == ["Alice"] and ["Bob", "Alice"] in writing
    assert ["Bob", "Carol", "Alice"] in writing and writing[-1] == ["Carol"]
    history = run.decode(run.ids[run.history] + run.ids[run.workers[0].block])
    assert "Somebody who solves this problem" in history and "3 + 4" in history.split("one thing")[1]
    read = run.decode(run.workers[-1].pending)
    assert f"3 + 4: {bob}" in read and f"what is 2 x 5?: {carol}" in read
    # What was given is no answer of the writer's, also where its step ends.
    assert run.written_answer() is None
    coming = iter(run.encode(" So we add them.\n\n"))
    for _ in range(9):
        run.advance()
    assert run.ending is None and run.written_answer() is None
    # Who goes on does so with all that in its own block, and its box ends the run.
    coming = iter(run.encode(" So \\boxed{17}.\n\n"))
    while run.ending is None:
        run.advance()
    assert run.ending == "answer" and run.answer() == "17" and run.workers[-1].name == "Alice"


def test_a_box_before_a_join_is_not_forgotten(toy, monkeypatch):
    """What the writer says before it waits, in the same step, is its own; what it is given is not."""
    run, = methods.fork_join(start_with(toy, max_passes=400), PROBLEM, None)
    coming = iter(run.encode("It is \\boxed{7}. <part>3 + 4</part><join/>"))
    filler, part = run.encode(" so")[0], iter(run.encode("It is \\boxed{8}.\n\n"))
    monkeypatch.setattr(run, "sample", lambda _: [next(coming if w.name == "Alice" else part, filler)
                                                  for w in run.next_writers()])
    while not run.joined:
        run.advance()
    assert "\\boxed{8}" in run.workers[-1].text and run.written_answer() == "7"
    coming = iter(run.encode(" As I said.\n\n"))
    while run.ending is None:
        run.advance()
    assert run.ending == "answer" and run.answer() == "7" and len(run.passes) < 99


@pytest.mark.parametrize("others", [{}, {"context": 1096}])
def test_what_does_not_fit_is_not_given(toy, monkeypatch, others):
    """Of results that are longer than the writer's memory, or than the context, it gets the beginning;
    it can still be asked for its answer, as soon as it has them and at the end."""
    run, = methods.fork_join(start_with(toy, max_passes=150, **others), PROBLEM, None)
    words = iter(run.encode("<part>one</part> <part>two</part> <part>three</part> <part>four</part>"
                            " <part>five</part> <part>six</part> <join/>"))
    end, filler = toy[1].eos_token_id, run.encode(" so")[0]
    monkeypatch.setattr(run, "sample", lambda _: [
        next(words, filler) if w.name == "Alice" else end if len(w.ids) > 70 else filler
        for w in run.next_writers()])
    while not run.joined:
        run.advance()
    writer, given = run.workers[-1], run.workers[-1].pending
    assert len(given) > 60 and "one: so so so" in run.decode(given) and "six: " not in run.decode(given)
    assert run.ending is None and isinstance(run.answer(), str)
    while run.ending is None:
        run.advance()
    assert run.ending == "passes" and isinstance(run.answer(), str)
    assert run.ids[writer.block][-30:] == [filler] * 30


@pytest.mark.parametrize("passes", [120, 240])
def test_what_is_given_takes_no_passes(toy, monkeypatch, passes):
    """Six parts, a quarter of the largest budget each: the one who writes goes on to the last pass."""
    run, = methods.fork_join(start_with(toy, max_passes=passes), PROBLEM, None)
    words = iter(run.encode("<part>a</part><part>b</part><part>c</part><part>d</part><part>e</part>"
                            "<part>f</part><join/>"))
    filler = run.encode(" so")[0]
    monkeypatch.setattr(run, "sample", lambda _: [
        next(words, filler) if w.name == "Alice" else toy[1].eos_token_id
        if len(w.ids) > passes // 4 else filler for w in run.next_writers()])
    while run.ending is None:
        run.advance()
    assert run.joined and len(run.passes) == passes and run.ending == "passes"
    assert sum(run.workers[-1].text.count(f"{part}:") for part in "abcdef") >= 2


def test_a_writer_who_hands_over_nothing_is_a_sequential_run(toy):
    """As the baseline, but for its prompt."""
    run, = methods.fork_join(start_with(toy, max_passes=30), PROBLEM, None)
    while run.ending is None:
        run.advance()
    alone = start_with(toy, max_passes=30)(
        lambda *arguments: methods.Stage(*arguments, prompts=[(methods.FORK.format(
            problem=PROBLEM.text), "")]), 1)
    while alone.ending is None:
        alone.advance()
    assert run.passes and [r["sampled"] for r in run.passes] == [r["sampled"] for r in alone.passes]


@pytest.mark.parametrize("spec", ["baseline", "hogwild:1", "contiguous:1", "vote:1", "fork-join"])
def test_a_program_is_found_where_its_box_is_in_a_later_step(toy, monkeypatch, spec):
    """A block of code with a sentence, and its box behind that, in a step of its own; a box before it
    does not count."""
    problem = {"question": PROBLEM.text + " Write \\boxed{done}.", "answers": []}
    told = generate.Settings(max_passes=90, form="code", answer_tokens=2)
    code = "```python\nprint(7)\n```\nIt prints.\n\n"
    for words, wanted in [(code + "It is \\boxed{done}.\n\n", "print(7)"),
                          ("A \\boxed{draft}.\n\n" + code, None)]:
        run, = evaluation.runs_of(spec, *toy, problem, told)
        let_write(monkeypatch, run, {"Alice": words})
        assert sum(len(record["closed"]) for record in run.passes) >= 2 - (spec == "vote:1")
        assert run.found(run.workers[-1]) == wanted and run.written_answer() in (wanted, None)
        assert (run.ending in ("answer", "end of text")) == (wanted is not None)


@pytest.mark.parametrize("spec", ["vote:3", "debate:2", "skeleton", "fork-join"])
def test_evaluations_ask_them_at_every_budget(toy, spec):
    """And count the passes of all their runs."""
    problem = {"question": PROBLEM.text, "answers": ["7"]}
    told = generate.Settings(max_passes=24, greedy=True)
    runs = list(evaluation.runs_of(spec, *toy, problem, told)) if spec == "vote:3" else None
    coming = iter(runs) if runs else evaluation.runs_of(spec, *toy, problem, told)
    model = toy[0]
    caches = []

    def feed(groups):
        run_cache = caches[-1]
        return generate.feed(model, run_cache, groups)

    def remembered():
        for run in coming:
            caches.append(run.cache)
            yield run
    result = batching.alone(evaluation.evaluate(remembered(), problem, [8, 16, 24]), feed)
    assert [*result["answers"]] == ["8", "16", "24"] and 0 < result["passes"] <= 24
