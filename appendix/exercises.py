r"""Appendix: rebuild a chapter, function by function, and be checked.

    make exercise CHAPTER=3 DIR=mine     writes mine/03_layouts.py: the bodies that matter are missing
    make check CHAPTER=3 DIR=mine        tests what you wrote; says what is wrong with it, and the points

What is to be written is marked in the chapters, with `# exercise` behind the head of a function. So the
exercise and its solution are one file.

A check copies the project to a folder of its own, with your file in the place of the chapter, and runs
the tests that concern a function there. Of the other marked functions, the copy has the project's own:
each of yours counts for itself, in any order. (Run directly, your file imports whatever chapters lie
beside it, finished or not.) What has not been begun is not tested.
"""
import ast
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from appendix import command  # noqa: E402
from appendix.command import option  # noqa: E402

MARK = "# exercise"
LIMIT = 150  # seconds of computing for the tests of a function: more means that something never ends
LINES = 14  # of what a test says, so many are shown
EMPTY = "raise NotImplementedError"  # what an exercise has instead of a body
# A plugin of pytest for the copies: a counterexample is made smaller for so many seconds.
SMALLER = """
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import engine
engine.MAX_SHRINKING_SECONDS = 8
settings.register_profile("check", phases=[Phase.explicit, Phase.generate, Phase.shrink], database=None,
                          deadline=None, report_multiple_bugs=False, derandomize=True)
settings.load_profile("check")
"""


# points: one for ten minutes. test, words: what tests check it, simple ones first. hint: text.
E = namedtuple("Exercise", "points test words hint")

FILES = {  # what CHAPTER may be -> the file, and what is marked in it
    "1": ("01_rope_shift.py", {
        "inverse_frequencies": E(4, "01_rope_shift", "models_own or cannot_be_moved",
            "Take the model's float32 numbers, 1 / theta ** (2i/R), then .double(). What there is to "
            "read: rope_parameters (of the layer type, if they are nested), head_dim, "
            "partial_rotary_factor; a config with qk_rope_head_dim rotates last. Other kinds: "
            "ROPE_INIT_FUNCTIONS[kind](config, layer_type=...)."),
        "cos_sin": E(1, "01_rope_shift", "angles_are_exact",
            "Multiply in float64, and round at the very end."),
        "rotate": E(2, "01_rope_shift", "by_hand or complex_multiplication",
            "Split, turn the two halves, and put all together as it was. Mind that x may be broadcast "
            "against several angles."),
        "shift": E(1, "01_rope_shift", "shifts_compose or distance_alone or shifted_keys",
            "Two calls of what is above. In which dtype is the arithmetic?")}),
    "2": ("02_shared_cache.py", {
        "SharedCache.discard": E(3, "02_shared_cache", "Memory",
            "Sort the free ranges, and join neighbours."),
        "SharedCache.reserve": E(2, "02_shared_cache", "Memory",
            "First look for room in all blocks; only then change one."),
        "SharedCache.copy": E(3, "02_shared_cache", "own_end or moved_block or Memory",
            "By how many positions does index j move? Do values know where they are?"),
        "SharedCache.rewound": E(2, "02_shared_cache", "Memory",
            "How long was a block that was not there?"),
        "SharedCache.write": E(1, "02_shared_cache", "one_copy or Memory",
            "Make the memory when a layer first writes, in the dtype and on the device of that.")}),
    "3": ("03_layouts.py", {
        "combined": E(1, "03_layouts", "of_the_paper",
            "Mind the worker who is alone: which words does `separators` leave out?"),
        "Layout.final_view": E(1, "03_layouts", "final_view",
            "Two of the four functions above show all. Which of them needs words that may be lacking?"),
        "occurrences": E(1, "03_layouts", "twice_by_hand or any_views",
            "Count how often each came so far."),
        "fill_tables": E(4, "03_layouts", "by_hand or any_views or of_a_layout",
            "Walk through a view with a running place, 0 where the own block begins: from where on?")}),
    "4": ("04_query_rotation.py", {
        "attention_spec": E(3, "04_query_rotation", "both_functions or half",
            "Token by token: slots, moved by how much, at which distance? Scores, softmax, a sum."),
        "attention": E(6, "04_query_rotation", "both_functions or half_precision or gradients_equal",
            "`prepare` has done the bookkeeping. Rotate the queries once per row of the tables, "
            "multiply each with that row's keys, put scores side by side, hide, one softmax."),
        "first_slots": E(1, "04_query_rotation", "both_functions or layers_of_every_kind",
            "distance = position + offset - slot < window; solve for the slot."),
        "visible_rows": E(3, "04_query_rotation", "both_functions or nobody_reads",
            "For each row: from which slot to which is it seen, and what of that does a token not see?"),
        "run_by_run": E(1, "04_query_rotation", "several_runs", "Cut q by the tokens of each run.")}),
    "5": ("05_triton_kernel.py", {
        "kernel": E(12, "05_triton_kernel", "hidden_blocks or of_a_batch or half",
            "Read `prepare` first. Write it for one row of the tables; let the loop cross rows last."),
        "merge": E(3, "05_triton_kernel", "hidden_blocks or of_a_batch",
            "Parts whose peak is lower fade by 2 ** (peak - highest): totals and results."),
        "prepare": E(5, "05_triton_kernel", "of_a_batch",
            "Cumulative sums of tiles, and counters that go on from run to run."),
        "Decoder.launch": E(3, "05_captured_passes", "chapter_4s_forward",
            "All integers of a pass in one tensor that stays where it is; arguments are views of it.")}),
    "6": ("06_generate.py", {
        "feed": E(2, "06_generate", "nan or independent_workers or eight_runs",
            "Reserve, tables, forward; and nothing has happened if any of them fails."),
        "Hogwild.is_over": E(2, "06_words", "long_step or everybody_sees",
            "Three reasons; two of them only where finished steps move."),
        "Hogwild.close_step": E(4, "06_words", "two_views or everybody_sees or long_step",
            "The token that ended the step is not fed yet: it opens the next one, before the header."),
        "Hogwild.schedule_checks": E(2, "06_words", "two_checks or everybody_sees",
            "How many multiples of `every` were passed just now? For each, ask somebody at work."),
        "Hogwild.concluding": E(4, "06_generate", "its_brace or last_workers or disturbs_nothing",
            "A loop that yields what is to be fed and gets logits; `finally:` cuts the blocks back.")}),
    "7": ("07_eval_limo.py", {
        "evaluate": E(5, "07_eval_limo", "budget or every_method or beyond",
            "Advance each run, count, ask where a budget is reached; later ones get the last answer."),
        "method": E(2, "07_eval_limo", "every_method",
            "What stands behind a colon is the number of workers."),
        "runs_of": E(2, "07_eval_limo", "every_method or skeleton_of_thought",
            "A class is one run; a function is called, and says itself which runs there are.")}),
    "recording": ("appendix/recording.py", {
        "Ledger.recording": E(5, "encode_run", "says_what or logits_of_all or picture",
            "Give each step its own place, and put the columns of all passes side by side."),
        "Ledger.fill": E(2, "restored_runs", "nothing_had_happened",
            "A step that is not its block's first has moved by what stands before it."),
        "pieces_of": E(2, "encode_run", "no_piece or logits_of_all or see_each_other",
            "Cut both tables by columns, and leave out rows that a piece does not see."),
        "loss": E(1, "encode_run", "plain_training or gradients_of_a_team or refused",
            "A weighted mean.")})}


# ------------------------------------------------------------------------------ a chapter as an exercise

def functions(source):
    """{qualified name: (its node, whether it is marked)} of all functions in Python source.

    Raises:
        SyntaxError: it is no Python.
    """
    found, lines = {}, source.split("\n")

    def visit(node, names):
        for child in ast.iter_child_nodes(node):
            inner = [*names, child.name] if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else names
            if isinstance(child, ast.FunctionDef):
                head = lines[child.lineno - 1:child.body[0].lineno - 1]
                found[".".join(inner)] = child, any(line.endswith(MARK) for line in head)
            visit(child, inner)
    visit(ast.parse(source), [])
    return found


def body(node):
    """The statements of a function behind its docstring."""
    return node.body[1:] if ast.get_docstring(node) else node.body


def replaced(source, spans):
    """Source with other lines. spans: (first line, last line, text), numbers as of the source."""
    lines = source.split("\n")
    for first, last, text in sorted(spans, reverse=True):
        lines[first - 1:last] = [text]
    return "\n".join(lines)


def skeleton(source, exercises):
    """The chapter without the bodies of these exercises: docstrings stay."""
    spans = []
    for name, (node, _) in functions(source).items():
        if name in exercises:
            first = body(node)[0]
            indent = " " * first.col_offset
            hint = re.sub(r"(.{1,80})(?: |$)", rf"{indent}# \1\n", f"Hint: {exercises[name].hint}")
            spans.append((first.lineno, node.end_lineno, f"{hint}{indent}{EMPTY}"))
    return replaced(source, spans)


def beside(own, theirs, name):
    """Their source, but of all marked functions except `name` it has our own."""
    ours, lines, spans = functions(own), own.split("\n"), []
    given = functions(theirs)
    for other, (node, marked) in ours.items():
        if marked and other != name and other in given:
            there = given[other][0]
            text = "\n".join(lines[node.lineno - 1:node.end_lineno])
            spans.append((there.lineno, there.end_lineno, text))
    return replaced(theirs, spans)


# ------------------------------------------------------------------------------------------- the check

def copied(folder):
    """Copy what tests need of the project."""
    for path in [*ROOT.glob("0*.py"), ROOT / "pyproject.toml", ROOT / "requirements-model.txt"]:
        shutil.copy(path, folder)
    for name in ("appendix", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def chosen(exercise):
    """Arguments of pytest: the tests that check this exercise, the simplest first."""
    file = f"tests/test_{exercise.test}.py"
    names = re.findall(r"^(?:def (test_\w+)|(Test\w+) =)", (ROOT / file).read_text(), re.MULTILINE)
    return [f"{file}::{a or b}" for word in exercise.words.split(" or ") for a, b in names
            if word in a + b]


def ran(file, text, exercise):
    """Run the tests of an exercise, with this text in the file. Returns the finished process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        (folder / file).write_text(text)
        (folder / "smaller.py").write_text(SMALLER)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p",
             "smaller", *chosen(exercise)], cwd=folder, capture_output=True, text=True, check=False,
            preexec_fn=lambda: (resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT)),
                                signal.alarm(2 * LIMIT)))


def wrong(run, exercise):
    """What such a process says is wrong: lines, or none."""
    if run.returncode == 0:
        return []
    if run.returncode < 0:
        name = signal.Signals(-run.returncode).name
        return [f"its tests have computed for {LIMIT} seconds, or waited: does something never end?"
                if name in ("SIGXCPU", "SIGKILL", "SIGALRM") else f"{name}: Python crashed in its tests"]
    test = re.search(r"^_+ (?:\w+\.)?(\w+)", run.stdout, re.MULTILINE)
    says = [line[4:] for line in run.stdout.splitlines() if line.startswith("E   ")
            and not re.search("Full output truncated|Use -v to get|\\+ +(where|and) .*(<|tensor)", line)]
    says = says or (run.stdout + run.stderr).strip().splitlines()[-3:]
    known = functions((ROOT / f"tests/test_{exercise.test}.py").read_text()).get(test and test[1])
    expected = [f"{test[1]}: {ast.get_docstring(known[0])}".split("\n\n")[0]] if known else []
    return [*"\n".join(expected).splitlines(), *says[:LINES]]


def check(file, exercises, theirs):
    """Test what they wrote, print what came out; returns how many points are missing."""
    own, got, given = (ROOT / file).read_text(), 0, functions(theirs)
    pool = ThreadPoolExecutor(2)
    try:
        runs = {name: pool.submit(ran, file, beside(own, theirs, name), exercise)
                for name, exercise in exercises.items() if name in given
                and ast.unparse(body(given[name][0])[:1]).strip() != EMPTY}
        for name, exercise in exercises.items():
            lines, outcome = [], "not begun" if name in given else "there is no such function there"
            if name in runs:
                lines = wrong(runs[name].result(), exercise)
                outcome = "not yet" if lines else "passed"
            points = exercise.points * (outcome == "passed")
            got += points
            print(f"{name:24} {points:2} of {exercise.points:2}   {outcome}", flush=True)
            for line in lines:
                print(f"    {command.plain(line)}")
    finally:  # also after Ctrl-C: what waits in the queue is not begun
        pool.shutdown(cancel_futures=True)
    most = sum(exercise.points for exercise in exercises.values())
    print(f"\n{got} of {most} points")
    return most - got


@dataclass
class Options:
    """What is done."""

    check: bool = option(False, "test the file, rather than write it")


def main(argv=None):
    """Run the command line; returns the exit code: 0 if all is done."""
    parser = command.Parser(Options, description=__doc__.split("\n")[0])
    parser.add_argument("chapter", help=", ".join(FILES))
    parser.add_argument("folder", help="where your file is")
    options, rest = parser.read(argv)
    if rest.chapter not in FILES:
        raise ValueError(f"there is no chapter {rest.chapter!r}; choose one of {', '.join(FILES)}")
    file, exercises = FILES[rest.chapter]
    path = Path(rest.folder) / Path(file).name
    if path.resolve() == (ROOT / file).resolve():
        raise ValueError(f"{str(path)!r} is the project's own; name a folder of yours")
    if options.check:
        theirs = command.read_text(path, "chapter")
        try:
            compile(theirs, path, "exec")
        except SyntaxError as error:
            raise ValueError(f"{str(path)!r} is no Python: line {error.lineno}, {error.msg}") from None
        return 1 if check(file, exercises, theirs) else 0
    if path.exists():
        raise ValueError(f"{str(path)!r} is there already, and may be your work: name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(skeleton((ROOT / file).read_text(), exercises), encoding="utf-8")
    print(f"{path}: what is missing there is {', '.join(exercises)}. (Imports that nothing uses are for "
          "that.)\n"
          + f"Run it, with your chapters beside it: PYTHONPATH=. {sys.executable} {path}\n"
          * (path.name == file) +  # (the encoder of recorded runs shows nothing by itself)
          f"Be checked: make check CHAPTER={rest.chapter} DIR={rest.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
