"""Chapter 6's command line: what a user may do wrong, what is kept whatever happens, and the display."""
import copy
import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
from conftest import ROOT
from helpers import tiny
from rich.console import Console

from appendix import command, journal, models, products, protocol, screen
from appendix.puzzles import EXAMPLE, Puzzle

generate = import_module("06_generate")
PROGRAM = str(ROOT / "06_generate.py")


def call(main, arguments):
    """main(arguments) as the command line runs it: its exit code."""
    try:
        return command.one_sentence(lambda: main(arguments))
    except SystemExit as ended:
        return ended.code


@pytest.fixture
def small(smollm, monkeypatch):
    """The command line works on a tiny random model at once; returns that model."""
    model = tiny("llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: (model, smollm[1]))
    monkeypatch.setattr(products, "fast_products", lambda model: model)
    return model


WRONG = {
    "layout": (["--layout", "circle"], "layout"), "no workers": (["--workers", "0"], "1 to 16"),
    "17 workers": (["--workers", "17"], "1 to 16"), "twice": (["--workers", "Al", "Bo", "Al"],
                                                              "two workers"),
    "a role": (["--workers", "<|im_end|>"], "not a name"), "empty": (["  "], "empty"),
         "nothing": ([""], "empty"),
    "model": (["--model", "no-such-org/no-such-model"], "model"),
    "gguf": (["--model", "/nowhere/m.gguf"], "GGUF"), "no model": (["--model", ""], "empty"),
    "device": (["--device", "cuda:77"], "device"), "bad device": (["--device", "toaster"], "device"),
    "no device": (["--device", ""], "empty"), "meta": (["--device", "meta"], "device"),
    "passes": (["--max-passes", "0"], "max_passes"), "big": (["--max-passes", str(2**31)], "max_passes"),
    "step": (["--max-step", "3"], "max_step"), "context": (["--context", "0"], "context"),
    "temperature": (["--temperature", "0"], "temperature"), "top-p": (["--top-p", "1.5"], "top_p"),
    "number": (["--max-passes", "many"], "many"), "save": (["--save", "/nowhere/trace.jsonl"],
                                                           "written"),
    "folder": (["--save", "/"], "written"), "no save": (["--save", ""], "empty"),
    "foreign": (["--save", __file__], "name another file"), "option": (["--colour"], "--colour"),
    "prompt": (["--prompt", __file__ + "x"], "cannot be read"),
         "bare": (["--prompt", str(ROOT / "LICENSE")], "{problem}"),
    "view": (["--prompt", str(ROOT / "appendix/protocol.py"), "--layout", "independent"], "{view}"),
    "bell": (["--colour\x07"], "\ufffd"), "attention": (["--attention", "flash"], "attention"),
    "tensor": (["--tensor-parallel"], "torchrun"), "bytes": (["\udcff"], "UTF-8"),
    "triton": (["--device", "cpu", "--attention", "triton"], "needs a GPU"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_sentence(case, capsys, monkeypatch):
    """Exit code 2, one line on standard error that names the fault, before any weights are read."""
    arguments, word = WRONG[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(models, "from_folder", lambda *_, **__: pytest.fail("a model was loaded"))
    before = open(__file__, "rb").read()
    code, captured = call(generate.main, arguments), capsys.readouterr()
    message = captured.err.strip()
    assert code == 2 and word in message, (code, message)
    assert "\n" not in message and "\x07" not in message
    assert not captured.out and open(__file__, "rb").read() == before


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A finished run of the command line with default settings: (process, trace path)."""
    path = tmp_path_factory.mktemp("run") / "trace.jsonl"
    run = subprocess.run([sys.executable, PROGRAM, "--save", str(path), "--max-passes", "60"],
                         capture_output=True,
                         text=True, cwd="/", timeout=300, check=False)
    return run, path


def test_the_command_line_solves_and_saves(saved):
    """The main job, as a user runs it: steps, an answer, the figures, [OK], and a trace that holds it
    all."""
    process, path = saved
    assert process.returncode == 0 and not process.stderr, process.stderr
    assert "[OK] each token" in process.stdout and "Answer:" in process.stdout
    assert "**Alice [1]:**" in process.stdout and "2.00 tokens per pass" in process.stdout
    header, (first, *passes, end), _ = journal.read(path, "trace", screen.ROW)
    assert header["workers"] == ["Alice", "Bob"] and first["context"] == 8192 and first["moves"]
    assert 0 < len(passes) <= 60 and all(len(record["sampled"]) == 2 for record in passes)
    assert end["ending"] in ("passes", "answer") and end["answer"] in process.stdout


def test_a_trace_is_shown_again(saved, capsys, tmp_path):
    """A saved run is shown without any model, word for word; or put into a page."""
    process, path = saved
    assert call(screen.main, [str(path)]) == 0
    assert capsys.readouterr().out.strip() == process.stdout.split("[OK]")[0].strip()
    assert call(screen.main, [str(path), "--html", str(tmp_path / "run.html")]) == 0
    page = (tmp_path / "run.html").read_text()
    assert page.startswith(screen.PAGE)
    assert page.count('"fed": {') == path.read_text().count('"fed": {') > 0 and "**Alice [1]:**" in page
    notes = tmp_path / "notes"
    notes.write_text("my notes")
    for arguments in ([str(path), "--html", str(notes)], [str(path), "--html", str(path)], [str(notes)],
                      ["/nowhere"]):
        assert call(screen.main, arguments) == 2 and capsys.readouterr().err.count("\n") == 1
    assert notes.read_text() == "my notes"


def test_the_live_display_runs_on_a_terminal(saved, tmp_path):
    """In a real terminal (a pty) it draws the problem, the steps and columns, and ends like the plain
    one."""
    fast = tmp_path / "fast.jsonl"
    lines = [json.loads(line) for line in saved[1].read_text().splitlines()]
    for line in lines:
        line.update({"seconds": 0.01} if "seconds" in line else {})
    fast.write_text("".join(json.dumps(line) + "\n" for line in lines))
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen([sys.executable, str(ROOT / "appendix" / "screen.py"), str(fast)],
                               stdout=slave,
                               stderr=slave, env=environment)
    os.close(slave)
    output = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        output += piece
    assert process.wait(60) == 0
    text = output.decode(errors="replace")
    assert "past steps" in text and "╭" in text and "tokens/s" in text and "Solve all of these" in text


def test_sixteen_workers_fit_on_a_narrow_terminal():
    """Too many for columns: everybody still has a line with the end of what they write."""
    console = Console(file=io.StringIO(), width=80, height=40, force_terminal=True)
    start = {"opening": {name: f"words of {name}" for name in protocol.NAMES}, "moves": True,
             "context": 100}
    display = screen.Screen("What is 3 + 4?", start, console=console)
    console.print(display.frame())
    shown = console.file.getvalue()
    assert all(f"words of {name}" in shown for name in protocol.NAMES) and "What is 3 + 4?" in shown


def test_parts_have_colours_and_the_question_is_always_there():
    """A label where somebody claims, answers or checks it, in the colour of its part; not other words.
    Of a problem that does not fit, the beginning is shown."""
    puzzle = Puzzle(random.Random(0), "race", 16)
    console = Console(file=io.StringIO(), width=80, height=30)
    start = {"opening": {"Al": "**Al [1]:** B: 7x5=35. B=35. Check A", "Bo": ""}, "moves": True,
             "context": 100}
    display = screen.Screen(puzzle.text, start, console=console)
    text = display.styled("Al", "**Al [1]:** B: B first. B=35. Check A, A Bob")
    labelled = [(text.plain[span.start:span.end], span.style) for span in text.spans
                if "bold black on" in str(span.style)]
    one, two = (f"bold black on {colour}" for colour in screen.COLOURS[:2])
    assert sorted(labelled) == [("A", one), ("B", two), ("B", two)]
    console.print(display.frame())
    shown = console.file.getvalue()
    assert "One of these has the answer" in shown and "past steps" in shown and "B: 7x5=35" in shown
    assert "P. " not in shown and len(shown.splitlines()) <= 30


def test_who_is_asked_something_else_says_what_it_has_learned(small, capsys):
    """One line on standard error, and only for what the model has not learned."""
    for problem, said in ((EXAMPLE, 0), ("What is the capital of France?", 1)):
        assert call(generate.main, [problem, "--max-passes", "2", "--device", "cpu"]) == 0
        assert capsys.readouterr().err.count("has learned to solve") == said


def test_who_comes_speaks_or_goes_is_shown():
    """A newcomer's header, an outsider's words and a last step, as they stand in the cache."""
    console = Console(file=io.StringIO(), width=80, height=30)
    start = {"opening": {"Al": "**Al [1]:** "}, "moves": True, "context": 9}
    display = screen.Screen("solve", start, console=console)
    record = {"text": {"Bo": "Hi"}, "closed": [], "sampled": {"Bo": 1}, "seconds": 1.0, "in_view": 3}
    events = [["add", "Bo"], ["say", "Eve", "Mind the units."], ["dismiss", "Al"], ["say"], []]
    display.show({**record, "events": events})
    assert display.current == {"Bo": "**Bo [1]:** Hi"}
    assert "**Eve:** Mind the units." in console.file.getvalue()


def test_control_characters_do_not_reach_the_terminal():
    """What a model, a problem or an outsider says cannot command the terminal."""
    console = Console(file=io.StringIO(), width=80, height=30)
    start = {"opening": {"Al": "\x1b[2J"}, "moves": True, "context": 9}
    display = screen.Screen("solve\x1b]0;title\x07", start, console=console)
    record = {"text": {"Al": "\x9b2J\x08"}, "closed": [], "sampled": {"Al": 1}, "seconds": 1.0,
              "in_view": 3,
              "events": [["say", "Eve", "\x1b[31m"]]}
    display.show(record)
    console.print(display.frame())
    display.finish("answer", "\x1b[1m7")
    shown = console.file.getvalue()
    assert "7" in shown and not any(character in shown for character in "\x1b\x07\x08\x9b")


ARGUMENTS = ["--max-passes", "30", "--check-every", "20", "--max-step", "16"]


def rows_of(path):
    """A trace without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_killed_at_any_moment_the_same_command_goes_on(small, tmp_path, capfd):
    """SIGKILL at ten moments, and torn lines: in the end the trace is that of an undisturbed run."""
    assert call(generate.main, [*ARGUMENTS, "--save", str(tmp_path / "calm")]) == 0
    path, kills = tmp_path / "killed", 0
    for attempt in range(40):
        child = os.fork()
        if child == 0:
            os._exit(call(generate.main, [*ARGUMENTS, "--save", str(path)]))
        if kills < 10:
            time.sleep(0.05 + 0.04 * attempt)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        if kills in (3, 7) and path.exists():
            with open(path, "ab") as file:
                file.write(b'{"fed": {"Ali')
    assert os.WEXITSTATUS(status) == 0 and kills > 2
    assert rows_of(path) == rows_of(tmp_path / "calm")
    capfd.readouterr()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_keeps_what_was_computed(small, tmp_path, name, capsys):
    """Ctrl-C in mid-pass, or SIGTERM: exit code 130, every whole pass is kept, and the same command
    goes on."""
    path, calls = tmp_path / "trace", []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 14:
            signal.raise_signal(getattr(signal, name))
    hook = small.model.layers[1].register_forward_pre_hook(interrupt)
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 130
    hook.remove()
    kept = len(rows_of(path)) - 2
    # Two probes, the prompt and the separators; Ctrl-C loses the pass that it falls into.
    assert kept == 14 - 2 - 2 - (name == "SIGINT") and "goes on" in capsys.readouterr().err
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 0
    assert call(generate.main, ["--save", str(tmp_path / "calm"), *ARGUMENTS]) == 0
    assert rows_of(path) == rows_of(tmp_path / "calm")


def test_a_finished_run_goes_further_with_more_passes(small, tmp_path, capsys):
    """The same command shows it again; --max-passes takes it on; other settings, fewer passes:
    refused."""
    path = tmp_path / "trace"
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 0
    first = rows_of(path)
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 0
    assert rows_of(path)[:len(first)] == first
    capsys.readouterr()
    before = path.read_bytes()
    for wrong, word in ((["--seed", "1"], "seed 0, not 1"), (["--max-passes", "9"], "30 passes already"),
                        (["--layout", "contiguous"], "layout"), (["another problem"], "problem")):
        assert call(generate.main, ["--save", str(path), *ARGUMENTS, *wrong]) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1 and path.read_bytes() == before
    longer = ["--max-passes", "44", *ARGUMENTS[2:]]
    assert call(generate.main, ["--save", str(path), *longer]) == 0
    assert call(generate.main, ["--save", str(tmp_path / "calm"), *longer]) == 0
    passes = [[row for row in rows_of(file) if "fed" in row] for file in (path, tmp_path / "calm")]
    assert passes[0] == passes[1] and len(passes[0]) == 44
    small.lm_head.weight[0, 0] += 1
    assert call(generate.main,
                ["--save", str(path), *longer]) == 2 and "other weights" in capsys.readouterr().err


def test_a_full_disk_costs_nothing(small, tmp_path, monkeypatch, capsys):
    """What cannot be written is said once, while the run goes on; the answer is printed, the file has
    whole lines."""
    path, write, count = tmp_path / "trace", os.write, []

    def full(file, data):
        count.append(1)
        if 8 < len(count) < 20 and data.startswith(b'{"fed"'):
            write(file, data[:10])
            raise OSError(28, "No space left on device")
        return write(file, data)
    monkeypatch.setattr(os, "write", full)
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 0
    said = capsys.readouterr()
    assert "Answer:" in said.out and said.err.count("No space left") == 1
    assert len([row for row in rows_of(path) if "fed" in row]) == 30


def test_a_model_that_fails_in_the_middle_keeps_the_passes(smollm, small, tmp_path, monkeypatch, capsys):
    """An error in pass 8: exit code 1, one sentence, and 7 passes in the trace; so for a reader who
    leaves."""
    path, calls = tmp_path / "trace", []

    def fail(*_):
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("the device is on fire")
    hook = small.model.layers[0].register_forward_pre_hook(fail)
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 1
    said = capsys.readouterr().err
    assert "on fire" in said and "pass 8" in said and said.count("\n") == 1
    assert len(rows_of(path)) == 2 + 7
    hook.remove()
    show = screen.Screen.show
    monkeypatch.setattr(screen.Screen, "show", lambda self, r: sys.exit(1) if self.passes
                        == 9 else show(self, r))
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 1 and len(rows_of(path)) == 2 + 10


@pytest.mark.parametrize("edit, words", [
    (lambda rows: rows[4]["sampled"].update(Alice=-1), "does not follow"),
    (lambda rows: rows[4]["sampled"].update(Alice="x"), "damaged"),
    (lambda rows: rows[4]["sampled"].update(Alice=7), "does not follow"),
    (lambda rows: rows[4]["fed"]["Bob"].append(3), "does not follow"),
    (lambda rows: rows[4].update(seconds=None), "damaged"),
                                         (lambda rows: rows[4].update(events=[["fly", "Al"]]), "event"),
    (lambda rows: rows[4].update(events=[["say"]]), "event"),
                                         (lambda rows: rows[4].pop("closed"), "damaged"),
    (lambda rows: rows[1].update(prompt="something else"), "another prompt"),
    (lambda rows: rows.insert(3, rows.pop(9)), "does not follow"),
    (lambda rows: rows[0].update(model="evil/model"), "evil/model"),
                                         (lambda rows: rows[0].pop("seed"), "seed"),
    (lambda rows: rows.__setitem__(2, [1, 2]), "damaged"), (lambda rows: rows[0].update(format="x"),
                                                            "another file")])
def test_an_edited_trace_is_refused_and_stays(small, tmp_path, capsys, edit, words):
    """One sentence, and the file is as it was; no model that a trace names is fetched."""
    path = tmp_path / "trace"
    assert call(generate.main, ["--save", str(path), *ARGUMENTS]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    edit(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    capsys.readouterr()
    code, said = call(generate.main, ["--save", str(path), *ARGUMENTS]), capsys.readouterr().err
    assert code == 2 and words in said and said.count("\n") == 1 and path.read_bytes() == before, said


def test_files_of_others_stay(small, tmp_path, capsys):
    """A link, a file in use, a name that somebody's temporary file might have: nothing is followed or
    removed."""
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    (tmp_path / "trace.part").write_text("mine")
    (tmp_path / "trace.lock").write_text("mine, too")
    assert call(generate.main, ["--save", str(tmp_path / "link"), *ARGUMENTS]) == 2
    assert "link" in capsys.readouterr().err and (tmp_path / "theirs").read_text() == "theirs"
    assert call(generate.main, ["--save", str(tmp_path / "trace"), *ARGUMENTS]) == 0
    assert (tmp_path / "trace.part").read_text() == "mine"
    assert (tmp_path / "trace.lock").read_text() == "mine, too"
    with journal.Journal(tmp_path / "used", "trace", {}, screen.ROW):
        assert call(generate.main, ["--save", str(tmp_path / "used"), *ARGUMENTS]) == 2
    assert "another process" in capsys.readouterr().err


def test_bfloat16_runs_without_avx512(tmp_path):
    """On the instruction set of an ordinary laptop, chapter 6 writes in bfloat16."""
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    run = subprocess.run([sys.executable, PROGRAM, "--dtype", "bfloat16", "--max-passes", "8",
                          "--workers", "3"],
                         capture_output=True, text=True, env=limited, cwd=tmp_path, timeout=300,
                         check=False)
    assert run.returncode == 0 and "[OK]" in run.stdout and not run.stderr, run.stderr


def test_the_card_s_packages_are_enough():
    """Chapters 1 to 6 can be imported without those that load GGUF files, grade or draw."""
    program = ("import sys; sys.path.insert(0, {!r})\n"
               "for name in ('psutil', 'gguf', 'accelerate', 'math_verify', 'datasets', 'matplotlib',\n"
               "             'prompt_toolkit'):\n"
               "    sys.modules[name] = None\n"
               "from importlib import import_module\n"
               "for chapter in {!r}: import_module(chapter)").format(str(ROOT), [
                   "01_rope_shift", "02_shared_cache", "03_layouts", "04_query_rotation",
                   "05_triton_kernel", "06_generate"])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/",
                         check=False,
                         env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stderr


def test_copies_of_settings_are_settings():
    """Settings that were checked once can be changed and are checked again."""
    settings = generate.Settings(workers=["3"])
    assert settings.workers == ["Alice", "Bob", "Carol"] and copy.copy(settings) == settings
    with pytest.raises(ValueError, match="layout"):
        import_module("dataclasses").replace(settings, layout="circle")
