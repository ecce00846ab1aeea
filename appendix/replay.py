r"""Appendix: encode a finished collaboration again, in one forward pass.

The problem. Live, a run takes as many forward passes as its slowest worker has tokens. Sometimes all tokens are known
already: to train on a run, or to restore one whose cache was lost. Can they go through the model all at once, as the
tokens of a plain text can? In a plain text every token sees what stands before it. Here each token saw, at the moment it
was written, other lengths of other blocks at other distances, and most blocks have moved since.

The answer (paper, appendix B). What a token saw is its column in chapter 3's two tables: integers, next to nothing. Keep
the columns of all passes, and any number of passes becomes one. The one thing to mind: when a step moved to the history,
its place changed, but not its keys as seen from inside the step. So the history is cut into its steps again: the tables
get one row for the prompt and one for each step, finished or not, and each step's keys are stored once, from angle 0.

    record        passes of a run -> Recording: its tokens in one row, and the two tables
    encode        Recordings -> logits, in one pass through chapter 4's attention, with gradients where wanted
    loss          what to minimise in order to train on recorded runs
    restore       a fresh run -> the run where it was when its trace was saved (chapter 6: --resume trace.json)
    unfold        the tables as the dense 4D mask and the distances that they stand for: only to look at

What to notice: nothing in here computes attention. A batch of runs is a longer row of tokens with more rows of blocks.
Memory: the tables take tokens x blocks; `attention` takes the queries in pieces and computes each piece's scores again
when its gradient is due, so tokens x tokens scores are never kept.

Train in plain PyTorch, on `recordings = [recording_of(run), ...]`:

    ropes = query_rotation.attach(model.train().requires_grad_())
    loss(model, ropes, recordings).backward()

Or with transformers' Trainer: `data_collator=lambda recordings: {"recordings": recordings}`, remove_unused_columns=False, and
`compute_loss` of a subclass returns loss(model, ropes, inputs["recordings"]).

Run it: python appendix/replay.py
"""
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.text import Text
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

NOTHING = -100  # in `sampled`: no token was picked from these logits (the label that PyTorch's losses ignore)


@dataclass
class Recording:
    """A run of N tokens, in the order in which they were fed, and B rows of blocks. All int64, on the CPU."""

    ids: torch.Tensor  # [N] the prompt, the separators, then what the workers fed, pass by pass
    sampled: torch.Tensor  # [N] the token that was picked from each token's logits, or NOTHING
    slots: torch.Tensor  # [N] where each token's key goes: the tokens of a block stand side by side
    tables: layouts.Tables  # for all N tokens; rows as in the live run, then one for each further step
    rows_of: list  # row of the live run -> the rows that its block consisted of when the run stopped, in order
    prefill: int  # so many tokens stood there before the first pass


def record(plan, prompt, separators, passes):
    """Put the passes of a run together.

    Args:
        plan: the run's Layout (chapter 3).
        prompt: token ids of the common block; separators: {name: token ids}, in the order of plan.separator_views.
        passes: the records of chapter 6, of which "fed" and "sampled" (both per worker) and "closed" are read. A sampled
            NOTHING is a token that training shall not imitate.
    """
    rows = [shared_cache.Block(0, 0) for _ in range(1 + max(plan.blocks))]
    rows = [rows[b] for b in plan.blocks]
    rows_of = [[row] for row in range(len(rows))]
    ids, sampled, owners, tables = [], [], [], []

    def feed(writers, picked):
        """Chapter 6's `_feed`, without the model. `picked`: the token sampled for each writer."""
        writers = [([row for live in view for row in rows_of[live]], new) for view, new in writers]
        for (view, new), token in zip(writers, picked):
            rows[view[-1]].length += len(new)
            ids.extend(new)
            sampled.extend([*[NOTHING] * (len(new) - 1), token])
            owners.extend([view[-1]] * len(new))
        tables.append(layouts.fill_tables(rows, [(view, len(new)) for view, new in writers]))

    feed([([layouts.HISTORY], prompt)], [NOTHING])
    for name, new in separators.items():
        feed([(plan.separator_views[name], new)], [NOTHING])
    prefill = len(ids)
    for one in passes:
        feed([(plan.views[w], new) for w, new in one["fed"].items()], one["sampled"].values())
        for closed in one["closed"] if plan.moves else []:
            own = 1 + closed["worker"]
            rows_of[layouts.HISTORY] += rows_of[own]  # the step is a part of the history now ...
            rows_of[own] = [len(rows)]  # ... and its worker's block is a new one
            rows.append(shared_cache.Block(0, 0))

    end = 0
    for block in {id(row): row for row in rows}.values():  # the dots may be several rows, but they are one block
        block.start, end = end, end + block.length
    start = torch.tensor([row.start for row in rows])
    position = torch.cat([table.position for table in tables])
    offset, visible = np.zeros((2, len(rows), len(ids)), np.int64)  # [B, N]: a step is invisible before it begins
    n = 0
    for table in tables:
        known, new = slice(0, len(table.offset)), slice(n, n + len(table.position))
        offset[known, new], visible[known, new], n = table.offset, table.visible, new.stop
    tables = layouts.Tables(start, position, torch.from_numpy(offset), torch.from_numpy(visible))
    return Recording(torch.tensor(ids), torch.tensor(sampled), start[owners] + position, tables, rows_of, prefill)


def recording_of(run):
    """The Recording of a run of chapter 6, finished or not."""
    return record(run.layout, run._openings()[0], run.separators, run.passes)


# --------------------------------------------------------------------------------------------------------- one pass

def cut(recordings, size):
    """The tables of all recordings, one behind the other, in pieces: at most `size` tokens, and the rows that these see."""
    pieces, base = [], 0  # base: first slot of a recording
    for recording in recordings:
        tables, total = recording.tables, len(recording.ids)
        # No piece has tokens of the prompt and of workers: the former would be turned for all rows that the latter see.
        firsts = [*range(0, recording.prefill, size), *range(recording.prefill, total, size)]
        for first, end in zip(firsts, [*firsts[1:], total]):
            seen = tables.visible[:, first:end].any(1)
            pieces.append(layouts.Tables(base + tables.start[seen], tables.position[first:end],
                                         tables.offset[seen, first:end], tables.visible[seen, first:end]))
        base += total
    return pieces


def attention(q, k, v, pieces, rotation, scale, window=None, frugal=True):
    """Chapter 4's attention, piece by piece. The same signature, but for `pieces`: a list of Tables, for N queries in all.

    frugal: do not keep a piece's scores for the gradient, compute them again.
    """
    queries = q.split([len(tables.position) for tables in pieces], 1)
    function = query_rotation.attention
    if frugal:
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(some, k, v, tables, rotation, scale, window) for some, tables in zip(queries, pieces)], 1)


def encode(model, ropes, recordings, size=256, frugal=True):
    """Encode whole runs in one forward pass, as if each token had been fed when it was.

    Args:
        model: attached to the shared cache; ropes: what query_rotation.attach returned.
        recordings: a list of Recordings, the batch.
        size: so many queries attend at a time; frugal: see `attention`. Neither changes the result.
    Returns:
        (logits [M, vocabulary] of the M tokens from which one was sampled, in the order of the recordings and of their
        `sampled`; the SharedCache, with each block where the recording's `slots` say)
    """
    bases = np.cumsum([0, *(len(recording.ids) for recording in recordings)]).tolist()
    cache = shared_cache.SharedCache([bases[-1]], ropes)
    cache.new_slots = torch.cat([base + recording.slots for base, recording in zip(bases, recordings)])
    ids, position, sampled = (torch.cat(parts).to(model.device) for parts in zip(*(
        (recording.ids, recording.tables.position, recording.sampled) for recording in recordings)))
    output = model(ids[None], position_ids=position[None], past_key_values=cache, use_cache=True,
                   logits_to_keep=(sampled != NOTHING).nonzero()[:, 0],
                   hogwild=(cache, cut(recordings, size), partial(attention, frugal=frugal)))
    return output.logits[0], cache


def loss(model, ropes, recordings, **options):
    """Mean cross-entropy (nats) of the workers' own tokens, given what each of them saw when it chose. A scalar tensor."""
    logits, _ = encode(model, ropes, recordings, **options)
    sampled = torch.cat([recording.sampled for recording in recordings])
    return F.cross_entropy(logits.float(), sampled[sampled != NOTHING].to(logits.device))


# ---------------------------------------------------------------------------------------------------------- restore

def restore(run, passes):
    """Bring a run that has not advanced yet to where another one stopped, given that one's `passes`.

    The loop itself is made to write the same tokens again, without its model, so that everything that is not in the
    cache (steps, pending tokens, checks, random numbers) is as it was. Then one pass fills the cache.
    Raises:
        ValueError: the passes are not those of a run with this model, problem and these settings.
    """
    if run.passes:
        raise ValueError(f"this run has advanced by {len(run.passes)} passes already; restore a fresh one")
    vocabulary, sample = run.model.get_output_embeddings().weight.shape[0], run.sample

    def feed(writers):
        run.cache.append({run.layout.blocks[view[-1]]: len(ids) for view, ids in writers})
        return torch.zeros(len(writers), vocabulary)

    def repeat(logits, writing):
        if [w.index for w in writing] != [*old["sampled"]] or any(w.pending != old["fed"][w.index] for w in writing):
            raise ValueError(f"pass {len(run.passes) + 1} of the trace does not follow from those before it: it was made with "
                             "another model, another problem, or other settings")
        sample(logits, writing)  # uses up as many random numbers as were used then
        return [*old["sampled"].values()]

    run._feed, run.sample = feed, repeat
    try:
        for old in passes:
            run.advance()["seconds"] = old["seconds"]
    finally:
        del run._feed, run.sample  # the methods of its class are in place again
    recording = recording_of(run)
    with torch.no_grad():
        _, cache = encode(run.model, run.cache.ropes, [recording])
    for row, b in enumerate(run.layout.blocks):
        place, block = 0, run.cache.blocks[b]
        for source in recording.rows_of[row]:
            first = int(recording.tables.start[source])
            length = int(recording.tables.visible[source].max())
            here, there = slice(first, first + length), slice(block.start + place, block.start + place + length)
            for layer, keys in cache.keys.items():
                run.cache.keys[layer][:, there] = rope.shift(keys[:, here], place, run.cache.ropes[layer])
                run.cache.values[layer][:, there] = cache.values[layer][:, here]
            place += length
        assert place == block.length, "the recording and the run disagree about a block"


# ---------------------------------------------------------------------------------------------------- what one can see

def unfold(recording):
    """The tables as what they stand for. Returns (columns, distance [N, all slots of all rows]).

    distance: from the token to the key, as the token saw it; -1: hidden. `distance >= 0` is the 4D mask of appendix B (for
    one run and all heads alike), and the distances are its position differences.
    """
    tables, parts = recording.tables, []
    for row in range(len(tables.start)):
        j = torch.arange(int(tables.visible[row].max()))  # [slots]
        distance = (tables.position + tables.offset[row])[:, None] - j  # [N, slots]
        parts.append(distance.masked_fill(j >= tables.visible[row][:, None], -1))
    return [part.shape[1] for part in parts], torch.cat(parts, 1)


def rehearse(layout, lengths, passes, opening=3, prompt=8):
    """A Recording of a run that no model has made: each worker writes steps of the given lengths, over and over.

    Args:
        lengths: per worker, the tokens of its steps, `opening` (those fed at once) included.
    """
    def turns(sizes):
        """(tokens fed, does that end the step) of each pass."""
        while True:
            for size in sizes:
                yield min(opening, size), size <= opening
                yield from ((1, left == 0) for left in reversed(range(size - opening)))

    plan, workers, passes_of_all = layouts.layout(layout, len(lengths)), [turns(sizes) for sizes in lengths], []
    for _ in range(passes):
        now = dict(enumerate(map(next, workers)))
        passes_of_all.append({"fed": {w: [2] * count for w, (count, _) in now.items()}, "sampled": dict.fromkeys(now, 3),
                              "closed": [{"worker": w} for w, (_, ends) in now.items() if ends]})
    return record(plan, [0] * prompt, {name: [1] for name in plan.separator_views}, passes_of_all)


SHADES = "█▓▒░"  # 0-7, 8-15, 16-23, and more tokens away


def draw(console, recording, names):
    """One line per token, in the order in which they were fed; one column per key. `names`: of the rows, in their order."""
    widths, distance = unfold(recording)
    own = ((recording.tables.offset == 0) & (recording.tables.visible > 0)).int().argmax(0)  # [N] row of each token's block
    margin = 2 + max(map(len, names))
    console.print(" " * margin + " ".join(name[:width].ljust(width) for name, width in zip(names, widths)), style="bold")
    colours = {"p": "white", "A": "cyan", "B": "magenta"}
    for n, line in enumerate(distance.tolist()):
        text, slots = Text(names[own[n]].ljust(margin)), iter(line)
        for name, width in zip(names, widths):
            for away in [next(slots) for _ in range(width)]:
                text.append(*("·", "dim") if away < 0 else (SHADES[min(away // 8, 3)], colours.get(name[0], "yellow")))
            text.append(" ")
        console.print(text)


def saved_bytes(function):
    """How many bytes autograd keeps for the gradient of function()."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(sizes.values()) if result.requires_grad else 0


def replay_real_model(console):
    """A run of SmolLM2 against the same run in one pass, and one that is restored half way. Returns the largest error."""
    generate = import_module("06_generate")
    model, tokenizer = shared_cache.load_model()
    prompt = "{names} add up, step by step.\n\n{problem}"
    settings = generate.Settings(max_passes=80, max_step=64, seed=1, check_every=64, prompt=prompt)
    run, live = generate.Hogwild(model, tokenizer, generate.PROBLEM, settings), []
    feed = run._feed
    run._feed = lambda writers: live.append(feed(writers)) or live[-1].clone()
    while run.ending is None:
        run.advance()
    start = perf_counter()
    recording = recording_of(run)
    with torch.no_grad():
        again, _ = encode(model, run.cache.ropes, [recording])
    once = perf_counter() - start
    error = (again - torch.cat(live)).abs().max().item()
    seconds = sum(record["seconds"] for record in run.passes)
    steps = sum(len(record["closed"]) for record in run.passes)
    console.print(f"SmolLM2, {len(recording.ids)} tokens, {steps} finished steps: {len(run.passes)} passes {seconds:.1f} s, "
                  f"one pass {once:.1f} s", soft_wrap=True)
    console.print(f"  largest difference of a logit {error:.0e} (they reach {again.abs().max():.0f})")

    half = len(run.passes) // 2
    other = generate.Hogwild(model, tokenizer, generate.PROBLEM, settings)
    start = perf_counter()
    restore(other, run.passes[:half])
    console.print(f"  restored after {half} passes in {perf_counter() - start:.1f} s, and continued")
    while other.ending is None:
        other.advance()
    assert [record["sampled"] for record in other.passes] == [record["sampled"] for record in run.passes]
    assert error < 1e-3 and steps
    return error


def measure_memory(console):
    """What is kept for the gradient, as runs grow."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
                                                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    ropes, kept = query_rotation.attach(model), []
    console.print("\nkept for the gradient, random model, 2 workers, MiB:\n  tokens  rows   frugal   with the scores")
    for passes in (250, 500, 1000):
        example = rehearse("combined", [[70], [110]], passes)
        kept.append([saved_bytes(partial(loss, model, ropes, [example], frugal=frugal)) / 2**20 for frugal in (True, False)])
        console.print(f"  {len(example.ids):6}  {len(example.tables.start):4} {kept[-1][0]:8.1f} {kept[-1][1]:17.1f}")
    console.print("-> in proportion to the tokens, or nearly to their square")
    assert 0 < kept[-1][0] < 5 * kept[0][0]


def main():
    """Show the tables, check them on the real model, measure the memory."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    console.print("What each token saw, and how far away. Alice and Bob, combined layout, steps of 6 to 10 tokens.\n"
                  "█ 0-7 tokens away, ▓ 8-15, ▒ 16-23, ░ further, · not visible.\n", soft_wrap=True)
    names = ["prompt", "Alice 1", "Bob 1", "others", "own", "<...>", "Alice 2", "Bob 2"]
    draw(console, rehearse("combined", [[7, 9], [10, 6]], 11), names)
    console.print("-> While Alice writes her first step, Bob sees it near by, in progress. Then it moves to the history:\n"
                  "   from one line to the next it is further away. Its keys are the same ones.\n", soft_wrap=True)
    error = replay_real_model(console)
    measure_memory(console)
    console.print(f"[OK] one pass gives the logits of many (to {error:.0e}), and a restored run goes on where it was")


# Exercises
# 1. Take `rows_of` out of `record` and let the history be one row, as it is live. Which tokens go wrong, and why?
# 2. Train SmolLM2 on one run that you like (a learning rate of 1e-5, ten steps), and look at how the next run begins.
# 3. The frugal attention computes each piece twice. What would it take to keep the sums of the softmax instead?

if __name__ == "__main__":
    main()
