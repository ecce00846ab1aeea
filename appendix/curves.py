"""Appendix: how sure a share is, how far two curves are apart, and their picture (chapter 7)."""
import numpy as np


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
    points = list(zip(budgets, accuracy))
    for (before, low), (after, high) in zip(points, points[1:]):
        if low < level <= high:
            return before + (level - low) / (high - low) * (after - before)


def draw(png, title, budgets, table):
    """Accuracy against passes, and against seconds (the paper's figures 3 to 6, and 19), as a PNG.

    table: method -> {"accuracy": [budgets] shares, "seconds": [budgets], "count": of problems}.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = "sequential forward passes", "mean seconds per problem, on the machine of the run"
    for axis, label in zip(axes, labels):
        axis.set_prop_cycle(color=colormaps["tab20"].colors)
        axis.set(xlabel=label, ylabel="accuracy, with 95 % intervals")
        axis.grid(alpha=0.3)
        for method, row in table.items():
            x = budgets if axis is axes[0] else row["seconds"]
            style = "--o" if method.startswith(("baseline", "no-early", "self", "skeleton")) else "-o"
            reach = np.abs(interval(row["accuracy"], row["count"]) - row["accuracy"])  # [2, budgets]
            axis.errorbar(x, row["accuracy"], reach, fmt=style, label=f"{method} (n = {row['count']})")
    axes[0].set_xticks(budgets)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.suptitle(title)
    figure.savefig(png, dpi=130)
