"""Chapter 6: the text rules, the loop against the oracle, and what a user may do wrong."""
import copy
import json
import os
import signal
import subprocess
import sys
from importlib import import_module

import oracle
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

generate = import_module("06_generate")
layouts = import_module("03_layouts")
SHORT = "{names} solve this together, in short paragraphs.\n\n{problem}"  # keeps the oracle's passes small
PROBLEM = "How much is 3 + 4 + 5 + 6? Explain how you add numbers."


@pytest.fixture(scope="module")
def packed(smollm):
    """The real model with packed weights: its products of two or three rows take half the time."""
    return import_module("02_shared_cache").pack_linears(copy.deepcopy(smollm[0])), smollm[1]


def run_and_record(model, tokenizer, settings, passes, problem=PROBLEM):
    """Run `passes` passes; returns (run, prompt ids as the history had them, logits of each pass)."""
    run = generate.Hogwild(model, tokenizer, problem, settings)
    feed, logits = run._feed, []
    run._feed = lambda writers: logits.append(feed(writers).clone()) or logits[-1].clone()
    for _ in range(passes):
        assert run.ending is None
        run.advance()
    history = run.encode(run.prompt, special=tokenizer.chat_template is None)
    return run, history[:-1] if settings.layout == "independent" else history, logits


TINY = dict(vocab_size=49152, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=4096)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": LlamaConfig(**TINY, head_dim=16), "llama3": LlamaConfig(**TINY, head_dim=16, rope_parameters=LLAMA3),
    "yarn": LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN), "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                                "partial_rotary_factor": 0.5}),
}


def tiny(name):
    """A random model of that kind, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5.0)
    return model


# ------------------------------------------------------------------------------------------------------------- text rules

@pytest.mark.parametrize("text, ended", [
    ("So it is 5.\n\n", True), ("Is it 5?\n\n", True), ("Yes!\n\n", True), ("It is 5.\n \n", True), ("It is 5.\n\n\n", True),
    ("(it is 5.)\n\n", True), ("**It is 5.**\n\n", True), ("It is $x = 5.$\n\n", True), ('He said "it is 5."\n\n', True),
    ("它是五。\n\n", True), ("See `a.`\n\n", True), ("f(x) = $5$.\n\n", True),
    ("So it is 5.\n", False), ("So it is 5. \n\nAnd", False), ("The cases are:\n\n", False), ("first,\n\n", False),
    ("one; \n\n", False), ("5\n\n", False), ("", False), ("\n\n", False), ("**Bob [2]:** ", False),
    ("5.\n\n**Bob [2]:** ", False),
    ("```python\nprint(5).\n\n", False), ("```python\nprint(5)\n```\nThat prints 5.\n\n", True),
])
def test_a_step_ends_in_a_blank_line_after_a_sentence(text, ended):
    """Appendix C's rule, on the text: dressed sentence ends count, colons and open code do not."""
    assert generate.step_ended(text) is ended


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{42}", "42"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"a \boxed{1} b \boxed{ 2 } c", "2"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{1} and \boxed{2", "1"), (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed {7}", "7"), (r"\boxed{a_{b_{c}}}", "a_{b_{c}}"), ("boxed{3}", None), (r"\boxed{3", None),
    (r"\boxed{}", None), ("", None),
])
def test_the_last_complete_box_is_the_answer(text, answer):
    """Nested braces count, escaped ones do not, an unclosed or empty box is none."""
    assert generate.find_boxed(text) == answer


# --------------------------------------------------------------------------------------------------------- the real model

def test_one_worker_writes_what_generate_writes(smollm):
    """One worker, greedy, equals the stock model's `generate` token for token over 200 tokens."""
    model, tokenizer = smollm
    model.set_attn_implementation("sdpa")
    settings = generate.Settings(workers=["Alice"], layout="independent", greedy=True, max_passes=200, check_every=0, forbid=[])
    run = generate.Hogwild(copy.deepcopy(model), tokenizer, PROBLEM, settings)
    prompt = run.encode(run.prompt)
    while run.ending is None:
        run.advance()
        run.boxed = None
    written = [record["sampled"][0] for record in run.passes]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0,
                              suppress_tokens=run.forbidden.tolist())[0, len(prompt):].tolist()
    assert len(written) == 200 and len(set(written)) > 20
    assert written == expected


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("workers", [2, 3])
def test_every_pass_equals_the_oracle(packed, monkeypatch, layout, workers):
    """100 passes, steps ending at different times: logits within 1e-3 (float32), and the greedy tokens the same.

    1e-3: both ways round differently over 30 layers; logits reach 30, and float32 keeps 1e-6 of that per operation.
    """
    model, tokenizer = packed
    natural = generate.step_ended
    monkeypatch.setattr(generate, "step_ended", lambda text: natural(text) or len(text) % 29 == 0)
    settings = generate.Settings(workers=generate.NAMES[:workers], layout=layout, greedy=True, max_passes=100,
                                 check_every=50, prompt=SHORT)
    monkeypatch.setattr(generate, "find_boxed", lambda text: None)
    run, history, logits = run_and_record(model, tokenizer, settings, 100)
    model.set_attn_implementation("sdpa")
    if run.layout.moves:
        closed = [c["worker"] for record in run.passes for c in record["closed"]]
        assert {*closed} == {*range(workers)} and any(len(record["closed"]) == 1 for record in run.passes)
    worst = 0.0
    replay = oracle.replay(model, layout, workers, history, [*run.separators.values()], run.passes)
    for ours, theirs, record in zip(logits, replay, run.passes, strict=True):
        worst = max(worst, (ours - theirs).abs().max().item())
        allowed = theirs.clone()
        allowed[:, run.forbidden] = float("-inf")
        assert allowed.argmax(-1).tolist() == [*record["sampled"].values()]
    assert worst < 1e-3, worst


def test_independent_workers_are_sequential_runs(packed):
    """Worker i of an independent team writes what a single worker with seed + i writes, random numbers included."""
    model, tokenizer = packed
    team = generate.Settings(workers=["A", "B", "C"], layout="independent", max_passes=24, seed=5, check_every=0)
    run, _, _ = run_and_record(model, tokenizer, team, 24)
    for i in range(3):
        alone = generate.Settings(workers=["A"], layout="independent", max_passes=24, seed=5 + i, check_every=0)
        single, _, _ = run_and_record(model, tokenizer, alone, 24)
        assert [r["sampled"][0] for r in single.passes] == [r["sampled"][i] for r in run.passes]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_asking_for_the_answer_disturbs_nothing(smollm, layout):
    """A run asked at every fifth pass goes on exactly as one that was never asked, and answers the same when asked twice."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(layout=layout, max_passes=30, max_step=64, check_every=40, prompt=SHORT)
    quiet, _, logits = run_and_record(model, tokenizer, settings, 30)
    asked = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    answers = []
    for i in range(30):
        if i % 5 == 0:
            answers.append((asked.answer(), asked.answer()))
        asked.advance()
    assert [r["sampled"] for r in asked.passes] == [r["sampled"] for r in quiet.passes]
    assert [r["closed"] for r in asked.passes] == [r["closed"] for r in quiet.passes]
    assert all(first == second for first, second in answers) and any(first for first, _ in answers)


def test_the_answer_is_that_of_the_last_workers_view(packed):
    """The early stop decodes what the stock model decodes after the last worker's view, written out as one text."""
    model, tokenizer = packed
    settings = generate.Settings(layout="contiguous", max_passes=20, answer_tokens=8, prompt=SHORT, check_every=0)
    run, history, _ = run_and_record(model, tokenizer, settings, 20)
    answer = run.answer()
    cache = oracle.NaiveCache(model, 3)
    model.set_attn_implementation("sdpa")
    oracle.naive_pass(model, cache, [([0], history)])
    for record in run.passes:
        oracle.naive_pass(model, cache, [([0, 2, 1], record["fed"][0]), ([0, 1, 2], record["fed"][1])])
    logits = oracle.naive_pass(model, cache, [([0, 2, 1], run.workers[0].pending),
                                              ([0, 1, 2], run.workers[1].pending + run.finisher)])[-1]
    ids = []
    for _ in range(8):
        ids.append(int(logits.argmax()))
        if ids[-1] in run.end_ids or "}" in tokenizer.decode(ids):
            break
        logits = oracle.naive_pass(model, cache, [([0, 1, 2], [ids[-1]])])[-1]
    expected = tokenizer.decode([i for i in ids if i not in run.end_ids])
    assert answer == (generate.find_boxed("\\boxed{" + expected) or expected.strip())
    assert len(ids) > 1


def test_blocks_hold_what_the_trace_says(packed, monkeypatch):
    """The keys of the first layer depend on a token alone: the history's are those of the trace's text, in its order."""
    model, tokenizer = packed
    monkeypatch.setattr(generate, "step_ended", lambda text: len(text) % 31 == 0)
    settings = generate.Settings(max_passes=60, prompt=SHORT, check_every=30)
    run, history, _ = run_and_record(model, tokenizer, settings, 60)
    blocks = {0: list(history), 1: [], 2: []}
    for record in run.passes:
        for worker, ids in record["fed"].items():
            blocks[1 + worker] += ids
        for closed in record["closed"]:
            assert closed["text"] == run.decode(blocks[1 + closed["worker"]])
            blocks[0] += blocks[1 + closed["worker"]]
            blocks[1 + closed["worker"]] = []
    assert [len(blocks[b]) for b in blocks] == [run.cache.blocks[b].length for b in blocks]
    for b, ids in blocks.items():
        values = run.cache.values[0][:, run.cache.blocks[b].start:][:, :len(ids)]  # values of layer 0: of the token alone
        layer = model.model.layers[0]
        fresh = layer.self_attn.v_proj(layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids))))
        assert torch.allclose(values.transpose(0, 1).reshape(len(ids), -1), fresh, atol=1e-4) and fresh.abs().max() > 0.1
    assert generate.PAST_STEPS in run.prompt and run.prompt.endswith(generate.PAST_STEPS)


def test_checks_come_once_per_so_many_tokens(smollm, monkeypatch):
    """With a check every 20 tokens and steps that end often, 60 passes of 2 workers bring 6 of them, seeded."""
    model, tokenizer = tiny("llama"), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text: len(text) % 5 == 0)
    monkeypatch.setattr(generate, "find_boxed", lambda text: None)

    def checks(every, seed=0):
        settings = generate.Settings(max_passes=60, check_every=every, prompt=SHORT, seed=seed)
        run, _, _ = run_and_record(model, tokenizer, settings, 60)
        opened = [c for r in run.passes for c in r["closed"] if c["opens_with_check"]]
        assert all(c["opened"].endswith(generate.CHECK) for c in opened)
        return [c["worker"] for c in opened], sum(w.check_due for w in run.workers)

    opened, due = checks(20)
    assert 4 <= len(opened) + due <= 6 and len(opened) >= 3  # two that fall to one worker before its step ends are one
    assert checks(20) == (opened, due) and checks(0) == ([], 0)


def test_a_full_step_is_closed_and_nothing_is_dropped(smollm, monkeypatch):
    """A step that never ends is closed when its room is used up; every fed token is in a block."""
    model, tokenizer = tiny("llama"), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text: False)
    monkeypatch.setattr(generate, "find_boxed", lambda text: None)
    run, history, _ = run_and_record(model, tokenizer, generate.Settings(max_passes=150, max_step=64, prompt=SHORT), 150)
    closed = [c for r in run.passes for c in r["closed"]]
    assert len(closed) >= 4
    fed = sum(len(ids) for r in run.passes for ids in r["fed"].values())
    assert sum(run.cache.blocks[b].length for b in (0, 1, 2)) == len(history) + fed


def test_the_run_stops_and_answers_before_the_context_ends(smollm):
    """With a context of 200 tokens the run ends in time, with an answer, and no view is ever longer."""
    model, tokenizer = smollm
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 240
    run = generate.Hogwild(model, tokenizer, PROBLEM, generate.Settings(workers=generate.NAMES[:3], prompt=SHORT))
    feed, longest = run._feed, []

    def watch(writers):
        logits = feed(writers)
        longest.append(run.longest_view)
        return logits
    run._feed = watch
    while run.ending is None:
        run.advance()
    assert run.ending == "context" and len(run.passes) > 5 and run.answer() is not None
    assert 180 < max(longest) <= 240, max(longest)


@pytest.mark.parametrize("where", ["model", "sample"])
def test_a_failing_pass_leaves_the_blocks_as_they_were(smollm, where):
    """After an error in the model or in the choice of tokens, the run can go on as if the pass had not been tried."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(max_passes=20, greedy=True, prompt=SHORT)
    expected, _, _ = run_and_record(model, tokenizer, settings, 10)
    run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    for i in range(10):
        if i == 5:
            sample = run.sample
            hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0 if where == "model" else None)
            run.sample = lambda *_: 1 / 0
            with pytest.raises(ZeroDivisionError):
                run.advance()
            run.sample = sample
            hook.remove()
        run.advance()
    assert [r["sampled"] for r in run.passes] == [r["sampled"] for r in expected.passes]


def test_a_model_whose_attention_was_reset_is_noticed(smollm):
    """A comparison with `generate` in the middle of a run must not make the run go on with another attention."""
    model = tiny("llama")
    run = generate.Hogwild(model, smollm[1], PROBLEM, generate.Settings(prompt=SHORT))
    run.advance()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="shared cache"):
        run.advance()


@pytest.mark.parametrize("written, answer", [("7} and so on", "7"), (" }\n\nNow", ""), ("}. So \\boxed{8}", "")])
def test_an_answer_ends_at_its_brace(smollm, written, answer):
    """The early stop ends at the closing brace, even if there is nothing before it."""
    model, tokenizer = tiny("llama"), smollm[1]
    run = generate.Hogwild(model, tokenizer, PROBLEM, generate.Settings(prompt=SHORT))
    ids = run.encode(written)
    feed, calls = run._feed, []

    def force(writers):
        calls.append(feed(writers))
        return torch.nn.functional.one_hot(torch.tensor([ids[len(calls) - 1]]), 49152).float()
    run._feed = force
    assert run.answer() == answer


def test_end_of_text_ends_a_worker(smollm):
    """Where special tokens are allowed, a worker that ends its text writes no more, and the others go on."""
    model, tokenizer = tiny("llama"), smollm[1]
    settings = generate.Settings(workers=["A", "B"], layout="independent", max_passes=12, forbid_special=False, check_every=0)
    run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    end = min(run.end_ids)
    run.sample = lambda logits, writing: [end if w.index == 0 and len(run.passes) == 4 else 100 for w in writing]
    while run.ending is None:
        run.advance()
    assert [len(r["sampled"]) for r in run.passes] == [2] * 5 + [1] * 7 and run.ending == "passes"


# ------------------------------------------------------------------------------------------------- other architectures

@pytest.mark.parametrize("layout", ["combined", "contiguous", "interleaved"])
@pytest.mark.parametrize("name", MODELS)
def test_other_architectures_equal_the_oracle(smollm, monkeypatch, name, layout):
    """Random models of other kinds of RoPE and attention, three workers: every pass equals the oracle within 1e-3."""
    model, tokenizer = tiny(name), smollm[1]
    monkeypatch.setattr(generate, "step_ended", lambda text: len(text) % 7 == 0)
    monkeypatch.setattr(generate, "find_boxed", lambda text: None)
    settings = generate.Settings(workers=["A", "Beatrix", "C"], layout=layout, max_passes=30, prompt=SHORT, temperature=1.0)
    run, history, logits = run_and_record(model, tokenizer, settings, 30)
    model.set_attn_implementation("eager")
    replay = oracle.replay(model, layout, 3, history, [*run.separators.values()], run.passes)
    difference = max((ours - theirs).abs().max().item() for ours, theirs in zip(logits, replay, strict=True))
    assert difference < 1e-3 and max(x.abs().max().item() for x in logits) > 1


# ------------------------------------------------------------------------------------------------------ the command line

def command(*arguments, **options):
    """Run the chapter as a user would, from another folder."""
    return subprocess.run([sys.executable, str(ROOT / "06_generate.py"), *arguments], capture_output=True, text=True,
                          cwd=options.pop("cwd", "/"), timeout=300, check=False, **options)


WRONG = {
    "layout": (["--layout", "circle"], "layout"), "no workers": (["--workers", "0"], "1 to 16"),
    "17 workers": (["--workers", "17"], "1 to 16"), "twice": (["--workers", "Al", "Bo", "Al"], "two workers"),
    "missing file": (["--file", "/nowhere/problem.txt"], "cannot be read"), "empty": (["  "], "empty"),
    "model": (["--model", "no-such-org/no-such-model"], "model"), "gguf": (["--model", "/nowhere/m.gguf"], "GGUF"),
    "device": (["--device", "cuda:7" if torch.cuda.is_available() else "cuda"], "device"),
    "bad device": (["--device", "toaster"], "device"), "passes": (["--max-passes", "0"], "max_passes"),
    "temperature": (["--temperature", "0"], "temperature"), "top-p": (["--top-p", "1.5"], "top-p"),
    "number": (["--max-passes", "many"], "many"), "save": (["--save", "/nowhere/trace.json"], "written"),
    "replay": (["--replay", "/nowhere/trace.json"], "cannot be read"), "option": (["--colour"], "--colour"),
    "twice a problem": (["x", "--file", __file__], "twice"), "prompt": (["--prompt", __file__ + "x"], "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_sentence(case, capsys):
    """Exit code 2, one line on standard error that names the fault, no traceback, nothing on standard output."""
    arguments, word = WRONG[case]
    try:
        code = generate.main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    message = captured.err.strip()
    assert code == 2 and word in message and "\n" not in message and "Traceback" not in message, (code, message)


@pytest.mark.parametrize("config, word", [
    ({"model_type": "gpt2"}, "rotary"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ({"max_position_embeddings": 64}, "shorten"),
])
def test_unusable_models_are_refused(smollm, config, word):
    """No RoPE, `dynamic` RoPE, a context shorter than the prompt: one sentence each."""
    kind = config.pop("model_type", "llama")
    from transformers import GPT2Config
    made = GPT2Config(n_layer=1, n_head=2, n_embd=16) if kind == "gpt2" else LlamaConfig(**{**TINY, **config})
    model = AutoModelForCausalLM.from_config(made)
    with pytest.raises(ValueError, match=word) as refusal:
        generate.Hogwild(model, smollm[1], PROBLEM)
    assert "\n" not in str(refusal.value)


def test_a_model_that_turns_keys_in_another_way_is_refused(smollm):
    """The config may say what it likes: a model whose keys do not move by its frequencies is not used."""
    model = tiny("llama")
    model.model.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(ValueError, match="does not turn its keys"):
        generate.Hogwild(model, smollm[1], PROBLEM)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A finished run of the command line with default settings: (process, trace path)."""
    path = tmp_path_factory.mktemp("run") / "trace.json"
    return command("--save", str(path), "--max-passes", "60", "--svg", str(path.with_suffix(".svg"))), path


def test_the_command_line_solves_and_saves(saved):
    """The main job, as a user runs it: steps, an answer, the figures, [OK], and a trace that holds it all."""
    process, path = saved
    assert process.returncode == 0, process.stderr
    assert "[OK]" in process.stdout and "Answer:" in process.stdout and "**Alice [1]:**" in process.stdout
    trace = json.loads(path.read_text())
    assert trace["settings"]["workers"] == ["Alice", "Bob"] and len(trace["passes"]) <= 60 and trace["versions"]["torch"]
    assert trace["tokens"] == 2 * len(trace["passes"]) and trace["answer"] is not None
    assert "<svg" in path.with_suffix(".svg").read_text()


def test_replay_shows_the_same_text(saved, capsys, monkeypatch):
    """A saved run is shown again, without any model, word for word."""
    process, path = saved
    monkeypatch.setattr(generate.shared_cache, "load_model", None)
    assert generate.main(["--replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == process.stdout.split("...\n", 1)[1].strip()


def test_the_live_display_runs_on_a_terminal(saved):
    """In a real terminal (a pty), the replay draws columns and ends like the plain one."""
    _, path = saved
    import pty
    trace = json.loads(path.read_text())
    for record in trace["passes"]:
        record["seconds"] = 0.01
    fast = path.with_name("fast.json")
    fast.write_text(json.dumps(trace))
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, str(ROOT / "06_generate.py"), "--replay", str(fast)],
                               stdout=slave, stderr=slave,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"})
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        output += piece
    assert process.wait(60) == 0
    text = output.decode(errors="replace")
    assert "past steps" in text and "╭" in text and "tokens/s" in text and "[OK]" in text


def test_a_reader_who_leaves_does_not_cost_the_trace(smollm, tmp_path, monkeypatch):
    """When the display gives up (rich exits when nobody reads its output), the passes so far are saved."""
    path, show = tmp_path / "trace.json", generate.Screen.show
    monkeypatch.setattr(generate.Screen, "show", lambda self, r: sys.exit(1) if self.passes == 5 else show(self, r))
    monkeypatch.setattr(generate.shared_cache, "load_model", lambda *_: (tiny("llama"), smollm[1]))
    assert generate.main(["--save", str(path), "--max-passes", "30"]) == 1
    assert len(json.loads(path.read_text())["passes"]) == 6


def test_sixteen_workers_fit_on_a_narrow_terminal():
    """Too many for columns: everybody still has a line with the end of what they write."""
    import io

    from rich.console import Console
    console = Console(file=io.StringIO(), width=80, height=40, force_terminal=True)
    opening = {i: f"words of {name}" for i, name in enumerate(generate.NAMES)}
    screen = generate.Screen(generate.NAMES, opening, True, True, "", 100, console)
    console.print(screen.frame())
    assert all(f"words of {name}" in console.file.getvalue() for name in generate.NAMES)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_interrupting_keeps_what_was_computed(smollm, tmp_path, monkeypatch, signal_name):
    """Ctrl-C in the middle of a forward pass: exit code 130, and the trace has every pass up to there."""
    path, model, calls = tmp_path / "trace.json", tiny("llama"), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 14:
            signal.raise_signal(getattr(signal, signal_name))
    model.model.layers[1].register_forward_pre_hook(interrupt)
    monkeypatch.setattr(generate.shared_cache, "load_model", lambda *_: (model, smollm[1]))
    assert generate.main(["--save", str(path), "--max-passes", "30"]) == 130
    trace = json.loads(path.read_text())
    assert trace["ending"] == "interrupted" and len(trace["passes"]) == 14 - 2 - 2 - 1  # probes, prompt and separators, itself


def test_a_model_that_fails_in_the_middle_keeps_the_trace(smollm, tmp_path, monkeypatch, capsys):
    """An error in pass 8: exit code 1, one sentence, and 7 passes in the trace, with the traceback in it."""
    model, tokenizer = copy.deepcopy(smollm[0]), smollm[1]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 14:
            raise RuntimeError("the device is on fire")
    model.model.layers[0].register_forward_pre_hook(fail)
    monkeypatch.setattr(generate.shared_cache, "load_model", lambda *_: (model, tokenizer))
    path = tmp_path / "trace.json"
    assert generate.main(["--save", str(path), "--max-passes", "30"]) == 1
    trace = json.loads(path.read_text())
    assert 1 <= len(trace["passes"]) < 14 and "on fire" in trace["error"] and trace["ending"].startswith("failed")
    assert "on fire" in capsys.readouterr().err
