r"""Chapter 5: the same attention as one GPU kernel, and a decoding pass that replays as one CUDA graph.

The problem. On a GPU, decoding waits for memory. Per layer, cached token and key head, attention reads 2 D numbers (a key
and a value), and multiplies and adds each of them once per query: W workers times G heads. In bfloat16 that is W G
operations per byte, 20 for four workers of QwQ-32B, while the matrix units of an H200 could do about 200 in the time in
which its memory delivers one. So the least time that a layer's attention can take is known beforehand: the bytes of all
cached keys and values, each read *once*, over the bandwidth. Chapter 4's function on a GPU is far from it: it widens keys,
writes scores to memory, reads them back, and launches dozens of kernels.

What this file builds:

    kernel      chapter 4's function in one launch per layer: rotation, scores, softmax, values, and the merge at the end
    attention   its wrapper, with the signature of chapter 4
    Decoder     chapter 4's `forward` with this attention; on a GPU it records the pass of one token per worker once, as a
                CUDA graph, and replays it, so that Python no longer launches a thousand kernels per pass

Four ideas, each a few lines of the kernel:

1. The queries of all workers and of the G heads that share a key are one matrix of G N rows. A tile of keys is loaded once
   and multiplied with all of them: four workers read as many bytes as one. (More than 64 rows are cut into chunks, and
   each chunk asks for the keys again.)
2. A GPU has a hundred processors, and the blocks of a cache are of very different lengths (a history of 8,000 tokens, a
   separator of 6). So the tiles of all blocks are thought of as one long list, and each program takes an *equal span* of
   it, wherever that begins and ends. With one program per block, all would wait for the history.
3. A program keeps, per query, the largest score so far (`peak`), the sum of weights (`total`) and the weighted sum of
   values (`result`). Where a larger score comes, the old sums shrink by 2^(old peak - new peak): up to rounding, the
   softmax over what was seen is exact, whatever the order.
4. Partial softmaxes of different programs are merged with the same factors, so splitting the list changes rounding only.
   Whoever finishes last does it: no second launch.

What to notice: the kernel reads lengths and tables from device memory, so a recorded launch may be replayed after they
have changed. Left out: gradients. Who sees what is in the tables alone, as in chapter 4.

Run it: python 05_triton_kernel.py    (without a GPU in Triton's interpreter: slow, and bfloat16 products are float32 there)
"""
import functools
import os
import sys
from dataclasses import replace
from importlib import import_module
from statistics import median

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before transformers is imported, which imports Triton

import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, LlamaConfig

try:
    import triton
    import triton.language as tl
    if [int(part) for part in triton.__version__.split(".")[:2]] < [3, 6]:
        raise ImportError(f"version {triton.__version__} is installed")
except ImportError as error:
    MISSING = f"chapter 5 needs Triton 3.6 or newer (Linux: pip install triton==3.7.1), all others run without it: {error}"
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from error

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

NOTHING = tl.constexpr(-1e30)  # the score of what is not seen. Not -inf: where a query has seen nothing yet, -inf - -inf is NaN


@triton.jit(do_not_specialize=["rows", "new"])  # else it is compiled anew where they happen to be 1, or multiples of 16
def kernel(q, k, v, out, cos, sin, start, position, offset, visible, first_tile, bounds,  # what is given: see `prepare`
           results, peaks, totals, arrived,  # what programs leave for each other
           rows, new, scale, q_head, q_token, k_head, k_slot, v_head, v_slot, out_head, out_token,  # B, N, factor, strides
           GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr,  # G, R/2, D - R, Dv
           TURNED: tl.constexpr, SAME: tl.constexpr,  # first turned and first unturned dimension of a key
           WINDOW: tl.constexpr, OPERAND: tl.constexpr,  # 0: no window; dtype of matrix products
           # sizes of register tiles, powers of two and at least 16:
           M: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, HALF_TILE: tl.constexpr, REST_TILE: tl.constexpr,
           DV_TILE: tl.constexpr):
    """One program: an equal span of all tiles, for one key head (its G query heads) and M of their queries."""
    split, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    m = chunk * M + tl.arange(0, M)  # [M] queries of this key head, query head by query head: m = g * N + n
    n = m % new
    real = m < GROUP * new  # the last chunk may have room for more queries than there are
    i, d, c = tl.arange(0, HALF_TILE), tl.arange(0, REST_TILE), tl.arange(0, DV_TILE)
    q += (head * GROUP + m // new) * q_head + n * q_token  # [M] where each query begins
    out += (head * GROUP + m // new) * out_head + n * out_token
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head

    # The list of all tiles: row b has the tiles bounds[b] ... bounds[b + 1] - 1. This program does begin ... end - 1. They
    # lie in the last row that starts at or before `begin` (an empty row starts where the next one does), and those up to `end`.
    row_starts = tl.load(bounds + tl.arange(0, ROWS), mask=tl.arange(0, ROWS) < rows, other=2**30)  # [ROWS]
    tiles = tl.load(bounds + rows).to(tl.int32)  # (32 bits are enough but for addresses, and take half the registers)
    begin = split * tiles // splits
    end = (split + 1) * tiles // splits
    first_row = tl.sum((row_starts <= begin).to(tl.int32)) - 1
    end_row = tl.sum((row_starts < end).to(tl.int32))

    peak = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, DV_TILE], tl.float32)
    for row in range(first_row, end_row):
        column = row * new + n  # [M] where in the tables [B, N] this row and each query's token meet
        # Turn the queries for this row. A register tile cannot be cut, so the dimensions i and i + R/2 of a pair are loaded
        # as two tiles of half the width, here and for the keys.
        angle, pair = column[:, None] * HALF + i, real[:, None] & (i < HALF)
        turn_x = tl.load(cos + angle, mask=pair, other=0.0)
        turn_y = tl.load(sin + angle, mask=pair, other=0.0)
        x = tl.load(q[:, None] + TURNED + i, mask=pair, other=0.0).to(tl.float32)
        y = tl.load(q[:, None] + TURNED + HALF + i, mask=pair, other=0.0).to(tl.float32)
        q1 = (x * turn_x - y * turn_y).to(OPERAND)  # [M, R/2]
        q2 = (y * turn_x + x * turn_y).to(OPERAND)
        if REST > 0:
            q3 = tl.load(q[:, None] + SAME + d, mask=real[:, None] & (d < REST), other=0.0).to(OPERAND)  # [M, D - R]
        sees = tl.load(visible + column, mask=real, other=0).to(tl.int32)  # [M] how many leading slots
        here = (tl.load(position + n, mask=real, other=0) + tl.load(offset + column, mask=real, other=0)).to(tl.int32)
        # No query of this chunk sees more, and memory beyond may be unwritten: it is not read, as 0 times NaN is NaN.
        length = tl.max(sees)
        block_k = k + tl.load(start + row) * k_slot
        block_v = v + tl.load(start + row) * v_slot
        row_begin, row_end = tl.load(bounds + row).to(tl.int32), tl.load(bounds + row + 1).to(tl.int32)
        skip = tl.load(first_tile + row).to(tl.int32) - row_begin  # from a place in the list to a tile of this row
        low = tl.maximum(begin, row_begin) + skip
        high = tl.minimum(end, row_end) + skip
        for tile in range(low, high):
            j = tile * TILE + tl.arange(0, TILE)  # [TILE] in-block indices
            written = j[:, None] < length
            keys = block_k + j[:, None] * k_slot
            k1 = tl.load(keys + TURNED + i, mask=written & (i < HALF), other=0.0).to(OPERAND)  # [TILE, R/2]
            k2 = tl.load(keys + TURNED + HALF + i, mask=written & (i < HALF), other=0.0).to(OPERAND)
            values = tl.load(block_v + j[:, None] * v_slot + c, mask=written & (c < DV), other=0.0).to(OPERAND)
            score = tl.dot(q1, tl.trans(k1), input_precision="ieee")  # (ieee: float32 products as float32, not rounded to TF32)
            score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
            if REST > 0:
                k3 = tl.load(keys + SAME + d, mask=written & (d < REST), other=0.0).to(OPERAND)
                score = tl.dot(q3, tl.trans(k3), score, input_precision="ieee")
            seen = j[None, :] < sees[:, None]
            if WINDOW > 0:
                seen &= here[:, None] - j[None, :] < WINDOW  # the distance in the view
            score = tl.where(seen, score * scale, NOTHING)  # [M, TILE], in units of log 2: exp2 is the GPU's own
            higher = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])  # 1 where nothing has been seen yet: junk, which ...
            fade = tl.exp2(peak - higher)  # ... is multiplied by 0 when the first key is seen, here or in the merge
            total = total * fade + tl.sum(weight, 1)
            result = tl.dot(weight.to(OPERAND), values, result * fade[:, None], input_precision="ieee")
            peak = higher

    # Leave what this span gave. Whoever comes last merges all spans, in a fixed order: the result does not depend on who it is.
    counter = chunk * tl.num_programs(1) + head
    cells = (counter.to(tl.int64) * splits + split) * M + tl.arange(0, M)  # [M]
    kept = real[:, None] & (c < DV)
    tl.store(peaks + cells, peak)
    tl.store(totals + cells, total)
    tl.store(results + cells[:, None] * DV_TILE + c, result, mask=kept)
    tl.debug_barrier()  # every thread of this program has stored before one of them says so. (atomic_add releases what was
    if tl.atomic_add(arrived + counter, 1) == splits - 1:  # stored before it, and acquires what others released)
        tl.store(arrived + counter, 0)  # for the next launch
        cells = counter.to(tl.int64) * splits * M + tl.arange(0, M)
        peak = tl.full([M], NOTHING, tl.float32)
        for s in tl.range(splits, loop_unroll_factor=4):  # (.cg: read from the cache that all processors share)
            peak = tl.maximum(peak, tl.load(peaks + cells + s * M, cache_modifier=".cg"))
        total = tl.zeros([M], tl.float32)
        result = tl.zeros([M, DV_TILE], tl.float32)
        for s in tl.range(splits, loop_unroll_factor=4):
            fade = tl.exp2(tl.load(peaks + cells + s * M, cache_modifier=".cg") - peak)
            total += fade * tl.load(totals + cells + s * M, cache_modifier=".cg")
            part = results + (cells + s * M)[:, None] * DV_TILE + c
            result += fade[:, None] * tl.load(part, mask=kept, other=0.0, cache_modifier=".cg")
        tl.store(out[:, None] + c, (result / total[:, None]).to(out.dtype.element_ty), mask=kept)


INTERPRETED = not isinstance(kernel, triton.JITFunction)
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * log2(e))

TILE_BYTES = 16384  # size of a tile of keys, and of one of values, and of the queries
PROGRAMS_IN_THE_INTERPRETER = 8  # they run one after the other there


def power_of_two(n):
    """The smallest register tile that holds n numbers: a power of two, at least 16 (for the matrix units)."""
    return max(16, triton.next_power_of_2(n))


def constants(group, new, size, wide, rows, rotation, window, dtype):
    """What the kernel is compiled for, given G, N, D, Dv, B, the Rope, the window, and the dtype of the keys.

    (N and B count only through the size of the tiles that hold them.)
    """
    half = len(rotation.inv_freq)
    room = max(16, TILE_BYTES // (dtype.itemsize * power_of_two(max(size, wide))))  # vectors in a tile
    queries = min(64, room, power_of_two(group * new))  # 64 x 128 sums of values fill an eighth of a processor's registers
    operand = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype  # the interpreter's would be wrong
    return dict(GROUP=group, HALF=half, REST=size - 2 * half, DV=wide, WINDOW=window or 0,
                TURNED=size - 2 * half if rotation.rotates_last else 0, SAME=0 if rotation.rotates_last else 2 * half,
                OPERAND=getattr(tl, str(operand).removeprefix("torch.")), M=queries,
                TILE=min(128, room, 4096 // queries),  # 4,096 scores: 16 registers per thread
                ROWS=power_of_two(rows), HALF_TILE=power_of_two(half),
                REST_TILE=power_of_two(size - 2 * half), DV_TILE=power_of_two(wide))


def options(shared_memory):
    """How the kernel is compiled for a GPU with so many bytes of shared memory per program.

    One program per processor has all registers there to itself, and all shared memory: that is where tiles wait that are on
    their way from memory (num_stages - 1 of them) while 8 warps compute on one.
    """
    return dict(num_warps=8, num_stages=4 if shared_memory >= 160 * 1024 else 3, maxnreg=255)


@functools.cache
def processors(device):
    """(programs that run at once, options) on this device."""
    if device.type != "cuda":
        return PROGRAMS_IN_THE_INTERPRETER, {}
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, options(properties.shared_memory_per_block_optin)


@functools.cache  # graphs read them
def on_device(rotation, device):
    """The Rope with its frequencies on `device`. Copied once: while a graph is recorded, the host's memory cannot be copied."""
    return replace(rotation, inv_freq=rotation.inv_freq.to(device))


@functools.cache
def counters(device):
    """[65536] zeros: for each key head and chunk of queries, how many programs are through. Every launch leaves zeros.

    All launches share them, so launches have to follow each other, on one stream.
    """
    return torch.zeros(65536, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)  # all layers of a pass share it: one entry per Rope and window
def prepare(tables, rotation, window, tile, device):
    """What the kernel reads besides q, k and v, on the device; made there, so that a graph records how it is made.

    Returns:
        (cos, sin, start, position, offset, visible, first_tile, bounds): cos, sin [B, N, R/2], the residual rotation of
        each query for each row; the tables; first_tile [B], the first tile of each row that anybody sees (0 without a
        window); and bounds [B + 1], the number of tiles before each row.
    """
    start, position, offset, visible = (t.to(device) for t in (tables.start, tables.position, tables.offset, tables.visible))
    near = torch.zeros_like(visible)  # [B, N] first slot that is near enough
    if window is not None:
        near = (position + offset - window + 1).clamp(min=0)
    end = torch.where(near < visible, visible, 0).amax(1)  # [B] the slots that anybody sees end here ...
    first_tile = torch.where(near < visible, near, end[:, None]).amin(1) // tile  # [B] ... and begin in this tile
    bounds = F.pad(((end + tile - 1) // tile - first_tile).cumsum(0), (1, 0))  # [B + 1]
    cos, sin = rope.cos_sin(on_device(rotation, device), offset)
    return cos, sin, start, position, offset, visible, first_tile, bounds


def attention(q, k, v, tables, rotation, scale, window=None, splits=None):
    """Chapter 4's function in one launch; same arguments, same result. For CUDA tensors (or Triton's interpreter).

    (Only for a token that sees nothing at all the result is arbitrary; every token of a pass sees itself.)

    Scores, softmax and sums are float32. In 16 bits, turned queries and weights are rounded on their way into the products;
    where the offset is 0 a query is not turned, and not rounded again.

    Args:
        splits: programs per key head and chunk of queries; None: as many as fill the processors, rounded down.
    Raises:
        ValueError: the tensors are not on a GPU, gradients are wanted, or there are too many queries at once.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("the kernel computes no gradients: use chapter 4's attention for training")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the kernel needs CUDA tensors, and these are on {q.device}: use chapter 4's attention")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads, group, new, size, wide = k.shape[0], q.shape[0] // k.shape[0], q.shape[1], q.shape[2], v.shape[2]  # Hk G N D Dv
    const = constants(group, new, size, wide, len(tables.start), rotation, window, k.dtype)
    programs, compile_options = processors(q.device)
    chunks = triton.cdiv(group * new, const["M"])
    splits = splits or max(1, programs // (heads * chunks))
    if heads * chunks > len(counters(q.device)):
        raise ValueError(f"{new:,} tokens of {heads} key heads are too many for one launch: feed them in several passes")
    given = prepare(tables, rotation, window, const["TILE"], q.device)
    out = q.new_empty(new, q.shape[0], wide).transpose(0, 1)  # [Hq, N, Dv], in the order in which the model reads on
    cells = chunks * heads * splits * const["M"]
    peaks, totals = torch.empty(2, cells, dtype=torch.float32, device=q.device)
    results = torch.empty(cells, const["DV_TILE"], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        kernel[splits, heads, chunks](
            q, k, v, out, *given, results, peaks, totals, counters(q.device), len(tables.start), new, scale * LOG2_E,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
            **const, **compile_options)
    return out


def check(device):
    """Try the kernel on `device` once. Raises RuntimeError if it gives something else than chapter 4's function."""
    q, k, v, tables = query_rotation.example(100, 2)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    result = attention(*(x.to(device) for x in (q, k, v)), tables, rotation, 0.125).cpu()
    error = (result - query_rotation.attention(q, k, v, tables, rotation, 0.125)).abs().max().item()
    if not error < 1e-3:
        raise RuntimeError(f"the kernel does not work on this device: its results are off by {error}")


# --------------------------------------------------------------------------------------------------- the pass around it

class Decoder:
    """Chapter 4's `forward` with this attention: the same call, the same logits.

    On a GPU, a pass in which every writer feeds one token is recorded as a CUDA graph when it first occurs (once per number
    of writers) and replayed from then on. Shapes and addresses are the same every time; what changes (ids, slots, and the
    two tables) is written over the old values before each replay: one copy of a hundred integers, or a thousand with 16
    workers. All other passes (the prompt, a worker who opens a step) launch their kernels one by one.

        forward = Decoder()
        logits = forward(model, cache, tables, ids, last)      valid until the next call

    Args:
        record: makes a replay out of a function, see record_graph; None: record_graph on GPUs, nothing elsewhere.
    """

    def __init__(self, record=None):
        self.record = record
        self.possible = True  # until a model turns out to do what cannot be recorded
        self.owners, self.recorded = (None, None), {}  # model and cache that were recorded; shape of the tables -> recording

    def __call__(self, model, cache, tables, ids, last):
        """One forward pass over N new tokens; arguments and result as in chapter 4."""
        if self.owners[0] is not model or self.owners[1] is not cache:
            self.owners, self.recorded = (model, cache), {}
        one_each = len(ids) == len(last)  # every writer feeds one token
        wanted = self.possible and (self.record or model.device.type == "cuda")
        if not (wanted and one_each and cache.keys):  # (the first pass of all makes the memory, so it cannot be recorded)
            return query_rotation.forward(model, cache, tables, ids, last, attention)
        numbers = torch.cat([torch.as_tensor(ids), torch.as_tensor(last), cache.new_slots, tables.start, tables.position,
                             tables.offset.flatten(), tables.visible.flatten()])  # all int64
        shape = tables.visible.shape
        if shape not in self.recorded:
            try:
                with torch.cuda.device_of(model.get_input_embeddings().weight):
                    self.recorded[shape] = self._record(model, cache, numbers.to(model.device), *shape)
            except RuntimeError as error:
                self.possible, reason = False, (str(error).splitlines() or [type(error).__name__])[0]
                print(f"no CUDA graph of this model ({reason}): passes are launched kernel by kernel", file=sys.stderr)
                return query_rotation.forward(model, cache, tables, ids, last, attention)
        static, replay, logits = self.recorded[shape]
        static.copy_(numbers)
        replay()
        return logits

    def _record(self, model, cache, static, rows, new):
        """Record a pass that reads all that changes from `static`: (static, replay, logits)."""
        sizes = [new, new, new, rows, new, rows * new, rows * new]
        ids, last, slots, start, position, offset, visible = static.split(sizes)

        def run():  # new Tables each time, which `prepare` has not seen before: so what it computes is recorded too
            cache.new_slots = slots
            tables = layouts.Tables(start, position, offset.view(rows, new), visible.view(rows, new))
            return query_rotation.forward(model, cache, tables, ids, last, attention)
        return static, *(self.record or record_graph)(run)


def record_graph(run):
    """Record what `run` launches as a CUDA graph: (a function that launches it all again, the tensor that run returns).

    The graph knows addresses, not tensors: whatever `run` reads must live as long. So the function holds on to `run`.
    """
    stream = torch.cuda.Stream()  # of its own, as graphs are recorded on one too
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):  # A warm-up: Triton compiles, libraries choose their algorithms (twice: some wait for a
            run(), run()  # second call). What is done again writes the same keys to the same slots.
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay(run=run):
        graph.replay()
    return replay, output


# ---------------------------------------------------------------------------------------------------- what one can see

COLOURS = ["cyan", "magenta", "green", "yellow", "white", "blue", "red"]


def picture(tables, rotation, names, splits, tile):
    """Which program reads which tiles: a line per row of the tables, a letter per tile."""
    bounds = prepare(tables, rotation, None, tile, torch.device("cpu"))[-1].tolist()  # [B + 1]
    lines = Text()
    for row, name in enumerate(names):
        lines.append(f"  {name:9}")
        for t in range(bounds[row], bounds[row + 1]):
            program = next(s for s in range(splits) if t < (s + 1) * bounds[-1] // splits)
            lines.append(chr(ord("A") + program % 26), style=f"black on {COLOURS[program % len(COLOURS)]}")
        lines.append("\n")
    return lines


def unique_bytes(tables, k, v):
    """Bytes of all keys and values that any token of the pass sees, each counted once."""
    lengths = {}
    for start, visible in zip(tables.start.tolist(), tables.visible.amax(1).tolist()):
        lengths[start] = max(visible, lengths.get(start, 0))
    return sum(lengths.values()) * k.shape[0] * (k.shape[2] + v.shape[2]) * k.element_size()


def microseconds(function, inputs, repeats=15):
    """Median time of a call on a GPU, in microseconds; function(*arguments) is called for each of `inputs` in turn.

    Let the inputs together be larger than the caches, so that each call finds its own data in memory only. The calls are
    recorded as one graph: launched one by one, a kernel of a few microseconds waits for Python.
    """
    replay, _ = record_graph(lambda: [function(*arguments) for arguments in inputs])
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return median(times[3:]) / len(inputs)


def bandwidth(device):
    """Bytes per second, read and written, of a large copy on this GPU: a yardstick for kernels that wait for memory."""
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device=device).random_()
    return 2 * source.nbytes / (1e-6 * microseconds(lambda x, y: y.copy_(x), [(source, target)]))


def cold_copies(cached, workers, device, heads=8, group=5, size=128, dtype=torch.bfloat16):
    """Chapter 4's example on a GPU, about 256 MB of it to outgrow the caches: a list of (q, k, v, tables)."""
    q, k, v, tables = query_rotation.example(cached, workers, dtype, heads, group, size)
    copies = max(2, 2**28 // (2 * k.nbytes))
    return [(*(x.clone().to(device) for x in (q, k, v)), tables) for _ in range(copies)]


def speeds(device, lengths=(300, 4096, 8192, 16384), workers=(1, 2, 4)):
    """Print the time of one attention (without `prepare`, which layers share) against PyTorch's for one sequence."""
    rotation, scale = rope.inverse_frequencies(LlamaConfig(head_dim=128)), 128 ** -0.5
    copying = bandwidth(device)
    print(f"\n{torch.cuda.get_device_name(device)}: copies move {copying / 1e12:.2f} TB/s. One layer, 40/8 heads of 128, "
          "bfloat16; microseconds (share of the copy bandwidth):")
    print("  cached" + "".join(f"{w:>10} worker{'s' if w > 1 else ' '}" for w in workers) + "   SDPA, one sequence")
    for cached in lengths:
        cells = []
        for count in workers:
            inputs = cold_copies(cached, count, device)
            taken = microseconds(lambda q, k, v, t: attention(q, k, v, t, rotation, scale), inputs)
            cells.append(f"{taken:9.1f} ({unique_bytes(inputs[0][3], *inputs[0][1:3]) / (1e-6 * taken) / copying:4.0%})")
        single = [(q[None, :, :1], k[None, :, :cached], v[None, :, :cached]) for q, k, v, _ in cold_copies(cached, 1, device)]
        stock = microseconds(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), single)
        print(f"  {cached:6,}" + "".join(f"{cell:>18}" for cell in cells) + f"{stock:12.1f}")


def decoder_against_chapter_4(device):
    """A tiny model, a prompt and three passes of two workers, through both: (largest difference of a logit, CUDA graphs)."""
    config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32)
    model = AutoModelForCausalLM.from_config(config).eval().to(device)
    ropes, decoder, error = query_rotation.attach(model), Decoder(), 0.0
    engines = [(function, shared_cache.SharedCache([64, 64, 64], ropes)) for function in (query_rotation.forward, decoder)]
    for writers in ([([0], 20)], *[[([0, 2, 1], 1), ([0, 1, 2], 1)]] * 3):
        logits, ids = [], torch.randint(0, 1000, (sum(count for _, count in writers),))
        last = torch.tensor([count for _, count in writers]).cumsum(0) - 1
        for function, cache in engines:
            cache.append({view[-1]: count for view, count in writers})
            logits.append(function(model, cache, layouts.fill_tables(cache.blocks, writers), ids, last).clone())
        error = max(error, (logits[0] - logits[1]).abs().max().item())
    return error, len(decoder.recorded)


def main():
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=110, highlight=False)
    rotation = rope.inverse_frequencies(LlamaConfig(head_dim=64))
    q, k, v, tables = query_rotation.example(1000, 4, heads=2)
    names = ["history", "Alice", "Bob", "Carol", "Dave", "(others)", "(own)", *["<...>"] * 3]
    console.print("4 workers, 1,000 tokens of history. Each letter is a tile of 64 slots, and names the program that reads it:")
    console.print(picture(tables, rotation, names, splits=6, tile=64))
    console.print("  -> equal spans of one list: a program may take a piece of the history, or many small blocks, or both\n")

    print(f"the kernel {'(in the interpreter) ' * INTERPRETED}against chapter 4's specification, by programs per head:")
    worst = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v, tables = query_rotation.example(300, 4, dtype, heads=2)
        exact = query_rotation.attention_spec(q.float(), k.float(), v.float(), tables, rotation, 0.125)
        errors = []
        q, k, v = (x.to(device) for x in (q, k, v))
        for splits in (1, 5, 40):
            result = attention(q, k, v, tables, rotation, 0.125, splits=splits).cpu()
            errors.append((result - exact).abs().max().item())
        worst[dtype] = max(errors)
        name = str(dtype)[6:] + " (products in float32)" * (INTERPRETED and dtype == torch.bfloat16)
        print(f"  {name:32} largest error " + ", ".join(f"{e:.0e} ({s})" for e, s in zip(errors, (1, 5, 40))))
    print("  -> splitting changes nothing but rounding; 40 programs are more than there are tiles")

    error, graphs = decoder_against_chapter_4(device)
    print(f"\na whole model through Decoder against chapter 4: largest difference of a logit {error:.0e}; CUDA graphs: {graphs}"
          + " (they need a GPU; the tests replay without one)" * (graphs == 0))
    if device.type == "cuda":
        speeds(device)
    else:
        print("no GPU here: speeds are not measured (appendix/speed.py prints the paper's tables on one)")
    assert worst[torch.float32] < 1e-5 and worst[torch.bfloat16] < 2e-2 and error < 1e-4
    assert torch.count_nonzero(counters(q.device)) == 0
    print(f"[OK] one launch per layer gives the attention of chapter 4 (float32: {worst[torch.float32]:.0e})")
    print("\nNext: chapter 6 lets the workers write, through this kernel where there is a GPU.")


# Exercises
# 1. From how many workers on would attention no longer wait for memory (G = 5, 200 operations per byte)? Why does the kernel
#    lose its ideal earlier, and where in `constants` does that happen?
# 2. Replace the spans by one program per row and key head. What does the picture look like, and who waits?
# 3. Leave out `fade` in the loop over tiles. Which tests fail, and why do some still pass?

if __name__ == "__main__":
    main()
