"""Chapter 4: the fast function against a spelled-out oracle, its gradients, and whole models through the hooks."""
import copy
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

attend = import_module("04_query_rotation")
layouts = import_module("03_layouts")
shared_cache = import_module("02_shared_cache")
rope = import_module("01_rope_shift")


def place(x, positions, inv_freq, last):
    """The oracle's own rotation, as complex numbers in float64: x [heads, S, D] turned to `positions` [S]."""
    half, x = len(inv_freq), x.double()
    first = x.shape[-1] - 2 * half if last else 0
    pairs = torch.complex(x[..., first:first + half], x[..., first + half:first + 2 * half])
    turned = pairs * torch.polar(torch.ones(1, dtype=torch.float64), positions.double()[:, None] * inv_freq)
    out = x.clone()
    out[..., first:first + half], out[..., first + half:first + 2 * half] = turned.real, turned.imag
    return out


def naive(q, k, v, views, index, worker, inv_freq, last, scale, window):
    """Lay out each token's view slot by slot, at absolute positions, and attend: float64, one plain softmax.

    `views[w]`: the (start, length) of each block in worker w's order, its own block last; `index[n]`: in-block index.
    """
    outputs = []
    for n in range(q.shape[1]):
        spans, p = views[worker[n]], index[n]
        own = sum(length for _, length in spans[:-1])  # where the own block begins in the view
        slots = torch.tensor([start + j for start, length in spans for j in range(length)])
        stored = torch.tensor([j for _, length in spans for j in range(length)])
        here = torch.arange(len(slots))
        keys = place(place(k[:, slots], -stored, inv_freq, last), here, inv_freq, last)  # from in-block to in-view
        query = place(place(q[:, n:n + 1], torch.tensor([-p]), inv_freq, last), torch.tensor([own + p]), inv_freq, last)
        seen = (here <= own + p) & (own + p - here < (window or 10**9))
        group = q.shape[0] // k.shape[0]
        keys, values = keys[:, seen].repeat_interleave(group, 0), v[:, slots[seen]].double().repeat_interleave(group, 0)
        outputs.append((scale * query @ keys.transpose(1, 2)).softmax(-1) @ values)
    return torch.cat(outputs, 1)


@st.composite
def cases(draw):
    """A random memory with random views: (seed, tensors' shapes, blocks, views, new tokens)."""
    workers, extra = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    new = draw(st.lists(st.integers(0, 5), min_size=workers, max_size=workers).filter(sum))
    old = draw(st.lists(st.sampled_from([0, 0, 1, 2, 9, 40, 300]), min_size=workers + extra, max_size=workers + extra))
    heads, group, half = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([2, 4, 8]))
    size = 2 * half + draw(st.sampled_from([0, 0, 6]))
    views = []
    for w in range(workers):
        others = [b for b in range(workers + extra) if b != w]
        views.append([*draw(st.lists(st.sampled_from(others), max_size=5) if others else st.just([])), w])
    window = draw(st.sampled_from([None, None, 1, 7, 50, 400]))
    return draw(st.integers(0, 2**31)), new, old, heads, group, half, size, views, window, draw(st.booleans())


def build(case, dtype=torch.float32):
    """Tensors and tables of a case; a block that stands several times in a view becomes several rows."""
    seed, new, old, heads, group, half, size, views, window, last = case
    torch.manual_seed(seed)
    cache = shared_cache.SharedCache([o + max(new) + 1 for o in old], ropes=[])
    writing = [w for w in range(len(new)) if new[w]]
    cache.append({b: length for b, length in enumerate(old)})
    cache.append({w: new[w] for w in writing})
    rows, row_views = [], []
    for view in views:  # rows of its own for every view: tables must not care
        row_views.append([*range(len(rows), len(rows) + len(view))])
        rows += [cache.blocks[b] for b in view]
    tables = layouts.fill_tables(rows, [(row_views[w], new[w]) for w in writing])
    q = torch.randn(heads * group, sum(new), size, dtype=dtype)
    k, v = torch.randn(heads, cache.slots, size, dtype=dtype), torch.randn(heads, cache.slots, size + 2, dtype=dtype)
    used = torch.zeros(cache.slots, dtype=torch.bool)
    for block in cache.blocks:
        used[block.start:block.start + block.length] = True
    k[:, ~used], v[:, ~used] = float("nan"), float("nan")  # memory that nobody wrote must not be read
    rotation = rope.Rope(10.0 ** -torch.arange(half).double(), rotates_last=last)
    spans = [[(cache.blocks[b].start, cache.blocks[b].length) for b in view] for view in views]
    worker = [w for w in writing for _ in range(new[w])]
    index = [old[w] + i for w in writing for i in range(new[w])]
    arguments = (q, k, v, tables, rotation, size ** -0.5, window)
    return arguments, naive(q, k, v, spans, index, worker, rotation.inv_freq, last, size ** -0.5, window)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_both_functions_equal_the_oracle(case):
    """Any blocks, orders, repetitions, ragged input, head ratios, windows: float32 within 1e-5 of float64.

    1e-5: outputs are of size 1, and float32 sums of a few hundred terms keep 1e-6.
    """
    arguments, expected = build(case)
    for function in (attend.attention, attend.attention_spec):
        result = function(*arguments)
        error = (result - expected).abs()
        assert error.max() <= 1e-5, f"{function.__name__}: max {error.max():.1e}, mean {error.mean():.1e}"


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_loses_only_its_own_bits(case, dtype):
    """bfloat16 keeps 8 bits, float16 11: weights and outputs are rounded once each, scores not at all.

    So the error stays within a few units in the last place of the largest value (about 4): 3 * 4 * 2^-9 and 2^-12.
    """
    arguments, expected = build(case, dtype)
    result = attend.attention(*arguments)
    assert result.dtype == dtype
    bound = 12 * torch.finfo(dtype).eps / 2
    assert (result.double() - expected).abs().max() <= bound


@settings(deadline=None, max_examples=25)
@given(cases())
def test_gradients_equal_those_of_the_oracle(case):
    """The gradients with respect to queries, keys and values are those of the spelled-out computation."""
    (q, k, v, tables, rotation, scale, window), _ = build(case)
    q, k, v = (x.nan_to_num().requires_grad_() for x in (q, k, v))
    loss_weights = torch.randn(q.shape[0], q.shape[1], v.shape[2])
    gradients = []
    for function in (attend.attention, attend.attention_spec):
        output = function(q, k, v, tables, rotation, scale, window)
        gradients.append(torch.autograd.grad((output * loss_weights).sum(), (q, k, v)))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4)
    assert gradients[0][2].abs().max() > 0.01


TINY = dict(vocab_size=256, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=2048)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
CONFIGS = {
    "llama": LlamaConfig(**TINY, head_dim=16), "yarn": LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN),
    "qwen2-window": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "qwen3": Qwen3Config(**TINY, head_dim=16), "phi3": Phi3Config(**TINY, pad_token_id=0, sliding_window=20),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2),
    "deepseek": DeepseekV3Config(**{**TINY, "num_key_value_heads": 6}, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8,
                                 qk_nope_head_dim=12, v_head_dim=10, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                                 topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_text_in_many_blocks_equals_the_stock_model(name):
    """A text cut into blocks, written over several ragged passes and moved around, has the stock model's logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval().requires_grad_(False)
    ids = torch.randint(1, 256, (90,))
    stock = model(ids[None]).logits[0]
    cache = shared_cache.SharedCache([90, 40, 40], attend.attach(model))
    logits = torch.zeros_like(stock)

    def write(b, view, first, count):
        cache.append({b: count})
        tables = layouts.fill_tables(cache.blocks, [(view, count)])
        logits[first:first + count] = attend.forward(model, cache, tables, ids[first:first + count], range(count))

    write(0, [0], 0, 30)
    write(1, [0, 1], 30, 13)
    write(2, [0, 1, 2], 43, 1)
    cache.move(1, 0)  # block 2 now follows block 0 directly
    write(2, [0, 2], 44, 20)
    cache.move(2, 0)
    write(1, [0, 1], 64, 26)
    assert (logits - stock).abs().max() < 1e-4 * stock.abs().max() and stock.abs().max() > 0.1


def test_models_that_would_be_answered_wrongly_are_refused():
    """Interleaved or missing rotation, soft-capped scores: an error of one sentence, never a wrong answer."""
    from transformers import CohereConfig, FalconConfig, Gemma2Config, SmolLM3Config
    tokens = dict(eos_token_id=1, bos_token_id=1, pad_token_id=0)
    refused = [(CohereConfig(**TINY, **tokens), "does not turn"),
               (SmolLM3Config(**TINY, **tokens, no_rope_layers=[1, 1, 0, 1]), "does not turn"),
               (FalconConfig(vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=6), "does not attend"),
               (Gemma2Config(**TINY, head_dim=16), "softcap")]
    for config, word in refused:
        with pytest.raises(ValueError, match=word) as refusal:
            attend.attach(AutoModelForCausalLM.from_config(config).eval())
        assert "\n" not in str(refusal.value)
    quarter = GPTNeoXConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert len(attend.attach(AutoModelForCausalLM.from_config(quarter).eval())) == 2  # a quarter of each head turns: fine


def test_an_attached_model_explains_itself():
    """Called without the shared cache, the model says how to get its own attention back, and that works."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    before = model(torch.arange(9)[None]).logits
    attend.attach(model)
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model(torch.arange(9)[None])
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


def test_packed_weights_multiply_like_the_originals():
    """pack_linears changes rounding only, in float32 and bfloat16, and leaves other dtypes alone."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 0)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32, bias=False)).to(dtype)
        for rows in (1, 2, 4, 300):
            x = torch.randn(1, rows, 64, dtype=dtype)
            for linear in model:
                linear.__dict__.pop("forward", None)
            before = model(x)
            after = shared_cache.pack_linears(model)(x)
            assert (after - before).abs().max() <= tolerance and before.abs().max() > 0.1


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_equal_the_cpu(device):
    """The same function on an accelerator."""
    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        pytest.skip(f"no {device} device here; the arithmetic is that of the CPU tests")
    q, k, v, tables = attend.example(500, 3)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    expected = attend.attention(q, k, v, tables, rotation, 0.125)
    result = attend.attention(q.to(device), k.to(device), v.to(device), tables, rotation, 0.125)
    assert (result.cpu() - expected).abs().max() < 1e-4
