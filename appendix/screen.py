r"""Appendix: the live display of a run, made from the records of its passes alone.

On a terminal: the problem and the finished steps above, a column per worker below, a line of figures at
the bottom. Elsewhere: a line per finished step. Run directly, it shows a trace again, at the pace at
which it went:

    python appendix/screen.py trace.jsonl               needs no model
    python appendix/screen.py trace.jsonl --html FILE   writes a page for a browser: player.html, filled
"""
import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import command, journal  # noqa: E402
from appendix.protocol import CHECK, SEPARATORS, check_name, header  # noqa: E402

START = {"prompt": str, "opening": {str: str}, "moves": bool, "context": int, "weights": str}
PASS = {"fed": {str: [int]}, "sampled": {str: int}, "text": {str: str}, "events": [[str]],
        "in_view": int, "seconds": float,
        "closed": [{"worker": str, "step": int, "text": str, "opened": str}]}
END = {"ending": str, "answer": str}
ROW = START, PASS, END  # what a trace consists of: how the run began, its passes, how it ended

COLOURS = ["cyan", "magenta", "green", "yellow",
           "bright_blue", "bright_red", "bright_green", "bright_magenta"]
PAGE = "<!doctype html><!-- a run of Hogwild! Inference -->"  # how a page that was written here begins
ENDINGS = {"answer": "a worker wrote it", "passes": "when the passes were used up",
           "end of text": "all have finished", "context": "when the model's context was used up",
           "room": "when the memory that was reserved was used up"}


@dataclass
class Options:
    """What is shown and kept."""

    save: str | None = command.option(None, "keep the run in this file; the same command goes on")
    plain: bool = command.option(False, "plain lines instead of the live display")
    guest: str = command.option("Teacher", "your name, if you type something while it runs")

    def __post_init__(self):
        """Raise ValueError, one sentence, if nobody can be called so."""
        check_name(self.guest, [])


class Screen:
    """Shows a run. A context manager.

    Args:
        problem: its text; start: the first row of a trace (START); plain: lines, even on a terminal.
    """

    def __init__(self, problem, start, plain=False, console=None):
        self.problem, self.start = command.plain(problem.strip()), start
        self.labels = re.findall(r"^([A-Z])\. ", self.problem, re.MULTILINE)  # of a problem's parts
        self.console = console or Console(highlight=False)
        # (name, text) of finished steps, and what each worker has unfinished.
        self.history, self.current = [], dict(start["opening"])
        self.names = list(start["opening"])  # in the order in which they came: a colour each
        self.passes, self.tokens, self.seconds, self.view = 0, 0, 0.0, 0
        live = self.console.is_terminal and not plain
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if live else None
        self.next_refresh = 0.0

    def __enter__(self):
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *failure):
        if self.live:
            self.live.__exit__(*failure)

    def show(self, record):
        """Take in the record of one pass."""
        moves = self.start["moves"]
        for what, name, text in ([*event, "", "", ""][:3] for event in record["events"]):
            if what == "say":
                self.finish_step(name, f"**{name}:** {text}")
            elif what == "dismiss":
                text = self.current.pop(name, "")
                if moves:  # (else nobody reads it any more)
                    self.finish_step(name, text)
            elif what == "add" and any(self.start["opening"].values()):
                self.current[name] = header(name, 1)
        for name, text in record["text"].items():
            self.current[name] = self.current.get(name, "") + text
        for closed in record["closed"]:
            name = closed["worker"]
            if moves:
                self.finish_step(name, closed["text"])
            self.current[name] = self.current.get(name, "") * (not moves) + closed["opened"]
        self.passes, self.tokens = self.passes + 1, self.tokens + len(record["sampled"])
        self.seconds, self.view = self.seconds + record["seconds"], record["in_view"]
        now = time.perf_counter()
        if self.live and now >= self.next_refresh:
            self.live.update(self.frame(), refresh=True)
            # Drawing takes at most a fortieth of the time.
            self.next_refresh = now + max(0.1, 40 * (time.perf_counter() - now))

    def finish_step(self, name, text):
        """A step joins the history; where nothing is drawn, it is printed."""
        self.history.append((name, text))
        if not self.live:
            self.console.print(self.styled(name, text.strip()), soft_wrap=True)

    def styled(self, name, text):
        """Text in its writer's colour, with headers and inserted checks marked."""
        if name not in self.names:
            self.names.append(name)
        styled = Text(command.plain(text), style=COLOURS[self.names.index(name) % len(COLOURS)])
        styled.highlight_words([CHECK.strip()], "black on yellow")
        styled.highlight_regex(r"\*\*[^*\n]+ \[\d+\]:\*\*", "bold")
        for number, label in enumerate(self.labels):  # a part's own colour, where somebody speaks of it
            styled.highlight_regex(rf"\b{label}(?=[:=])|(?<=Check ){label}\b",
                                   f"bold black on {COLOURS[number % len(COLOURS)]}")
        return styled

    def figures(self):
        """How far the run is, and how fast."""
        return (f"{self.passes} passes, {self.tokens} tokens: "
                f"{self.tokens / max(self.passes, 1):.2f} tokens per pass, "
                f"{self.tokens / max(self.seconds, 1e-9):.1f} tokens/s")

    def tail(self, texts, columns, rows):
        """The end of these texts, as much of it as fits."""
        lines = Text("\n\n").join(texts).wrap(self.console, max(1, columns))
        return Text("\n").join(lines[-max(1, rows):])

    def frame(self):
        """What the terminal shows now."""
        width, height = self.console.size
        asked = Text(self.problem, "bold").wrap(self.console, max(1, width - 4))[:max(1, height // 3)]
        past = [self.styled(name, text.strip()) for name, text in self.history[-40:]]
        shown = self.start["moves"] or bool(past)  # is there a history to show?
        rows = max(5, (height - len(asked) - 3) // (1 + shown))  # of what is new
        columns = width // max(1, len(self.current)) - 4
        wide = columns >= 12  # else there are too many workers for columns: a line each
        now = []
        for name, text in self.current.items():
            text = self.styled(name, text.strip())
            if wide:
                end = self.tail([text], columns, rows - 2)
                now.append(Panel(end, title=name, border_style=text.style))
            else:
                end = self.tail([text], width - len(name) - 3, 1)
                now.append(Text.assemble((f"{name}: ", "bold"), end))
        picture, below = Layout(), Layout(size=rows if wide else len(now))
        (below.split_row if wide else below.split_column)(*map(Layout, now))
        past = Panel(self.tail(past, width - 4, height - rows - len(asked) - 5), title="past steps")
        problem = Panel(Text("\n").join(asked), title="problem")
        line = f"{self.figures()} · {self.view:,} of {self.start['context']:,} tokens of context in view"
        picture.split_column(Layout(problem, size=len(asked) + 2),
                             Layout(past, visible=shown), below, Layout(Text(line, "dim"), size=1))
        return picture

    def finish(self, ending, answer):
        """Print what has not been printed yet, the answer, and a line of figures."""
        if self.live:
            self.console.print(Text(self.problem, style="bold"), soft_wrap=True)
            for name, text in self.history:
                self.console.print(self.styled(name, text.strip()), soft_wrap=True)
        for name, text in self.current.items():
            label = "" if self.start["moves"] else f"{name}: "
            self.console.print(Text.assemble((label, "bold"), self.styled(name, text.strip()),
                                             (SEPARATORS["dots"], "dim")), soft_wrap=True)
        answer = command.plain(answer) or "(none)"
        how = f"   ({ENDINGS.get(ending, ending)})"
        self.console.print(Text.assemble("\nAnswer: ", (answer, "bold"), how), soft_wrap=True)
        self.print(self.figures())

    def print(self, line):
        """A line of our own, as it is."""
        self.console.print(line, markup=False, soft_wrap=True)


class Stopping:
    """While in this context, SIGTERM only sets a flag: `if stopping.asked: ...`, between two passes."""

    asked = False

    def __enter__(self):
        def remember(*_):
            self.asked = True
        self.before = signal.signal(signal.SIGTERM, remember)
        return self

    def __exit__(self, *failure):
        signal.signal(signal.SIGTERM, self.before)


@dataclass
class Arguments:
    """Of the direct run."""

    html: str | None = command.option(None, "write a page for a browser to this file instead")
    plain: bool = command.option(False, "plain lines instead of the live display")


def write_page(path, rows):
    r"""Write player.html with a trace inside: all its rows, as one JSON value.

    Raises:
        ValueError: the file is somebody's, or the trace has NaN in it.
    """
    journal.own_picture(path, PAGE.encode())
    # Nothing in JSON needs a bare `<`, so nothing in a trace can end the element that it stands in.
    data = ",\n".join(json.dumps(row, allow_nan=False) for row in rows).replace("<", r"\u003c")
    page = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    page = page.replace("<!doctype html>", PAGE).replace('id="trace">', f'id="trace">[{data}]')
    Path(path).write_text(page, encoding="utf-8")


def main(argv=None):
    """Show a trace again."""
    parser = command.Parser(Arguments, description=__doc__.split("\n")[0])
    parser.add_argument("trace", help="a file that 06_generate.py --save wrote")
    show, rest = parser.read(argv)
    command.distinct(trace=rest.trace, html=show.html)
    header, rows, _ = journal.read(rest.trace, "trace", ROW)
    if not rows or "opening" not in rows[0] or not isinstance(header.get("problem"), str):
        raise ValueError(f"{rest.trace!r} holds no run yet")
    if show.html:
        write_page(show.html, [{"format": "hogwild-trace-2", **header}, *rows])
        return 0
    with Screen(header["problem"], rows[0], show.plain) as display:
        for record in (row for row in rows if "fed" in row):
            display.show(record)
            if display.live:
                time.sleep(min(max(0, record["seconds"]), 60))
    ends = [row for row in rows if "ending" in row] or [{"ending": "not finished", "answer": ""}]
    display.finish(ends[-1]["ending"], ends[-1]["answer"])
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
