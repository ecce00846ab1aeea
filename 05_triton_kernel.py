r"""Chapter 5: the same attention as one GPU kernel, and a pass that is launched as one CUDA graph.

The problem. On a GPU, decoding waits for memory. Attention uses each cached number once per query: in
bfloat16 that is W G operations per byte, 20 for four workers of QwQ-32B, and an H200 could do 200 while
its memory delivers one byte. So the least time is known: the bytes of all keys and values, each read
*once*, over the bandwidth. Chapter 4's function is far from it: it launches dozens of kernels, widens
keys, writes scores to memory and reads them back. What comes near takes four ideas:

1. The queries of all workers and of the G heads that share a key are one matrix. A tile of keys is
   loaded once and multiplied with all of them: four workers read as many bytes as one.
2. Blocks differ in length (a history of 8,000 tokens, a separator of 6), and a GPU has a hundred
   processors. So all tiles form one list, and each program takes an *equal span* of it.
3. A program keeps the largest score so far (`peak`), the sum of weights (`total`) and the weighted sum
   of values (`result`). A higher peak shrinks both by 2^(old - new): exact, whatever the order.
4. What several programs leave is merged by the same factors. Whoever finishes last does it.

The kernel reads lengths and tables from the GPU's memory, so a captured launch stays valid when they
change. Who sees what is in the tables alone, as in chapter 4. Left out: gradients.

Run it: python 05_triton_kernel.py      (without a GPU: in Triton's interpreter, which is slow)
"""
import functools
import os
import sys
from dataclasses import replace
from importlib import import_module

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before transformers, which imports Triton

import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

try:
    import triton
    import triton.language as tl
    if [int(part) for part in triton.__version__.split(".")[:2]] < [3, 6]:
        raise ImportError(f"version {triton.__version__} is installed")
except ImportError as error:
    MISSING = ("chapter 5 needs Triton 3.6 or newer (Linux: pip install triton==3.7.1), all others run "
               f"without it: {error}")
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from error

from appendix.command import first_line

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

# The score of a key that is not seen. Not -inf: the difference of two of them has to be 0, not NaN.
UNSEEN_SCORE = tl.constexpr(-1e30)


@triton.jit
def load(pointers, wanted):
    """What stands there, and 0 where it is not wanted."""
    return tl.load(pointers, mask=wanted, other=0)


@triton.jit(do_not_specialize=["rows", "new"])  # else compiled anew at 1, 16, 32, ...
def kernel(q, k, v, out, cos, sin, start, position, offset, visible, first_tile, bounds,  # see `prepare`
           results, peaks, totals, arrived,  # what programs leave for each other
           rows, new, scale, q_head, q_token, k_head, k_slot, v_head, v_slot,  # B, N, factor, strides
           GROUP: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,  # G Dv R/2 D-R
           ROTATED: tl.constexpr, FIXED: tl.constexpr,  # first dimension that rotates, that does not
           WINDOW: tl.constexpr, OPERAND: tl.constexpr,  # 0: no window; dtype of matrix products
           # sizes of register tiles, powers of two and at least 16:
           M: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HALF_TILE: tl.constexpr,
           REST_TILE: tl.constexpr, DV_TILE: tl.constexpr):
    """One program: an equal span of all tiles, for M queries of the G query heads of one key head."""
    split, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1)
    m = chunk * M + tl.arange(0, M)  # [M] queries of this key head, head by head: m = g * N + n
    query_head, n = head * GROUP + m // new, m % new  # [M] each
    real = m < GROUP * new  # the last chunk may have room for more queries than there are
    i, d, c = tl.arange(0, HALF_TILE), tl.arange(0, REST_TILE), tl.arange(0, DV_TILE)
    q += (query_head * q_head + n * q_token)[:, None]  # [M, 1] where each query begins
    out += ((n * heads * GROUP + query_head) * DV)[:, None]  # [M, 1]
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head

    # In the list of all tiles, those of row b are bounds[b] ... bounds[b + 1] - 1. This program does the
    # tiles begin ... end - 1: from the last row that starts at or before `begin` (an empty row starts
    # where the next one does) to the last row that starts before `end`. 32 bits do, but for addresses.
    b = tl.arange(0, ROWS)
    row_starts = tl.load(bounds + b, mask=b < rows, other=2**30)  # [ROWS]
    tiles = tl.load(bounds + rows).to(tl.int32)
    begin = split * tiles // splits
    end = (split + 1) * tiles // splits
    first_row = tl.sum((row_starts <= begin).to(tl.int32)) - 1
    end_row = tl.sum((row_starts < end).to(tl.int32))

    peak = tl.full([M], UNSEEN_SCORE, tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, DV_TILE], tl.float32)
    for row in range(first_row, end_row):
        column = row * new + n  # [M] where in the tables [B, N] this row and each query's token meet
        # Rotate the queries for this row. A register tile cannot be cut, so the dimensions i and i + R/2
        # of a pair are loaded as two tiles of half the width, here and for the keys.
        angle, pair = column[:, None] * HALF + i, real[:, None] & (i < HALF)
        cosine, sine = load(cos + angle, pair), load(sin + angle, pair)  # [M, R/2]
        x = load(q + ROTATED + i, pair).to(tl.float32)
        y = load(q + ROTATED + HALF + i, pair).to(tl.float32)
        q1 = (x * cosine - y * sine).to(OPERAND)  # [M, R/2]
        q2 = (y * cosine + x * sine).to(OPERAND)
        if REST > 0:
            q3 = load(q + FIXED + d, real[:, None] & (d < REST)).to(OPERAND)  # [M, D - R]
        sees = load(visible + column, real).to(tl.int32)  # [M] how many leading slots
        place = (load(position + n, real) + load(offset + column, real)).to(tl.int32)  # [M] from slot 0
        # Memory that no query here sees may never have been written. It is not read: 0 * NaN is NaN.
        length = tl.max(sees)
        block_k = k + tl.load(start + row) * k_slot
        block_v = v + tl.load(start + row) * v_slot
        row_begin, row_end = tl.load(bounds + row).to(tl.int32), tl.load(bounds + row + 1).to(tl.int32)
        skip = tl.load(first_tile + row).to(tl.int32) - row_begin  # from the list to a tile of this row
        for tile in range(tl.maximum(begin, row_begin) + skip, tl.minimum(end, row_end) + skip):
            j = tile * TILE + tl.arange(0, TILE)  # [TILE] in-block indices
            written = j[:, None] < length
            keys = block_k + j[:, None] * k_slot
            k1 = load(keys + ROTATED + i, written & (i < HALF)).to(OPERAND)  # [TILE, R/2]
            k2 = load(keys + ROTATED + HALF + i, written & (i < HALF)).to(OPERAND)
            v1 = load(block_v + j[:, None] * v_slot + c, written & (c < DV)).to(OPERAND)  # [TILE, Dv]
            # ieee: float32 numbers are multiplied as they are, not rounded to TF32 before
            score = tl.dot(q1, tl.trans(k1), input_precision="ieee")  # [M, TILE]
            score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
            if REST > 0:
                k3 = load(keys + FIXED + d, written & (d < REST)).to(OPERAND)  # [TILE, D - R]
                score = tl.dot(q3, tl.trans(k3), score, input_precision="ieee")
            seen = j[None, :] < sees[:, None]
            if WINDOW > 0:
                seen &= place[:, None] - j[None, :] < WINDOW  # the distance in the view
            # In units of log 2, as exp2 is what a GPU has. While a query has seen nothing, its weights
            # are 1, not 0. No harm: at the first key that it sees, here or in the merge, `fade` is 0.
            score = tl.where(seen, score * scale, UNSEEN_SCORE)
            higher = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])  # [M, TILE]
            fade = tl.exp2(peak - higher)  # [M]
            total = total * fade + tl.sum(weight, 1)
            result = tl.dot(weight.to(OPERAND), v1, result * fade[:, None], input_precision="ieee")
            peak = higher

    # Leave what this span gave. Whoever finishes last merges all spans, always in the same order.
    counter = chunk * heads + head
    cells = counter.to(tl.int64) * splits * M + tl.arange(0, M)  # [M] of span 0; of the next, M further
    mine, kept = cells + split * M, real[:, None] & (c < DV)
    tl.store(peaks + mine, peak)
    tl.store(totals + mine, total)
    tl.store(results + mine[:, None] * DV_TILE + c, result, mask=kept)
    # All threads of this program have to have stored before it is counted. The atomic addition shows to
    # others what was stored before it, and shows here what others stored before theirs.
    tl.debug_barrier()
    if tl.atomic_add(arrived + counter, 1) == splits - 1:
        tl.store(arrived + counter, 0)  # for the next launch
        peak = tl.full([M], UNSEEN_SCORE, tl.float32)
        for s in tl.range(splits, loop_unroll_factor=4):  # .cg: from the cache that all processors share
            peak = tl.maximum(peak, tl.load(peaks + cells + s * M, cache_modifier=".cg"))
        total = tl.zeros([M], tl.float32)
        result = tl.zeros([M, DV_TILE], tl.float32)
        for s in tl.range(splits, loop_unroll_factor=4):
            its = cells + s * M
            fade = tl.exp2(tl.load(peaks + its, cache_modifier=".cg") - peak)
            total += fade * tl.load(totals + its, cache_modifier=".cg")
            part = results + its[:, None] * DV_TILE + c
            result += fade[:, None] * tl.load(part, mask=kept, other=0, cache_modifier=".cg")
        tl.store(out + c, (result / total[:, None]).to(out.dtype.element_ty), mask=kept)


INTERPRETED = not isinstance(kernel, triton.JITFunction)
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * log2(e))
TILE_BYTES = 16384  # size of a tile of keys, and of one of values, and of the queries
PROGRAMS_IN_THE_INTERPRETER = 8  # they run one after the other there


def power_of_two(n):
    """The smallest register tile that holds n numbers: a power of two, for matrix units at least 16."""
    return max(16, triton.next_power_of_2(n))


def constants(group, new, size, wide, rows, rotation, window, dtype):
    """What the kernel is compiled for, given G, N, D, Dv, B, the Rope, the window, and the keys' dtype.

    N and B count only through the sizes of tiles. bfloat16 products are float32 products in the
    interpreter, where they would be wrong.
    """
    rotated = 2 * len(rotation.inv_freq)  # R
    rest, last = size - rotated, rotation.rotates_last
    vectors = max(16, TILE_BYTES // (dtype.itemsize * power_of_two(max(size, wide))))  # that fill a tile
    # 64 x 128 sums of values fill an eighth of a processor's registers, 4,096 scores 16 in each thread.
    queries = min(64, vectors, power_of_two(group * new))
    operand = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    return dict(GROUP=group, HALF=rotated // 2, REST=rest, DV=wide, ROTATED=last * rest,
                FIXED=(not last) * rotated, WINDOW=window or 0, OPERAND=getattr(tl, str(operand)[6:]),
                M=queries, TILE=min(128, vectors, 4096 // queries), ROWS=power_of_two(rows),
                HALF_TILE=power_of_two(rotated // 2), REST_TILE=power_of_two(rest),
                DV_TILE=power_of_two(wide))


def options(shared_memory):
    """How the kernel is compiled for a GPU with so many bytes of shared memory per program.

    One program per processor has all its registers and all its shared memory, where num_stages - 1 tiles
    arrive while 8 warps compute on one.
    """
    return dict(num_warps=8, num_stages=4 if shared_memory >= 160 * 1024 else 3, maxnreg=255)


@functools.cache
def processors(device):
    """(programs that run at once, options) on this device."""
    if device.type != "cuda":
        return PROGRAMS_IN_THE_INTERPRETER, {}
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, options(getattr(found, "shared_memory_per_block_optin", 49152))


@functools.cache
def on_device(rotation, device):
    """The Rope with its frequencies on `device`. Kept for good: captured graphs go on reading them."""
    return replace(rotation, inv_freq=rotation.inv_freq.to(device))


@functools.cache
def counters(device):
    """[65536] zeros: per key head and chunk of queries, how many programs have finished.

    Every launch leaves zeros. All launches share them, so they have to follow each other, on one stream.
    """
    return torch.zeros(65536, dtype=torch.int32, device=device)


def prepare(tables, rotation, window, tile, device):
    """What the kernel reads besides q, k and v, computed on the device, once for all layers of a kind.

    Returns:
        (cos, sin, start, position, offset, visible, first_tile, bounds): cos, sin [B, N, R/2], how far
        each query rotates for each row; the tables; first_tile [B], the first tile of each row that is
        seen by anybody (0 without a window); bounds [B + 1], the number of tiles before each row.
    """
    kind = rotation, window, tile, device
    if kind not in tables.derived:
        given = [t.to(device) for t in (tables.start, tables.position, tables.offset, tables.visible)]
        _, _, offset, visible = given  # [B, N]
        first = query_rotation.first_slots(layouts.Tables(*given), window)  # [B, N]
        end = torch.where(first < visible, visible, 0).amax(1)  # [B] nobody sees slots from there on
        first_tile = torch.where(first < visible, first, end[:, None]).amin(1) // tile  # [B]
        bounds = F.pad(((end + tile - 1) // tile - first_tile).cumsum(0), (1, 0))  # [B + 1]
        angles = rope.cos_sin(on_device(rotation, device), offset)
        tables.derived[kind] = *angles, *given, first_tile, bounds
    return tables.derived[kind]


def attention(q, k, v, tables, rotation, scale, window=None, splits=None):
    """Chapter 4's function in one launch; same arguments, same result. For CUDA tensors.

    Scores, softmax and sums are float32. In 16 bits, rotated queries and weights are rounded on their
    way into the products. For a token that sees nothing the result is arbitrary; a pass has none.

    Args:
        splits: programs per key head and chunk of queries; None: as many as fill the processors.
    Raises:
        ValueError: the tensors are not on a GPU, gradients are wanted, or there are too many queries.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("the kernel computes no gradients: use chapter 4's attention for training")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the kernel needs CUDA tensors, not {q.device}: use chapter 4's attention")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads, (query_heads, new, size), wide, rows = len(k), q.shape, v.shape[2], len(tables.start)
    group = query_heads // heads
    const = constants(group, new, size, wide, rows, rotation, window, k.dtype)
    chunks = triton.cdiv(group * new, const["M"])
    if heads * chunks > len(counters(q.device)):
        raise ValueError(f"{new:,} tokens of {heads} key heads are too many for one launch: "
                         "feed them in several passes")
    programs, compile_options = processors(q.device)
    splits = splits or max(1, programs // (heads * chunks))
    out = q.new_empty(new, query_heads, wide)  # [N, Hq, Dv], in the order in which the model reads on
    cells = chunks * heads * splits * const["M"]
    results, peaks, totals = (torch.empty(cells * width, dtype=torch.float32, device=q.device)
                              for width in (const["DV_TILE"], 1, 1))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[splits, heads, chunks](
            q, k, v, out, *prepare(tables, rotation, window, const["TILE"], q.device),
            results, peaks, totals, counters(q.device), rows, new, scale * LOG2_E,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], **const, **compile_options)
    return out.transpose(0, 1)  # [Hq, N, Dv]


def largest_errors(device, splits, dtype=torch.float32):
    """The kernel against chapter 4's specification: the largest error for each number of programs."""
    *tensors, tables = query_rotation.example(300, 4, dtype, heads=2)
    rest = tables, rope.inverse_frequencies(LlamaConfig(head_dim=64)), 0.125
    exact = query_rotation.attention_spec(*(x.float() for x in tensors), *rest)  # [Hq, N, D]
    tensors = [x.to(device) for x in tensors]
    return [(attention(*tensors, *rest, splits=s).cpu() - exact).abs().max().item() for s in splits]


def check(device):
    """Try the kernel on `device` once. Raises RuntimeError if it gives something else than chapter 4."""
    error, = largest_errors(device, [None])
    if not error < 1e-3:
        raise RuntimeError(f"the kernel does not work on this device: its results are off by {error}")


# ------------------------------------------------------------------------------------ the pass around it

class Decoder:
    """Chapter 4's `forward` with this attention: the same call, the same logits.

    A pass of one run in which every writer feeds one token is captured as a CUDA graph when it first
    occurs, and launched as a whole from then on: Python no longer launches a thousand kernels. What
    changes (ids, slots, the tables) is written over the old values first, in one copy of a hundred
    integers. Other passes (a prompt, a step that opens, several runs) launch their kernels one by one.

        forward = Decoder()
        logits = forward(model, cache, tables, ids, last)      valid until the next call

    Args:
        capture: makes a launch out of a function, see capture_graph; None: that one, and on GPUs only.
    """

    def __init__(self, capture=None):
        self.capture = capture
        self.possible = True  # until a model turns out to do what cannot be captured
        self.owners, self.captured = (), {}  # captured: shape of the tables -> (static, launch, logits)

    def __call__(self, model, cache, tables, ids, last):
        """One forward pass over N new tokens; arguments and result as in chapter 4."""
        owners = model, cache, cache.slots  # a cache with more slots has moved its memory
        if self.owners != owners:
            self.owners, self.captured = owners, {}
        wanted = self.possible and (self.capture or model.device.type == "cuda")
        # The first pass of all makes the memory, so it cannot be captured.
        if wanted and len(tables) == 1 and len(ids) == len(last) and cache.keys:
            try:
                return self.launch(model, cache, *tables, ids, last)
            except RuntimeError as error:
                self.possible = False
                print(f"no CUDA graph of this model ({first_line(error)}): its kernels are launched "
                      "one by one", file=sys.stderr)
        return query_rotation.forward(model, cache, tables, ids, last, attention)

    def launch(self, model, cache, tables, ids, last):
        """A pass as a graph, which is captured if it is the first of its shape."""
        given = [torch.as_tensor(part) for part in (
            ids, last, cache.new_slots, tables.start, tables.position, tables.offset, tables.visible)]
        numbers, shape = torch.cat([part.flatten() for part in given]), tables.visible.shape  # all int64
        if shape not in self.captured:
            static = numbers.to(model.device)
            pieces = static.split([part.numel() for part in given])
            run = functools.partial(run_once, model, cache, *(
                piece.view(part.shape) for piece, part in zip(pieces, given)))
            with torch.cuda.device_of(static):
                self.captured[shape] = static, *(self.capture or capture_graph)(run)
        static, launch, logits = self.captured[shape]
        static.copy_(numbers)
        launch()
        return logits


def run_once(model, cache, ids, last, slots, *tables):
    """A pass from tensors alone. Its Tables are new, so what is derived from them is captured, too."""
    if "longrope" in str(getattr(model.config.get_text_config(), "rope_parameters", None)):
        raise RuntimeError("with longrope it asks the host for the length of the text")
    cache.new_slots = slots
    return query_rotation.forward(model, cache, [layouts.Tables(*tables)], ids, last, attention)


def capture_graph(run):
    """Capture what `run` launches as a CUDA graph. Returns (launch, the tensor that run returns).

    launch() does it all again. The graph knows addresses, not tensors: whatever `run` reads must live as
    long, so launch holds on to `run`.
    """
    # A warm-up: Triton compiles, libraries choose their algorithms, some only when called a second time.
    # What is done again writes the same keys to the same slots.
    run(), run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return (lambda run=run: graph.replay()), output


# ------------------------------------------------------------------------------------- what one can see

def picture(tables, names, splits, tile=64):
    """Which program reads which tiles: a line per row of the tables, a letter per tile."""
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    *_, bounds = prepare(tables, rotation, None, tile, torch.device("cpu"))  # [B + 1]
    ends = [s * int(bounds[-1]) // splits for s in range(splits + 1)]
    letters = "".join(chr(65 + s) * (ends[s + 1] - ends[s]) for s in range(splits))  # one per tile
    return "\n".join(f"  {name:9}{letters[i:j]}" for name, i, j in zip(names, bounds, bounds[1:]))


def decoder_against_chapter_4(device):
    """A small model, a prompt, three passes of two workers through both: the largest error of logits."""
    tiny = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(tiny).eval().to(device)
    ropes, logits = query_rotation.attach(model), []
    for forward in (query_rotation.forward, Decoder()):
        cache = shared_cache.SharedCache(ropes)
        history, alice, bob = (cache.block(64) for _ in range(3))
        both = [([history, bob, alice], 1), ([history, alice, bob], 1)]
        for writers in ([([history], 20)], both, both, both):
            cache.reserve([(view[-1], count) for view, count in writers])
            ids = range(sum(count for _, count in writers))
            last = ids[-len(writers):]
            logits.append(forward(model, cache, [layouts.fill_tables(writers)], ids, last).clone())
    ours, theirs = torch.cat(logits).chunk(2)
    return (ours - theirs).abs().max().item()


def main():
    """Draw who reads what, and compare kernel and Decoder with chapter 4."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ["history", "(others)", "Bob", "<...>", "Carol", "<...>", "Dave", "<...>", "(own)", "Alice"]
    print("4 workers, 1,000 tokens of history. A letter is a tile of 64 slots, and names the program "
          f"that reads it:\n\n{picture(query_rotation.example(1000, 4)[-1], names, splits=6)}\n\n"
          "  -> equal spans of one list: a piece of the history, or many small blocks, or both\n\n"
          f"the kernel {'(in the interpreter) ' * INTERPRETED}against its specification, by programs:")
    worst, splits = {}, (1, 5, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors = largest_errors(device, splits, dtype)
        worst[dtype] = max(errors)
        cells = ", ".join(f"{error:.0e} ({s})" for error, s in zip(errors, splits))
        print(f"  {str(dtype)[6:]:9} largest error {cells}")
    print("  -> splitting changes nothing but rounding; 40 programs are more than there are tiles")

    error = decoder_against_chapter_4(device)
    print(f"\na whole model through Decoder against chapter 4: logits differ by at most {error:.0e}\n"
          "(how fast it is on a GPU, launched as a graph: make speed)")
    assert worst[torch.float32] < 1e-5 and worst[torch.bfloat16] < 2e-2 and error < 1e-4
    print(f"[OK] one launch per layer gives chapter 4's result (float32: {worst[torch.float32]:.0e})\n\n"
          "Next: chapter 6 lets the workers write, through this kernel where there is a GPU.")


# Exercises
# 1. From how many workers on would attention no longer wait for memory (G = 5, 200 operations per byte)?
#    Why does the kernel lose its ideal earlier, and where in `constants` does that happen?
# 2. Replace the spans by one program per row and key head. How does the picture look, and who waits?
# 3. Leave out `fade` in the loop over tiles. Which tests fail, and why do some still pass?

if __name__ == "__main__":
    main()
