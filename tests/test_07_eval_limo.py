"""Chapter 7: problems, grading, methods against what they claim to be, and an evaluation that is killed again and again."""
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from importlib import import_module
from itertools import product

import pytest
import torch
from conftest import ROOT
from test_06_generate import tiny

evaluation = import_module("07_eval_limo")
generate = import_module("06_generate")
query_rotation = import_module("04_query_rotation")
shared_cache = import_module("02_shared_cache")
QUESTION = "How much is 3 + 4?"
FIVE = ["18", "3", "70000", "540", "20"]


def test_the_answers_in_the_chapter_are_right():
    """Found by trying everything."""
    pays = sum(a + 5 * b + 10 * c == 20 for a, b, c in product(range(21), range(5), range(3)))
    sevens = Fraction(sum(a + b == 7 for a, b in product(range(1, 7), repeat=2)), 36)
    found = [sum(12 for _ in range(4)), 15 + (15 + 8), sum(n % 3 == 0 or n % 5 == 0 for n in range(1, 101)), sum(range(1, 21)),
             pays, f"\\frac{{{sevens.numerator}}}{{{sevens.denominator}}}",
             max(a * b for a, b in product(range(1, 10), repeat=2) if 2 * (a + b) == 20),
             next(n for n in range(2, 1000) if all(n % k == 1 for k in (2, 3, 4, 5))), 7 ** 100 % 10]
    assert [str(answer) for answer in found] == [answer for _, answer in evaluation.PROBLEMS]


GRADED = {  # right answer -> (answers that a person would accept, answers that a person would not)
    "14": ("14 |14.0| 14 |\\text{14}|14 \\text{ apples}|$14$|\\$14|14 apples|14.", "15|-14|141|1/4|14_5|\\le 14|17 \\to 14|"),
    "1000": ("1000|1,000|1{,}000|10^3|1\\,000", "100|10000|1,00"),
    "-3": ("-3|-3.0|-\\frac{6}{2}|- 3", "3|-2|+3"),
    "0.5": ("0.5|1/2|\\frac{1}{2}|\\frac12|\\dfrac{1}{2}|.5", "0.05|2|\\frac{1}{3}"),
    "\\frac{3}{4}": ("3/4|0.75|\\frac{6}{8}|\\tfrac34|\\frac{3}{4}", "4/3|0.7|\\frac{3}{5}"),
    "-\\frac{5}{2}": ("-5/2|-2.5|\\frac{-5}{2}|-\\dfrac{5}{2}", "5/2|-\\frac{2}{5}"),
    "2\\sqrt{3}": ("2\\sqrt{3}|2\\sqrt3|\\sqrt{12}|2 \\cdot \\sqrt{3}", "\\sqrt{3}|3\\sqrt{2}|2\\sqrt{5}"),
    "\\frac{\\sqrt{2}}{2}": ("\\frac{\\sqrt{2}}{2}|\\frac{1}{\\sqrt{2}}|\\sqrt{2}/2", "\\sqrt{2}|\\frac{\\sqrt{3}}{2}"),
    "\\frac{\\pi}{2}": ("\\frac{\\pi}{2}|\\pi/2|0.5\\pi", "\\pi|2\\pi|90"),
    "12\\pi": ("12\\pi|12 \\pi|\\pi \\cdot 12", "12|24\\pi"),
    "50\\%": ("50\\%|50|0.5|\\frac{1}{2}", "5\\%|500|0.05"),
    "70^\\circ": ("70^\\circ|70|70^{\\circ}|70 \\text{ degrees}", "20|7|110^\\circ"),
    "5\\text{ cm}": ("5\\text{ cm}|5|5\\text{cm}|5 \\mathrm{~cm}", "50|6\\text{ cm}"),
    "(3,\\frac{\\pi}{2})": ("(3,\\frac{\\pi}{2})|(3, \\pi/2)|\\left(3,\\frac{\\pi}{2}\\right)", "(\\pi/2,3)|(3,\\pi)|3"),
    "(1,2,3)": ("(1,2,3)|(1, 2, 3)|\\left( 1, 2, 3 \\right)", "(3,2,1)|(1,2)|(1,2,4)"),
    "[1,2)": ("[1,2)|\\left[1,2\\right)|[1, 2)", "[1,2]|(1,2)|[1,3)"),
    "(-\\infty,3]": ("(-\\infty,3]|\\left(-\\infty, 3\\right]", "(-\\infty,3)|[3,\\infty)"),
    "[-2,1]\\cup[3,4]": ("[-2,1]\\cup[3,4]|[-2, 1] \\cup [3, 4]", "[-2,1]|[3,4]"),
    "\\{1,2\\}": ("\\{1,2\\}|\\{2,1\\}|\\{1, 2\\}", "\\{1\\}|\\{1,3\\}"),
    "x^2+2x+1": ("x^2+2x+1|(x+1)^2|1+2x+x^2|x^{2}+2x+1", "x^2+2x|x^2+1"),
    "2x+3": ("2x+3|3+2x|2 x + 3|y=2x+3", "3x+2|2x-3"),
    "\\text{Evelyn}": ("\\text{Evelyn}|Evelyn|\\text{evelyn}", "Debra|\\text{Angela}"),
    "\\text{(C)}": ("\\text{(C)}|C|(C)|\\text{C}", "B|\\text{(A)}"),
    "\\text{even}": ("\\text{even}|even", "odd|\\text{odd}"),
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}": (
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}|\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}|1"),
    "2^{10}": ("2^{10}|1024|2^10", "20|1023"),
    "6+9i": ("6+9i|9i+6|6 + 9i", "6-9i|15"),
    "3,5,7": ("3,5,7|3, 5, 7|7,5,3", "3,5|3,5,8"),
    "1.5": ("1.5|\\frac{3}{2}|1\\frac{1}{2}|3/2", "1.4|\\frac{2}{3}"),
    "\\frac{a}{b+c}": ("\\frac{a}{b+c}|a/(b+c)|\\frac{a}{c+b}", "\\frac{a}{b}+c|\\frac{b}{a+c}"),
    "\\sqrt{x^2+1}": ("\\sqrt{x^2+1}|\\sqrt{1+x^2}|(x^2+1)^{1/2}", "x+1|\\sqrt{x+1}"),
    "4:3": ("4:3|\\frac{4}{3}", "3:4"),
    "11,\\!111,\\!111,\\!100": ("11111111100|11,111,111,100", "1111111110"),
    "\\$32,\\!000": ("32000|\\$32,000|32,000", "3200|\\$32"),
    "10:30": ("10:30", "10:31"),
    "0": ("0|0.0|\\frac{0}{3}", "1|-1|\\text{none}"),
    "e^2": ("e^2|e^{2}|\\mathrm{e}^2|e \\cdot e", "2e|e"),
    "\\log_2 8": ("\\log_2 8|3|\\log_{2}{8}", "2|8"),
    "\\binom{5}{2}": ("\\binom{5}{2}|10", "5|20"),
    "x=3": ("x=3|3|x = 3", "4|x=-3"),
    "120_5": ("120_5|120_{5}", "120_6|121_5"),
    "7!": ("5040|7!", "504|6!"),
}


def test_answers_are_graded_as_a_person_would():
    """238 pairs of the kinds that stand in the data: numbers, fractions, intervals, tuples, units, percent, text, matrices."""
    pairs = [(gold, answer, score) for gold, columns in GRADED.items() for score, column in zip((1, 0), columns)
             for answer in column.split("|")]
    assert len(pairs) > 200
    assert not [pair for pair in pairs if evaluation.grade(pair[1], [pair[0]])[0] != pair[2]]


@pytest.mark.parametrize("answer, golds, score", [
    ("18,3,70000,540,20", FIVE, 1), ("18, 3, 70,000, 540, 20", FIVE, 1), ("18,3,1,1,1", FIVE, 0.4),
    ("3,18", ["18", "3"], 0), ("18", ["18", "3"], 0.5), ("(18,3)", ["18", "3"], 1),
    ("\\left(18, 3\\right)", ["18", "3"], 1), ("18, 70{,}000", ["18", "70000"], 1), ("(1,2),(3,4)", ["(1,2)", "(3,4)"], 1),
    ("\\{18, 3\\}", ["18", "3"], 1), ("18,3,120,540", FIVE, 0.6),
    ("\\$18,\\$3,1/2,5\\%,x", ["18", "3", "0.5", "5", "7"], 0.8), ("answer1=18, 3", ["18", "3"], 1)])
def test_lists_are_graded_position_by_position(answer, golds, score):
    """The paper's per-question score; a comma may also stand between thousands."""
    assert evaluation.grade(answer, golds) == (pytest.approx(score), True)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_no_answer_is_wrong_and_counted(answer):
    """What cannot be understood is wrong, and said to be so."""
    assert evaluation.grade(answer, ["1"]) == (0.0, False)


# -- methods ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy(smollm):
    """(a tiny random model, a tokenizer)."""
    return tiny("llama"), smollm[1]


def run_to_end(run, passes):
    """Advance to the end; returns per worker the tokens that were sampled."""
    sampled = {}
    while run.ending is None and len(run.passes) < passes:
        for worker, token in run.advance()["sampled"].items():
            sampled.setdefault(worker, []).append(token)
    return sampled


def test_the_baseline_is_what_generate_does(toy):
    """Sequential, greedy: the tokens of the stock model's own `generate`."""
    model, tokenizer = toy
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    settings = generate.Settings(max_passes=60, greedy=True)
    run = evaluation.start_run("baseline", model, tokenizer, QUESTION, settings)
    ours = run_to_end(run, 60)[0]
    ids = torch.tensor([run.encode(run.prompt)])
    theirs = stock.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)[0, ids.shape[1]:]
    assert ours == theirs.tolist()[:len(ours)] and len(ours) >= 20


def test_a_sample_is_a_sequential_run(toy):
    """Worker i of self-consistency, with its seed: the baseline with seed + i, token for token, until it is done."""
    model, tokenizer = toy
    settings = generate.Settings(max_passes=40, seed=5)
    team = run_to_end(evaluation.start_run("self-consistency:3", model, tokenizer, QUESTION, settings), 40)
    assert len({tuple(tokens) for tokens in team.values()}) == 3
    for worker in range(3):
        alone = evaluation.start_run("baseline", model, tokenizer, QUESTION, generate.Settings(max_passes=40, seed=5 + worker))
        assert run_to_end(alone, 40)[0] == team[worker]


def test_a_sample_ends_with_its_own_answer(toy, monkeypatch):
    """One worker's \boxed{} ends that worker, not the run; the answer is then asked for with all text in view."""
    model, tokenizer = toy
    run = evaluation.start_run("self-consistency:2", model, tokenizer, QUESTION, generate.Settings(max_passes=30, greedy=True))
    written = iter(tokenizer("so \\boxed{7} and", add_special_tokens=False).input_ids * 9)
    monkeypatch.setattr(run, "sample", lambda logits, writing: [next(written) if w.index == 0 else 42 for w in writing])
    while len(run.passes) < 20:
        run.advance()
    first, second = run.workers
    assert first.finished and not second.finished and run.boxed is None and run.ending is None
    assert tokenizer.decode(first.ids).endswith("}") and len(second.ids) == 20
    fed = []
    feed = run._feed
    monkeypatch.setattr(run, "_feed", lambda writers: fed.append([ids for _, ids in writers]) or feed(writers))
    assert isinstance(run.answer(), str)
    assert fed[0][0] == first.pending and len(fed[0]) == 2  # the closing brace is fed too, so that all of it is in view
    assert [block.length for block in run.cache.blocks][1:] == [len(first.ids), len(second.ids)]


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_thread_is_a_sequential_run(toy, at_once):
    """Three threads with different prompts, all at once or two taking turns: each as if it ran alone."""
    model, tokenizer = toy
    prompts = ["Tell me about cats. Point 1: fur", "Tell me about cats. Point 2: paws and claws", "Tell me about cats. Tails"]
    settings = generate.Settings(workers=generate.NAMES[:3], max_passes=60, greedy=True, **evaluation.SOLO)
    together = run_to_end(evaluation.Prompted(model, tokenizer, QUESTION, settings, prompts=prompts, at_once=at_once), 30)
    assert sum(map(len, together.values())) == 30 * (at_once or 3) and max(map(len, together.values())) < 31
    for worker, prompt in enumerate(prompts):
        alone = evaluation.Prompted(model, tokenizer, QUESTION, generate.Settings(workers=["A"], max_passes=60, greedy=True,
                                                                                  **evaluation.SOLO), prompts=[prompt])
        assert run_to_end(alone, len(together[worker]))[0] == together[worker]


@pytest.mark.parametrize("spec, threads", [("skeleton", 3), ("skeleton:2", 2)])
def test_skeleton_of_thought_goes_through_its_stages(toy, monkeypatch, spec, threads):
    """An outline of three points, three threads, then one worker who has read them; the budget counts all passes."""
    model, tokenizer = toy
    end = tokenizer.eos_token_id
    outline = tokenizer(" red.\n\n2. green\n3. blue", add_special_tokens=False).input_ids
    thread = tokenizer("It is done.\n\nReally", add_special_tokens=False).input_ids
    seen, written = [], {}

    def sample(run, logits, writing):
        seen.append(len(writing))
        script = {1: [*outline, end], 3: [*thread, end]}.get(len(run.workers), []) if stage.stage_number < 3 else []
        for w in writing:
            written[id(w)] = written.get(id(w), -1) + 1
        return [script[written[id(w)]] if written[id(w)] < len(script) else 42 for w in writing]

    stage = evaluation.start_run(spec, model, tokenizer, QUESTION, generate.Settings(max_passes=80, greedy=True))
    monkeypatch.setattr(generate.Hogwild, "sample", sample)
    while stage.ending is None:
        stage.advance()
    assert stage.points == ["red.", "green", "blue"] and stage.stage_number == 3 and len(stage.passes) == 80
    assert seen[:len(outline) + 1] == [1] * (len(outline) + 1) and seen[len(outline) + 1] == threads
    assert sum(seen) == stage.generated == len(outline) + 1 + 3 * (len(thread) + 1) + stage.stage.generated
    prompt = tokenizer.decode(stage.stage.encode(stage.stage.prompts[0]))
    really = "It is done.\n\nReally\n\n"
    assert f"1. red. {really}2. green {really}3. blue {really}" in prompt and isinstance(stage.answer(), str)


def test_reencoded_steps_are_encoded_in_their_place(toy, monkeypatch):
    """After steps have ended, the history holds the keys of its text encoded in one go; rotated steps do not."""
    model, tokenizer = toy
    monkeypatch.setattr(generate, "step_ended", lambda text: len(text) > 60)
    worst = {}
    for spec in ("re-encode:2", "hogwild:2"):
        run = evaluation.start_run(spec, model, tokenizer, QUESTION, generate.Settings(max_passes=25, greedy=True))
        ids = run.encode(run.prompt)
        while run.ending is None:
            pending = {w.index: w.ids for w in run.workers}
            for closed in run.advance()["closed"]:
                ids = ids + pending[closed["worker"]][:-1]
        cache, history = run.cache, run.cache.blocks[0]
        assert history.length == len(ids) > len(run.encode(run.prompt)) + 20
        fresh = shared_cache.SharedCache([len(ids)], cache.ropes)
        fresh.append({0: len(ids)})
        query_rotation.forward(model, fresh, import_module("03_layouts").fill_tables(fresh.blocks, [([0], len(ids))]), ids, [0])
        worst[spec] = max((fresh.keys[layer] - cache.keys[layer][:, :len(ids)]).abs().max().item() for layer in fresh.keys)
    assert worst["re-encode:2"] < 1e-3 and worst["hogwild:2"] > 0.1, worst


def test_one_run_answers_at_every_budget(toy):
    """The answers at 5, 10 and 15 passes are those of runs that were asked only once."""
    model, tokenizer = toy
    for spec in ("hogwild:2", "self-consistency:2", "baseline", "skeleton"):
        settings = generate.Settings(max_passes=15, seed=2)
        often = evaluation.evaluate(evaluation.start_run(spec, model, tokenizer, QUESTION, settings), ["7"], [5, 10, 15])
        assert [entry["passes"] for entry in often["answers"].values()] == [5, 10, 15]
        for budget in (5, 10, 15):
            once = evaluation.evaluate(evaluation.start_run(spec, model, tokenizer, QUESTION, settings), ["7"], [budget])
            assert once["answers"][str(budget)]["answer"] == often["answers"][str(budget)]["answer"]
        assert once["text"] == often["text"] and once["tokens"] == often["tokens"]


# -- the evaluation --------------------------------------------------------------------------------------------------------

ARGUMENTS = ["--methods", "baseline", "hogwild:2", "--budgets", "2", "4", "--limit", "4", "--seeds", "0", "1",
             "--device", "cpu", "--out"]


@pytest.fixture
def without_loading(toy, monkeypatch):
    """The command line works on the tiny model at once."""
    monkeypatch.setattr(shared_cache, "load_model", lambda *arguments, **options: toy)
    monkeypatch.setattr(shared_cache, "pack_linears", lambda model: model)


def lines_of(path):
    """The results in a file, without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    for row in rows:
        row.pop("seconds")
        for entry in row["answers"].values():
            entry.pop("seconds")
    return sorted(rows, key=evaluation.key_of)


def test_killed_at_twenty_moments_it_ends_as_if_undisturbed(without_loading, tmp_path, capfd):
    """SIGKILL at random moments, started again each time: every run is there exactly once, with the same answers."""
    assert evaluation.main([*ARGUMENTS, str(tmp_path / "calm.jsonl")]) == 0
    path, chance, kills = tmp_path / "killed.jsonl", random.Random(0), 0
    for _ in range(100):
        child = os.fork()
        if child == 0:
            os._exit(evaluation.main([*ARGUMENTS, str(path)]))
        if kills < 20:
            time.sleep(chance.uniform(0.02, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and kills >= 20:
            break
        if kills in (5, 12) and path.exists():  # and in the middle of a line
            with open(path, "ab") as file:
                file.write(b'{"method": "baseline", "prob')
    assert os.WEXITSTATUS(status) == 0 and kills == 20, status
    results = lines_of(path)
    assert len(results) == 16 == len({evaluation.key_of(result) for result in results})
    assert results == lines_of(tmp_path / "calm.jsonl")
    capfd.readouterr()


def test_a_fault_is_recorded_and_the_rest_goes_on(without_loading, tmp_path, monkeypatch, capsys):
    """One problem fails: said in a sentence, counted as not right, and tried again (alone) by the next start."""
    start = evaluation.start_run

    def fail(spec, model, tokenizer, question, *others):
        if "have together" in question and broken:
            raise RuntimeError("broken on purpose")
        return start(spec, model, tokenizer, question, *others)

    monkeypatch.setattr(evaluation, "start_run", fail)
    path, broken = tmp_path / "out.jsonl", True
    assert evaluation.main([*ARGUMENTS, str(path), "--png", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr()
    assert "4 of 16 runs failed" in said.err and "broken on purpose" in said.err and "[OK]" not in said.out
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert len(rows) == 16 and sum("broken on purpose" in row.get("error", "") for row in rows) == 4
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert evaluation.main(["--report", str(path), str(path)]) == 0 and "    16" not in (said := capsys.readouterr().out)
    assert "      8" in said
    broken = False
    assert evaluation.main([*ARGUMENTS, str(path)]) == 0
    said = capsys.readouterr().out
    assert "4 runs to do" in said.replace("\n", " ") and "[OK] 16 runs" in said


def test_every_method_is_what_it_says(toy):
    """Layouts, workers, checks and prompts of all methods; an answer that was not written in time does not count."""
    model, tokenizer = toy
    settings = generate.Settings(max_passes=4, check_every=128)
    expected = {"hogwild:3": ("combined", 3, 128), "hogwild:1": ("combined", 1, 128), "contiguous": ("contiguous", 2, 128),
                "interleaved:4": ("interleaved", 4, 128), "no-check": ("combined", 2, 0), "re-encode:16": ("combined", 16, 128),
                "baseline": ("independent", 1, 0), "no-early-stop": ("independent", 1, 0),
                "self-consistency:5": ("independent", 5, 0)}
    for spec, (layout, workers, check) in expected.items():
        run = evaluation.start_run(spec, model, tokenizer, QUESTION, settings)
        assert (run.layout.name, len(run.workers), run.settings.check_every) == (layout, workers, check), spec
        assert run.layout.headers == (tokenizer.decode(run.workers[0].pending).strip().startswith("**Alice [1]:**"))
    run = evaluation.start_run("no-early-stop", model, tokenizer, QUESTION, settings)
    assert evaluation.evaluate(run, ["7"], [2, 4], early_stop=False)["answers"]["4"]["answer"] is None
    run = evaluation.start_run("baseline", model, tokenizer, QUESTION, settings)
    assert isinstance(evaluation.evaluate(run, ["7"], [2, 4])["answers"]["4"]["answer"], str)


def test_one_file_has_one_writer_and_is_ours(tmp_path):
    """A second process on the same file, and a file of somebody else, are refused; nothing is overwritten."""
    common = {"budgets": [2]}
    first = evaluation.Results(tmp_path / "a[1].b", common)
    with pytest.raises(ValueError, match="another process"):
        evaluation.Results(tmp_path / "a[1].b", common)
    second = evaluation.Results(tmp_path / "a[1].b", common, rank=1, processes=2)
    for results, number in ((first, 1), (second, 2)):
        results.add({"method": "baseline", "problem": number, "seed": 0, "answers": {"2": {"score": 1}}})
    assert len(evaluation.files_of(tmp_path / "a[1].b")) == 2
    third = evaluation.Results(tmp_path / "a[1].b", common, read_only=True)
    assert len(third.done) == 2
    (tmp_path / "notes").write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match="no file of an evaluation"):
        evaluation.Results(tmp_path / "notes", common)
    assert (tmp_path / "notes").read_text() == '{"my": "notes"}'


def test_the_figures_of_the_report():
    """Wilson's interval as tabulated, means, passes to a right answer, and the ratio at equal accuracy, by hand."""
    assert evaluation.interval(0.5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert evaluation.interval(0.0, 20) == (pytest.approx(0.0), pytest.approx(0.1611, abs=1e-4))

    def result(method, scores):
        entry = {"understood": True, "answer": "7"}
        return {"method": method, "ending": "passes", "answers": {
            str(b): {**entry, "score": s, "seconds": b / 10, "passes": b} for b, s in zip((10, 20), scores)}}
    rows = {"baseline": [(0, 1), (0, 0), (0, 0)], "hogwild:2": [(1, 1), (0, 1), None]}
    results = [{**({"error": "x"} if scores is None else result(method, scores)), "method": method, "problem": i, "seed": 0}
               for method, column in rows.items() for i, scores in enumerate(column)]
    results.append({**result("baseline", (1, 1)), "problem": 9, "seed": 0})  # of a problem that hogwild has not done: left out
    table = evaluation.summary(results, [10, 20])
    base, ours = table["baseline"], table["hogwild:2"]
    assert base["accuracy"] == [0, 1 / 3] and base["passes_to_right"] == 20 and base["count"] == 3
    assert ours["accuracy"] == [1 / 3, 2 / 3] and ours["faults"] == 1 and ours["passes_to_right"] == 15
    assert ours["seconds"] == [1, 2] and ours["none"] == ours["not_understood"] == 0
    again = evaluation.summary(results + [{**row, "seed": 1} for row in results], [10, 20])["hogwild:2"]
    assert again["count"] == 3 and again["runs"] == 6 and again["accuracy"] == ours["accuracy"]  # seeds are no problems
    with pytest.raises(ValueError, match="no problem yet"):  # one method has done problem 0, the other problem 1
        evaluation.summary([results[0], results[4]], [10, 20])
    assert evaluation.passes_to_reach(0.5, [10, 20], [0, 0.5]) == 20
    assert evaluation.passes_to_reach(0.5, [10, 20], [1 / 3, 2 / 3]) == pytest.approx(15)
    assert evaluation.relative_passes([10, 20], [1 / 3, 2 / 3], [0, 0.5]) == "0.75 (at 50%)"
    assert evaluation.relative_passes([10, 20], [0.9, 0.9], [0, 0.5]) == "–"  # reached before the first budget: not measured
    assert evaluation.difference([1, 1, 0], [0, 0, 0]) == (pytest.approx(2 / 3), 0, 1)


@pytest.mark.parametrize("answer, clean", [("so\n#### 18", "18"), (["$x=2$"], "$x=2$"), (["1", "2"], "1, 2"), (7, "7"),
                                           (None, ""), ([], ""), ({"a": 1}, ""), (True, "")])
def test_answers_as_data_sets_have_them(answer, clean):
    """A solution before it, a list around it, several of them, a number; and what is no answer."""
    assert evaluation.clean_answer(answer) == clean


def test_problems_from_files(tmp_path):
    """GSM8K lines make problems of five questions, none of them twice, in the paper's words."""
    path = tmp_path / "gsm.jsonl"
    rows = ({"question": f"Q{i}?", "answer": f"because\n#### {i:,}"} for i in range(1000, 1023))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = evaluation.load_problems("gsm8k-x5", str(path))
    assert len(problems) == 4 and all(len(problem["answers"]) == 5 for problem in problems)
    assert problems[0]["question"].startswith("Solve these problems and return comma-separated answers \\boxed{answer1,")
    asked = [line.split("Q")[1][:-1] for problem in problems for line in problem["question"].splitlines()[1:]]
    assert len(set(asked)) == 20
    assert [answer.replace(",", "") for problem in problems for answer in problem["answers"]] == asked


GOOD = '{"question": "a", "answer": "1"}\n'
WRONG = {
    "broken": (GOOD + '{"question": \n', [], "line 2 of"), "field": (GOOD + '{"question": "b"}\n', [], "line 2 of"),
    "empty": ("", [], "no problem"), "twice": (GOOD * 2, [], "line 2 of"), "few": (GOOD, ["--task", "gsm8k-x5"], "only 1"),
    "method": (GOOD, ["--methods", "magic"], "no method"), "workers": (GOOD, ["--methods", "hogwild:99"], "1 to 16"),
    "solo": (GOOD, ["--methods", "baseline:2"], "1 to 1"), "task": (GOOD, ["--task", "magic"], "no task"),
    "budgets": (GOOD, ["--budgets", "8", "8"], "increasing"), "budget": (GOOD, ["--budgets", "0"], "increasing"),
    "limit": (GOOD, ["--limit", "0"], "at least 1"), "seed": (GOOD, ["--seeds", "-1"], "seed"),
    "seeds": (GOOD, ["--seeds", "1", "1"], "twice"), "out": (GOOD, ["--out", "no/such/folder.jsonl"], "cannot be written"),
    "png": (GOOD, ["--png", "no/such/folder.png"], "cannot be written"), "data": (None, [], "cannot be read"),
    "other": (GOOD, ["--budgets", "3"], "budgets"), "report": (GOOD, ["--report", "nothing.jsonl"], "cannot be read"),
    "torchrun": (GOOD, ["--tensor-parallel", "--out", "tp.jsonl"], "torchrun"),
    "answers": (GOOD, ["--answer-tokens", "0"], "answer_tokens"),
    "null": ('{"question": "a", "answer": null}', [], "no answer"),
    "list": ('{"question": ["a"], "answer": "1"}', [], "line 1 of"),
    "greedy": (GOOD, ["--greedy", "--seeds", "1", "2"], "give one"), "picture": (GOOD, ["--png", "x.jpg"], "end in .png"),
    "foreign": (GOOD, ["--out", "data.jsonl"], "line 1 of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_a_model_is_loaded(case, tmp_path, monkeypatch, capsys):
    """One sentence that names the line, the value or the difference; exit code 2."""
    content, arguments, word = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared_cache, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    if case == "other":
        theirs = evaluation.common_settings(evaluation.parse_arguments(["--data", "data.jsonl", "--budgets", "2", "4"]))
        (tmp_path / "eval.jsonl").write_text(json.dumps({"format": evaluation.FORMAT, **theirs}) + "\n")
    try:
        code = evaluation.main(["--data", "data.jsonl", *arguments])
    except SystemExit as refusal:
        code = refusal.code
    said = capsys.readouterr().err
    assert code == 2 and word in said and said.count("\n") == 1, said


def test_a_hub_that_is_out_of_reach(monkeypatch, capsys, tmp_path):
    """Names the data set, and the way out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(shared_cache, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    def offline(*arguments, **options):
        raise ConnectionError("no route to the hub\nand a long story")
    datasets = import_module("datasets")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert evaluation.main(["--task", "limo", "--out", str(tmp_path / "x.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "GAIR/LIMO" in said and "no route" in said and "--data" in said and said.count("\n") == 1


def test_processes_share_the_problems_or_the_model(smollm, tmp_path):
    """torchrun: two processes split the runs; three shard a model with SmolLM2's 9 and 3 heads. Same words as one process."""
    model, tokenizer = smollm
    config = model.config.to_dict()
    for key in ("quantization_config", "layer_types", "_name_or_path"):
        config.pop(key, None)
    small = import_module("transformers").LlamaForCausalLM(import_module("transformers").LlamaConfig(
        **{**config, "num_hidden_layers": 2}))
    small.load_state_dict(model.state_dict(), strict=False)  # its first layers, with the real weights
    small.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    watch = tmp_path / "watch.py"  # the chapter, saying how many key heads a process keeps
    watch.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom importlib import import_module\n"
                     "evaluation, cache = import_module('07_eval_limo'), import_module('02_shared_cache').SharedCache\n"
                     "write, heads = cache.write, set()\n"
                     "cache.write = lambda self, layer, k, v: heads.add(k.shape[0]) or write(self, layer, k, v)\n"
                     "code = evaluation.main()\nprint('key heads', heads)\nsys.exit(code)\n")
    common = ["--model", str(tmp_path / "model"), "--budgets", "6", "--methods", "baseline", "hogwild:2", "--limit", "2",
              "--greedy", "--device", "cpu", "--out"]
    rows = {}
    for count, extra in ((1, []), (2, []), (3, ["--tensor-parallel"])):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
        command = [sys.executable, *torchrun, str(watch), *common, str(tmp_path / f"{count}.jsonl"), *extra]
        run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.count(f"key heads {{{3 if count < 3 else 1}}}") == count
        files = evaluation.files_of(tmp_path / f"{count}.jsonl")
        assert len(files) == (2 if count == 2 else 1)
        rows[count] = [row for file in files for row in lines_of(file)]
    texts = [{evaluation.key_of(row): (row["text"], row["answers"]) for row in rows[count]} for count in (1, 2, 3)]
    assert len(texts[0]) == 4 and texts[0] == texts[1] == texts[2]
