r"""What a pass costs on this machine: steps of all workers against one sequence of the stock model.

A step is one forward pass of all workers, one new token each: appending, tables, the model, picking tokens. The blocks are
filled so that every worker sees the stated number of tokens (combined layout). The baseline is the stock model, decoding
*one* sequence with its DynamicCache and PyTorch's own attention, in the same run, the two taking turns: on a shared
machine only such ratios mean anything. Medians after a warm-up, one thread.

    python appendix/speed.py                        the table, for float32 and bfloat16
    python appendix/speed.py --naive                and the obvious engine (tests/oracle.py) at the longest length; run it as
        MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 python appendix/speed.py --naive
    which keeps the allocator from returning memory after each copy, and so flatters the obvious engine
"""
import argparse
import copy
import io
import sys
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from transformers import DynamicCache

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")

SEPARATOR, OWN = 6, [20, 50, 80]  # tokens of a separator, and of the workers' unfinished steps (in turn)


def stock_step(model, tokens):
    """A function that decodes one token with the stock model, `tokens` of random cache behind it."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), layer)

    @torch.no_grad()
    def step():
        position = torch.tensor([[cache.get_seq_length()]])
        model(torch.tensor([[5]]), position_ids=position, past_key_values=cache).logits[0, -1].argmax().item()
    return step


def lengths_of(tokens, workers):
    """Lengths of the blocks of the combined layout, such that every worker sees `tokens`: (layout, lengths)."""
    plan = layouts.layout("combined", workers)
    lengths = [0, *(OWN[w % 3] for w in range(workers)), *[SEPARATOR] * (max(plan.blocks) - workers)]
    lengths[0] = tokens - sum(lengths[plan.blocks[row]] for row in plan.views[0])
    return plan, lengths


def shared_step(model, ropes, tokens, workers):
    """A function that does one step of `workers` workers over the shared cache; its attribute `cache` is that cache."""
    plan, lengths = lengths_of(tokens, workers)
    cache = shared_cache.SharedCache([length + 200 for length in lengths], ropes)
    rows = [cache.blocks[b] for b in plan.blocks]
    cache.append({0: 1})
    query_rotation.forward(model, cache, layouts.fill_tables(cache.blocks, [([0], 1)]), [0], [0])  # makes the memory
    for memory in (*cache.keys.values(), *cache.values.values()):
        memory.normal_()
    for block, length in zip(cache.blocks, lengths):
        block.length = length

    def step():
        cache.append({1 + w: 1 for w in range(workers)})
        tables = layouts.fill_tables(rows, [(view, 1) for view in plan.views])
        query_rotation.forward(model, cache, tables, [5] * workers, list(range(workers))).argmax(-1).tolist()
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


def take_turns(steps, repeats):
    """Median seconds of each step, run in turns."""
    times = [[] for _ in steps]
    for _ in range(repeats + 3):
        for step, taken in zip(steps, times):
            start = perf_counter()
            step()
            taken.append(perf_counter() - start)
    return [median(taken[3:]) for taken in times]


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


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--naive", action="store_true", help="also time the obvious engine, with 4 workers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in args.dtype:
        stock, tokenizer = shared_cache.load_model(dtype=name)
        ours = shared_cache.pack_linears(copy.deepcopy(stock))
        ropes = query_rotation.attach(ours)
        print(f"\nSmolLM2-135M, {name}, one thread: ms per step (ratio to one sequence of the stock model)")
        print("  tokens    stock " + "".join(f"{w:>9} worker{'s' if w > 1 else ' '}" for w in args.workers))
        for tokens in args.tokens:
            steps = [stock_step(stock, tokens), *(shared_step(ours, ropes, tokens, w) for w in args.workers)]
            base, *times = take_turns(steps, args.repeats)
            print(f"  {tokens:6,} {1e3 * base:8.1f} " + "".join(f"{1e3 * t:9.1f} ({t / base:.2f})" for t in times), flush=True)
        if name != "float32":
            continue
        if args.naive:
            tokens = args.tokens[-1]
            engines = [naive_step(stock, tokens, 4), shared_step(ours, ropes, tokens, 4)]
            naive, mine = take_turns(engines, max(3, args.repeats // 3))
            print(f"  obvious engine, 4 workers, {tokens:,} tokens: {1e3 * naive:.0f} ms, {naive / mine:.1f} times ours")
        step = shared_step(ours, ropes, 4096, 4)
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
        share, seconds = overhead(ours, tokenizer, 4, 2048)
        print(f"  outside the model (tables, sampling, text, live display), 4 workers, 2,048 tokens: {100 * share:.1f} % "
              f"of {1e3 * seconds:.1f} ms")
        for workers in args.workers:
            step = shared_step(ours, ropes, 8192, workers)
            peak_memory()
            resident = peak_memory()  # just started anew, the peak is what is resident now
            for _ in range(3):
                step()
            peak = peak_memory()
            if peak is not None:
                config, cache = ours.config, step.cache
                one_copy = 2 * 8192 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
                whole = sum(m.nbytes for m in (*cache.keys.values(), *cache.values.values()))
                print(f"  {workers} workers at 8,192 tokens: cache {whole / 2**20:.0f} MiB (one copy of what is seen: "
                      f"{one_copy / 2**20:.0f} MiB), peak during steps {(peak - resident) / 2**20:+.1f} MiB")
            del step


if __name__ == "__main__":
    main()
