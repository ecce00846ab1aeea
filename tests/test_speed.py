"""The speed command prints the paper's two tables and writes them down; what cannot be is refused."""
import json
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import tiny, tokenizer

speed = import_module("speed")
SMALL = ["--shape", "tiny", "--dtype", "float32", "--workers", "1", "3", "--repeats", "3", "--device",
         "cpu", "--tokens", "300", "600"]


def test_the_tables_as_a_command(tmp_path):
    """Passes, attention and the obvious engine: one file with all figures, and each is what it says."""
    command = [sys.executable, str(ROOT / "tests" / "speed.py"), "1", "2", *SMALL, "--naive"]
    done = subprocess.run([*command, "--json", "out.json"], capture_output=True, text=True, check=False,
                          cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    about, *rows = json.loads((tmp_path / "out.json").read_text())
    assert about["torch"] == torch.__version__
    passes = [row for row in rows if "of_stock" in row]
    assert [(row["tokens"], row["workers"]) for row in passes] == [
        (tokens, workers) for tokens in (300, 600) for workers in ("stock", 1, 3)]
    for i, row in enumerate(passes):
        workers = 1 if row["workers"] == "stock" else row["workers"]
        assert row["ms"] > 0 and row["of_stock"] == pytest.approx(row["ms"] / passes[i // 3 * 3]["ms"])
        assert row["tokens_per_s"] == pytest.approx(1e3 * workers / row["ms"]) and 0 < row["share"] < 1
        # It takes tokens / workers passes, none of them faster or slower than those measured so far.
        measured = [one["ms"] for one in passes[i % 3:i + 1:3]]
        ms = 1e3 * row["s_to_generate"] * workers / row["tokens"]
        assert min(measured) - 1e-9 <= ms <= max(measured) + 1e-9
    naive, = (row for row in rows if "times_ours" in row)
    assert naive["times_ours"] > 0
    attention = [row for row in rows if "SDPA_of_1" in row]
    assert [(row["tokens"], row["workers"]) for row in attention] == [
        (tokens, workers) for tokens in (300, 600) for workers in (1, 3)]
    assert {row["fused"] for row in passes} == {"-"} == {row["predicted"] for row in attention}
    for i, row in enumerate(attention):
        assert row["of_first"] == pytest.approx(row["ours"] / attention[i // 2 * 2]["ours"])
        assert row["share"] > 0 and row["ours"] > 0 and row["all_keys_rotated"] > 0
        assert row["set_up"] < 5000  # microseconds
    for line in (f"{row['ms']:,.4g}" for row in passes):
        assert line in done.stdout


@pytest.mark.parametrize("card, heads, known", [
    ("NVIDIA H100 80GB HBM3", (40, 8, 128), True), ("NVIDIA H200", (40, 8, 128), True),
    ("NVIDIA H200", (32, 8, 128), False), ("NVIDIA GH200 480GB", (40, 8, 128), False),
    ("NVIDIA H100 PCIe", (40, 8, 128), False), ("NVIDIA H100 NVL", (40, 8, 128), False)])
def test_a_prediction_is_of_one_card(card, heads, known, monkeypatch):
    """Others of its generation have other memory."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    options = SimpleNamespace(gpu=True, device="cuda")
    assert bool(speed.predicted(options, heads, torch.bfloat16)) == known
    assert not speed.predicted(options, heads, torch.float32)


def test_attention_is_measured_before_others_are_captured(monkeypatch):
    """A capture of the stock model that fails may spoil those that come after it."""
    order = []
    for name in ("passes", "layer_attention"):
        monkeypatch.setattr(speed, name, lambda model, *_, name=name: order.append((name, model)))
    monkeypatch.setattr(speed, "make_model", lambda options, dtype: dtype)
    speed.main(["1", "2", "--shape", "tiny", "--device", "cpu"])
    assert order == [("passes", "float32"), ("layer_attention", "bfloat16"), ("passes", "bfloat16")]


def test_what_is_timed_as_a_graph_is_one():
    """Passes that fall back to single launches are not timed in its stead."""
    def step():
        calls.append(1)
    calls, step.forward = [], SimpleNamespace(captured={(3, 2): "a graph", (1, 1): None})
    assert speed.as_graphs([step], 4)[0] >= 0 and len(calls) == 7
    step.forward.captured[3, 2] = None
    with pytest.raises(ValueError, match="cannot be captured"):
        speed.as_graphs([step], 4)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_contestants_compute_the_same(workers):
    """All ways to attend give the same output, for as many tokens as were asked for."""
    ways = speed.example(300, workers, (4, 2, 16), torch.float32, "cpu")
    outputs = {name: function(*tensors) for name, (function, *tensors) in ways.items()}
    ours = outputs["ours"].transpose(0, 1)  # [W, Hq, D]
    assert torch.allclose(outputs["all_keys_rotated"][:, :, 0], ours, atol=1e-5)
    assert ours.abs().max() > 0.1
    assert torch.equal(outputs["SDPA_of_1"][0], outputs["SDPA_own_copies"][0])
    assert outputs["SDPA_own_copies"].shape == (workers, 4, 1, 16)
    assert ways["SDPA_own_copies"][2].shape == (workers, 2, 300, 16)
    cache, views = speed.team(300, workers)
    assert [sum(block.length for block in view) for view in views] == [300] * workers


@pytest.mark.parametrize("wrong, word", [
    (["4"], "choose"), (["--workers", "0"], "workers"), (["--shape", "gpt"], "choose"),
    (["--device", "cuda:77"], "not available"), (["--shape", "tiny", "--model", "x"], "no --shape"),
    (["2", "--shape", "tiny", "--tokens", "50"], "at least"), (["--dtype", "int3"], "a dtype is"),
    (["--json", "no/folder.json"], "be written"), (["--json", "notes.txt"], "something else")])
def test_wrong_wishes_are_refused_in_one_sentence(wrong, word, monkeypatch, capsys, tmp_path):
    """One sentence, exit code 2, and a file of somebody else stays what it is."""
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["speed.py", *wrong])
    try:
        code = speed.command.one_sentence(speed.main)
    except SystemExit as refusal:
        code = refusal.code
    said = capsys.readouterr().err
    assert code == 2 and word in said and said.count("\n") == 1, said
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_problems_per_second(tmp_path, monkeypatch, capsys):
    """The table of tests/speed_batch.py: everybody has written as many tokens as it should, in float32
    the same ones as the stock model's batched `generate`; ratios are those of the times."""
    batch, model, words = import_module("speed_batch"), tiny("llama"), tokenizer()
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    questions = [f"How much is {n} + 4?" + " Think." * (n % 3) for n in range(16)]
    monkeypatch.setattr(batch.tasks, "load", lambda _: [{"question": one} for one in questions])
    path = tmp_path / "out.json"
    assert batch.main(["--rounds", "2", "--passes", "12", "--model", str(tmp_path / "model"), "--json",
                       str(path)]) == 0
    about, *rows = json.loads(path.read_text())
    assert about["passes"] == 12 and [(row["at_once"], row["tokens"]) for row in rows] == [
        (1, 24), (8, 192), (16, 384), (16, 192), (16, 192)]
    assert f"{rows[1]['ratio']:.4g}" in capsys.readouterr().out
    for row, other in zip(rows, [0, 0, 0, 4, 4]):
        pace = rows[other]["problems_per_minute"]
        assert row["ratio"] == pytest.approx(row["problems_per_minute"] / pace)
    all_of_them = batch.contestants(model, words)
    ours, theirs = (all_of_them[name][1](questions, 12) for name in ("baseline, 16", "generate, 16"))
    assert ours == theirs and [len(ids) for ids, in ours] == [12] * 16 and len({*map(str, ours)}) > 9


@pytest.mark.parametrize("wrong, word", [
    (["--rounds", "0"], "at least 1"), (["--json", "x/y"], "folder"),
    (["--model", "nowhere"], "nowhere")])
def test_wrong_wishes_for_that_table(wrong, word, monkeypatch, capsys):
    """One sentence, exit code 2."""
    batch = import_module("speed_batch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert batch.command.one_sentence(lambda: batch.main(wrong)) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1, said
