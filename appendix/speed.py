r"""What it costs: the paper's Tables 1 and 2, for any model on any device, and the small print.

1. passes     A forward pass of all workers, one new token each, with everything that belongs to it: blocks, tables, the
              model, picking tokens. Against the stock model that decodes *one* sequence, in the strongest way that runs
              here. As in the paper's Table 1: milliseconds, tokens per second, and the time to generate so many tokens
              (summed up from the measured passes, not decoded).
2. attention  One layer's attention, as in the paper's Table 2: against PyTorch's for one sequence, for a batch in which
              every worker has a copy of the cache for itself, and against turning all keys; and the set-up per pass.
3. details    Moving a step, memory, what is spent outside the model (on the CPU, with the bundled model).

Everything is measured in the same run, medians after a warm-up, the contestants taking turns: on a shared machine only
ratios mean anything. The *share* compares bytes that have to be read (weights; each key and value once) over the time
with the speed of a plain copy. On a GPU, table 2 takes turns between copies of the data, so that nothing is left in a cache
from the call before, and replays calls as graphs. On a CPU one thread is used.

    python appendix/speed.py                                       all tables, on the best device there is
    python appendix/speed.py 1 --model Qwen/Qwen3-8B --device cuda
    python appendix/speed.py 1 2 --shape qwq-32b --json h200.json    random weights of that shape, made on the device
    python appendix/speed.py 1 --naive                             and the obvious engine (tests/oracle.py), run as
        MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 python appendix/speed.py 1 --naive
    which keeps the allocator from returning memory after each copy, and so flatters the obvious engine
"""
import copy
import io
import json
import platform
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config, StaticCache

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]
rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")

SEPARATOR, OWN = 6, [20, 50, 80]  # tokens of a separator, and of the workers' unfinished steps (in turn)
QWEN = dict(vocab_size=151936, max_position_embeddings=40960, num_key_value_heads=8, head_dim=128)
SHAPES = {  # what a model needs to have the speed of a known one
    "qwq-32b": Qwen2Config(**{**QWEN, "vocab_size": 152064}, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                           num_attention_heads=40, tie_word_embeddings=False),
    "qwen3-8b": Qwen3Config(**QWEN, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                            tie_word_embeddings=False),
    "llama-3-8b": LlamaConfig(vocab_size=128256, max_position_embeddings=131072, hidden_size=4096, intermediate_size=14336,
                              num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "smollm2-135m": LlamaConfig(vocab_size=49152, max_position_embeddings=8192, hidden_size=576, intermediate_size=1536,
                                num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                                tie_word_embeddings=True),
}


# ------------------------------------------------------------------------------------------------------------ measuring

def on_gpu(device):
    """Is it a GPU? Then chapter 5 is used, which needs Triton."""
    return torch.device(device).type == "cuda"


def take_turns(steps, repeats):
    """Median seconds of each step, run in turns. A step ends with tokens on the host, so a GPU is through by then."""
    times = [[] for _ in steps]
    for _ in range(repeats + 3):
        for step, taken in zip(steps, times):
            start = perf_counter()
            step()
            taken.append(perf_counter() - start)
    return [median(taken[3:]) for taken in times]


def microseconds(function, inputs, repeats=15):
    """Median microseconds of function(*arguments) over `inputs` in turn; on a GPU as a graph (chapter 5)."""
    if on_gpu(inputs[0][0].device):
        return import_module("05_triton_kernel").microseconds(function, inputs, repeats)
    return 1e6 * take_turns([lambda: [function(*arguments) for arguments in inputs]], repeats)[0] / len(inputs)


def bandwidth(device):
    """Bytes per second, read and written, of a large copy: a yardstick for what waits for memory."""
    if on_gpu(device):
        return import_module("05_triton_kernel").bandwidth(device)
    source, target = torch.empty(2, 2**27, dtype=torch.uint8).random_()
    return 2 * source.nbytes / (1e-6 * microseconds(lambda x, y: y.copy_(x), [(source, target)], 5))


def hardware(device):
    """What was measured on, with which versions."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if "model name" in line), name)
    found = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(),
             "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found


# -------------------------------------------------------------------------------------------------- 1. passes of a model

def head_size(config):
    """D, which not every config names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def random_cache(cache, tokens, model):
    """Fill a cache of the stock model with `tokens` random keys and values per layer."""
    config = model.config.get_text_config()
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, tokens, head_size(config))  # keys and values [1, Hk, S, D]
        cache.update(*torch.randn(shape, dtype=model.dtype, device=model.device), layer)
    return cache


def stock_steps(model, tokens):
    """Ways in which transformers decodes one sequence with `tokens` of cache behind it: pairs (name, step)."""
    config, device = model.config.get_text_config(), model.device
    token = torch.tensor([[5]], device=device)

    def decode(forward, cache, position):
        return forward(token, position_ids=position, past_key_values=cache, use_cache=True).logits[0, -1]

    growing = random_cache(DynamicCache(config=config), tokens, model)

    @torch.no_grad()
    def eager():
        decode(model, growing, torch.tensor([[growing.get_seq_length()]], device=device)).argmax().item()

    yield "growing cache", eager
    if not on_gpu(device):
        return
    position = torch.tensor([[tokens]], device=device)
    for name in ("static cache, torch.compile", "static cache, CUDA graph"):
        cache = random_cache(StaticCache(config=config, max_cache_len=tokens + 100), tokens, model)

        def rewind(cache=cache):  # stays where it is, however often it is run: the cache's length is a tensor
            for layer in cache.layers:
                layer.cumulative_length.fill_(tokens)

        try:
            with torch.no_grad():
                if "compile" in name:
                    torch._dynamo.reset()  # each length is compiled by itself, as `generate` would
                    compiled = torch.compile(model.forward, mode="reduce-overhead")
                    replay, logits = partial(decode, compiled, cache, position), None
                    replay()
                else:
                    replay, logits = import_module("05_triton_kernel").record_graph(partial(decode, model, cache, position))
        except Exception as error:  # no compiler on this machine, a model that cannot be compiled: of any kind
            print(f"  ({name}: not possible here, {type(error).__name__}: {str(error).strip().splitlines()[:1]})")
            continue

        @torch.no_grad()
        def static(replay=replay, logits=logits, rewind=rewind):
            rewind()
            output = replay()
            (output if logits is None else logits).argmax().item()

        yield name, static


def lengths_of(tokens, workers):
    """Lengths of the blocks of the combined layout, such that every worker sees `tokens`: (layout, lengths)."""
    plan = layouts.layout("combined", workers)
    lengths = [0, *(OWN[w % 3] for w in range(workers)), *[SEPARATOR] * (max(plan.blocks) - workers)]
    lengths[0] = tokens - sum(lengths[plan.blocks[row]] for row in plan.views[0])
    if lengths[0] < 1:
        raise ValueError(f"the unfinished steps of {workers} workers take more than {tokens} tokens: give at least "
                         f"{tokens - lengths[0] + 1}")
    return plan, lengths


def shared_step(model, ropes, tokens, workers):
    """A function that does one step of `workers` workers over the shared cache; its attribute `cache` is that cache."""
    plan, lengths = lengths_of(tokens, workers)
    cache = shared_cache.SharedCache([length + 200 for length in lengths], ropes)
    rows, forward = [cache.blocks[b] for b in plan.blocks], generate.best_forward(model.device)
    cache.append({0: 1})
    forward(model, cache, layouts.fill_tables(cache.blocks, [([0], 1)]), [0], [0])  # makes the memory
    for memory in (*cache.keys.values(), *cache.values.values()):
        memory.normal_()

    def step():
        for block, length in zip(cache.blocks, lengths):
            block.length = length
        cache.append({1 + w: 1 for w in range(workers)})
        tables = layouts.fill_tables(rows, [(view, 1) for view in plan.views])
        forward(model, cache, tables, [5] * workers, list(range(workers))).argmax(-1).tolist()
    step.cache = cache
    return step


def naive_step(model, tokens, workers):
    """The same step by the obvious engine, which lays out every worker's view at every layer."""
    oracle = import_module("oracle")
    _, lengths = lengths_of(tokens, workers)
    cache = oracle.NaiveCache(model, workers + 4)
    config, orders = model.config, oracle.orders("combined", workers)
    cache.length = lengths
    for memory in (cache.keys, cache.values):
        for b, length in enumerate(lengths):
            memory[b] = {layer: torch.randn(config.num_key_value_heads, length, config.head_dim)
                         for layer in range(config.num_hidden_layers)}
    return lambda: oracle.naive_pass(model, cache, [(order, [5]) for order in orders]).argmax(-1).tolist()


def bytes_of_pass(model, tokens):
    """What a pass has to read: all weights but the embedding (a few rows of it), and each key and value of one view once."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - (embedding.nbytes if embedding is not head else 0)
    config = model.config.get_text_config()
    one_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * model.dtype.itemsize
    return weights + tokens * one_token


def seconds_to_generate(total, workers, lengths, seconds):
    """Time of total / workers passes while the view grows from 0 to `total`, from passes measured at `lengths`.

    Between two lengths time grows evenly, before the first it is constant.
    """
    grid = np.linspace(0, total, 257)  # lengths of the view
    return float(np.trapezoid(np.interp(grid, lengths, seconds), grid)) / workers


def passes(stock, args, report, name):
    """Table 1."""
    peak = bandwidth(stock.device)
    ours = shared_cache.pack_linears(copy.deepcopy(stock)) if stock.device.type == "cpu" else stock
    results = {label: [] for label in ["stock", *args.workers]}
    print(f"\n1. Passes of {name}, {str(stock.dtype)[6:]}: ms per pass (ratio to the stock model's one sequence), share of "
          f"{peak / 1e9:,.0f} GB/s")
    print("  tokens" + f"{'stock':>20}" + "".join(f"{w:>13} worker{'s' if w > 1 else ' '}" for w in args.workers))
    for tokens in args.tokens:
        stock.set_attn_implementation("sdpa")
        contestants = dict(stock_steps(stock, tokens))
        times = take_turns(contestants.values(), args.repeats if len(contestants) > 1 else 1)
        strongest = min(zip(times, contestants))[1]  # by name
        if ours is not stock:  # two models: the contestants take turns
            ropes = query_rotation.attach(ours)
            steps = [contestants[strongest], *(shared_step(ours, ropes, tokens, w) for w in args.workers)]
            times = take_turns(steps, args.repeats)
        else:  # one model, which has one kind of attention at a time
            times = take_turns([contestants[strongest]], args.repeats)
            contestants.clear()
            ropes = query_rotation.attach(ours)
            times += take_turns([shared_step(ours, ropes, tokens, w) for w in args.workers], args.repeats)
        for label, taken in zip(results, times):
            results[label].append(taken)
        shares = [bytes_of_pass(stock, tokens) / taken / peak for taken in times]
        cells = [f"{1e3 * taken:9.2f} ({taken / times[0]:4.2f}){share:4.0%}" for taken, share in zip(times, shares)]
        print(f"  {tokens:6,}" + "".join(f"{cell:>20}" for cell in cells) + f"   stock: {strongest}", flush=True)
        report["passes"].append({"model": name, "dtype": str(stock.dtype)[6:], "tokens": tokens, "stock": strongest,
                                 "who": ["stock", *args.workers], "ms": [1e3 * t for t in times], "share": shares})
    tables = {"tokens per second": lambda label, i: max(1, label if label != "stock" else 1) / results[label][i],
              "seconds to generate so many tokens": lambda label, i: seconds_to_generate(
                  args.tokens[i], 1 if label == "stock" else label, args.tokens, results[label])}
    for title, cell in tables.items():
        print(f"  {title}:" + "".join(f"{t:>10,}" for t in args.tokens).rjust(78 - len(title)))
        for label in results:
            who = "stock, 1 sequence" if label == "stock" else f"{label} worker{'s' if label > 1 else ''}"
            values = [cell(label, i) for i in range(len(args.tokens))]
            print(f"    {who:22}" + "".join(f"{value:10.1f}" for value in values).rjust(55))
            report["passes"].append({"table": title, "who": who, "tokens": args.tokens, "values": values})
    if args.naive and stock.device.type == "cpu":
        tokens = args.tokens[-1]
        engines = [naive_step(stock, tokens, 4), shared_step(ours, query_rotation.attach(ours), tokens, 4)]
        naive, mine = take_turns(engines, max(3, args.repeats // 3))
        print(f"  obvious engine, 4 workers, {tokens:,} tokens: {1e3 * naive:.0f} ms, {naive / mine:.1f} times ours")


# ------------------------------------------------------------------------------------------------ 2. attention of a layer

def turned_keys(q, k, v, slots, cos, sin, scale):
    """The obvious way: lay out every worker's view, its keys turned into place, and attend to it. q: [Hq, W, D]."""
    keys = rope.rotate(k[:, slots].float(), cos, sin).to(k.dtype)  # [Hk, W, view, D]
    return F.scaled_dot_product_attention(q.transpose(0, 1)[:, :, None], keys.transpose(0, 1), v[:, slots].transpose(0, 1),
                                          scale=scale, enable_gqa=True)


def example(tokens, workers, heads, dtype, device):
    """One layer at random, every worker seeing `tokens`: (q, k, v, tables, slots of each view [W, tokens], positions)."""
    plan, lengths = lengths_of(tokens, workers)
    cache = shared_cache.SharedCache(lengths, ropes=[])
    cache.append({b: length for b, length in enumerate(lengths) if length})
    rows = [cache.blocks[b] for b in plan.blocks]
    tables = layouts.fill_tables(rows, [(view, 1) for view in plan.views])
    spans = [[torch.arange(rows[row].start, rows[row].start + rows[row].length) for row in view] for view in plan.views]
    shift = [torch.cat([tables.offset[row, w].expand(rows[row].length) for row in view]) for w, view in enumerate(plan.views)]
    query_heads, key_heads, size = heads
    k, v = torch.randn(2, key_heads, cache.slots, size, dtype=dtype, device=device)
    q = torch.randn(query_heads, workers, size, dtype=dtype, device=device)
    return q, k, v, tables, torch.stack([torch.cat(span) for span in spans]).to(device), torch.stack(shift)


def set_up(tokens, workers, repeats=200):
    """Median milliseconds that the host spends per pass on blocks and tables, before anything is launched."""
    plan, lengths = lengths_of(tokens, workers)
    cache = shared_cache.SharedCache([length + 400 for length in lengths], ropes=[])
    cache.append({b: length for b, length in enumerate(lengths) if length})
    rows = [cache.blocks[b] for b in plan.blocks]

    def step():
        cache.append({1 + w: 1 for w in range(workers)})
        tables = layouts.fill_tables(rows, [(view, 1) for view in plan.views])
        torch.cat([torch.as_tensor([5] * workers), cache.new_slots, tables.start, tables.position, tables.offset.flatten(),
                   tables.visible.flatten()])  # what chapter 5 sends to the GPU
    return 1e3 * take_turns([step], repeats)[0]


def layer_attention(heads, dtype, device, args, report):
    """Table 2, for heads = (Hq, Hk, D)."""
    peak, gpu = bandwidth(device), on_gpu(device)
    rotation, scale = rope.inverse_frequencies(LlamaConfig(head_dim=heads[2])), heads[2] ** -0.5
    attention = import_module("05_triton_kernel").attention if gpu else query_rotation.attention
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    print(f"\n2. One layer's attention, {heads[0]}/{heads[1]} heads of {heads[2]}, {str(dtype)[6:]}: microseconds "
          f"(ratio to ours), share of {peak / 1e9:,.0f} GB/s; and the host's set-up per pass")
    print("  tokens  workers      ours  share   SDPA of 1   SDPA of own copies   all keys turned    set-up")
    for tokens in args.attention_tokens:
        for workers in args.workers:
            q, k, v, tables, slots, shift = example(tokens, workers, heads, dtype, device)
            copies = max(2, 2**28 // (2 * k.nbytes)) if gpu else 1
            cos, sin = (t.to(device) for t in rope.cos_sin(rotation, -shift))

            def inputs(*tensors, copies=copies):
                return [tuple(t.clone() for t in tensors) for _ in range(copies)]

            own_k, own_v = (memory[:, slots].transpose(0, 1).contiguous() for memory in (k, v))  # [W, Hk, tokens, D]
            own_q = q.transpose(0, 1)[:, :, None]  # [W, Hq, 1, D]
            sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
            with torch.no_grad(), sdpa_kernel(flash, set_priority=True):
                ours = microseconds(lambda q, k, v: attention(q, k, v, tables, rotation, scale), inputs(q, k, v))
                one = microseconds(sdpa, inputs(own_q[:1], own_k[:1], own_v[:1]))
                many = microseconds(sdpa, inputs(own_q, own_k, own_v, copies=max(2, copies // workers) if gpu else 1))
                turned = microseconds(partial(turned_keys, slots=slots, cos=cos, sin=sin, scale=scale), inputs(q, k, v))
            unique = k.nbytes + v.nbytes
            row = {"tokens": tokens, "workers": workers, "us": ours, "share": unique / (1e-6 * ours) / peak, "sdpa_one_us": one,
                   "sdpa_own_copies_us": many, "turned_keys_us": turned, "set_up_ms": set_up(tokens, workers)}
            report["attention"].append(row)
            print(f"  {tokens:6,}{workers:9}{ours:10.1f}{row['share']:7.0%}{one:11.1f}{many:11.1f} ({many / ours:5.2f})"
                  f"{turned:11.1f} ({turned / ours:5.1f}){row['set_up_ms']:8.3f} ms", flush=True)


# ---------------------------------------------------------------------------------------------------------- 3. details

def peak_memory():
    """Peak resident bytes of this process since the last call (Linux), or None."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line)
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    except (OSError, StopIteration):
        return None


def overhead(model, tokenizer, workers, tokens):
    """Share of a pass that is spent outside the model: (share, seconds of a pass), with text, sampling and live display."""
    settings = generate.Settings(workers=generate.NAMES[:workers], max_passes=40, prompt="{problem}")
    words = "one two three four five six seven eight nine ten " * 300
    run = generate.Hogwild(model, tokenizer, tokenizer.decode(tokenizer(words).input_ids[:tokens - 100]), settings)
    inside, started = [], []
    hooks = [model.register_forward_pre_hook(lambda *_: started.append(perf_counter())),
             model.register_forward_hook(lambda *_: inside.append(perf_counter() - started[-1]))]
    whole = []
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    with generate.Screen(settings.workers, run.opening, True, True, "", run.context, console) as screen:
        while run.ending is None:
            start = perf_counter()
            screen.show(run.advance())
            whole.append(perf_counter() - start)
    for hook in hooks:
        hook.remove()
    return 1 - sum(inside[3:]) / sum(whole[3:]), sum(whole[3:]) / len(whole[3:])


def details(report):
    """Table 3, with the bundled model in float32."""
    model, tokenizer = shared_cache.load_model()
    ropes = query_rotation.attach(shared_cache.pack_linears(model))
    print("\n3. Details, SmolLM2-135M, float32")
    step = shared_step(model, ropes, 4096, 4)
    seconds, _ = take_turns([step, lambda: None], 5)
    for history in (500, 3500):
        times = []
        for _ in range(7):
            step.cache.blocks[0].length, step.cache.blocks[1].length = history, 100
            start = perf_counter()
            step.cache.move(1, 0)
            times.append(perf_counter() - start)
        print(f"  moving a step of 100 tokens behind a history of {history:,}: {1e3 * median(times):.1f} ms "
              f"({median(times) / seconds:.2f} of a step of 4 workers)")
        report["details"].append({"moving_ms": 1e3 * median(times), "history": history})
    share, seconds = overhead(model, tokenizer, 4, 2048)
    print(f"  outside the model (tables, sampling, text, live display), 4 workers, 2,048 tokens: {100 * share:.1f} % "
          f"of {1e3 * seconds:.1f} ms")
    report["details"].append({"outside_the_model": share, "pass_ms": 1e3 * seconds})
    for workers in (1, 2, 4):
        step = shared_step(model, ropes, 8192, workers)
        peak_memory()
        resident = peak_memory()  # just started anew, the peak is what is resident now
        for _ in range(3):
            step()
        peak = peak_memory()
        if peak is not None:
            config, cache = model.config, step.cache
            one_copy = 2 * 8192 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
            whole = sum(m.nbytes for m in (*cache.keys.values(), *cache.values.values()))
            print(f"  {workers} workers at 8,192 tokens: cache {whole / 2**20:.0f} MiB (one copy of what is seen: "
                  f"{one_copy / 2**20:.0f} MiB), peak during steps {(peak - resident) / 2**20:+.1f} MiB")
        del step


def parse():
    """The command line."""
    parser = generate.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", type=int, nargs="*", help="1, 2, 3 (default: all; 3 on a CPU only)")
    parser.add_argument("--model", help="hub name, local folder or GGUF file (default: the bundled SmolLM2-135M)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of that shape instead of a model")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers only")
    parser.add_argument("--device", help="default: the best one there is")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16", "auto"],
                        help="default: float32 and bfloat16 on a CPU, else bfloat16 for shapes, and the checkpoint's own")
    parser.add_argument("--tokens", type=int, nargs="+", help="cached tokens in table 1")
    parser.add_argument("--attention-tokens", type=int, nargs="+", help="cached tokens in table 2")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--naive", action="store_true", help="also time the obvious engine, with 4 workers (CPU)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file, with hardware and versions")
    args = parser.parse_args()
    args.device = args.device or generate.best_device()
    shared_cache.use_device(args.device)
    cpu = not on_gpu(args.device)
    args.tables = args.tables or [1, 2, 3]
    args.tokens = sorted(set(args.tokens or []) or ([512, 2048, 8192] if cpu else [1024, 2048, 4096, 8192, 16384]))
    args.attention_tokens = args.attention_tokens or [300, 4096, 8192, 16384, 32768]
    args.dtype = args.dtype or (["float32", "bfloat16"] if cpu else ["bfloat16" if args.shape else "auto"])
    args.workers = sorted(set(args.workers))
    if args.layers is not None and (args.layers < 1 or not args.shape):
        raise ValueError("--layers takes a number from 1 on, and goes with --shape")
    if args.model and args.shape:
        raise ValueError("--model and --shape exclude each other: a loaded model, or random weights")
    if args.naive and args.tokens[-1] < 300:
        raise ValueError("the obvious engine runs with 4 workers: give it 300 --tokens or more")
    if set(args.tables) - {1, 2, 3}:
        raise ValueError(f"there is no table {max(args.tables)}; choose among 1, 2 and 3")
    if min(*args.workers, args.repeats) < 1 or max(args.workers) > 16:
        raise ValueError("there can be 1 to 16 workers, and at least 1 repeat")
    for tokens in args.tokens + args.attention_tokens:
        lengths_of(tokens, max(args.workers))
    if args.json:
        generate.check_writable(args.json)
    return args


def make_model(args, dtype):
    """(model, its name): random weights of a shape made on the device, or a loaded model."""
    if args.shape:
        config = copy.deepcopy(SHAPES[args.shape])
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        config.layer_types = None if config.model_type == "llama" else ["full_attention"] * config.num_hidden_layers
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype.replace("auto", "bfloat16")))
        return model.eval().requires_grad_(False), f"random weights shaped like {args.shape}"
    return shared_cache.load_model(args.model, args.device, dtype)[0], args.model or "SmolLM2-135M"


def main():
    """Print the tables."""
    try:
        args = parse()
        torch.manual_seed(0)
        if not on_gpu(args.device):
            torch.set_num_threads(1)
        report = {"hardware": hardware(args.device), "command": sys.argv, "passes": [], "attention": [], "details": []}
        print(", ".join(f"{key} {value}" for key, value in report["hardware"].items() if value))
        heads, dtype = (40, 8, 128), torch.bfloat16  # of table 2, unless a model says otherwise
        for wanted in args.dtype if 1 in args.tables or args.model or args.shape else []:
            model, label = make_model(args, wanted)
            config, dtype = model.config.get_text_config(), model.dtype
            heads = (config.num_attention_heads, config.num_key_value_heads, head_size(config))
            if 1 in args.tables:
                passes(model, args, report, label)
            del model
        if 2 in args.tables:
            layer_attention(heads, dtype, args.device, args, report)
        if 3 in args.tables and not on_gpu(args.device):
            details(report)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        report["hardware"] = hardware(args.device)  # now with Triton's version
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
