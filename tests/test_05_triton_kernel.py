"""Chapter 5: the kernel against chapter 4's specification (in Triton's interpreter, or on a GPU where there is one), what it
compiles to, and passes that are replayed."""
import gc
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_04_query_rotation import CONFIGS, build
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("triton", reason="Triton is not installed here; chapter 6 then runs without it")
fused = import_module("05_triton_kernel")
attend = import_module("04_query_rotation")
layouts = import_module("03_layouts")
shared_cache = import_module("02_shared_cache")
rope = import_module("01_rope_shift")

DEVICE = "cpu" if fused.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poison():
    """All memory that is not initialised holds NaN: outputs, and what programs leave for each other."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def cases(draw):
    """As in the tests of chapter 4, with the sizes of real heads; (case for `build`, programs per key head)."""
    workers, extra = draw(st.sampled_from([1, 2, 3, 4, 16])), draw(st.integers(0, 3))
    new = draw(st.lists(st.sampled_from([0, 1, 1, 1, 1, 2, 9]), min_size=workers, max_size=workers)
               .filter(lambda counts: 0 < sum(counts) <= 40))
    old = draw(st.lists(st.sampled_from([0, 0, 1, 2, 15, 63, 64, 65, 200]), min_size=workers + extra, max_size=workers + extra))
    # (the interpreter runs one program after the other, so chunks of queries are kept few)
    group = draw(st.sampled_from([g for g in (1, 2, 3, 4, 5, 7, 8, 16) if g * sum(new) <= 80]))
    heads = draw(st.sampled_from([1, 2]))
    half, rest = draw(st.sampled_from([(4, 0), (16, 0), (20, 0), (32, 0), (64, 0), (128, 0), (8, 24), (32, 128)]))
    views = []
    for w in range(workers):
        others = [b for b in range(workers + extra) if b != w]
        views.append([*draw(st.lists(st.sampled_from(others), max_size=5) if others else st.just([])), w])
    window = draw(st.sampled_from([None, None, 1, 7, 50, 150]))
    case = draw(st.integers(0, 2**31)), new, old, heads, group, half, 2 * half + rest, views, window, draw(st.booleans())
    return case, draw(st.sampled_from([None, 1, 2, 3] if sum(new) * group > 20 else [None, 1, 2, 3, 7, 30]))


def run(arguments, splits):
    """The kernel on the arguments of chapter 4's function."""
    q, k, v, *rest = arguments
    result = fused.attention(*(x.to(DEVICE) for x in (q, k, v)), *rest, splits=splits)
    assert torch.count_nonzero(fused.counters(result.device)) == 0
    return result.cpu()


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_kernel_equals_the_oracle(case):
    """Any blocks, repetitions, ragged input, group sizes, head sizes, windows, and numbers of programs: 1e-5 in float32.

    Memory that nobody wrote is NaN. 1e-5: outputs are of size 1, float32 sums of a few hundred terms keep 1e-6.
    """
    arguments, expected = build(case[0])
    error = (run(arguments, case[1]) - expected).abs()
    assert error.max() <= 1e-5, f"max {error.max():.1e}, mean {error.mean():.1e}"


@settings(deadline=None, max_examples=20)
@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_loses_only_its_own_bits(case, dtype):
    """Turned queries, weights and the result are rounded: three times half a unit in the last place, each amplified by no
    more than the size of values (about 4) or scores (about 10, in the exponent).

    In the interpreter bfloat16 operands are float32, since its bfloat16 products are wrong; so there the bound is loose.
    """
    arguments, expected = build(case[0], dtype)
    result = run(arguments, case[1])
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 40 * torch.finfo(dtype).eps / 2


def test_hidden_blocks_and_lone_tokens():
    """By hand: a row that nobody sees, an empty block, a block of one token, spans that cut a block, idle programs."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 300, 32)
    q, rotation = torch.randn(3, 2, 32), rope.inverse_frequencies(LlamaConfig(head_dim=32))
    tables = layouts.Tables(start=torch.tensor([0, 200, 201, 250]), position=torch.tensor([0, 9]),
                            offset=torch.tensor([[170, 170], [3, 0], [0, -5], [0, 40]]),
                            visible=torch.tensor([[170, 0], [0, 0], [1, 1], [0, 10]]))
    expected = attend.attention_spec(q, k, v, tables, rotation, 0.2)
    for splits in (1, 2, 3, 4, 5, 30):
        assert (run((q, k, v, tables, rotation, 0.2), splits) - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


def test_what_cannot_work_is_refused():
    """Gradients, and tensors that are not on a GPU."""
    q, k, v, tables = attend.example(20, 1)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    with pytest.raises(ValueError, match="gradients"):
        fused.attention(q.requires_grad_(), k, v, tables, rotation, 0.125)
    with pytest.raises(ValueError, match="several passes"):  # more key heads than counters
        fused.attention(q.detach()[:1].expand(70000, 1, 64), k[:1].expand(70000, -1, -1), v[:1].expand(70000, -1, -1), tables,
                        rotation, 0.125)
    run_without = "fused.attention(q, k, v, t, r, 0.1)"
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom importlib import import_module\n"
            "fused, attend, rope = map(import_module, ('05_triton_kernel', '04_query_rotation', '01_rope_shift'))\n"
            f"q, k, v, t = attend.example(20, 1); r = rope.Rope(attend.torch.ones(32).double())\n{run_without}")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                            env={**os.environ, "TRITON_INTERPRET": "0"})
    assert "ValueError: the kernel needs CUDA tensors" in result.stderr


def test_without_triton_chapter_5_says_what_is_missing(tmp_path):
    """One sentence and a non-zero exit; importing it fails with the same sentence."""
    (tmp_path / "triton.py").write_text("raise ImportError('not here')")
    run_it = subprocess.run([sys.executable, str(ROOT / "05_triton_kernel.py")], capture_output=True, text=True, check=False,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run_it.returncode == 1 and run_it.stderr.startswith("chapter 5 needs Triton") and run_it.stderr.count("\n") == 1


# -- what it compiles to ---------------------------------------------------------------------------------------------------

SHAPES = {"Llama-3-8B": (4, 128), "Qwen3-8B": (4, 128), "QwQ-32B": (5, 128), "Llama-3.2-1B": (4, 64), "Qwen3-0.6B": (2, 128)}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may have, by compute capability

COMPILE = r"""
import json, os, re, subprocess, sys, tempfile
sys.path[:0] = [sys.argv[1]]
from importlib import import_module
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
fused, rope = import_module("05_triton_kernel"), import_module("01_rope_shift")
names = fused.kernel.arg_names
pointers = dict(q="*bf16", k="*bf16", v="*bf16", out="*bf16", cos="*fp32", sin="*fp32", start="*i64", position="*i64",
                offset="*i64", visible="*i64", first_tile="*i64", bounds="*i64", results="*fp32", peaks="*fp32", totals="*fp32",
                arrived="*i32", scale="fp32")
for capability, group, size, new, shared_memory in json.loads(sys.argv[2]):
    rotation = rope.Rope(torch.ones(size // 2).double())
    const = fused.constants(group, new, size, size, 10, rotation, None, torch.bfloat16)
    signature = {n: "constexpr" if n in const else pointers.get(n, "i32") for n in names}
    # what a launch sees by itself: tensors and strides are multiples of 16
    strides = ("q_head", "q_token", "k_head", "k_slot", "v_head", "v_slot", "out_head", "out_token")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in strides}
    source = ASTSource(fn=fused.kernel, signature=signature, attrs=aligned,
                       constexprs={(names.index(n),): value for n, value in const.items()})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused.options(shared_memory))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(word + r":(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    print(json.dumps(dict(registers=registers, spilled=stack + local, shared=made.metadata.shared,
                          matrix="mma.sync" in made.asm["ptx"] or "wgmma" in made.asm["ptx"],
                          pipelined="cp.async" in made.asm["ptx"])))
"""


def test_it_compiles_for_gpus_without_spilling():
    """For sm_80, sm_89 and sm_90, 1, 4 and 16 workers: no spilled registers, shared memory within the limit.

    Read off the machine code that ptxas makes; no GPU is needed.
    """
    jobs = [(capability, group, size, workers, memory)
            for capability, memory in SHARED_MEMORY.items() for group, size in sorted(set(SHAPES.values()))
            for workers in (1, 4, 16)]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, str(ROOT), json.dumps(jobs)], capture_output=True,
                            text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == len(jobs)
    for job, report in zip(jobs, reports):
        assert report["spilled"] == 0 and report["shared"] <= SHARED_MEMORY[job[0]], (job, report)
        assert report["matrix"] and report["pipelined"] and report["registers"] > 32, (job, report)


# -- passes that are replayed ----------------------------------------------------------------------------------------------

class Recorder(TorchDispatchMode):
    """A CUDA graph in small, on the CPU: notes every operation with its very tensors, and can do them all again.

    Like the real one it freezes numbers that Python computed and addresses of tensors, and does not bear reading a tensor
    from Python. The kernel's launches are noted too.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Do an operation and note it."""
        if "_local_scalar_dense" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def launch(self, kernel):
        """A stand-in for the kernel that notes its launches, outside of which nothing of the interpreter is noted."""
        recorder = self

        class Launcher:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    with torch.utils._python_dispatch._disable_current_modes():
                        kernel[grid](*args, **kwargs)
                    recorder.calls.append((kernel[grid], args, kwargs, None))
                return launch
        return Launcher()

    def replay(self):
        """Do it all again, into the same memory."""
        for function, args, kwargs, output in self.calls:
            new = function(*args, **kwargs)
            for old, fresh in zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(new)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)


def record_on_cpu(monkeypatch):
    """Chapter 5's record_graph for the CPU, counting replays."""
    count = []

    def record(run):
        run()
        recorder = Recorder()
        with monkeypatch.context() as patch, recorder, torch.no_grad():
            patch.setattr(fused, "kernel", recorder.launch(fused.kernel))
            output = run()
        output.fill_(float("nan"))  # a real recording computes nothing

        def replay():
            count.append(1)
            with torch.no_grad():
                recorder.replay()
        return replay, output
    return record, count


@pytest.mark.parametrize("name", ["yarn", "gemma3"])
def test_replayed_passes_equal_eager_ones(name, monkeypatch):
    """14 passes of three workers with steps that end: logits as through chapter 4, although most passes are replays.

    On a GPU with CUDA graphs, elsewhere with the Recorder. Blocks grow, move and are cut between replays.
    """
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False).to(DEVICE)
    ropes = attend.attach(model)
    plan = layouts.layout("combined", 3)
    if DEVICE == "cpu":
        record, count = record_on_cpu(monkeypatch)
        decoder = fused.Decoder(record)
    else:
        decoder, count = fused.Decoder(), None
    engines = [(attend.forward, shared_cache.SharedCache([200, 40, 40, 40, 3, 3, 3], ropes)),
               (decoder, shared_cache.SharedCache([200, 40, 40, 40, 3, 3, 3], ropes))]
    generator, worst = torch.Generator().manual_seed(0), 0.0

    def feed(writers):
        nonlocal worst
        ids = torch.randint(1, 256, (sum(n for _, n in writers),), generator=generator)
        last, logits = torch.tensor([n for _, n in writers]).cumsum(0) - 1, []
        for forward, cache in engines:
            cache.append({plan.blocks[view[-1]]: n for view, n in writers})
            tables = layouts.fill_tables([cache.blocks[b] for b in plan.blocks], writers)
            logits.append(forward(model, cache, tables, ids, last).clone())
        assert logits[0].shape == logits[1].shape == (len(writers), 256)
        worst = max(worst, ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item())

    feed([([0], 70)])
    feed([(view, 2) for view in plan.separator_views.values()])
    for now in range(14):
        opens = now % 7 == 3
        if opens:
            for _, cache in engines:
                cache.move(1 + now % 3, 0)
        if now == 9:
            for _, cache in engines:
                cache.cut(2, 1)
        writing = plan.views if now % 11 else plan.views[:2]  # at times one of them pauses: another shape
        feed([(view, 5 if opens and w == now % 3 else 1) for w, view in enumerate(writing)])
    assert worst < 1e-5
    assert len(decoder.recorded) == 2 and (count is None or len(count) > 9)


class Outsiders(TorchDispatchMode):
    """Notes, without keeping them alive, the memories that operations read but did not make."""

    def __init__(self):
        super().__init__()
        self.made, self.outsiders = [], {}

    def note(self, tensors, inputs):
        """Note the storages of tensors that are read (inputs) or made."""
        for tensor in torch.utils._pytree.tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if inputs and all(storage._cdata != mine._cdata for mine in self.made):
                    self.outsiders.setdefault(storage._cdata, (tensor.shape, StorageWeakRef(storage)))
                elif not inputs and storage._cdata not in self.outsiders:
                    self.made.append(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Do an operation and note it."""
        self.note((args, kwargs), inputs=True)
        output = function(*args, **(kwargs or {}))
        self.note(output, inputs=False)
        return output

    def __getitem__(self, grid):
        """A launch of the kernel, which this object stands in for."""
        def launch(*args, **kwargs):
            self.note(args, inputs=True)
            with torch.utils._python_dispatch._disable_current_modes():
                self.kernel[grid](*args, **kwargs)
        return launch


@pytest.mark.skipif(DEVICE == "cuda", reason="watches operations on the CPU, in Triton's interpreter")
def test_what_a_recording_reads_stays_alive(monkeypatch):
    """A graph reads addresses, whoever owns them by then: all that it reads from outside must be kept by somebody."""
    modes = []

    def record(run):
        run()
        modes.append(Outsiders())
        modes[0].kernel = fused.kernel
        with monkeypatch.context() as patch, modes[0], torch.no_grad():
            patch.setattr(fused, "kernel", modes[0])
            return lambda: None, run()

    model = AutoModelForCausalLM.from_config(CONFIGS["gemma3"]).eval().requires_grad_(False)
    cache, decoder = shared_cache.SharedCache([30, 30], attend.attach(model)), fused.Decoder(record)
    for _ in range(2):
        cache.append({0: 1, 1: 1})
        decoder(model, cache, layouts.fill_tables(cache.blocks, [([1, 0], 1), ([0, 1], 1)]), [5, 6], [0, 1])
    gc.collect()
    outsiders = list(modes[0].outsiders.values())
    assert len(outsiders) > 30 and not [shape for shape, alive in outsiders if alive.expired()]


def test_the_decoder_is_chapter_4s_forward(monkeypatch):
    """Any `last`, another model, another cache: what was recorded for others is not replayed for them."""
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval().to(DEVICE) for _ in range(2)]
    ropes = [attend.attach(model) for model in models]
    record, count = record_on_cpu(monkeypatch)
    decoder = fused.Decoder(record if DEVICE == "cpu" else None)
    caches = [shared_cache.SharedCache([30, 30], ropes[0]) for _ in range(2)]
    for cache in caches:
        cache.append({0: 3})
        decoder(models[0], cache, layouts.fill_tables(cache.blocks, [([0], 3)]), [7, 8, 9], [2])
    for cache, model, last in ((0, 0, [0, 1]), (0, 0, [1, 0]), (0, 1, [0, 1]), (1, 1, [0, 1]), (1, 1, [1, 1])):
        logits = []
        for forward in (decoder, attend.forward):
            caches[cache].append({0: 1, 1: 1})
            tables = layouts.fill_tables(caches[cache].blocks, [([1, 0], 1), ([0, 1], 1)])
            logits.append(forward(models[model], caches[cache], tables, [5, 6], last).clone())
            caches[cache].cut(0, 3), caches[cache].cut(1, 0)
        assert torch.allclose(*logits, atol=1e-5), (cache, model, last)


@pytest.mark.parametrize("message", ["operation not permitted when stream is capturing\nand more", ""])
def test_what_cannot_be_recorded_runs_eagerly(message, capsys):
    """A model that reads a tensor from Python in its forward: one line of explanation, and the right logits."""
    def refuse(run):
        raise RuntimeError(message)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval().to(DEVICE)
    cache = shared_cache.SharedCache([30, 30], attend.attach(model))
    decoder = fused.Decoder(refuse)
    results = []
    for forward in (decoder, decoder, decoder, attend.forward):
        cache.append({0: 1})
        tables = layouts.fill_tables(cache.blocks, [([0], 1)])
        results.append(forward(model, cache, tables, [5], [0]))
        if len(results) < 4:
            cache.cut(0, 0)
    assert torch.allclose(results[0], results[3], atol=1e-5) and torch.allclose(results[2], results[3], atol=1e-5)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_chapter_6_writes_the_same_tokens(recorded, smollm, monkeypatch):
    """Two workers through the kernel write what they write through chapter 4's function: the real model, launch by launch,
    and a tiny one with recorded passes.

    Steps count as ended after a few words here, so that passes in which a worker opens a step come up too.
    """
    generate = import_module("06_generate")
    monkeypatch.setattr(generate, "step_ended", lambda text: len(text) > (60 if recorded else 18))
    monkeypatch.setattr(fused, "PROGRAMS_IN_THE_INTERPRETER", 3)
    fused.processors.cache_clear()
    model, tokenizer = import_module("test_06_generate").tiny("qwen3") if recorded else smollm[0], smollm[1]
    settings_ = generate.Settings(max_passes=20 if recorded else 4, prompt="{problem}", greedy=True, answer_tokens=2)
    record, count = record_on_cpu(monkeypatch)
    runs = [generate.Hogwild(model.to(DEVICE), tokenizer, "3 + 4?", settings_, forward)
            for forward in (attend.forward, fused.Decoder(record if recorded and DEVICE == "cpu" else None))]
    for run_ in runs:
        while run_.ending is None:
            run_.advance()
    model.to("cpu")
    assert [p["sampled"] for p in runs[0].passes] == [p["sampled"] for p in runs[1].passes]
    assert sum(len(p["closed"]) for p in runs[1].passes) >= 2 and (DEVICE == "cuda" or not recorded or len(count) >= 5)
    fused.processors.cache_clear()


def test_the_tables_of_the_appendix(tmp_path, monkeypatch, capsys):
    """appendix/speed.py prints the paper's two tables and writes them down; wrong wishes are refused in one sentence."""
    small = ["--shape", "smollm2-135m", "--layers", "1", "--dtype", "float32", "--workers", "1", "3", "--repeats", "3"]
    sizes = ["--tokens", "300", "600", "--attention-tokens", "300"]
    done = subprocess.run([sys.executable, str(ROOT / "appendix" / "speed.py"), "1", "2", *small, *sizes, "--device", "cpu",
                           "--json", "out.json"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["hardware"]["torch"] == torch.__version__
    first, second, *tables = report["passes"]
    assert first["tokens"] == 300 and first["who"] == ["stock", 1, 3] and min(first["ms"]) > 0
    rate = {t["who"]: t["values"][1] for t in tables if t["table"] == "tokens per second"}
    time = {t["who"]: t["values"][1] for t in tables if t["table"].startswith("seconds")}
    assert rate["3 workers"] == pytest.approx(3e3 / second["ms"][2])
    low, high = sorted((first["ms"][2], second["ms"][2]))  # 200 passes, none faster or slower than those measured
    assert 0.2 * low <= time["3 workers"] <= 0.2 * high
    assert [row["workers"] for row in report["attention"]] == [1, 3]
    assert all(row["share"] > 0 and row["set_up_ms"] < 5 and row["us"] > 0 for row in report["attention"])
    monkeypatch.syspath_prepend(ROOT / "appendix")
    speed = import_module("speed")
    for wrong, word in ((["4"], "no table"), (["--layers", "2"], "goes with"), (["--device", "cuda:77"], "not available"),
                         (["1", "--workers", "0"], "workers"), (["1", "--shape", "gpt"], "choose"),
                        (["2", "--attention-tokens", "50"], "at least"), (["1", "--json", "no/folder.json"], "be written")):
        monkeypatch.setattr(sys, "argv", ["speed.py", *wrong])
        try:
            code = speed.main()
        except SystemExit as refusal:
            code = refusal.code
        said = capsys.readouterr().err
        assert code == 2 and word in said and said.count("\n") == 1, said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the kernel runs in Triton's interpreter, "
                                                          "recordings on the Recorder")
def test_on_a_gpu_the_kernel_is_compiled():
    """Where there is a GPU, the tests above ran on it, not in the interpreter."""
    assert not fused.INTERPRETED
