"""Chapter 7 in two processes, killed again and again; models sharded, or placed by accelerate."""
import copy
import multiprocessing
import os
import random
import socket
import sys
import time
from importlib import import_module

import pytest
import torch
from accelerate import PartialState, dispatch_model
from helpers import tiny, tokenizer
from test_07_command_line import call, lines_of

from appendix import command, models, products, results

KILLS = int(os.environ.get("HOGWILD_KILLS", "6"))
evaluation, generate = import_module("07_eval_limo"), import_module("06_generate")
shared_cache, layouts = import_module("02_shared_cache"), import_module("03_layouts")
query_rotation = import_module("04_query_rotation")


@pytest.fixture(autouse=True)
def nobody_has_asked_accelerate(monkeypatch):
    """What other tests have told accelerate of processes is not known to those that are forked here."""
    monkeypatch.setattr(PartialState, "_shared_state", {})


def one_of_two(rank, port, main, arguments):
    """What torchrun starts: a chapter's command line in one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    sys.exit(command.one_sentence(lambda: main(arguments)))


def start(main, arguments):
    """Start two processes (gloo), as torchrun does. (They are forked, to be quick.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    team = [fork.Process(target=one_of_two, args=(rank, port, main, arguments)) for rank in range(2)]
    for process in team:
        process.start()
    return team


def ended(team, seconds=100):
    """Exit codes; whoever is still waiting for the other one then is killed."""
    end = time.monotonic() + seconds
    for process in team:
        process.join(max(0, end - time.monotonic()))
        process.kill()
    return [process.exitcode for process in team if not process.join()]


def rows_in(path):
    """How many results are in the files of an evaluation."""
    return sum(open(file, "rb").read().count(b"\n") - 1 for file in results.files_of(str(path)))


@pytest.mark.parametrize("greedy, kills", [(True, KILLS // 3), (False, KILLS - KILLS // 3)])
def test_two_processes_killed_again_and_again(tmp_path, monkeypatch, capfd, greedy, kills):
    """Two processes, eight runs at a time in each, all killed (SIGKILL) at random moments, also before
    anything is written, and started again with the same command: every result is there once in the end,
    and is that of one process that nobody disturbed.

    HOGWILD_KILLS=30 python -m pytest tests/test_processes.py: 30 times, 10 of them greedy.
    """
    toy = tiny("llama"), tokenizer()
    monkeypatch.setattr(models, "load", lambda *_, **__: toy)
    # Both go by the clock: which product is fast, and when math-verify gives up.
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    monkeypatch.setattr(evaluation.tasks, "mark", lambda answer, _: (0.0, bool(answer)))
    arguments = ["--model", models.BUNDLED, "--task", "own", "--methods", "baseline", "hogwild:2",
                 "hogwild:3", "vote:1" if greedy else "vote:2", "--limit", "6", "--budgets", "3", "9",
                 "--answer-tokens", "2", "--batch", "8", "--device", "cpu", *["--greedy"] * greedy,
                 "--out"]
    assert call([*arguments, str(tmp_path / "calm.jsonl")]) == 0
    path, chance, killed, written = tmp_path / "killed.jsonl", random.Random(kills), 0, []
    for _ in range(kills):
        team, before = start(evaluation.main, [*arguments, str(path)]), rows_in(path)
        more = chance.randint(0, max(1, 24 // kills))
        while all(p.is_alive() for p in team) and rows_in(path) < before + more:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3 if more else 2))
        killed += any(p.is_alive() for p in team)
        for process in team:
            process.kill()
        for process in team:
            process.join()
        written.append(rows_in(path))
    assert killed > kills // 2 or written[-1] == 24, (killed, written)
    team = start(evaluation.main, [*arguments, str(path)])
    assert ended(team) == [0, 0] and "[OK] 24 runs" in capfd.readouterr().out
    files = results.files_of(str(path))
    rows = sorted([row for file in files for row in lines_of(tmp_path / file)], key=results.key_of)
    assert len(files) == 2 and all(len(lines_of(tmp_path / file)) > 1 for file in files)
    assert rows == lines_of(tmp_path / "calm.jsonl") and len(rows) == 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model."""
    path = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


CHAPTERS = {"6": (generate.main, ["2 + 3?", "--plain", "--workers", "2", "--max-passes", "12"]),
            "7": (evaluation.main, ["--task", "own", "--limit", "1", "--budgets", "12", "--methods",
                                    "hogwild:2", "--answer-tokens", "2", "--batch", "1"])}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_model_on_several_devices(folder, tmp_path, monkeypatch, capfd, chapter):
    """Chapters 6 and 7: with --tensor-parallel, each of two processes keeps one of two key heads; they
    write what one process writes, and the first one speaks. --device-map auto: one device is here."""
    main, arguments = CHAPTERS[chapter]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    take = generate.Hogwild.take

    def noted(run, tokens):
        with open(os.environ.get("RANK", "alone"), "a") as file:
            file.write(f"{run.cache.keys[0].shape[0]} heads: {tokens}\n")
        return take(run, tokens)
    monkeypatch.setattr(generate.Hogwild, "take", noted)
    arguments = [*arguments, "--model", folder, "--greedy", "--dtype", "float32"]
    assert command.one_sentence(lambda: main([*arguments, "--device", "cpu"])) == 0
    alone = (tmp_path / "alone").read_text()
    assert "[OK]" in capfd.readouterr().out and alone.count("2 heads: [") == 12
    for path in tmp_path.iterdir():
        path.unlink()
    assert command.one_sentence(lambda: main([*arguments, "--device-map", "auto"])) == 0
    assert (tmp_path / "alone").read_text() == alone
    for path in tmp_path.iterdir():
        path.unlink()
    team = start(main, [*arguments, "--device", "cpu", "--tensor-parallel"])
    assert ended(team) == [0, 0]
    assert capfd.readouterr().out.count("[OK]") == 2  # (the first one was with --device-map)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [alone.replace("2 heads", "1 heads")] * 2


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("wrong, word", [
    (["--device", "cpu"], "leave out"), (["--attention", "triton"], "leave out"),
    (["--model", "collaborator"], "is an adapter")])
def test_what_device_map_cannot_be_combined_with(chapter, wrong, word, tmp_path, monkeypatch, capfd):
    """One sentence, exit code 2."""
    main, arguments = CHAPTERS[chapter]
    monkeypatch.chdir(tmp_path)
    assert command.one_sentence(lambda: main([*arguments, "--device-map", "auto", *wrong])) == 2
    said = capfd.readouterr().err
    assert word in said and said.count("\n") == 1, said


def test_layers_that_accelerate_has_placed(tmp_path):
    """With accelerate's hooks, one layer's weights on disk until it is needed: the same logits, the same
    keys. No tensor goes to the model that a hook could move away from what it belongs to."""
    stock, ids = tiny("llama"), list(range(60))
    ropes = query_rotation.attach(stock)

    def passed(model):
        cache = shared_cache.SharedCache(ropes)
        one, two = cache.block(40), cache.block(20)
        cache.reserve([(one, 40), (two, 20)])
        tables = layouts.fill_tables([([one], 40), ([one, two], 20)])
        return query_rotation.forward(model, cache, [tables], ids, [39, 59]), cache
    logits, cache = passed(stock)
    model, given = copy.deepcopy(stock), []
    places = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.norm",
              "lm_head"]
    dispatch_model(model, {**dict.fromkeys(places, "cpu"), "model.layers.1": "disk"},
                   offload_dir=str(tmp_path))
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"  # (it is not in memory now)
    model.model.register_forward_pre_hook(lambda *what: given.append(what[2]), with_kwargs=True)
    model.register_forward_pre_hook(lambda *what: given.append(what[2]), with_kwargs=True)
    placed, other = passed(model)
    assert torch.equal(placed, logits) and given[0]["logits_to_keep"] == [39, 59]
    assert given[1]["hogwild"][0] is given[1]["past_key_values"] is other
    for layer, keys in cache.keys.items():
        assert torch.equal(keys, other.keys[layer])
