"""Chapter 5: the kernel against an oracle (in Triton's interpreter, or on a GPU where there is one), and
what it compiles to."""
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
from test_04_query_rotation import build
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
    return (seed, new, old, heads, group, half, size, views, window, last), draw(st.sampled_from(splits))


def run(arguments, splits):
    """The kernel on the arguments of chapter 4's function."""
    q, k, v, *rest = arguments
    result = fused.attention(*(x.to(DEVICE) for x in (q, k, v)), *rest, splits=splits)
    assert torch.count_nonzero(fused.counters(result.device)) == 0
    return result.cpu()


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_kernel_equals_the_oracle(case):
    """Any blocks, repetitions, ragged input, group sizes, head sizes, windows, numbers of programs.

    Memory that nobody wrote is NaN. 1e-5: outputs are of size 1; float32 sums of hundreds keep 1e-6.
    """
    arguments, expected = build(case[0])
    error = (run(arguments, case[1]) - expected).abs()
    assert error.max() <= 1e-5, f"max {error.max():.1e}, mean {error.mean():.1e}"


@settings(deadline=None, max_examples=20)
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


def test_what_cannot_work_is_refused():
    """Gradients, and tensors that are not on a GPU."""
    q, k, v, tables = attend.example(20, 1)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    with pytest.raises(ValueError, match="gradients"):
        fused.attention(q.requires_grad_(), k, v, tables, rotation, 0.125)
    with pytest.raises(ValueError, match="several passes"):  # more key heads than counters
        many = [x.detach()[:1].expand(70000, -1, -1) for x in (q, k, v)]
        fused.attention(*many, tables, rotation, 0.125)
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
names = fused.kernel.arg_names
pointers = dict(q="*bf16", k="*bf16", v="*bf16", out="*bf16", cos="*fp32", sin="*fp32", start="*i64",
                position="*i64", offset="*i64", visible="*i64", first_tile="*i64", bounds="*i64",
                results="*fp32", peaks="*fp32", totals="*fp32", arrived="*i32", scale="fp32")
for capability, group, size, new, shared_memory in json.loads(sys.argv[2]):
    rotation = rope.Rope(torch.ones(size // 2).double())
    const = fused.constants(group, new, size, size, 10, rotation, None, torch.bfloat16)
    signature = {n: "constexpr" if n in const else pointers.get(n, "i32") for n in names}
    # what a launch sees by itself: tensors and strides are multiples of 16
    strides = ("q_head", "q_token", "k_head", "k_slot", "v_head", "v_slot")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n][0] == "*" or n in strides}
    source = ASTSource(fn=fused.kernel, signature=signature, attrs=aligned,
                       constexprs={(names.index(n),): value for n, value in const.items()})
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=fused.options(shared_memory))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, check=True)
    registers, stack, local = (int(re.search(word + r":(\d+)", usage.stdout.decode())[1])
                               for word in ("REG", "STACK", "LOCAL"))
    print(json.dumps(dict(registers=registers, spilled=stack + local, shared=made.metadata.shared,
                          matrix="mma.sync" in made.asm["ptx"] or "wgmma" in made.asm["ptx"],
                          pipelined="cp.async" in made.asm["ptx"])))
"""


def test_it_compiles_for_gpus_without_spilling():
    """For sm_80, sm_89, sm_90, 1, 4 and 16 workers: no spilled registers, and shared memory suffices.

    Read off the machine code that ptxas makes; no GPU is needed.
    """
    jobs = [(capability, *shape, workers, memory) for capability, memory in SHARED_MEMORY.items()
            for shape in sorted(set(SHAPES.values())) for workers in (1, 4, 16)]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE, str(ROOT), json.dumps(jobs)],
                            capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"},
                            check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(reports) == len(jobs)
    for job, report in zip(jobs, reports):
        assert report["spilled"] == 0 and report["shared"] <= SHARED_MEMORY[job[0]], (job, report)
        assert report["matrix"] and report["pipelined"] and report["registers"] > 32, (job, report)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: here, the kernel runs in "
                    "Triton's interpreter, and a Recorder stands in for CUDA graphs")
def test_on_a_gpu_the_kernel_is_compiled():
    """Where there is a GPU, the tests above ran on it, not in the interpreter."""
    assert not fused.INTERPRETED
