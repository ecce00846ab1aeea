"""Exercises: what a student gets, what counts as done, and the answers to the questions."""
import ast
import contextlib
import io
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import wrong_answers
from conftest import ROOT

from appendix import exercises, solutions

CHAPTERS = [*exercises.FILES]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_exercises_are_what_is_marked(chapter):
    """At least three in each file; the table names them all; ten wrong solutions are known."""
    file, todo = exercises.FILES[chapter]
    found = exercises.functions((ROOT / file).read_text())
    assert {name for name, (_, marked) in found.items() if marked} == {*todo} and len(todo) >= 3
    wrong = wrong_answers.WRONG[chapter]
    assert {*wrong} == {*todo} and sum(map(len, wrong.values())) >= 10
    for exercise in todo.values():
        words = exercise.words.split(" or ")
        tests = exercises.chosen(exercise)
        assert exercise.points >= 1 and exercise.hint and all(
            any(word in test for test in tests) for word in words)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_skeleton_keeps_all_but_the_bodies(chapter):
    """Signatures and docstrings stay; and to put one's own function beside the project's others changes
    that function alone."""
    file, todo = exercises.FILES[chapter]
    own = (ROOT / file).read_text()
    given = exercises.skeleton(own, todo)
    before, after = exercises.functions(own), exercises.functions(given)
    assert [*before] == [*after] or {*after} < {*before}  # (functions inside of functions are bodies)
    for name in todo:
        (old, _), (new, marked) = before[name], after[name]
        assert ast.unparse(new.args) == ast.unparse(old.args) and marked
        assert ast.get_docstring(new) == ast.get_docstring(old)
        assert ast.unparse(new.body[-1]) == "raise NotImplementedError"
        assert exercises.beside(own, given, name) == exercises.skeleton(own, {name: todo[name]})
        assert exercises.beside(own, own, name) == own


def faults(file, text, exercise):
    """What is wrong with a text: lines, or none."""
    return exercises.wrong(exercises.ran(file, text, exercise), exercise)


def check(folder, chapter="1"):
    """What `--check` of a chapter prints, and its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = exercises.main([chapter, str(folder), "--check"])
    return code, said.getvalue()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_has_not_been_begun_has_no_points(chapter, tmp_path, monkeypatch, capsys):
    """The skeleton of each chapter: nothing for any function, and no test is run for that. What can be
    run is said, with the interpreter that has what it needs."""
    file, todo = exercises.FILES[chapter]
    assert exercises.main([chapter, str(tmp_path)]) == 0
    path = tmp_path / file.split("/")[-1]
    assert (f"PYTHONPATH=. {sys.executable} {path}" in capsys.readouterr().out) == chapter.isdigit()
    monkeypatch.setattr(exercises, "ran", None)
    code, said = check(tmp_path, chapter)
    assert code == 1 and said.count("not begun") == len(todo)
    assert f"\n0 of {sum(exercise.points for exercise in todo.values())} points" in said
    path.write_text(path.read_text().replace("raise NotImplementedError", ""))  # docstrings alone
    with pytest.raises(TypeError):  # that counts as begun
        check(tmp_path, chapter)


def test_only_the_students_file_is_tested(tmp_path, monkeypatch):
    """Chapter 1: all points for the project's own; of a file in which one function is right and the
    others are missing or wrong, that one counts, and what is wrong is shown."""
    assert exercises.main(["1", str(tmp_path)]) == 0
    mine, own = tmp_path / "01_rope_shift.py", (ROOT / "01_rope_shift.py").read_text()
    with pytest.raises(ValueError, match="there already"):
        exercises.main(["1", str(tmp_path)])
    mine.write_text(own)
    code, said = check(tmp_path)
    assert code == 0 and "8 of 8 points" in said
    file, todo = exercises.FILES["1"]
    some = {name: todo[name] for name in ("cos_sin", "rotate")}
    monkeypatch.setitem(exercises.FILES, "1", (file, some))
    wrong, new = wrong_answers.WRONG["1"]["rotate"][0]
    mine.write_text(own.replace(wrong, new))
    code, said = check(tmp_path)
    assert code == 1 and "cos_sin                   1 of  1   passed" in said and "1 of 3 points" in said
    assert "not yet" in said and "assert" in said
    mine.write_text(own.replace("def rotate(", "def turn("))
    assert "there is no such function" in check(tmp_path)[1]


def test_the_projects_own_chapter_has_all_points(tmp_path):
    """Chapter 3, function by function."""
    (tmp_path / "03_layouts.py").write_text((ROOT / "03_layouts.py").read_text())
    code, said = check(tmp_path, "3")
    assert code == 0 and "\n7 of 7 points" in said, said


def test_a_counterexample_says_what_differs():
    """Queries that turn the wrong way: which function, by how much, and a small case with its names."""
    file, todo = exercises.FILES["4"]
    right, new = wrong_answers.WRONG["4"]["attention"][0]
    said = "\n".join(faults(file, (ROOT / file).read_text().replace(right, new), todo["attention"]))
    assert re.search(r"attention is off by \S+ \(mean \S+\), views \[\[", said)
    assert "Falsifying example" in said and re.search(r"case=Case\(seed=\d+, new=\[", said)
    assert "0x" not in said and "= tensor(" not in said and "<built-in" not in said


@pytest.mark.parametrize("arguments, text, words", [
    (["9", "mine"], None, "there is no chapter '9'"), (["1", "."], None, "is the project's own"),
    (["1", "mine", "--check"], None, "the chapter 'mine/01_rope_shift.py' cannot be read"),
    (["1", "mine", "--check"], "def f(:", "is no Python: line 1"),
    (["1", "mine", "--check"], "def f():\n    pass\nreturn 1", "line 3, 'return' outside function")])
def test_what_cannot_be_checked_is_refused(arguments, text, words, tmp_path):
    """In one sentence, exit code 2."""
    if text:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "01_rope_shift.py").write_text(text)
    where = ROOT if "." in arguments else tmp_path
    command = [sys.executable, str(ROOT / "appendix" / "exercises.py"), *arguments]
    run = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("waits", [False, True])
def test_what_never_ends_is_not_right(monkeypatch, waits):
    """A test that computes for too long says so, and so does one that waits."""
    monkeypatch.setattr(exercises, "LIMIT", 1)
    file, todo = exercises.FILES["1"]
    text = (ROOT / file).read_text()
    if waits:
        monkeypatch.setattr(exercises.resource, "setrlimit", lambda *_: None)
        text += "import time\ntime.sleep(1000)\n"
    said, = faults(file, text, todo["rotate"])
    assert "never end" in said


def test_what_a_process_says_is_made_short():
    """A crash is called one; of a comparison, what is seen of tensors and functions is left out."""
    exercise = exercises.FILES["1"][1]["rotate"]

    def says(code, *lines):
        stdout = "\n".join(f"E   {line}" for line in lines)
        return exercises.wrong(SimpleNamespace(returncode=code, stdout=stdout, stderr=""), exercise)
    assert says(-signal.SIGSEGV) == ["SIGSEGV: Python crashed in its tests"]
    assert "never end" in says(-signal.SIGXCPU)[0]
    assert says(1, "assert 3 == 4", " +  where <built-in method abs of Tensor> = (tensor([[-0.2",
                " +  and   tensor(0.5) = max()", " +  where 3 = f(2)") == [
                    "assert 3 == 4", " +  where 3 = f(2)"]


def test_after_an_interrupt_nothing_is_begun(monkeypatch):
    """What still waits to be tested is not."""
    begun = []

    def ran(*what):
        begun.append(what)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.5)
    monkeypatch.setattr(exercises, "ran", ran)
    file, todo = exercises.FILES["2"]
    with pytest.raises(KeyboardInterrupt):
        exercises.check(file, todo, (ROOT / file).read_text())
    assert len(begun) < len(todo)


def test_only_line_ends_end_lines():
    """Form feeds and the like may stand in a student's file: to Python, they are no ends of lines."""
    own = (ROOT / "01_rope_shift.py").read_text()
    right = own.replace("\ndef layer_ropes", "\f\ndef layer_ropes").replace("Chapter 1", "\u2028 1")
    assert exercises.beside(own, right.replace("angles = ", "angles = 2 * "), "rotate") == right


def test_a_copy_has_what_the_tests_need():
    """The words of chapter 6, whose tests load a tokenizer: right is right, wrong is wrong."""
    file, todo = exercises.FILES["6"]
    own = (ROOT / file).read_text()
    assert faults(file, own, todo["Hogwild.schedule_checks"]) == []
    said = faults(file, own.replace("checks_due += 1", "checks_due = 1"),
                  todo["Hogwild.schedule_checks"])
    assert said[0].startswith("test_two_checks_for_one_worker_are_two: ")


@pytest.mark.parametrize("number", [number for number in solutions.ANSWERS if number[0] in "1234"])
def test_questions_are_answered(number, capsys):
    """Each by a measurement, which has to come out as the answer says; and it stands in solutions.md."""
    solutions.ANSWERS[number]()
    assert capsys.readouterr().out
    answer = " ".join(solutions.ANSWERS[number].__doc__.split())
    assert f"## {number}\n\n{answer}\n" in (ROOT / "appendix" / "solutions.md").read_text()


def test_the_readme_counts_right():
    """How many functions are marked."""
    count = sum(len(todo) for _, todo in exercises.FILES.values())
    assert f"({count} of them" in (ROOT / "README.md").read_text()


def test_every_question_has_an_answer():
    """What the ends of the chapters ask."""
    for chapter, (file, _) in exercises.FILES.items():
        path = ROOT / (file if chapter != "recording" else "appendix/encode_run.py")
        asked = path.read_text().split("answer by measuring:\n")[1].split("\nif __name__")[0]
        numbers = [line[2] for line in asked.splitlines() if line[2:4] in ("1.", "2.", "3.")]
        assert [f"{chapter}.{n}" for n in numbers] == [
            name for name in solutions.ANSWERS if name.rsplit(".", 1)[0] == chapter]
