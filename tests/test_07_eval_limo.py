"""Chapter 7: methods against what they claim to be, answers at every budget, and the report."""
import copy
import random
import sys
from importlib import import_module
from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from helpers import evaluated, tiny, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from appendix import curves, methods, models, protocol, results

evaluation = import_module("07_eval_limo")
generate = import_module("06_generate")
layouts = import_module("03_layouts")
shared_cache = import_module("02_shared_cache")
QUESTION = "How much is 3 + 4?"
PROBLEM = methods.Problem(QUESTION, 1, 9)


@pytest.fixture(scope="module")
def toy():
    """(a tiny random model, a tokenizer)."""
    return tiny("llama"), tokenizer()


def start(spec, toy, **others):
    """The runs of a method on the question."""
    problem = {"question": QUESTION, "answers": ["7"]}
    return evaluation.runs_of(spec, *toy, problem, generate.Settings(**others))


def stage(toy, kind, prompts, at_once=None, **others):
    """One run of writers with prompts of their own."""
    told = generate.Settings(**{"workers": protocol.NAMES[:len(prompts)], **methods.SOLO, **others})
    return kind(*toy, QUESTION, told, prompts=prompts, at_once=at_once)


def run_to_end(run, passes):
    """Advance to the end; returns per worker the tokens that were sampled."""
    sampled = {}
    while run.ending is None and len(run.passes) < passes:
        for worker, token in run.advance()["sampled"].items():
            sampled.setdefault(worker, []).append(token)
    return sampled


def ids_of(text):
    """Token ids of a text."""
    return tokenizer()(text, add_special_tokens=False).input_ids


def test_the_baseline_is_what_generate_does(toy):
    """Sequential, greedy: the tokens of the stock model's own `generate`."""
    stock = copy.deepcopy(toy[0])
    stock.set_attn_implementation("sdpa")
    run, = start("baseline", toy, max_passes=60, greedy=True)
    ours = run_to_end(run, 60)["Alice"]
    ids = torch.tensor([ids_of(run.prompt)])
    theirs = stock.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)[0, ids.shape[1]:]
    assert ours == theirs.tolist()[:len(ours)] and len(ours) >= 20
    told = QUESTION + "\n\nReason step by step, and put your final answer within \\boxed{}."
    assert "\n" + told + "<" in run.prompt


def test_a_sample_is_a_sequential_run(toy):
    """Every worker of self-consistency: the baseline of that name and seed, token for token."""
    run, = start("self-consistency:3", toy, max_passes=40, seed=5)
    team = run_to_end(run, 40)
    assert len({tuple(tokens) for tokens in team.values()}) == 3
    for name in ("Alice", "Bob", "Carol"):
        told = generate.Settings(workers=[name], max_passes=40, seed=5, **methods.SOLO)
        assert run_to_end(generate.Hogwild(*toy, QUESTION, told), 40)[name] == team[name]


def test_a_sample_ends_with_its_own_answer(toy, monkeypatch):
    r"""One worker's \boxed{} ends that worker, not the run; the answer is asked for with all in view."""
    run, = start("self-consistency:2", toy, max_passes=30, greedy=True)
    written = iter(ids_of("so \\boxed{7}.\n\nand") * 9)
    monkeypatch.setattr(run, "sample", lambda logits: [
        next(written) if w.name == "Alice" else 42 for w in run.next_writers()])
    while len(run.passes) < 20:
        run.advance()
        # Not even while a box is there and its step is not over yet.
        assert run.written_answer() is None
    first, second = run.workers
    assert first.finished and not second.finished and run.boxed is None and run.ending is None
    assert methods.written(run)[0].startswith("so \\boxed{7}.\n\n")
    assert len(run.ids[second.block]) == 20 and run.written_answer() is None
    fed, forward, lengths = [], run.forward, [block.length for block in run.cache.blocks]
    run.forward = lambda model, cache, tables, ids, *others: (
        fed.append(ids) or forward(model, cache, tables, ids, *others))
    assert isinstance(run.answer(), str)
    # What the first one has pending is fed, too, so that all of its text is in view.
    assert fed[0] == first.pending + second.pending + run.finisher and first.pending
    assert [block.length for block in run.cache.blocks] == lengths


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_thread_is_a_sequential_run(toy, at_once):
    """Three threads with different prompts, all at once or two taking turns: each as if it ran alone."""
    prompts = [("Tell me about cats. Point 1: fur", "1. fur"), ("Tell me about cats. Point 2: paws", ""),
               ("Tell me about cats. Tails", "T")]
    run = stage(toy, methods.Stage, prompts, at_once, max_passes=60, greedy=True)
    together = run_to_end(run, 30)
    assert sum(map(len, together.values())) == 30 * (at_once or 3)
    assert {len(tokens) for tokens in together.values()} == {10 * (at_once or 3)}  # turns are fair
    for name, prompt in zip(run.settings.workers, prompts):
        alone = stage(toy, methods.Stage, [prompt], max_passes=60, greedy=True, workers=[name])
        assert run_to_end(alone, len(together[name]))[name] == together[name]
        ids = ids_of(models.chat(toy[1], "", prompt[0])) + ids_of(prompt[1])
        assert alone.ids[alone.history] + alone.ids[alone.workers[0].block][:1] == ids


def test_turns_stay_fair_when_somebody_has_finished(toy):
    """Two of four take turns; one of them has finished: the other three write equally often."""
    run = stage(toy, methods.Threads, [("a", ""), ("b", ""), ("c", ""), ("d", "")], 2, max_passes=60)
    run.workers[2].finished = True
    sampled = [list(run.advance()["sampled"]) for _ in range(12)]
    assert [sum(name in names for names in sampled) for name in run.settings.workers] == [8, 8, 0, 8]


PLAN = "1. red.\n\n2. green\n3. blue"

@pytest.mark.parametrize("spec, threads", [("skeleton", 3), ("skeleton:2", 2)])
def test_skeleton_of_thought_goes_through_its_stages(toy, monkeypatch, spec, threads):
    """An outline of three points, three threads, then one worker who has read them, in these words; the
    budget counts all passes."""
    end, outline, thread = toy[1].eos_token_id, ids_of(PLAN[2:]), ids_of(" It is done.\n\nReally")
    seen, written, runs = [], {}, []

    def sample(run, logits):
        runs.append(run) if run not in runs else None
        writing = run.next_writers()
        seen.append(len(writing))
        script = {1: [*outline, end], 2: [*thread, end], 3: []}[len(runs)]
        for w in writing:
            written[id(w)] = written.get(id(w), -1) + 1
        return [script[written[id(w)]] if written[id(w)] < len(script) else 42 for w in writing]

    monkeypatch.setattr(generate.Hogwild, "sample", sample)
    result = evaluated(start(spec, toy, max_passes=80, greedy=True), [4, 80])
    first, second, third = runs
    assert result["passes"] == 80 == sum(len(run.passes) for run in runs)
    assert result["ending"] == "passes"
    assert seen[:len(outline) + 1] == [1] * (len(outline) + 1) and seen[len(outline) + 1] == threads
    assert result["tokens"] == sum(seen) == len(outline) + 1 + 3 * (len(thread) + 1) + third.generated
    assert first.settings.max_passes == 128
    assert first.prompts == [(methods.OUTLINE.format(problem=QUESTION), "1.")]
    assert [begun for _, begun in second.prompts] == ["1. red.", "2. green", "3. blue"]
    told = methods.POINT.format(problem=QUESTION, outline=PLAN, number=2)
    assert second.prompts[1][0] == told and second.workers[1].finished
    assert QUESTION in told and PLAN in told and "Continue point 2," in told and "\\boxed{}" in told
    really = "It is done.\n\nReally\n\n"
    assert third.prompts == [(QUESTION + "\n\nReason step by step, and put your final answer within "
                              "\\boxed{}.", f"1. red. {really}2. green {really}3. blue {really}")]
    assert result["text"][:2] == [PLAN[2:], " It is done.\n\nReally"] and len(result["text"]) == 5
    assert isinstance(result["answers"]["80"]["answer"], str) and third.workers[0].name == "Alice"


@pytest.mark.parametrize("plan, points", [
    ("1. a\n 2) b\n10.  c", ["1. a", "2. b", "3. c"]), ("1. no list at all", ["1. no list at all"]),
    ("1.", ["1. 1. "]), ("1. x" + "\n2. y" * 20, ["1. x", *(f"{k}. y" for k in range(2, 11))]),
    ("1. {problem} {outline} \\boxed{}", ["1. {problem} {outline} \\boxed{}"])])
def test_the_points_of_a_plan(toy, plan, points):
    """Numbered lines, ten at most; a plan without any is one point. Braces in it stay what they are."""
    class Written:
        passes, workers = [], [type("Worker", (), {"name": "A", "text": plan[2:]})]
    asked = []
    stages = methods.skeleton(lambda loop, *_, **__: (
        asked.append(loop.keywords["prompts"]) or Written), PROBLEM, None)
    next(stages), next(stages)
    assert [begun for _, begun in asked[1]] == points and "\n" + plan[:2] + " " in asked[1][0][0]
    assert all(f"Continue point {k}," in told for k, (told, _) in enumerate(asked[1], 1))


def test_words_of_a_model_are_no_special_tokens(toy):
    """What somebody wrote cannot end a turn of the chat format, where it stands in a later prompt."""
    run = stage(toy, methods.Stage, [("plan <|im_end|>", "1. <|im_start|>")])
    ids = run.ids[run.history] + run.workers[0].pending
    names = "<|im_end|>", "<|im_start|>"
    special = [ids.count(toy[1].convert_tokens_to_ids(token)) for token in names]
    assert special == [2, 3] and toy[1].decode(ids).endswith("1. <|im_start|>")


def test_a_stage_beyond_the_context_ends_the_method(toy):
    """The answer is then that of the stage before; counted as ended by the context, not as a fault."""
    run, = start("baseline", toy, max_passes=4)

    def stages():
        yield run
        raise generate.TooLong("the prompt is too long")
    result = evaluated(stages(), [2, 9])
    assert result["ending"] == "context" and result["passes"] == 4
    assert result["answers"]["9"] == {**result["answers"]["9"], "answer": run.answer(), "passes": 4}


def test_reencoded_steps_are_encoded_in_their_place(toy, monkeypatch):
    """The history holds the keys of its text encoded in one go; rotated steps do not."""
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) > 60)
    worst = {}
    for spec in ("re-encode:2", "hogwild:2"):
        run, = start(spec, toy, max_passes=25, greedy=True)
        ids = ids_of(run.prompt)
        while run.ending is None:
            before = {w.name: w.ids for w in run.workers}
            for closed in run.advance()["closed"]:
                ids = ids + before[closed["worker"]]
        cache, history = run.cache, run.history
        assert history.length == len(ids) > len(ids_of(run.prompt)) + 20 and run.ids[history] == ids
        fresh = shared_cache.SharedCache(cache.ropes)
        generate.feed(toy[0], fresh, [[([fresh.block(len(ids))], ids)]])
        span = slice(history.start, history.start + len(ids))
        worst[spec] = max((keys[:, :len(ids)] - cache.keys[layer][:, span]).abs().max().item()
                          for layer, keys in fresh.keys.items())
    assert worst["re-encode:2"] < 1e-3 and worst["hogwild:2"] > 0.1, worst


def test_every_method_is_what_it_says(toy):
    """Layouts, workers, checks and prompts; an answer that was not written in time does not count."""
    expected = {"hogwild:3": ("combined", 3, 128), "hogwild:1": ("combined", 1, 128),
                "contiguous": ("contiguous", 2, 128), "interleaved:4": ("interleaved", 4, 128),
                "no-check": ("combined", 2, 0), "re-encode:16": ("combined", 16, 128),
                "baseline": ("independent", 1, 128), "self-consistency:5": ("independent", 5, 128)}
    for spec, what in expected.items():
        run, = start(spec, toy, max_passes=4, check_every=128)
        assert (run.settings.layout, len(run.workers), run.settings.check_every) == what, spec
        assert run.layout is layouts.LAYOUTS[what[0]]
        opening = toy[1].decode(run.workers[0].pending).strip()
        assert run.layout.headers == opening.startswith("**Alice [1]:**")
        assert isinstance(run, methods.Reencode) == (spec == "re-encode:16")
        assert isinstance(run, methods.Samples) == (spec == "self-consistency:5")
    result = evaluated(start("baseline", toy, max_passes=4), [2, 4])
    assert isinstance(result["answers"]["4"]["answer"], str)
    assert evaluation.unasked({**result, "method": "baseline"})["answers"]["4"]["answer"] is None
    assert [evaluation.method(spec)[0] for spec in ("hogwild", "hogwild:4", "baseline:1", "skeleton",
            "skeleton:1")] == ["hogwild:2", "hogwild:4", "baseline", "skeleton", "skeleton:1"]
    for spec in ("hogwilde", "hogwild:0", "hogwild:17", "baseline:2"):
        with pytest.raises(ValueError):
            evaluation.method(spec)


def test_one_run_answers_at_every_budget(toy):
    """The answers at 5, 10 and 15 passes are those of runs that were asked only once."""
    short = {"max_passes": 15, "answer_tokens": 6}
    for spec in ("hogwild:2", "self-consistency:2", "baseline", "skeleton"):
        often = evaluated(start(spec, toy, seed=2, **short), [5, 10, 15])
        assert [entry["passes"] for entry in often["answers"].values()] == [5, 10, 15]
        for budget in (5, 10, 15):
            once = evaluated(start(spec, toy, seed=2, **short), [budget])
            assert once["answers"][str(budget)]["answer"] == often["answers"][str(budget)]["answer"]
        assert once["text"] == often["text"] and once["tokens"] == often["tokens"]
        if spec == "hogwild:2":
            assert often["tokens"] == 30, (f"{spec}: 15 passes of two workers are 30 tokens; yours "
                                           f"are {often['tokens']}")


def test_asking_at_every_budget_costs_no_seconds(toy):
    """What writing takes is counted, and what asking takes is not."""
    run, = start("baseline", toy, max_passes=4, answer_tokens=2)
    forward, asking, spent = run.forward, run.asking, []

    def slow_forward(*arguments):
        sleep(0.02)
        return forward(*arguments)

    def slow_asking():
        begin = perf_counter()
        sleep(0.1)
        answer = yield from asking()
        spent.append(perf_counter() - begin)
        return answer
    run.forward, run.asking = slow_forward, slow_asking
    begin = perf_counter()
    result = evaluated([run], [2, 4])
    most = perf_counter() - begin - sum(spent)  # what is left for writing
    counted = [entry["seconds"] for entry in result["answers"].values()] + [result["seconds"]]
    assert len(spent) == 2, f"it was asked {len(spent)} times, at two budgets"
    assert counted[2] <= most, (f"{counted[2]:.2f} seconds are counted; writing took {most:.2f} at most,"
                                f" and asking, which does not count, {sum(spent):.2f}")
    assert 0.04 <= counted[0] < counted[1] == counted[2] >= 0.08, f"seconds counted: {counted}"


def test_every_method_is_told_its_problem(toy, monkeypatch):
    """One that is a function: the question, of how many parts its answer is, the passes; its workers."""
    told = []
    monkeypatch.setitem(evaluation.METHODS, "mine", (
        lambda start, problem, workers: told.append((problem, workers)) or iter(()), methods.SOLO, 3))
    problem = {"question": QUESTION, "answers": ["7", "8"]}
    runs = evaluation.runs_of("mine:2", *toy, problem, generate.Settings(max_passes=9))
    assert [*runs] == []  # those that the function yields
    assert told == [(methods.Problem(QUESTION, 2, 9), 2)], f"it was told {told}"


WORDS = ["1", "2", ".", "\n\n", " so", "\\boxed{7}", "\\boxed{8}.\n\n", "\n2. go", "<|im_end|>"]
PIECES = [ids_of(word) if "<|" not in word else [2] for word in WORDS]


def scripted(run, logits):
    """Random words, which depend on the worker's name and the pass alone; some end texts, or answer."""
    tokens = []
    for w in run.next_writers():
        own = sum(w.name in record["sampled"] for record in run.passes)
        chance = random.Random(f"{run.settings.seed} {w.name} {len(run.prompt)} {type(run).__name__}")
        script = [i for _ in range(30) for i in chance.choice(PIECES)]
        tokens.append(script[own % len(script)])
    return tokens


METHODS = ["hogwild:2", "self-consistency:2", "baseline", "skeleton:2", "skeleton"]


@settings(max_examples=14, deadline=None)
@given(st.sampled_from(METHODS), st.sets(st.integers(1, 16), min_size=1, max_size=4),
       st.integers(0, 10**6))
@example("baseline", {3, 14}, 3)
def test_an_answer_does_not_depend_on_other_budgets(toy, spec, budgets, seed):
    """Random words, boxes, ends of text: asked at all passes or at some, each answer is the same, marked
    as chapter 7's tasks do, and written in time or not; what is over stays as it is."""
    some = sorted(budgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Hogwild, "sample", scripted)
        told = {"seed": seed, "answer_tokens": 2}
        begun = [], []
        every, few = (evaluated((runs.append(run) or run for run in start(
            spec, toy, max_passes=asked[-1], **told)), asked)
            for runs, asked in zip(begun, (list(range(1, 17)), some)))

    def at(result, budget):
        return {key: value for key, value in result["answers"][str(budget)].items() if key != "seconds"}
    assert list(few["answers"]) == list(map(str, some)) and few["passes"] <= some[-1]
    for budget in some:
        assert at(few, budget) == at(every, budget)
        assert at(few, budget)["passes"] == min(budget, every["passes"])
    for entry in every["answers"].values():
        right = evaluation.tasks.mark(entry["answer"], {"answers": ["7"]})
        yours = entry["score"], entry["understood"]
        assert yours == right, f"score, understood of {entry['answer']!r}: yours {yours}, right {right}"
    passes = enumerate((record for run in begun[0] for record in run.passes), 1)
    right = [(number, closed["worker"]) for number, record in passes for closed in record["closed"]]
    assert every["step_ends"] == right, f"step_ends: yours is {every['step_ends']}, right is {right}"


def result(method, number, scores, seed=0, **others):
    """A row as evaluations have them, asked at 10 and 20 passes."""
    entry = {"understood": True, "answer": "7", "in_time": number > 0}
    answers = {str(b): {**entry, "score": s, "seconds": b / 10, "passes": b, "tokens": 3 * b}
               for b, s in zip((10, 20), scores or ())}
    fault = {} if scores else {"answers": {b: evaluation.NOTHING for b in ("10", "20")}, "error": "x"}
    return {"method": method, "problem": number, "seed": seed, "error": None, "ending": "passes",
            "text": [], "answers": answers, **fault, **others}


ROWS = {"baseline": [(0, 1), (0, 0), (0, 0)], "hogwild:2": [(1, 1), (0, 1), None]}
RESULTS = [result(name, number, scores) for name, column in ROWS.items()
           for number, scores in enumerate(column)]


def test_the_figures_of_the_report():
    """Wilson's interval as tabulated, means, passes to a right answer, and the ratio at equal
    accuracy."""
    assert curves.interval(0.5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert curves.interval(0.0, 20) == (pytest.approx(0.0), pytest.approx(0.1611, abs=1e-4))
    found = [*RESULTS, result("baseline", 9, (1, 1))]  # hogwild has not done problem 9: left out
    base, ours = map(results.summary(found, [10, 20]).get, ("baseline", "hogwild:2"))
    assert list(base["accuracy"]) == [0, 1 / 3] and base["passes_to_right"] == 20 and base["count"] == 3
    assert list(ours["accuracy"]) == [1 / 3, 2 / 3] and ours["faults"] == 1
    assert ours["passes_to_right"] == 15 and list(ours["tokens"]) == [30, 60]
    assert ours["none"] == ours["not_understood"] == 0 and ours["spread"].tolist() == [[1, 2]] * 2
    assert list(ours["scores"][:, 1]) == [1, 1, 0]
    # Seeds are no problems, and the order of the lines means nothing.
    twice = [{**row, "seed": 1} for row in found] + found[::-1]
    again = results.summary(twice, [10, 20])["hogwild:2"]
    assert again["count"] == 3 and again["runs"] == 6
    assert list(again["accuracy"]) == list(ours["accuracy"])
    with pytest.raises(ValueError, match="no problem yet"):
        results.summary([RESULTS[0], RESULTS[4]], [10, 20])  # one has done problem 0, the other 1
    assert curves.passes_to_reach(0.5, [10, 20], [0, 0.5]) == 20
    assert curves.passes_to_reach(0.5, [10, 20], [1 / 3, 2 / 3]) == pytest.approx(15)
    assert curves.relative_passes([10, 20], [1 / 3, 2 / 3], [0, 0.5]) == "0.75 (at 50%)"
    assert curves.relative_passes([10, 20], [0.9, 0.9], [0, 0.5]) == "–"  # before the first budget
    assert curves.difference([1, 1, 0], [0, 0, 0]) == (pytest.approx(2 / 3), 0, 1)


def test_what_is_counted_of_answers():
    """None, not understood, ended by context or memory; seeds of a problem are one, averaged."""
    some = [result("hogwild:2", 0, (0, 0), ending="context"), result("hogwild:2", 0, (1, 1), seed=1),
            result("hogwild:2", 1, (0, 0), ending="room"), result("hogwild:2", 1, (0, 0), seed=1)]
    some[0]["answers"]["20"]["answer"] = " "
    some[2]["answers"]["20"]["understood"] = False
    row = results.summary(some, [10, 20])["hogwild:2"]
    assert (row["none"], row["not_understood"], row["context"], row["faults"]) == (1, 1, 2, 0)
    assert row["count"] == 2 and list(row["accuracy"]) == [0.25, 0.25] and row["passes_to_right"] == 10
    assert [list(column) for column in row["scores"]] == [[0.5, 0.5], [0, 0]]
    nothing = results.summary([result("baseline", 0, None)], [10, 20])["baseline"]
    assert (nothing["faults"], nothing["none"], nothing["passes_to_right"]) == (1, 0, None)
    # A run that failed and was tried again counts once, whatever the order.
    twice = [result("baseline", 0, None), result("baseline", 0, (1, 1)), result("baseline", 0, None)]
    assert evaluation.one_each(twice) == [twice[1]]


def test_the_tables(capsys, tmp_path, monkeypatch):
    """Shares with intervals, the paired difference, the ratio of passes; and the picture."""
    header = {"model": "m\x1b", "task": "own", "data": None, "budgets": [10, 20]}
    drawn, bars = [], Axes.errorbar
    evaluation.report(header, RESULTS)
    assert " too few problems " in capsys.readouterr().out
    monkeypatch.setattr(curves, "FEW", 3)
    monkeypatch.setattr(Axes, "errorbar", lambda *what, **how: drawn.append(what) or bars(*what, **how))
    evaluation.report(header, RESULTS, str(tmp_path / "x.png"))
    assert [list(x) for _, x, *_ in drawn] == [[10, 20]] * 3 + [[30, 60]] * 3 + [[1, 2]] * 3
    lows = [y - down for _, _, y, (down, _), _ in drawn[:2]]
    assert np.allclose(lows, [[0, 0.0615], [0.0615, 0.2077]], atol=1e-4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hogwild:2", "3", "33%", "(6%–79%)", "67%", "(21%–94%)"] in lines
    assert ["hogwild:2", "+33%", "(+0%", "–", "+100%)", "–", "15", "0", "0", "1", "0"] in lines
    assert ["baseline", "–", "–", "20", "0", "0", "0", "0"] in lines
    # What the baseline had written in time: its right answer to problem 0 was not.
    assert ["no-early-stop", "3", "0%", "(0%–56%)", "0%", "(0%–56%)"] in lines
    assert ["no-early-stop", "-33%", "(-100%", "–", "+0%)", "–", "–", "1", "0", "0", "0"] in lines
    assert not any("\x1b" in word for line in lines for word in line)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_every_seed_is_a_run_of_its_own(toy, tmp_path, monkeypatch):
    """A seed of the command line is the seed of its run, down to the words."""
    monkeypatch.setattr(models, "prepared", lambda *_: toy)
    path, model = str(tmp_path / "x.jsonl"), f"--model={models.BUNDLED}"
    assert evaluation.main([model, "--task=own", "--methods=baseline", "--out", path, "--budgets=6",
                            "--limit=1", "--answer-tokens=2", "--seeds", "0", "7"]) == 0
    _, rows = evaluation.read([path])
    for row in rows:
        told = generate.Settings(max_passes=6, seed=row["seed"], answer_tokens=2)
        problem = evaluation.tasks.load("own")[0]
        alone = evaluated(evaluation.runs_of("baseline", *toy, problem, told), [6])
        assert alone["text"] == row["text"]
    assert [row["seed"] for row in rows] == [0, 7] and rows[0]["text"] != rows[1]["text"]


def test_what_draws_is_missed_at_once(tmp_path, monkeypatch):
    """Without matplotlib, --png is refused before anything is run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(models, "prepared", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ImportError, match="matplotlib"):
        evaluation.main(["--out", str(tmp_path / "x.jsonl"), "--png", str(tmp_path / "x.png")])
