"""Chapter 5: the kernel against an oracle (in Triton's interpreter, or on a GPU where there is one), and
what it compiles to."""
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch
from conftest import ROOT
from helpers import Launcher
from hypothesis import given, settings
from hypothesis import strategies as st
from test_04_query_rotation import Case, build
from transformers import LlamaConfig

pytest.importorskip("triton", reason="Triton is not installed here; chapter 6 then runs without it")
fused = import_module("05_triton_kernel")
attend = import_module("04_query_rotation")
layouts = import_module("03_layouts")
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
    """As in the tests of chapter 4, with real sizes of heads; (case for `build`, programs per head)."""
    workers, extra = draw(st.sampled_from([1, 2, 3, 4, 16])), draw(st.integers(0, 3))
    new = draw(st.lists(st.sampled_from([0, 1, 1, 1, 1, 2, 9]), min_size=workers, max_size=workers)
               .filter(lambda counts: 0 < sum(counts) <= 40))
    old = draw(st.lists(st.sampled_from([0, 0, 1, 2, 15, 63, 64, 65, 200]), min_size=workers + extra,
                        max_size=workers + extra))
    # The interpreter runs one program after the other, so chunks of queries are kept few.
    group = draw(st.sampled_from([g for g in (1, 2, 3, 4, 5, 7, 8, 16) if g * sum(new) <= 80]))
    heads = draw(st.sampled_from([1, 2]))
    sizes = [(4, 0), (16, 0), (20, 0), (32, 0), (64, 0), (128, 0), (8, 24), (32, 128)]
    half, rest = draw(st.sampled_from(sizes))
    views = []
    for w in range(workers):
        others = [b for b in range(workers + extra) if b != w]
        seen = st.lists(st.sampled_from(others), max_size=5) if others else st.just([])
        views.append([*draw(seen), w])
    window, last = draw(st.sampled_from([None, None, 1, 7, 50, 150])), draw(st.booleans())
    seed, size = draw(st.integers(0, 2**31)), 2 * half + rest
    splits = [None, 1, 2, 3] if sum(new) * group > 20 else [None, 1, 2, 3, 7, 30]
    case = Case(seed, new, old, heads, group, half, size, views, window, last)
    return case, draw(st.sampled_from(splits))


def run(arguments, splits):
    """The kernel on the arguments of chapter 4's function."""
    q, k, v, *rest = arguments
    return fused.attention(*(x.to(DEVICE) for x in (q, k, v)), *rest, splits=splits).cpu()


def some(examples):
    """Settings of Hypothesis. On a GPU, nearly every example is compiled anew, which takes seconds."""
    return settings(deadline=None, max_examples=examples if fused.INTERPRETED else 5)


@some(examples=40)
@given(cases())
def test_the_kernel_equals_the_oracle(case):
    """Any blocks, repetitions, ragged input, group sizes, head sizes, windows, numbers of programs.

    Memory that nobody wrote is NaN. 1e-5: outputs are of size 1; float32 sums of hundreds keep 1e-6.
    """
    arguments, expected = build(case[0])
    error = (run(arguments, case[1]) - expected).abs()
    assert error.max() <= 1e-5, f"max {error.max():.1e}, mean {error.mean():.1e}"


@some(examples=20)
@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_loses_only_its_own_bits(case, dtype):
    """Rotated queries, weights and the result are rounded: three times half a unit in the last place,
    each amplified by no more than the size of values (about 4) or scores (about 10, in the exponent).

    In the interpreter bfloat16 operands are float32, since its bfloat16 products are wrong: the bound is
    loose there.
    """
    arguments, expected = build(case[0], dtype)
    result = run(arguments, case[1])
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 40 * torch.finfo(dtype).eps / 2


def together(cases, dtype=torch.float32):
    """Several runs in one memory: (arguments of the kernel, the oracle's result, tokens of each)."""
    of_all, outputs = zip(*(build(case, dtype) for case in cases))
    tables, base = [], 0
    for _, k, _, of_run, *_ in of_all:
        tables.append(replace(of_run, start=base + of_run.start))
        base += k.shape[1]
    q, k, v = (torch.cat(part, 1) for part in [*zip(*of_all)][:3])
    sizes = [len(of_run.position) for of_run in tables]
    return (q, k, v, tables, *of_all[0][4:]), torch.cat(outputs, 1), sizes


@some(examples=6)
@given(st.lists(cases(), min_size=2, max_size=4))
def test_each_run_of_a_batch_meets_its_own_rows_alone(drawn):
    """Runs of one model in two launches: the oracle's result. And where one's memory holds NaN, which
    would come through with a weight of 0, the others' results are what they were, to the last bit."""
    (first, splits), *others = sorted(drawn, key=lambda case: case[0][4])  # the smallest groups for all
    runs = [first, *(first._replace(seed=case.seed, new=case.new, old=case.old, views=case.views)
                     for case, _ in others)]
    arguments, expected, sizes = together(runs)
    result = run(arguments, splits)
    assert (result - expected).abs().max() <= 1e-5
    q, k, v, tables, *rest = arguments
    last = tables[-1].start.min()  # its memory is behind that of all others
    k[:, last:], v[:, last:] = float("nan"), float("nan")
    again = run((q, k, v, tables, *rest), splits)
    assert torch.equal(again[:, :-sizes[-1]], result[:, :-sizes[-1]])
    assert again[:, -sizes[-1]:].isnan().all()


def test_what_the_first_kernel_leaves_unwritten_is_not_read(monkeypatch):
    """Its results begin as signalling NaNs: NumPy warns of whatever computes with one of them."""
    empty = torch.empty

    def signalling(*shape, **how):
        fresh = empty(*shape, **how)
        return fresh.view(torch.int32).fill_(0x7F800001).view(fresh.dtype) if fresh.dim() == 1 else fresh
    monkeypatch.setattr(torch, "empty", signalling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert max(fused.largest_errors(DEVICE, [1, 5, 40])) < 1e-5


def test_hidden_blocks_and_lone_tokens():
    """By hand: a row that nobody sees, an empty block, one of one token, cut blocks, idle programs."""
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


def test_the_picture_shows_what_the_programs_read(monkeypatch):
    """Values say which tile they are of, and all weights are 1: each program's sums, before they are
    merged, name the tiles that the picture gives it."""
    visible, left = torch.tensor([300, 5, 130, 64]), []
    tables = layouts.Tables(start=visible.cumsum(0) - visible, position=torch.tensor([0]),
                            offset=torch.zeros(4, 1).long(), visible=visible[:, None])
    tiles = [64 * row + j // 64 for row, length in enumerate(visible) for j in range(length)]
    number = torch.tensor([sorted({*tiles}).index(tile) for tile in tiles])
    v = torch.nn.functional.one_hot(number, 64)[None].float()
    monkeypatch.setattr(fused, "merge", Launcher(lambda *given, **how: left.append(given[2])))
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    run((torch.zeros(1, 1, 64), torch.zeros(v.shape), v, tables, rotation, 1.0), 4)
    reads = left[0].view(4, -1, 64)[:, 0].cpu() > 0  # [programs, tiles]
    letters = "".join(line.split()[1] for line in fused.picture(tables, "abcd", 4).splitlines())
    assert [reads[:, tile].nonzero().flatten().tolist() for tile in range(10)] == [
        [ord(letter) - 65] for letter in letters] and "B" in letters


def test_an_early_launch_can_be_asked_for_at_any_time(monkeypatch):
    """Also when the device has been asked before what it can do."""
    launches = []
    for name in ("kernel", "merge"):
        monkeypatch.setattr(fused, name, Launcher(lambda grid, *_, **how: launches.append(how)))
    q, k, v, tables = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in attend.example(20, 1))
    for early in (False, True):
        monkeypatch.setattr(fused, "EARLY", early)
        fused.attention(q, k, v, tables, rope.inverse_frequencies(LlamaConfig(head_dim=64)), 0.125)
    assert [how["launch_pdl"] for how in launches] == [False, False, True, True]


def test_what_cannot_work_is_refused():
    """Gradients, and tensors that are not on a GPU."""
    q, k, v, tables = attend.example(20, 1)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    with pytest.raises(ValueError, match="gradients"):
        fused.attention(q.requires_grad_(), k, v, tables, rotation, 0.125)
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom importlib import import_module\n"
            "fused, attend, rope = map(import_module, ('05_triton_kernel', '04_query_rotation', "
            "'01_rope_shift'))\nq, k, v, t = attend.example(20, 1)\n"
            "fused.attention(q, k, v, t, rope.Rope(attend.torch.ones(32).double()), 0.1)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                            env={**os.environ, "TRITON_INTERPRET": "0"})
    assert "ValueError: the kernel needs CUDA tensors" in result.stderr


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    """`check`, which chapter 6 asks before it uses the kernel."""
    fused.check(DEVICE)
    right = fused.attention
    monkeypatch.setattr(fused, "attention", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(RuntimeError, match="does not work on this device"):
        fused.check(DEVICE)


def test_without_triton_chapter_5_says_what_is_missing(tmp_path):
    """One sentence and a non-zero exit; importing it fails with the same sentence."""
    (tmp_path / "triton.py").write_text("raise ImportError('not here')")
    direct = subprocess.run([sys.executable, str(ROOT / "05_triton_kernel.py")], capture_output=True,
                            text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert direct.returncode == 1 and direct.stderr.startswith("chapter 5 needs Triton")
    assert direct.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------- what it compiles to

SHAPES = {"Llama-3-8B": (4, 128), "Qwen3-8B": (4, 128), "QwQ-32B": (5, 128), "Llama-3.2-1B": (4, 64),
          "Qwen3-0.6B": (2, 128)}
# Bytes that one program may have, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}

COMPILE = r"""
import json, os, re, subprocess, sys, tempfile
sys.path[:0] = [sys.argv[1]]
from importlib import import_module
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
fused, rope = import_module("05_triton_kernel"), import_module("01_rope_shift")
pointers = dict(**dict.fromkeys(["q", "k", "v", "out"], "*bf16"), **dict.fromkeys(fused.TABLES, "*i32"),
                **dict.fromkeys(["cos", "sin", "results", "peaks", "totals"], "*fp32"), scale="fp32")
strides = ("q_head", "q_token", "k_head", "k_slot", "v_head", "v_slot")
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
def compiled(kernel, const, capability, how):
    # what a launch sees by itself: tensors, but for the tables, and strides are multiples of 16
    names = kernel.arg_names
    signature = {n: "constexpr" if n in const else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n][0] == "*" and n not in fused.TABLES or n in strides}
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned,
                       constexprs={(names.index(n),): value for n, value in const.items()})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=how)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                               check=True).stdout.decode()
    registers, stack, local = (int(re.search(word + r":(\d+)", usage)[1])
                               for word in ("REG", "STACK", "LOCAL"))
    return dict(registers=registers, spilled=stack + local, shared=made.metadata.shared,
                ptx=made.asm["ptx"], ttgir=made.asm["ttgir"])
for capability, group, size, new, memory, special in json.loads(sys.argv[2]):
    fused.EARLY = special == "early"
    rotation = rope.Rope(torch.ones((size // 2 if special != "partial" else size // 4)).double())
    most, how = fused.options(capability // 10, memory)
    const = fused.constants(group, new, size, size, 10, rotation, 9 if special == "window" else None,
                            torch.bfloat16, most)
    reports = [compiled(fused.kernel, const, capability, how)]
    for splits in (132,) if new > 1 else (16,):
        across = fused.power_of_two(splits)
        const = dict(GROUP=group, DV=size, M=const["M"], SPLITS=across, EARLY=fused.EARLY,
                     PIECE=min(const["DV_TILE"], max(16, 4096 // across)))
        reports.append(compiled(fused.merge, const, capability, how))
    print(json.dumps(reports))
"""


def test_it_compiles_for_gpus_without_spilling():
    """For sm_80, sm_89, sm_90, 1, 4 and 16 workers, windows, heads that rotate in part: no spilled
    registers, and shared memory suffices; keys are loaded across rows; nothing waits in turn.

    Read off the machine code that ptxas makes, and the code that Triton gives it; no GPU is needed.
    """
    jobs = [(capability, *shape, workers, memory, "") for capability, memory in SHARED_MEMORY.items()
            for shape in sorted(set(SHAPES.values())) for workers in (1, 4, 16)]
    jobs += [(*job[:-1], special) for special, job in product(["window", "partial", "early"], jobs[4::9])
             if special != "early" or job[0] >= 90]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, str(ROOT), json.dumps(jobs)],
                            capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
                            check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == len(jobs)
    for job, (kernel, merge) in zip(jobs, reports):
        for one in (kernel, merge):
            figures = one["registers"], one["spilled"], one["shared"]
            assert one["spilled"] == 0 < one["registers"] and one["shared"] <= job[4], (job, figures)
            assert ("griddepcontrol" in one["ptx"]) == (job[5] == "early")
            assert not re.search(r"\b(atom|red)\.", one["ptx"]), job  # nobody waits for anybody
        assert kernel["registers"] > 32 and re.search("mma.sync|wgmma", kernel["ptx"]), job
        assert_loads_run_ahead(kernel["ttgir"], 3 if job[0] == 89 else 4, 3 + (job[5] == "partial"))
        assert_all_loads_leave_together(merge["ttgir"])


def assert_loads_run_ahead(code, stages, loads):
    """There is one loop, over the tiles of all rows, and it has all copies of keys and values: those of
    the first tiles before it, and in it those of a tile that is `stages` - 1 ahead."""
    copy, (before, loop) = "ttg.async_copy_global_to_local", code.split("scf.for ")
    assert "scf.while" not in code
    assert before.count(copy) == loads * (stages - 1) and loop.count(copy) == loads
    waits = [int(n) for n in re.findall(r"ttg.async_wait .*?num = (\d+)", loop)]
    assert waits[0] >= loads * (stages - 2) and waits[1:] == [0]  # 0: at the end
    assert re.search(r"(\btt\.|group_)dot\b", loop)


def assert_all_loads_leave_together(code):
    """No loop, and no load whose address or condition was loaded."""
    assert "scf." not in code and code.count("tt.load") >= 6
    loaded = set()
    for line in code.splitlines():
        made, _, operation = line.partition(" = ")
        needs = set(re.findall(r"%[\w#]+", operation))
        assert "tt.load" not in operation or not needs & loaded, line
        if "tt.load" in operation or needs & loaded:
            loaded.add(made.strip())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: here, the kernel runs in "
                    "Triton's interpreter, and a Recorder stands in for CUDA graphs")
def test_on_a_gpu_the_kernel_is_compiled():
    """Where there is a GPU, the tests above ran on it, not in the interpreter."""
    assert not fused.INTERPRETED
