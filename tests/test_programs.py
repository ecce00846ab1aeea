"""Programs of a model in their box: what is right passes, and nothing gets out, or goes on for ever."""
import base64
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appendix import programs, tasks

boxed = pytest.mark.skipif(not shutil.which("bwrap"), reason="apt install bubblewrap")
ADD = "print(sum(map(int, input().split())))"


@boxed
@pytest.mark.parametrize("code, given, wanted, right", [
    (ADD, "1 2", "3\n", True), (ADD, "1 2", "4", False), (ADD, "x", "3", False),
    (ADD, "1 2", "3.0", True), (ADD, "9007199254740992 1", "9007199254740992", False),
    ("print('1e3', '1e-400')", "", "1000 0", False), ("print('sNaN')", "", "1", False),
    ("from __future__ import annotations\n" + ADD, "1 2", "3", True),
    (f"{ADD}\nif __name__ == '__main__': print(__doc__)", "1 2", "3\nNone", True),
    (f"{ADD}  # \0", "1 2", "3", False), (f"{ADD}  # \ud800", "1 2", "3", False),
    (f"{ADD}  # {'x' * 2**16}", "1 2", "3", True), (f"{ADD}  # {'x' * 2**17}", "1 2", "3", False),
    (f"{ADD}\nexit()\nprint(1)", "1 2", "3", True), (f"{ADD}\nquit(0)", "1 2", "3", True),
    (f"def main():\n    {ADD}\n    exit(0)\nmain()", "1 2", "3", True),
    (f"{ADD}\nexit(1)", "1 2", "3", False), (ADD, "1 2 \ud800", "3", False),
    ("print(1)\nprint(2)", "", "1\n2", True), ("print(1, 2)", "", "1\n2", False),
    ("print('1 ')\nprint()", "", "1", True), ("import sys\nsys.exit(3)", "", "", False),
    ("print('a b', pow(2, 10, 7))", "",
     "a b 2", True), ("print(0.1 + 0.2)", "", "0.30000000000000004", True),
    ("for line in stdin: print(line.strip()[::-1])", "ab\ncd", "ba\ndc", True),
    ("for line in sys.stdin: print(line.strip()[::-1])", "ab\ncd", "ba\ndc", True)])
def test_a_program_reads_and_prints(code, given, wanted, right):
    """Compared line by line, as numbers where they are numbers."""
    assert programs.passes(code, programs.Test(given, wanted)) == right


@boxed
@pytest.mark.parametrize("code, given, wanted, right", [
    ("class Solution:\n    def add(self, a, b): return a + b", "3\n4", "7", True),
    ("class Solution:\n    def add(self, a, b): return a - b", "3\n4", "7", False),
    ("def add(a: List[int], b): return [x + b for x in a]", "[1, 2]\n4", "[5, 6]", True),
    ("def add(a, b): return (a, b)", "1\n2", "[1, 2]", True),
    ("def other(a): return a", "1", "1", False),
    ("def add(a): return len(a)", '"\u2028\x85"', "2", True),
    ("def add(a, b):\n    print(a)\n    return b", '"\u2029"\r\n4\n\n', "4", True),
    ("from __future__ import annotations\ndef add(a: Unknown): return a", "1", "1", True),
    ("import os\nprint('[' * 10**5, flush=True)\nos._exit(0)", "1", "1", False),
    ("def add(a):\n    print('noise')\n    return a", "1", "1", True)])
def test_a_function_is_called_with_json(code, given, wanted, right):
    """A method of Solution, or a function."""
    assert programs.passes(code, programs.Test(given, wanted, "add")) == right


@boxed
@pytest.mark.parametrize("code, wanted", [
    ("print(ascii_lowercase[:3], string.digits)", "abc 0123456789"),
    ("print(datetime.datetime(2024, 8, 1) - datetime.datetime(2024, 7, 31), timedelta(1))",
     "1 day, 0:00:00 1 day, 0:00:00"),
    ("x = [[1]]\nprint(deepcopy(x), copy.copy(x), dumps(x), json.dumps(x))", "[[1]] [[1]] [[1]] [[1]]"),
    ("print(gcd(4, 6), math.sqrt(4), mean([1, 2]), statistics.median([1]))", "2 2.0 1.5 1"),
    ("x = [2]\nheappush(x, 1)\nheapq.heappop(x)\nprint(x, bisect_left(x, 3), bisect.bisect(x, 2))",
     "[2] 1 1"),
    ("print(randint(1, 1), random.choice([2]), findall('a', 'aba'), re.sub('b', 'c', 'b'))",
     "1 2 ['a', 'a'] c"),
    ("print(Counter('aa')['a'], collections.deque([1])[0], reduce(mul, [2, 3]), operator.add(1, 2))",
     "2 1 6 3"),
    ("print(functools.reduce(add, [1]), *accumulate([1, 2]), *itertools.chain([3]))", "1 1 3 3"),
    ("print(StringIO('4').read(), io.StringIO('5').read(), List[int], maxsize == sys.maxsize)",
     "4 5 typing.List[int] True"),
    ("import builtins\nprint([name for name in dir(builtins) if name[0] != '_' and name in globals()\n"
     "       and getattr(builtins, name) is not globals()[name]], pow(2, 3, 5), open is io.open)",
     "[] 3 True"),
    ("def f(n): return n and 1 + f(n - 1)\nprint(f(9999))", "9999")])
def test_names_of_livecodebench_are_there(code, wanted):
    """Those of its modules, and the modules; builtins are what they always are."""
    assert programs.passes(code, programs.Test("", wanted))


@boxed
def test_much_input_that_is_read_late():
    """More than a pipe takes, long after the first look at the box."""
    code = "time = __import__('time')\ntime.sleep(0.3)\nprint(len(stdin.read()))"
    assert programs.passes(code, programs.Test("x" * 10**6, "1000000"))


@boxed
def test_python_may_stand_behind_a_link(tmp_path, monkeypatch):
    """As uv's does."""
    (tmp_path / "python").symlink_to(os.path.realpath(sys.base_prefix))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "python"))
    assert programs.run("print(1)", "") == "1\n"


@boxed
@pytest.mark.parametrize("many, printed", [(1, "1000"), (8, None)])
def test_memory_is_that_of_all_together(monkeypatch, many, printed):
    """What each process may have, all may not; and they are the first to go where the machine has none
    left."""
    monkeypatch.setattr(programs, "MEMORY", 2**28)
    code = (f"import os, time\nfor _ in range({many}):\n    if os.fork() == 0:\n"
            "        x = b'x' * 2**26\n        time.sleep(9)\n"
            f"time.sleep({1 + many // 3})\n"
            "print(open('/proc/self/oom_score_adj').read().strip(), end='')")
    assert programs.run(code, "") == printed


def test_who_has_ended_holds_nothing(monkeypatch):
    """Also when it ends between being found and being asked."""
    psutil = pytest.importorskip("psutil")
    ended = subprocess.Popen(["true"])
    gone = psutil.Process(ended.pid)
    ended.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [gone, psutil.Process()])
    assert programs.held(os.getpid()) > 2**20


@pytest.fixture
def quick(monkeypatch):
    """Small boxes that last a second."""
    monkeypatch.setattr(programs, "SECONDS", 1)
    monkeypatch.setattr(programs, "MEMORY", 2**29)


def processes(mark):
    """The processes that were started with these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # (it has ended meanwhile)
            found += [path] if mark.encode() in path.read_bytes() else []
    return found


HOSTILE = {
    "an endless loop": "while True: pass",
    "a sleep": "import time; time.sleep(99)",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "children that stay": "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(99)",
    "endless output": "import sys\nwhile True: sys.stdout.write('x' * 2**20)",
    "much memory": "x = bytearray(2**36)",
    "memory of many": "import os, time\nfor _ in range(12):\n"
                      "    if os.fork() == 0: x = b'x' * 2**26; time.sleep(9)\ntime.sleep(0.9)",
    "files without end": "n = 0\nwhile True:\n    n += 1; open(f'{n}', 'w').write('x' * 2**20)",
    "deep recursion": "def f(): return f()\nf()",
    "killing the parent": "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
}


@boxed
@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_goes_on_for_ever(quick, what):
    """It ends within a few seconds, fails, and leaves no process behind."""
    mark, begin = uuid.uuid4().hex, time.perf_counter()
    assert programs.run(f"mark = {mark!r}\n{HOSTILE[what]}", "") is None
    assert time.perf_counter() - begin < 6
    while processes(mark) and time.perf_counter() - begin < 9:
        time.sleep(0.1)  # the kernel ends them one by one
    assert not processes(mark)


@boxed
def test_processes_are_found():
    """What the test above looks for is there while a program runs."""
    mark = uuid.uuid4().hex
    with ThreadPoolExecutor() as pool:
        pool.submit(programs.run, f"mark = {mark!r}\nimport time; time.sleep(1)", "")
        time.sleep(0.6)
        assert processes(mark)


@boxed
def test_nothing_gets_out(tmp_path):
    """No file of ours can be seen or changed, no network, nothing of our environment."""
    secret = tmp_path / "tests.jsonl"
    secret.write_text("42")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    os.environ["HOGWILD_TEST_SECRET"] = "7"
    seen = programs.run(f"""
import os, socket
found = []
for what in (lambda: open({str(secret)!r}).read(), lambda: open({str(secret)!r}, "w").write("0"),
             lambda: os.listdir({str(tmp_path)!r}), lambda: os.remove({__file__!r}),
             lambda: open("/usr/x", "w"), lambda: open("/x", "w"), lambda: open("/etc/passwd").read(),
             lambda: socket.create_connection(("127.0.0.1", 22), 1),
             lambda: os.environ["HOGWILD_TEST_SECRET"]):
    try:
        found.append(what())
    except (OSError, KeyError):
        pass
print(found, [name for name in os.listdir("/proc") if name.isdigit()].__len__() < 6, os.getuid() != 0)
""", "")
    del os.environ["HOGWILD_TEST_SECRET"]
    assert seen == "[] True True\n" and secret.read_text() == "42" and os.path.exists(__file__)


def row(private, tests=(), kind="stdin", **others):
    """A row as LiveCodeBench has it."""
    one = [{"input": "1 2", "output": "3", "testtype": kind}]
    return {"public_test_cases": json.dumps(one), "private_test_cases": private, "metadata": "{}",
            "contest_date": "2024-09-01T00:00:00", "starter_code": "", "question_content": "Add.",
            **others}


def packed(content):
    """Private tests as they are stored."""
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def test_tests_are_read_and_nothing_is_executed(tmp_path):
    """Plain or packed; a pickle that wants to run something is refused, and does not run."""
    more = json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}])
    for private in (more, packed(more)):
        assert programs.tests_of(row(private)) == [programs.Test("1 2", "3"), programs.Test("3 4", "7")]
    functional = programs.tests_of(row("[]", kind="functional", metadata='{"func_name": "add"}'))
    assert functional == [programs.Test("1 2", "3", "add")]

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    for wrong in (packed(Trap()), "nonsense", packed([1]), packed("[{}]"), None, "[1]",
                  '[{"input": "1", "output": 3, "testtype": "stdin"}]', base64.b64encode(b"x").decode()):
        with pytest.raises(ValueError, match="tests that can be read"):
            programs.tests_of(row(wrong))
    assert not (tmp_path / "sprung").exists()


def test_a_row_without_tests_is_refused(tmp_path):
    """Or any program would pass them all."""
    with pytest.raises(ValueError, match="each test has to have.*, and there has to be one"):
        programs.tests_of(row("[]", public_test_cases="[]"))
    (tmp_path / "data.jsonl").write_text(json.dumps(row("[]", public_test_cases="[]")))
    with pytest.raises(ValueError, match="line 1 of .* lacks tests that can be read"):
        tasks.load("livecodebench", str(tmp_path / "data.jsonl"))


def test_problems_are_those_of_the_papers_months():
    """August 2024 to January 2025; starter code is shown, and calls a function."""
    assert tasks.live_code(row("[]", contest_date="2024-07-31T23:00:00")) is None
    assert tasks.live_code(row("[]", contest_date="2025-02-01")) is None
    assert "standard input" in tasks.live_code(row("[]"))["question"]
    problem = tasks.live_code(row("[]", starter_code="class Solution:\n    def add(self):"))
    assert "```python\nclass Solution:\n    def add(self):\n```" in problem["question"]
    assert "standard input" not in problem["question"]


def test_no_problem_of_these_months_is_no_evaluation(tmp_path):
    """A file of other months is refused, in a sentence that names them."""
    (tmp_path / "old.jsonl").write_text(json.dumps(row("[]", contest_date="2023-07-31")))
    with pytest.raises(ValueError, match="'livecodebench' takes 1 .* months.*, and there are only 0"):
        tasks.load("livecodebench", str(tmp_path / "old.jsonl"))


def test_without_a_box_nothing_is_run(monkeypatch):
    """One sentence says what is missing."""
    monkeypatch.setattr(programs.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="apt install bubblewrap"):
        programs.check()
    monkeypatch.undo()
    monkeypatch.setattr(programs.shutil, "which", lambda _: "/usr/bin/bwrap")
    monkeypatch.setattr(programs, "run", lambda *_: None)
    with pytest.raises(ValueError, match="cannot make a box"):
        programs.check()
