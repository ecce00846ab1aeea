"""A person at a real terminal (a pty, read by pyte): what is typed while a run goes on, what comes of
it, and that the terminal is as it was, however the run ends."""
import io
import os
import runpy
import signal
import sys
from importlib import import_module

import pytest
from conftest import ROOT
from helpers import random_model, tokenizer, waiting_model
from rich.console import Console
from terminals import Terminal
from test_06_command_line import rows_of

from appendix import command, join_in, models, products, screen

generate = import_module("06_generate")
PROBLEM = "Wait for the teacher, who knows what to count."


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that starts chapter 6's command line in a terminal, on the model that waits."""
    monkeypatch.setattr(models, "load", lambda *_, **__: (waiting_model(), tokenizer()))
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    waiting_model(), import_module("prompt_toolkit.widgets")  # (once, not in every child)

    def start(*others, prepare=lambda: None, size=(80, 24)):
        arguments = [PROBLEM, "--greedy", "--max-passes", "30000", "--save", str(tmp_path / "trace"),
                     *others]

        def main():
            prepare()
            return command.one_sentence(lambda: generate.main(arguments))
        return Terminal(main, *size)
    return start


@pytest.mark.parametrize("moves", [True, False])
def test_what_somebody_leaves_is_a_past_step_where_steps_move(moves):
    """Elsewhere nobody reads it any more."""
    start = {"opening": {"Alice": "I add", "Bob": "And I"}, "moves": moves, "context": 99}
    display = screen.Screen("Why?", start, plain=True, console=Console(file=io.StringIO()))
    display.show({"events": [["dismiss", "Bob"]], "text": {}, "closed": [], "sampled": {},
                  "seconds": 0.1, "in_view": 9})
    assert display.history == [("Bob", "And I")] * moves and [*display.current] == ["Alice"]


def test_a_person_takes_part(tmp_path, monkeypatch, capsys):
    """As a user would, by `python 06_generate.py`: words, commands, wrong ones. The trace has them all,
    can be shown again, and goes on."""
    waiting_model().save_pretrained(tmp_path / "model"), tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "trace"
    line = [str(ROOT / "06_generate.py"), PROBLEM, "--model", str(tmp_path / "model"), "--greedy",
            "--save", str(path), "--max-passes"]

    def main():  # as `python 06_generate.py ...` does, but that torch has been imported already
        sys.argv = [*line, "30000"]
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(line[0], run_name="__main__")
        return ended.value.code
    with Terminal(main, 100, 30) as terminal:
        terminal.until("past steps", " wait wait", "Teacher:", "/dismiss NAME")
        assert " count count" not in terminal.text
        terminal.press("Now count the pears, plea")
        assert "Teacher: Now count the pears, plea" in terminal.until("pears, plea")
        terminal.press("se.\r")
        terminal.until("Said to all: Now", "**Teacher:** Now count the pears, please.", " count count")
        assert terminal.text.splitlines()[-1] == "Teacher:"
        for typed, words in (("/answer", "answer would be: count count"), ("/add Carol", "─ Carol ─"),
                             ("/add Bob", "two workers are called 'Bob'"), ("/shout", "no command"),
                             ("/dismiss Zed", "'Zed' cannot leave"), ("/add A B", "'A B' is not a name"),
                             ("/dismiss Carol", "Carol: done")):
            terminal.press(typed + "\r")
            terminal.until(words)
        terminal.until("─ Bob ─", without="─ Carol ─")
        terminal.press("/stop\r")
        assert terminal.wait() == 130 and terminal.restored
        assert terminal.raw.endswith(b": the same command goes on with it\r\n")
    saved = rows_of(path)
    assert [event for row in saved[2:] for event in row["events"]] == [
        ["say", "Teacher", "Now count the pears, please."], ["add", "Carol"], ["dismiss", "Carol"]]
    told = generate.Settings(greedy=True)
    assert {"Carol"} == {name for row in saved[2:] for name in row["fed"]} - {*told.workers}
    monkeypatch.setattr(models, "load", lambda *_, **__: (waiting_model(), tokenizer()))
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    assert generate.main([*line[1:], str(len(saved) + 3)]) == 0 and rows_of(path)[:len(saved)] == saved
    capsys.readouterr()
    screen.main([str(path), "--html", str(tmp_path / "run.html")])
    screen.main([str(path)])
    for shown in (capsys.readouterr().out, (tmp_path / "run.html").read_text()):
        assert "Now count the pears, please." in shown and "Carol" in shown and "count count" in shown


def press(keys):
    """Something to do to a terminal: press these."""
    return lambda terminal: terminal.press(keys)


def terminate(terminal):
    """Something to do to a terminal: end its program, as the system does when it shuts down."""
    os.kill(terminal.child, signal.SIGTERM)


def failing():
    """Let the model fail in pass 30."""
    advance = generate.Hogwild.advance

    def fail(run):
        if len(run.passes) == 30:
            raise RuntimeError("no power\nat all")
        print("a remark", file=sys.stderr) if len(run.passes) == 20 else None
        return advance(run)
    generate.Hogwild.advance = fail


@pytest.mark.parametrize("others, prepare, end, code, words", [
    ([], None, press("\x03"), 130, "interrupted; what was saved is kept"),
    ([], None, terminate, 130, "interrupted; what was saved is kept"),
    (["--max-passes", "40"], None, press(""), 0, "[OK] each token"),
    ([], failing, press(""), 1, "the run failed in pass 31: no power"),
    (["--max-passes", "9"], None, press("Hm.\r" * 12), 0, "came too late to be heard: Hm."),
], ids=["Ctrl-C", "SIGTERM", "the end", "an error", "too late"])
def test_the_terminal_is_as_it_was(started, tmp_path, others, prepare, end, code, words):
    """Its settings and its page; the exit code is that of a run that nobody watches. What was computed
    is in the trace, and what others printed meanwhile on the usual page."""
    with started(*others, prepare=prepare or (lambda: None)) as terminal:
        terminal.until("/dismiss NAME")
        assert not terminal.restored
        end(terminal)
        assert terminal.wait() == code and terminal.restored
    last = terminal.raw.decode().split("\x1b[?1049l")[-1]
    assert words in last and "Traceback" not in last
    assert (b"a remark\r\n" in terminal.raw) == (code == 1)
    passes = [row for row in rows_of(tmp_path / "trace") if "fed" in row]
    assert len(passes) == {0: int(others[-1]) if others else 0, 1: 30}.get(code, len(passes))


def test_interrupted_while_it_begins(started):
    """The terminal is as it was, also if Ctrl-C comes before the first picture."""
    def interrupted():
        raise KeyboardInterrupt

    def prepare():
        import_module("prompt_toolkit.patch_stdout").patch_stdout = interrupted
    with started(prepare=prepare) as terminal:
        assert terminal.wait() == 130 and terminal.restored
    before, page, last = terminal.raw.decode().rpartition("\x1b[?1049l")
    assert page and "\x1b[?1049h" in before and "interrupted; what was saved is kept" in last


@pytest.mark.parametrize("plain, prepare", [
    (True, lambda: None), (False, lambda: setattr(sys, "stdin", open("/dev/null"))),
    (False, lambda: sys.modules.update(prompt_toolkit=None))], ids=["plain", "stdin", "no library"])
def test_without_a_terminal_to_type_in_there_is_no_line(started, plain, prepare):
    """With --plain, or where standard input is something else, all is as if nobody were there; so it is
    where prompt_toolkit is not installed."""
    with started(*["--plain"] * plain, "--max-passes", "20", prepare=prepare) as terminal:
        assert terminal.wait() == 0 and terminal.restored
    assert b"[OK]" in terminal.raw and b"/dismiss" not in terminal.raw
    assert b"\x1b[?1049h" not in terminal.raw and (b"past steps" in terminal.raw) != plain


def test_the_picture_follows_the_size(started):
    """Also if that changes; the line stays at the bottom, with a name of one's own."""
    with started("--guest", "Ann", "--layout", "independent", size=(120, 40)) as terminal:
        terminal.press("How are you?\r")  # before there is a line: it is read then
        terminal.until("**Ann:** How are you?")  # also in a layout without steps that move
        assert terminal.text.splitlines()[-1] == "Ann:" and len(terminal.screen.display) == 40
        terminal.resize(60, 20)
        terminal.press("/answer\r")
        terminal.until("would be: wait", "╮╭", " passes, ")
        assert terminal.text.splitlines()[-1] == "Ann:" and len(terminal.text.splitlines()[0]) == 60


def test_nobody_is_called_like_a_worker(started):
    """Then nothing that is typed could be said: one sentence, before the run begins."""
    with started("--guest", "Bob") as terminal:
        assert terminal.wait() == 2 and terminal.restored
    assert b"a worker is called 'Bob'" in terminal.raw and b"Traceback" not in terminal.raw


def test_what_a_line_asks_for():
    """Bytes that are no text, spaces, and who has the person's name: a sentence, and nothing happens."""
    run = generate.Hogwild(random_model("llama"), tokenizer(), PROBLEM, generate.Settings(max_passes=9))
    for guest, line, words in (("Eve", "\udcff", "UTF-8"), ("Alice", "Hm.", "two workers"),
                               ("Eve", "/add", "no command"), ("Eve", "/answer 7", "no command"),
                               ("Eve", "/stop it", "no command"), ("Eve", " /", "no command"),
                               ("Eve", "/add Eve", "your own name")):
        with pytest.raises(ValueError, match=words):
            join_in.obey(run, guest, line)
    assert run.events == [] and run.said == []
    assert join_in.obey(run, "Eve", "  /add   Dave ") == "/add Dave: done"
    assert join_in.obey(run, "Eve", " Well, ") == "Said to all: Well,"
    assert run.events == [["add", "Dave"], ["say", "Eve", " Well, "]]
    with pytest.raises(KeyboardInterrupt):
        join_in.obey(run, "Eve", "/stop")
    with pytest.raises(ValueError, match="not a name"):
        screen.Options(guest="a b")
