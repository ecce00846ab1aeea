"""The demonstration, and the measurement of moved steps, on a tiny model: what they print is what
happened."""
from importlib import import_module

import pytest
import torch
from helpers import tiny

from appendix import command, demo, models, moved_steps, products, puzzles

generate = import_module("06_generate")


@pytest.fixture
def small(smollm, monkeypatch):
    """Both work on a tiny random model at once."""
    monkeypatch.setattr(models, "load", lambda *_, **__: (tiny("llama"), smollm[1]))
    monkeypatch.setattr(products, "fast_products", lambda model: model)


def call(program, *arguments):
    """Exit code of a command line."""
    try:
        return command.one_sentence(lambda: program.main([*map(str, arguments), "--device", "cpu"]))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("kind", puzzles.KINDS)
@pytest.mark.parametrize("knows", [(False, False), (True, False), (False, True), (True, True)])
def test_it_says_who_was_right_and_what_that_took(small, capsys, monkeypatch, kind, knows):
    """Alone and as a team; the problem, its answer, passes of both."""
    runs = []

    def answer(run):
        alone = len(run.workers) == 1
        return demo_answer[kind] if knows[not alone] else "1, 2, 3"
    demo_answer = {}
    draw = puzzles.Puzzle

    def remember(*arguments):
        puzzle = draw(*arguments)
        demo_answer[kind] = puzzle.answer
        return puzzle
    monkeypatch.setattr(demo.puzzles, "Puzzle", remember)
    monkeypatch.setattr(generate.Hogwild, "answer", answer)
    monkeypatch.setattr(demo, "MOST", 5)
    advance = generate.Hogwild.advance
    monkeypatch.setattr(generate.Hogwild, "advance", lambda run: runs.append(run) or advance(run))
    assert call(demo, "--kind", kind, "--plain") == 0
    text = capsys.readouterr().out
    words = ["Both wrong", "Only the team is right", "Only the single worker is right", "Both right"]
    assert f"{words[2 * knows[0] + knows[1]]} (the answer is {demo_answer[kind]})" in text
    assert "2 workers: 5 passes instead of 5" in text and len(runs) == 10


@pytest.mark.parametrize("program, arguments, words", [
    (demo, ["--kind", "riddle"], "riddle"), (demo, ["--workers", "1"], "at least 2"),
    (demo, ["--workers", "99"], "1 to 16"), (demo, ["--number", "-1"], "at least 0"),
    (moved_steps, ["--problems", "0"], "at least 1"), (moved_steps, ["--png", __file__], "end in .png"),
    (moved_steps, ["--passes", "1"], "--passes")])
def test_wrong_input_is_refused_in_one_sentence(small, capsys, program, arguments, words):
    """Exit code 2, one line, no traceback."""
    assert call(program, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error, error


def test_moved_steps_are_compared_and_left_as_they_were(smollm):
    """The differences are those of the definition, and the run goes on as one that nobody looks at."""
    model, settings = tiny("qwen3"), generate.Settings(["Alice", "Bob"], greedy=True, prompt="{problem}")
    ends = smollm[1].encode(".\n\n")
    words = [*smollm[1].encode("It is 5"), *ends, *smollm[1].encode("and so on"), *ends]
    runs = [loop(model, smollm[1], "What is it?", settings)
            for loop in (generate.Hogwild, moved_steps.Compared)]
    for token in words:
        logits = [generate.feed(run.model, run.cache, [run.writers()])[0] for run in runs]
        assert torch.equal(*logits)
        for run in runs:
            run.take([token, words[0]])
    found = runs[1].differences
    first, last = min(layer for _, layer in found), max(layer for _, layer in found)
    assert len(found["keys moved", first]) == 2 and first < last
    assert max(found["keys moved", first] + found["values moved", first]) < 1e-5
    assert min(found["keys moved", last] + found["values moved", last]) > 1e-3
    assert min(found["values alone", last]) > 1e-3
