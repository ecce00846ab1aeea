r"""Chapter 3: a layout is only an order of blocks per worker.

The problem. Who sees what, and in which order? The paper compares a shared document (contiguous), a group
chat (interleaved), a mixture of both (combined, its main layout), and workers who do not see each other.

The idea that carries this project. A *view* is the list of blocks that one worker sees, in order, its own
block last. A forward pass over N new tokens then needs two integer tables. For row b (a block) and column n
(a new token):

    offset[b, n]    place of the token's own block minus place of block b, both in its worker's view
    visible[b, n]   how many leading slots of block b the token may attend to (0: it does not see the block)

A query with index p in its own block is at distance p + offset[b, n] - j from slot j of block b. All else
follows: causality is visible = p + 1 in the own block; input may be ragged, any number of new tokens per
worker packed into one row; and there are neither masks over the memory nor padding.

Synchronisation is in the tables, too. Workers see each other's tokens of the very same pass, because lengths
count them already, and each layer writes the keys of all N tokens before it attends. Where workers must not
see that, the block is not in their view.

    LAYOUTS       four functions from blocks to a view (paper, section 3.2 and appendix A), any number of workers
    fill_tables   views -> the two tables

Left out: how attention is computed from the tables (chapter 4).      Run it: python 03_layouts.py
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

shared_cache = import_module("02_shared_cache")

# ------------------------------------------------------------------------------------------ four layouts
#
# Each function takes the history (the prompt and, where steps move, all finished steps), a worker's own block,
# the blocks of the others in order, and {name: block} of separators. It returns the worker's view.


def contiguous(history, own, others, words):
    """Prompt, everything that the others wrote, everything that I wrote."""
    return [history, *others, own]


def interleaved(history, own, others, words):
    """History of all finished steps, my unfinished one. Others are seen step by step, never token by token."""
    return [history, own]


def combined(history, own, others, words):
    """History, then every other worker's unfinished step, closed by dots, then mine; separators in between."""
    closed = [block for step in others for block in (step, words["dots"])]
    return [history, *([words["others"], *closed] if closed else []), words["own"], own]


def independent(history, own, others, words):
    """Prompt, my own text. Nobody sees anybody. The view of `interleaved`, but nothing ever moves."""
    return [history, own]


@dataclass(frozen=True)
class Layout:
    """Who sees which blocks in which order, and three facts that go with it."""

    view: Callable  # one of the functions above
    moves: bool  # does a finished step move to the end of the history?
    headers: bool = True  # do the workers' blocks begin with their names?
    words: tuple = ()  # separators, in the order in which they are first seen

    def separators(self, workers):
        """Which separators a team of `workers` has: one who is alone sees no others."""
        return self.words if workers > 1 else self.words[-1:]

    def final_view(self, history, own, others, words):
        """What the early stop reads: everything, whatever the layout hides from its workers."""
        return (combined if self.words else contiguous)(history, own, others, words)


LAYOUTS = {
    "combined": Layout(combined, moves=True, words=("others", "dots", "own")),
    "contiguous": Layout(contiguous, moves=False),
    "interleaved": Layout(interleaved, moves=True),
    "independent": Layout(independent, moves=False, headers=False),
}

# -------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True, eq=False)  # compared by identity
class Tables:
    """What a forward pass over N new tokens has to know about B rows of blocks. All int64, on the CPU."""

    start: torch.Tensor  # [B] first slot of each row's block, in the memory
    position: torch.Tensor  # [N] in-block index of each new token: the position_ids of the model
    offset: torch.Tensor  # [B, N] place of the own block minus place of row b's block, in the token's view
    visible: torch.Tensor  # [B, N] how many leading slots of block b the token sees
    writers: list | None = None  # what the tables were filled from, see fill_tables
    derived: dict = field(default_factory=dict, init=False, repr=False)  # chapter 4's, shared by all layers


def number_rows(views, rows):
    """Give every block in `views` a row, in `rows`: {(block, how often it stood in this view before): row}.

    So the dots of the combined layout, which stand in a view once per other worker, have that many rows.
    """
    for view in views:
        before = Counter()
        for block in view:
            rows.setdefault((block, before[block]), len(rows))
            before[block] += 1
    return rows


def fill_tables(writers, rows=None):
    """Fill the two tables for one forward pass (paper, section 3.4 and appendix B).

    Args:
        writers: pairs (view, count), one per block that is written in this pass: the writer's view, its own
            block last (and nowhere else in it), and its number of new tokens, for which room has been
            reserved. The packed row of N tokens follows this order.
        rows: rows that were numbered before, see number_rows; new blocks get further ones. None: no rows.
    """
    rows = number_rows([view for view, _ in writers], {} if rows is None else rows)
    total = sum(count for _, count in writers)  # N
    position = np.zeros(total, np.int64)  # [N]; numpy: small assignments cost torch four times as much
    offset, visible = np.zeros((2, len(rows), total), np.int64)  # [B, N] each
    n = 0
    for view, count in writers:
        new, own, before = slice(n, n + count), view[-1], Counter()
        place = -sum(block.length for block in view[:-1])  # of each block in this view, from the own one
        for block in view:
            row = rows[block, before[block]]
            before[block] += 1
            offset[row, new] = -place
            visible[row, new] = block.length  # all that is there, tokens of this very pass included ...
            place += block.length
        position[new] = np.arange(own.length - count, own.length)
        visible[row, new] = position[new] + 1  # ... except, in the own block, one's own future
        n += count
    start = torch.tensor([block.start for block, _ in rows])
    return Tables(start, *(torch.from_numpy(table) for table in (position, offset, visible)), writers)


# ------------------------------------------------------------------------------------- what one can see

NAMES = ["Alice", "Bob", "Carol"]
COLOURS = {"a": "black on cyan", "b": "black on magenta", "c": "black on green", "p": "black on white",
           "|": "yellow"}
PROMPT, HEADER, STEPS = 6, 3, [5, 9, 6]  # tokens: the prompt, a step's header, the steps of each worker


def play(name, passes):
    """Play the bookkeeping of a run without any model; yields (views, writers, tables, slots) after each pass.

    `slots[s]` is what the strips show of slot s: who wrote it (a letter), and in which pass.
    """
    layout, cache, slots = LAYOUTS[name], shared_cache.SharedCache(ropes=[]), {}
    history, *own = (cache.block(64) for _ in range(1 + len(NAMES)))
    words = {word: cache.block(1) for word in layout.separators(len(NAMES))}

    def write(block, count, writer, now):
        cache.reserve([(block, count)])
        slots.update({int(s): (writer, now) for s in cache.new_slots})

    write(history, PROMPT, "p", 0)
    for word in words.values():
        write(word, 1, "|", 0)
    pending = [HEADER] * len(NAMES)  # tokens that each worker feeds in the coming pass
    for now in range(1, passes + 1):
        for block, count, letter in zip(own, pending, "abc"):
            write(block, count, letter, now)
        views = [layout.view(history, block, [b for b in own if b is not block], words) for block in own]
        writers = list(zip(views, pending))
        yield views, writers, fill_tables(writers), slots
        for w, block in enumerate(own):
            finished = layout.moves and block.length >= HEADER + STEPS[w]
            pending[w] = HEADER if finished else 1
            if finished:  # (chapter 6 keeps the token that ended the step for the next block; this toy does not)
                for j in range(block.length):
                    slots[history.start + history.length + j] = slots[block.start + j]
                cache.move(block, history)


def strip(view, slots, now):
    """One worker's view of the memory: a coloured letter per token, upper case if it is new in this pass."""
    text = Text()
    for block in view:
        for slot in range(block.start, block.start + block.length):
            writer, when = slots[slot]
            text.append(writer.upper() if when == now else writer, style=COLOURS[writer])
    return text


def distances_in_view(view):
    """Distance of the newest token to each slot that it sees, counted along the strip, in order of slots."""
    slots = [slot for block in view for slot in range(block.start, block.start + block.length)]
    return sorted((slot, len(slots) - 1 - i) for i, slot in enumerate(slots))


def distances_in_tables(tables, n):
    """The same from the two tables."""
    return sorted((int(tables.start[b]) + j, int(tables.position[n] + tables.offset[b, n]) - j)
                  for b in range(len(tables.start)) for j in range(int(tables.visible[b, n])))


def main():
    """Show who sees what, and check the tables against the strips."""
    console = Console(width=105, highlight=False)
    console.print("One line per worker: the memory as that worker sees it. A letter is a token: p of the prompt, "
                  "a b c\nby its writer, upper case if it is new in this pass; | is a separator.\n")
    checked = 0
    for name, layout in LAYOUTS.items():
        console.print(Text.assemble((name, "bold"), f": {layout.view.__doc__}"), soft_wrap=True)
        for now, (views, writers, tables, slots) in enumerate(play(name, passes=9), start=1):
            last_tokens = np.cumsum([count for _, count in writers]) - 1
            for w, (view, n) in enumerate(zip(views, last_tokens)):
                if now in (1, 2, 6, 7, 9):
                    label = f"  pass {now}  " if w == 0 else "          "
                    console.print(Text(label + f"{NAMES[w]:6}").append_text(strip(view, slots, now)))
                assert distances_in_view(view) == distances_in_tables(tables, n)
                checked += len(distances_in_view(view))
        console.print()
    _, _, tables, _ = [*play("combined", passes=9)][-1]
    names = ["history", "(others)", "Bob", "<...>", "Carol", "<...>", "(own)", "Alice"]  # as Alice sees them
    console.print("The two tables of the last pass of 'combined': a row per block, a column per new token, "
                  "offset/visible")
    for b, name in enumerate(names):
        cells = "".join(f"{int(o):>5}/{int(v):<3}" for o, v in zip(tables.offset[b], tables.visible[b]))
        console.print(f"  {name:9} {cells}")
    console.print("  -> 0/p+1 in the own block, the full length of all others in view, visible 0 elsewhere\n")
    console.print(f"[OK] tables and strips agree on all {checked} distances", markup=False)
    console.print("\nNext: chapter 4 computes attention from these tables, and reads every key once for everybody.")


# Exercises
# 1. Add a layout in which every worker sees only its left neighbour's unfinished step. Which lines change?
# 2. In `combined`, who moves first when two workers finish a step in the same pass? Do the others notice?
# 3. How many integers do the tables hold for W workers who write one token each? Compare with a mask.

if __name__ == "__main__":
    main()
