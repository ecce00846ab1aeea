"""The training of the collaborator: what its lessons are made of, that it learns, goes on where it was
stopped, and averages over processes; and its command line."""
import json
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import tiny
from safetensors.torch import load_file

from appendix import (
    adapters,
    command,
    compare_teams,
    ideal_team,
    journal,
    models,
    puzzles,
    recording,
)
from appendix import learn_to_collaborate as learn


@pytest.fixture
def small(smollm, monkeypatch):
    """A tiny model learns, in small steps."""
    monkeypatch.setattr(models, "load", lambda *_, **__: (tiny("llama"), smollm[1]))
    for name, value in (("TOKENS", 300), ("KEEP_EVERY", 4), ("WARM_UP", 2), ("RATE", 5e-2)):
        monkeypatch.setattr(learn, name, value)


def test_lessons_grow_and_contain_what_is_to_be_learned(smollm, monkeypatch):
    """All kinds, sizes of teams and layouts, mistakes, shares; problems for training alone."""
    seen, tied = [], []
    monkeypatch.setattr(learn, "TOKENS", 1)

    def play(model, tokenizer, puzzle, **how):
        seen.append((puzzle, how))
        weight = torch.full((1,), float(ideal_team.TIE if len(seen) % 3 else 1))
        return None, recording.Recording(torch.zeros(1), None, weight, None, None, None, 0)
    monkeypatch.setattr(ideal_team, "play", play)
    for progress in (0.0, 1.0):
        for number in range(400):
            begun = len(seen)
            taken, = learn.lesson(*smollm, random.Random(number), progress)
            tied.append(len(seen) - begun)
            assert tied[-1] == 1 or learn.ties(taken) == 1
        if progress == 0:
            early, seen = seen, []
    late = seen
    assert max(len(puzzle.parts) for puzzle, _ in early) <= 4
    assert {puzzle.kind for puzzle, _ in late} == {*puzzles.KINDS}
    assert {len(puzzle.parts) for puzzle, _ in late} >= {*range(1, 17)}
    assert {(how["layout"], how["workers"]) for _, how in late} == {
        *(("combined", workers) for workers in (1, 2, 3, 4)), ("interleaved", 2), ("interleaved", 4),
        ("independent", 1)}
    assert 20 < sum("loop" in how for _, how in late) < 60 and 20 < tied.count(learn.TIES) < 200
    assert {how["layout"] for _, how in late if "slips" in how} == {"combined"}
    assert sum("mistake" in how for _, how in late) > 10 and any(how.get("order") for _, how in late)
    assert any([*puzzle.parts][0] != "A" for puzzle, _ in late)
    words = {word for puzzle, _ in early + late for word in re.findall(r"[A-Za-z]+", puzzle.text)}
    assert not words & {*puzzles.PEOPLE["test"], *puzzles.THINGS["test"]}


def test_training_learns_and_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    """Twelve small steps, by which the loss falls by more than 1; stopped in the seventh and continued,
    it ends as an undisturbed run does."""
    losses, loss_of = [], recording.loss
    monkeypatch.setattr(recording, "loss", lambda *what, **how: (losses.append(loss_of(*what, **how)),
                                                                losses[-1])[1])
    learn.train(tmp_path / "whole", 0, 12)
    said = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert said == [round(float(loss), 4) for loss in losses[3::4]] and len(losses) == 12
    assert losses[-1] < losses[0] - 1  # (the first one is that of a model that has learned nothing)
    lesson, calls = learn.lesson, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise RuntimeError("somebody needs the machine")
        return lesson(*arguments)
    monkeypatch.setattr(learn, "lesson", stop)
    with pytest.raises(RuntimeError, match="somebody"):
        learn.train(tmp_path / "stopped", 0, 12)
    monkeypatch.setattr(learn, "lesson", lesson)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    learn.train(tmp_path / "stopped", 0, 12)
    folders = [tmp_path / name for name in ("whole", "stopped")]
    whole, stopped = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert {weight.dtype for weight in whole.values()} == {torch.bfloat16}
    logs = [(folder / "log.jsonl").read_text() for folder in folders]
    assert logs[0] == logs[1] and logs[0].count("\n") == 4
    made = {path.name for path in folders[1].iterdir()}
    assert made == {"adapter_config.json", "adapter_model.safetensors", "hogwild.json", "log.jsonl"}
    said = adapters.notes(str(folders[1]))
    assert said["settings"]["prompt"] == "{problem}" and said["training"]["steps"] == 12
    assert adapters.base_of(folders[1]) == models.BUNDLED
    for kind in puzzles.KINDS:
        assert adapters.remark(str(folders[1]), puzzles.Puzzle(random.Random(0), kind).text) is None
    with pytest.raises(ValueError, match="trained weights already"):
        learn.train(tmp_path / "whole", 0, 12)


SCRIPT = f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from pathlib import Path
from helpers import tiny, tokenizer
from appendix import models, learn_to_collaborate as learn
models.load = lambda: (tiny("llama"), tokenizer())
torch.Tensor.bfloat16 = lambda weight: weight
learn.TOKENS = 300
learn.train(Path(sys.argv[1]), 0, 2)
"""


def test_a_training_begins_with_an_adapter(small, tmp_path, monkeypatch, capsys):
    """With its weights and at full size; the notes say what came before. No adapter: one sentence."""
    learn.train(tmp_path / "first", 0, 4)
    monkeypatch.setattr(learn, "RATE", 1e-6)
    learn.train(tmp_path / "second", 1, 1, str(tmp_path / "first"))
    learn.train(tmp_path / "fresh", 1, 1)
    folders = [tmp_path / name for name in ("first", "second", "fresh")]
    first, second, fresh = (torch.cat([weight.float().flatten() for _, weight in sorted(load_file(
        folder / "adapter_model.safetensors").items())]) for folder in folders)
    assert torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, fresh, atol=1e-2)
    told = adapters.notes(str(tmp_path / "second"))["training"]
    assert told == {"seed": 1, "steps": 1, "processes": 1,
                    "start": {"seed": 0, "steps": 4, "processes": 1}}
    assert call("--train", tmp_path / "other", "--adapter", tmp_path / "nowhere") == 2
    assert "no folder of an adapter" in capsys.readouterr().err


def test_it_ends_half_way_between_two_adapters(small, tmp_path, monkeypatch):
    """The one that it began with, and the one that it became; also if it was stopped in between."""
    learn.train(tmp_path / "first", 0, 4)
    keep, lesson, became, calls = learn.keep, learn.lesson, {}, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("somebody needs the machine")
        return lesson(*arguments)

    def spy(adapted, *others):
        became.update((name, weight.detach().clone()) for name, weight in adapted.named_parameters()
                      if weight.requires_grad)
        keep(adapted, *others)
    monkeypatch.setattr(learn, "keep", spy)
    monkeypatch.setattr(learn, "lesson", stop)
    monkeypatch.setattr(learn, "KEEP_EVERY", 3)
    with pytest.raises(RuntimeError, match="somebody"):
        learn.train(tmp_path / "second", 1, 4, str(tmp_path / "first"))
    learn.train(tmp_path / "second", 1, 4, str(tmp_path / "first"))
    assert len(calls) == 5
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors")
                     for name in ("first", "second"))
    moved = 0
    for name, weight in became.items():
        name = name.replace(".default", "")
        wanted = (first[name].float() + weight) / 2
        assert torch.allclose(second[name].float(), wanted, rtol=0.01, atol=1e-5)
        moved += (wanted - weight).abs().max() > 0.01
    assert moved > len(became) / 2 and len(became) == len(second)


def test_two_processes_average_their_gradients(small, tmp_path, monkeypatch):
    """Under torchrun, each draws lessons of its own; the weights are those of one with both losses."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(tmp_path / "script.py"), str(tmp_path / "two")], check=True,
                   capture_output=True, timeout=300)
    assert '"processes": 2' in (tmp_path / "two" / "log.jsonl").read_text()
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda weight: weight)  # (what is saved is exact)
    monkeypatch.setattr(learn, "WARM_UP", 25)
    monkeypatch.setattr(learn, "RATE", 2e-3)
    learn.train(tmp_path / "one", 0, 2)
    lesson, loss = learn.lesson, recording.loss

    def lessons(model, tokenizer, chance, progress):
        chances = [random.Random(f"0 {round(2 * progress)} {rank}") for rank in (0, 1)]
        return [lesson(model, tokenizer, chance, progress) for chance in chances]
    monkeypatch.setattr(learn, "lesson", lessons)
    monkeypatch.setattr(recording, "loss", lambda model, ropes, both, **options: sum(
        loss(model, ropes, one, **options) for one in both) / 2)
    learn.train(tmp_path / "both", 0, 2)
    one, two, both = (torch.cat([weight.float().flatten() for _, weight in sorted(load_file(
        tmp_path / folder / "adapter_model.safetensors").items())]) for folder in ("one", "two", "both"))
    assert (two - both).abs().mean() < 1e-7 and (one - both).abs().mean() > 1e-5


def test_a_training_is_not_continued_with_other_settings(small, tmp_path, capsys):
    """Seed and number of steps decide what is drawn and how fast it is learned; a folder has its own."""
    about = {"format": "hogwild-training-2", "seed": 0, "steps": 12, "processes": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(about) + '\n{"step": 4, "loss": 1.5}\n')
    assert call("--train", tmp_path, "--seed", 1, "--steps", 12) == 2
    assert "holds work with seed 0" in capsys.readouterr().err
    assert call("--train", tmp_path, "--steps", 13) == 2 and "steps 12" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("something else")
    assert call("--train", tmp_path, "--steps", 12) == 2 and "no checkpoint" in capsys.readouterr().err
    del about["format"]
    with journal.Journal(str(tmp_path / "log.jsonl"), "training", about, {"step": int}):
        assert call("--train", tmp_path, "--steps", 12) == 2
    assert "another process" in capsys.readouterr().err


def test_a_checkpoint_executes_nothing(small, tmp_path, capsys):
    """A checkpoint from elsewhere is weights, or refused: what it would have run does not run."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    torch.save([1, Trap(), Trap()], tmp_path / "checkpoint.pt")
    assert call("--train", tmp_path) == 2 and "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_what_the_training_looks_at(smollm):
    """A recording's weights count in the loss as they say: what weighs nothing changes nothing."""
    chance = random.Random(3)
    puzzle = puzzles.Puzzle(chance, "list", 3, "train")
    model, mistake = tiny("llama"), puzzle.mistake(chance)
    ropes = learn.query_rotation.attach(model)
    _, recorded = ideal_team.play(model, smollm[1], puzzle, "combined", 2, mistake=mistake)
    with torch.no_grad():
        logits, _ = recording.encode(model, ropes, [recorded])
        loss = recording.loss(model, ropes, [recorded])
    kept = recorded.sampled != recording.IGNORE
    weight, sampled = recorded.weight[kept], recorded.sampled[kept]
    assert {*weight.tolist()} == {0.0, 1.0, 3.0, 6.0, 8.0}
    picked = logits.log_softmax(-1)[torch.arange(len(sampled)), sampled]
    assert torch.allclose(loss, -(picked * weight).sum() / weight.sum(), atol=1e-5)


def test_the_shipped_adapter_shares_the_work():
    """On the list of `make demo`, which it has not seen: two begin each part once, in six tenths of the
    passes of one, and get all of it right, as one does; what they write stands in the README. (On other
    lists two may fail: see there.)"""
    readme = (ROOT / "README.md").read_text()
    model, tokenizer = models.load(adapters.COLLABORATOR)
    puzzle, passes = puzzles.fresh("list", puzzles.NUMBER), []
    for workers in (1, 2):
        run = ideal_team.start(compare_teams.generate.Hogwild, model, tokenizer, puzzle, "combined",
                               workers)
        while run.ending is None:
            run.advance()
        row = compare_teams.judged(puzzle, [run], {})
        assert row["again"] == row["never"] == 0 and row["score"] == 1, row
        passes.append(len(run.passes))
        steps = [closed["text"].strip() for record in run.passes for closed in record["closed"]]
    assert len(steps) >= 7 and "\n    ".join(steps) in readme
    assert f"2 workers: {passes[1]} passes instead of {passes[0]}," in readme
    assert passes[1] <= 0.6 * passes[0], passes
    assert adapters.settings(adapters.COLLABORATOR) == learn.KNOWS["settings"]


def call(*arguments):
    """Exit code of the command line."""
    try:
        return command.one_sentence(lambda: learn.main([*map(str, arguments)]))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], "at least 1"), (["--steps", "-1", "--train", "x"], "at least 1"),
    (["--seed", "-1", "--train", "x"], "at least 0"), (["--train", "x", "--seed", str(2**63)], "2^31"),
    (["--steps", "x"], "invalid int"), (["--nonsense"], "unrecognized"), (["--train", ""], "empty"),
    (["--train", __file__], "exists"),
])
def test_wrong_input_is_refused_in_one_sentence(small, arguments, words, capsys):
    """Exit code 2, one line, no traceback."""
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1, error
