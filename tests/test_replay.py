"""The replay appendix: one pass against the live run and the stock model, gradients, memory, and runs that are restored."""
import copy
import json
import signal
import sys
from functools import lru_cache, partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_06_generate import MODELS, PROBLEM, SHORT, TINY, run_and_record, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

sys.path.append(str(ROOT / "appendix"))
generate = import_module("06_generate")
query_rotation = import_module("04_query_rotation")
shared_cache = import_module("02_shared_cache")
replay = import_module("replay")
KINDS = [*MODELS, "gemma3"]
SMALL = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)


@lru_cache
def tokenizer():
    """The bundled model's, without the model."""
    path = shared_cache.bundled_gguf()
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@lru_cache
def random_model(kind):
    """One random model of each kind; gemma3 has a sliding window of 32 tokens in two of its three layers."""
    if kind != "gemma3":
        return tiny(kind)
    torch.manual_seed(0)
    layers = ["sliding_attention"] * 2 + ["full_attention"]
    config = Gemma3TextConfig(**TINY, head_dim=16, sliding_window=32, layer_types=layers)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def often(monkeypatch, every):
    """Let steps end by the length of their text, so that they end at different times and often."""
    natural = generate.step_ended
    monkeypatch.setattr(generate, "step_ended", lambda text: natural(text) or len(text) % every == 0)
    monkeypatch.setattr(generate, "find_boxed", lambda text: None)


def settings_for(layout, workers, seed=0, **others):
    """A short prompt, checks inserted every now and then, sampling."""
    return generate.Settings(workers=generate.NAMES[:workers], layout=layout, seed=seed, max_passes=200, check_every=30,
                             prompt=SHORT, **others)


@st.composite
def runs(draw):
    """A run: kind of model, layout, workers, seed, passes, how often steps end."""
    return (draw(st.sampled_from(KINDS)), draw(st.sampled_from([*generate.layouts.LAYOUTS])), draw(st.integers(1, 4)),
            draw(st.integers(0, 1000)), draw(st.integers(0, 30)), draw(st.integers(5, 40)))


@settings(deadline=None, max_examples=50)
@given(runs(), st.integers(1, 200), st.booleans())
def test_one_pass_gives_the_logits_of_all(run_of, size, frugal):
    """Any layout, 1-4 workers, steps that end, checks, ragged passes, windows: float32 within 1e-4 of the live logits.

    Both ways round differently (one row in a product, or hundreds); logits are around 3, for Gemma 0.5.
    """
    kind, layout, workers, seed, passes, every = run_of
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        run, _, live = run_and_record(random_model(kind), tokenizer(), settings_for(layout, workers, seed), passes)
    recording = replay.recording_of(run)
    with torch.no_grad():
        again, _ = replay.encode(run.model, run.cache.ropes, [recording], size, frugal)
    live = torch.cat(live) if live else torch.zeros(0, again.shape[1])
    assert again.shape == live.shape == (passes * workers, TINY["vocab_size"])
    assert (again - live).abs().max().item() < 1e-4 if passes else True
    assert not passes or live.std() > 0.05  # of zeros, all that would be true
    steps = sum(len(record["closed"]) for record in run.passes) if run.layout.moves else 0
    assert len(recording.tables.start) == len(run.layout.blocks) + steps


@pytest.mark.parametrize("layout, workers", [("combined", 1), ("combined", 2), ("combined", 4), ("contiguous", 3),
                                             ("interleaved", 2), ("independent", 2)])
def test_the_real_model_replayed(smollm, monkeypatch, layout, workers):
    """SmolLM2, 24 passes with steps that end: within 2e-4 of the live logits, which reach 30 over 30 layers."""
    often(monkeypatch, 13)
    run, _, live = run_and_record(*smollm, settings_for(layout, workers), 24)
    with torch.no_grad():
        again, _ = replay.encode(run.model, run.cache.ropes, [replay.recording_of(run)])
    live = torch.cat(live)
    assert live.abs().max() > 10 and (again - live).abs().max().item() < 2e-4
    assert not run.layout.moves or sum(len(record["closed"]) for record in run.passes) > workers


def test_several_runs_in_one_row_do_not_see_each_other():
    """A batch of runs of different layouts and lengths gives what each of them gives alone."""
    model = random_model("yarn")
    ropes = query_rotation.attach(model)
    batch = [replay.rehearse("combined", [[5, 8], [9], [7, 4]], 20), replay.rehearse("interleaved", [[6], [8, 5]], 11),
             replay.rehearse("independent", [[200]], 30), replay.rehearse("contiguous", [[4], [6]], 1)]
    for recording in batch:
        recording.ids = torch.randint(0, 1000, recording.ids.shape)
    with torch.no_grad():
        together, _ = replay.encode(model, ropes, batch, 16)
        alone = torch.cat([replay.encode(model, ropes, [recording])[0] for recording in batch])
    assert torch.allclose(together, alone, atol=1e-5) and together.std() > 0.05


def test_the_picture_is_the_mask():
    """One worker without headers sees a triangle, distances counted from the token back; others as worked out by hand."""
    parts = replay.unfold(replay.rehearse("independent", [[50]], 4, prompt=3))
    distance = torch.cat(parts, 1)
    n = len(distance)
    assert torch.equal(distance, (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=-1)) and n == 3 + 3 + 3
    # Two workers, history and own step only, steps of two tokens fed at once: Alice's and Bob's first, then their second
    parts = replay.unfold(replay.rehearse("interleaved", [[2], [2]], 2, opening=2, prompt=1))
    assert [part.shape[1] for part in parts] == [1, 2, 2, 2, 2, 0, 0]
    assert torch.cat(parts, 1)[:, :9].tolist() == [
        [0, -1, -1, -1, -1, -1, -1, -1, -1],
        [1, 0, -1, -1, -1, -1, -1, -1, -1], [2, 1, 0, -1, -1, -1, -1, -1, -1],  # Alice 1
        [1, -1, -1, 0, -1, -1, -1, -1, -1], [2, -1, -1, 1, 0, -1, -1, -1, -1],  # Bob 1: the same places
        [5, 4, 3, 2, 1, 0, -1, -1, -1], [6, 5, 4, 3, 2, 1, 0, -1, -1],  # Alice 2 sees both in the history
        [5, 4, 3, 2, 1, -1, -1, 0, -1], [6, 5, 4, 3, 2, -1, -1, 1, 0]]


def test_what_cannot_be_encoded_is_refused():
    """A model with its own attention back, and recordings in which nothing was sampled; an empty prompt is none of them."""
    model = copy.deepcopy(random_model("llama"))
    ropes = query_rotation.attach(model)
    with pytest.raises(ValueError, match="nothing was sampled"):
        replay.loss(model, ropes, [replay.rehearse("combined", [[5]], 0)])
    assert replay.loss(model, ropes, [replay.rehearse("contiguous", [[5], [4]], 3, prompt=0)]) > 0
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="does not attend through the shared cache"):
        replay.loss(model, ropes, [replay.rehearse("combined", [[5]], 3)])


# ------------------------------------------------------------------------------------------------------------- training

def trainable(kind="llama"):
    """A random model with gradients."""
    return copy.deepcopy(random_model(kind)).requires_grad_()


def gradients(model, value):
    """Gradients of all parameters, as one vector."""
    model.zero_grad()
    value.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_loss_and_gradient_of_one_worker_are_those_of_plain_training():
    """One worker without headers is a plain text: loss and gradients equal the stock model's on that text."""
    model = trainable()
    example = replay.rehearse("independent", [[300]], 60, prompt=20)
    example.ids = torch.randint(0, 1000, example.ids.shape)
    own = torch.arange(len(example.ids)) >= example.prefill
    example.sampled = torch.where(own, example.ids.roll(-1), replay.NOTHING)
    example.sampled[-1] = 7
    model.set_attn_implementation("sdpa")
    logits = model(example.ids[None]).logits[0]
    expected = F.cross_entropy(logits, example.sampled)
    plain = gradients(model, expected)
    value = replay.loss(model, query_rotation.attach(model), [example], size=16)
    replayed = gradients(model, value)
    assert abs(value.item() - expected.item()) < 1e-5 and value.item() > 1
    assert (replayed - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("frugal", [True, False])
def test_gradients_of_a_team_equal_those_of_the_specification(monkeypatch, frugal):
    """Three workers, steps that move: gradients through chapter 4's slow specification, over all tokens at once."""
    model = trainable("phi3")
    ropes = query_rotation.attach(model)
    example = replay.rehearse("combined", [[5, 8], [9], [7, 4]], 12)
    example.ids = torch.randint(0, 1000, example.ids.shape)
    value = replay.loss(model, ropes, [example], size=7, frugal=frugal)
    ours = gradients(model, value)
    monkeypatch.setattr(replay, "in_pieces", lambda q, k, v, pieces, rotation, scale, window=None, frugal=True:
                        query_rotation.attention_spec(q, k, v, example.tables, rotation, scale, window))
    slow = gradients(model, replay.loss(model, ropes, [example]))
    assert (ours - slow).norm() < 1e-4 * slow.norm() and slow.norm() > 0.1


def test_memory_is_in_proportion_to_tokens():
    """With as many blocks, twice the tokens keep twice the bytes for the gradient; with the scores, over three times."""
    model = AutoModelForCausalLM.from_config(SMALL)
    ropes, kept = query_rotation.attach(model), {}
    for scale in (1, 2):
        example = replay.rehearse("combined", [[400 * scale], [300 * scale]], 700 * scale)
        kept[scale] = [replay.saved_bytes(partial(replay.loss, model, ropes, [example], frugal=frugal))
                       for frugal in (True, False)]
    assert kept[2][0] < 2.2 * kept[1][0] and kept[2][1] > 3 * kept[1][1]


def test_the_trainer_of_transformers_learns_a_run(tmp_path):
    """As the docstring says: a collator that hands recordings through, and a loss. Ten steps learn a toy run by heart."""
    model = AutoModelForCausalLM.from_config(SMALL)
    ropes = query_rotation.attach(model)
    example = replay.rehearse("combined", [[5, 8], [9]], 20)
    losses = []

    class Student(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses.append(replay.loss(model, ropes, inputs["recordings"]))
            return losses[-1]

    arguments = TrainingArguments(str(tmp_path), max_steps=10, per_device_train_batch_size=2, learning_rate=0.03, report_to=[],
                                  remove_unused_columns=False, save_strategy="no", use_cpu=True, disable_tqdm=True)
    Student(model, arguments, data_collator=lambda recordings: {"recordings": recordings}, train_dataset=[example] * 20).train()
    assert losses[0].item() > 3 and losses[-1].item() < 1


# -------------------------------------------------------------------------------------------------------------- restore

def without_seconds(passes):
    """The records, without the one thing that differs from run to run."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in passes]


@settings(deadline=None, max_examples=30)
@given(runs(), st.integers(0, 20))
def test_a_restored_run_continues_as_if_nothing_had_happened(run_of, more):
    """Killed at any pass, restored from a trace that went through JSON: records, random numbers, blocks and answer agree.

    Keys to 1e-4, since the restored ones come out of one large product.
    """
    kind, layout, workers, seed, passes, every = run_of
    model = random_model(kind)
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        run = generate.Hogwild(model, tokenizer(), PROBLEM, settings_for(layout, workers, seed))
        for _ in range(passes):
            run.advance()
        trace = json.loads(json.dumps(generate.trace_of(run, "random", "interrupted", None)))
        for record in trace["passes"]:
            record["fed"] = {int(w): ids for w, ids in record["fed"].items()}
            record["sampled"] = {int(w): i for w, i in record["sampled"].items()}
        other = generate.Hogwild(model, tokenizer(), PROBLEM, generate.Settings(**trace["settings"]))
        replay.restore(other, trace["passes"])
        for mine, yours in zip(run.cache.blocks, other.cache.blocks, strict=True):
            assert mine == yours
            for layer, keys in run.cache.keys.items():
                here = slice(mine.start, mine.start + mine.length)
                for ours, theirs in ((keys, other.cache.keys[layer]), (run.cache.values[layer], other.cache.values[layer])):
                    assert torch.allclose(ours[:, here], theirs[:, here], atol=1e-4)
        for _ in range(more):
            run.advance(), other.advance()
    assert without_seconds(run.passes) == without_seconds(other.passes)
    assert run.answer() == other.answer() and run.generated == other.generated
    for mine, yours in zip(run.workers, other.workers):
        assert torch.equal(mine.generator.get_state(), yours.generator.get_state()) and mine.pending == yours.pending
    assert run.check_generator.getstate() == other.check_generator.getstate()


@pytest.mark.parametrize("damage", ["token", "settings", "advanced", "order", "other tokens"])
def test_a_trace_that_does_not_fit_is_refused(monkeypatch, damage):
    """Passes that do not follow from each other: one sentence that says so, not a run that goes on from nonsense."""
    often(monkeypatch, 9)
    model = random_model("llama")
    run = generate.Hogwild(model, tokenizer(), PROBLEM, settings_for("combined", 2))
    for _ in range(12):
        run.advance()
    passes = copy.deepcopy(run.passes)
    settings_now = settings_for("combined", 2)
    if damage == "token":
        passes[4]["fed"][1][0] += 1
    elif damage == "settings":
        settings_now = settings_for("combined", 3)
    elif damage == "order":
        passes[3], passes[9] = passes[9], passes[3]
    elif damage == "other tokens":
        passes[5]["sampled"][0] += 1
    other = generate.Hogwild(model, tokenizer(), PROBLEM, settings_now)
    if damage == "advanced":
        other.advance()
    with pytest.raises(ValueError, match="trace|advanced"):
        replay.restore(other, passes)


def test_the_command_line_resumes_what_was_killed(smollm, tmp_path, monkeypatch, capsys):
    """SmolLM2 interrupted in pass 7 of 14: --resume goes on, and the trace is that of a run that nobody disturbed."""
    often(monkeypatch, 6)
    monkeypatch.setattr(generate.shared_cache, "load_model", lambda *_: (copy.deepcopy(smollm[0]), smollm[1]))
    paths = [str(tmp_path / name) for name in ("whole.json", "killed.json")]
    arguments = [PROBLEM, "--max-passes", "14", "--seed", "3", "--check-every", "16", "--workers", "3"]
    assert generate.main([*arguments, "--save", paths[0]]) == 0
    advance = generate.Hogwild.advance

    def killed(run):
        if len(run.passes) == 7:
            signal.raise_signal(signal.SIGTERM)
        return advance(run)
    monkeypatch.setattr(generate.Hogwild, "advance", killed)
    assert generate.main([*arguments, "--save", paths[1]]) == 130
    monkeypatch.setattr(generate.Hogwild, "advance", advance)
    assert len(json.loads(open(paths[1]).read())["passes"]) == 7
    assert generate.main(["--resume", paths[1]]) == 0
    whole, resumed = (json.loads(open(path).read()) for path in paths)
    assert sum(len(record["closed"]) for record in whole["passes"]) > 2
    assert without_seconds(resumed.pop("passes")) == without_seconds(whole.pop("passes"))
    assert resumed == whole
    # a run that is over can be given more passes
    capsys.readouterr()
    assert generate.main(["--resume", paths[1], "--max-passes", "18", "--save", paths[0]]) == 0
    assert "[OK] 18 passes" in capsys.readouterr().out and len(json.loads(open(paths[1]).read())["passes"]) == 14


@pytest.mark.parametrize("arguments, words", [
    (["--layout", "contiguous"], "layout"), (["another problem"], "problem"), (["--seed", "5"], "seed"),
    (["--max-passes", "3"], "less"), (["--workers", "3"], "workers"), (["--greedy"], "greedy"),
])
def test_a_resumed_run_keeps_its_settings(tmp_path, capsys, arguments, words):
    """What cannot be changed is named, in one sentence, before a model is loaded; the trace stays as it is."""
    run = generate.Hogwild(random_model("llama"), tokenizer(), PROBLEM, settings_for("combined", 2))
    for _ in range(5):
        run.advance()
    path = tmp_path / "trace.json"
    generate.save_trace(path, generate.trace_of(run, "nowhere", "interrupted", None))
    before = path.read_bytes()
    assert generate.main(["--resume", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert path.read_bytes() == before


@pytest.mark.parametrize("edit, words", [
    (lambda trace: trace["passes"][3]["sampled"].update({"0": -1}), "damaged"),
    (lambda trace: trace["passes"][3]["sampled"].update({"0": "x"}), "damaged"),
    (lambda trace: trace["passes"][-1]["sampled"].update({"0": 9999}), "does not follow"),
    (lambda trace: trace["passes"][2].update(seconds=None), "damaged"),
    (lambda trace: trace.update(prompt="something else"), "another prompt"),
    (lambda trace: trace.update(passes={}), "damaged"),
    (lambda trace: trace["settings"].update(prompt="{problem}?"), "another prompt"),
    (lambda trace: trace["settings"].update(max_passes=2**40), "below 2^31"),
])
def test_an_edited_trace_is_refused_and_stays(tmp_path, capsys, edit, words):
    """One sentence, and the file is as it was."""
    disable_progress_bar()  # of loading, which is on standard error too
    (tmp_path / "prompt.txt").write_text("{problem}")
    saved = str(tmp_path / "trace.json")
    command = ["A: 43\nB: 16\nC: 77", "--model", str(ROOT / "appendix" / "team"), "--prompt", str(tmp_path / "prompt.txt")]
    assert generate.main([*command, "--greedy", "--check-every", "0", "--max-passes", "8", "--save", saved]) == 0
    trace = json.loads(open(saved).read())
    edit(trace)
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    capsys.readouterr()
    assert generate.main(["--resume", saved]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and json.loads(open(saved).read()) == trace
    assert generate.main(["--resume", saved, "--replay", saved]) == 2 and "either" in capsys.readouterr().err
