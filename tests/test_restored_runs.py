"""Runs that are restored from their passes: they go on as if nothing had happened, or are refused."""
import copy
import json
import signal
from functools import partial
from importlib import import_module

import pytest
from helpers import EVENTS, LOOPS, PROBLEM, happen, often, random_model, runs, settings_for, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import command, recording

generate = import_module("06_generate")


def without_seconds(passes):
    """The records, without the one thing that differs from run to run."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in passes]


@settings(deadline=None, max_examples=50)
@given(runs(), LOOPS, EVENTS, st.integers(0, 20))
def test_a_restored_run_continues_as_if_nothing_had_happened(run_of, loop, events, more):
    """Killed at any pass, restored from records that went through JSON: blocks and future agree.

    Keys to 1e-4, since the restored ones come out of one large product.
    """
    kind, layout, workers, seed, passes, every = run_of
    model = random_model(kind)
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        run = loop(model, tokenizer(), PROBLEM, settings_for(layout, workers, seed))
        for number in range(passes):
            happen(events, run, number)
            run.advance()
        fresh = loop(model, tokenizer(), PROBLEM, settings_for(layout, workers, seed))
        other = recording.restored(fresh, json.loads(json.dumps(run.passes)))
        for mine, yours in zip(run.cache.blocks, other.cache.blocks, strict=True):
            assert vars(mine) == vars(yours) and run.ids.get(mine) == other.ids.get(yours)
            here = slice(mine.start, mine.start + mine.length)
            for what in ("keys", "values") if mine.length else ():
                for layer, memory in getattr(run.cache, what).items():
                    off = (memory - getattr(other.cache, what)[layer])[:, here].abs().max()
                    assert off < 1e-4, f"{what} of a block are off by {off:.1e} in layer {layer}"
        for number in range(passes, passes + more):
            for one in (run, other):
                happen(events, one, number)
                one.advance()
    assert without_seconds(run.passes) == without_seconds(other.passes)
    for mine, yours in zip(run.passes[:passes], other.passes):
        assert mine["seconds"] == yours["seconds"]
    assert run.answer() == other.answer() and run.generated == other.generated
    for mine, yours in zip(run.workers, other.workers, strict=True):
        assert {**vars(mine), "block": 0} == {**vars(yours), "block": 0}


BAD_EVENTS = {"event": ["say", "Eve"], "empty": [], "unknown": ["shout", "Eve", "No!"],
              "function": ["check_name", "Eve"], "newcomer": ["add", "Dave"]}


@pytest.mark.parametrize("damage", ["token", "settings", "order", "other tokens", "last token",
                                    "stranger", "text", "closed", *BAD_EVENTS])
def test_passes_that_do_not_follow_are_refused(monkeypatch, damage):
    """One sentence that says so, not a run that goes on from nonsense."""
    often(monkeypatch, 9)
    model = random_model("llama")
    run = generate.Hogwild(model, tokenizer(), PROBLEM, settings_for("combined", 2))
    for _ in range(12):
        run.advance()
    passes = copy.deepcopy(run.passes)
    settings_now = settings_for("combined", 3 if damage == "settings" else 2)
    if damage == "token":
        passes[4]["fed"]["Bob"][0] += 1
    elif damage == "order":
        passes[3], passes[9] = passes[9], passes[3]
    elif damage in ("other tokens", "last token"):
        passes[5 if damage == "other tokens" else -1]["sampled"]["Alice"] += 1
    elif damage == "stranger":
        passes[7]["sampled"]["Carol"] = 5
    elif damage == "text":
        passes[7]["text"]["Bob"] += "\x1b[2J"
    elif damage == "closed":
        next(record for record in passes if record["closed"])["closed"][0]["step"] += 1
    elif damage in BAD_EVENTS:
        passes[2]["events"] = [BAD_EVENTS[damage]]
    fresh = generate.Hogwild(model, tokenizer(), PROBLEM, settings_now)
    with pytest.raises(ValueError, match="of the trace"):
        recording.restored(fresh, passes)
    assert not fresh.passes  # and the fresh run is as it was


def test_a_run_that_has_advanced_is_no_obstacle(monkeypatch):
    """What is restored depends on problem, settings and passes alone; the run given stays as it is."""
    often(monkeypatch, 9)
    start = partial(generate.Hogwild, random_model("llama"), tokenizer(), PROBLEM,
                    settings_for("combined", 2))
    run, other = start(), start()
    for _ in range(12):
        run.advance()
    other.advance(), other.advance()
    assert recording.restored(other, run.passes).passes == run.passes and len(other.passes) == 2


# --------------------------------------------------------------------------------- the command line

def call(*arguments):
    """Exit code of chapter 6's command line."""
    return command.one_sentence(lambda: generate.main(list(map(str, arguments))))


def rows(path):
    """What is in a journal, its first line too."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_line_goes_on_with_what_was_killed(smollm, tmp_path, monkeypatch, capsys):
    """Interrupted in pass 7 of 14, the same command goes on; the trace is that of an undisturbed run."""
    often(monkeypatch, 6)
    loaded = copy.deepcopy(smollm[0]), smollm[1]
    monkeypatch.setattr(generate.models, "prepared", lambda *_: loaded)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    arguments = [PROBLEM, "--seed", 3, "--check-every", 16, "--workers", 3]
    assert call(*arguments, "--max-passes", 14, "--save", whole) == 0
    advance = generate.Hogwild.advance

    def interrupted(run):
        if len(run.passes) == 6:
            signal.raise_signal(signal.SIGTERM)
        return advance(run)
    monkeypatch.setattr(generate.Hogwild, "advance", interrupted)
    assert call(*arguments, "--max-passes", 14, "--save", killed) == 130
    monkeypatch.setattr(generate.Hogwild, "advance", advance)
    assert sum("fed" in row for row in rows(killed)) == 7
    assert call(*arguments, "--max-passes", 14, "--save", killed) == 0
    assert sum(len(row.get("closed", [])) for row in rows(whole)) > 2
    assert without_seconds(rows(killed)) == without_seconds(rows(whole))
    # a run that is over can be given more passes
    capsys.readouterr()
    assert call(*arguments, "--max-passes", 18, "--save", killed) == 0
    shown = capsys.readouterr().out
    assert "\n18 passes, " in shown and "\n[OK] " in shown
    assert [sum("fed" in row for row in rows(path)) for path in (killed, whole)] == [18, 14]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the arguments of a short run of a tiny model, the lines of its trace)."""
    folder = tmp_path_factory.mktemp("saved")
    for part in (random_model("llama"), tokenizer()):
        part.save_pretrained(folder / "model")
    (folder / "prompt.txt").write_text("{problem}")
    arguments = ["A: 43\nB: 16\nC: 77", "--model", folder / "model", "--greedy",
                 "--check-every", 0, "--prompt", folder / "prompt.txt", "--max-passes", 8]
    assert call(*arguments, "--save", folder / "trace.jsonl") == 0
    return arguments, rows(folder / "trace.jsonl")


def refused(arguments, trace, path, capsys, words):
    """With this trace in the file, the command is refused in one sentence with these words; it stays."""
    path.write_text("".join(json.dumps(row) + "\n" for row in trace))
    before = path.read_bytes()
    capsys.readouterr()
    try:
        code = call(*arguments, "--save", path)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert path.read_bytes() == before


@pytest.mark.parametrize("others, words", [
    (["--layout", "contiguous"], "layout"), (["--seed", 5], "seed"), (["--workers", 3], "workers"),
    (["--check-every", 7], "check_every"), (["--max-passes", 3], "8 passes already"),
    (["--max-passes", 2**40], "below 2^31"), (["another problem"], "problem"),
    (["--dtype", "bfloat16"], "dtype"),
])
def test_a_run_goes_on_with_its_own_settings(saved, tmp_path, monkeypatch, capsys, others, words):
    """What differs is named, before a model is loaded (--max-passes 3: after); the trace stays."""
    arguments, trace = saved
    if "8 passes" not in words:
        monkeypatch.setattr(generate.models, "load", None)
    arguments = others + arguments[1:] if words == "problem" else arguments + others
    refused(arguments, trace, tmp_path / "trace.jsonl", capsys, words)


def edit_of(number, **changes):
    """An edit of the trace's line of that number."""
    return lambda trace: trace[number].update(changes)


@pytest.mark.parametrize("edit, words", [
    (lambda trace: trace[5]["sampled"].update(Alice=-1), "does not follow"),
    (lambda trace: trace[5]["sampled"].update(Alice="x"), "damaged"),
    (lambda trace: trace[-2]["sampled"].update(Alice=9999), "does not follow"),
    (edit_of(4, seconds=None), "damaged"), (edit_of(1, prompt="something else"), "another prompt"),
    (lambda trace: trace.insert(3, {}), "damaged"), (lambda trace: trace[3].clear(), "damaged"),
    (edit_of(0, prompt="{problem}?"), "holds work with prompt"), (edit_of(4, events=[["say"]]), "event"),
    (edit_of(4, events=[["say", "Eve", "No."]]), "does not follow"), (edit_of(4, events=[[]]), "event"),
    (edit_of(4, events=[["dismiss", "Carol"]]), "cannot leave"),
    (edit_of(4, events=[["add", "Bob"]]), "two workers"),
    (lambda trace: trace.pop(6), "does not follow"), (edit_of(1, opening={}), "another prompt"),
])
def test_an_edited_trace_is_refused_and_stays(saved, tmp_path, capsys, edit, words):
    """One sentence, and the file is as it was."""
    arguments, trace = copy.deepcopy(saved)
    edit(trace)
    refused(arguments, trace, tmp_path / "trace.jsonl", capsys, words)
