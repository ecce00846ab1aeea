r"""Appendix: does a step that was moved still fit? Layer by layer, a measurement.

A finished step moves to the end of the history, and its keys and values stay as they were when its
author wrote it: in another context, at another place. Rotation mends the place. The context it cannot
mend: below the first attention, keys depend on the token alone, but above it on all that the author saw.
Would it not work for the first layer only?

So every step that a team finishes is compared with itself, encoded anew at the end of the history (as
the method `re-encode` of chapter 7 does), and, to have something to compare with, encoded where nothing
else is in view. The relative difference of keys and of values, per layer:

    python appendix/moved_steps.py                      the collaborator, on problems it has not seen
    python appendix/moved_steps.py --problems 4 --passes 200 --png moved.png --model Qwen/Qwen3-8B
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import adapters, command, engine, journal, models, puzzles  # noqa: E402
from appendix.command import option  # noqa: E402

generate = import_module("06_generate")


@dataclass
class Options:
    """What is compared."""

    problems: int = option(1, "how many lists, each for a team of two")
    passes: int = option(60, "the most that a team takes")
    png: str | None = option(None, "draw it")


class Compared(generate.Hogwild):
    """A run that compares each step it moves, and goes on as if it had not.

    differences: {(what, layer): [relative difference of a step]}.
    """

    def __init__(self, *arguments):
        self.differences = defaultdict(list)
        super().__init__(*arguments)

    def to_history(self, w):
        """Move the step; then look what it would be if it were encoded there, and alone."""
        ids, first = list(self.ids[w.block]), self.history.length
        super().to_history(w)
        moved = self.memory(self.history, first)
        self.cache.truncate(self.history, first)
        generate.feed(self.model, self.cache, [[([self.history], ids)]], self.forward)
        anew = self.memory(self.history, first)
        for memory, kept in ((self.cache.keys, moved["keys"]), (self.cache.values, moved["values"])):
            for layer, content in kept.items():
                begin = self.history.start + first
                memory[layer][:, begin:begin + len(ids)] = content
        with self.cache.rewound():
            generate.feed(self.model, self.cache, [[([w.block], ids)]], self.forward)
            alone = self.memory(w.block, 0)
        for what, content in anew.items():
            for layer, wanted in content.items():
                for how, other in (("moved", moved), ("alone", alone)):
                    # Keys lie at another place where they stand alone, so they are not compared.
                    if how == "moved" or what == "values":
                        error = (other[what][layer] - wanted).float().norm() / wanted.float().norm()
                        self.differences[f"{what} {how}", layer].append(float(error))

    def memory(self, block, first):
        """Keys and values of a block from its index `first` on: {what: {layer: [heads, tokens, D]}}."""
        there = slice(block.start + first, block.start + block.length)
        return {what: {layer: content[:, there].clone() for layer, content in memory.items()}
                for what, memory in (("keys", self.cache.keys), ("values", self.cache.values))}


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser([Options, models.Options], description=__doc__.split("\n")[0])
    options, which = parser.read(argv)
    command.at_least(options, problems=1, passes=1)
    journal.own_png(options.png)
    model, tokenizer = models.prepared(which)
    forward, told = engine.best_forward(model, which.attention), adapters.settings(which.model)
    found, steps = defaultdict(list), 0
    for number in range(options.problems):
        puzzle = puzzles.fresh("list", number)
        settings = generate.Settings(max_passes=options.passes, **told)
        run = Compared(model, tokenizer, puzzle.text, settings, forward)
        while run.ending is None:
            steps += len(run.advance()["closed"])
        for key, errors in run.differences.items():
            found[key] += errors
    if not steps:
        raise ValueError(f"no step was finished in {options.passes} passes: give --passes more")
    table = {key: mean(errors) for key, errors in found.items()}
    layers, columns = sorted({layer for _, layer in table}), sorted({what for what, _ in table})[::-1]
    print(f"{steps} steps: relative difference from the step as encoded anew at the history's end\n")
    print(f"{'layer':8}" + "".join(f"{what:>16}" for what in columns))
    for layer in layers:
        print(f"{layer:<8}" + "".join(f"{table[what, layer]:16.3f}" for what in columns))
    if options.png:
        draw(options.png, layers, {what: [table[what, layer] for layer in layers] for what in columns})
    # The first layer's are functions of the token and its place: the rotation alone has to be right.
    assert table["keys moved", layers[0]] < 0.02 and table["values moved", layers[0]] < 0.02
    print("\n[OK] in the first layer, a moved step is what it would be if it were encoded there")
    return 0


def draw(png, layers, lines):
    """The table as a picture."""
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    for what, heights in lines.items():
        axis.plot(layers, heights, "-o", label=what)
    axis.set(xlabel="layer", ylabel="relative difference from encoding anew", ylim=(0, None))
    axis.legend()
    figure.savefig(png)


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
