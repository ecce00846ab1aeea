"""The results of chapter 7: what several files and commands make together, and what makes no result."""
import json
import os
from importlib import import_module

import pytest
from helpers import tiny, tokenizer

from appendix import command, models, products, results, tasks

evaluation, methods = import_module("07_eval_limo"), import_module("appendix.methods")
RUN = ["--model", models.BUNDLED, "--task", "own", "--limit", "1", "--device", "cpu", "--answer-tokens",
       "1", "--batch", "1"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command line: its exit code. It works on a tiny model, and its results are in out.jsonl."""
    toy = tiny("llama"), tokenizer()
    monkeypatch.setattr(models, "load", lambda *_, **__: toy)
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            return command.one_sentence(lambda: evaluation.main([*arguments]))
        except SystemExit as ended:
            return ended.code
    return run


def row(method="baseline", error=None, **scores):
    """A row with these scores: b4=1.0 is one at budget 4."""
    return {"method": method, "problem": 0, "seed": 0, "error": error, "ending": "passes", "text": [],
            "answers": {name[1:]: {**results.NOTHING, "score": score} for name, score in scores.items()}}


def test_answers_at_all_budgets_are_kept():
    """Of rows without an error; the longest of them says how the run ended."""
    long = {**row(b2=0.0, b8=1.0), "ending": "answer"}
    failed = row(error="broken", b8=0.0, b9=0.0)
    for rows in ([row(b2=0.0, b4=0.5), long, failed], [failed, long, row(b2=0.0, b4=0.5)]):
        one, = results.one_each(rows)
        assert {budget: entry["score"] for budget, entry in one["answers"].items()} == {
            "2": 0.0, "4": 0.5, "8": 1.0}
        assert one["ending"] == "answer" and not one["error"]
        assert results.asked_at(one, [2, 4, 8]) and not results.asked_at(one, [9])
    assert results.one_each([failed]) == [failed]


def test_smaller_budgets_may_be_added(call, capsys):
    """To larger ones, in any order, and for some of the methods: all answers stand in the table."""
    run = [*RUN, "--out", "out.jsonl", "--methods", "baseline"]
    for budgets in (["2", "4"], ["2", "3"], ["3", "4"], ["2", "3", "4"]):
        assert call(*run, "--budgets", *budgets) == 0 and "[OK]" in capsys.readouterr().out
    assert len(open("out.jsonl").readlines()) == 3  # a header, and two runs
    assert call(*run, "hogwild:1", "--budgets", "2", "4") == 0
    assert call(*run, "--budgets", "8") == 0
    capsys.readouterr()
    assert call("--report", "out.jsonl") == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert table[0] == ["method", "runs", "2", "4"] and table[1][0] == "baseline"


def test_debates_with_other_budgets_are_other_debates(call, capsys):
    """Their files make no evaluation together; those of other methods do."""
    for name, budget, method in [("a", "2", "debate"), ("b", "4", "debate"), ("c", "4", "baseline"),
                                 ("d", "2", "debate")]:
        assert call(*RUN, "--out", name, "--methods", method, "--budgets", budget) == 0
    assert call("--report", "a", "b") == 2 and "other settings" in capsys.readouterr().err
    assert len(results.read(["a", "c", "d"])[1]) == 3


def test_what_does_not_reach_the_disk_is_no_success(call, monkeypatch, capsys):
    """The table is shown, and the exit code is 1; as soon as there is room, the same command goes on."""
    run = [*RUN, "--out", "out.jsonl", "--methods", "baseline", "hogwild:1", "--budgets", "2"]
    write, lines = os.write, []

    def full(file, data):
        lines.append(data)
        if len(lines) > 2:
            raise OSError(28, "No space left on device")
        return write(file, data)
    with monkeypatch.context() as patch:
        patch.setattr(results.journal.os, "write", full)
        assert call(*run) == 1
    said = capsys.readouterr()
    assert "[OK]" not in said.out and "hogwild:1" in said.out and "No space left" in said.err
    assert "1 of 2 runs failed" in said.err and "not in the file" in said.err
    assert call(*run) == 0 and "1 runs to do" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["--methods", "fork-join:4"], "from 1 to 1"), (["--methods", "vote:3", "--greedy"], "vote:1"),
    (["--methods", "debate", "--greedy"], "the workers of debate:2 would all write the same"),
    (["--methods", "hogwild:2", "self-consistency", "--greedy"], "self-consistency:1"),
    (["--methods", "vote", "--model", "collaborator"], "an adapter may set it"),
    (["--task", "livecodebench", "--data", "old.jsonl"], "only 0")])
def test_what_makes_no_result_is_refused(call, monkeypatch, capsys, arguments, words):
    """In one sentence, before a model is loaded."""
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    case = {"input": "1", "output": "1", "testtype": "stdin"}
    with open("old.jsonl", "w") as file:
        file.write(json.dumps({
            "question_content": "Add.", "contest_date": "2023-01-01", "starter_code": "",
            "metadata": "{}", "public_test_cases": json.dumps([case]),
            "private_test_cases": "[]"}))
    assert call(*RUN, "--out", "out.jsonl", *arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out
    assert not os.path.exists("out.jsonl")


@pytest.mark.parametrize("spec", ["vote:1", "skeleton:3", "fork-join", "hogwild:2", "baseline"])
def test_greedy_runs_that_are_no_copies_are_fine(spec):
    """Who is alone, and who reads something else than the others, may be greedy."""
    assert evaluation.Evaluation(model="some", methods=[spec], greedy=True).methods == [spec]
    assert evaluation.method("fork-join:1")[0] == "fork-join"


def test_a_file_of_an_older_version_is_refused(call, capsys):
    """Its answers do not say whether they were written in time."""
    assert call(*RUN, "--out", "out.jsonl", "--methods", "baseline", "--budgets", "2") == 0
    header, old = map(json.loads, open("out.jsonl"))
    del old["answers"]["2"]["in_time"]
    with open("out.jsonl", "w") as file:
        file.write(json.dumps(header) + "\n" + json.dumps(old) + "\n")
    capsys.readouterr()
    assert call("--report", "out.jsonl") == 2
    said = capsys.readouterr().err
    assert "line 2 of 'out.jsonl'" in said and "an older version wrote it" in said


def test_a_program_is_read_from_what_its_threads_wrote():
    """Problems with tests instead of answers have a third stage, as those of one number have."""
    assert "answers" in (problem := tasks.load("livecodebench", str(
        results.journal.Path(evaluation.__file__).with_name("appendix") / "programs.jsonl"))[0])
    toy = tiny("llama"), tokenizer()
    told = evaluation.generate.Settings(max_passes=400, form="code", greedy=True, answer_tokens=4)
    runs = []
    for run in evaluation.runs_of("skeleton", *toy, problem, told):
        runs.append(run)
        run.next_writers = list  # whatever they write
    assert len(runs) == 3 and len(runs[-1].workers) == 1
