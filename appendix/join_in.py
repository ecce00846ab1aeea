r"""Appendix: a person takes part in a run of chapter 6, by typing while it goes on.

On a terminal, the display has a line at its bottom. What one types there and sends with Enter is

    any words        said to all: a step of the history, which they read from the next pass on
    /add NAME        another worker, who writes from then on
    /dismiss NAME    one of them leaves
    /answer          what would they say now? They do not notice that they were asked
    /stop            the same as Ctrl-C

The model computes in the main thread. A second one, of prompt_toolkit, reads keys and draws. They share
nothing but a queue of lines, a picture and a sentence: a line waits till a pass is over, and between two
passes one line is taken. Without a terminal to type in, there is no such line.
"""
import atexit
import contextlib
import os
import queue
import signal
import sys
import threading

from rich.console import Console

from appendix import command, guests, screen

HELP = "Type to say something to all, or /add NAME, /dismiss NAME, /answer, /stop"
BELOW = 3  # rows: two for a sentence, and the line


def obey(run, guest, line):
    """Do what a line asks for. Returns a sentence about what has come of it.

    Raises ValueError, a sentence, if it cannot be done; KeyboardInterrupt for /stop.
    """
    word, _, name = command.text(line, "line").strip().partition(" ")
    name = name.strip()
    if not word.startswith("/"):
        guests.say(run, guest, line)
        return f"Said to all: {line.strip()}"
    if word == "/add" and name == guest:
        raise ValueError(f"{guest!r} is your own name; give the worker another one")
    if word in ("/add", "/dismiss") and name:
        getattr(guests, word[1:])(run, name)
        return f"{word} {name}: done"
    if word == "/answer" and not name:
        return f"After {len(run.passes)} passes, the answer would be: {run.answer() or '(none)'}"
    if word == "/stop" and not name:
        raise KeyboardInterrupt
    raise ValueError(f"{line.strip()!r} is no command: /add NAME, /dismiss NAME, /answer or /stop")


class Screen(screen.Screen):
    """The display of a run, and the person in front of it.

    Args:
        problem, start: as of screen.Screen; show: screen.Options.
    """

    def __init__(self, problem, start, show):
        super().__init__(problem, start, show.plain)
        self.guest, self.line = show.guest, None
        if self.live and can_be_typed_in(self.console):
            if self.guest in start["opening"]:
                raise ValueError(f"a worker is called {self.guest!r}: give yourself another name, with "
                                 "--guest")
            with contextlib.suppress(ImportError):  # without prompt_toolkit, one can still watch
                self.live = self.line = Line(self.guest)
                self.console = self.line.console

    def take_part(self, run):
        """Do what was typed first, if anything was. Raises KeyboardInterrupt for /stop."""
        if self.line and not self.line.typed.empty():
            try:
                said = obey(run, self.guest, self.line.typed.get())
            except (ValueError, RuntimeError, MemoryError) as error:  # the run goes on as it was
                said = command.first_line(error)
            self.line.tell(said)
            self.next_refresh = 0.0  # the picture is drawn after the next pass, whatever it costs


def can_be_typed_in(console):
    """Do we read from a terminal, in its foreground, and write to one?"""
    try:
        return (sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal
                and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp())
    except (AttributeError, OSError, ValueError):  # no job control here, or no stdin at all
        return False


class Above(Console):
    """A console without the rows at its bottom that belong to the person."""

    @property
    def size(self):
        """(columns, rows)"""
        width, height = size = super().size
        return size._replace(height=max(1, height - BELOW))


class Line:
    """A picture, below it a sentence, and a line to type in. It stands where rich's Live would.

    console: to make pictures for; typed: a queue of the lines that were sent, without empty ones.
    Raises ImportError if prompt_toolkit is not installed.
    """

    def __init__(self, guest):
        from prompt_toolkit import ANSI, Application
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.layout import FormattedTextControl, HSplit, Layout, Window
        from prompt_toolkit.patch_stdout import patch_stdout
        from prompt_toolkit.widgets import TextArea
        self.console, self.typed = Above(highlight=False), queue.SimpleQueue()
        self.ansi, self.picture, self.sentence = ANSI, "", HELP
        self.printing, self.patch = contextlib.ExitStack(), patch_stdout
        field = TextArea(prompt=f"{guest}: ", multiline=False, height=1, accept_handler=self.send)
        above = Window(FormattedTextControl(lambda: self.picture))
        told = Window(FormattedTextControl(lambda: self.sentence), height=BELOW - 1, wrap_lines=True,
                      style="reverse")
        keys = KeyBindings()
        keys.add("c-c")(self.interrupt)
        keys.add("c-z")(lambda event: event.app.suspend_to_background())
        rows = Layout(HSplit([above, told, field]), field)
        self.app = Application(rows, key_bindings=keys, full_screen=True)
        self.begun, self.over = threading.Event(), False
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        """What the second thread does."""
        try:
            with contextlib.suppress(EOFError):  # the terminal has been closed
                self.app.run(self.begun.set, set_exception_handler=False)
        finally:
            self.begun.set()

    def send(self, buffer):
        """The person has pressed Enter."""
        if buffer.text.strip():
            self.tell(f"(when this pass is over) {buffer.text}")
            self.typed.put(buffer.text)

    def interrupt(self, event):
        """Ctrl-C: the main thread gets the signal that it gets where nobody reads keys."""
        if not self.over:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def tell(self, sentence):
        """Show a sentence."""
        self.sentence = command.plain(sentence)
        self.app.invalidate()

    def update(self, picture, refresh=True):
        """Show a picture, anything that rich can draw."""
        with self.console.capture() as drawn:
            self.console.print(picture, height=self.console.height)
        self.picture = self.ansi(drawn.get())
        self.app.invalidate()

    def __enter__(self):
        atexit.register(self.__exit__)  # whatever interrupts us, the terminal is left as it was
        try:
            self.thread.start()
            self.begun.wait()
            self.printing.enter_context(self.patch())  # what others print does not spoil the picture
        except BaseException:  # Ctrl-C, pressed at once
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure):
        self.over = True
        self.begun.wait(1)  # what has not begun cannot be ended
        self.printing.close()
        with contextlib.suppress(AttributeError, RuntimeError):  # it has ended by itself
            self.app.loop.call_soon_threadsafe(self.app.exit)
        self.thread.join()
        atexit.unregister(self.__exit__)
        while not self.typed.empty():
            print(f"came too late to be heard: {command.plain(self.typed.get())}", file=sys.stderr)
