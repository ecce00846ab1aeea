r"""Chapter 4: rotate the new queries, never the cached keys.

The problem. Chapter 3 says how far every cached key is from every new query, for each worker differently. The
obvious way to honour this rotates the keys of every block to their place in every worker's view, at every
layer, in every pass: the work grows with workers x cached tokens, and so does the memory traffic.

The way out (paper, section 3.4). A score depends on the distance alone, so moving the query by +d does the
same as moving the key by -d. There are few new queries and many cached keys. The model has rotated q_n to its
in-block index already; what is missing is the offset of each block:

    score(n, (b, j)) = < rotate(q_n, offset[b, n]), k_bj > * scale        for j < visible[b, n]

and one softmax runs over all blocks.

    attention_spec   what is meant, slowly: move the keys of each token's view, then attend
    attention        the same result, fast: each cached key is read once, for all workers and heads of its group
    forward          one forward pass of any Hugging Face model through it, for one run or for several at once

Three public hooks of transformers carry that, and no model class is touched: `position_ids` are in-block
indices; the `Cache` is chapter 2's; and `AttentionInterface` registers our attention by name. Extra keyword
arguments of `model(...)` reach it: that is how the tables get there. Left out: the same as one GPU kernel.

Run it: python 04_query_rotation.py
"""
from collections import namedtuple
from importlib import import_module
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")


def attention_spec(q, k, v, tables, rotation, scale, window=None):
    """The specification: every token's view is laid out in full, its keys moved into place, and attended to.

    Args:
        q: [Hq, N, D] new queries, each rotated to its in-block index by the model.
        k, v: [Hk, S, D] and [Hk, S, Dv], the memory of this layer; the new tokens are in it already.
        tables: the pass's Tables (chapter 3).
        rotation: the layer's Rope (chapter 1).
        scale: factor on the scores.
        window: a sliding window; a key is seen at distances 0 ... window - 1. None: no limit.
    Returns:
        [Hq, N, Dv] in the dtype of q.
    """
    outputs, group = [], q.shape[0] // k.shape[0]  # G
    for n in range(q.shape[1]):
        keys, values, distances = [], [], []
        for start, offset, visible in zip(tables.start, tables.offset[:, n], tables.visible[:, n]):
            seen = slice(int(start), int(start + visible))
            keys.append(rope.shift(k[:, seen].float(), -offset, rotation))
            values.append(v[:, seen].float())
            distances.append(tables.position[n] + offset - torch.arange(visible))
        keys = torch.cat(keys, 1).repeat_interleave(group, 0)  # [Hq, slots in view, D]
        values = torch.cat(values, 1).repeat_interleave(group, 0)  # [Hq, slots in view, Dv]
        scores = keys @ q[:, n].float()[..., None] * scale  # [Hq, slots in view, 1]
        if window is not None:
            far = (torch.cat(distances) >= window).to(q.device)
            scores = scores.masked_fill(far[:, None], float("-inf"))
        outputs.append((scores.softmax(1) * values).sum(1))  # [Hq, Dv]
    return torch.stack(outputs, 1).to(q.dtype)


def attention(q, k, v, tables, rotation, scale, window=None):
    """The same function as attention_spec, fast; same arguments, same result. Differentiable. CPU, CUDA, MPS.

    The queries of all workers and of the G heads that share a key are stacked into one matrix, so each key and
    value is read once. Scores and softmax are float32 in every dtype: keys are widened on the way, since a
    bfloat16 product would round each score to 8 bits (and is slower on a CPU). Only the weights are narrowed
    again, for the values.
    """
    cos, sin, parts = prepare(tables, rotation, window, q.device)
    heads, group, new = k.shape[0], q.shape[0] // k.shape[0], q.shape[1]  # Hk, G, N
    rotated = rope.rotate(q.float() * scale, cos, sin, rotation.rotates_last)  # [rows, Hq, N, D]
    rotated = rotated.reshape(-1, heads, group * new, q.shape[2]).unbind()  # per row: [Hk, G*N, D]
    scores = []  # per row: [Hk, G*N, slots]
    for slots, rows in parts:
        keys = read(k, slots).float().transpose(1, 2)  # [Hk, D, slots of all these rows]
        for row, its_keys in zip(rows, keys.split([row.size for row in rows], -1)):
            score = rotated[row.number] @ its_keys
            if row.hidden is not None:
                score = score.view(heads, group, new, -1).masked_fill(row.hidden, float("-inf")).view(score.shape)
            scores.append(score)
    weights = torch.cat(scores, -1).softmax(-1).to(v.dtype)  # [Hk, G*N, all slots]: one softmax over all blocks
    output, sizes = 0, [sum(row.size for row in rows) for _, rows in parts]
    for weight, (slots, _) in zip(weights.split(sizes, -1), parts):
        output = output + weight @ read(v, slots)  # [Hk, G*N, Dv]
    return output.reshape(q.shape[0], new, -1)


# -------------------------------------------------------------- what all layers of a pass share, made once

# A row that some token sees. number: its place among them; start, size: its slots in the memory, as far as
# they are seen; hidden: [N, size] which of them a token does not see, or None if everybody sees all.
Row = namedtuple("Row", "number start size hidden")

# Rows of up to so many slots are copied side by side before they are used, so that a dozen tiny reads become
# one. At 512 tokens and 4 workers that saves a quarter (float32) to two fifths (bfloat16) of the attention.
SHORT = 256


def prepare(tables, rotation, window, device):
    """What the attention of a pass needs besides q, k and v: (cos, sin, parts); made once for layers of a kind.

    cos, sin: [rows, 1, N, R/2], the rotation of each query for each row that anybody sees.
    parts: pairs (slots, rows that are read together); see `read`.
    """
    kind = rotation, window, device
    if kind not in tables.derived:
        rows = visible_rows(tables, window, device)
        short = [row for row in rows if row.size <= SHORT]
        parts = [(slice(row.start, row.start + row.size), [row]) for row in rows if row.size > SHORT]
        if short:
            slots = torch.cat([torch.arange(row.start, row.start + row.size) for row in short])
            parts.append((slots.to(device), short))
        seen = (tables.visible > first_slots(tables, window)).any(1)  # [B]
        cos, sin = rope.cos_sin(rotation, tables.offset[seen])  # [rows, N, R/2]
        tables.derived[kind] = cos[:, None].to(device), sin[:, None].to(device), parts
    return tables.derived[kind]


def first_slots(tables, window):
    """[B, N] the first slot of each row that is near enough to each token: 0 without a window."""
    if window is None:
        return torch.zeros_like(tables.visible)
    return (tables.position + tables.offset - window + 1).clamp(min=0)


def visible_rows(tables, window, device):
    """The rows of the tables that some token sees, as a list of Row."""
    rows, first = [], first_slots(tables, window)
    for b, sees in enumerate(first < tables.visible):  # sees: [N]
        if sees.any():
            low, high = int(first[b][sees].min()), int(tables.visible[b][sees].max())
            j = torch.arange(low, high)
            hidden = (j >= tables.visible[b][:, None]) | (j < first[b][:, None])  # [N, size]
            hidden = hidden.to(device) if hidden.any() else None
            rows.append(Row(len(rows), int(tables.start[b]) + low, high - low, hidden))
    return rows


def read(memory, slots):
    """Slots of memory [Hk, S, D]: a slice in place, an index [n] as a copy."""
    return memory[:, slots] if isinstance(slots, slice) else memory.index_select(1, slots)


# ------------------------------------------------------------------------------- the hooks of Hugging Face

def hook(module, query, key, value, attention_mask, scaling=None, hogwild=None, sliding_window=None, **others):
    """What a model calls instead of its own attention: query [1, Hq, N, D] -> [1, N, Hq, Dv].

    Every run in the pass attends for itself, with its own tables: strangers share weights, never scores.
    """
    if hogwild is None:
        raise RuntimeError("this model is attached to the shared cache: call it through forward(), or give it its "
                           "own attention back with model.set_attn_implementation('sdpa')")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"the attention of this {module.config.model_type} model uses {name}, "
                             "which is not implemented here")
    cache, tables, function = hogwild
    layer = module.layer_idx
    if cache.ropes[layer].rotates_last:  # latent attention: only now are keys and values there to be kept
        cache.write(layer, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query[0].split([len(of_run.position) for of_run in tables], 1)  # per run: [Hq, its N, D]
    outputs = [function(q, cache.keys[layer], cache.values[layer], of_run, cache.ropes[layer], scale, sliding_window)
               for q, of_run in zip(queries, tables)]
    return torch.cat(outputs, 1).transpose(0, 1)[None].contiguous(), None


def attach(model):
    """Let `model` attend through the shared cache. Returns the Rope of every layer, checked against the model.

    Raises:
        ValueError: this model's positions cannot be moved.
    """
    config = model.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if strange or not config.num_hidden_layers:
        raise ValueError(f"{config.model_type!r} has layers without an attention cache, or no layers "
                         f"({', '.join(sorted(strange)) or 0})")
    ropes = rope.layer_ropes(config)
    AttentionInterface.register("hogwild", hook)
    AttentionMaskInterface.register("hogwild", lambda *args, **kwargs: None)  # the tables replace all masks
    model.set_attn_implementation("hogwild")
    probe(model, ropes)
    return ropes


def probe(model, ropes, distance=1000):
    """Raise ValueError unless the model rotates its keys as `ropes` say. (The config says how; the model knows.)

    Eight tokens are encoded at position 0 and again at `distance`, where rounding has not begun to matter and
    every frequency has turned. Each stands alone in a block, so it attends to itself only, and its two keys must
    differ by a shift. An offset of -distance keeps the token at distance 0 from itself, which sliding windows
    look at. What this cannot see: a wrong sign of the *query's* rotation, since all distances here are 0.
    """
    cache, tokens, kind = shared_cache.SharedCache(ropes), 8, model.config.get_text_config().model_type
    for position in (0, distance):
        blocks = [cache.block(1) for _ in range(tokens)]
        cache.reserve([(block, 1) for block in blocks])
        tables = layouts.fill_tables([([block], 1) for block in blocks])
        tables.position.fill_(position)
        tables.offset.fill_(-position)
        try:
            forward(model, cache, [tables], range(tokens), [0])
        except RuntimeError as error:
            raise ValueError(f"{kind!r} models cannot attend through the shared cache: {error}") from error
    for layer, keys in cache.keys.items():
        expected = rope.shift(keys[:, :tokens], distance, ropes[layer]).float()
        error = (expected - keys[:, tokens:]).norm() / expected.norm()
        if not error < 0.02:  # bfloat16 keys differ by 0.004, keys that are rotated in another way by about 1
            raise ValueError(f"layer {layer} of this {kind!r} model does not turn its keys by half-split rotary "
                             f"embeddings with the frequencies of its config (relative error {error:.2f})")


def check_attached(model):
    """Raise ValueError unless the model calls `hook`."""
    if model.config.get_text_config()._attn_implementation != "hogwild":
        raise ValueError("this model does not attend through the shared cache: transformers cannot give it another "
                         "attention, or it was given another one after attach()")


def forward(model, cache, tables, ids, last, function=attention):
    """One forward pass over N new tokens, all workers of all runs packed into one row.

    Args:
        model: attached to the shared cache; ids: [N] token ids, in the order of `cache.reserve`.
        tables: a list of Tables, one per run; the runs follow each other in the row.
        last: indices of the tokens whose logits are wanted (each worker's last one).
        function: `attention`, or another one of the same signature.
    Returns:
        logits [len(last), vocabulary].
    """
    check_attached(model)
    position = torch.cat([of_run.position for of_run in tables])  # [N]
    ids, last, position = (torch.as_tensor(t, device=model.device) for t in (ids, last, position))
    with torch.no_grad():
        output = model(ids[None], position_ids=position[None], past_key_values=cache, use_cache=True,
                       logits_to_keep=last, hogwild=(cache, tables, function))
    return output.logits[0]


# ------------------------------------------------------------------------------------- what one can see

def naive_step(q, k, v, tables, rotation, scale):
    """The obvious engine: for every new token, copy and rotate the keys of its view, then call PyTorch's SDPA."""
    outputs, group = [], q.shape[0] // k.shape[0]
    for n in range(q.shape[1]):
        seen = [slice(int(s), int(s + m)) for s, m in zip(tables.start, tables.visible[:, n])]
        keys = torch.cat([rope.shift(k[:, s], -o, rotation) for s, o in zip(seen, tables.offset[:, n])], 1)
        values = torch.cat([v[:, s] for s in seen], 1)
        query = q[:, n].view(-1, group, q.shape[2])  # [Hk, G, D]
        outputs.append(F.scaled_dot_product_attention(query, keys, values, scale=scale))
    return torch.stack([output.flatten(0, 1) for output in outputs], 1)  # [Hq, N, D]


def example(cached, workers, dtype=torch.float32, heads=3, group=3, size=64):
    """Random memory in the combined layout: `cached` tokens of history, one new token per worker.

    Returns (q, k, v, tables).
    """
    cache, layout = shared_cache.SharedCache(ropes=[]), layouts.LAYOUTS["combined"]
    history, *own = (cache.block(length) for length in [cached, *(20 + 30 * (1 + w % 3) for w in range(workers))])
    words = {word: cache.block(6) for word in layout.separators(workers)}
    cache.reserve([(block, block.capacity) for block in cache.blocks])
    views = [layout.view(history, block, [b for b in own if b is not block], words) for block in own]
    k, v = torch.randn(2, heads, cache.slots, size, dtype=dtype)
    q = torch.randn(heads * group, workers, size, dtype=dtype)
    return q, k, v, layouts.fill_tables([(view, 1) for view in views])


def milliseconds(function, repeats=15):
    """Median duration after a warm-up."""
    times = []
    for _ in range(repeats + 3):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return 1e3 * median(times[3:])


def main():
    """Compare the two functions, time the fast one, and run a whole model through it."""
    torch.manual_seed(0)
    rotation, scale = rope.inverse_frequencies(LlamaConfig(head_dim=64)), 64 ** -0.5

    print("4 workers, combined layout, 1,000 tokens of history: the fast function against the specification")
    worst = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v, tables = example(1000, 4, dtype)
        exact = attention_spec(q.float(), k.float(), v.float(), tables, rotation, scale)
        worst[dtype] = (attention(q, k, v, tables, rotation, scale) - exact).abs().max().item()
        print(f"  {str(dtype)[6:]:9} largest error {worst[dtype]:.0e}   (outputs reach {exact.abs().max():.2f})")

    print("\nmilliseconds per layer, 4 workers, float32, one thread:")
    print("  cached   this function   rotating the keys   ratio")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for cached in (512, 2048, 8192):
        arguments = (*example(cached, 4), rotation, scale)
        fast, naive = (milliseconds(lambda: function(*arguments)) for function in (attention, naive_step))
        assert torch.allclose(attention(*arguments), naive_step(*arguments), atol=1e-5)
        print(f"  {cached:6,} {fast:15.2f} {naive:19.2f} {naive / fast:7.1f}")
    torch.set_num_threads(threads)
    print("  -> the longer the history, the more it pays to leave the keys alone")

    config = LlamaConfig(vocab_size=1000, hidden_size=144, intermediate_size=288, num_hidden_layers=4,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=16)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 1000, (60,))
    with torch.no_grad():
        stock = model(ids[None]).logits[0, -1]
    cache = shared_cache.SharedCache(attach(model))
    one, two = cache.block(40), cache.block(20)
    cache.reserve([(one, 40), (two, 20)])  # one text, cut in two blocks, both written in one pass
    tables = layouts.fill_tables([([one], 40), ([one, two], 20)])
    error = (forward(model, cache, [tables], ids, [59])[0] - stock).abs().max().item()
    print(f"\na whole model, its text cut in two blocks, against the stock model: largest difference {error:.0e}")
    assert worst[torch.float32] < 1e-5 and worst[torch.bfloat16] < 2e-2 and error < 1e-4
    print(f"[OK] rotated queries give the attention of rotated keys (float32: {worst[torch.float32]:.0e})")
    print("\nNext: chapter 5 makes one GPU kernel of it; chapter 6 lets the workers write.")


# Exercises
# 1. Count the multiplications of `attention` and of `naive_step` for 4 workers at 8,192 tokens. Does the ratio
#    explain the times?
# 2. Let `attention` keep bfloat16 scores (no .float() on the keys, .to(k.dtype) on `rotated`) and measure again.
# 3. Give the prompt a block of its own that stands twice in every view. Which tables change, and which code?

if __name__ == "__main__":
    main()
