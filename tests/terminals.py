"""A terminal without a window: programs run in it, keys are pressed, and one can read what it shows."""
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import time

import pyte


class Terminal:
    """A pseudo-terminal with a child process in it. A context manager; the child is gone at its end.

    Args:
        main: what the child does, () -> its exit code.
    """

    def __init__(self, main, columns=80, rows=24):
        self.screen, self.raw = pyte.Screen(columns, rows), b""
        self.stream = pyte.ByteStream(self.screen)
        self.master, self.slave = os.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        self.child, self.code = os.fork(), None
        if self.child == 0:
            code = 99
            try:
                os.setsid()
                fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
                for number in range(3):
                    os.dup2(self.slave, number)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
                os.environ.update(TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1")
                for name in ("COLUMNS", "LINES", "NO_COLOR"):
                    os.environ.pop(name, None)
                code = main()
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)

    def resize(self, columns, rows):
        """Another size. (The program is told by a signal, if it listens to that.)"""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def read(self, seconds=0.05):
        """Take in what has been written, waiting so long at most."""
        while select.select([self.master], [], [], seconds)[0]:
            piece, seconds = os.read(self.master, 65536), 0
            self.raw += piece
            self.stream.feed(piece)

    @property
    def text(self):
        """What it shows, as lines."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def until(self, *words, without=None, seconds=60):
        """Wait till it shows all these words, but not that one; returns what it shows."""
        end = time.monotonic() + seconds
        while not all(word in self.text for word in words) or (without and without in self.text):
            self.read()
            assert time.monotonic() < end, f"{words} not in\n{self.text}\n{self.raw[-2000:]}"
            assert self.code is None, f"ended with {self.code}\n{self.raw[-2000:]}"
            self.look()
        return self.text

    def press(self, keys):
        """Press these keys."""
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)

    def look(self):
        """Has the child ended? Then `code` is its exit code, or minus the signal that ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                self.read()
                self.code = os.waitstatus_to_exitcode(status)

    def wait(self, seconds=60):
        """The exit code, once the child has ended."""
        end = time.monotonic() + seconds
        while self.code is None:
            self.read()
            self.look()
            assert time.monotonic() < end, f"still there:\n{self.text}"
        return self.code

    @property
    def restored(self):
        """Has the terminal its settings of before, and is its usual page shown?"""
        pages = [self.raw.rfind(b"\x1b[?1049" + end) for end in (b"l", b"h")]
        return termios.tcgetattr(self.slave) == self.before and pages[0] >= pages[1]

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.look()
        if self.code is None:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        os.close(self.master), os.close(self.slave)
