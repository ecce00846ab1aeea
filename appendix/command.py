r"""Appendix: what every command line of this project has in common.

One sentence and exit code 2 when something is wrong, 130 after Ctrl-C, and nothing on the terminal that
could command it: control characters of files, models and errors are replaced.
"""
import argparse
import contextlib
import dataclasses
import re
import sys
from pathlib import Path

from transformers import HfArgumentParser

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and new line


def plain(text):
    """The text without control characters: nobody's words move the cursor or set a title."""
    return CONTROL.sub("\ufffd", str(text))


def first_line(error):
    """An error as one line."""
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0])


def option(default, help):
    """A field of a dataclass that the command line offers, too."""
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there are any."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default is not None else action.help


class Parser(HfArgumentParser):
    """transformers' parser of dataclasses, with one sentence, not a page, when something is wrong."""

    def __init__(self, kinds, **others):
        super().__init__(kinds, formatter_class=Help, **others)

    def error(self, message):
        """Print the sentence and exit with code 2."""
        self.exit(2, f"{self.prog}: {plain(message)}\n")

    def read(self, argv=None, files=(), wanted=None):
        """The dataclasses, filled in; then a namespace of other arguments, if there are any.

        Args:
            files: options that name a text file; their values are read from it.
            wanted: a function of the option `model`: the defaults that it wants, {option: value}.
        """
        values, unknown = self.parse_known_args(argv)
        if wanted:
            self.set_defaults(**{name: value for name, value in wanted(values.model).items()
                                 if hasattr(values, name)})
            values, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; --help lists what there is")
        for name, value in vars(values).items():
            if value == "":
                self.error(f"{name.replace('_', '-')} is empty; give a value, or leave it out")
            if name in files and value != self.get_default(name):
                setattr(values, name, read_text(value, name))
        filled = []
        for kind in self.dataclass_types:
            names = [field.name for field in dataclasses.fields(kind)]
            filled.append(kind(**{name: vars(values).pop(name) for name in names}))
        return (*filled, values) if vars(values) else tuple(filled)


def text(content, what):
    """The text itself, if it has something in it. Raises ValueError if not, or if it is not UTF-8."""
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {what} is not valid UTF-8 text") from error
    if not content.strip():
        raise ValueError(f"the {what} is empty; give some text")
    return content


def read_text(path, what):
    """The text of a file. Raises ValueError if it cannot be read."""
    try:
        return text(Path(path).read_text(encoding="utf-8"), what)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"the {what} {str(path)!r} cannot be read: {why}") from error


def at_least(settings, **least):
    """Raise ValueError unless these whole numbers among the settings are as large, and below 2^31."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and not low <= value < 2**31:
            raise ValueError(f"{name} is {value}; it has to be at least {low}, and below 2^31")


def distinct(**files):
    """Raise ValueError if two options name one file. Options that are None name none."""
    seen = {}
    for name, path in files.items():
        if path is not None:
            other = seen.setdefault(Path(path).resolve(), name)
            if other != name:
                raise ValueError(f"--{other} and --{name} name the same file, {path!r}: name two")


class Failed(RuntimeError):
    """The work stopped half-way, through no fault of what was asked: exit code 1."""

    code = 1


@contextlib.contextmanager
def failing(where):
    """Errors in this context end the work half-way: exit code 1."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise Failed(f"the run failed in {where}: {first_line(error)}") from error


def one_sentence(main):
    """Run main() for its exit code; what goes wrong becomes one sentence on standard error and code
    2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
    try:
        return main()
    except (ValueError, ArithmeticError, RuntimeError, OSError, ImportError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {first_line(error)}", file=sys.stderr)
        return getattr(error, "code", None) or 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept: the same command goes on with it", file=sys.stderr)
        return 130
