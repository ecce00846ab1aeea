"""Appendix: how sure a share is, how far two curves are apart, and chapter 7's tables and picture."""
from itertools import pairwise

import numpy as np

from appendix.command import plain


def interval(share, count):
    """95 % interval of a share seen in `count` trials (Wilson's): (low, high)."""
    z = 1.959964 / np.sqrt(count)  # (in standard errors of `count` trials)
    middle, spread = share + z * z / 2, z * np.sqrt(share * (1 - share) + z * z / 4)
    return (middle - spread) / (1 + z * z), (middle + spread) / (1 + z * z)


def difference(scores, baseline):
    """Mean of score minus baseline's over the same problems, and its 95 % interval: (mean, low, high).

    The interval is where the mean falls when problems are drawn anew from those that there are
    (bootstrap).
    """
    pairs = np.subtract(scores, baseline)  # [problems]
    means = np.random.default_rng(0).choice(pairs, (2000, len(pairs))).mean(1)  # [2000]
    return pairs.mean(), *np.quantile(means, [0.025, 0.975])


def passes_to_reach(level, budgets, accuracy):
    """The number of passes at which `accuracy` (measured at `budgets`) reaches `level`: between two
    budgets in proportion, and None if it is not between two that were measured."""
    for (before, low), (after, high) in pairwise(zip(budgets, accuracy)):
        if low < level <= high:
            return before + (level - low) / (high - low) * (after - before)


def relative_passes(budgets, accuracy, baseline):
    """Passes that a method takes to the accuracy that it and the baseline reach, as a multiple of the
    baseline's."""
    level = min(max(accuracy), max(baseline))
    mine, theirs = (passes_to_reach(level, budgets, curve) for curve in (accuracy, baseline))
    return f"{mine / theirs:.2f} (at {level:.0%})" if mine and theirs else "–"


FEW = 10  # of so few problems nothing can be said about differences
FEW_METHODS = 4  # more curves than that are drawn without their intervals, which would hide them
SECOND = """
At the largest budget: difference from the baseline on the same problems (95 % interval); passes to the
accuracy that both reach, as a multiple of the baseline's; mean passes to a right answer, of the runs
that gave one; runs without an answer, with one that was not understood, that failed, that ended because
the context or the memory was full:
"""


def report(header, table, png=None):
    """Print tables of what chapter 7's `figures` says of each method, and draw the curves."""
    title = plain(f"{header['model'].rstrip('/').split('/')[-1]} on {header['task']}, "  # (no folders)
                  f"{header['data'] or 'its own data'}")
    budgets = header["budgets"]
    base, count = table.get("baseline"), next(iter(table.values()))["count"]
    lines = [f"\n{title}, the {count} problems that all methods have done\n",
             "right after so many passes, with the 95 % interval of the share:",
             f"  {'method':20}{'runs':>5}" + "".join(f"{budget:>16,}" for budget in budgets)]
    changes = [f"{SECOND}  {'method':20}{'difference':>22}{'passes':>16}{'to right':>10}{'none':>6}"
               f"{'not understood':>16}{'faults':>8}{'context':>9}"]
    for name, row in table.items():
        cells = ["{:.0%} ({:.0%}–{:.0%})".format(share, *interval(share, count))
                 for share in row["accuracy"]]
        lines.append(f"  {name:20}{row['runs']:>5}" + "".join(f"{cell:>16}" for cell in cells))
        ratio = change = "–"
        if base and row is not base:
            ratio = relative_passes(budgets, row["accuracy"], base["accuracy"])
            last = [one["scores"][:, -1] for one in (row, base)]  # [problems] each
            change = ("too few problems" if count < FEW
                      else "no problem differs" if np.array_equal(*last)
                      else "{:+.0%} ({:+.0%} – {:+.0%})".format(*difference(*last)))
        needed = f"{row['passes_to_right']:.0f}" if row["passes_to_right"] else "–"
        changes.append(f"  {name:20}{change:>22}{ratio:>16}{needed:>10}{row['none']:>6}"
                       f"{row['not_understood']:>16}{row['faults']:>8}{row['context']:>9}")
    print(plain("\n".join(lines + changes)) + "\n")
    if png:
        draw(png, title, budgets, table, OTHERS)


OTHERS = {"tokens": "tokens, of all workers together", "seconds": "seconds, also of others beside it"}


def draw(png, title, budgets, table, others=("seconds",)):
    """Accuracy against passes, and against something else (the paper's figures 3 to 6, 19), as a PNG.

    Args:
        table: {method: {"accuracy": [budgets]; "count": of problems; "tokens" and "seconds":
            [budgets] means of problems; "spread": [2, budgets] the seconds' 10 % and 90 % quantiles}.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 + 4.5 * len(others), 4.5), layout="constrained")
    axes, few = figure.subplots(1, 1 + len(others), sharey=True), len(table) <= FEW_METHODS
    for axis, name in zip(axes, (None, *others)):
        axis.set_prop_cycle(color=colormaps["tab20"].colors)
        axis.set(xlabel=OTHERS.get(name, "sequential forward passes"))
        axis.grid(alpha=0.3)
        for method, row in table.items():
            x = row.get(name, budgets)
            style = "--o" if method.startswith(("baseline", "no-early", "self", "skeleton")) else "-o"
            reach = np.abs(interval(row["accuracy"], row["count"]) - row["accuracy"])  # [2, budgets]
            spread = ((row["spread"] - x) * [[-1], [1]]).clip(0) if (  # (the mean may lie beside them)
                few and name == "seconds" and "spread" in row) else None
            axis.errorbar(x, row["accuracy"], reach if few else None, spread, fmt=style,
                          label=f"{method} (n = {row['count']})")
    axes[0].set_xticks(budgets[::-(-len(budgets) // 12)])
    axes[0].set_ylabel(f"accuracy{', with 95 % intervals' if few else ''}")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.suptitle(title)
    figure.savefig(png, dpi=130)
