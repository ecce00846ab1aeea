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
        firsts = [*range(0, recording.prefill, size), *range(recording.prefill, total, size)]  # steps are of no use to the prompt
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
    call = partial(checkpoint, query_rotation.attention, use_reentrant=False, preserve_rng_state=False) if frugal else query_rotation.attention
    return torch.cat([call(some, k, v, tables, rotation, scale, window) for some, tables in zip(queries, pieces)], 1)


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
    """Records of a run without a model: worker w's steps have lengths[w] tokens, the opening included, over and over."""
    plan = layouts.layout(layout, len(lengths))
    separators = {name: [1] for name in plan.separator_views}
    left = [length[0] for length in lengths]  # tokens of each worker's step that are still to be fed
    fresh, count, records = [True] * len(lengths), [0] * len(lengths), []
    for _ in range(passes):
        fed = {w: [2] * min(opening if fresh[w] else 1, left[w]) for w in range(len(lengths))}
        fresh, closed = [False] * len(lengths), []
        for w, ids in fed.items():
            left[w] -= len(ids)
            if left[w] == 0:
                count[w] += 1
                left[w], fresh[w] = lengths[w][count[w] % len(lengths[w])], True
                closed.append({"worker": w})
        records.append({"fed": fed, "sampled": dict.fromkeys(fed, 3), "closed": closed})
    return record(plan, [0] * prompt, separators, records)


def draw(console, recording):
    """One line per token, one column per slot of each row: hidden, or visible, the darker the nearer."""
    widths, distance = unfold(recording)
    shades = "█▓▒░"
    for line in distance.tolist():
        text, slots = Text("  "), iter(line)
        for row, width in enumerate(widths):
            for d in (next(slots) for _ in range(width)):
                text.append("·" if d < 0 else shades[min(3, d // 8)], style="dim" if d < 0 else ["cyan", "magenta"][row % 2])
            text.append(" ")
        console.print(text)


def main():
    console = Console(highlight=False)
    draw(console, rehearse("combined", [[7, 9], [10, 5]], 12))


if __name__ == "__main__":
    main()
