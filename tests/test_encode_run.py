"""Recorded runs: one pass against the live run and the stock model, gradients, and memory."""
import copy
from functools import partial
from importlib import import_module

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import EVENTS, LOOPS, Reencode, often, random_model, runs, settings_for, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from appendix import encode_run, recording

query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")
SMALL = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2)


def rows_of(run):
    """How many rows a recording has in which nobody came or left, by counting steps and separators."""
    steps = sum(len(record["closed"]) for record in run.passes[:-1]) if run.layout.moves else 0
    workers = len(run.workers) if run.passes else 0  # a step that nobody has seen has no row
    dots = max(0, workers - 2) * bool(run.separators)  # as many more as there are others
    return 1 + workers + steps + len(run.separators) + dots


# ------------------------------------------------------------------------------------------- one pass

@settings(deadline=None, max_examples=70)
@given(runs(), LOOPS, EVENTS, st.integers(1, 200), st.booleans())
def test_one_pass_gives_the_logits_of_all(run_of, loop, events, size, frugal):
    """Any layout, 1-4 workers, steps that end, checks, ragged passes, windows, guests: within 1e-4.

    Both ways round differently (one row in a product, or hundreds); logits are around 3, for Gemma 0.5.
    """
    kind, layout, workers, seed, passes, every = run_of
    with pytest.MonkeyPatch.context() as monkeypatch:
        often(monkeypatch, every)
        run, _, live = helpers.run_and_record(
            random_model(kind), tokenizer(), settings_for(layout, workers, seed), passes, loop=loop,
            between=partial(helpers.happen, events))
        recorded = recording.Recording.of(run)
    with torch.set_grad_enabled(frugal):
        again, _ = recording.encode(run.model, run.cache.ropes, [recorded], size, frugal)
    live = torch.cat(live) if live else torch.zeros(0, again.shape[1])
    yours, right = tuple(again.shape), tuple(live.shape)
    assert yours == right and (events or len(live) == passes * workers), (
        f"logits: yours have the shape {yours}, right is {right}")
    off = (again - live).abs().max().item() if passes else 0
    assert off < 1e-4, f"your logits are off by {off:.1e}, those of {passes} passes of {layout!r}"
    assert not passes or live.std() > 0.05  # of zeros, all that would be true
    rows, right = len(recorded.tables.start), rows_of(run)
    assert events or loop is Reencode or rows == right, f"rows: yours are {rows}, right is {right}"
    fed = {name: ids for record in run.passes for name, ids in record["fed"].items()}
    assert events or {*fed} == ({w.name for w in run.workers} if passes else set())


@pytest.mark.parametrize("layout, workers", [("combined", 1), ("combined", 2), ("combined", 4),
                                             ("contiguous", 3), ("interleaved", 2), ("independent", 2)])
def test_the_real_model_in_one_pass(smollm, monkeypatch, layout, workers):
    """24 passes with steps that end: within 2e-4 of the live logits, which reach 30 over 30 layers."""
    often(monkeypatch, 7)
    run, _, live = helpers.run_and_record(*smollm, settings_for(layout, workers), 24)
    with torch.no_grad():
        again, _ = recording.encode(run.model, run.cache.ropes, [recording.Recording.of(run)])
    live = torch.cat(live)
    assert live.abs().max() > 10 and (again - live).abs().max().item() < 2e-4
    assert not run.layout.moves or sum(len(record["closed"]) for record in run.passes) > workers


@pytest.mark.parametrize("size", [1, 5, 64])
def test_no_piece_is_larger_than_it_has_to_be(size):
    """At most so many tokens, of the prompt or of workers, with the rows that these see; together, every
    token once."""
    example = encode_run.rehearse("combined", [[5, 8], [9], [7, 4]], 12)
    tables, end = example.tables, 0
    for piece in recording.pieces_of(example, 100, size):
        first, end = end, end + len(piece.position)
        rows = 100 + tables.start[tables.visible[:, first:end].any(1)]
        assert end - first <= size, f"a piece has {end - first} tokens, and {size} are allowed"
        assert not first < example.prefill < end, "a piece has tokens of both prompt and workers"
        assert sorted(piece.start) == sorted(rows), "a piece has other rows than its tokens see"
    assert end == len(example.ids), f"the pieces have {end} of {len(example.ids)} tokens"


def test_a_recording_says_what_was_picked_and_how_much_that_counts():
    """From which token's logits, with which weight; and how many tokens there were before all that."""
    ledger = recording.Ledger(ropes=[])
    block = ledger.block(20)
    for ids in ([3, 4, 5], [6], [7, 8]):
        generate.feed(None, ledger, [[([block], ids)]], ledger.forward)
    ledger.label([7], 1, [0.5])
    ledger.label([9], 2, [2.0])
    made, none = ledger.recording(), recording.IGNORE
    ledger.prefill = None
    for name, right in (("ids", [3, 4, 5, 6, 7, 8]), ("sampled", [none] * 3 + [7, none, 9]),
                        ("weight", [1, 1, 1, 0.5, 1, 2]), ("own", [0] * 6)):
        yours = getattr(made, name).tolist()
        assert yours == right, f"{name}: yours is {yours}, right is {right}"
    assert made.lengths == [6], f"lengths: yours is {made.lengths}, right is [6]"
    for yours, right in ((made.prefill, 3), (ledger.recording().prefill, 6)):
        assert yours == right, f"prefill: yours is {yours}, right is {right}"


def test_several_runs_in_one_row_do_not_see_each_other():
    """A batch of runs of different layouts and lengths gives what each of them gives alone."""
    model = random_model("yarn")
    ropes, rehearse = query_rotation.attach(model), encode_run.rehearse
    batch = [rehearse("combined", [[5, 8], [9], [7, 4]], 20), rehearse("interleaved", [[6], [8, 5]], 11),
             rehearse("independent", [[200]], 30), rehearse("contiguous", [[4], [6]], 1)]
    for recorded in batch:
        recorded.ids = torch.randint(0, 1000, recorded.ids.shape)
    with torch.no_grad():
        together, _ = recording.encode(model, ropes, batch, 16)
        alone = torch.cat([recording.encode(model, ropes, [recorded])[0] for recorded in batch])
    off = (together - alone).abs().max().item()
    assert off <= 1e-5 and together.std() > 0.05, f"logits of runs in one row are off by {off:.1e}"


def test_the_picture_is_the_mask():
    """One worker without headers sees a triangle of distances; two see what was worked out by hand."""
    parts = encode_run.unfold(encode_run.rehearse("independent", [[50]], 4, prompt=3))
    distance = torch.cat(parts, 1)
    n = len(distance)
    assert n == 3 + 3 + 3
    assert torch.equal(distance, (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=-1))
    # Two workers, history and own step only, steps of two tokens fed at once: first, second
    parts = encode_run.unfold(encode_run.rehearse("interleaved", [[2], [2]], 2, opening=2, prompt=1))
    assert [part.shape[1] for part in parts] == [1, 2, 2, 2, 2]
    assert torch.cat(parts, 1).tolist() == [
        [0, -1, -1, -1, -1, -1, -1, -1, -1],
        [1, 0, -1, -1, -1, -1, -1, -1, -1], [2, 1, 0, -1, -1, -1, -1, -1, -1],  # Alice 1
        [1, -1, -1, 0, -1, -1, -1, -1, -1], [2, -1, -1, 1, 0, -1, -1, -1, -1],  # Bob 1: the same places
        [5, 4, 3, 2, 1, 0, -1, -1, -1], [6, 5, 4, 3, 2, 1, 0, -1, -1],  # Alice 2 sees both
        [5, 4, 3, 2, 1, -1, -1, 0, -1], [6, 5, 4, 3, 2, -1, -1, 1, 0]]


def test_what_cannot_be_encoded_is_refused():
    """Stock attention, recordings in which nothing was sampled, no tokens; an empty prompt can be."""
    model = copy.deepcopy(random_model("llama"))
    ropes = query_rotation.attach(model)
    with pytest.raises(ValueError):
        recording.loss(model, ropes, [encode_run.rehearse("combined", [[5]], 0)])
    assert recording.loss(model, ropes, [encode_run.rehearse("contiguous", [[5], [4]], 3, prompt=0)]) > 0
    for recordings, size in (([], 256), ([encode_run.rehearse("combined", [[5]], 3)], 0)):
        with pytest.raises(ValueError, match="nothing to encode"):
            recording.encode(model, ropes, recordings, size)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="does not attend through the shared cache"):
        recording.loss(model, ropes, [encode_run.rehearse("combined", [[5]], 3)])


# ------------------------------------------------------------------------------------------- training

def trainable(kind="llama"):
    """A random model with gradients."""
    return copy.deepcopy(random_model(kind)).requires_grad_()


def gradients(model, value):
    """Gradients of all parameters, as one vector."""
    model.zero_grad()
    value.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_loss_and_gradient_of_one_worker_are_those_of_plain_training():
    """One worker without headers is a plain text: loss and gradients are the stock model's, with what
    each token counts."""
    model = trainable()
    example = encode_run.rehearse("independent", [[300]], 60, prompt=20)
    example.ids = torch.randint(0, 1000, example.ids.shape)
    own = torch.arange(len(example.ids)) >= example.prefill
    example.sampled = torch.where(own, example.ids.roll(-1), recording.IGNORE)
    example.sampled[-1] = 7
    example.weight = torch.rand(len(example.ids)) * 4
    model.set_attn_implementation("sdpa")
    logits = model(example.ids[None]).logits[0]
    each = F.cross_entropy(logits[own], example.sampled[own], reduction="none")
    expected = (each * example.weight[own]).sum() / example.weight[own].sum()
    plain = gradients(model, expected)
    value = recording.loss(model, query_rotation.attach(model), [example], size=16)
    ours = gradients(model, value)
    yours, right, off = value.item(), expected.item(), (ours - plain).norm() / plain.norm()
    assert abs(yours - right) < 1e-5 and right > 1, f"loss: yours is {yours:.5f}, right is {right:.5f}"
    assert off < 1e-4 and example.prefill == 20, f"your gradients are off by {off:.1e} of their length"


@pytest.mark.parametrize("frugal", [True, False])
def test_gradients_of_a_team_equal_those_of_the_specification(monkeypatch, frugal):
    """Three workers, steps that move: gradients as through chapter 4's specification, at once."""
    model = trainable("phi3")
    ropes = query_rotation.attach(model)
    example = encode_run.rehearse("combined", [[5, 8], [9], [7, 4]], 12)
    example.ids = torch.randint(0, 1000, example.ids.shape)
    value = recording.loss(model, ropes, [example], size=7, frugal=frugal)
    ours = gradients(model, value)
    specification = query_rotation.attention_spec
    monkeypatch.setattr(query_rotation, "attention", lambda q, k, v, tables, *others: specification(
        q, k, v, example.tables, *others))
    monkeypatch.setattr(recording, "pieces_of", lambda *arguments: [example.tables])
    slow = gradients(model, recording.loss(model, ropes, [example], frugal=False))
    off = (ours - slow).norm() / slow.norm()
    assert off < 1e-4 and slow.norm() > 0.1, f"your gradients are off by {off:.1e} of their length"


def test_memory_is_in_proportion_to_tokens():
    """Twice the tokens in as many blocks keep twice the bytes; with the scores, over three times."""
    model = AutoModelForCausalLM.from_config(SMALL)
    ropes, kept = query_rotation.attach(model), {}
    for scale in (1, 2):
        example = encode_run.rehearse("combined", [[400 * scale], [300 * scale]], 700 * scale)
        losses = [partial(recording.loss, model, ropes, [example], frugal=f) for f in (True, False)]
        kept[scale] = [*map(encode_run.saved_bytes, losses)]
    assert 0 < kept[2][0] < 2.2 * kept[1][0] and kept[2][1] > 3 * kept[1][1]


def test_the_trainer_of_transformers_learns_a_run(tmp_path):
    """As the docstring says: a collator that hands recordings through, and a loss. Ten steps."""
    model = AutoModelForCausalLM.from_config(SMALL)
    ropes = query_rotation.attach(model)
    example = encode_run.rehearse("combined", [[5, 8], [9]], 20)
    losses = []

    class Student(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses.append(recording.loss(model, ropes, inputs["recordings"]))
            return losses[-1]

    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, learning_rate=0.03, report_to=[],
        remove_unused_columns=False, save_strategy="no", use_cpu=True, disable_tqdm=True)
    student = Student(model, arguments, data_collator=lambda runs: {"recordings": runs},
                      train_dataset=[example] * 20)
    student.train()
    assert losses[0].item() > 3 and losses[-1].item() < 1
