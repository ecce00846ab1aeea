"""Chapter 2: the memory against plain lists of unrotated vectors, a model's keys moved in it, and what
is refused."""
from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import transformers as hf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers.integrations.sdpa_attention import sdpa_attention_forward

rope = import_module("01_rope_shift")
chapter = import_module("02_shared_cache")
check = partial(settings, deadline=None, max_examples=60)
U = 2.0 ** -24  # one float32 rounding changes a number by at most U times its size
ROTATION = 4 * U * 8  # a rotation is 4 roundings (cosine, sine, product, sum) of pairs shorter than 8
# Two layers that have nothing in common; the second rotates only the last 4 of 7 dimensions.
ROPES = [rope.Rope(torch.tensor([1.0, 0.01]).double()),
         rope.Rope(torch.tensor([0.7, 0.2]).double(), attention_scaling=1.2, rotates_last=True)]
LAYERS = [(2, 4, 4, ROPES[0]), (1, 7, 3, ROPES[1])]  # [heads, key size, value size, Rope]


def rotated(x, layer):
    """The oracle: x [heads, n, D] rotated to positions 0 ... n - 1, by complex numbers in float64."""
    x, half = x.double(), len(layer.inv_freq)
    first = x.shape[2] - 2 * half if layer.rotates_last else 0
    a, b = slice(first, first + half), slice(first + half, first + 2 * half)
    angles = torch.arange(x.shape[1])[:, None] * layer.inv_freq  # [n, R/2]
    z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles)
    return torch.cat([x[..., :first], z.real, z.imag, x[..., first + 2 * half:]], 2)


def write(cache, layer, keys, values):
    """What a model does at a layer with its new values and (rotated) keys [heads, N, D]."""
    latent = ROPES[layer].rotates_last  # then the cache is shown something else, and written to later
    new = (torch.randn(1, 1, keys.shape[1], 5),) * 2 if latent else (keys[None], values[None])
    returned = cache.update(*new, layer, {"sliding_window": None}, is_causal=True)
    assert returned[0] is new[0] and returned[1] is new[1]  # only the new ones come back
    if latent:
        cache.write(layer, keys, values)


class Memory(RuleBasedStateMachine):
    """Everything that a cache can do. The oracle: per block, a plain list of tokens, each of which is
    [(unrotated key, value) of each layer]."""

    @initialize(capacities=st.lists(st.sampled_from([20, 8, 3, 0]), min_size=2, max_size=4),
                seed=st.integers(0, 2 ** 32))
    def begin(self, capacities, seed):
        """A cache of a few empty blocks."""
        self.cache, self.generator = chapter.SharedCache(ROPES), torch.Generator().manual_seed(seed)
        self.capacities, self.tokens, self.moves, self.addresses = [], [], 0, []
        for capacity in capacities:
            self.make(capacity)

    @precondition(lambda self: len(self.capacities) < 8)
    @rule(capacity=st.sampled_from([5, 1, 0]))
    def make(self, capacity):
        """One more block, in free slots or behind all others; perhaps after others were written."""
        slots, fits = self.cache.slots, [s for s in self.cache.free if len(s) >= capacity]
        block = self.cache.block(capacity)
        assert block.start == (fits[0].start if fits else slots)
        assert (block.capacity, block.length) == (capacity, 0) and self.cache.blocks[-1] is block
        assert self.cache.slots == slots + (0 if fits else capacity)
        self.capacities.append(capacity)
        self.tokens.append([])

    @precondition(lambda self: len(self.tokens) > 2)
    @rule(data=st.data())
    def discard(self, data):
        """Blocks go, and what is in them, and their prompts; their slots are free, in order, and what
        lies side by side is one range."""
        blocks, numbers = self.cache.blocks[:], range(len(self.tokens))
        gone = data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=len(numbers) - 2,
                                  unique=True))
        self.cache.prompts = {block: [7] for block in blocks}
        self.cache.discard([blocks[b] for b in gone])
        stay = [blocks[b] for b in numbers if b not in gone]
        for b in sorted(gone, reverse=True):
            del self.tokens[b], self.capacities[b]
        assert self.cache.blocks == stay, "other blocks are left than those that were not discarded"
        assert [*self.cache.prompts] == stay, "`prompts` has others than the blocks that are left"
        free = self.cache.free
        assert all(one.start <= other.start and one.stop != other.start
                   for one, other in pairwise(free)), f"free ranges are ordered and joined, not {free}"

    def refuses(self, action, *args):
        """In one line; and nothing changes, which is checked after every rule."""
        slots = self.cache.new_slots
        with pytest.raises(chapter.BlockFull) as refusal:
            action(*args)
        assert self.cache.new_slots is slots and "\n" not in str(refusal.value)

    @rule(data=st.data())
    def reserve(self, data):
        """New tokens for some of the blocks, in any order."""
        order = data.draw(st.permutations(range(len(self.tokens))))[:data.draw(st.integers(1, 3))]
        counts = {b: data.draw(st.integers(0, 6)) for b in order}
        writers = [(self.cache.blocks[b], count) for b, count in counts.items()]
        if any(len(self.tokens[b]) + count > self.capacities[b] for b, count in counts.items()):
            return self.refuses(self.cache.reserve, writers)
        self.cache.reserve(writers)
        places = [(b, len(self.tokens[b]) + i) for b, count in counts.items() for i in range(count)]
        slots, right = self.cache.new_slots.tolist(), [self.cache.blocks[b].start + j for b, j in places]
        assert slots == right, f"yours are the slots {slots}, right is {right}"
        new = [[(self.random(h, d), self.random(h, dv)) for h, d, dv, _ in LAYERS] for _ in places]
        for (b, _), token in zip(places, new):
            self.tokens[b].append(token)
        for layer, (heads, *sizes, its_rope) in enumerate(LAYERS):
            keys, values = (torch.empty(heads, len(new), size) for size in sizes)
            for n, (_, j) in enumerate(places):
                key, values[:, n] = new[n][layer]
                keys[:, n] = rotated(key[:, None].expand(-1, j + 1, -1), its_rope)[:, j]
            write(self.cache, layer, keys, values)

    def random(self, *shape):
        """Random numbers of this run."""
        return torch.randn(shape, generator=self.generator)

    @precondition(lambda self: any(self.tokens))
    @rule(data=st.data())
    def move(self, data):
        """A block to the end of another one."""
        numbers, blocks = range(len(self.tokens)), self.cache.blocks
        # (0 may well be empty)
        source = data.draw(st.sampled_from([b for b in numbers if self.tokens[b]] + [0]))
        target = data.draw(st.sampled_from([b for b in numbers if b != source]))
        if len(self.tokens[source]) + len(self.tokens[target]) > self.capacities[target]:
            return self.refuses(self.cache.move, blocks[source], blocks[target])
        self.cache.move(blocks[source], blocks[target])
        self.tokens[target] += self.tokens[source]
        self.tokens[source] = []
        self.moves += 1

    @precondition(lambda self: any(self.tokens))
    @rule(data=st.data())
    def copy(self, data):
        """The beginning of a block to the end of another one; or more than it has, which is refused."""
        numbers, blocks = range(len(self.tokens)), self.cache.blocks
        source = data.draw(st.sampled_from(numbers))
        target = data.draw(st.sampled_from([b for b in numbers if b != source]))
        length = data.draw(st.integers(0, len(self.tokens[source]) + 1))
        arguments = blocks[source], blocks[target], length
        if length > len(self.tokens[source]):
            with pytest.raises(ValueError):
                self.cache.copy(*arguments)
        elif length + len(self.tokens[target]) > self.capacities[target]:
            self.refuses(self.cache.copy, *arguments)
        else:
            self.cache.copy(*arguments)
            self.tokens[target] += self.tokens[source][:length]
            self.moves += 1

    @precondition(lambda self: any(self.tokens))
    @rule(data=st.data())
    def truncate(self, data):
        """Forget the end of a block, or be refused."""
        b = data.draw(st.integers(0, len(self.tokens) - 1))
        now = len(self.tokens[b])
        length = data.draw(st.sampled_from([now, now - 1, now // 2, 0, now + 1, -1]))
        if 0 <= length <= now:
            self.cache.truncate(self.cache.blocks[b], length)
            del self.tokens[b][length:]
        else:
            with pytest.raises(ValueError, match=f"of {now} tokens cannot be truncated to {length}"):
                self.cache.truncate(self.cache.blocks[b], length)

    @rule(data=st.data(), fails=st.booleans(), only_on_error=st.booleans(), makes=st.booleans())
    def rewind(self, data, fails, only_on_error, makes):
        """What is written within `rewound` is forgotten, or only if it ends in an error, which is passed
        on. A block that is made within stays, and is empty then."""
        before = [list(tokens) for tokens in self.tokens]

        def change():
            with self.cache.rewound(only_on_error) as nothing:
                assert nothing is None
                self.reserve(data)
                if makes and len(self.tokens) < 8:
                    self.make(4)
                    before.append([])
                    self.cache.reserve([(self.cache.blocks[-1], 0)])
                self.reserve(data)
                if fails:
                    raise KeyboardInterrupt

        if fails:
            pytest.raises(KeyboardInterrupt, change)
        else:
            change()
        if fails or not only_on_error:
            self.tokens = before

    @invariant()
    def blocks_hold_what_was_put_in(self):
        """Each block holds its list's vectors, rotated to their places in the list; slots belong to one
        block or are free; and nothing changes its address unless the memory grew."""
        spans = [range(b.start, b.start + b.capacity) for b in self.cache.blocks] + self.cache.free
        found, slots = sorted(slot for span in spans for slot in span), self.cache.slots
        assert found == [*range(slots)], f"of {slots} slots, blocks have, or are free: {found}"
        lengths, right = [b.length for b in self.cache.blocks], [*map(len, self.tokens)]
        assert lengths == right, f"yours have lengths {lengths}, right is {right}"
        for layer in self.cache.keys:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            for block, tokens in zip(self.cache.blocks, self.tokens):
                slots = slice(block.start, block.start + block.length)
                if tokens:
                    put, held = (torch.stack([token[layer][i] for token in tokens], 1) for i in (0, 1))
                    # one rounding of the oracle's key to float32, and one rotation per move of a key
                    error = (keys[:, slots] - rotated(put, ROPES[layer])).abs().max()
                    assert error <= (1 + self.moves) * ROTATION, f"a key is off by {error:.1e}"
                    assert torch.equal(values[:, slots], held), "values are not those that were put in"
        tensors = [t for memory in (self.cache.keys, self.cache.values) for t in memory.values()]
        assert all(t.shape[1] <= self.cache.slots for t in tensors)
        addresses = [(t.shape[1], t.data_ptr()) for t in tensors]
        assert not self.addresses or all(before[1] == now[1] for before, now in zip(
            self.addresses, addresses) if before[0] == now[0])
        self.addresses = addresses


TestMemory = Memory.TestCase
TestMemory.settings = check(stateful_step_count=30)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_memory_is_one_copy_for_any_number_of_workers(workers, dtype, size):
    """S slots take S x heads x (key + value size) numbers of the model's own dtype, however many workers
    share them."""
    cache = chapter.SharedCache(ROPES)
    blocks = [cache.block(capacity) for capacity in [60] + [60 // workers] * workers]
    cache.reserve([(block, 3) for block in blocks])
    for layer, (heads, *sizes, _) in enumerate(LAYERS):
        write(cache, layer, *(torch.randn(heads, 3 * len(blocks), width).to(dtype) for width in sizes))
    tensors = [t for memory in (cache.keys, cache.values) for t in memory.values()]
    assert {t.dtype for t in tensors} == {dtype}
    storages = [t.untyped_storage() for t in tensors]
    taken = {storage.data_ptr(): storage.nbytes() for storage in storages}  # once each, if shared
    assert sum(taken.values()) == 120 * size * (2 * (4 + 4) + 1 * (7 + 3))


def test_a_block_cannot_be_moved_to_its_own_end():
    """It is refused, and stays as it was."""
    cache = chapter.SharedCache([])
    block = cache.block(20)
    cache.reserve([(block, 5)])
    with pytest.raises(ValueError):
        cache.move(block, block)
    assert block.length == 5


def test_a_model_is_told_that_nothing_is_cached():
    """Lengths and mask sizes are those of an empty cache with N new tokens, for keywords, too."""
    cache = chapter.SharedCache([])
    cache.reserve([(cache.block(8), 5)])
    assert cache.get_seq_length() == cache.get_seq_length(layer_idx=3) == 0
    assert cache.get_mask_sizes(5) == cache.get_mask_sizes(query_length=5, layer_idx=3) == (5, 0)


SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
GEMMA = hf.Gemma3TextConfig(**SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize("config", [hf.LlamaConfig(**SIZES), GEMMA], ids=["llama", "gemma3"])
def test_a_moved_block_holds_what_attention_would_read_there(config):
    """A text encoded in its block and moved behind 5 tokens: the keys that the model's attention gets at
    position 5."""
    def recording(module, query, key, value, *args, **kwargs):
        record[module.layer_idx] = key[0], value[0]
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    record, ids = {}, torch.arange(7, 14)
    hf.AttentionInterface.register("recording_02", recording)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="recording_02")
    model, cache = model.eval().requires_grad_(False), chapter.SharedCache(rope.layer_ropes(config))
    one, two = cache.block(16), cache.block(16)
    chapter.encode(model, cache, one, torch.arange(5))
    chapter.encode(model, cache, two, ids)
    cache.move(two, one)
    there = torch.arange(5, 12)
    model(ids[None], position_ids=there[None], use_cache=False)  # the same text alone, at position 5
    assert len(record) == 2
    for layer, (keys, values) in record.items():
        assert cache.keys[layer].shape[::2] == keys.shape[::2]  # heads and size
        # the model's float32 angles are below 12, the rotation adds 4 U; what deeper layers read is off
        # by as much
        assert (cache.keys[layer][:, 5:12] - keys).abs().max() <= 2 * 16 * U * keys.abs().max()
        assert (cache.values[layer][:, 5:12] - values).abs().max() <= 2 * 16 * U * values.abs().max()


def test_memory_that_cannot_be_had_is_not_asked_for_again():
    """A block that is too large for the machine: when it has gone, others go on; slots are reused."""
    cache = chapter.SharedCache(ROPES)
    small = cache.block(3)
    cache.reserve([(small, 1)])
    for layer, (heads, *sizes, _) in enumerate(LAYERS):
        write(cache, layer, *(torch.ones(heads, 1, size) for size in sizes))
    large = cache.block(10**13)
    with pytest.raises((RuntimeError, MemoryError)):
        cache.reserve([(small, 1), (large, 1)])
    assert (small.length, large.length) == (1, 0)
    cache.discard([large])
    cache.reserve([(small, 1)])
    assert cache.slots == 3 and cache.new_slots.tolist() == [1] and cache.block(2).start == 3


def test_memory_that_has_grown_in_part_is_seen_to_have_moved(monkeypatch):
    """It is too little for the second layer: then slots stay, as who notes addresses goes by them, and
    the rest of the memory follows as soon as there is enough."""
    cache, cat = chapter.SharedCache(ROPES), torch.cat
    small = cache.block(3)
    cache.reserve([(small, 1)])
    for layer, (heads, *sizes, _) in enumerate(LAYERS):
        write(cache, layer, *(torch.ones(heads, 1, size) for size in sizes))
    large = cache.block(4)

    def fail(tensors, dim=0):
        if tensors[0].shape[0] == LAYERS[1][0] and dim == 1:
            raise RuntimeError("out of memory")
        return cat(tensors, dim)
    monkeypatch.setattr(torch, "cat", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.reserve([(large, 1)])
    cache.discard([large])
    assert [keys.shape[1] for keys in cache.keys.values()] == [7, 3] and cache.slots == 7
    monkeypatch.setattr(torch, "cat", cat)
    cache.reserve([(small, 1)])
    assert {t.shape[1] for memory in (cache.keys, cache.values) for t in memory.values()} == {7}
    assert cache.block(4).start == 3 and cache.slots == 7
