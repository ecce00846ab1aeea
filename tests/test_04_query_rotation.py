"""Chapter 4: the fast function against a spelled-out oracle, its gradients, whole models through the
hooks, and several runs in one pass."""
import copy
from collections import namedtuple
from functools import lru_cache
from importlib import import_module
from itertools import combinations

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
    """The oracle's rotation, complex numbers in float64: x [heads, S, D] rotated to `positions` [S]."""
    half, out = len(inv_freq), x.double().clone()
    first = x.shape[-1] - 2 * half if last else 0
    a, b = slice(first, first + half), slice(first + half, first + 2 * half)
    angles = positions.double()[:, None] * inv_freq  # [S, R/2]
    rotated = torch.complex(out[..., a], out[..., b]) * torch.exp(1j * angles)
    out[..., a], out[..., b] = rotated.real, rotated.imag
    return out


def naive(q, k, v, views, index, worker, inv_freq, last, scale, window):
    """Lay out each token's view slot by slot, at absolute positions, and attend: float64, one softmax.

    `views[w]`: the (start, length) of each block in worker w's order, its own block last; `worker[n]`:
    who writes token n; `index[n]`: its in-block index.
    """
    outputs = []
    for n in range(q.shape[1]):
        spans, p = views[worker[n]], index[n]
        own = sum(length for _, length in spans[:-1])  # where the own block begins in the view
        slots = torch.tensor([start + j for start, length in spans for j in range(length)])
        stored = torch.tensor([j for _, length in spans for j in range(length)])
        here = torch.arange(len(slots))
        keys = place(k[:, slots], -stored, inv_freq, last)  # [Hk, slots, D]: from in-block indices ...
        keys = place(keys, here, inv_freq, last)  # ... to in-view ones
        query = place(q[:, n:n + 1], torch.tensor([-p]), inv_freq, last)  # [Hq, 1, D]: the same
        query = place(query, torch.tensor([own + p]), inv_freq, last)
        seen = (here <= own + p) & (own + p - here < (window or 10**9))
        group = q.shape[0] // k.shape[0]
        keys = keys[:, seen].repeat_interleave(group, 0)  # [Hq, slots, D]
        values = v[:, slots[seen]].double().repeat_interleave(group, 0)  # [Hq, slots, Dv]
        outputs.append((scale * query @ keys.transpose(1, 2)).softmax(-1) @ values)
    return torch.cat(outputs, 1)


# A random memory with random views. new, old: how many tokens each block gets, and has already; the
# first len(new) blocks are the workers'. views: the numbers of the blocks that each of them sees.
Case = namedtuple("Case", "seed new old heads group half size views window rotates_last")


@st.composite
def cases(draw):
    """A random Case."""
    workers, extra = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    new = draw(st.lists(st.integers(0, 5), min_size=workers, max_size=workers).filter(sum))
    old = draw(st.lists(st.sampled_from([0, 0, 1, 2, 9, 40, 300]), min_size=workers + extra,
                        max_size=workers + extra))
    heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 5]))
    half = draw(st.sampled_from([2, 4, 8]))
    size = 2 * half + draw(st.sampled_from([0, 0, 6]))
    views = []
    for w in range(workers):
        others = [b for b in range(workers + extra) if b != w]
        seen = st.lists(st.sampled_from(others), max_size=5) if others else st.just([])
        views.append([*draw(seen), w])
    window, last = draw(st.sampled_from([None, None, 1, 7, 50, 400])), draw(st.booleans())
    return Case(draw(st.integers(0, 2**31)), new, old, heads, group, half, size, views, window, last)


def build(case, dtype=torch.float32):
    """(arguments of an attention function, the oracle's result); a case is what `cases` draws.

    The tables have rows for the views of those who write nothing, too: nobody sees these rows.
    """
    seed, new, old, heads, group, half, size, views, window, last = case
    torch.manual_seed(seed)
    cache, writing = shared_cache.SharedCache(ropes=[]), [w for w in range(len(new)) if new[w]]
    blocks = [cache.block(length + max(new) + 1) for length in old]
    cache.reserve(list(zip(blocks, old)))
    cache.reserve([(blocks[w], new[w]) for w in writing])
    of_blocks = [[blocks[b] for b in view] for view in views]
    rows = layouts.number_rows(of_blocks[::-1], {})
    tables = layouts.fill_tables([(of_blocks[w], new[w]) for w in writing], rows)
    q = torch.randn(heads * group, sum(new), size, dtype=dtype)
    k, v = (torch.randn(heads, cache.slots, width, dtype=dtype) for width in (size, size + 2))
    used = torch.zeros(cache.slots, dtype=torch.bool)
    for block in blocks:
        used[block.start:block.start + block.length] = True
    k[:, ~used], v[:, ~used] = float("nan"), float("nan")  # memory that nobody wrote must not be read
    rotation = rope.Rope(10.0 ** -torch.arange(half).double(), rotates_last=last)
    spans = [[(block.start, block.length) for block in view] for view in of_blocks]
    worker = [w for w in writing for _ in range(new[w])]
    index = [old[w] + i for w in writing for i in range(new[w])]
    arguments = (q, k, v, tables, rotation, size ** -0.5, window)
    return arguments, naive(q, k, v, spans, index, worker, rotation.inv_freq, last, size ** -0.5, window)


def too_slow(*_, **__):
    """Stands where the specification is, and what moves its keys, while the fast function computes."""
    raise AssertionError("attention calls attention_spec, or moves keys: it has to be another way")


@settings(deadline=None, max_examples=100)
@given(cases())
def test_both_functions_equal_the_oracle(case):
    """Any blocks, orders, repetitions, ragged input, groups, windows: float32 within 1e-5 of float64.

    1e-5: outputs are of size 1, and float32 sums of a few hundred terms keep 1e-6.
    """
    arguments, expected = build(case)
    for function in (attend.attention, attend.attention_spec):
        with pytest.MonkeyPatch.context() as patch:
            if function is attend.attention:
                patch.setattr(attend, "attention_spec", too_slow)
                patch.setattr(rope, "shift", too_slow)
            result = function(*arguments)
        error = (result - expected).abs()
        assert error.max() <= 1e-5, (f"{function.__name__} is off by {error.max():.1e} (mean "
                                     f"{error.mean():.1e}), views {case.views}")


@settings(deadline=None, max_examples=40)
@given(cases())
def test_nobody_reads_what_nobody_sees(case):
    """Of each row, from the first slot to the last that some token sees, near enough for its window; the
    long rows first."""
    (*_, tables, _, _, window), _ = build(case)
    rows, wanted = attend.visible_rows(tables, window), {}
    for b, (start, visible) in enumerate(zip(tables.start.tolist(), tables.visible)):
        j, distance = torch.arange(int(visible.max())), tables.position + tables.offset[b]
        seen = (j < visible[:, None]) & (distance[:, None] - j < (window or 10**9))  # [N, slots]
        if seen.any():
            slots = seen.any(0).nonzero().flatten().tolist()
            low, high = slots[0], slots[-1] + 1
            wanted[b] = range(start + low, start + high), ~seen[:, low:high]
    assert sorted(row.number for row in rows) == sorted(wanted)
    for number, slots, hidden in rows:
        right, rest = wanted[number]
        assert slots == right, f"of row {number}, {slots} is read, and {right} seen (window {window})"
        assert torch.equal(hidden, rest), f"row {number} hides other slots than a token does not see"
    long = [len(row.slots) > attend.SHORT for row in rows]
    assert long == sorted(long, reverse=True), "a short row stands before a long one"


def test_tables_serve_layers_of_every_kind():
    """What is kept with the tables of a pass is kept for one rotation and one window."""
    torch.manual_seed(0)
    q, k, v, tables = attend.example(300, 3)
    results = []
    for base in (1e4, 1e6):
        rotation = rope.Rope(base ** -(torch.arange(32).double() / 32))
        for window in (None, 90, 200):
            results.append(attend.attention_spec(q, k, v, tables, rotation, 0.5, window))
            for _ in range(2):
                result = attend.attention(q, k, v, tables, rotation, 0.5, window)
                assert (result - results[-1]).abs().max() <= 1e-5
    assert all((one - other).abs().max() > 1e-3 for one, other in combinations(results, 2))


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_loses_only_its_own_bits(case, dtype):
    """bfloat16 keeps 8 bits, float16 11: weights and outputs are rounded once each, scores not at all.

    So the error stays within a few units in the last place of the largest value (about 4): 3 * 4 * 2^-9
    and 3 * 4 * 2^-12.
    """
    arguments, expected = build(case, dtype)
    bound = 12 * torch.finfo(dtype).eps / 2
    for function in (attend.attention, attend.attention_spec):
        result = function(*arguments)
        assert result.dtype == dtype, f"{function.__name__} gives {result.dtype} for a q of {dtype}"
        error = (result.double() - expected).abs().max()
        assert error <= bound, f"{function.__name__} is off by {error:.1e} in {dtype}"


@settings(deadline=None, max_examples=25)
@given(cases())
def test_gradients_equal_those_of_the_oracle(case):
    """Gradients with respect to queries, keys and values are those of the spelled-out computation."""
    (q, k, v, tables, rotation, scale, window), _ = build(case)
    q, k, v = (x.nan_to_num().requires_grad_() for x in (q, k, v))
    loss_weights = torch.randn(q.shape[0], q.shape[1], v.shape[2])
    gradients = []
    for function in (attend.attention, attend.attention_spec):
        output = function(q, k, v, tables, rotation, scale, window)
        gradients.append(torch.autograd.grad((output * loss_weights).sum(), (q, k, v)))
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4)
    # A token's weights add up to 1, so what all values of a head get is what its outputs were given.
    given = loss_weights.unflatten(0, (k.shape[0], -1)).sum((1, 2))  # [Hk, Dv]
    assert torch.allclose(gradients[0][2].sum(1), given, atol=1e-4, rtol=1e-4)
    assert given.abs().max() > 1e-3


TINY = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
LATENT = {**TINY, "num_key_value_heads": 6, "q_lora_rank": None, "kv_lora_rank": 16,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
           "moe_intermediate_size": 16, "first_k_dense_replace": 1}
CONFIGS = {
    "llama": LlamaConfig(**TINY, head_dim=16),
    "yarn": LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN),
    "qwen2-window": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY, pad_token_id=0, sliding_window=20),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=16, sliding_window=16,
                               layer_types=["sliding_attention", "full_attention"] * 2),
    "deepseek": DeepseekV3Config(**LATENT, **EXPERTS),
}


IDS = torch.randint(1, 256, (90,), generator=torch.Generator().manual_seed(1))


@lru_cache
def make(name):
    """(a random model, the Rope of each of its layers, its logits of IDS with its own attention)."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)  # attention matters then
    stock = model(IDS[None]).logits[0]
    return model, attend.attach(model), stock


@pytest.mark.parametrize("name", CONFIGS)
def test_one_text_in_many_blocks_equals_the_stock_model(name):
    """Cut into blocks, written over several ragged passes and moved around: the stock model's logits."""
    model, ropes, stock = make(name)
    cache, logits = shared_cache.SharedCache(ropes), torch.zeros_like(stock)
    zero, one, two = map(cache.block, (90, 40, 40))

    def write(view, first, count):
        cache.reserve([(view[-1], count)])
        tables, ids = layouts.fill_tables([(view, count)]), IDS[first:first + count]
        logits[first:first + count] = attend.forward(model, cache, [tables], ids, range(count))

    write([zero], 0, 30)
    write([zero, one], 30, 13)
    write([zero, one, two], 43, 1)
    cache.move(one, zero)  # block two now follows block zero directly
    write([zero, two], 44, 20)
    cache.move(two, zero)
    write([zero, one], 64, 26)
    assert (logits - stock).abs().max() < 1e-4 * stock.abs().max() and stock.abs().max() > 0.1


@st.composite
def teams(draw):
    """A run: (layout, tokens of its prompt, new tokens of each worker in each of three passes)."""
    workers = draw(st.integers(1, 4))
    counts = st.lists(st.integers(0, 4), min_size=workers, max_size=workers)
    passes = draw(st.lists(counts, min_size=3, max_size=3))
    return draw(st.sampled_from([*layouts.LAYOUTS])), draw(st.integers(1, 30)), passes


class Team:
    """A run on a shared cache: what it feeds, pass by pass, and the logits that it got."""

    def __init__(self, cache, team, seed):
        self.cache, self.logits, (name, self.prompt, self.counts) = cache, [], team
        self.layout, self.generator = layouts.LAYOUTS[name], torch.Generator().manual_seed(seed)
        self.history = cache.block(60)
        self.words = {word: cache.block(2) for word in self.layout.separators(len(self.counts[0]))}
        self.own = [cache.block(12) for _ in self.counts[0]]

    def writers(self, number):
        """Pairs (view, count): the prompt and the separators first, then what the workers write."""
        if number == 0:
            words = list(self.words.values())
            return [([self.history], self.prompt),
                    *(([self.history, *words[:i + 1]], 2) for i in range(len(words)))]
        if number == 2 and self.layout.moves:
            self.cache.move(self.own[0], self.history)
        views = [self.layout.view(self.history, own, [other for other in self.own if other is not own],
                                  self.words) for own in self.own]
        return [(view, count) for view, count in zip(views, self.counts[number - 1]) if count]

    def contents(self):
        """Keys and values of all blocks with something in them, as a list of [Hk, length, D or Dv]."""
        blocks = [self.history, *self.words.values(), *self.own]
        spans = [slice(block.start, block.start + block.length) for block in blocks if block.length]
        return [layer[:, span] for memory in (self.cache.keys, self.cache.values)
                for layer in memory.values() for span in spans]


def play(name, teams, seeds):
    """Let runs share every pass, whoever of them has something to write. Returns their Teams."""
    model, ropes, _ = make(name)
    cache = shared_cache.SharedCache(ropes)
    teams = [Team(cache, team, seed) for team, seed in zip(teams, seeds)]
    for number in range(4):
        writers = {team: team.writers(number) for team in teams}
        writers = {team: pairs for team, pairs in writers.items() if pairs}
        sizes = [sum(count for _, count in pairs) for pairs in writers.values()]
        if sizes:
            cache.reserve([(view[-1], count) for pairs in writers.values() for view, count in pairs])
            tables = [layouts.fill_tables(pairs) for pairs in writers.values()]
            ids = torch.cat([torch.randint(1, 256, (size,), generator=team.generator)
                             for team, size in zip(writers, sizes)])
            logits = attend.forward(model, cache, tables, ids, range(sum(sizes)))
            for team, part in zip(writers, logits.split(sizes)):
                team.logits.append(part)
    return teams


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([*CONFIGS]), st.lists(teams(), min_size=2, max_size=5))
def test_several_runs_in_one_pass_get_what_each_gets_alone(name, several):
    """Any layouts, lengths, numbers of workers, pauses: each run has the logits that it has alone, and
    writes the same keys and values."""
    for seed, together in enumerate(play(name, several, range(len(several)))):
        alone, = play(name, [several[seed]], [seed])
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 and theirs.abs().max() > 1
        ours, theirs = together.contents(), alone.contents()
        assert len(ours) == len(theirs) > 0
        assert all((one - other).abs().max() <= 1e-4 for one, other in zip(ours, theirs))


def test_several_runs_attend_by_any_function():
    """`function` gets of each run its queries, the memory, its tables, and all that stands behind."""
    (q, _, _, one), (other, k, v, two) = (attend.example(20, workers) for workers in (2, 3))
    rest, calls = (rope.inverse_frequencies(LlamaConfig(head_dim=64)), 0.5, None), []

    def function(query, *others):
        calls.append((query.shape[1], others))
        return len(calls) * query
    both = torch.cat([q, other], 1)
    result = attend.run_by_run(both, k, v, [one, two], *rest, function=function)
    found = [(count, others[2:]) for count, others in calls]
    wanted = [(2, (one, *rest)), (3, (two, *rest))]
    assert found == wanted, f"`function` was called {len(calls)} times, and not once for each of 2 runs"
    assert all(others[0] is k and others[1] is v for _, others in calls)
    assert torch.equal(result, torch.cat([q, 2 * other], 1)), "the results are not those of `function`"


def test_models_that_would_be_answered_wrongly_are_refused():
    """Interleaved or missing rotation, soft-capped scores: one sentence, never a wrong answer."""
    from transformers import CohereConfig, FalconConfig, Gemma2Config, SmolLM3Config
    tokens = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
    small = {"vocab_size": 256, "num_hidden_layers": 2}
    falcon = FalconConfig(**small, hidden_size=48, num_attention_heads=6)
    refused = [(CohereConfig(**TINY, **tokens), "does not rotate"),
               (SmolLM3Config(**TINY, **tokens, no_rope_layers=[1, 1, 0, 1]), "does not rotate"),
               (falcon, "does not attend"), (Gemma2Config(**TINY, head_dim=16), "softcap"),
               (LlamaConfig(**{**TINY, "num_hidden_layers": 0}), "no layers")]
    for config, word in refused:
        model = AutoModelForCausalLM.from_config(config).eval()
        before = model.config._attn_implementation
        for _ in range(2):  # the second time, too: a model that fails is left as it was
            with pytest.raises(ValueError, match=word) as refusal:
                attend.attach(model)
            assert "\n" not in str(refusal.value) and model.config._attn_implementation == before
    quarter = GPTNeoXConfig(**small, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(quarter).eval()
    assert len(attend.attach(model)) == 2  # a quarter of each head rotates: fine
    model.forward = None
    assert len(attend.attach(model)) == 2  # and it is not tried again


def test_an_attached_model_explains_itself():
    """Called without the shared cache, it says how to get its own attention back, and that works; then
    forward() says that the model does not attend through the shared cache any more."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    before = model(torch.arange(9)[None]).logits
    cache = shared_cache.SharedCache(attend.attach(model))
    with pytest.raises(RuntimeError, match="set_attn_implementation"):
        model(torch.arange(9)[None])
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(torch.arange(9)[None]).logits, before)
    with pytest.raises(ValueError, match="does not attend through the shared cache"):
        attend.forward(model, cache, [layouts.fill_tables([])], [], [])


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
