r"""Chapter 4: rotate the new queries, never the cached keys.

The problem. Chapter 3 says how far every cached key is from every new query, for each worker differently. The obvious
way to honour this turns the keys of every block to their place in every worker's view, at every layer, in every pass:
the work grows with workers x cached tokens, and so does the memory traffic.

The way out (paper, section 3.4). A score depends on the distance alone, so it makes no difference whether the key is
moved by -d or the query by +d:

    score(n, (b, j)) = < rotate(q_n, offset[b, n]), k_bj > * scale        for j < visible[b, n]

(q_n comes from the model turned to its in-block index already; the offset is what is missing.) There are few new
queries and many cached keys. So: turn each query once per block, and one softmax runs over all blocks.

    attention_spec   what is meant, slowly: move the keys of each token's view, then attend
    attention        the same result, fast: each cached key is read once, for all workers and all heads of its group
    forward          one forward pass of any Hugging Face model through it

Three public hooks of transformers carry that, and no model class is touched: `position_ids` are in-block indices; the
`Cache` that a layer updates is chapter 2's; and `AttentionInterface` lets us register our own attention by name. Extra
keyword arguments of `model(...)` reach that function, which is how the tables get there.

What to notice: both functions have one signature, so a third one can take their place. Scores are float32 in every
dtype. Left out: the same as one GPU kernel (chapter 5), and what the workers write (chapter 6).

Run it: python 04_query_rotation.py
"""
from dataclasses import dataclass
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
        q: [Hq, N, D] new queries, each turned to its in-block index by the model.
        k, v: [Hk, S, D] and [Hk, S, Dv], the memory of this layer; the new tokens are in it already.
        tables: the pass's Tables (chapter 3).
        rotation: the layer's Rope (chapter 1).
        scale: factor on the scores.
        window: a sliding window; a key is seen at distances 0 ... window - 1. None: no limit.
    Returns:
        [Hq, N, Dv] in the dtype of q.
    """
    outputs = []
    for n in range(q.shape[1]):
        keys, values, distances = [], [], []
        for start, offset, visible in zip(tables.start, tables.offset[:, n], tables.visible[:, n]):
            seen = slice(int(start), int(start + visible))
            keys.append(rope.shift(k[:, seen].float(), -offset, rotation))
            values.append(v[:, seen].float())
            distances.append(tables.position[n] + offset - torch.arange(visible))
        group = q.shape[0] // k.shape[0]  # G
        keys = torch.cat(keys, 1).repeat_interleave(group, 0)  # [Hq, slots in view, D]
        values = torch.cat(values, 1).repeat_interleave(group, 0)  # [Hq, slots in view, Dv]
        scores = keys @ q[:, n].float()[..., None] * scale  # [Hq, slots in view, 1]
        if window is not None:
            far = (torch.cat(distances) >= window).to(q.device)
            scores = scores.masked_fill(far[:, None], float("-inf"))
        outputs.append((scores.softmax(1) * values).sum(1))  # [Hq, Dv]
    return torch.stack(outputs, 1).to(q.dtype)


# Rows of up to so many slots are copied side by side before they are used. A dozen tiny reads and products with the values
# become one: at 512 tokens, 4 workers, that saves a quarter (float32) to two fifths (bfloat16) of this function's time.
SHORT = 256


@dataclass
class Part:
    """Some rows whose slots are read together: all the short ones (gathered), or one long one (in place)."""

    rows: list  # which rows, counting only those that any token of the pass sees
    sizes: list  # slots per row
    slots: object  # where they are in the memory: a slice, or an index [sum(sizes)] (a list of pieces until it is complete)
    hidden: list  # per row: None, or a [N, size] mask of what a token does not see

    def read(self, memory):
        """The slots of these rows in memory [Hk, S, D]: [Hk, sum(sizes), D], a view where that is possible."""
        return memory[:, self.slots] if isinstance(self.slots, slice) else memory.index_select(1, self.slots)


def prepare(tables, rotation, window, device):
    """Everything about a pass that does not depend on q, k and v: (cos, sin, parts). All layers of a kind share it.

    cos, sin: [rows, 1, N, R/2], the residual rotation of each query for each row.
    """
    kind = rotation, window, device
    if kind not in tables.derived:
        tables.derived[kind] = derive(tables, *kind)
    return tables.derived[kind]


def derive(tables, rotation, window, device):
    """What `prepare` returns, made anew."""
    first = torch.zeros_like(tables.visible)  # [B, N] first slot that is near enough
    if window is not None:
        first = (tables.position + tables.offset - window + 1).clamp(min=0)
    sees = first < tables.visible  # [B, N]
    rows = sees.any(1).nonzero()[:, 0].tolist()
    parts, short = [], Part([], [], [], [])
    for i, b in enumerate(rows):
        low, high = int(first[b][sees[b]].min()), int(tables.visible[b][sees[b]].max())
        j = torch.arange(low, high)
        hidden = (j >= tables.visible[b][:, None]) | (j < first[b][:, None])  # [N, slots]
        hidden = hidden.to(device) if hidden.any() else None
        start = int(tables.start[b])
        if high - low > SHORT:
            parts.append(Part([i], [high - low], slice(start + low, start + high), [hidden]))
        else:
            for of_all, of_row in zip((short.rows, short.sizes, short.slots, short.hidden), (i, high - low, start + j, hidden)):
                of_all.append(of_row)
    if short.rows:
        short.slots = torch.cat(short.slots).to(device)
        parts.append(short)
    cos, sin = rope.cos_sin(rotation, tables.offset[rows])  # [rows, N, R/2]
    return cos[:, None].to(device), sin[:, None].to(device), parts


def attention(q, k, v, tables, rotation, scale, window=None):
    """The same function as attention_spec, fast; same arguments, same result. Differentiable. CPU, CUDA, MPS.

    The queries of all workers and of the G heads that share a key are stacked into one matrix, so each key and value is
    read once. Scores and softmax are float32 in every dtype: keys are widened on the way, since a bfloat16 product
    would round each score to 8 bits (and is slower on a CPU). Only the weights are narrowed again, for the values.
    """
    cos, sin, parts = prepare(tables, rotation, window, q.device)
    heads, group, new = k.shape[0], q.shape[0] // k.shape[0], q.shape[1]  # Hk, G, N
    turned = rope.rotate(q.float() * scale, cos, sin, rotation.rotates_last)  # [rows, Hq, N, D]
    turned = turned.reshape(-1, heads, group * new, q.shape[2])  # [rows, Hk, G*N, D]
    turned = turned.unbind()
    scores = []  # per row: [Hk, G*N, slots]
    for part in parts:
        keys = part.read(k).float().transpose(1, 2)  # [Hk, D, slots]
        for i, row_keys, hidden in zip(part.rows, keys.split(part.sizes, -1), part.hidden):
            score = turned[i] @ row_keys  # [Hk, G*N, D] x [Hk, D, slots of the row]
            if hidden is not None:
                score = score.view(heads, group, new, -1).masked_fill(hidden, float("-inf")).view(score.shape)
            scores.append(score)
    weights = torch.cat(scores, -1).softmax(-1).to(v.dtype)  # [Hk, G*N, all slots]: one softmax over all blocks
    output = 0
    for weight, part in zip(weights.split([sum(part.sizes) for part in parts], -1), parts):
        output = output + weight @ part.read(v)  # [Hk, G*N, Dv]
    return output.reshape(q.shape[0], new, -1)


# ------------------------------------------------------------------------------------------- the hooks of Hugging Face

def hook(module, query, key, value, attention_mask, scaling=None, hogwild=None, sliding_window=None, **others):
    """What a Hugging Face attention layer calls instead of its own attention. query: [1, Hq, N, D] -> [1, N, Hq, Dv]."""
    if hogwild is None:
        raise RuntimeError("this model is attached to the shared cache: call it through forward(), or give it its own "
                           "attention back with model.set_attn_implementation('sdpa')")
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unsupported:
        raise ValueError(f"the attention of this {module.config.model_type} model uses {unsupported[0]}, "
                         "which is not implemented here")
    cache, tables, function = hogwild
    layer = module.layer_idx
    if cache.ropes[layer].rotates_last:  # latent attention: only now are keys and values there to be kept
        cache.write(layer, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = function(query[0], cache.keys[layer], cache.values[layer], tables, cache.ropes[layer], scale, sliding_window)
    return output.transpose(0, 1)[None].contiguous(), None


def attach(model):
    """Let `model` attend through the shared cache. Returns the Rope of every layer, checked against the model itself.

    The config says how keys are turned; the model knows. So a few tokens are encoded at two places, and their keys must
    differ by a shift. (Alone in its block, a token attends to itself only, so nothing else differs.)
    Raises:
        ValueError: this model's positions cannot be moved.
    """
    config = model.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if strange:
        raise ValueError(f"{config.model_type!r} has layers without an attention cache ({', '.join(sorted(strange))})")
    ropes = rope.layer_ropes(config)
    AttentionInterface.register("hogwild", hook)
    AttentionMaskInterface.register("hogwild", lambda *args, **kwargs: None)  # the tables replace all masks
    model.set_attn_implementation("hogwild")
    tokens, distance = 8, 1000
    cache = shared_cache.SharedCache([1] * 2 * tokens, ropes)  # every token alone: 8 blocks here, 8 blocks there
    for position, blocks in ((0, range(tokens)), (distance, range(tokens, 2 * tokens))):
        cache.append(dict.fromkeys(blocks, 1))
        tables = layouts.fill_tables(cache.blocks, [([b], 1) for b in blocks])
        tables.position.fill_(position)
        tables.offset.fill_(-position)  # keeps the distance at 0, which sliding windows look at
        try:
            forward(model, cache, tables, range(tokens), [0])
        except RuntimeError as error:
            raise ValueError(f"{config.model_type!r} models cannot attend through the shared cache: {error}") from error
    for layer, keys in cache.keys.items():
        expected = rope.shift(keys[:, :tokens], distance, ropes[layer]).float()
        error = (expected - keys[:, tokens:]).norm() / expected.norm()
        if not error < 0.02:  # bfloat16 keys differ by 0.004, keys that are turned in another way by about 1
            raise ValueError(f"layer {layer} of this {config.model_type!r} model does not turn its keys by half-split "
                             f"rotary embeddings with the frequencies of its config (relative error {error:.2f})")
    return ropes


def check_attached(model):
    """Raise ValueError unless the model calls `hook`."""
    if model.config.get_text_config()._attn_implementation != "hogwild":
        raise ValueError("this model does not attend through the shared cache: transformers cannot give it another attention, "
                         "or it was given another one after attach()")


def forward(model, cache, tables, ids, last, function=attention):
    """One forward pass over N new tokens, all workers packed into one row.

    Args:
        model: attached to the shared cache; ids: [N] token ids, in the order in which `cache.append` gave out slots.
        last: indices of the tokens whose logits are wanted (each worker's last one).
        function: `attention`, or another one of the same signature.
    Returns:
        logits [len(last), vocabulary].
    """
    check_attached(model)
    ids, last, position = (torch.as_tensor(t, device=model.device) for t in (ids, last, tables.position))
    with torch.no_grad():
        output = model(ids[None], position_ids=position[None], past_key_values=cache, use_cache=True,
                       logits_to_keep=last, hogwild=(cache, tables, function))
    return output.logits[0]


# ---------------------------------------------------------------------------------------------------- what one can see

def naive_step(q, k, v, tables, rotation, scale):
    """The obvious engine: for every new token, copy and turn the keys of its view, then call PyTorch's own attention."""
    outputs, group = [], q.shape[0] // k.shape[0]
    for n in range(q.shape[1]):
        seen = [slice(int(s), int(s + m)) for s, m in zip(tables.start, tables.visible[:, n])]
        keys = torch.cat([rope.shift(k[:, s], -o, rotation) for s, o in zip(seen, tables.offset[:, n])], 1)
        values = torch.cat([v[:, s] for s in seen], 1)
        outputs.append(F.scaled_dot_product_attention(q[:, n].view(-1, group, q.shape[2]), keys, values, scale=scale))
    return torch.stack([output.flatten(0, 1) for output in outputs], 1)  # [Hq, N, D]


def example(cached, workers, dtype=torch.float32, heads=3, group=3, size=64):
    """Random memory in the combined layout, `cached` tokens of history, one new token per worker."""
    plan = layouts.layout("combined", workers)
    cache = shared_cache.SharedCache([cached] + [160] * max(plan.blocks), ropes=[])
    cache.append({0: cached, **{b: 20 + 30 * (b % 3) if b <= workers else 6 for b in range(1, len(cache.blocks))}})
    tables = layouts.fill_tables([cache.blocks[b] for b in plan.blocks], [(view, 1) for view in plan.views])
    k, v = torch.randn(2, heads, cache.slots, size, dtype=dtype)
    return torch.randn(heads * group, workers, size, dtype=dtype), k, v, tables


def milliseconds(function, repeats=15):
    """Median duration after a warm-up."""
    times = []
    for _ in range(repeats + 3):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return 1e3 * median(times[3:])


def main():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    rotation, scale = rope.inverse_frequencies(LlamaConfig(head_dim=64)), 64 ** -0.5

    print("4 workers, combined layout, 1,000 tokens of history: the fast function against the specification")
    worst = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v, tables = example(1000, 4, dtype)
        exact = attention_spec(q.float(), k.float(), v.float(), tables, rotation, scale)
        worst[dtype] = (attention(q, k, v, tables, rotation, scale) - exact).abs().max().item()
        print(f"  {str(dtype)[6:]:9} largest error {worst[dtype]:.0e}   (outputs reach {exact.abs().max():.2f})")

    print("\nmilliseconds per layer, 4 workers, float32, one thread:")
    print("  cached   this function   turning the keys   ratio")
    torch.set_num_threads(1)
    for cached in (512, 2048, 8192):
        q, k, v, tables = example(cached, 4)
        fast = milliseconds(lambda: attention(q, k, v, tables, rotation, scale))
        naive = milliseconds(lambda: naive_step(q, k, v, tables, rotation, scale))
        results = [function(q, k, v, tables, rotation, scale) for function in (attention, naive_step)]
        assert torch.allclose(*results, atol=1e-5)
        print(f"  {cached:6,} {fast:15.2f} {naive:18.2f} {naive / fast:7.1f}")
    torch.set_num_threads(threads)
    print("  -> the longer the history, the more it pays to leave the keys alone")

    config = LlamaConfig(vocab_size=1000, hidden_size=144, intermediate_size=288, num_hidden_layers=4,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=16)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 1000, (60,))
    with torch.no_grad():
        stock = model(ids[None]).logits[0, -1]
    cache = shared_cache.SharedCache([64, 64], attach(model))
    cache.append({0: 40, 1: 20})  # one text, cut in two blocks, both written in one pass
    tables = layouts.fill_tables(cache.blocks, [([0], 40), ([0, 1], 20)])
    hooked = forward(model, cache, tables, ids, [59])[0]
    error = (hooked - stock).abs().max().item()
    print(f"\na whole model, its text cut in two blocks, against the stock model: largest difference of a logit {error:.0e}")
    assert worst[torch.float32] < 1e-5 and worst[torch.bfloat16] < 2e-2 and error < 1e-4
    print(f"[OK] rotated queries give the attention of rotated keys (float32: {worst[torch.float32]:.0e})")
    print("\nNext: chapter 5 makes one GPU kernel of it; chapter 6 lets the workers write.")


# Exercises
# 1. Count the multiplications of `attention` and of `naive_step` for 4 workers at 8,192 tokens. Does the ratio explain
#    the times?
# 2. Let `attention` keep bfloat16 scores (no .float() on the keys, .to(k.dtype) on `turned`) and measure its error again.
# 3. Give the prompt a block of its own that stands twice in every view. Which tables change, and which code?

if __name__ == "__main__":
    main()
