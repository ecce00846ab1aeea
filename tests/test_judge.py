"""The judge of collaboration: what it is shown, how verdicts are read and kept; a server's stand-in."""
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from helpers import tiny, tokenizer

from appendix import command, journal, judge, models, results, tasks


def call(*arguments):
    """Exit code of the command line."""
    try:
        return command.one_sentence(lambda: judge.main([*map(str, arguments)]))
    except SystemExit as ended:
        return ended.code


@pytest.fixture
def runs(tmp_path):
    """A file of chapter 7 with a few methods and two problems."""
    path = tmp_path / "eval.jsonl"
    header = {"model": "m", "task": "own", "data": None, "budgets": [4]}
    answer = {"4": {"answer": "1", "in_time": False, "score": 0.0, "understood": True,
                    "passes": 4, "tokens": 4, "seconds": 1.0}}
    with journal.Journal(str(path), "evaluation", header, results.ROW) as out:
        for method, texts in (("hogwild:2", ["I add.", "I see you add."]), ("baseline", ["alone"]),
                              ("interleaved:2", ["I wait.", "So do I."]),
                              ("skeleton:3", ["1. outline", "a point", "all"]),
                              ("debate:2", ["I think so.", "Me too."]),
                              ("self-consistency:2", ["mine", "mine too"])):
            for problem in (0, 1):
                out.add({"method": method, "problem": problem, "seed": 0, "error": None,
                         "answers": answer, "ending": "passes", "text": texts})
    return path


def test_verdicts_are_read():
    """The last box with a level in it; anything else is none."""
    said = {"\\boxed{3}": 3, "Level \\boxed{1}? No: \\boxed{4}.": 4, "\\boxed{7}": None, "4": None,
            "\\boxed{}": None, "\\boxed{ 2 }": 2}
    assert {text: judge.level_of(text) for text in said} == said


def test_the_judge_sees_worker_after_worker(runs, monkeypatch, capsys):
    """Three verdicts per run of several workers, each with another seed, and their mean."""
    shown = []

    def one(options):
        def verdict(prompt, seed):
            shown.append((prompt, seed))
            return f"So \\boxed{{{5 if 'I see you' in prompt else seed % 2 + 1}}}"
        return verdict
    monkeypatch.setattr(judge, "local", one)
    out = runs.parent / "levels.jsonl"
    assert call(runs, "--out", out, "--png", runs.parent / "l.png") == 0
    text = capsys.readouterr().out
    assert re.search(r"hogwild:2 token-wise +2 +0 +0 +5\.00 +too few problems", text)
    assert re.search(r"interleaved:2 step-wise +2 +0 +0 +1\.33", text)
    assert re.search(r"self-consistency:2 no sync +2 +0 +0 +1\.33", text)
    assert not any(name in text for name in ("baseline", "skeleton", "debate"))
    assert len(shown) == 18 and {seed for _, seed in shown} == {0, 1, 2}
    first = next(prompt for prompt, _ in shown if "I see you" in prompt)
    assert "--- Alice ---\nI add.\n\n--- Bob ---\nI see you add." in first
    assert "12 books" in first and "1. Nothing in common" in first
    assert (runs.parent / "l.png").read_bytes()[:4] == b"\x89PNG"
    assert call(runs, "--out", out) == 0 and len(shown) == 18  # what is in there is not judged again


def test_a_model_of_transformers_judges(runs, monkeypatch):
    """In chapter 6's loop: with the prompt as the user's words, other words for other seeds; a verdict
    without a level is kept as that."""
    model = tiny("llama")
    monkeypatch.setattr(models, "prepared", lambda *_: (model, tokenizer()))
    verdict = judge.local(judge.Options(verdict_tokens=12))
    assert len({verdict("How well do they work?", seed) for seed in range(3)}) == 3
    assert len(tokenizer().encode(verdict("How well do they work?", 0))) > 3
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: "no level")
    out = runs.parent / "levels.jsonl"
    assert call(runs, "--out", out) == 0 and '"levels": [null, null, null]' in out.read_text()
    assert call(runs, "--out", out) == 0
    (runs.parent / "notes.png").write_text("my notes")
    assert call(runs, "--png", runs.parent / "notes.png") == 2
    assert (runs.parent / "notes.png").read_text() == "my notes"


def test_a_run_that_is_too_long_for_the_judge_has_no_level(runs, monkeypatch, capsys):
    """The others are judged; the table says that it has none, and it is not tried again."""
    model, seen = tiny("llama"), []
    monkeypatch.setattr(models, "prepared", lambda *_: seen.append(1) or (model, tokenizer()))
    monkeypatch.setattr(model.config, "max_position_embeddings", 2500)
    header, *rows = map(json.loads, runs.read_text().splitlines())
    rows[0]["text"][0] *= 2000
    runs.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    words = tokenizer()("\\boxed{4}.<|im_end|>").input_ids
    monkeypatch.setattr(judge.generate.Hogwild, "sample", lambda run, _: [words[len(run.passes)]])
    out = runs.parent / "levels.jsonl"
    assert call(runs, "--out", out) == 0 == call(runs, "--out", out) and seen == [1]
    levels = [json.loads(line)["levels"] for line in out.read_text().splitlines()[1:]]
    assert levels == [[None] * 3] + [[4] * 3] * 5
    assert re.search(r"hogwild:2 token-wise +2 +1 +0 +4.00 +too few problems", capsys.readouterr().out)


def test_what_has_no_level_is_in_the_table(runs, monkeypatch, capsys):
    """A method of which no run has a level is there without figures; who has one verdict with a level
    among three is counted; and nothing is complained of."""
    votes = {"I see you": [3, None, None], "I wait.": [2, None, 3], "mine": [None] * 3}
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: next(
        f"\\boxed{{{found[seed]}}}" for words, found in votes.items() if words in prompt))
    png = runs.parent / "l.png"
    assert call(runs, "--png", png) == 0
    said = capsys.readouterr()
    assert [" ".join(line.split()) for line in said.out.splitlines()] == [
        "method runs no level one vote level 95 % interval",
        "hogwild:2 token-wise 2 0 2 3.00 too few problems",
        "interleaved:2 step-wise 2 0 0 2.50 too few problems", "self-consistency:2 no sync 2 2 0 – –"]
    assert png.read_bytes()[:4] == b"\x89PNG" and not said.err


@pytest.mark.parametrize("level, seen", [(3, [3, 0]), (None, [0, 0])])
def test_what_has_no_level_is_in_the_picture(monkeypatch, level, seen):
    """It has a place and no bar there (bars are seen from level 1); few problems have no interval."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: drawn.extend(figure.axes))
    judge.report([{"method": method, "problem": 0, "seed": 0, "levels": [one, None]}
                  for method, one in (("hogwild:2", level), ("interleaved:2", None))], "l.png")
    axis, = drawn
    assert [bar.get_height() for bar in axis.patches] == seen and axis.get_ylim() == (1, 6)
    assert axis.get_xlim()[0] < 0 and axis.get_xlim()[1] > 1
    assert not any(len(part) for lines in axis.collections for part in lines.get_segments())


def test_one_process_judges(runs, monkeypatch, capsys):
    """--tensor-parallel is refused, in one sentence that says what there is instead, before a model is
    loaded."""
    monkeypatch.setattr(models, "prepared", lambda *_: pytest.fail("a model was loaded"))
    for what in (runs, "--calibrate"):
        assert call(what, "--tensor-parallel") == 2
        said = capsys.readouterr().err
        assert "--tensor-parallel" in said and "--device-map auto" in said and said.count("\n") == 1


@pytest.mark.parametrize("other", [("--endpoint", "http://localhost:2"), ("--dtype", "bfloat16")])
def test_judges_of_one_name_do_not_share_a_file(runs, monkeypatch, capsys, other):
    """Another server's model of the same name, or the same one in other numbers, is another judge."""
    for name in ("local", "remote"):
        monkeypatch.setattr(judge, name, lambda options: lambda prompt, seed: "\\boxed{4}")
    command = [runs, "--model", "m", "--out", runs.parent / "levels.jsonl"]
    command += ["--endpoint", "http://localhost:1"] * ("--endpoint" in other)
    assert call(*command) == 0 == call(*command)
    capsys.readouterr()
    assert call(*command, *other) == 2
    assert f"not {other[1]!r}: name another file" in capsys.readouterr().err


def test_other_runs_have_other_verdicts(runs, monkeypatch, capsys):
    """What was judged is known by its text: of another evaluation with the same names nothing is taken
    over, and the table is about the files that are given."""
    shown = []
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: shown.append(prompt) or (
        f"\\boxed{{{2 if 'Quite another' in prompt else 5}}}"))
    out, other = runs.parent / "levels.jsonl", runs.parent / "other.jsonl"
    header, first, second, *_ = runs.read_text().splitlines(keepends=True)
    other.write_text(header + first.replace("I add.", "Quite another thing.") + second)
    assert call(runs, "--out", out) == 0 and len(shown) == 18
    capsys.readouterr()
    assert call(other, "--out", out) == 0 and len(shown) == 21
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in table[1:]] == [["hogwild:2", "token-wise", *"200", "3.50"]]
    assert call(runs, "--out", out) == 0 and len(shown) == 21
    assert re.search(r"hogwild:2 token-wise +2 +0 +0 +5\.00", capsys.readouterr().out)


def test_a_verdict_is_read_at_its_end(monkeypatch):
    r"""A judge that goes on behind a \boxed{} is heard out, as one behind an endpoint is."""
    monkeypatch.setattr(models, "prepared", lambda *_: (tiny("llama"), tokenizer()))
    words = tokenizer()("Level \\boxed{1}?\n\nNo: \\boxed{4}.\n\n<|im_end|>").input_ids
    monkeypatch.setattr(judge.generate.Hogwild, "sample", lambda run, _: [words[len(run.passes)]])
    assert judge.level_of(judge.local(judge.Options())("How well do they work?", 0)) == 4


@pytest.mark.parametrize("count, said", [(9, r"4\.67 +too few problems"),
                                         (10, r"4\.70 +4\.10 – 5\.00")])
def test_seeds_are_no_problems(capsys, count, said):
    """Problems of which one was solved with three seeds: the level of each counts once. Of a few, the
    interval is not told, as in chapter 7."""
    seen = {(0, 0): 1, (0, 1): 2, (0, 2): 3, **{(problem, 0): 5 for problem in range(1, count)}}
    judge.report([{"method": "hogwild:2", "problem": problem, "seed": seed, "levels": [level, None]}
                  for (problem, seed), level in seen.items()], None)
    found = capsys.readouterr().out
    assert re.search(rf"hogwild:2 token-wise +{count + 2} +0 +{count + 2} +{said}", found), found


def test_runs_are_judged_with_the_problems_that_they_solved(runs, monkeypatch, capsys):
    """Runs on a file of problems need this file again; runs on a task's own ones need none."""
    asked, data = [], runs.parent / "mine.jsonl"
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: asked.append(prompt) or "")
    data.write_text('{"question": "How tall?", "answer": "1"}\n{"question": "And?", "answer": "2"}\n')
    assert call(runs, "--data", data) == 2 and "the task itself" in capsys.readouterr().err
    header, *rows = runs.read_text().splitlines(keepends=True)
    header = json.dumps({**json.loads(header), "data": tasks.label(data)}) + "\n"
    runs.write_text("".join([header, *rows]))
    assert call(runs) == 2 and "mine.jsonl" in capsys.readouterr().err and not asked
    assert call(runs, "--data", data) == 0 and "How tall?" in asked[0] + asked[-1]
    data.write_text('{"question": "How wide?", "answer": "1"}\n')
    assert call(runs, "--data", data) == 2 and capsys.readouterr().err.count("\n") == 1


def test_what_draws_is_missed_before_anything_is_judged(runs, monkeypatch, capsys):
    """Without matplotlib, --png is refused before there is a verdict that could be lost."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(judge, "local", lambda options: pytest.fail("a model was loaded"))
    assert call(runs, "--png", runs.parent / "l.png") == 2 and "matplotlib" in capsys.readouterr().err


def test_calibration(monkeypatch, capsys):
    """A judge who knows our examples puts them in order; one who says the same of all does not."""
    given = json.loads(judge.EXAMPLES.read_text())
    levels = {judge.page(texts): number for number, texts in enumerate(given["levels"], 1)}
    assert len(levels) == 6
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: next(
        f"\\boxed{{{number}}}" for page, number in levels.items() if page in prompt))
    assert call("--calibrate") == 0 and "[OK]" in capsys.readouterr().out
    monkeypatch.setattr(judge, "local", lambda options: lambda prompt, seed: "\\boxed{3}")
    assert call("--calibrate") == 1 and "order" in capsys.readouterr().err


class Stand(BaseHTTPRequestHandler):
    """A server that speaks OpenAI's protocol, a little."""

    def do_POST(self):  # noqa: N802
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        message = {"role": "assistant", "content": "I think \\boxed{4}"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"],
                           "choices": getattr(self.server, "choices", choices)})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Quiet."""


def test_a_server_may_judge(runs, capsys):
    """By OpenAI's protocol; if nobody answers, one sentence."""
    pytest.importorskip("openai", reason="the package openai is optional")
    server = HTTPServer(("127.0.0.1", 0), Stand)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    assert call(runs, "--endpoint", url, "--model", "some-model") == 0
    for server.choices in ([], None, [{"index": 0, "message": None, "finish_reason": "length"}]):
        assert call(runs, "--endpoint", url, "--model", "some-model") == 2
        said = capsys.readouterr()
        assert "did not answer" in said.err and said.err.count("\n") == 1
        server.asked = server.asked[:18]
    server.choices = [{"index": 0, "message": {"role": "assistant", "content": None}}]
    assert call(runs, "--endpoint", url, "--model", "some-model") == 0
    server.asked = server.asked[:18]
    del server.choices
    assert call(runs, "--endpoint", url, "--model", "some-model") == 0 and len(server.asked) == 36
    server.asked = server.asked[:18]
    server.shutdown()
    server.server_close()
    assert "4.00" in capsys.readouterr().out and len(server.asked) == 18
    assert {asked["model"] for asked in server.asked} == {"some-model"}
    assert call(runs, "--endpoint", url, "--model", "some-model") == 2
    assert "did not answer" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    ([], "--calibrate"), (["x.jsonl", "--calibrate"], "--calibrate"), (["nowhere.jsonl"], "nowhere"),
    (["--calibrate", "--endpoint", "http://localhost:1"], "--model"),
    (["--calibrate", "--png", "x.jpg"], ".png"), (["--calibrate", "--limit", "0"], "at least 1")])
def test_wrong_input_is_refused_in_one_sentence(arguments, words, capsys):
    """Exit code 2, one line, no traceback."""
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error, error
