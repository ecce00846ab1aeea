r"""Chapter 3: a layout is only an order of blocks per worker.

The problem. Who sees what, and in which order? The paper compares a shared document (contiguous), a
group chat (interleaved), a mixture of both (combined, its main layout), and workers who do not see each
other (independent).

The idea that carries this project. A *view* is the list of blocks that one worker sees, in order, its
own block last. Two tables follow from the views, with a row b per block and a column n per new token:

    offset[b, n]    place of the token's own block minus place of block b, both in its worker's view
    visible[b, n]   how many leading slots of block b the token may attend to; 0: it does not see it

So a query with index p in its own block is at distance p + offset[b, n] - j from slot j of block b. That
is all. Causality is visible = p + 1 in the own block; each worker may bring any number of new tokens,
packed into one row; there are neither masks over the memory nor padding. Workers see each other's tokens
of the very same pass, too: lengths count them already, and each layer writes all new keys first.

A drawing of views: appendix/drawings/one_memory.svg
Symbols, for four workers in the combined layout: N 4 new tokens, B 10 rows of the tables.

Left out: how attention is computed from the tables (chapter 4).    Run it: python 03_layouts.py
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

# --------------------------------------------------------------------------------------- four layouts
#
# Each function takes the history (the prompt and, where steps move, all finished steps), a worker's own
# block, the blocks of the others in order, and {name: block} of separators. It returns a worker's view,
# which ends with `own` and has it once: what the worker writes goes to the last block of its view.


def contiguous(history, own, others, words):
    """Prompt, everything that the others wrote, everything that I wrote."""
    return [history, *others, own]


def interleaved(history, own, others, words):
    """History of all finished steps, my unfinished one. Others are seen step by step, not by token."""
    return [history, own]


def combined(history, own, others, words):  # exercise
    """History, then all others' unfinished steps, each with dots behind it, then mine; with headings."""
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
    headers: bool = True  # do the workers' blocks begin with their names? Where steps move they must
    words: tuple = ()  # separators, in the order in which they are first seen

    def separators(self, workers):
        """Which separators a team of `workers` has: one who is alone needs none of the others' steps."""
        return [word for word in self.words if workers > 1 or word not in ("others", "dots")]

    def final_view(self, history, own, others, words):  # exercise
        """What the early stop reads: everything, whatever the layout hides from its workers.

        If the layout has all the separators of `combined`, that view; if not, that of `contiguous`.
        """
        known = {"others", "dots", "own"} <= {*self.words}
        return (combined if known else contiguous)(history, own, others, words)


# One more needs words in appendix/protocol.py: in VIEWS what its page looks like (unless it has no
# headers: then nobody is told of others), and in SEPARATORS the text of each of its `words`.
LAYOUTS = {
    "combined": Layout(combined, moves=True, words=("others", "dots", "own")),
    "contiguous": Layout(contiguous, moves=False),
    "interleaved": Layout(interleaved, moves=True),
    "independent": Layout(independent, moves=False, headers=False),
}

# ----------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True, eq=False)  # compared by identity
class Tables:
    """What a forward pass over N new tokens has to know about B blocks. All int64, on the CPU."""

    start: torch.Tensor  # [B] first slot of each row's block, in the memory
    position: torch.Tensor  # [N] in-block index of each new token: the position_ids of the model
    offset: torch.Tensor  # [B, N] place of the own block minus place of row b's, in the token's view
    visible: torch.Tensor  # [B, N] how many leading slots of row b's block the token sees
    writers: list | None = None  # what the tables were filled from, see fill_tables
    # What chapters 4 and 5 compute from all that, once for many layers.
    derived: dict = field(default_factory=dict, init=False, repr=False)


def occurrences(view):  # exercise
    """The blocks of a view in order, each with how often it stood there before.

    The dots of the combined layout stand in a view once per other worker, and have as many rows.
    """
    before = Counter()
    for block in view:
        yield block, before[block]
        before[block] += 1


def number_rows(views, rows):
    """Give everything that stands in `views` a row, in `rows`: {(block, how often before): row}."""
    for view in views:
        for occurrence in occurrences(view):
            rows.setdefault(occurrence, len(rows))
    return rows


def fill_tables(writers, rows=None):  # exercise
    """Fill the two tables for one forward pass (paper, section 3.4 and appendix B).

    Args:
        writers: pairs (view, count), one per block that is written in this pass: the writer's view, its
            own block last (and nowhere else in it), and its number of new tokens, which are reserved
            already. The N tokens are packed in this order.
        rows: rows that were numbered before, see number_rows; new blocks get further ones, in place.
            (An empty dict is filled in place, too.)
    Returns:
        Tables, with these `writers`.
    """
    rows = number_rows([view for view, _ in writers], {} if rows is None else rows)
    total = sum(count for _, count in writers)  # N
    position = np.zeros(total, np.int64)  # [N]; numpy: small assignments cost torch four times as much
    offset, visible = np.zeros((2, len(rows), total), np.int64)  # [B, N] each
    n = 0
    for view, count in writers:
        new, own = slice(n, n + count), view[-1]
        place = -sum(block.length for block in view[:-1])  # of each block, from where the own one begins
        for block, before in occurrences(view):
            row = rows[block, before]
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
    """Play the bookkeeping of a run without any model; yields (tables, texts) after each pass.

    texts: {block: a letter per token, by its writer, upper case if it is new in this pass}.
    """
    layout, cache = LAYOUTS[name], shared_cache.SharedCache(ropes=[])
    history, *own = (cache.block(64) for _ in range(1 + len(NAMES)))
    words = {word: cache.block(1) for word in layout.separators(len(NAMES))}
    texts = {history: "p" * PROMPT, **dict.fromkeys(own, ""), **dict.fromkeys(words.values(), "|")}
    cache.reserve([(block, len(text)) for block, text in texts.items()])
    pending = [HEADER] * len(NAMES)  # tokens that each worker feeds in the coming pass
    for _ in range(passes):
        cache.reserve(list(zip(own, pending)))
        for block, count, letter in zip(own, pending, "ABC"):
            texts[block] = texts[block].lower() + letter * count
        views = [layout.view(history, block, [b for b in own if b is not block], words) for block in own]
        # The own block last, and once: chapter 6 refuses other views.
        assert all(view.index(block) == len(view) - 1 for view, block in zip(views, own)), views
        yield fill_tables(list(zip(views, pending))), texts
        for w, block in enumerate(own):
            finished = layout.moves and block.length >= HEADER + STEPS[w]
            pending[w] = HEADER if finished else 1
            if finished:  # (chapter 6 keeps the token that ended the step for the next block)
                cache.move(block, history)
                texts[history], texts[block] = texts[history] + texts[block].lower(), ""


def distances_in_view(view, texts, back=0):
    """(slot, distance) of all that a worker's newest token sees (or that `back` tokens before it),
    counted along its text, sorted."""
    slots = [block.start + j for block in view for j in range(len(texts[block]))]
    slots = slots[:len(slots) - back]
    return sorted((slot, len(slots) - 1 - i) for i, slot in enumerate(slots))


def distances_in_tables(tables, n):
    """The same from the two tables, for token n."""
    return sorted((int(tables.start[b]) + j, int(tables.position[n] + tables.offset[b, n]) - j)
                  for b in range(len(tables.start)) for j in range(tables.visible[b, n]))


def main():
    """Show who sees what, and check the tables against it."""
    console, checked = Console(width=105, highlight=False), 0
    print("One line per worker: the memory as that worker sees it. A letter is a token: p of the\n"
          "prompt, a b c by its writer, upper case if it is new in this pass; | is a separator.\n")
    for name, layout in LAYOUTS.items():
        print(f"{name}: {layout.view.__doc__}")
        for now, (tables, texts) in enumerate(play(name, passes=9), start=1):
            last = -1  # of each writer's tokens
            for who, (view, count) in zip(NAMES, tables.writers):
                if now in (1, 2, 6, 7, 9):
                    label = f"pass {now}" if who == NAMES[0] else ""
                    letters = "".join(texts[block] for block in view)
                    strip = [(letter, COLOURS[letter.lower()]) for letter in letters]
                    console.print(Text.assemble(f"  {label:8}{who:6}", *strip))
                last += count
                for back in range(count):
                    distances = distances_in_view(view, texts, back)
                    assert distances == distances_in_tables(tables, last - back)
                    checked += len(distances)
        print()
    *_, (tables, _) = play("combined", passes=9)
    print("The two tables of the last pass of 'combined': a row per block, a column per new token, "
          "offset/visible")
    for_alice = ["history", "(others)", "Bob", "<...>", "Carol", "<...>", "(own)", "Alice"]
    for name, *row in zip(for_alice, tables.offset.tolist(), tables.visible.tolist()):
        print(f"  {name:9}", *(f"{offset:>4}/{visible:<3}" for offset, visible in zip(*row)))
    print("  -> 0/p+1 in the own block, the full length of all others in view, visible 0 elsewhere\n\n"
          f"[OK] tables and strips agree on all {checked} distances\n\n"
          "Next: chapter 4 computes attention from these tables, and reads each key once for everybody.")


# To rebuild this file and be checked: make exercise CHAPTER=3 DIR=mine. Questions, which
# `python appendix/solutions.py 3.1` and so on answer by measuring:
# 1. Add a layout in which everybody sees only the left neighbour's unfinished step. What changes?
# 2. In `combined`, who moves first if two workers finish in the same pass? Do others notice?
# 3. How many integers do the tables hold for W workers who write one token each? And a mask?

if __name__ == "__main__":
    main()
