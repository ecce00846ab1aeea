r"""Appendix: a file that grows by a line per piece of work, so that the same command goes on where it
was stopped.

The first line says what all others have in common. Each further line is whole, or cut off at the next
start: a kill loses at most the piece of work that was under way. Traces (chapter 6) and evaluations
(chapter 7) are such files. A full disk does not end the work: what cannot be written now is tried again
with the next line.
"""
import json
import os
import stat
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes from writing to one file
    fcntl = None

from appendix.command import first_line


class Journal:
    """rows: what is in the file to begin with, and what was added since. A context manager.

    Args:
        path: the file; None: nothing is kept.
        kind: what the lines are about ("trace", "evaluation"); it stands in the first line.
        header: dict of what all rows have in common. Where the file has another one, it is refused.
        row_shape: what a row has to look like, see `matches`.
        may_differ: keys of the header that are not compared.
        durable: every row reaches the disk before the next one is begun, not only the operating system.
    Raises:
        ValueError: the file is not ours, has another header (the message names the difference), or is in
            use.
    """

    def __init__(self, path, kind, header, row_shape, may_differ=(), durable=False):
        self.path, self.rows, self.durable = path, [], durable
        self.file, self.waiting, self.complained = None, b"", False  # waiting: did not fit on the disk
        if path is None:
            return
        self.file = self.open()
        try:
            theirs, self.rows, self.whole = read(path, kind, row_shape)
            if not self.rows:  # nothing has been done there, whatever it was meant for
                self.whole = 0
            for key in {**theirs, **header} if self.whole else ():
                if theirs.get(key) != header.get(key) and key not in may_differ:
                    found = f"{repr(key)[1:-1][:200]} {theirs.get(key)!r}"[:400]
                    raise ValueError(f"{path!r} holds work with {found}, not {header.get(key)!r}: "
                                     "name another file")
            os.ftruncate(self.file, self.whole)
            if not self.whole:
                self.write({"format": f"hogwild-{kind}-2", **header})
            if self.waiting:
                raise ValueError(f"{path!r} cannot be written: {self.complained}")
        except BaseException:
            os.close(self.file)
            raise

    def open(self):
        """The file, locked: itself, not one beside it, which may be somebody's. No link is followed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        try:
            file = os.open(self.path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                os.close(file)
                raise OSError(None, "it is not a file")
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            os.close(file)
            raise ValueError(f"another process writes to {self.path!r}: name another file") from error
        except OSError as error:
            why = "it is a link" if os.path.islink(self.path) else error.strerror
            raise ValueError(f"{self.path!r} cannot be written ({why}): name a file in a folder "
                             "of yours") from error

    def add(self, row):
        """Keep a row."""
        self.rows.append(row)
        if self.file is not None:
            self.write(row)

    def write(self, row):
        """Append what is waiting, and a row. If that fails, the file ends with its last whole line."""
        self.waiting += (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            done = 0
            while done < len(self.waiting):
                done += os.write(self.file, self.waiting[done:])
            if self.durable:
                os.fsync(self.file)
            self.whole, self.waiting = self.whole + done, b""
        except OSError as error:
            os.ftruncate(self.file, self.whole)
            if self.whole and not self.complained:
                print(f"{self.path} cannot be written at the moment ({first_line(error)}); "
                      "the work goes on", file=sys.stderr)
            self.complained = first_line(error)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.file is not None:
            os.close(self.file)
            if self.waiting:
                print(f"{self.path}: the last {self.waiting.count(10)} lines could not be written "
                      f"({self.complained})", file=sys.stderr)
            self.file = None


def read(path, kind, row_shape):
    """(header, rows, bytes that are whole) of a journal; ({}, [], 0) of an empty one.

    Raises:
        ValueError: it cannot be read, or one of its lines was not written by this program.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    whole, start = data.rfind(b"\n") + 1, f'{{"format": "hogwild-{kind}-2"'.encode()
    if data[:len(start)] != start[:len(data)]:  # (a kill may have cut even the first line)
        raise ValueError(f"{str(path)!r} is no {kind} that this program wrote: name another file")
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            if number > 1 and not matches(rows[-1], row_shape):
                raise ValueError("it lacks something, or an older version wrote it")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is damaged ({first_line(error)}): "
                             "name another file") from error
    header, *rows = rows or [{}]
    header.pop("format", None)
    return header, rows, whole


def matches(value, shape):
    """Has a JSON value this shape?

    A type means itself (a whole number is a float, too; True is no number); None means null; a tuple
    means any of its shapes; [shape] a list of such; {str: shape} a dict with any keys; {"key": shape} at
    least these keys.
    """
    if isinstance(shape, tuple):
        return any(matches(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(matches(one, shape[0]) for one in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(matches(one, shape[str]) for one in value.values())
        return all(key in value and matches(value[key], one) for key, one in shape.items())
    if shape is None or isinstance(value, bool):
        return value is shape or shape is bool
    return isinstance(value, (int, float) if shape is float else shape)


def own_picture(path, magic):
    """Raise ValueError unless `path` is new and can be made, or is a file that begins with `magic`."""
    try:
        if os.path.islink(path):
            raise ValueError(f"{path!r} is a link: name another file")
        with open(path, "rb") as file:
            if not file.read(len(magic)).startswith(magic):
                raise ValueError(f"{path!r} exists and is something else: name another file")
    except FileNotFoundError:
        if not os.access(Path(path).parent, os.W_OK):
            raise ValueError(f"{path!r} cannot be written: its folder must exist") from None
    except OSError as error:
        raise ValueError(f"{path!r} cannot be written ({error.strerror})") from error


def own_png(path):
    """Raise ValueError, or ImportError, unless a PNG can be drawn there. None: nothing is drawn."""
    if path:
        if not path.endswith(".png"):
            raise ValueError(f"--png draws a PNG, so {path!r} has to end in .png")
        own_picture(path, b"\x89PNG")
        import matplotlib  # noqa: F401 (else it would be missed when all is done)
