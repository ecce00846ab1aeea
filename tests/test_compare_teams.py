"""The comparison of teams, with workers who know how to do it (the ideal team's), so that its counts can
be told beforehand; and its command line."""
import json
import random
import re
from importlib import import_module

import pytest
from helpers import tiny

from appendix import batching, command, compare_teams, ideal_team, models, puzzles

generate, shared_cache = import_module("06_generate"), import_module("02_shared_cache")


@pytest.fixture(scope="module")
def setting(smollm):
    """(a tiny model with SmolLM2's tokenizer, a way to let ideal workers solve problems)"""
    model, tokenizer = tiny("llama"), smollm[1]

    def results(method, *drawn):
        """Rows of results of these puzzles, which share every pass."""
        cache = shared_cache.SharedCache(import_module("04_query_rotation").attach(model))

        def start(loop, puzzle, layout, names):
            run = ideal_team.start(loop, model, tokenizer, puzzle, layout, len(names), None, cache)
            for w, name in zip(run.workers, names):
                w.name = name
            together, labels = layout != "interleaved", [*puzzle.parts]
            boards = [ideal_team.Board()] * len(names) if together else [
                ideal_team.Board() for _ in names]
            members = [ideal_team.tokens_of(ideal_team.Member(
                puzzle, board, labels if together else ideal_team.step_wise(labels, who), together),
                tokenizer) for who, board in enumerate(boards)]

            def sample(_):
                if run.said or not run.passes:  # somebody may have done something already
                    text = tokenizer.decode(run.said)
                    for label, answer in re.findall(r"\b([A-Z])=(\d+)\.", text):
                        boards[0].show("done", label, int(answer))
                picked = [next(member) for member in members]
                for who, (_, _, told) in enumerate(picked):
                    for event in told:
                        for board in boards if not together else boards[:1]:
                            if board is boards[who] or together:
                                board.show(*event)
                return [token for token, _, _ in picked]
            run.sample = sample
            return run

        def job(puzzle):
            figures = yield from compare_teams.solve(compare_teams.stages_of(method, start, puzzle))
            return puzzle.text, compare_teams.judged(puzzle, figures.pop("runs"), figures)
        rows = dict(batching.side_by_side(map(job, drawn), lambda groups: generate.feed(
            model, cache, groups, import_module("04_query_rotation").forward), len(drawn)))
        return [rows[puzzle.text] for puzzle in drawn]
    return results


@pytest.mark.parametrize("kind", puzzles.KINDS)
@pytest.mark.parametrize("method", ["hogwild:1", "hogwild:2", "hogwild:4", "fixed:2", "fixed:4"])
def test_who_knows_how_to_do_it_is_right(setting, kind, method):
    """Three problems in the same passes: all right, nothing twice, nothing left out."""
    drawn = [puzzles.Puzzle(random.Random(f"compare {n}"), kind, 8) for n in range(3)]
    if method.startswith("fixed") and kind == "plan":
        return  # who looks at nobody cannot use another one's answer
    for row in setting(method, *drawn):
        assert row["score"] == 1 and row["again"] == row["never"] == 0, row
        assert row["passes"] > 20 and row["seconds"] > 0
        assert row["tokens"] >= row["passes"]


def test_counts_are_those_of_the_schedule(setting):
    """One worker's passes are its tokens; a team's tokens are its passes times its size; passes of a
    fixed division are those of the longest share, and the answer's."""
    puzzle = puzzles.Puzzle(random.Random("counts"), "list", 7)
    (one,), (two,), (fixed,) = (setting(method, puzzle)
                                for method in ("hogwild:1", "hogwild:2", "fixed:2"))
    assert one["tokens"] == one["passes"] and two["tokens"] == 2 * two["passes"]
    assert two["passes"] < fixed["passes"] < one["passes"]
    shares = [setting("hogwild:1", puzzle.share([*puzzle.parts][who::2]))[0]["passes"] for who in (0, 1)]
    answer = setting("hogwild:1", puzzle.share("A"))[0]["passes"]
    assert max(shares) - 10 < fixed["passes"] < max(shares) + answer + 25


def test_sharing_a_pass_changes_nothing(setting):
    """Problems side by side or one at a time: the same rows, but for seconds."""
    drawn = [puzzles.Puzzle(random.Random(f"side {n}"), "race", 6) for n in range(3)]
    together, alone = setting("hogwild:2", *drawn), [setting("hogwild:2", puzzle)[0] for puzzle in drawn]
    for row in (*together, *alone):
        del row["seconds"]
    assert together == alone


@pytest.mark.parametrize("method, layout, loop, workers", [
    ("hogwild:1", "combined", generate.Hogwild, 1), ("hogwild:3", "combined", generate.Hogwild, 3),
    ("step-wise:2", "interleaved", generate.Hogwild, 2),
    ("independent:4", "independent", generate.Hogwild, 4),
    ("re-encode:2", "combined", compare_teams.methods.Reencode, 2),
    ("untaught:2", "combined", generate.Hogwild, 2)])
def test_a_method_is_a_layout_and_a_loop(method, layout, loop, workers):
    """One run of so many workers on the whole problem, until it is over."""
    puzzle = puzzles.fresh("list", 0)
    (([run], over),) = compare_teams.stages_of(method, lambda *how: how, puzzle)
    assert run == (loop, puzzle, layout, ideal_team.NAMES[:workers]) and method in compare_teams.METHODS
    assert over(type("", (), {"ending": "answer"})) and not over(type("", (), {"ending": None}))


def made_up(method, problem, **others):
    """A row of results."""
    return {"problem": problem, "method": method, "score": 1.0, "passes": 100, "tokens": 100,
            "seconds": 10.0, "again": 0, "never": 0, "answer": "7", **others}


def test_the_table_says_what_the_rows_say(tmp_path, capsys, monkeypatch):
    """Shares, means, ratios of sums; seconds only where problems went one at a time; the curves."""
    first, second = compare_teams.Options().methods[:2]
    table = {first: [made_up(first, 0), made_up(first, 1, score=0.5, passes=300, seconds=30.0)],
             second: [made_up(second, 0, passes=50, tokens=200, seconds=8.0, again=1),
                      made_up(second, 1, score=0.0, passes=150, tokens=200, seconds=20.0, never=3)]}
    console = compare_teams.Console(width=200)
    compare_teams.report(table, True, console)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    one, two = (next(line for line in lines if line[:1] == [method] and "%" in line[1])
                for method in table)
    assert one[1] == "75.0%" and two[1] == "50.0%" and one[-6:-5] != two[-6:-5]
    assert "200.0" in one and "100.0" in two and "1.000" in one and "0.500" in two and "0.700" in two
    assert one[-2:] == ["0.00", "0.00"] and two[-2:] == ["0.50", "1.50"] and "200" in two
    compare_teams.report(table, False, console)
    assert "0.700" not in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(compare_teams.curves, "draw", lambda *what: drawn.append(what))
    compare_teams.draw("x.png", "a title", table)
    (_, title, budgets, lines, other), = drawn
    at = {int(budget): n for n, budget in enumerate(budgets)}
    assert title == "a title" and other == ["tokens"]
    assert [lines[first]["accuracy"][at[n]] for n in (80, 100, 280, 300)] == [0, 0.5, 0.5, 0.75]
    assert [lines[second]["accuracy"][at[n]] for n in (40, 60, 160)] == [0, 0.5, 0.5]
    assert lines[first]["tokens"][at[100]] == pytest.approx(100 * (1 + 1 / 3) / 2)
    monkeypatch.undo()
    compare_teams.draw(str(tmp_path / "x.png"), "a title", table)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_share_asks_for_its_parts_alone():
    """In their order, under their labels; a race's share may lack what is looked for."""
    puzzle = puzzles.Puzzle(random.Random(0), "list", 6)
    share = puzzle.share(["E", "B"])
    assert re.findall(r"^[A-Z]", share.text, re.M)[1:] == ["B", "E"]
    assert share.answer == f"{puzzle.parts['B'].answer}, {puzzle.parts['E'].answer}"
    assert len(puzzle.parts) == 6 and puzzle.answer.count(",") == 5
    race = puzzles.Puzzle(random.Random(0), "race", 6)
    assert race.share(["A"]).target == race.target and race.share(["A"]).text.count("\n") == 1


def call(*arguments):
    """Exit code of the command line."""
    try:
        return command.one_sentence(lambda: compare_teams.main([*map(str, arguments)]))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("arguments, words", [
    (["--kind", "riddle"], "kind"), (["--patterns", "odd"], "patterns"),
    (["--methods", "hogwild:7"], "method"),
    (["--problems", "0"], "at least 1"), (["--batch", "0"], "at least 1"), (["--out", ""], "empty"),
    (["--model", "nowhere"], "no folder of an adapter"), (["--nonsense"], "unrecognized"),
    (["--out", __file__], "that this program wrote")])
def test_wrong_input_is_refused_in_one_sentence(arguments, words, capsys):
    """Exit code 2, one line, no traceback."""
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1, error


def test_results_are_kept(tmp_path, capsys, monkeypatch, smollm):
    """A second run solves only what is missing; results of other weights are not mixed in."""
    model = tiny("llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: (model, smollm[1]))
    monkeypatch.setattr(ideal_team, "MOST", 4)
    out = tmp_path / "teams.jsonl"
    arguments = ["--problems", 2, "--methods", "hogwild:1", "untaught:2", "--out", out]
    assert call(*arguments) == 0
    text, lines = capsys.readouterr().out, out.read_text().splitlines()
    assert len(lines) == 5
    assert all(re.search(rf"^{method} .*%", text, re.M) for method in ("hogwild:1", "untaught:2"))
    out.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    assert call(*arguments, "--batch", 1) == 0
    again = out.read_text().splitlines()
    assert again[:-1] == lines[:-1] and json.loads(again[-1])["passes"] == 4
    assert call(*arguments, "--batch", 2) == 2 and "batch 1" in capsys.readouterr().err
