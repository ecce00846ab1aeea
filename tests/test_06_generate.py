"""Chapter 6: the text rules, and the loop against the oracle."""
import copy
from importlib import import_module

import oracle
import pytest
import torch
from helpers import MODELS, PROBLEM, SHORT, nobody_answers, run_and_record, tiny
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from appendix import products, protocol

generate = import_module("06_generate")
layouts = import_module("03_layouts")


@pytest.fixture(scope="module")
def packed(smollm):
    """The real model with fast products: those of two or three rows take half the time."""
    return products.fast_products(copy.deepcopy(smollm[0])), smollm[1]


# -------------------------------------------------------------------------------------------- text rules

@pytest.mark.parametrize("text, ended", [
    ("So it is 5.\n\n", True), ("Is it 5?\n\n", True), ("Yes!\n\n", True), ("It is 5.\n \n", True),
                                         ("It is 5.\n\n\n", True),
    ("(it is 5.)\n\n", True), ("**It is 5.**\n\n", True), ("It is $x = 5.$\n\n", True),
                                         ('He said "it is 5."\n\n', True),
    ("它是五。\n\n", True), ("See `a.`\n\n", True), ("f(x) = $5$.\n\n", True),
    ("So it is 5.\n", False), ("So it is 5. \n\nAnd", False), ("The cases are:\n\n", False),
                                         ("first,\n\n", False),
    ("one; \n\n", False), ("5\n\n", False), ("", False), ("\n\n", False), ("**Bob [2]:** ", False),
    ("5.\n\n**Bob [2]:** ", False),
    ("```python\nprint(5).\n\n", False), ("```python\nprint(5)\n```\nThat prints 5.\n\n", True),
])
def test_a_step_ends_in_a_blank_line_after_a_sentence(text, ended):
    """Appendix C's rule, on the text: dressed sentence ends count, colons and open code do not."""
    assert protocol.step_ended(text) is ended


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{42}", "42"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
                                          (r"a \boxed{1} b \boxed{ 2 } c", "2"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{1} and \boxed{2", "1"),
                                          (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed {7}", "7"), (r"\boxed{a_{b_{c}}}", "a_{b_{c}}"), ("boxed{3}", None), (r"\boxed{3", None),
    (r"\boxed{}", None), ("", None),
])
def test_the_last_complete_box_is_the_answer(text, answer):
    """Nested braces count, escaped ones do not, an unclosed or empty box is none."""
    assert protocol.find_boxed(text) == answer


# ---------------------------------------------------------------------------------------- the real model

def test_one_worker_writes_what_generate_writes(smollm):
    """One worker, greedy, equals the stock model's `generate` token for token over 200 tokens."""
    model, tokenizer = smollm
    model.set_attn_implementation("sdpa")
    settings = generate.Settings(workers=["Alice"], layout="independent", greedy=True, max_passes=200,
                                 check_every=0, forbid=[])
    run = generate.Hogwild(copy.deepcopy(model), tokenizer, PROBLEM, settings)
    prompt = tokenizer(run.prompt).input_ids
    while run.ending is None:
        run.advance()
        run.boxed = None
    written = [record["sampled"]["Alice"] for record in run.passes]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False,
                              eos_token_id=None, pad_token_id=0,
                              suppress_tokens=run.sampler.forbidden.tolist())[0, len(prompt):].tolist()
    assert len(written) == 200 and len(set(written)) > 20
    assert written == expected


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("workers", [2, 3])
def test_every_pass_equals_the_oracle(packed, monkeypatch, layout, workers):
    """100 passes, steps ending at different times: logits within 1e-3 (float32), and the greedy tokens
    the same.

    1e-3: both ways round differently over 30 layers; logits reach 30, and float32 keeps 1e-6 of that per
    operation.
    """
    model, tokenizer = packed
    natural = generate.step_ended
    monkeypatch.setattr(generate, "step_ended",
                        lambda text, marks: natural(text, marks) or len(text) % 29 == 0)
    settings = generate.Settings(workers=protocol.NAMES[:workers], layout=layout, greedy=True,
                                 max_passes=100, check_every=50, prompt=SHORT)
    nobody_answers(monkeypatch)
    run, history, logits = run_and_record(model, tokenizer, settings, 100)
    model.set_attn_implementation("sdpa")
    if run.layout.moves:
        closed = [c["worker"] for record in run.passes for c in record["closed"]]
        assert {*closed} == {*protocol.NAMES[:workers]} and any(len(record["closed"]) == 1
                                                                for record in run.passes)
    worst = 0.0
    naive = oracle.follow(model, tokenizer, layout, settings.workers, history, run.passes)
    for ours, theirs, record in zip(logits, naive, run.passes, strict=True):
        worst = max(worst, (ours - theirs).abs().max().item())
        allowed = theirs.clone()
        allowed[:, run.sampler.forbidden] = float("-inf")
        assert allowed.argmax(-1).tolist() == [*record["sampled"].values()]
    assert worst < 1e-3, worst


def test_independent_workers_are_sequential_runs(packed):
    """A worker of an independent team writes what it writes alone, random numbers included: they go by
    its name."""
    model, tokenizer = packed
    team = generate.Settings(workers=["A", "B", "C"], layout="independent", max_passes=24, seed=5,
                             check_every=0)
    run, _, _ = run_and_record(model, tokenizer, team, 24)
    assert len({tuple(r["sampled"][name] for r in run.passes) for name in "ABC"}) == 3
    for name in "ABC":
        alone = generate.Settings(workers=[name], layout="independent", max_passes=24, seed=5,
                                  check_every=0)
        single, _, _ = run_and_record(model, tokenizer, alone, 24)
        assert [r["sampled"][name] for r in single.passes] == [r["sampled"][name] for r in run.passes]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_asking_for_the_answer_disturbs_nothing(smollm, layout):
    """A run asked at every fifth pass goes on exactly as one that was never asked, and answers the
    same when asked twice, also if asking was given up half-way before."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(layout=layout, max_passes=30, max_step=64, check_every=40, prompt=SHORT)
    quiet, _, logits = run_and_record(model, tokenizer, settings, 30)
    asked = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    answers = []
    for i in range(30):
        if i % 5 == 0:
            lengths, job = [block.length for block in asked.cache.blocks], asked.asking()
            asked.fed(next(job)), job.close()
            now = [block.length for block in asked.cache.blocks]
            assert now == lengths, f"given up half-way, it left blocks of {now} tokens, not {lengths}"
            answers.append((asked.answer(), asked.answer()))
        asked.advance()
    assert [r["sampled"] for r in asked.passes] == [r["sampled"] for r in quiet.passes]
    assert [r["closed"] for r in asked.passes] == [r["closed"] for r in quiet.passes]
    assert all(first == second for first, second in answers) and any(first for first, _ in answers)


def test_the_answer_is_that_of_the_last_workers_view(packed):
    """The early stop decodes what the stock model decodes after the last worker's view, written out as
    one text."""
    model, tokenizer = packed
    settings = generate.Settings(layout="contiguous", max_passes=20, answer_tokens=8, prompt=SHORT,
                                 check_every=0)
    run, history, _ = run_and_record(model, tokenizer, settings, 20)
    answer = run.answer()
    cache = oracle.NaiveCache(model, 3)
    model.set_attn_implementation("sdpa")
    oracle.naive_pass(model, cache, [([0], history)])
    for record in run.passes:
        oracle.naive_pass(model, cache, [([0, 2, 1], record["fed"]["Alice"]),
                                         ([0, 1, 2], record["fed"]["Bob"])])
    logits = oracle.naive_pass(model, cache, [([0, 2, 1], run.workers[0].pending),
                                              ([0, 1, 2], run.workers[1].pending + run.finisher)])[-1]
    ids = []
    for _ in range(8):
        ids.append(int(logits.argmax()))
        if ids[-1] in run.ends or "}" in tokenizer.decode(ids):
            break
        logits = oracle.naive_pass(model, cache, [([0, 1, 2], [ids[-1]])])[-1]
    expected = tokenizer.decode([i for i in ids if i not in run.ends])
    assert answer == (protocol.find_boxed("\\boxed{" + expected) or expected.strip())
    assert len(ids) > 1


def test_blocks_hold_what_the_trace_says(packed, monkeypatch):
    """Values of the first layer depend on a token alone: the history's are those of the trace, in its
    order."""
    model, tokenizer = packed
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) % 11 == 10)
    settings = generate.Settings(max_passes=60, prompt=SHORT, check_every=30)
    run, history, _ = run_and_record(model, tokenizer, settings, 60)
    held = {"history": list(history), "Alice": [], "Bob": []}
    for record in run.passes:
        for worker, ids in record["fed"].items():
            held[worker] += ids
        for closed in record["closed"]:
            assert closed["text"] == tokenizer.decode(held[closed["worker"]])
            held["history"] += held[closed["worker"]]
            held[closed["worker"]] = []
    blocks = {"history": run.history, **{w.name: w.block for w in run.workers}}
    assert sum(len(record["closed"]) for record in run.passes) > 2
    for name, ids in held.items():
        block = blocks[name]
        assert block.length == len(ids) and run.ids[block] == ids
        values = run.cache.values[0][:, block.start:block.start + block.length]  # [Hk, length, D]
        layer = model.model.layers[0]
        embedded = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids, dtype=torch.long)))
        fresh = layer.self_attn.v_proj(embedded)  # [length, Hk * D]
        assert torch.allclose(values.transpose(0, 1).reshape(len(ids), -1), fresh, atol=1e-4)
        assert not ids or fresh.abs().max() > 0.1
    assert run.prompt.endswith("### Past steps")


def test_checks_come_once_per_so_many_tokens(smollm, monkeypatch):
    """With a check every 20 tokens and steps that end often, 60 passes of 2 workers bring 6 of them,
    seeded."""
    model, tokenizer = tiny("llama"), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) % 5 == 4)
    nobody_answers(monkeypatch)

    def checks(every, seed=0):
        settings = generate.Settings(max_passes=60, check_every=every, prompt=SHORT, seed=seed)
        run, _, _ = run_and_record(model, tokenizer, settings, 60)
        opened = [c for record in run.passes for c in record["closed"] if "Quick check" in c["opened"]]
        assert all(c["opened"].endswith("Quick check: am I doing redundant work? (yes/no): ")
                   for c in opened)
        return [c["worker"] for c in opened], sum(w.checks_due for w in run.workers)

    opened, due = checks(20)
    assert len(opened) + due == 6 and len(opened) >= 3
    assert checks(20) == (opened, due) and checks(0) == ([], 0)
    # who is asked depends on the seed
    assert len({tuple(checks(20, seed)[0]) for seed in range(1, 4)}) > 1


def test_a_full_step_is_closed_and_nothing_is_dropped(smollm, monkeypatch):
    """A step that never ends is closed when its room is used up; every fed token is in a block."""
    model, tokenizer = tiny("llama"), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: False)
    nobody_answers(monkeypatch)
    settings = generate.Settings(max_passes=150, max_step=16, prompt=SHORT)
    run, history, _ = run_and_record(model, tokenizer, settings, 150)
    closed = [c for record in run.passes for c in record["closed"]]
    assert len(closed) >= 4
    fed = sum(len(ids) for record in run.passes for ids in record["fed"].values())
    assert run.history.length + sum(w.block.length for w in run.workers) == len(history) + fed


@pytest.mark.parametrize("layout, workers", [("combined", 3), ("independent", 2)])
def test_the_run_stops_and_answers_before_the_context_ends(smollm, layout, workers):
    """With a context of 240 tokens the run ends in time, with an answer, and no view is ever longer."""
    model, tokenizer = smollm
    settings = generate.Settings(workers=protocol.NAMES[:workers], prompt=SHORT, context=240,
                                 layout=layout)
    run, longest = generate.Hogwild(model, tokenizer, PROBLEM, settings), []
    forward = run.forward

    def watch(model, cache, tables, ids, last):
        longest.extend(sum(block.length for block in view) for view, _ in tables[0].writers)
        return forward(model, cache, tables, ids, last)
    run.forward = watch
    while run.ending is None:
        run.advance()
    assert run.ending == "context" and len(run.passes) > 5 and run.answer() is not None
    assert 150 < max(longest) <= 240, max(longest)


def test_a_run_that_needs_more_room_ends_and_answers(smollm, monkeypatch):
    """Memory is what a run is likely to need; where steps are all headers it runs out, and nothing is
    lost."""
    model, tokenizer = tiny("llama"), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) > 0)
    nobody_answers(monkeypatch)
    run = generate.Hogwild(model, tokenizer, PROBLEM, generate.Settings(max_passes=2000, prompt=SHORT,
                                                                        context=10**6))
    while run.ending is None:
        run.advance()
    assert run.ending == "room" and len(run.passes) > 200 and isinstance(run.answer(), str)
    assert all(block.length == len(ids) for block, ids in run.ids.items())


def test_memory_is_what_a_run_is_likely_to_need(smollm):
    """8,192 passes alone: 8.3 thousand slots and the prompt; two independent workers: twice that; no
    worst case."""
    model, tokenizer = tiny("llama"), smollm[1]
    slots = {}
    for layout, workers in (("independent", 1), ("independent", 2), ("combined", 2)):
        settings = generate.Settings(workers=protocol.NAMES[:workers], layout=layout, max_passes=8192,
                                     context=10**6)
        run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
        slots[layout, workers] = run.cache.slots - run.history.length
    assert slots["independent", 1] < 8600 and slots["independent",
                                                    2] < 2 * 8600 and slots["combined", 2] < 25000


@pytest.mark.parametrize("where", ["model", "sample"])
def test_a_failing_pass_leaves_the_blocks_as_they_were(smollm, where):
    """After an error in the model or in the choice of tokens, the run can go on as if the pass had not
    been tried."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(max_passes=20, greedy=True, prompt=SHORT)
    expected, _, _ = run_and_record(model, tokenizer, settings, 10)
    run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    for i in range(10):
        if i == 5:
            sample = run.sample
            hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0 if where
                                                                   == "model" else None)
            if where == "sample":
                run.sample = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                run.advance()
            run.sample = sample
            hook.remove()
        run.advance()
    assert [r["sampled"] for r in run.passes] == [r["sampled"] for r in expected.passes]


def test_a_model_whose_attention_was_reset_is_noticed(smollm):
    """A comparison with `generate` in the middle of a run must not make the run go on with another
    attention."""
    model = tiny("llama")
    run = generate.Hogwild(model, smollm[1], PROBLEM, generate.Settings(prompt=SHORT))
    run.advance()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="shared cache"):
        run.advance()


@pytest.mark.parametrize("written, answer", [("7} and so on", "7"), (" }\n\nNow", ""),
                                             ("}. So \\boxed{8}", "")])
def test_an_answer_ends_at_its_brace(smollm, written, answer):
    """The early stop ends at the closing brace, even if there is nothing before it."""
    model, tokenizer = tiny("llama"), smollm[1]
    run = generate.Hogwild(model, tokenizer, PROBLEM, generate.Settings(prompt=SHORT))
    ids = run.encode(written)
    forward, calls = run.forward, []

    def force(*arguments):
        calls.append(forward(*arguments))
        token = torch.tensor([ids[len(calls) - 1]] * len(calls[-1]))
        return torch.nn.functional.one_hot(token, 49152).float()
    run.forward = force
    assert run.answer() == answer


def test_end_of_text_ends_a_worker(smollm):
    """Where special tokens are allowed, a worker that ends its text writes no more, and the others go
    on."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(workers=["A", "B"], layout="independent", max_passes=12,
                                 forbid_special=False, check_every=0)
    run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    end = min(run.ends)
    run.sample = lambda logits: [end if w.name == "A" and len(run.passes) == 4 else 100
                                 for w in run.next_writers()]
    while run.ending is None:
        run.advance()
    assert [len(r["sampled"]) for r in run.passes] == [2] * 5 + [1] * 7 and run.ending == "passes"


# ----------------------------------------------------------------------------------- other architectures

@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
@pytest.mark.parametrize("name", MODELS)
def test_other_architectures_equal_the_oracle(smollm, monkeypatch, name, layout):
    """Random models of other kinds of RoPE and attention, three workers: every pass equals the oracle
    within 1e-3."""
    model, tokenizer = tiny(name), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) % 7 == 0)
    nobody_answers(monkeypatch)
    settings = generate.Settings(workers=["A", "Beatrix", "C"], layout=layout, max_passes=30,
                                 prompt=SHORT, temperature=1.0)
    run, history, logits = run_and_record(model, tokenizer, settings, 30)
    model.set_attn_implementation("eager")
    naive = oracle.follow(model, tokenizer, layout, settings.workers, history, run.passes)
    difference = max((ours - theirs).abs().max().item() for ours,
                     theirs in zip(logits, naive, strict=True))
    assert difference < 1e-3 and max(x.abs().max().item() for x in logits) > 1


# ---------------------------------------------------------------------------------- several runs at once

def test_eight_runs_in_one_pass_write_what_they_write_alone(smollm):
    """Eight runs of different layouts, lengths and numbers of workers share every pass, and one
    cache: the same tokens,
    float32 logits within 1e-4 of those that they compute alone."""
    model, tokenizer = tiny("qwen3"), smollm[1]
    ropes = import_module("04_query_rotation").attach(model)
    cache = import_module("02_shared_cache").SharedCache(ropes)
    kinds = [("combined", 1), ("combined", 2), ("contiguous", 3), ("interleaved", 2), ("independent", 2),
             ("combined", 4), ("interleaved", 1), ("independent", 1)]
    alone, together = [], []
    for number, (layout, workers) in enumerate(kinds):
        settings = generate.Settings(workers=protocol.NAMES[:workers], layout=layout, seed=number,
                                     prompt=SHORT,
                                     max_passes=12 + number, check_every=30, forbid_special=False)
        problem = PROBLEM + " Please." * number
        alone.append(run_and_record(model, tokenizer, settings, 12 + number, problem))
        together.append(generate.Hogwild(model, tokenizer, problem, settings, cache=cache))
    worst, passes = 0.0, 0
    while going := [run for run in together if run.ending is None]:
        passes += 1
        groups = generate.feed(model, cache, [run.writers() for run in going])
        for run, logits in zip(going, groups, strict=True):
            expected = alone[together.index(run)][2][len(run.passes)]
            worst = max(worst, (logits - expected).abs().max().item())
            assert logits.std() > 0.05
            run.take(run.sample(logits))
    assert worst <= 1e-4 and passes == 19
    for run, (single, _, _) in zip(together, alone, strict=True):
        assert [record["sampled"] for record in run.passes] == [record["sampled"]
                                                                for record in single.passes]
        assert [record["closed"] for record in run.passes] == [record["closed"]
                                                               for record in single.passes]
        assert run.answer() == single.answer()


@pytest.mark.parametrize("config, word", [
    ({"model_type": "gpt2"}, "rotary"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ({"max_position_embeddings": 64}, "shorten"), ({"num_hidden_layers": 0}, "no layers")])
def test_unusable_models_are_refused(smollm, config, word):
    """No RoPE, `dynamic` RoPE, a context shorter than the prompt, no layers: one sentence each."""
    kind = config.get("model_type", "llama")
    made = (GPT2Config(n_layer=1, n_head=2, n_embd=16) if kind == "gpt2"
            else LlamaConfig(**{**MODELS["llama"].to_diff_dict(), **config}))
    with pytest.raises(ValueError, match=word) as refusal:
        generate.Hogwild(AutoModelForCausalLM.from_config(made), smollm[1], PROBLEM)
    assert "\n" not in str(refusal.value)


def test_a_model_that_turns_keys_in_another_way_is_refused(smollm):
    """The config may say what it likes: a model whose keys do not move by its frequencies is not
    used."""
    model = tiny("llama")
    model.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(ValueError, match="does not rotate keys"):
        generate.Hogwild(model, smollm[1], PROBLEM)


@pytest.mark.parametrize("where", ["feed", "advance", "answer"])
def test_nan_is_an_error(smollm, where):
    """A model that computes NaN is said to, by a pass and by an answer; and `feed` itself leaves the
    blocks as long as they were."""
    model = tiny("llama")
    run = generate.Hogwild(model, smollm[1], PROBLEM, generate.Settings(prompt=SHORT))
    model.model.norm.weight.fill_(float("nan"))
    lengths = [block.length for block in run.cache.blocks]
    with pytest.raises(ValueError, match="NaN"):
        if where == "feed":
            generate.feed(model, run.cache, [run.writers()])
        else:
            getattr(run, where)()
    now = [block.length for block in run.cache.blocks]
    assert now == lengths, f"the blocks had {lengths} tokens; after the error, they have {now}"
