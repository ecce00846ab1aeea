r"""Chapter 5: the same attention as one GPU kernel, and a pass that is launched as one CUDA graph.

The problem. On a GPU, decoding waits for memory. Attention uses each cached number once per query: in
bfloat16 that is W G operations per byte, 20 for four workers of QwQ-32B, and an H200 could do 200 while
its memory delivers one byte. So the least time is known: the bytes of all keys and values, each read
*once*, over the bandwidth. Chapter 4's function is far from it: it launches dozens of kernels, widens
keys, writes scores to memory and reads them back. What comes near takes four ideas:

1. The queries of all workers and of the G heads that share a key are one matrix. A tile of keys is
   loaded once and multiplied with all of them: four workers read as many bytes as one.
2. Blocks differ in length (a history of 8,000 tokens, a separator of 6), and a GPU has a hundred
   processors. So all tiles form one list, and each program takes an *equal span* of it, in one loop:
   the next tiles are on their way while it computes on one, also where a row ends and another begins.
3. A program keeps the largest score so far (`peak`), the sum of weights (`total`) and the weighted sum
   of values (`result`). A higher peak shrinks both by 2^(old - new): exact, whatever the order.
4. What the programs leave is merged by the same factors, in a second small kernel. Whoever finishes
   last could do it, and save a launch, if there were a counter. But it would read one part after the
   other: a serial chain of round trips to the memory that all processors share, a fifth of a
   microsecond each, for a launch that takes about one. A kernel of its own loads all parts at once.

The kernels read lengths and tables from the GPU's memory, so captured launches stay valid when they
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

from transformers import LlamaConfig

try:
    import triton
    import triton.language as tl
    if [int(part) for part in triton.__version__.split(".")[:2]] < [3, 6]:
        raise ImportError(f"version {triton.__version__} is installed")
except ImportError as error:
    MISSING = f"chapter 5 needs Triton 3.6 or newer (pip install triton==3.7.1), no other does: {error}"
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from error

from appendix.command import first_line

rope = import_module("01_rope_shift")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

# The score of a key that is not seen. Not -inf: the difference of two of them has to be 0, not NaN.
UNSEEN_SCORE = tl.constexpr(-1e30)


@triton.jit
def load(pointers, wanted):
    """What stands there, and 0 where it is not wanted."""
    return tl.load(pointers, mask=wanted, other=0)


TABLES = "start", "skip", "length", "ends", "since", "visible", "chunks"  # see `prepare`

# Else it is compiled anew where a number is 1, or a table begins at a multiple of 16 bytes.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=TABLES)
def kernel(q, k, v, cos, sin, start, skip, length, ends, since, visible, chunks,
           results, peaks, totals,  # what is left for `merge`
           rows, scale, q_head, q_token, k_head, k_slot, v_head, v_slot,  # B, factor, strides
           GROUP: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,  # G Dv R/2 D-R
           ROTATED: tl.constexpr, FIXED: tl.constexpr,  # first dimension that rotates, that does not
           WINDOW: tl.constexpr, OPERAND: tl.constexpr,  # is there one? dtype of matrix products
           M: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HALF_TILE: tl.constexpr,  # sizes of
           REST_TILE: tl.constexpr, DV_TILE: tl.constexpr,  # register tiles, powers of two
           EARLY: tl.constexpr):  # exercise
    """One program: an equal span of all tiles of a run, for a chunk of M queries of a key head."""
    if EARLY:
        tl.extra.cuda.gdc_wait()  # until the kernel before has written what it writes
    split, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, heads = tl.num_programs(0), tl.num_programs(1)
    chunks += chunk * 6
    first, new, token = tl.load(chunks), tl.load(chunks + 1), tl.load(chunks + 2)
    cell, low, high = tl.load(chunks + 3), tl.load(chunks + 4), tl.load(chunks + 5)
    m = first + tl.arange(0, M)  # [M] queries of this key head and run, head by head: m = g * N + n
    n = m % new  # [M]
    real = m < GROUP * new  # the last chunk may have room for more queries than there are
    i, d, c = tl.arange(0, HALF_TILE), tl.arange(0, REST_TILE), tl.arange(0, DV_TILE)
    pair = real[:, None] & (i < HALF)  # [M, R/2]
    q += ((head * GROUP + m // new) * q_head + (token + n) * q_token)[:, None]  # [M, 1]
    k, v = k + head.to(tl.int64) * k_head, v + head.to(tl.int64) * v_head
    # In the list of all tiles, those of row b end before ends[b], and those of this run's rows are
    # low ... high - 1. This program does begin ... end - 1.
    begin = low + split * (high - low) // splits
    end = low + (split + 1) * (high - low) // splits
    b = tl.arange(0, ROWS)
    row_ends = tl.load(ends + b, mask=b < rows, other=2**30)  # [ROWS]

    peak, result = tl.full([M], UNSEEN_SCORE, tl.float32), tl.zeros([M, DV_TILE], tl.float32)
    total = tl.zeros([M, TILE], tl.float32)  # by place in a tile: to add these up at the end is enough
    q1, q2 = tl.zeros([M, HALF_TILE], OPERAND), tl.zeros([M, HALF_TILE], OPERAND)
    q3, zeros = tl.zeros([M, REST_TILE], OPERAND), tl.zeros([M], tl.int32)
    first_seen, end_seen = zeros, zeros
    row, rotated_for, row_end, row_skip, row_start, row_length = -1, -1, begin, 0, 0, 0
    # One loop, whatever the rows: the compiler lets its loads run some tiles ahead of its products. With
    # a loop per row, each row would begin with nothing on its way, and wait for memory's whole latency.
    for t in range(begin, end):
        if t == row_end:  # the loads reach another row
            row = tl.sum((row_ends <= t).to(tl.int32))
            row_end, row_skip = tl.load(ends + row), tl.load(skip + row)
            row_start, row_length = tl.load(start + row), tl.load(length + row)
        j = (t + row_skip) * TILE + tl.arange(0, TILE)  # [TILE] in-block indices
        # Memory that no query sees may never have been written. It is not read: 0 * NaN is NaN.
        written = j[:, None] < row_length
        keys = k + row_start.to(tl.int64) * k_slot + j[:, None] * k_slot  # [TILE, 1]
        values = v + row_start.to(tl.int64) * v_slot + j[:, None] * v_slot
        k1 = load(keys + ROTATED + i, written & (i < HALF)).to(OPERAND)  # [TILE, R/2]
        k2 = load(keys + ROTATED + HALF + i, written & (i < HALF)).to(OPERAND)
        v1 = load(values + c, written & (c < DV)).to(OPERAND)  # [TILE, Dv]
        if row != rotated_for:  # the products reach it: rotate the queries
            rotated_for = row
            # A register tile cannot be cut, so the dimensions i and i + R/2 of a pair are loaded as two
            # tiles of half the width, here and for the keys.
            column = cell + row * new + n  # [M] where in the tables this row and each query's token meet
            angle = column[:, None] * HALF + i
            cosine, sine = load(cos + angle, pair), load(sin + angle, pair)  # [M, R/2] float32
            x, y = load(q + ROTATED + i, pair), load(q + ROTATED + HALF + i, pair)  # [M, R/2]
            q1 = (x * cosine - y * sine).to(OPERAND)  # [M, R/2]
            q2 = (y * cosine + x * sine).to(OPERAND)
            if REST > 0:
                q3 = load(q + FIXED + d, real[:, None] & (d < REST)).to(OPERAND)  # [M, D - R]
            end_seen = load(visible + column, real)  # [M] how many leading slots they see ...
            if WINDOW:
                first_seen = load(since + column, real)  # [M] ... but for the first ones
        # ieee: float32 numbers are multiplied as they are, not rounded to TF32 before
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")  # [M, TILE]
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        if REST > 0:
            k3 = load(keys + FIXED + d, written & (d < REST)).to(OPERAND)  # [TILE, D - R]
            score = tl.dot(q3, tl.trans(k3), score, input_precision="ieee")
        seen = j[None, :] < end_seen[:, None]
        if WINDOW:
            seen &= j[None, :] >= first_seen[:, None]
        # In units of log 2, as exp2 is what a GPU has. While a query has seen nothing, its weights are
        # 1, not 0. No harm: at the first key that it sees, here or in `merge`, `fade` is 0.
        score = tl.where(seen, score * scale, UNSEEN_SCORE)
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])  # [M, TILE]
        fade = tl.exp2(peak - higher)[:, None]  # [M, 1]
        total = total * fade + weight
        result = tl.dot(weight.to(OPERAND), v1, result * fade, input_precision="ieee")
        peak = higher

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # `merge` may take its places, and waits there
    cells = ((chunk * heads + head).to(tl.int64) * splits + split) * M + tl.arange(0, M)  # [M]
    tl.store(peaks + cells, peak)
    tl.store(totals + cells, tl.sum(total, 1))
    tl.store(results + cells[:, None] * DV + c, result, mask=real[:, None] & (c < DV))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["chunks"])
def merge(out, results, peaks, totals, chunks, splits, GROUP: tl.constexpr, DV: tl.constexpr,
          M: tl.constexpr, SPLITS: tl.constexpr, PIECE: tl.constexpr, EARLY: tl.constexpr):  # exercise
    """One program: a piece of a query's output, from what its spans left. All loads leave together."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    chunk, head = tl.program_id(0) // M, tl.program_id(1)
    s, c = tl.arange(0, SPLITS), tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    cells = ((chunk * tl.num_programs(1) + head).to(tl.int64) * splits + s) * M + tl.program_id(0) % M
    peak = tl.load(peaks + cells, mask=s < splits, other=UNSEEN_SCORE)  # [SPLITS]
    total = load(totals + cells, s < splits)
    part = load(results + cells[:, None] * DV + c, (s < splits)[:, None] & (c < DV))  # [SPLITS, PIECE]
    chunks += chunk * 6
    m, new, token = tl.load(chunks) + tl.program_id(0) % M, tl.load(chunks + 1), tl.load(chunks + 2)
    part = tl.where(m < GROUP * new, part, 0)  # there is a query: `kernel` has written its results
    fade = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(fade[:, None] * part, 0) / tl.sum(fade * total, 0)
    out += ((token + m % new) * tl.num_programs(1) * GROUP + head * GROUP + m // new) * DV
    tl.store(out + c, result.to(out.dtype.element_ty), mask=(m < GROUP * new) & (c < DV))


INTERPRETED = not isinstance(kernel, triton.JITFunction)
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * log2(e))
TILE_BYTES = 16384  # size of a tile of keys, and of one of values, and of the queries
PROGRAMS_IN_THE_INTERPRETER = 8  # they run one after the other there
EARLY = False  # programmatic dependent launch (from Hopper on); nobody has measured what it gives


def power_of_two(n):
    """The smallest register tile that holds n numbers: a power of two, for matrix units at least 16."""
    return max(16, triton.next_power_of_2(n))


def constants(group, new, size, wide, rows, rotation, window, dtype, most):
    """What the kernel is compiled for: given G, N, D, Dv, B, the Rope, the window, the keys' dtype, and
    the most queries of a program.

    N and B count only through sizes of tiles. (In the interpreter bfloat16 products would be wrong.)
    """
    rotated = 2 * len(rotation.inv_freq)  # R
    rest, last = size - rotated, rotation.rotates_last
    vectors = max(16, TILE_BYTES // (dtype.itemsize * power_of_two(max(size, wide))))  # that fill a tile
    # 64 x 128 sums of values fill an eighth of a processor's registers, 4,096 scores 16 in each thread.
    queries = min(most, vectors, power_of_two(group * new))
    operand = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    return dict(GROUP=group, HALF=rotated // 2, REST=rest, DV=wide, ROTATED=last * rest,
                FIXED=(not last) * rotated, WINDOW=window is not None,
                OPERAND=getattr(tl, str(operand)[6:]), M=queries,
                TILE=min(128, vectors, 4096 // queries), ROWS=power_of_two(rows), EARLY=EARLY,
                HALF_TILE=power_of_two(rotated // 2), REST_TILE=power_of_two(rest),
                DV_TILE=power_of_two(wide))


def options(generation, memory):
    """(most queries of a program, how it is compiled) on GPUs of a generation (9: Hopper) that give it
    this many bytes of shared memory: there num_stages - 1 tiles arrive while 8 warps compute on one. It
    has a processor with all its registers for itself. (Before Hopper, 64 queries do not fit into them.)
    """
    how = dict(num_warps=8, num_stages=4 if memory >= 160 * 1024 else 3, maxnreg=255)
    return 64 if generation >= 9 else 32, how


@functools.cache
def processors(device):
    """(programs that run at once, *options) of this device."""
    if device.type != "cuda":
        return PROGRAMS_IN_THE_INTERPRETER, 64, {}
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, *options(
        found.major, getattr(found, "shared_memory_per_block_optin", 49152))


@functools.cache
def on_device(rotation, device):
    """The Rope with its frequencies on `device`. Kept for good: captured graphs go on reading them."""
    return replace(rotation, inv_freq=rotation.inv_freq.to(device))


def prepare(runs, rotation, window, group, queries, tile, device):  # exercise
    """What the kernel reads besides q, k and v, once for all layers of a kind. runs: a list of Tables.

    Returns: cos, sin [cells, R/2], how far each query rotates for each row; TABLES, int32, in one copy.
        For each row of all runs [B]: start; skip, from the list of all tiles to its own tiles; length,
        how many slots anybody sees; ends, where in the list it ends. For each row and token [cells], one
        run's [B, N] after the other: slots since ... visible - 1 are seen. For each chunk of queries, 6:
        its first; its run's N, first token, and cell of row 0 (where row 0 would have it); where in the
        list its run's rows begin and end.
    """
    kind = rotation, window, group, queries, tile, device, *runs[1:]
    if kind not in runs[0].derived:
        parts, row, token, cell, low = [], 0, 0, 0, 0
        for of_run in runs:
            rows, new = of_run.visible.shape
            since = query_rotation.first_slots(of_run, window)  # [B, N]
            sees = since < of_run.visible
            length = torch.where(sees, of_run.visible, 0).amax(1)  # [B]
            first_tile = torch.where(sees, since, length[:, None]).amin(1) // tile  # [B]
            tiles = (length + tile - 1) // tile - first_tile  # [B]
            ends = low + tiles.cumsum(0)  # [B]
            first = torch.arange(0, group * new, queries, device=ends.device)  # [chunks]
            chunks = torch.stack([first, *(first * 0 + number for number in (
                new, token, cell - row * new, low, ends[-1]))], 1)
            parts.append((of_run.start, first_tile - ends + tiles, length, ends, since.flatten(),
                          of_run.visible.flatten(), chunks.flatten(), of_run.offset.flatten()))
            row, token, cell, low = row + rows, token + new, cell + rows * new, ends[-1]
        parts = [torch.cat(part) for part in zip(*parts)]
        *tables, offset = torch.cat(parts).to(device, torch.int32).split([len(part) for part in parts])
        runs[0].derived[kind] = *rope.cos_sin(on_device(rotation, device), offset), *tables
    return runs[0].derived[kind]


def attention(q, k, v, tables, rotation, scale, window=None, splits=None):
    """Chapter 4's function in two launches; same arguments, same result. For CUDA tensors.

    Scores, softmax and sums are float32. In 16 bits, rotated queries and weights are rounded on their
    way into the products. For a token that sees nothing the result is arbitrary; a pass has none.

    Args:
        tables: also a list, of runs whose tokens follow each other in q. A chunk of queries meets the
            rows of its own run alone.
        splits: programs per key head and chunk, however long its run; None: as fill the processors.
    Raises:
        ValueError: the tensors are not on a GPU, or gradients are wanted.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("the kernel computes no gradients: use chapter 4's attention for training")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the kernel needs CUDA tensors, not {q.device}: use chapter 4's attention")
    runs = tables if isinstance(tables, list) else [tables]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads, (query_heads, new, size), wide = len(k), q.shape, v.shape[2]
    group, rows = query_heads // heads, sum(len(of_run.start) for of_run in runs)
    programs, most, how = processors(q.device)
    new_of_one = max(len(of_run.position) for of_run in runs)
    const = constants(group, new_of_one, size, wide, rows, rotation, window, k.dtype, most)
    given = prepare(runs, rotation, window, group, const["M"], const["TILE"], q.device)
    chunks = len(given[-1]) // 6
    splits = splits or max(1, programs // (heads * chunks))
    out = q.new_empty(new, query_heads, wide)  # [N, Hq, Dv], in the order in which the model reads on
    cells = chunks * heads * splits * const["M"]
    left = [torch.empty(cells * width, dtype=torch.float32, device=q.device) for width in (wide, 1, 1)]
    across = power_of_two(splits)
    piece = min(const["DV_TILE"], max(16, 4096 // across))  # of Dv: 16 numbers in each thread
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[splits, heads, chunks](
            q, k, v, *given, *left, rows, scale * LOG2_E, *q.stride()[:2], *k.stride()[:2],
            *v.stride()[:2], **const, launch_pdl=EARLY, **how)
        merge[chunks * const["M"], heads, triton.cdiv(wide, piece)](
            out, *left, given[-1], splits, group, wide, const["M"], across, piece, EARLY,
            launch_pdl=EARLY, **how)
    return out.transpose(0, 1)  # [Hq, N, Dv]


def largest_errors(device, splits, dtype=torch.float32):
    """The kernel against chapter 4's specification: the largest error for each number of programs."""
    *tensors, tables = query_rotation.example(300, 4, dtype, heads=2)
    rest = tables, rope.inverse_frequencies(LlamaConfig(head_dim=64)), 0.125
    exact = query_rotation.attention_spec(*(x.float() for x in tensors), *rest)  # [Hq, N, D]
    tensors = [x.to(device) for x in tensors]
    return [rope.largest(attention(*tensors, *rest, splits=s).cpu() - exact) for s in splits]


def check(device):
    """Try the kernel on `device` once. Raises RuntimeError if it gives something else than chapter 4."""
    error, = largest_errors(device, [None])
    if not error < 1e-3:
        raise RuntimeError(f"the kernel does not work on this device: its results are off by {error}")


# ------------------------------------------------------------------------------------ the pass around it

class Decoder:
    """Chapter 4's `forward` with this attention: the same call, the same logits.

    A pass in which every writer feeds one token, of a shape that occurs a second time (as the end of a
    prompt does not), is captured as a CUDA graph, and launched as a whole from then on: Python no longer
    launches a thousand kernels. What changes (ids, slots, the tables) is written over the old values
    first, in one copy. Other passes go kernel by kernel. The logits are valid until the next call.
    """

    def __init__(self, capture=None):
        self.capture = capture  # see capture_graph, which it is on GPUs if there is no other
        self.possible = True  # until a model turns out to do what cannot be captured
        # captured: shapes of all tables -> None (it occurred once), or (static, launch, logits)
        self.owners, self.captured = (), {}

    def __call__(self, model, cache, tables, ids, last):
        """One forward pass over N new tokens; arguments and result as in chapter 4."""
        owners = model, cache, cache.slots  # a cache with more slots has moved its memory
        if self.owners != owners or len(self.captured) > 32:  # (each takes memory)
            self.owners, self.captured = owners, {}
        shapes = tuple(of_run.visible.shape for of_run in tables)
        if self.possible and (self.capture or model.device.type == "cuda") and len(ids) == len(last):
            if shapes in self.captured:
                try:
                    return self.launch(shapes, model, cache, tables, ids, last)
                except RuntimeError as error:
                    self.possible = False
                    print(f"no CUDA graph of this model ({first_line(error)}): its kernels are launched "
                          "one by one", file=sys.stderr)
            self.captured[shapes] = None
        return query_rotation.forward(model, cache, tables, ids, last, attention)

    def launch(self, shapes, model, cache, tables, ids, last):  # exercise
        """A pass as a graph, which is captured if there is none of these shapes of Tables."""
        given = [torch.as_tensor(part) for part in (ids, last, cache.new_slots, *(
            part for one in tables for part in (one.start, one.position, one.offset, one.visible)))]
        numbers = torch.cat([part.flatten() for part in given])  # all int64
        if self.captured[shapes] is None:
            static = numbers.to(model.device)
            pieces = static.split([part.numel() for part in given])
            run = functools.partial(run_once, model, cache, *(
                piece.view(part.shape) for piece, part in zip(pieces, given)))
            with torch.cuda.device_of(static):
                self.captured[shapes] = static, *(self.capture or capture_graph)(run)
        static, launch, logits = self.captured[shapes]
        static.copy_(numbers)
        launch()
        return logits


def run_once(model, cache, ids, last, slots, *parts):
    """A pass from tensors alone. Its Tables are new, so what is derived from them is captured, too."""
    if "longrope" in str(getattr(model.config.get_text_config(), "rope_parameters", None)):
        raise RuntimeError("with longrope it asks the host for the length of the text")
    cache.new_slots = slots
    tables = [layouts.Tables(*parts[i:i + 4]) for i in range(0, len(parts), 4)]
    return query_rotation.forward(model, cache, tables, ids, last, attention)


def capture_graph(run):
    """Capture what `run` launches as a CUDA graph. Returns (launch, the tensor that it writes).

    The graph knows addresses, not tensors: whatever `run` reads must live as long, so launch holds on
    to `run`.
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
    prepared = prepare([tables], rope.inverse_frequencies(LlamaConfig(head_dim=64)), None, 1, 16, tile,
                       device="cpu")
    bounds = [0, *prepared[2 + TABLES.index("ends")].tolist()]
    ends = [s * bounds[-1] // splits for s in range(splits + 1)]
    letters = "".join(chr(65 + s) * (ends[s + 1] - ends[s]) for s in range(splits))  # one per tile
    return "\n".join(f"  {name:9}{letters[i:j]}" for name, i, j in zip(names, bounds, bounds[1:]))


def main():
    """Draw who reads what, and compare the kernel with chapter 4."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    print("  -> splitting changes nothing but rounding; 40 programs are more than there are tiles\n\n"
          "(how fast it is on a GPU, and a whole pass that is launched as a graph: make speed)")
    assert worst[torch.float32] < 1e-5 and worst[torch.bfloat16] < 2e-2
    print(f"[OK] the two kernels give chapter 4's result (float32: {worst[torch.float32]:.0e})\n\n"
          "Next: chapter 6 lets the workers write, through this kernel where there is a GPU.")


# To rebuild this file and be checked: make exercise CHAPTER=5 DIR=mine. Questions, which
# `python appendix/solutions.py 5.1` and so on answer by measuring:
# 1. From how many workers on does attention not wait for memory (G = 5)? Does the kernel get there?
# 2. One program per row instead of equal spans: who waits for whom?
# 3. Leave out `fade` in the loop over tiles. When does it show?

if __name__ == "__main__":
    main()
