r"""Appendix: encode a finished collaboration again, in one forward pass.

The problem. Live, a run takes a forward pass for each token of a worker. Sometimes all tokens are known already: to train on
a run, or to restore one whose cache was lost. Can they go through the model all at once, like the tokens of a plain text? In
a plain text every token sees what stands before it. Here each token saw, at the moment it was written, other lengths of other
blocks at other distances, and most blocks have moved since.

The answer (paper, appendix B). All that a token's attention depends on, besides the keys, is its column in chapter 3's two
tables. Keep the columns of all passes, and many passes become one. One thing is to be minded: a step is first somebody's
block and then a part of the history, which is *one* row of the live tables. So the history is cut into its steps again.
Every step, finished or not, has a row of its own and is stored once, as if it began at position 0; that it moved is only
another number in `offset`.

    recording_of, record    a run of chapter 6, or its passes -> Recording: its tokens in one row, and the two tables
    encode                  Recordings -> logits, in one pass through chapter 4's attention, with gradients where wanted
    loss                    what to minimise in order to train on recorded runs
    restore                 a fresh run -> the run where it was when its trace was saved (chapter 6: --resume trace.json)
    unfold                  the tables as the masks and distances that they stand for: only to look at

What to notice: nothing in here computes attention, and a batch of runs is a longer row of tokens with more rows of blocks.
Memory: the tables take tokens x rows. The scores would take tokens x tokens, so queries attend in pieces, and the scores of
a piece are computed again when its gradient is due instead of being kept.

Train in plain PyTorch:

    ropes = query_rotation.attach(model)
    model.train().requires_grad_()
    loss(model, ropes, [recording_of(run)]).backward()

Or with transformers' Trainer, one GPU per process: data_collator=lambda recordings: {"recordings": recordings}, the argument
remove_unused_columns=False, and in a subclass a `compute_loss` that returns loss(model, ropes, inputs["recordings"]). The
model's own gradient checkpointing has to stay off (it takes the cache away), and attention dropout is not applied.

Run it: python appendix/replay.py
"""
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import accumulate
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
    """A run of N tokens, in the order in which they were fed, and R rows of blocks. Tensors are int64, on the CPU.

    Rows: those of the live run, each with the *first* step of its worker, then one for each further step.
    """

    ids: torch.Tensor  # [N] the prompt, the separators, then what the workers fed, pass by pass
    sampled: torch.Tensor  # [N] the token that was picked from each token's logits, or NOTHING
    own: torch.Tensor  # [N] the row that each token belongs to
    lengths: list  # [R] tokens of each row
    tables: layouts.Tables  # of all N tokens. A block's tokens have slots side by side, whenever they were fed
    rows_of: list  # row of the live run -> the rows here that its block consisted of when the run stopped, in order
    prefill: int  # so many tokens were there before the first pass


def record(plan, prompt, separators, passes):
    """Put the passes of a run together.

    Args:
        plan: the run's Layout (chapter 3).
        prompt: token ids of the common block; separators: {name: token ids}, in the order of plan.separator_views.
        passes: the records of chapter 6, of which "fed" and "sampled" (both per worker) and "closed" are read. A sampled
            NOTHING is a token that training shall not imitate.
    """
    blocks = [shared_cache.Block(0, 0) for _ in range(1 + max(plan.blocks))]  # (where they start is settled at the end)
    rows = [blocks[b] for b in plan.blocks]
    rows_of = [[row] for row in range(len(rows))]
    ids, sampled, own, columns = [], [], [], []

    def write(writers):
        """What `_feed` of chapter 6 does, without the model. `writers`: (view of live rows, ids, the token sampled)."""
        views = [[row for live in view for row in rows_of[live]] for view, _, _ in writers]
        for view, (_, fed, token) in zip(views, writers):
            rows[view[-1]].length += len(fed)
            ids.extend(fed)
            sampled.extend([*[NOTHING] * (len(fed) - 1), token])
            own.extend([view[-1]] * len(fed))
        columns.append(layouts.fill_tables(rows, [(view, len(fed)) for view, (_, fed, _) in zip(views, writers)]))

    for view, fed in [([layouts.HISTORY], prompt), *[(plan.separator_views[name], fed) for name, fed in separators.items()]]:
        if fed:
            write([(view, fed, NOTHING)])
    prefill = len(ids)
    for past in passes:
        write([(plan.views[w], fed, past["sampled"][w]) for w, fed in past["fed"].items()])
        for closed in past["closed"] if plan.moves else []:
            step = 1 + closed["worker"]
            rows_of[layouts.HISTORY] += rows_of[step]  # it is a part of the history now ...
            rows_of[step] = [len(rows)]  # ... and its worker begins another one
            rows.append(shared_cache.Block(0, 0))

    end = 0
    for block in {id(row): row for row in rows}.values():  # by identity: the dots are several rows, but one block
        block.start, end = end, end + block.length
    start = torch.tensor([row.start for row in rows])
    position = torch.cat([*(column.position for column in columns), torch.empty(0, dtype=torch.long)])
    offset, visible = np.zeros((2, len(rows), len(ids)), np.int64)  # [R, N] each: a step is invisible before it begins
    n = 0
    for column in columns:
        known, new = slice(len(column.offset)), slice(n, n + len(column.position))
        offset[known, new], visible[known, new], n = column.offset, column.visible, new.stop
    tables = layouts.Tables(start, position, torch.from_numpy(offset), torch.from_numpy(visible))
    ids, sampled, own = (torch.tensor(numbers, dtype=torch.long) for numbers in (ids, sampled, own))
    return Recording(ids, sampled, own, [row.length for row in rows], tables, rows_of, prefill)


def recording_of(run):
    """The Recording of a run of chapter 6, finished or not."""
    return record(run.layout, run._openings()[0], run.separators, run.passes)


# --------------------------------------------------------------------------------------------------------- one pass

def pieces_of(recording, base, size):
    """The tables in pieces of at most `size` tokens, with the rows that these see. `base`: the recording's first slot."""
    tables, total = recording.tables, len(recording.ids)
    # No piece has tokens of the prompt and of workers: the former would be turned for all the rows that the latter see.
    firsts = [*range(0, recording.prefill, size), *range(recording.prefill, total, size)]
    for first, end in zip(firsts, [*firsts[1:], total]):
        seen = tables.visible[:, first:end].any(1)
        yield layouts.Tables(base + tables.start[seen], tables.position[first:end],
                             tables.offset[seen, first:end], tables.visible[seen, first:end])


def in_pieces(q, k, v, pieces, rotation, scale, window=None, frugal=True):
    """Chapter 4's attention, one piece of the N queries after the other. As there, but `pieces` is a list of Tables.

    frugal: keep nothing of a piece but its queries; compute its scores again when its gradient is due.
    """
    def attend(queries, tables):
        return query_rotation.attention(queries, k, v, tables, rotation, scale, window)

    def attend_again(queries, tables):  # with a copy of the tables, so that what is derived from them is not kept either
        return checkpoint(lambda some: attend(some, replace(tables)), queries, use_reentrant=False, preserve_rng_state=False)

    queries = q.split([len(tables.position) for tables in pieces], 1)
    return torch.cat([*map(attend_again if frugal else attend, queries, pieces)], 1)


def encode(model, ropes, recordings, size=256, frugal=True):
    """Encode whole runs in one forward pass, as if each token had been fed when it was.

    Args:
        model: attached to the shared cache; ropes: what query_rotation.attach returned.
        recordings: a list of Recordings, the batch.
        size: so many queries attend at a time; frugal: see `in_pieces`. Both change memory and time alone.
    Returns:
        (logits [M, vocabulary] of the M tokens from which one was sampled, in their order;
        a SharedCache with keys and values of all tokens: those of a recording behind those of the one before)
    Raises:
        ValueError: there are no tokens, or pieces of no size.
    """
    query_rotation.check_attached(model)
    if not sum(len(recording.ids) for recording in recordings) or size < 1:
        raise ValueError(f"there is nothing to encode in {len(recordings)} recordings with pieces of {size} tokens")
    bases = [0, *accumulate(len(recording.ids) for recording in recordings)]
    cache = shared_cache.SharedCache([bases[-1]], ropes)
    cache.new_slots = torch.cat([base + recording.tables.start[recording.own] + recording.tables.position
                                 for base, recording in zip(bases, recordings)])
    pieces = [piece for base, recording in zip(bases, recordings) for piece in pieces_of(recording, base, size)]
    ids = torch.cat([recording.ids for recording in recordings]).to(model.device)
    position = torch.cat([recording.tables.position for recording in recordings]).to(model.device)
    keep = torch.cat([recording.sampled != NOTHING for recording in recordings]).nonzero()[:, 0].to(model.device)
    output = model(ids[None], position_ids=position[None], past_key_values=cache, use_cache=True, logits_to_keep=keep,
                   hogwild=(cache, pieces, partial(in_pieces, frugal=frugal)))
    return output.logits[0], cache


def loss(model, ropes, recordings, **options):
    """Mean cross-entropy (nats) of the workers' own tokens, given what each of them saw when it chose. A scalar tensor.

    Raises:
        ValueError: no token was sampled in these recordings.
    """
    logits, _ = encode(model, ropes, recordings, **options)
    sampled = torch.cat([recording.sampled for recording in recordings])
    sampled = sampled[sampled != NOTHING]
    if not len(sampled):
        raise ValueError("nothing was sampled in these recordings, so there is nothing to learn from them")
    return F.cross_entropy(logits.float(), sampled.to(logits.device))


# ---------------------------------------------------------------------------------------------------------- restore

def restore(run, passes):
    """Bring a run that has not advanced yet to where another one stopped, given that one's `passes`.

    The loop is made to write the same tokens again without the model, so that everything besides the cache (steps, pending
    tokens, checks, random numbers) becomes what it was. Then one pass fills the cache. For runs whose steps *move* to the
    history: chapter 7's ablation that encodes them anew is not restored that way.
    Raises:
        ValueError: a pass does not follow from those before it, so it was made by another model, or with other settings.
            The run is of no use then.
    """
    if run.passes:
        raise ValueError(f"this run has advanced by {len(run.passes)} passes already; restore a fresh one")
    if len(passes) > run.settings.max_passes:
        raise ValueError(f"{len(passes)} passes are more than the {run.settings.max_passes} of this run's max_passes")
    vocabulary, sample = run.model.get_output_embeddings().weight.shape[0], run.sample

    def feed(writers):
        run.cache.append({run.layout.blocks[view[-1]]: len(ids) for view, ids in writers})
        return torch.zeros(len(writers), vocabulary)

    def repeat(past, logits, writing):
        if ({w.index: w.pending for w in writing} != past["fed"] or past["sampled"].keys() != past["fed"].keys()
                or max(past["sampled"].values()) >= vocabulary):
            raise ValueError(f"pass {len(run.passes) + 1} of the trace does not follow from those before it: it was made by "
                             "another model, or with other settings")
        sample(logits, writing)  # how many random numbers that takes does not depend on the logits; what it picks is not used
        return [*past["sampled"].values()]

    try:
        run._feed = feed
        for past in passes:
            run.sample = partial(repeat, past)
            run.advance()["seconds"] = past["seconds"]
    finally:  # the methods of its class are in place again
        vars(run).pop("_feed"), vars(run).pop("sample", None)
    recording = recording_of(run)
    recording.sampled.fill_(NOTHING)  # no logits are needed
    with torch.no_grad():
        _, cache = encode(run.model, run.cache.ropes, [recording])
    for row, b in enumerate(run.layout.blocks):
        block, index = run.cache.blocks[b], 0  # index in the block at which the next of its steps begins
        for step in recording.rows_of[row]:
            first, length = int(recording.tables.start[step]), recording.lengths[step]
            here, there = slice(first, first + length), slice(block.start + index, block.start + index + length)
            for layer, keys in cache.keys.items():
                run.cache.keys[layer][:, there] = rope.shift(keys[:, here], index, run.cache.ropes[layer])
                run.cache.values[layer][:, there] = cache.values[layer][:, here]
            index += length
        assert index == block.length, "the recording and the run disagree about a block"


# ---------------------------------------------------------------------------------------------------- what one can see

def unfold(recording):
    """The tables as what they stand for: for each row, [N, its length] distances from token to key, as the token saw them.

    -1 where the token did not see the key. So `>= 0` is the mask of appendix B (4D there: for a batch of runs and for all
    heads), and the numbers are its position differences. The dots stand there once for each of their rows.
    """
    tables, parts = recording.tables, []
    for row, length in enumerate(recording.lengths):
        j = torch.arange(length)
        distance = (tables.position + tables.offset[row])[:, None] - j
        parts.append(distance.masked_fill(j >= tables.visible[row][:, None], -1))
    return parts


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
    margin, colours = 2 + max(map(len, names)), {"p": "white", "|": "yellow", "A": "cyan", "B": "magenta"}
    title = " ".join(name[:length].ljust(length) for name, length in zip(names, recording.lengths))
    console.print(" " * margin + title, style="bold")
    for own, *line in zip(recording.own.tolist(), *(part.tolist() for part in unfold(recording))):
        text = Text(names[own].ljust(margin))
        for name, distances in zip(names, line):
            for away in distances:
                text.append(*("·", "dim") if away < 0 else (SHADES[min(away // 8, 3)], colours[name[0]]))
            text.append(" ")
        console.print(text)


def saved_bytes(function):
    """How many bytes autograd keeps for the gradient of function()."""
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def replay_real_model(console):
    """A run of SmolLM2 against the same run in one pass, and one that is restored half way. Returns the largest error."""
    generate = import_module("06_generate")
    model, tokenizer = shared_cache.load_model()
    prompt = "{names} add up, step by step.\n\n{problem}"
    settings = generate.Settings(max_passes=80, max_step=64, seed=1, check_every=64, prompt=prompt)
    run, live = generate.Hogwild(model, tokenizer, generate.PROBLEM, settings), []
    feed = run._feed
    run._feed = lambda writers: live.append(feed(writers)) or live[-1].clone()  # (sampling writes into its logits)
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
    console.print("-> in proportion to the tokens; the scores, nearly to their square. The tables: 16 bytes x tokens x rows")
    assert 0 < kept[-1][0] < 5 * kept[0][0]


def main():
    """Show the tables, check them on the real model, measure the memory."""
    console = Console(highlight=False)
    torch.set_num_threads(1)
    console.print("What each token saw, and how far away. Alice and Bob, combined layout, steps of 6 to 10 tokens.\n"
                  "█ 0-7 tokens away, ▓ 8-15, ▒ 16-23, ░ further, · not visible.\n", soft_wrap=True)
    names = ["prompt", "Alice 1", "Bob 1", "| others", "| own", "| <...>", "Alice 2", "Bob 2"]
    draw(console, rehearse("combined", [[7, 9], [10, 6]], 11), names)
    console.print("-> A step opens with three tokens at once, and the other worker sees them in the same pass.\n"
                  "-> While Alice writes her first step, Bob sees it near by, in progress. Then it moves to the history: from\n"
                  "   one line of Bob 1 to the next it is further away. Its keys are the same ones.\n", soft_wrap=True)
    error = replay_real_model(console)
    measure_memory(console)
    console.print(f"[OK] one pass gives the logits of many (to {error:.0e}), and a restored run goes on where it was")


# Exercises
# 1. Take `rows_of` out of `record` and let the history be one row, as it is live. Which tokens go wrong, and why?
# 2. Train SmolLM2 on one run that you like (a learning rate of 1e-5, ten steps), and look at how the next run begins.
# 3. The frugal attention computes each piece twice. What would it take to keep the sums of the softmax instead?

if __name__ == "__main__":
    main()
