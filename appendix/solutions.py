r"""Appendix: the questions at the ends of the chapters, answered by measuring.

    python appendix/solutions.py 4.2          an experiment, and what came out
    python appendix/solutions.py              all of them (two minutes)
    python appendix/solutions.py --markdown   likewise, as appendix/solutions.md has them

Each function is an answer: its docstring says it, what it prints shows it. `changed` is how one asks
what would happen if a line of a chapter were another one.
"""
import importlib.util
import os
import random
import re
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from appendix import adapters, command, curves, models, puzzles, recording  # noqa: E402
from appendix.command import option  # noqa: E402

rope, shared_cache, layouts, query_rotation = map(import_module, (
    "01_rope_shift", "02_shared_cache", "03_layouts", "04_query_rotation"))
generate = import_module("06_generate")
HEAD = rope.inverse_frequencies(LlamaConfig(head_dim=64))  # of a usual head


def changed(file, old, new):
    """The module in a file of the project, but with other text in one place."""
    source = (ROOT / file).read_text()
    assert source.count(old) == 1, f"{old!r} is not in {file} once"
    with tempfile.TemporaryDirectory() as folder:  # Triton reads its kernels' source from files
        path = Path(folder) / file
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"changed {file}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def milliseconds(function, *arguments):
    """Median time of a call, the best of three: others may use the machine meanwhile."""
    return min(query_rotation.milliseconds(function, arguments) for _ in range(3))


def collaboration(passes, between=lambda run: None, **others):
    """A run of two collaborators on the first fresh list, after so many passes, or ended."""
    model, tokenizer = models.load(adapters.COLLABORATOR)
    settings = generate.Settings(max_passes=passes, **{**adapters.settings(adapters.COLLABORATOR),
                                                       **others})
    run = generate.Hogwild(model, tokenizer, puzzles.EXAMPLE, settings)
    while run.ending is None:
        run.advance()
        between(run)
    return run


# ------------------------------------------------------------------------------------ chapters 1 and 2

def answer_1_1():
    """`rotate` with complex numbers is one multiplication: (x1 + i x2) * exp(i angle)."""
    x, (cos, sin) = torch.randn(1000, 64), rope.cos_sin(HEAD, torch.arange(1000))
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    error = rope.largest(torch.cat([turned.real, turned.imag], -1) - rope.rotate(x, cos, sin))
    print(f"largest difference of 64,000 numbers: {error:.1e}")
    assert error < 1e-5


def answer_1_2():
    """Neighbouring pairs are the same rotation after a fixed permutation of D: evens first, then odds.
    So a checkpoint can be converted by permuting the rows of its q and k projections."""
    x, (cos, sin) = torch.randn(1000, 64), rope.cos_sin(HEAD, torch.arange(1000))
    a, b = x[:, ::2], x[:, 1::2]
    neighbours = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)
    order = torch.arange(64).view(32, 2).T.flatten()  # evens, then odds
    error = rope.largest(neighbours[:, order] - rope.rotate(x[:, order], cos, sin))
    print(f"rotated by neighbours and permuted, permuted and rotated by halves: {error:.0e} apart")
    assert error == 0


def answer_1_3():
    """The one is off by a rounding, the thousand by half of the key: where one position is a small
    angle, the change is smaller than bfloat16's spacing, and is rounded away every time. So a step is
    moved when it is finished, once, and not a little in every pass."""
    key = torch.randn(1000, 64)
    steps, once = key.bfloat16(), rope.shift(key.bfloat16(), 1000, HEAD).float()
    for _ in range(1000):
        steps = rope.shift(steps, 1, HEAD)
    exact = rope.shift(key.bfloat16().float(), 1000, HEAD)
    many, one = ((k.float() - exact).norm() / exact.norm() for k in (steps, once))
    stuck = (steps == key.bfloat16()).float().mean()
    print(f"relative error of random bfloat16 keys: shifted once {one:.4f}, a thousand times {many:.4f}"
          f"; {stuck:.0%} of their numbers have never changed")
    assert many > 5 * one


def answer_2_1():
    """Each move rounds once more: by 4e-8 of a key in float32, by 1.6e-3 in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        cache, keys = shared_cache.SharedCache([HEAD]), torch.randn(1, 800, 64, dtype=dtype)
        own, middle, history = blocks = [cache.block(size) for size in (200, 500, 1000)]
        cache.reserve([*zip(blocks, (200, 300, 300))])
        cache.write(0, keys, keys)
        errors = []
        for source, target in ((own, middle), (middle, history)):
            cache.move(source, target)
            first = target.length - 200  # where our step, the last 200 tokens, stands now
            angles = first * HEAD.inv_freq  # float64
            exact = rope.rotate(keys[:, :200].double(), angles.cos(), angles.sin())
            moved = cache.keys[0][:, target.start + first:][:, :200]
            errors.append((moved - exact).norm() / exact.norm())
        print(f"{str(dtype)[6:]:9} relative error after one move {errors[0]:.1e}, after two "
              f"{errors[1]:.1e}")
    assert errors[0] < errors[1] < 2 * errors[0]


def answer_2_2():
    """Moving reads and writes the step alone, wherever it goes."""
    def move(cache, source, target, length):
        source.length, target.length = 80, length
        cache.move(source, target)
    times = []
    for length in (100, 100_000):
        cache = shared_cache.SharedCache([HEAD] * 4)
        source, target = cache.block(80), cache.block(length + 80)
        cache.reserve([(source, 80)])
        for layer in range(4):
            cache.write(layer, *torch.randn(2, 3, 80, 64))
        times.append(milliseconds(move, cache, source, target, length))
        print(f"80 tokens, 4 layers, to the end of {length:7,} tokens: {times[-1]:.2f} ms")
    assert times[1] < 3 * times[0]


def answer_2_3():
    """Then every pass would rotate all that is in view, in every layer: as much work again as the
    attention, or more."""
    *tensors, tables = query_rotation.example(4096, 1)
    attending = milliseconds(query_rotation.attention, *tensors, tables, HEAD, 0.125)
    rotating = milliseconds(rope.rotate, tensors[1],  # (the angles are the same ones for all layers)
                            *rope.cos_sin(HEAD, torch.arange(tensors[1].shape[1])))
    print(f"one worker, 4,096 tokens, a layer: attention {attending:.2f} ms, rotating {rotating:.2f} ms")
    assert rotating > attending / 2


# ------------------------------------------------------------------------------------ chapters 3 and 4

def answer_3_1():
    """Only the view changes, and by way of it both tables; no code that reads them. (Blocks lie in the
    memory in their workers' order, so the left neighbour is the last that starts before one's own.)"""
    def neighbour(history, own, others, words):
        """History, the left neighbour's step, mine."""
        left = [block for block in others if block.start < own.start][-1:]
        return [history, *left, own]
    layouts.LAYOUTS["neighbour"] = layouts.Layout(neighbour, moves=True)
    try:
        *_, (tables, _) = layouts.play("neighbour", passes=9)
    finally:
        del layouts.LAYOUTS["neighbour"]
    seen = (tables.visible > 0).sum(0).tolist()
    print(f"blocks that Alice, Bob and Carol see: {seen[0]}, {seen[len(seen) // 2]}, {seen[-1]}")
    assert seen[0] == 2 and seen[-1] == 3


def answer_3_2():
    """In the order of the list of workers, and nobody notices: both steps are in the history before the
    next pass, and views are made anew from lengths. Whoever comes second has moved further, that is
    all."""
    before, layouts.STEPS[:] = layouts.STEPS[:], [5, 5, 9]
    try:
        *_, (tables, texts) = layouts.play("combined", passes=7)
    finally:
        layouts.STEPS[:] = before
    history = next(iter(texts.values()))
    print(f"Alice and Bob have finished in one pass; the history is {history}")
    assert re.search("a+b+$", history)


def answer_3_3():
    """Two per row and token. From two workers on there are 2 W + 2 rows (3 for one), so 4 (W + 1) W
    integers, whatever the lengths. A mask would have a number for each token that is cached."""
    for workers in (1, 2, 4, 8):
        *_, tables = query_rotation.example(8192, workers)
        rows, new = tables.visible.shape
        print(f"{workers} workers: two tables of {rows} x {new}, {2 * rows * new:4} integers; a mask "
              f"over 8,192 tokens: {8192 * new:6,}")
    assert 2 * rows * new < 8192


def answer_4_1():
    """Only in part: moving keys adds 1 / G to the multiplications. The rest is memory: each worker's
    view is cut out, rotated, and put together, which writes and reads all of it several times."""
    heads, group, size = 3, 3, 64
    *tensors, tables = query_rotation.example(8192, 4, heads=heads, group=group, size=size)
    seen = int(tables.visible.sum())  # slots, over all workers
    scores = 2 * seen * heads * group * size  # queries times keys, weights times values
    turned_keys = 2 * seen * heads * size
    turned_queries = 2 * tables.visible.numel() * heads * group * size
    fast, slow = (milliseconds(function, *tensors, tables, HEAD, 0.125) for function in (
        query_rotation.attention, query_rotation.attention_spec))
    print(f"multiplications: products {scores:,}; rotating keys {turned_keys:,} more, or queries "
          f"{turned_queries:,}\ntime: rotated queries {fast:.1f} ms, rotated keys {slow:.1f} ms")
    assert turned_queries < turned_keys / 100 and fast < slow


def answer_4_2():
    """Exactness is lost: a score has 8 bits, so 20 may be off by 0.06, and its weight by six per cent.
    On many CPUs time is lost as well, as they multiply bfloat16 numbers in a roundabout way."""
    narrow = changed("04_query_rotation.py", "scores = torch.cat([query @ key for query, key in zip("
                     "rotated, keys)], -1)", "scores = torch.cat([(query.to(k.dtype) @ key.to(k.dtype))"
                     ".float() for query, key in zip(rotated, keys)], -1)")
    q, k, v, tables = query_rotation.example(2048, 4, torch.bfloat16)
    q = q * 3  # as peaked as in a trained model
    exact = query_rotation.attention_spec(q.float(), k.float(), v.float(), tables, HEAD, 0.125)
    for name, function in (("float32", query_rotation.attention), ("bfloat16", narrow.attention)):
        result = function(q, k, v, tables, HEAD, 0.125)
        error = (result.float() - exact).norm() / exact.norm()
        print(f"{name:9} scores: relative error {error:.4f}, "
              f"{milliseconds(function, q, k, v, tables, HEAD, 0.125):.2f} ms")
    assert error > 0.005  # of bfloat16


def answer_4_3():
    """The view names it twice, and the tables get one more row for the second place; no code changes,
    because rows are numbered by (block, how often before), as they have to be for the dots."""
    cache = shared_cache.SharedCache([])
    prompt, own = cache.block(20), cache.block(8)
    cache.reserve([(prompt, 20), (own, 8)])
    tables = layouts.fill_tables([([prompt, prompt, own], 1)])
    q, k, v = torch.randn(9, 1, 64), *torch.randn(2, 3, 28, 64)
    error = rope.largest(query_rotation.attention(q, k, v, tables, HEAD, 0.125)
                         - query_rotation.attention_spec(q, k, v, tables, HEAD, 0.125))
    print(f"rows {len(tables.start)}, starts {tables.start.tolist()}, offsets "
          f"{tables.offset.flatten().tolist()}; the two functions differ by {error:.0e}")
    assert tables.start.tolist() == [0, 0, 20] and error < 1e-5


# ------------------------------------------------------------------------------------ chapters 5 to 7

def answer_5_1():
    """From 40 workers on there are 200 operations per byte (W G, with G = 5), as many as an H200 can
    do. The kernel loses its ideal earlier: from Hopper on, a program holds 64 queries, so from 13
    workers on a second chunk reads the keys again; before Hopper 32, so from 7 workers on. (`queries =
    min(...)` in `constants`: registers.) That is counted, not timed: no GPU has run it."""
    kernel = import_module("05_triton_kernel")
    for workers in (4, 12, 13, 40):
        const = kernel.constants(5, workers, 128, 128, 3 * workers, HEAD, None, torch.bfloat16, 64)
        chunks = -(-5 * workers // const["M"])
        print(f"{workers:2} workers: {5 * workers:3} operations per byte, {chunks} chunks of "
              f"at most {const['M']} queries")
        assert (chunks > 1) == (workers > 12)


def answer_5_2():
    """Everybody waits for the program that has the history, while the others have one or two tiles."""
    *_, tables = query_rotation.example(1000, 4)
    tiles = ((tables.visible.amax(1) + 63) // 64).tolist()
    print(f"tiles of the rows: {tiles}. One program per row takes as long as {max(tiles)} tiles; equal "
          f"spans for as many programs, {-(-sum(tiles) // len(tiles))}")
    assert max(tiles) > 4 * sum(tiles) / len(tiles)


def answer_5_3():
    """A sum that was begun under a lower peak stays too large. It shows as soon as the highest score is
    not in a span's first tile; where scores are small, little is wrong, and a loose test passes."""
    kernel = import_module("05_triton_kernel")
    wrong = changed("05_triton_kernel.py", "fade = tl.exp2(peak - higher)[:, None]",
                    "fade = tl.exp2(peak - peak)[:, None]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, tables = query_rotation.example(300, 2, heads=1, group=2)
    for size in (0.01, 1, 4):
        exact = query_rotation.attention_spec(size * q, k, v, tables, HEAD, 0.125)
        tensors = [x.to(device) for x in (size * q, k, v)]
        errors = [rope.largest(module.attention(*tensors, tables, HEAD, 0.125, splits=2).cpu() - exact)
                  for module in (kernel, wrong)]
        print(f"queries times {size:4}: error with fading {errors[0]:.0e}, without {errors[1]:.0e}")
    assert errors[0] < 1e-5 < errors[1]


def answer_6_1():
    """Headers are fed with the token that ended the step, so they cost tokens, but no passes; a pass
    with one takes a little longer."""
    run, fed, times = collaboration(120), 0, ([], [])
    for record in run.passes:
        counts = [*map(len, record["fed"].values())]
        fed += sum(counts)
        times[max(counts) > 1].append(record["seconds"])
    picked = sum(len(record["sampled"]) for record in run.passes)
    print(f"{len(run.passes)} passes of two workers: {picked} tokens picked, {fed} fed; {fed - picked} "
          f"of them ({(fed - picked) / fed:.0%}) are headers; a pass with one took "
          f"{np.median(times[1]) / np.median(times[0]):.2f} times as long as others")
    assert picked <= 2 * len(run.passes) < fed + 2


def answer_6_2():
    """At their first token that depends on what the other one writes. Alice's first words do not."""
    runs = [collaboration(60, layout=layout) for layout in ("independent", "combined")]
    names = "Alice", "Bob"
    texts = [["".join(record["text"].get(name, "") for record in run.passes) for name in names]
             for run in runs]
    for name, alone, together in zip(names, *texts):
        same = len(os.path.commonprefix([alone, together]))
        print(f"{name}: the same for {same} characters, then alone {alone[same:same + 24]!r}, together "
              f"{together[same:same + 24]!r}")
        assert alone != together


def answer_6_3():
    """It does: asking rewinds every block to the length that it had."""
    def ask(run):
        if len(run.passes) % 32 == 0:
            print(f"after {len(run.passes)} passes it would say {run.answer()!r}")
    plain, asked = collaboration(96), collaboration(96, ask)
    same = [a["sampled"] == b["sampled"] for a, b in zip(plain.passes, asked.passes)]
    print(f"{sum(same)} of {len(same)} passes picked the same tokens")
    assert all(same)


def answer_7_1():
    """Two intervals that do not touch are much to ask: 400 problems are too few for half of the trials.
    The difference on the same problems needs some 200 for four trials in five: what both find hard, or
    easy, drops out of it."""
    chance = np.random.default_rng(0)
    for count in (25, 50, 100, 200, 400):
        apart, paired = 0, 0
        for _ in range(200):
            first = 1.0 * (chance.random(count) < 0.6)
            other = 1.0 * (chance.random(count) < np.where(first, 0.85, 0.475))  # 70 % of all
            (_, below), (above, _) = (curves.interval(x.mean(), count) for x in (first, other))
            apart, paired = apart + (below < above), paired + (curves.difference(other, first)[1] > 0)
        print(f"{count:4} problems: intervals apart in {apart / 200:4.0%} of 200 trials, paired "
              f"difference above 0 in {paired / 200:4.0%}")
    assert apart < 160 < paired


def answer_7_2():
    """A majority of three helps whoever is right more often than not; and, if wrong answers differ from
    each other, also who is not. Reading the samples can do more: one of them may be *seen* to be
    right."""
    chance = random.Random(0)
    for right in (0.3, 0.5, 0.7):
        shares = []
        for kinds in (1, 10):  # of wrong answers
            votes = [[0 if chance.random() < right else chance.randint(1, kinds) for _ in range(3)]
                     for _ in range(20_000)]
            shares.append(sum(max(vote, key=vote.count) == 0 for vote in votes) / len(votes))
        print(f"each sample right in {right:.0%}: a vote of three in {shares[0]:.0%} if there is one "
              f"wrong answer, in {shares[1]:.0%} if there are ten; somebody among three in "
              f"{1 - (1 - right) ** 3:.0%}")
    assert min(shares) > right


def answer_recording_1():
    """Two integers per row and token: steps are rows here, so there are more than live; and still far
    fewer numbers than in a mask of tokens times tokens."""
    recorded = recording.Recording.of(collaboration(120))
    tokens, rows = len(recorded.ids), len(recorded.lengths)
    print(f"{tokens} tokens, {rows} rows: the tables have {2 * rows * tokens:,} integers, a mask "
          f"{tokens ** 2:,}")
    assert 2 * rows * tokens < tokens ** 2


def answer_recording_2():
    """The loss falls from 2.66 to 0.90: ten steps nearly learn one run by heart."""
    recorded = recording.Recording.of(collaboration(30))
    model, _ = models.load()
    ropes = query_rotation.attach(model)
    optimizer = torch.optim.AdamW(model.requires_grad_().parameters(), 1e-5)
    losses = []
    for _ in range(11):
        losses.append(recording.loss(model, ropes, [recorded]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    print(f"loss of SmolLM2 on 30 passes of two collaborators: {losses[0]:.2f}, after ten steps "
          f"{losses[-1]:.2f}")
    assert losses[-1] < losses[0]


ANSWERS = {name[7:].replace("_", "."): function for name, function in list(globals().items())
           if name.startswith("answer_")}


@dataclass
class Options:
    """How it is printed."""

    markdown: bool = option(False, "as a page")


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser(Options, description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="?", help="such as 4.2: chapter and number")
    options, rest = parser.read(argv)
    if rest.question not in (None, *ANSWERS):
        raise ValueError(f"there is no question {rest.question!r}; choose one of {', '.join(ANSWERS)}")
    torch.set_num_threads(1)
    if options.markdown:
        print("# The questions at the ends of the chapters, answered\n\nMade by `python "
              "appendix/solutions.py --markdown`: the answers, and what the experiments printed.")
    for number in [rest.question] if rest.question else ANSWERS:
        torch.manual_seed(0)
        start, answer = perf_counter(), " ".join(ANSWERS[number].__doc__.split())
        print(f"\n## {number}\n\n{answer}\n\n```" if options.markdown else f"\n{number}  {answer}\n")
        ANSWERS[number]()
        print("```" if options.markdown else f"({perf_counter() - start:.0f} seconds)")
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
