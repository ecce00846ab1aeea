r"""Appendix: the idea in three drawings, made from chapter 3's own tables, so that they stay true.

    one_memory      one memory, read in two orders: no block is stored twice
    turned_query    one query, turned once per block: no cached key is touched
    moving_step     a finished step moves to the end of the history: its keys turn, all by one angle

    python appendix/drawings.py FOLDER        writes three SVG files; the README's: appendix/drawings
"""
import sys
from importlib import import_module
from math import cos, sin
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import command, journal  # noqa: E402

shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")

COLOURS = {"history": "#c9ced6", "Alice": "#f4b183", "Bob": "#9dc3e6"}
WORDS = {"history": "Add up 3 + 4 + 5 + 6 .", "Alice": "3 + 4 is", "Bob": "I take 5"}
DARK = "#222222"
ANGLE = 0.16  # radians per token, of the pair of dimensions that is drawn


def example():
    """(blocks, names in the order of views by worker, offset(name, worker)): Alice and Bob have just
    written a token each."""
    cache = shared_cache.SharedCache(ropes=[])
    blocks = {name: cache.block(len(words.split()) + 2) for name, words in WORDS.items()}
    cache.reserve([(block, len(WORDS[name].split())) for name, block in blocks.items()])
    history, alice, bob = blocks.values()
    see = layouts.LAYOUTS["contiguous"].view
    views = {"Alice": see(history, alice, [bob], {}), "Bob": see(history, bob, [alice], {})}
    rows = {}  # as fill_tables numbers them
    tables = layouts.fill_tables([(view, 1) for view in views.values()], rows)
    names = {block: name for name, block in blocks.items()}

    def offset(name, worker):
        """The offset of a block for a worker's newest token."""
        return int(tables.offset[rows[blocks[name], 0], [*views].index(worker)])
    return blocks, {worker: [names[block] for block in view] for worker, view in views.items()}, offset


def canvas(width, height, across, down):
    """(figure, axes without a frame, `across` x `down` units)."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, across), ylim=(down, 0))
    axes.axis("off")
    return figure, axes


def strip(axes, x, y, name, indices=None, words=None):
    """Draw a block: a cell per token, with its word, and below it a number. Returns where it ends."""
    words = (WORDS[name] if words is None else words).split()
    for k, word in enumerate(words):
        axes.add_patch(Rectangle((x + k, y), 1, 1, facecolor=COLOURS[name], edgecolor="white", lw=1.5))
        axes.text(x + k + 0.5, y + 0.5, word, ha="center", va="center", size=9, color=DARK)
        number = k if indices is None else indices[k]
        axes.text(x + k + 0.5, y + 1.28, str(number), ha="center", va="center", size=7, color="#666666")
    return x + len(words)


def say(axes, x, y, text, size=10, **others):
    """Write a line."""
    axes.text(x, y, text, size=size, va="center", color=DARK, **others)


def one_memory():
    """The blocks as they are stored, and as each worker reads them."""
    blocks, views, offset = example()
    figure, axes = canvas(9.6, 4.2, 27, 11.8)
    middle, x = {}, 5.0  # of each block in the memory
    say(axes, 0.2, 1.4, "the memory:\neach block once")
    for name in blocks:
        end = strip(axes, x, 0.9, name)
        say(axes, x, 0.45, name, 9, weight="bold")
        middle[name], x = (x + end) / 2, end + 1.5
    for n, (worker, view) in enumerate(views.items()):
        y, x = 5.0 + 3.9 * n, 5.0
        say(axes, 0.2, y + 0.5, f"what {worker} reads")
        for name in view:
            end = strip(axes, x, y, name, range(int(x) - 5, int(x) - 5 + blocks[name].length))
            axes.plot([middle[name], (x + end) / 2], [2.5, y - 0.05], color=COLOURS[name], lw=2,
                      zorder=0, alpha=0.9 if n == 0 else 0.45)
            say(axes, (x + end) / 2, y + 1.95, f"offset {offset(name, worker)}", 9, ha="center")
            x = end
    return figure


def turned_query():
    """Alice's query at her last token, turned for each block that she sees."""
    blocks, views, offset = example()
    figure, axes = canvas(9.6, 3.6, 27, 10.2)
    position = blocks["Alice"].length - 1  # her last token's
    for place, name in enumerate(views["Alice"]):
        more, x, y, radius = offset(name, "Alice"), 4.5 + 9 * place, 5.6, 3.0
        axes.add_patch(Arc((x, y), 2 * radius, 2 * radius, color="#dddddd"))
        for j in range(blocks[name].length):
            end = (x + radius * cos(ANGLE * j), y - radius * sin(ANGLE * j))
            axes.plot([x, end[0]], [y, end[1]], color=COLOURS[name], lw=3)
            say(axes, x + 1.1 * radius * cos(ANGLE * j), y - 1.1 * radius * sin(ANGLE * j), str(j), 7,
                ha="center")
        for angle, style in ((position, ":"), (position + more, "-")):
            tip = (x + 1.3 * radius * cos(ANGLE * angle), y - 1.3 * radius * sin(ANGLE * angle))
            axes.add_patch(FancyArrowPatch((x, y), tip, arrowstyle="-|>", mutation_scale=12, lw=1.6,
                                           linestyle=style, color=DARK, shrinkA=0, shrinkB=0,
                                           zorder=3))
        whose = "the history" if name == "history" else name
        say(axes, x, 0.7, f"keys of {whose}, as stored", weight="bold", ha="center")
        turned = f"turned by {more} more" if more else "as it is"
        say(axes, x, 9.5, f"Alice's query {position}, {turned}", 9, ha="center")
    return figure


def moving_step():
    """Bob's step, before and after it moves."""
    blocks, _, _ = example()
    history, _, bob = blocks.values()
    figure, axes = canvas(9.6, 3.4, 27, 9.6)
    start, own = 5.0, 21.0
    say(axes, 0.2, 1.5, "before")
    end = strip(axes, start, 1.0, "history")
    strip(axes, own, 1.0, "Bob")
    say(axes, 0.2, 7.0, "after")
    strip(axes, start, 6.5, "history")
    strip(axes, end, 6.5, "Bob", range(history.length, history.length + bob.length))
    axes.add_patch(Rectangle((own, 6.5), bob.length, 1, facecolor="none", edgecolor=COLOURS["Bob"],
                             linestyle="--", lw=1.5))
    say(axes, own + bob.length / 2, 7.0, "empty", 9, ha="center")
    axes.add_patch(FancyArrowPatch((own + bob.length / 2, 2.9), (end + bob.length / 2, 6.3), lw=1.6,
                                   arrowstyle="-|>", mutation_scale=12, color=DARK,
                                   connectionstyle="arc3,rad=-0.15"))
    say(axes, 12.4, 4.1, f"index j becomes {history.length} + j, so all keys turn by the same angle;\n"
                         "values do not change, and the model is not asked", 9, ha="right")
    for name, x in (("the history's block", start), ("Bob's block", own)):
        say(axes, x, 0.5, name, 9, weight="bold")
    return figure


DRAWINGS = {draw.__name__: draw for draw in (one_memory, turned_query, moving_step)}


def write(folder):
    """Write the three files. Raises ValueError if one of them is there, and is somebody else's."""
    paths = {name: Path(folder) / f"{name}.svg" for name in DRAWINGS}
    for path in paths.values():
        journal.own_picture(str(path), b"<?xml")
    with matplotlib.rc_context({"svg.hashsalt": "hogwild", "svg.fonttype": "none",
                                "font.family": "sans-serif"}):
        for name, path in paths.items():
            DRAWINGS[name]().savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    return [*paths.values()]


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser([], description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where the files are written")
    rest, = parser.read(argv)
    for path in write(rest.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
