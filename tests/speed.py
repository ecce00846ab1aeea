r"""What it costs: the paper's Tables 1 and 2, for any model on any device, and the small print.

1. passes     A forward pass of all workers, one new token each, with all that belongs to it: blocks,
              tables, the model, picking tokens. Against the stock model that decodes *one* sequence, in
              the strongest way that runs here. The time to generate is summed up from measured passes.
2. attention  One layer's, in microseconds, against PyTorch's for one sequence, for a batch in which
              every worker has a copy of the cache, and against rotating all keys; the host's set-up.
3. details    Memory, moving a step, what is spent outside the model (CPU, the bundled model).

All is measured in one run, medians after a warm-up, the contestants taking turns: on a shared machine,
only ratios mean anything. The *share* compares the bytes that have to be read (weights; each key and
value once) over the time with the speed of a plain copy. On a CPU one thread is used, and its own time
counts. On a GPU the calls of table 2 are graphs, and go round copies of the data, so that no cache keeps
any from a call before. There, time and share stand beside those that a queueing model of the card
*predicts*, so that a miss explains itself; nobody has measured any on a GPU yet. (`of first`: the ratio
to the time of the first number of workers; predicted: 1.) In table 1, `fused` says how many norms, MLPs
and attentions of the model run as larger kernels (appendix/small_kernels.py), on a GPU alone.

    python tests/speed.py 1 --model Qwen/Qwen3-8B --device cuda (without arguments: everything, anywhere)
    python tests/speed.py 1 2 --shape qwq-32b --json h200.json  (random weights of that shape)
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 python tests/speed.py 1 --naive
        (and the obvious engine, oracle.py; the variables flatter it: no memory is given back)
"""
import copy
import io
import json
import platform
import re
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import command, engine, journal, models, products, protocol, screen  # noqa: E402
from appendix.command import option  # noqa: E402

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")

clock = perf_counter if torch.cuda.is_available() else thread_time  # on a CPU, not while others have it
SEPARATOR, OWN = 6, [20, 50, 80]  # tokens of a separator, and of the workers' unfinished steps, in turn
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim"]
SHAPES = {"qwq-32b": ("qwen2", 152064, 5120, 27648, 64, 40, 8, 128),  # the model's type, and its SIZES
          "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
          "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128),
          "tiny": ("llama", 1000, 64, 128, 2, 4, 2, 16)}
# Predicted microseconds of one layer's attention with the heads of QwQ-32B in bfloat16, by the name that
# the driver gives a card (others of its generation copy at other speeds). In the model behind them, each
# processor has a queue of tiles, and they share the bandwidth. Two or four workers take as long as one,
# to 3 per cent. Good to perhaps a fifth.
PREDICTED = {"NVIDIA H100 80GB HBM3": {300: 5.8, 4096: 10.9, 8192: 16.5, 16384: 27.7},
             "NVIDIA H200": {4096: 9.3, 8192: 13.2, 16384: 21.1},
             "NVIDIA A100-SXM4-80GB": {4096: 15.7, 8192: 24.7, 16384: 44.4},
             "NVIDIA L40S": {4096: 28.9, 8192: 52.7, 16384: 100.9}}


@dataclass
class Options:
    """What is measured."""

    model: str | None = option(None, f"hub name, local folder or GGUF file (default: {models.BUNDLED})")
    shape: Literal[tuple(SHAPES)] | None = option(None, "random weights of that shape instead")
    device: str | None = option(None, "default: the best one there is")
    dtype: list[str] | None = option(None, "default: float32 and bfloat16 on a CPU, else bfloat16")
    tokens: list[int] | None = option(None, "how many are cached")
    workers: list[int] = option([1, 2, 4], "how many there are")
    repeats: int = option(20, "of each pass")
    naive: bool = option(False, "also time the obvious engine, with 4 workers (CPU)")
    compile: bool = option(True, "compile the stock model, too (GPU; minutes for each number of tokens)")
    json: str | None = option(None, "write all figures to this file")

    def __post_init__(self):
        """Fill in what depends on the device. Raises ValueError if something makes no sense."""
        self.device = self.device or models.best_device()
        models.use_device(self.device)
        self.gpu = torch.device(self.device).type == "cuda"
        self.dtype = self.dtype or ["float32", "bfloat16"][self.gpu:]
        if not 1 <= min(self.workers) <= max(self.workers) <= 16 or self.repeats < 1:
            raise ValueError("there can be 1 to 16 workers, and at least 1 repeat")
        if {*self.dtype} - {"float32", "bfloat16", "float16"} or self.model and self.shape:
            raise ValueError("a dtype is float32, bfloat16 or float16; a model has no --shape")
        if self.json:
            journal.own_picture(self.json, b'[{"hardware"')


# ------------------------------------------------------------------------------------------- measuring

def take_turns(steps, repeats):
    """Median seconds of each step, run in turns. A step leaves nothing under way on a GPU."""
    times = []
    for step in [*steps] * (repeats + 3):
        times.append(-clock())
        step()
        times[-1] += clock()
    return [median(times[i::len(steps)][3:]) for i in range(len(steps))]


def microseconds(function, inputs):
    """Median microseconds of function(*arguments) over `inputs` in turn; on a GPU, as a graph."""
    calls = lambda: [function(*arguments) for arguments in inputs]
    if inputs[0][0].is_cuda:
        taken = import_module("triton.testing").do_bench_cudagraph(calls, return_mode="median")
        return 1e3 * taken / len(inputs)
    return 1e6 * take_turns([calls], 15)[0] / len(inputs)


def bandwidth(options):
    """Bytes per second, read and written, of a large copy: a yardstick for what waits for memory."""
    pair = torch.ones(2, 2**(30 if options.gpu else 27), dtype=torch.uint8, device=options.device)
    return 1e6 * pair.nbytes / microseconds(torch.Tensor.copy_, [pair])


def add(rows, **row):
    """Keep a row of a table and print it; above the first one of its kind, the names of its columns."""
    if [*rows[-1]] != [*row]:
        print("\n" + "".join(f"{name.replace('_', ' '):>{max(8, len(name)) + 2}}" for name in row))
    rows.append(row)
    cells = {name: f"{cell:,.4g}" if isinstance(cell, float) else cell for name, cell in row.items()}
    print("".join(f"{cell:>{max(8, len(name)) + 2}}" for name, cell in cells.items()), flush=True)


# ---------------------------------------------------------------------------------- 1. passes of a model

def shape_of(model):
    """(layers, Hq, Hk, D)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, config.num_key_value_heads, size


def stock_steps(model, tokens, options):
    """Ways in which transformers decodes one sequence behind `tokens` random keys: {name: step}."""
    token, position = torch.tensor([[[5]], [[tokens]]], device=model.device)
    layers, _, heads, size = shape_of(model)

    def start(cache, forward=model):
        for layer in range(layers):
            cache.update(*token.new_empty(2, 1, heads, tokens, size, dtype=model.dtype).normal_(), layer)
        return lambda: forward(token, position_ids=position, past_key_values=cache).logits.argmax()

    def graph():
        launch, picked = import_module("05_triton_kernel").capture_graph(start(static()))
        return lambda: launch() or picked

    def compiled():
        torch._dynamo.reset()  # each length is compiled by itself, as `generate` would
        step = start(static(), torch.compile(model.forward, mode="reduce-overhead"))
        step()
        return step

    static = partial(StaticCache, config=model.config, max_cache_len=tokens + 100 + options.repeats)
    steps = {"growing cache": start(DynamicCache(config=model.config))}
    for make in [graph, compiled][:1 + options.compile] * options.gpu:
        try:
            steps[make.__name__] = make()
        except Exception as error:  # of any kind: no compiler here, a model that cannot be compiled
            print(f"  ({make.__name__}: not possible here, {command.first_line(error)})")
    return {name: lambda step=step: step().item() for name, step in steps.items()}


def team(tokens, workers, ropes=()):
    """A cache in the combined layout in which every worker sees `tokens`: (cache, views)."""
    cache, layout = shared_cache.SharedCache(ropes), layouts.LAYOUTS["combined"]
    history, *own = map(cache.block, [tokens, *(OWN[w % 3] + 1 for w in range(workers))])
    words = {name: cache.block(SEPARATOR + 1) for name in layout.separators(workers)}
    views = [layout.view(history, own[w], own[:w] + own[w + 1:], words) for w in range(workers)]
    for block in cache.blocks[1:]:
        block.length = block.capacity - 1
    history.length = tokens - sum(block.length for block in views[0][1:])
    if history.length < 1:
        raise ValueError(f"{workers} workers see at least {tokens - history.length + 1} tokens")
    return cache, views


def shared_step(model, tokens, workers, forward, ropes=()):
    """A function that does a step of `workers` workers over the shared cache; its attributes: the cache,
    and `forward`."""
    cache, views = team(tokens, workers, ropes)
    if ropes:  # without, `forward` stores nothing
        generate.feed(model, cache, [[([cache.block(1)], [5])]], forward)  # makes the memory
        for memory in (*cache.keys.values(), *cache.values.values()):
            memory.normal_()

    def step():
        with cache.rewound():
            logits, = generate.feed(model, cache, [[(view, [5]) for view in views]], forward)
            logits.argmax(-1).tolist()
    step.cache, step.forward = cache, forward
    return step


def naive_step(model, tokens, workers):
    """The same step by the obvious engine, which lays out every worker's view at every layer."""
    oracle, (layers, _, heads, size) = import_module("oracle"), shape_of(model)
    cache = oracle.NaiveCache(model, workers + 4)
    cache.length = [block.length for block in team(tokens, workers)[0].blocks]
    for memory in (cache.keys, cache.values):
        memory[:] = [{layer: torch.randn(heads, length, size) for layer in range(layers)}
                     for length in cache.length]
    writers = [(order, [5]) for order in oracle.orders("combined", workers)]
    return lambda: oracle.naive_pass(model, cache, writers).argmax(-1).tolist()


@torch.no_grad()
def passes(stock, options, rows):
    """Table 1."""
    peak, gpu, ours = bandwidth(options), options.gpu, stock
    if not gpu:  # a second model with the same weights
        ours = products.fast_products(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))
    layers, _, heads, size = shape_of(stock)
    embedding, head = stock.get_input_embeddings().weight, stock.get_output_embeddings().weight
    weights = sum(p.nbytes for p in {*stock.parameters()} - {embedding} | {head})
    lengths = sorted(options.tokens or ([1024, 2048, 4096, 8192, 16384] if gpu else [512, 2048, 8192]))
    results = {workers: [] for workers in (0, *options.workers)}  # 0: the stock model's one sequence

    def mine(tokens, workers):  # each has a forward of its own, since a graph belongs to one cache
        forward = engine.best_forward(ours, "triton" if gpu else "torch")
        return shared_step(ours, tokens, workers, forward, query_rotation.attach(ours))

    # On a GPU, all of ours comes first: a capture that fails may spoil later ones.
    ahead = {tokens: as_graphs([mine(tokens, workers) for workers in options.workers], options.repeats)
             for tokens in lengths * gpu}
    fused = "/".join(map(str, import_module("appendix.small_kernels").fused(ours))) if gpu else "-"
    for tokens in lengths:
        steps = [] if gpu else [mine(tokens, workers) for workers in options.workers]
        if gpu:
            import_module("appendix.small_kernels").restore(stock)
        stock.set_attn_implementation("sdpa")
        contestants = stock_steps(stock, tokens, options)
        times = take_turns([*contestants.values(), *steps], options.repeats) + ahead.get(tokens, [])
        best, strongest = min(zip(times, contestants))
        needed = weights + 2 * layers * heads * size * tokens * stock.dtype.itemsize
        for workers, seconds in zip(results, [best, *times[len(contestants):]]):
            results[workers].append(seconds)
            # Between two lengths, the time of a pass grows evenly; before the first, it is constant.
            grid = np.linspace(0, tokens, 257)
            on_grid = np.interp(grid, lengths[:len(results[workers])], results[workers])
            many = max(1, workers)
            add(rows, dtype=str(stock.dtype)[6:], tokens=tokens, workers=workers or "stock",
                ms=1e3 * seconds, of_stock=seconds / best, share=needed / seconds / peak,
                tokens_per_s=many / seconds, s_to_generate=float(np.trapezoid(on_grid, grid)) / many,
                strongest_stock=strongest, fused=fused)
    if options.naive and not gpu:
        query_rotation.attach(ours)
        naive, quick = take_turns([naive_step(stock, tokens, 4), mine(tokens, 4)], 7)
        add(rows, obvious_engine_ms=1e3 * naive, times_ours=naive / quick)


def as_graphs(steps, repeats):
    """Median seconds of our steps. Raises ValueError if one is launched kernel by kernel."""
    times = take_turns(steps, repeats)
    if not all(any(step.forward.captured.values()) for step in steps):
        raise ValueError("our passes cannot be captured as graphs here (see above): nothing is timed")
    return times


# ------------------------------------------------------------------------------- 2. attention of a layer

def rotated_keys(q, k, v, slots, cos, sin, scale):
    """The obvious way: lay out every worker's view, its keys rotated into place, and attend to it."""
    keys = rope.rotate(k[:, slots].float(), cos, sin).to(k.dtype)  # [Hk, W, view, D]
    return F.scaled_dot_product_attention(
        q.transpose(0, 1)[:, :, None], keys.transpose(0, 1), v[:, slots].transpose(0, 1), scale=scale,
        enable_gqa=True)  # [W, Hq, 1, D]


def example(tokens, workers, heads, dtype, device):
    """One layer at random, every worker seeing `tokens`, and four ways to attend.

    Returns {name: (function, q, k, v)}: ours; PyTorch's for one worker; for all, with a copy of the
    cache each; for all, with rotated keys.
    """
    cache, views = team(tokens, workers)
    k, v = torch.randn(2, heads[1], cache.slots, heads[2], dtype=dtype, device=device)
    q = torch.randn(heads[0], workers, heads[2], dtype=dtype, device=device)
    rotation, scale = rope.inverse_frequencies(LlamaConfig(head_dim=heads[2])), heads[2] ** -0.5
    kernel = import_module("05_triton_kernel") if k.is_cuda else query_rotation
    tables = layouts.fill_tables([(view, 1) for view in views])
    ours = partial(kernel.attention, tables=tables, rotation=rotation, scale=scale)
    laid_out = lambda of: torch.tensor([[i for block in view for i in of(block)] for view in views])
    slots = laid_out(lambda block: range(block.start, block.start + block.length))  # [W, tokens]
    shift = torch.arange(tokens) - laid_out(lambda block: range(block.length))  # [W, tokens]
    cos, sin = (t.to(device) for t in rope.cos_sin(rotation, shift - shift[:, -1:]))  # [W, tokens, D/2]
    rotated = partial(rotated_keys, slots=slots.to(device), cos=cos, sin=sin, scale=scale)
    copies = q.transpose(0, 1)[:, :, None], *(t[:, slots].transpose(0, 1).contiguous() for t in (k, v))
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    return {"ours": (ours, q, k, v), "SDPA_of_1": (sdpa, *(t[:1] for t in copies)),
            "SDPA_own_copies": (sdpa, *copies), "all_keys_rotated": (rotated, q, k, v)}


def predicted(options, heads, dtype):
    """{tokens: predicted microseconds} on this device, if there is a prediction."""
    if not options.gpu or [*heads] != [40, 8, 128] or dtype != torch.bfloat16:
        return {}
    return PREDICTED.get(torch.cuda.get_device_name(options.device), {})


@torch.no_grad()
def layer_attention(model, options, rows):
    """Table 2, for the heads of a model."""
    _, *heads = shape_of(model)
    peak, about, alone = bandwidth(options), predicted(options, heads, model.dtype), {}
    backends = [getattr(SDPBackend, f"{name}_ATTENTION") for name in ("FLASH", "CUDNN", "EFFICIENT")]
    for tokens, workers in product(options.tokens or [300, 4096, 8192, 16384, 32768], options.workers):
        row = {"heads": "/".join(map(str, heads)), "tokens": tokens, "workers": workers}
        contestants = example(tokens, workers, heads, model.dtype, options.device)
        with sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True):
            for name, (function, *tensors) in contestants.items():
                copies = max(2, 2**28 // (2 * tensors[1].nbytes)) if options.gpu else 1
                inputs = [[t.clone() for t in tensors] for _ in range(copies)]
                row[name] = microseconds(function, inputs)
        nothing = shared_step(None, tokens, workers, lambda *_: torch.zeros(workers, 1))
        least = 2e6 * contestants["ours"][2].nbytes / peak  # microseconds, as a plain copy
        guess, first = about.get(tokens), alone.setdefault(tokens, row["ours"])
        add(rows, **row, predicted=guess or "-", of_first=row["ours"] / first, share=least / row["ours"],
            predicted_share=least / guess if guess else "-", set_up=1e6 * take_turns([nothing], 200)[0])


# ------------------------------------------------------------------------------------------- 3. details

def peak_memory():
    """Peak resident MiB of this process since the last call (Linux), or NaN."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return float("nan")


@torch.no_grad()
def details(rows):
    """Table 3, with the bundled model in float32."""
    model, tokenizer = models.load()
    mine = partial(shared_step, products.fast_products(model), forward=query_rotation.forward,
                   ropes=query_rotation.attach(model))
    for workers in (1, 2, 4):
        step = mine(8192, workers)
        peak_memory()
        before = peak_memory()  # just started anew, the peak is what is resident now
        take_turns([step], 1)
        cache = sum(m.nbytes for m in (*step.cache.keys.values(), *step.cache.values.values())) / 2**20
        add(rows, tokens=8192, workers=workers, cache_MiB=cache, steps_add_MiB=peak_memory() - before,
            one_copy_MiB=cache * 8192 / step.cache.slots)
    step = mine(4096, 4)
    history, _, _, own, *_ = step.cache.blocks
    for length in (500, 3500):
        def move(length=length):
            history.length, own.length = length, 80
            step.cache.move(own, history)
        (moving,), (passing,) = take_turns([move], 7), take_turns([step], 7)
        add(rows, history=length, moved=80, moving_ms=1e3 * moving, of_a_pass_of_4=moving / passing)
    run = generate.Hogwild(model, tokenizer, "one two three four five six seven eight nine ten " * 190,
                           generate.Settings(workers=protocol.NAMES[:4], prompt="{problem}"))
    start = {"opening": {w.name: w.text for w in run.workers}, "moves": True, "context": run.context}
    inside = []  # seconds in the model
    model.register_forward_pre_hook(lambda *_: inside.append(-clock()))
    model.register_forward_hook(lambda *_: inside.append(inside.pop() + clock()))
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    with screen.Screen(run.problem, start, True, terminal) as display:
        whole, = take_turns([lambda: display.show(run.advance())], 40)
    add(rows, workers=4, pass_ms=1e3 * whole, outside_the_model=1 - median(inside[3:]) / whole)


# ------------------------------------------------------------------------------------ the command line

def make_model(options, dtype):
    """A loaded model, or random weights of a shape, made on the device."""
    if not options.shape:
        return models.load(options.model, options.device, dtype)[0]
    kind, *sizes = SHAPES[options.shape]
    config = AutoConfig.for_model(kind, **dict(zip(SIZES, sizes)), tie_word_embeddings=False)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def main(argv=None):
    """Print the tables."""
    parser = command.Parser(Options, description=__doc__.split("\n")[0])
    parser.add_argument("tables", type=int, nargs="*", default=[1, 2, 3], help="1, 2, 3 (default: all)")
    options, rest = parser.read(argv)
    tables = {*rest.tables}
    if tables - {1, 2, 3}:
        raise ValueError(f"there is no table {max(tables)}; choose among 1, 2 and 3")
    torch.manual_seed(0)
    if not options.gpu:
        torch.set_num_threads(1)
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", info.read_text())[1] if info.exists() else platform.processor()
    rows = [{"hardware": torch.cuda.get_device_name(options.device) if options.gpu else cpu,
             "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
             "transformers": transformers.__version__, **vars(options)}]
    print(rows[0])
    for dtype in options.dtype * (tables != {3}):
        model = make_model(options, dtype)
        if 2 in tables and dtype == options.dtype[-1]:  # before others' captures, which may fail
            layer_attention(model, options, rows)
        if 1 in tables:
            passes(model, options, rows)
    if 3 in tables and not options.gpu:
        details(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
