r"""Chapter 3: a layout is only an order of blocks per worker.

The problem. Who sees what, and in which order? The paper compares a shared document (contiguous), a group chat
(interleaved), a mixture of both (combined, its main layout), and workers that do not see each other at all.

The idea that carries this project: a layout is, for each worker, a list of blocks; and a forward pass over N new tokens
needs two integer tables, besides where each block is kept and which index each new token has in its own. For row b (a
block; a block that stands twice in a view has two rows) and column n (a new token):

    offset[b, n]    place of the token's own block minus place of block b, both in the view of that token's worker
    visible[b, n]   how many leading slots of block b the token may attend to (0: it does not see the block)

A query that stands at index p of its own block is at distance p + offset[b, n] - j from slot j of block b. So everything
is in the tables: causality (visible = p + 1 in the own block); ragged input (any number of new tokens per worker, packed
into one row); and synchronisation. Workers see each other's tokens of the *same* pass: the lengths already count them,
and each layer writes the keys of all N tokens before it attends. Where workers shall not see that, the block is not in
their view.

    layout        contiguous, interleaved, combined, independent (paper, appendix A), for any number of workers
    fill_tables   orders of blocks -> the two tables

What to notice: no mask over the memory, no padding; two workers may well pass the same position to the model, since a
position is an index in a block, and only the offsets say where that block stands.
Left out: how attention is computed from the tables (chapter 4).

Run it: python 03_layouts.py
"""
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

shared_cache = import_module("02_shared_cache")

HISTORY = 0  # block and row of the prompt and, where steps move, of all finished steps


@dataclass(frozen=True)
class Layout:
    """Who sees which blocks in which order.

    Block 0 is the history, blocks 1 ... W belong to the workers; the combined layout has three more, with the words
    that stand between them. `blocks[row]` names the block of a row of the tables: usually row = block, but a block that
    stands several times in a view needs as many rows.
    """

    name: str
    blocks: list  # [B] block of each row
    views: list  # per worker: its rows in view order, its own block last
    final_view: list  # rows in the order in which the early stop reads them: everything, last worker last
    separator_views: dict  # separator -> the view in which it is encoded, once, before anybody writes; it comes last
    moves: bool  # does a finished step move to the end of the history?
    headers: bool = True  # do the workers' blocks begin with their names?


def layout(name, workers):
    """Build one of the four layouts (paper, section 3.2 and appendix A) for `workers` workers.

    Raises:
        ValueError: the name is not one of LAYOUTS, or there is no worker.
    """
    if workers < 1:
        raise ValueError(f"a layout of {workers} workers was asked for; at least 1 is needed")
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is not known; choose one of {', '.join(LAYOUTS)}")
    views = [LAYOUTS[name](worker, workers) for worker in range(workers)]
    if name == "combined":
        others, own, dots = workers + 1, workers + 2, workers + 3  # three separators; the last one W - 1 times in a view
        blocks = [*range(own + 1), *[dots] * (workers - 1)]
        separator_views = {"others": [HISTORY, others], "dots": [HISTORY, others, dots], "own": [HISTORY, others, dots, own]}
        if workers == 1:  # there are no others
            separator_views = {"own": [HISTORY, own]}
        return Layout(name, blocks, views, views[-1], separator_views, moves=True)
    everything = contiguous(workers - 1, workers)
    return Layout(name, [*range(workers + 1)], views, everything, {}, moves=name == "interleaved",
                  headers=name != "independent")


def contiguous(worker, workers):
    """Prompt, everything that the others wrote, everything that I wrote."""
    return [HISTORY, *[1 + w for w in range(workers) if w != worker], 1 + worker]


def interleaved(worker, workers):
    """History of all finished steps, my unfinished one. Others are seen step by step, never token by token."""
    return [HISTORY, 1 + worker]


def combined(worker, workers):
    """History, then every other worker's unfinished step, closed by dots, then mine; with separators in between."""
    others, own, dots = workers + 1, workers + 2, workers + 3  # rows; row dots + k is the k-th copy of the dots
    in_progress = [1 + w for w in range(workers) if w != worker]
    closed = [row for k, step in enumerate(in_progress) for row in (step, dots + k)]
    return [HISTORY, *([others, *closed] if closed else []), own, 1 + worker]


def independent(worker, workers):
    """Prompt, my own text. Nobody sees anybody; the view is that of `interleaved`, but nothing ever moves to the history."""
    return [HISTORY, 1 + worker]


LAYOUTS = {"combined": combined, "contiguous": contiguous, "interleaved": interleaved, "independent": independent}


@dataclass(frozen=True, eq=False)  # compared by identity
class Tables:
    """What one forward pass over N new tokens has to know about B rows of blocks. All int64, on the CPU."""

    start: torch.Tensor  # [B] first slot of each row's block, in the memory
    position: torch.Tensor  # [N] in-block index of each new token: the position_ids of the model
    offset: torch.Tensor  # [B, N] place of the own block minus place of row b's block, in the token's view
    visible: torch.Tensor  # [B, N] how many leading slots of block b the token sees
    derived: dict = field(default_factory=dict, init=False, repr=False)  # what chapter 4 makes of them, for all layers alike


def fill_tables(rows, writers):
    """Fill the two tables for one forward pass (paper, section 3.4 and appendix B).

    Args:
        rows: the Block of each row, a list of B. Their lengths already include the new tokens (chapter 2's `append`).
        writers: pairs (view, count), one per block that is written in this pass: the writer's rows in view order, its
            own block last, and how many new tokens it has. The packed row of N tokens follows this order. A row stands
            at most once in a view, and the own block in no other row of it.
    """
    total = sum(count for _, count in writers)  # N; numpy, because small assignments cost it a quarter of torch's time
    position = np.zeros(total, np.int64)  # [N]
    offset, visible = np.zeros((2, len(rows), total), np.int64)  # [B, N] each
    n = 0
    for view, count in writers:
        new, own = slice(n, n + count), view[-1]
        own_place, place = sum(rows[row].length for row in view[:-1]), 0  # in this view
        for row in view:
            offset[row, new] = own_place - place
            visible[row, new] = rows[row].length  # the writer sees all that is there, tokens of this pass included ...
            place += rows[row].length
        position[new] = np.arange(rows[own].length - count, rows[own].length)
        visible[own, new] = position[new] + 1  # ... except its own future
        n += count
    starts = torch.tensor([row.start for row in rows])
    return Tables(starts, *(torch.from_numpy(table) for table in (position, offset, visible)))


# ---------------------------------------------------------------------------------------------------- what one can see

NAMES = ["Alice", "Bob", "Carol"]
COLOURS = {"a": "black on cyan", "b": "black on magenta", "c": "black on green", "p": "black on white", "|": "yellow"}
PROMPT, HEADER, STEPS = 6, 3, [5, 9, 6]  # tokens of the toy: the prompt, the header of a step, the steps of each worker


def play(name, passes):
    """Play the bookkeeping of a run without any model; yields (layout, rows, writers, tables, slots) after each pass.

    `slots[s]` is what the strips show of slot s: who wrote it (a letter), and in which pass.
    """
    plan = layout(name, len(NAMES))
    cache = shared_cache.SharedCache([64] * (1 + max(plan.blocks)), ropes=[])
    rows, slots = [cache.blocks[b] for b in plan.blocks], {}

    def write(block, count, writer, when):
        cache.append({block: count})
        slots.update({int(s): (writer, when) for s in cache.new_slots})

    write(HISTORY, PROMPT, "p", 0)
    for view in plan.separator_views.values():
        write(plan.blocks[view[-1]], 1, "|", 0)
    pending = [HEADER] * len(NAMES)  # tokens that each worker feeds in the coming pass
    for now in range(1, passes + 1):
        for worker, count in enumerate(pending):
            write(1 + worker, count, "abc"[worker], now)
        writers = [(view, count) for view, count in zip(plan.views, pending)]
        yield plan, rows, writers, fill_tables(rows, writers), slots
        for worker in range(len(NAMES)):
            own, history = cache.blocks[1 + worker], cache.blocks[HISTORY]
            finished = plan.moves and own.length >= HEADER + STEPS[worker]
            pending[worker] = HEADER if finished else 1
            if finished:  # (chapter 6 keeps the token that ended the step for the next block; this toy does not)
                for j in range(own.length):
                    slots[history.start + history.length + j] = slots[own.start + j]
                cache.move(1 + worker, HISTORY)


def strip(view, rows, slots, now):
    """One worker's view of the memory: a coloured letter per token, upper case if it is new in this pass."""
    text = Text()
    for row in view:
        for j in range(rows[row].length):
            writer, when = slots[rows[row].start + j]
            text.append(writer.upper() if when == now else writer, style=COLOURS[writer])
    return text


def distances_in_view(view, rows):
    """Distance of the newest token to each slot, counted along the strip: {(row, j): distance}."""
    cells = [(row, j) for row in view for j in range(rows[row].length)]
    return {cell: len(cells) - 1 - i for i, cell in enumerate(cells)}


def distances_in_tables(tables, n):
    """The same from the two tables."""
    return {(b, j): int(tables.position[n] + tables.offset[b, n]) - j
            for b in range(len(tables.start)) for j in range(int(tables.visible[b, n]))}


def main():
    console = Console(width=110, highlight=False)
    console.print("One line per worker: the memory as that worker sees it. A letter is a token: p of the prompt, a b c by "
                  "its\nwriter, upper case if it is new in this pass; | is a separator.\n")
    checked = 0
    for name in LAYOUTS:
        console.print(Text.assemble((name, "bold"), f": {LAYOUTS[name].__doc__}"), soft_wrap=True)
        for now, (plan, rows, writers, tables, slots) in enumerate(play(name, passes=9), start=1):
            last_tokens = np.cumsum([count for _, count in writers]) - 1
            for worker, (view, n) in enumerate(zip(plan.views, last_tokens)):
                if now in (1, 2, 6, 7, 9):
                    label = f"  pass {now}  " if worker == 0 else "          "
                    console.print(Text(label + f"{NAMES[worker]:6}").append_text(strip(view, rows, slots, now)))
                assert distances_in_view(view, rows) == distances_in_tables(tables, n)
                checked += len(distances_in_view(view, rows))
        console.print()
    name = "combined"
    _, _, _, tables, _ = [*play(name, passes=9)][-1]
    words = ["history", *NAMES, "(others)", "(own)", *["<...>"] * 2]
    console.print(f"The two tables of the last pass of {name!r}: a row per block, a column per new token, offset/visible")
    for b, word in enumerate(words):
        cells = "".join(f"{int(o):>5}/{int(v):<3}" for o, v in zip(tables.offset[b], tables.visible[b]))
        console.print(f"  {word:9} {cells}")
    console.print("  -> 0/p+1 in the own block, the full length of every other block in view, visible 0 elsewhere\n")
    console.print(f"[OK] tables and strips agree on all {checked} distances", markup=False)
    console.print("\nNext: chapter 4 computes attention from these tables, and touches every cached key once for everybody.")


# Exercises
# 1. Add a layout in which every worker sees only its left neighbour's unfinished step. Which lines change?
# 2. In `combined`, who moves first when two workers finish a step in the same pass? Does the order matter to the others?
# 3. How many integers do the tables hold for W workers that write one token each? Compare with a mask.

if __name__ == "__main__":
    main()
