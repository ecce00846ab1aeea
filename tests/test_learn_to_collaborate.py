"""The appendix on learning: the task, the ideal team against chapter 6's own loop, the shipped weights, and the training."""
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

sys.path.append(str(ROOT / "appendix"))
generate = import_module("06_generate")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
team = import_module("learn_to_collaborate")
replay = import_module("replay")
TOKENIZER = team.make_tokenizer()


@pytest.fixture(scope="module")
def trained():
    """(model, tokenizer) as they come with the project."""
    return shared_cache.load_model(str(team.TEAM))


def test_every_number_comes_down():
    """The chains end in 1 or 4, each link is the sum of squared digits, and answers are what one gets by hand."""
    for number in range(1, 1000):
        numbers = team.chain(number)
        assert numbers[0] == number and numbers[-1] in (1, 4)
        assert all(after == sum(int(d) * int(d) for d in str(before)) for before, after in zip(numbers, numbers[1:]))
    puzzle = team.Puzzle(random.Random(0))
    starts = [int(line.split(": ")[1]) for line in puzzle.text.split("\n")]
    steps = 0
    for number in starts:
        while number not in (1, 4):
            number, steps = sum(int(digit) ** 2 for digit in str(number)), steps + 1
    assert puzzle.answer == str(steps % 10) and 8 <= len(starts) <= 10


def test_the_tokenizer_keeps_every_word_and_every_text():
    """A token per word, and text in, the same text out, for problems, headers and what workers write."""
    puzzle = team.Puzzle(random.Random(1))
    prompt = f"{puzzle.text}\n\n{generate.PAST_STEPS}"
    for text in (puzzle.text, prompt, generate.FINISHER, "\n\n" + generate.header("Dave", 12)):
        ids = TOKENIZER(text, add_special_tokens=False).input_ids
        assert TOKENIZER.unk_token_id not in ids and TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    for word, i in team.vocabulary(TOKENIZER).items():
        assert word.startswith("<") or TOKENIZER.encode(word) == [i]


class Scripted(generate.Hogwild):
    """Chapter 6's loop; the ideal team, which reads the text of the blocks, takes the place of the model."""

    puzzle = None

    def sample(self, logits, writing):
        """What `ideal` writes, given the words that stand in the blocks that each worker sees."""
        own = [self._words(w.ids) for w in self.workers]
        past = [(c["worker"], self._words(self.encode(c["text"]))) for record in self.passes for c in record["closed"]]
        words = []
        for w in writing:
            seen = {o.index: own[o.index] for o in self.workers if o is not w} if self.layout.name == "combined" else {}
            words.append(team.ideal(self.puzzle, w.index, own[w.index], seen, past))
        return [team.vocabulary(self.tokenizer)[word] for word in words]

    def _words(self, ids):
        """The words of a step without its header."""
        words = self.tokenizer.convert_ids_to_tokens(ids)
        return [words[0], *words[words.index("]:** ") + 1:]]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([("combined", 1), ("combined", 2), ("combined", 3), ("combined", 4),
                                               ("interleaved", 2), ("interleaved", 4)]), st.integers(1, 10))
def test_the_ideal_team_is_recorded_as_chapter_6_would(seed, how, numbers):
    """`play` keeps books of its own. Chapter 6's loop, with the ideal team instead of a model, feeds and closes the same."""
    layout, workers = how
    puzzle = team.Puzzle(random.Random(seed), numbers, numbers)
    plan, prompt, separators, passes = team.play(puzzle, TOKENIZER, workers, layout)
    torch.manual_seed(0)
    rules = generate.Settings(team.NAMES[:workers], layout, max_passes=400, check_every=0, greedy=True, prompt="{problem}")
    run = Scripted(team.make_model(TOKENIZER).eval(), TOKENIZER, puzzle.text, rules, forward=bookkeeping)
    run.puzzle = puzzle
    while run.ending is None:
        run.advance()
    assert run._openings()[0] == prompt and run.separators == separators and run.layout == plan
    for ours, theirs in zip(passes, run.passes, strict=True):
        assert ours["fed"] == theirs["fed"] and ours["sampled"] == theirs["sampled"]
        assert [c["worker"] for c in ours["closed"]] == [c["worker"] for c in theirs["closed"]]
    if layout == "combined":
        assert run.boxed == puzzle.answer


def bookkeeping(model, cache, tables, ids, last):
    """A forward pass that computes nothing."""
    return torch.zeros(len(last), len(TOKENIZER))


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_only_who_cannot_see_claims_twice(layout):
    """The ideal team does every number once; if unfinished steps are hidden, it cannot know better."""
    twice = 0
    for seed in range(30):
        puzzle = team.Puzzle(random.Random(seed))
        *_, passes = team.play(puzzle, TOKENIZER, 4, layout)
        words = [[TOKENIZER.convert_ids_to_tokens(record["fed"][w][-1]) for record in passes] for w in range(4)]
        begun = [claim for line in words for claim, word in zip(line, line[1:]) if team.is_claim(claim) and word[0] == " "]
        assert set(begun) == {label + ":" for label in puzzle.work}
        twice += len(begun) - len(set(begun))
    assert twice == 0 if layout == "combined" else twice > 60


# --------------------------------------------------------------------------------------------------- the shipped weights

def test_the_shipped_model_collaborates(trained):
    """24 fresh problems: nearly all right, alone, in twos and in fours, in few passes; what is hidden is done again."""
    torch.set_num_threads(1)
    results = {method: [] for method in ("1 worker", "2 workers", "4 workers", "4, step-wise")}
    for seed in range(24):
        puzzle = team.Puzzle(random.Random(f"test {seed}"))
        for method, rows in results.items():
            rows.append(team.solve(*trained, puzzle, method))
    right = {method: sum(row["right"] for row in rows) for method, rows in results.items()}
    assert right["1 worker"] >= 21 and right["2 workers"] >= 20 and right["4 workers"] >= 20, right
    passes = {method: sum(row["passes"] for row in rows) for method, rows in results.items()}
    assert passes["2 workers"] < 0.6 * passes["1 worker"] and passes["4 workers"] < 0.4 * passes["1 worker"], passes
    again = {method: sum(row["again"] for row in rows) for method, rows in results.items()}
    assert again["4 workers"] <= 5 and again["4, step-wise"] > 400 and again["1 worker"] <= 2, again


def test_the_shipped_model_is_what_the_record_says(trained):
    """About a million parameters, a stock architecture, a few MB, with the command that made it."""
    made = json.loads((team.TEAM / "training.json").read_text())
    model, tokenizer = trained
    assert type(model).__name__ == "LlamaForCausalLM" and type(model).__module__.startswith("transformers.")
    assert sum(parameter.numel() for parameter in model.parameters()) == made["parameters"] < 1.2e6
    assert (team.TEAM / "model.safetensors").stat().st_size < 5e6
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert "--seed" in made["command"] and made["log"][-1]["seconds"] <= 900


def test_chapter_6_runs_it_like_any_other_model(tmp_path):
    """The command line, on the folder."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{problem}")
    command = [sys.executable, str(ROOT / "06_generate.py"), team.Puzzle(random.Random(5)).text, "--model", str(team.TEAM)]
    run = subprocess.run([*command, "--prompt", str(prompt), "--greedy", "--check-every", "0"], capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0 and "[OK]" in run.stdout and "a worker wrote it" in run.stdout, run.stderr


# ---------------------------------------------------------------------------------------------------------- the training

def test_training_learns_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """One process, 12 small steps; stopped in the seventh and continued, the weights are those of an undisturbed training."""
    for name, value in (("PROCESSES", 1), ("TOKENS", 400), ("KEEP_EVERY", 4), ("WARM_UP", 4)):
        monkeypatch.setattr(team, name, value)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    team.learn(0, tmp_path / "whole", 0, 12)
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
        team.learn(0, tmp_path / "stopped", 0, 12)
    monkeypatch.setattr(team, "lesson", lesson)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    team.learn(0, tmp_path / "stopped", 0, 12)
    whole, stopped = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not (tmp_path / "stopped" / "checkpoint.pt").exists()
    team.generate.shared_cache.load_model(str(tmp_path / "stopped"))


@pytest.mark.parametrize("arguments, words", [
    (["--problems", "0"], "at least 1"), (["--steps", "-1", "--train", "x"], "at least 1"),
    (["--problems", "x"], "invalid int"), (["--model", "nowhere"], "trained model"),
    (["--out", "nowhere/results.jsonl"], "cannot be written"), (["--train", str(team.TEAM)], "already"),
    (["--png", "curves.svg"], "end in .png"), (["--out", __file__], "no file of results"),
    (["--nonsense"], "unrecognized"),
])
def test_wrong_input_is_refused_in_one_sentence(arguments, words, capsys):
    """Exit code 2, one line, no traceback."""
    try:
        code = team.main(arguments)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and "Traceback" not in error and error.count("\n") == 1


def test_results_are_kept_and_belong_to_their_weights(tmp_path, capsys):
    """A second run solves what is missing only; a line that was cut short is solved again; other weights, other results."""
    out = tmp_path / "results.jsonl"
    other = dict.fromkeys(team.RESULT) | {"weights": "another model", "problem": 0, "method": "1 worker"}
    out.write_text(json.dumps(other) + "\n")
    team.main(["--problems", "1", "--out", str(out), "--png", str(tmp_path / "curves.png")])
    text = capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(team.METHODS) and (tmp_path / "curves.png").stat().st_size > 10_000
    assert all(re.search(rf"^  {re.escape(method)} .*%.*%", text, re.M) for method in team.METHODS)
    out.write_text("\n".join(lines[:-1] + [lines[-1][:20]]))
    team.main(["--problems", "1", "--out", str(out)])
    again = out.read_text().splitlines()
    assert len(again) == len(lines) and again[:-1] == lines[:-1]
    assert json.loads(again[-1])["passes"] == json.loads(lines[-1])["passes"]


def test_a_training_is_not_continued_with_other_settings(tmp_path, capsys):
    """Seed and number of steps decide what is drawn and how fast it is learned; a checkpoint belongs to them."""
    torch.save({"of": (0, 12)}, tmp_path / "checkpoint.pt")
    assert team.main(["--train", str(tmp_path), "--seed", "1", "--steps", "12"]) == 2
    assert "--seed 0 --steps 12" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("something else")
    assert team.main(["--train", str(tmp_path)]) == 2 and "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a note without an end", "a note\n", '{"format": "hogwild-eval-1"}\n', "[" * 10**5])
def test_files_of_others_are_left_alone(tmp_path, capsys, text):
    """--out does not touch what is no file of results."""
    (tmp_path / "notes").write_text(text)
    assert team.main(["--problems", "1", "--out", str(tmp_path / "notes")]) == 2
    assert "no file of results" in capsys.readouterr().err and (tmp_path / "notes").read_text() == text
