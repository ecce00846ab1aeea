r"""Chapter 2: KV memory is made of blocks, each stored as if it began at position 0.

The problem. Workers share one attention memory, but none of them sees it in the same order, and pieces
of it move: a finished step leaves its writer and joins the common history. Where should a key be kept,
and at which angle?

The answer (paper, section 3.2 and appendix B). The memory is cut into *blocks*: one for the prompt and
the history, one per worker, a few for separators. The key with index j in its block is stored rotated
to position j, wherever the block stands in anybody's view. So a block is written once for all readers,
and moving it is one shift (chapter 1). A drawing of that: appendix/drawings/moving_step.svg

    Block         a span of the memory: where it starts, how many slots it has, how many are in use
    SharedCache   the memory of all layers: reserve, move, truncate; a Hugging Face model writes to it

What to notice: bookkeeping is a handful of integers per block, the same for all layers. Nothing is ever
encoded again. Left out: who sees which block (chapter 3), and the attention over them (chapter 4).

Symbols, for QwQ-32B and four workers: S 8,400 slots of memory, Hk 8 key-value heads, D 128 size of keys,
Dv 128 of values, N 4 new tokens in a pass.

Run it: python 02_shared_cache.py    (on SmolLM2-135M-Instruct, from a 93 MB wheel on PyPI)
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from transformers import Cache

from appendix import command, models

rope = import_module("01_rope_shift")


@dataclass(eq=False)  # compared and hashed by identity: two empty blocks are still two blocks
class Block:
    """A span of slots. Slot `start + j` holds the token with in-block index j, its key rotated to j."""

    start: int  # first slot
    capacity: int  # number of slots that belong to the block
    length: int = 0  # number of slots in use


class BlockFull(ValueError):
    """A block has no room for what should be written into it. Nothing was written."""


class SharedCache(Cache):
    """One copy of all keys and values, for any number of workers.

    No token is ever lost: a block that would overflow refuses *before* anything is written. Addresses
    stay fixed (chapter 5 relies on that) unless blocks are made for which no slots are free: the memory
    grows then, with the next pass.

    Args:
        ropes: the Rope of every layer (chapter 1), as a list.
    """

    def __init__(self, ropes):
        super().__init__(layers=[])
        self.ropes = ropes
        self.blocks, self.slots = [], 0  # slots: S, of all blocks together, and of those discarded
        self.free = []  # ranges of slots that no block has, in order
        self.keys, self.values = {}, {}  # layer -> [Hk, S, D or Dv], made when the layer first writes
        self.prompts = {}  # block -> ids that it begins with: what other runs may copy
        self.new_slots = None  # [N] int64: where the tokens of the coming forward pass go

    # -- what the blocks can do ------------------------------------------------------------------------

    def block(self, capacity):
        """Make an empty Block, in the first free slots that suffice, or behind all others. On a CPU,
        slots that nobody has written to take no memory."""
        for i, span in enumerate(self.free):
            if len(span) >= capacity:
                start, self.free[i] = span.start, span[capacity:]
                break
        else:
            start, self.slots = self.slots, self.slots + capacity
        self.blocks.append(Block(start, capacity))
        return self.blocks[-1]

    def discard(self, blocks):  # exercise
        """Give the slots of blocks back. Nobody may use these blocks any more."""
        self.blocks = [block for block in self.blocks if block not in blocks]
        self.prompts = {block: ids for block, ids in self.prompts.items() if block not in blocks}
        gone, self.free = [range(b.start, b.start + b.capacity) for b in blocks] + self.free, []
        for span in sorted(filter(len, gone), key=lambda span: span.start):
            if self.free and self.free[-1].stop == span.start:
                span = range(self.free.pop().start, span.stop)
            if span.stop == self.slots:  # at the end, what has got no memory is wanted no more
                self.slots = max([span.start, *(keys.shape[1] for keys in self.keys.values())])
                span = range(span.start, self.slots)
            self.free.append(span)

    def grow(self):
        """Let the memory have all slots that were given to blocks."""
        for memory in (self.keys, self.values):
            for layer, old in memory.items():
                more = self.slots - old.shape[1]
                if more:
                    memory[layer] = torch.cat([old, old.new_empty(old.shape[0], more, old.shape[2])], 1)

    def reserve(self, writers):  # exercise
        """Give new tokens their slots: for each pair (block, count) the next `count` slots of the block.

        To be called before a forward pass over these N tokens, packed in the same order. Lengths count
        them from now on; the pass fills their slots, at each layer before its attention reads.
        Raises:
            BlockFull: a block has too little room. No block has changed then.
        """
        for block, count in writers:
            self.check_room(block, count)
        self.grow()
        spans = []
        for block, count in writers:
            first = block.start + block.length
            spans.append(torch.arange(first, first + count))
            block.length += count
        self.new_slots = torch.cat(spans)

    def move(self, source, target):
        """Move all of block `source` to the end of `target`; `source` is empty then. (See `copy`.)"""
        self.copy(source, target, source.length)
        source.length = 0

    def copy(self, source, target, length):  # exercise
        """Write the first `length` tokens of block `source` also to the end of block `target`.

        Index j becomes target.length + j, so all keys rotate by the same angle. The cost depends on
        `length` alone.
        Raises:
            BlockFull: the target has too little room. No block has changed then.
            ValueError: they are one block, or the source has fewer tokens.
        """
        if source is target or not 0 <= length <= source.length:
            raise ValueError(f"{length} tokens of {source} cannot be written to {target}")
        self.check_room(target, length)
        self.grow()
        here = slice(source.start, source.start + length)
        there = slice(target.start + target.length, target.start + target.length + length)
        for layer, keys in self.keys.items():
            keys[:, there] = rope.shift(keys[:, here], target.length, self.ropes[layer])
            self.values[layer][:, there] = self.values[layer][:, here]  # values carry no position
        target.length += length

    def truncate(self, block, length):
        """Forget all but the first `length` tokens of a block. (`truncate(block, 0)` clears it.)"""
        if not 0 <= length <= block.length:
            raise ValueError(f"a block of {block.length} tokens cannot be truncated to {length}")
        block.length = length

    @contextmanager
    def rewound(self, only_on_error=False):  # exercise
        """What is written in this context is forgotten at its end, or only if it ends in an error."""
        lengths, failed = {block: block.length for block in self.blocks}, True
        try:
            yield
            failed = False
        finally:
            if failed or not only_on_error:
                for block in self.blocks:
                    block.length = lengths.get(block, 0)

    def check_room(self, block, count):
        """Raise BlockFull unless `block` can take `count` more tokens."""
        if block.length + count > block.capacity:
            raise BlockFull(f"a block of {block.capacity} slots, {block.length} of them in use, "
                            f"has no room for {count} more")

    # -- what a Hugging Face model asks of its cache ---------------------------------------------------

    def write(self, layer, keys, values):  # exercise
        """Write one layer's new keys [Hk, N, D] and values [Hk, N, Dv] into the reserved slots."""
        if layer not in self.keys:
            for memory, new in ((self.keys, keys), (self.values, values)):
                memory[layer] = new.new_empty(new.shape[0], self.slots, new.shape[2])
        slots = self.new_slots.to(keys.device)
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Take the new keys and values [1, Hk, N, D] of one layer, and hand back these, not all.

        The model passes what it gets here to its attention function, and ours (chapter 4) reads the
        memory itself. Models with multi-head latent attention bring their latents here and expand them
        on the way to the attention function: chapter 4 writes them there.
        """
        if not self.ropes[layer_idx].rotates_last:
            self.write(layer_idx, key_states[0], value_states[0])
        return key_states, value_states

    def get_seq_length(self, layer_idx=0):
        """0: the model need not know what is cached. A pass brings its positions, and masks are ours."""
        return 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(length, offset) of the keys that a mask has to cover: the new ones, as from `update`."""
        return query_length, 0


# ------------------------------------------------------------------------------------- what one can see

def encode(model, cache, block, ids, position=0):
    """Run `ids` [N] through the model into a block, their keys rotated as from `position` on.

    With its own attention the model sees only what `update` returns, these N tokens: each block is
    encoded alone. What moves in this chapter is a text's place, not its context.
    """
    cache.reserve([(block, len(ids))])
    positions = torch.arange(position, position + len(ids))
    model(ids[None], position_ids=positions[None], past_key_values=cache, logits_to_keep=1)


def block_keys(cache, block):
    """All keys of a block: [layers, Hk, length, D]."""
    span = slice(block.start, block.start + block.length)
    return torch.stack([keys[:, span] for keys in cache.keys.values()])


def main():
    """Move a real text, and compare its keys with those of the text encoded at the new place."""
    model, tokenizer = models.load()
    text = "A cached key can be moved. Rotate it by the angle of the distance, and it is elsewhere. " * 3
    ids = tokenizer(text, return_tensors="pt").input_ids[0]  # [N]
    cache = SharedCache(rope.layer_ropes(model.config))
    history, own, other = map(cache.block, (1024, 128, 128))

    encode(model, cache, history, torch.arange(1000, 1700))  # 700 tokens of something older
    encode(model, cache, own, ids)  # the new step, stored from position 0
    # and, to compare, the same text as encoded where it will move to
    _, encoding = rope.timed(encode, model, cache, other, ids, 700)
    print(f"history, own, other: {[b.length for b in cache.blocks]} tokens in "
          f"{[b.capacity for b in cache.blocks]} slots")
    _, moving = rope.timed(cache.move, own, history)
    print(f"own has moved:       {[b.length for b in cache.blocks]}\n")

    # [layers, Hk, N, D] each
    moved, encoded = block_keys(cache, history)[:, :, 700:], block_keys(cache, other)
    error = (moved - encoded).abs()
    unmoved = rope.largest(rope.shift(moved, -700, cache.ropes[0]) - encoded)
    print(f"moving {len(ids)} tokens took {1e3 * moving:.1f} ms, encoding them there "
          f"{1e3 * encoding:.0f} ms\nkeys moved against keys encoded there: largest difference "
          f"{error.max():.1e}, mean {error.mean():.1e}\n  (had they not been rotated: {unmoved:.1f})\n")

    try:
        cache.reserve([(own, 100), (other, 100)])
    except BlockFull as refusal:
        print(f"a block that is full says so before anything is written: {refusal}")
    assert [block.length for block in cache.blocks] == [700 + len(ids), 0, len(ids)]
    assert error.max() < 1e-3 * rope.largest(encoded) < unmoved
    print(f"[OK] {len(ids)} tokens x {len(cache.keys)} layers moved without the model; "
          f"keys agree to {error.max():.0e}\n\n"
          "Next: chapter 3 says which worker sees which block, and where.")


# To rebuild this file and be checked: make exercise CHAPTER=2 DIR=mine. Questions, which
# `python appendix/solutions.py 2.1` and so on answer by measuring:
# 1. Move a step a second time, to the end of another block. Is the error still that of one move?
# 2. Does moving cost more where the target is long? (100 and 100,000 tokens)
# 3. Store the keys unrotated and rotate them when they are read. What does a pass cost then?

if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
