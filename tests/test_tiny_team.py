"""The appendix on learning: the task, the ideal team in chapter 6's loop, shipped weights, training."""
import json
import random
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from appendix import command, journal, models, protocol, recording
from appendix import tiny_team as team

generate = import_module("06_generate")


@pytest.fixture(scope="module")
def trained():
    """(model, tokenizer) as they come with the project."""
    return models.load(str(team.TEAM))


# ------------------------------------------------------------------------------------------ the task

def test_every_number_comes_down():
    """The chains end in 1 or 4, each link is the sum of squared digits; answers as one gets by hand."""
    for number in range(1, 1000):
        numbers = team.chain(number)
        assert numbers[0] == number and numbers[-1] in (1, 4) and not {1, 4} & {*numbers[:-1]}
        for before, after in zip(numbers, numbers[1:]):
            assert after == sum(int(digit) * int(digit) for digit in str(before))
    puzzle = team.Puzzle(random.Random(0))
    starts = [int(line.split(": ")[1]) for line in puzzle.text.split("\n")]
    steps = 0
    for number in starts:
        while number not in (1, 4):
            number, steps = sum(int(digit) ** 2 for digit in str(number)), steps + 1
    assert puzzle.answer == str(steps % 10) and 8 <= len(starts) <= 10


def words_of_the_task():
    """All words: what the protocol says, what stands in problems, and what workers write."""
    done = [f"{rank} done" for rank in range(1, 5)]
    numbers = {number for start in team.ROUNDS for number in team.chain(start)}
    return {"<unk>", "<end>", protocol.PAST_STEPS, *protocol.SEPARATORS.values(), protocol.CHECK,
            protocol.FINISHER, "\n", "\n\n", "]:** ", "**Alice [", "**Bob [", "**Carol [", "**Dave [",
            *done, ", wait", ", \\boxed{", "}", *(f"{label}:" for label in "ABCDEFGHIJ"),
            *(f", {rounds} rounds" for rounds in range(11)), *(f" {number}" for number in numbers),
            *"0123456789", *(f", sum {digit}.\n\n" for digit in range(10)),
            *(f", sum of {rank}: {digit}.\n\n" for rank in range(1, 5) for digit in range(10))}


def test_the_tokenizer_keeps_every_word_and_every_text(trained):
    """A token per word, and text in, the same text out: problems, headers, what workers write."""
    tokenizer, puzzle = trained[1], team.Puzzle(random.Random(1))
    prompt = f"{puzzle.text}\n\n{protocol.PAST_STEPS}"
    for text in (puzzle.text, prompt, protocol.FINISHER, "\n\n" + protocol.header("Dave", 12)):
        ids = models.encode(tokenizer, text)
        assert tokenizer.unk_token_id not in ids and models.decode(tokenizer, ids) == text
    assert tokenizer.get_vocab().keys() == words_of_the_task()
    for word, i in tokenizer.get_vocab().items():
        assert word.startswith("<") or tokenizer.encode(word) == [i]


def own_words(tokenizer, run, name):
    """What a worker has written, word by word."""
    return tokenizer.convert_ids_to_tokens([record["sampled"][name] for record in run.passes])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), how=st.sampled_from([*dict.fromkeys(team.TEAMS)]),
       numbers=st.integers(1, 10))
def test_the_ideal_team_follows_the_rules_in_what_it_sees(trained, seed, how, numbers):
    """Read from the blocks of chapter 6's loop, not from `play`'s lists, the rules give the same words.

    The answer is right, and every number is worked on to its end.
    """
    (layout, workers), (model, tokenizer) = how, trained
    puzzle = team.Puzzle(random.Random(seed), numbers, numbers)
    run, ledger = team.play(model, tokenizer, puzzle, layout, workers)
    assert run.written_answer() == puzzle.answer
    assert torch.equal(recording.Recording.of(run).sampled, ledger.recording().sampled)
    ids, past = {w.name: [] for w in run.workers}, []
    for record in run.passes:
        for name, fed in record["fed"].items():
            ids[name] += fed
        steps = {team.NAMES.index(name): words_of(tokenizer, step) for name, step in ids.items()}
        for w in steps:
            seen = steps if layout == "combined" else {w: steps[w]}
            word = team.ideal(puzzle, w, seen, past)
            assert tokenizer.get_vocab()[word] == record["sampled"][team.NAMES[w]]
        for closed in record["closed"]:
            past.append((team.NAMES.index(closed["worker"]), steps[team.NAMES.index(closed["worker"])]))
            ids[closed["worker"]] = []
    lines = [own_words(tokenizer, run, w.name) for w in run.workers]
    for label, work in puzzle.work.items():
        done = [label, *work]
        assert any(words[i:i + len(done)] == done for words in lines for i in range(len(words)))


def words_of(tokenizer, ids):
    """The words of a step without its header."""
    words = tokenizer.convert_ids_to_tokens(ids)
    return [words[0], *words[words.index("]:** ") + 1 if "]:** " in words else 1:]]


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_only_who_cannot_see_claims_twice(trained, layout):
    """The ideal team does every number once; if unfinished steps are hidden, it cannot know better."""
    twice = 0
    for seed in range(30):
        puzzle = team.Puzzle(random.Random(seed))
        run, _ = team.play(*trained, puzzle, layout, 4)
        lines = [own_words(trained[1], run, w.name) for w in run.workers]
        begun = [claim for words in lines for claim, word in zip(words, words[1:])
                 if claim in team.LABELS and word[0] == " "]
        assert {*begun} == puzzle.work.keys()
        twice += len(begun) - len({*begun})
    assert twice == 0 if layout == "combined" else twice > 60


# ------------------------------------------------------------------------------- the shipped weights

def test_the_shipped_model_collaborates(trained):
    """24 fresh problems: nearly all right, alone, in twos and fours, in few passes; or all is redone."""
    torch.set_num_threads(1)
    results = {method: [] for method in ("1 worker", "2 workers", "4 workers", "4, step-wise")}
    for seed in range(24):
        puzzle = team.Puzzle(random.Random(f"test {seed}"))
        for method, rows in results.items():
            rows.append(team.solve(*trained, puzzle, method))
    right = {method: sum(row["score"] for row in rows) for method, rows in results.items()}
    assert right["1 worker"] >= 21 and right["2 workers"] >= 20 and right["4 workers"] >= 20, right
    passes = {method: sum(row["passes"] for row in rows) for method, rows in results.items()}
    assert passes["2 workers"] < 0.6 * passes["1 worker"], passes
    assert passes["4 workers"] < 0.4 * passes["1 worker"], passes
    again = {method: sum(row["again"] for row in rows) for method, rows in results.items()}
    assert again["4 workers"] <= 5 and again["4, step-wise"] > 400 and again["1 worker"] <= 2, again


def test_the_shipped_model_is_what_the_record_says(trained):
    """About a million parameters, a stock architecture, a few MB, with the command that made it."""
    made = json.loads((team.TEAM / "training.json").read_text())
    model, tokenizer = trained
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__.startswith("transformers.")
    assert sum(parameter.numel() for parameter in model.parameters()) == made["parameters"] < 1.2e6
    assert (team.TEAM / "model.safetensors").stat().st_size < 5e6
    assert model.config.vocab_size == len(tokenizer)
    assert "--seed" in made["command"] and made["log"][-1]["seconds"] <= 900


def test_chapter_6_runs_it_like_any_other_model(tmp_path):
    """The command line, on the folder. (Their answer ends no step, so the run goes on.)"""
    (tmp_path / "prompt.txt").write_text("{problem}")
    puzzle = team.Puzzle(random.Random(5))
    arguments = [puzzle.text, "--model", str(team.TEAM), "--prompt", str(tmp_path / "prompt.txt"),
                 "--greedy", "--check-every", "0", "--max-passes", "80"]
    run = subprocess.run([sys.executable, str(ROOT / "06_generate.py"), *arguments], capture_output=True,
                         text=True, check=False)
    assert run.returncode == 0 and "[OK]" in run.stdout, run.stderr
    assert re.search(rf"^Answer: {puzzle.answer}\b", run.stdout, re.M)


# -------------------------------------------------------------------------------------- the training

def test_training_learns_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """12 small steps; stopped in the seventh and continued, it ends as an undisturbed run does."""
    for name, value in (("TOKENS", 400), ("KEEP_EVERY", 4), ("WARM_UP", 4)):
        monkeypatch.setattr(team, name, value)
    team.train(tmp_path / "whole", 0, 12)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 1
    lesson, calls = team.lesson, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise RuntimeError("somebody needs the machine")
        return lesson(*arguments)
    monkeypatch.setattr(team, "lesson", stop)
    with pytest.raises(RuntimeError, match="somebody"):
        team.train(tmp_path / "stopped", 0, 12)
    monkeypatch.setattr(team, "lesson", lesson)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    team.train(tmp_path / "stopped", 0, 12)
    folders = [tmp_path / name for name in ("whole", "stopped")]
    whole, stopped = (load_file(folder / "model.safetensors") for folder in folders)
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    logs = [(folder / "log.jsonl").read_text() for folder in folders]
    assert logs[0] == logs[1] and logs[0].count("\n") == 4
    shipped, made = ({path.name for path in folder.iterdir()} for folder in (team.TEAM, folders[1]))
    assert made == shipped - {"training.json"} | {"log.jsonl"}  # no checkpoint, nothing half-written
    models.load(str(tmp_path / "stopped"))


def test_two_processes_average_their_gradients(tmp_path, monkeypatch):
    """Under torchrun, each draws lessons of its own; the weights are those of one with both losses."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, team.__file__, "--train", str(tmp_path / "two"), "--steps", "2"],
                   check=True, capture_output=True, timeout=300)
    assert '"processes": 2' in (tmp_path / "two" / "log.jsonl").read_text()
    team.train(tmp_path / "one", 0, 2)
    lesson, loss = team.lesson, recording.loss

    def lessons(model, tokenizer, chance, progress):
        chances = [random.Random(f"0 {round(2 * progress)} {rank}") for rank in (0, 1)]
        return [lesson(model, tokenizer, chance, progress) for chance in chances]
    monkeypatch.setattr(team, "lesson", lessons)
    monkeypatch.setattr(recording, "loss", lambda model, ropes, both, **options: sum(
        loss(model, ropes, one, **options) for one in both) / 2)
    team.train(tmp_path / "both", 0, 2)
    one, two, both = (torch.cat([weight.flatten() for _, weight in sorted(load_file(
        tmp_path / folder / "model.safetensors").items())]) for folder in ("one", "two", "both"))
    assert (two - both).abs().mean() < 1e-7 and (one - both).abs().mean() > 1e-5


def test_a_training_is_not_continued_with_other_settings(tmp_path, capsys):
    """Seed and number of steps decide what is drawn and how fast it is learned; a folder has its own."""
    about = {"format": "hogwild-training-2", "seed": 0, "steps": 12, "processes": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(about) + "\n")
    assert call("--train", tmp_path, "--seed", 1, "--steps", 12) == 2
    assert "holds work with seed 0" in capsys.readouterr().err
    assert call("--train", tmp_path, "--steps", 13) == 2 and "steps 12" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("something else")
    assert call("--train", tmp_path, "--steps", 12) == 2 and "no checkpoint" in capsys.readouterr().err
    del about["format"]
    with journal.Journal(str(tmp_path / "log.jsonl"), "training", about, {"step": int}):
        assert call("--train", tmp_path, "--steps", 12) == 2
    assert "another process" in capsys.readouterr().err


def test_a_checkpoint_executes_nothing(tmp_path, capsys):
    """A checkpoint from elsewhere is weights, or refused: what it would have run does not run."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    torch.save([1, Trap(), Trap()], tmp_path / "checkpoint.pt")
    assert call("--train", tmp_path) == 2 and "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


# --------------------------------------------------------------------------------- the command line

def call(*arguments):
    """Exit code of the command line."""
    try:
        return command.one_sentence(lambda: team.main([*map(str, arguments)]))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("arguments, words", [
    (["--problems", "0"], "at least 1"), (["--steps", "-1", "--train", "x"], "at least 1"),
    (["--seed", "-1", "--train", "x"], "at least 0"), (["--train", "x", "--seed", str(2**63)], "2^31"),
    (["--problems", "x"], "invalid int"), (["--model", "nowhere"], "trained model"),
    (["--out", "nowhere/results.jsonl"], "cannot be written"), (["--train", str(team.TEAM)], "already"),
    (["--png", "curves.svg"], "end in .png"), (["--out", __file__], "that this program wrote"),
    (["--out", "x.png", "--png", "./x.png"], "the same file"),
    (["--png", "nowhere/x.png"], "cannot be written"),
    (["--nonsense"], "unrecognized"), (["--out", ""], "empty"), (["--train", ""], "empty"),
])
def test_wrong_input_is_refused_in_one_sentence(arguments, words, capsys):
    """Exit code 2, one line, no traceback."""
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1, error


def test_results_are_kept_and_belong_to_their_weights(tmp_path, capsys):
    """A second run solves only what is missing: a line that was cut short is solved again."""
    out = tmp_path / "results.jsonl"
    call("--problems", 1, "--out", out, "--png", tmp_path / "curves.png")
    text, lines = capsys.readouterr().out, out.read_text().splitlines()
    assert len(lines) == 1 + len(team.METHODS) and (tmp_path / "curves.png").stat().st_size > 10_000
    assert all(re.search(rf"^{re.escape(method)} .*%.*%", text, re.M) for method in team.METHODS)
    out.write_text("\n".join(lines[:-1] + [lines[-1][:20]]))
    # The picture is ours and may be replaced.
    call("--problems", 1, "--out", out, "--png", tmp_path / "curves.png")
    again = out.read_text().splitlines()
    assert len(again) == len(lines) and again[:-1] == lines[:-1]
    assert json.loads(again[-1])["passes"] == json.loads(lines[-1])["passes"]
    impossible = {**json.loads(lines[1]), "passes": 0, "seconds": 0.0}  # who edited that?
    out.write_text("\n".join([lines[0], json.dumps(impossible), *lines[2:], ""]))
    assert call("--problems", 1, "--out", out) in (0, 1) and "Traceback" not in capsys.readouterr().err
    content = out.read_text().replace(json.loads(lines[0])["weights"], "another model")
    out.write_text(content)
    assert call("--problems", 1, "--out", out) == 2 and out.read_text() == content
    assert "weights 'another model'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a note without an end", "a note\n", '{"format": "hogwild-eval-1"}\n',
                                  "[" * 10**5, '{"format": "hogwild-trace-2"}\n'])
def test_files_of_others_are_left_alone(tmp_path, capsys, text):
    """--out does not touch what is no file of results, nor --png what is no picture."""
    (tmp_path / "notes.png").write_text(text)
    for option, words in (("--out", "that this program wrote"), ("--png", "something else")):
        assert call("--problems", 1, option, tmp_path / "notes.png") == 2
        assert words in capsys.readouterr().err and (tmp_path / "notes.png").read_text() == text
