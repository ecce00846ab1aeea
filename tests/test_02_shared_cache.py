"""Chapter 2: the memory against plain lists of unturned vectors, a model's keys moved in it, and what is refused."""
from functools import partial
from importlib import import_module

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
TURN = 4 * U * 8  # a rotation is 4 roundings (cosine, sine, product, sum) of pairs that are shorter than 8
# Two layers that have nothing in common: [heads, key size, value size, Rope]; the second turns only its last 4 of 7.
LAYERS = [(2, 4, 4, rope.Rope(torch.tensor([1.0, 0.01]).double())),
          (1, 7, 3, rope.Rope(torch.tensor([0.7, 0.2]).double(), attention_scaling=1.2, rotates_last=True))]


def turn(x, layer):
    """The oracle's rotation of x [heads, n, D] to the angles 0 ... n - 1, by complex numbers in float64."""
    x, half = x.double(), len(layer.inv_freq)
    first = x.shape[2] - 2 * half if layer.rotates_last else 0
    a, b = slice(first, first + half), slice(first + half, first + 2 * half)
    z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * torch.arange(x.shape[1])[:, None] * layer.inv_freq)
    return torch.cat([x[..., :first], z.real, z.imag, x[..., first + 2 * half:]], 2)


def write(cache, layer, keys, values):
    """What a model does at a layer with its new values and (turned) keys [heads, N, D]."""
    latent = LAYERS[layer][3].rotates_last  # latent attention shows the cache something else, and writes later
    new = (torch.randn(1, 1, keys.shape[1], 5),) * 2 if latent else (keys[None], values[None])
    returned = cache.update(*new, layer, {"sliding_window": None}, is_causal=True)
    assert returned[0] is new[0] and returned[1] is new[1]  # only the new ones come back
    if latent:
        cache.write(layer, keys, values)


class Memory(RuleBasedStateMachine):
    """Appends, moves and cuts; the oracle: per block, a plain list of tokens, [(unturned key, value) of each layer]."""

    @initialize(rooms=st.lists(st.sampled_from([20, 8, 3, 0]), min_size=2, max_size=4), seed=st.integers(0, 2 ** 32))
    def begin(self, rooms, seed):
        self.cache = chapter.SharedCache(rooms, [layer[3] for layer in LAYERS])
        self.rooms, self.generator, self.moves, self.addresses = rooms, torch.Generator().manual_seed(seed), 0, []
        self.tokens = [[] for _ in rooms]

    def refuses(self, action, *args):
        """In one line; and nothing changes, which is checked after every rule."""
        slots = self.cache.new_slots
        with pytest.raises(chapter.BlockFull, match="^block . has .* no room for .* more$"):
            action(*args)
        assert self.cache.new_slots is slots

    @rule(data=st.data())
    def append(self, data):
        order = data.draw(st.permutations(range(len(self.rooms))))[:data.draw(st.integers(1, 3))]
        counts = {b: data.draw(st.integers(0, 6)) for b in order}
        if any(len(self.tokens[b]) + count > self.rooms[b] for b, count in counts.items()):
            return self.refuses(self.cache.append, counts)
        self.cache.append(counts)
        places = [(b, len(self.tokens[b]) + i) for b, count in counts.items() for i in range(count)]
        assert self.cache.new_slots.tolist() == [sum(self.rooms[:b]) + j for b, j in places]
        new = [[(self.random(h, d), self.random(h, dv)) for h, d, dv, _ in LAYERS] for _ in places]
        for (b, _), token in zip(places, new):
            self.tokens[b].append(token)
        for layer, (heads, size, value_size, turns) in enumerate(LAYERS):
            keys, values = torch.empty(heads, len(new), size), torch.empty(heads, len(new), value_size)
            for n, (_, j) in enumerate(places):
                key, values[:, n] = new[n][layer]
                keys[:, n] = turn(key[:, None].expand(-1, j + 1, -1), turns)[:, j]
            write(self.cache, layer, keys, values)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    @precondition(lambda self: any(self.tokens))
    @rule(data=st.data())
    def move(self, data):
        blocks = range(len(self.rooms))
        source = data.draw(st.sampled_from([b for b in blocks if self.tokens[b]] + [0]))  # (0 may well be empty)
        target = data.draw(st.sampled_from([b for b in blocks if b != source]))
        if len(self.tokens[source]) + len(self.tokens[target]) > self.rooms[target]:
            return self.refuses(self.cache.move, source, target)
        self.cache.move(source, target)
        self.tokens[target] += self.tokens[source]
        self.tokens[source] = []
        self.moves += 1

    @precondition(lambda self: any(self.tokens))
    @rule(data=st.data())
    def cut(self, data):
        b = data.draw(st.integers(0, len(self.rooms) - 1))
        now = len(self.tokens[b])
        length = data.draw(st.sampled_from([now, now - 1, now // 2, 0, now + 1, -1]))  # (0 clears the block)
        if 0 <= length <= now:
            self.cache.cut(b, length)
            del self.tokens[b][length:]
        else:
            with pytest.raises(ValueError, match=f"cannot be cut to {length}"):
                self.cache.cut(b, length)

    @invariant()
    def blocks_hold_what_was_put_in(self):
        """Each block holds its list's vectors, turned to their places in the list; at the same address as ever."""
        assert [block.length for block in self.cache.blocks] == [len(tokens) for tokens in self.tokens]
        for layer, (keys, values) in enumerate(zip(self.cache.keys.values(), self.cache.values.values())):
            for block, tokens in zip(self.cache.blocks, self.tokens):
                slots = slice(block.start, block.start + block.length)
                if tokens:
                    expected = turn(torch.stack([token[layer][0] for token in tokens], 1), LAYERS[layer][3])
                    # one rounding of the oracle's key to float32, and one rotation per move that a key has seen
                    assert (keys[:, slots] - expected).abs().max() <= (1 + self.moves) * TURN
                    assert torch.equal(values[:, slots], torch.stack([token[layer][1] for token in tokens], 1))
        addresses = [t.data_ptr() for memory in (self.cache.keys, self.cache.values) for t in memory.values()]
        assert not self.addresses or self.addresses == addresses
        self.addresses = addresses


TestMemory = Memory.TestCase
TestMemory.settings = check(stateful_step_count=30)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_memory_is_one_copy_for_any_number_of_workers(workers, dtype, size):
    """S slots take S x heads x (key + value size) numbers of the model's own dtype, however many workers share them."""
    rooms = [60] + [60 // workers] * workers
    cache = chapter.SharedCache(rooms, [layer[3] for layer in LAYERS])
    cache.append({b: 3 for b in range(workers + 1)})
    for layer, (heads, key_size, value_size, _) in enumerate(LAYERS):
        n = 3 * (workers + 1)
        write(cache, layer, torch.randn(heads, n, key_size).to(dtype), torch.randn(heads, n, value_size).to(dtype))
    tensors = [t for memory in (cache.keys, cache.values) for t in memory.values()]
    assert {t.dtype for t in tensors} == {dtype}
    taken = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}  # once each, if shared
    assert sum(taken.values()) == 120 * size * (2 * (4 + 4) + 1 * (7 + 3))


def test_a_model_is_told_that_nothing_is_cached():
    """Lengths and mask sizes are those of an empty cache with N new tokens, also for keyword arguments."""
    cache = chapter.SharedCache([8], [])
    cache.append({0: 5})
    assert cache.get_seq_length() == cache.get_seq_length(layer_idx=3) == 0
    assert cache.get_mask_sizes(5) == cache.get_mask_sizes(query_length=5, layer_idx=3) == (5, 0)


SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize("config", [hf.LlamaConfig(**SIZES), hf.Gemma3TextConfig(
    **SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"])], ids=lambda config: config.model_type)
def test_a_moved_block_holds_what_attention_would_read_there(config):
    """A text encoded in its block and moved behind 5 tokens: the keys that the model's attention gets at position 5."""
    def recording(module, query, key, value, *args, **kwargs):
        record[module.layer_idx] = key[0], value[0]
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    record, ids = {}, torch.arange(7, 14)
    hf.AttentionInterface.register("recording_02", recording)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="recording_02").eval().requires_grad_(False)
    cache = chapter.SharedCache([16, 16], rope.layer_ropes(config))
    chapter.encode(model, cache, 0, torch.arange(5))
    chapter.encode(model, cache, 1, ids)
    cache.move(1, 0)
    model(ids[None], position_ids=torch.arange(5, 12)[None], use_cache=False)  # the same text alone, at position 5
    for layer, (keys, values) in record.items():
        assert cache.keys[layer].shape[::2] == keys.shape[::2]  # heads and size
        # the model's float32 angles are below 12, the rotation adds 4 U; what deeper layers read is off by as much
        assert (cache.keys[layer][:, 5:12] - keys).abs().max() <= 2 * 16 * U * keys.abs().max()
        assert (cache.values[layer][:, 5:12] - values).abs().max() <= 2 * 16 * U * values.abs().max()


@pytest.mark.parametrize("name, device, complaint", [
    ("none.gguf", "cpu", "'.*none.gguf'"), ("no-folder", "cpu", "model '.*no-folder'"),
    (".", "cuda:99", "device 'cuda:99'"), (".", "nonsense", "device 'nonsense'")])
def test_what_cannot_be_loaded_is_refused(name, device, complaint, tmp_path, monkeypatch):
    """A file, a folder or a device that is not there is named in one line, before any weights are read."""
    monkeypatch.setattr(chapter.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
    with pytest.raises(ValueError, match=complaint) as refusal:
        chapter.load_model(str(tmp_path / name), device)
    assert "\n" not in str(refusal.value)
