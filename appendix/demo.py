r"""Appendix: the demonstration. One problem, first for a single worker, then for a team, live; and what
the team saved.

    python appendix/demo.py                a list of small problems, shared by whoever is free
    python appendix/demo.py --kind race    many candidates: whoever finds the right one stops the others
    python appendix/demo.py --kind plan    some parts need the answers of others

The model has learned to work in a team (learn_to_collaborate.py); the loop, chapter 6's, knows nothing
of that. Every --number is another problem, none of which the model was trained on.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import adapters, command, engine, models, puzzles, screen, tasks  # noqa: E402
from appendix.command import option  # noqa: E402

generate = import_module("06_generate")

MOST = 600  # passes

@dataclass
class Options:
    """What is shown."""

    kind: Literal[tuple(puzzles.KINDS)] = option("list", "of problem")
    number: int = option(puzzles.NUMBER, "which problem")
    workers: int = option(2, "how many there are in the team")
    plain: bool = option(False, "plain lines instead of the live display")

    def __post_init__(self):
        """Raise ValueError, one sentence, if something makes no sense."""
        command.at_least(self, number=0, workers=2)


def solve(model, tokenizer, text, settings, forward, plain):
    """Let a team solve a problem, and show it. Returns the run."""
    run = generate.Hogwild(model, tokenizer, text, settings, forward)
    start = {"opening": {w.name: w.text for w in run.workers}, "moves": run.layout.moves,
             "context": run.context}
    with screen.Screen(text, start, plain) as display:
        while run.ending is None:
            display.show(run.advance())
    display.finish(run.ending, run.answer())
    return run


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = command.Parser([Options, models.Options], description=__doc__.split("\n")[0])
    options, which = parser.read(argv)
    puzzle = puzzles.fresh(options.kind, options.number)
    model, tokenizer = models.prepared(which)
    forward, told = engine.best_forward(model, which.attention), adapters.settings(which.model)
    needed, right = [], []
    for workers in (1, options.workers):
        print(f"\n--- {workers} worker{'s' if workers > 1 else ''}")
        settings = generate.Settings([str(workers)], max_passes=MOST, answer_tokens=40, **told)
        run = solve(model, tokenizer, puzzle.text, settings, forward, options.plain)
        needed.append((len(run.passes), sum(record["seconds"] for record in run.passes)))
        right.append(tasks.grade(run.answer(), puzzle.answer.split(", "))[0] == 1)
    (one, alone), (passes, seconds) = needed
    verdict = ["Both wrong", "Only the team is right", "Only the single worker is right",
               "Both right"][2 * right[0] + right[1]]
    print(f"\n{verdict} (the answer is {puzzle.answer}). {options.workers} workers: {passes} passes "
          f"instead of {one}, {seconds:.1f} seconds instead of {alone:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
