r"""Appendix: programs that a model wrote, against tests (LiveCodeBench).

A program is somebody else's code. So it runs in a box made by bubblewrap (https://github.com/containers/
bubblewrap, Debian's package of that name): it sees the system's files, read-only, and an empty folder;
no network, no other process, no file of ours; and limits of time, processes, files and output hold for
all that it starts. Memory is limited for each process, and for all of them together, whose sum is taken
every 20th of a second. When the box goes, everything in it goes. What is expected never enters it: a
program gets its input, and what it prints is compared outside.
"""
import base64
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal

SECONDS, MEMORY, PROCESSES, OUTPUT = 6, 4 * 2**30, 32, 2**24  # of each test (bytes)
NOBODY = 65534  # who runs a box, if we are root


@dataclass(frozen=True)
class Test:
    """An input and what is to come out. function: the name of the one that is called with the input, a
    JSON value per line; None: the program reads standard input."""

    input: str
    output: str
    function: str | None = None


# ----------------------------------------------------------------------------------------- the data set

class Plain(pickle.Unpickler):
    """Loads texts, numbers and lists; nothing that could run code."""

    def find_class(self, module, name):
        """Refuse."""
        raise ValueError(f"tests that want to load {module}.{name}")


def tests_of(row):
    """The Tests of a row of LiveCodeBench (code_generation_lite), public ones first.

    Raises:
        ValueError: a field is missing, or is not what it should be.
    """
    try:
        public, private = json.loads(row["public_test_cases"]), row["private_test_cases"]
        if not private.lstrip().startswith("["):  # pickled, compressed
            packed = zlib.decompressobj().decompress(base64.b64decode(private), 2**30)
            private = Plain(io.BytesIO(packed)).load()
        function = json.loads(row["metadata"] or "{}").get("func_name")
        tests = [Test(one["input"], one["output"], function) for one in public + json.loads(private)]
        if {type(text) for one in tests for text in (one.input, one.output)} != {str}:
            raise ValueError("each test has to have texts as input and output, and there has to be one")
        return tests
    except Exception as error:  # what a pickle raises may be anything
        raise ValueError(f"a row of LiveCodeBench lacks tests that can be read: {error}") from error


# --------------------------------------------------------------------------------------------- the box

# Calls a function of the program (LeetCode's are methods of Solution) with a JSON value per line.
CALL = """
import json as _json, sys as _sys
_given = [_json.loads(line) for line in _sys.stdin.read().split("\\n") if line.strip()]
_called = getattr(Solution() if "Solution" in globals() else _sys.modules["__main__"], {function!r})
print(_json.dumps(_called(*_given)))
"""
# What LiveCodeBench gives to every program: these modules, and all names in them.
IMPORTS = """_names = ("string re datetime collections heapq bisect copy math random statistics "
          "itertools functools operator io sys json").split()
for _name in [*_names, "builtins", "typing"]:
    exec(f"from {_name} import *")
for _name in _names:
    exec(f"import {_name}")
sys.setrecursionlimit(50000)
exit = quit = sys.exit
"""


def check():
    """Raise ValueError, one sentence, unless boxes can be made here."""
    if not shutil.which("bwrap"):
        raise ValueError("programs that a model wrote run in a box, which needs bubblewrap: apt install "
                         "bubblewrap (Linux)")
    if run("print(input()[::-1])", "abc") != "cba\n":
        raise ValueError("bubblewrap cannot make a box here (are user namespaces allowed?), and without "
                         "one no program of a model is run")


def run(program, given):
    """What a program prints, given this standard input; None: it failed, or wanted too much."""
    root = os.geteuid() == 0  # root needs no user namespace, and hands over to nobody inside
    box = ("choom -n 1000 -- "  # (where the machine's memory ends, the box goes first)
           "bwrap --unshare-pid --unshare-net --unshare-ipc --unshare-uts --new-session "
           "--die-with-parent --clearenv --proc /proc --dev /dev --remount-ro /dev "
           f"--perms 1777 --size {2**28} --tmpfs /tmp --chdir /tmp").split()
    box += [] if root else ["--unshare-user", "--cap-drop", "ALL"]
    for path in ("/usr", "/lib", "/lib64", "/bin"):
        box += ["--ro-bind-try", path, path]
    prefix = os.path.realpath(sys.base_prefix)  # (it may stand in a folder that is root's alone)
    box += ["--ro-bind", prefix, "/python", "--remount-ro", "/"]
    box += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all",
            "--no-new-privs"] if root else []
    python = os.path.realpath(sys.executable).replace(prefix, "/python")
    box += ["prlimit", f"--as={MEMORY}", f"--nproc={PROCESSES}", f"--fsize={OUTPUT}", f"--cpu={SECONDS}",
            "--core=0", python, "-I", "-S", "-c", program]
    end = time.monotonic() + SECONDS
    with tempfile.TemporaryFile() as read, tempfile.TemporaryFile() as printed:
        read.write(given.encode(errors="replace"))
        read.seek(0)
        running = subprocess.Popen(box, stdin=read, stdout=printed, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        try:
            while time.monotonic() < end and held(running.pid) < MEMORY:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(0.05)
                    break
        finally:
            running.kill()
        printed.seek(0)
        return None if running.wait() else printed.read(OUTPUT).decode(errors="replace")


def held(box):
    """Bytes that the processes of a box hold; what they share counts for each."""
    import psutil  # (accelerate brings it)
    total = 0
    for process in psutil.Process(box).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            total += process.memory_info().rss
    return total


def passes(code, test):
    """Does the program give what the test expects?"""
    call = CALL.format(function=test.function) if test.function else ""
    program = f"{IMPORTS}exec({code!a})\n{call}"  # (its first line may be one that has to be the first)
    printed = run(program, test.input) if len(program) < 2**17 else None  # (Linux takes no more)
    if printed is None:
        return False
    if test.function:
        try:
            return json.loads(printed.strip().split("\n")[-1]) == json.loads(test.output)
        except (ValueError, RecursionError):
            return False
    return same_lines(printed, test.output)


def same_lines(printed, expected):
    """Compare what was printed line by line, as texts or as numbers, spaces at the ends aside."""
    mine, theirs = ([line.split() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(mine) == len(theirs) and all(a == b or same_numbers(a, b) for a, b in zip(mine, theirs))


def same_numbers(mine, theirs):
    """Are all of these words numbers, and the same ones, to the last digit?"""
    try:
        return [*map(Decimal, mine)] == [*map(Decimal, theirs)]
    except ArithmeticError:
        return False
