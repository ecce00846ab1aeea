"""Problems and grading: the answers in the file, a person's judgement, and what dress never changes."""
import json
import signal
from fractions import Fraction
from importlib import import_module
from itertools import chain, product
from time import sleep

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify import grader, parser

from appendix import programs, tasks

FIVE = ["18", "3", "70000", "540", "20"]


def test_the_answers_in_the_file_are_right():
    """Found by trying everything."""
    pays = sum(a + 5 * b + 10 * c == 20 for a, b, c in product(range(21), range(5), range(3)))
    sevens = Fraction(sum(a + b == 7 for a, b in product(range(1, 7), repeat=2)), 36)
    found = [sum(12 for _ in range(4)), 15 + (15 + 8),
             sum(n % 3 == 0 or n % 5 == 0 for n in range(1, 101)), sum(range(1, 21)),
             pays, f"\\frac{{{sevens.numerator}}}{{{sevens.denominator}}}",
             max(a * b for a, b in product(range(1, 10), repeat=2) if 2 * (a + b) == 20),
             next(n for n in range(2, 1000) if all(n % k == 1 for k in (2, 3, 4, 5))), 7 ** 100 % 10]
    assert [str(answer) for answer in found] == [*chain(*(one["answers"] for one in tasks.load("own")))]


GRADED = {  # right answer -> (answers that a person would accept, answers that a person would not)
    "14": ("14 |14.0|\\approx 14| 14 |\\text{14}|14 \\text{ apples}|$14$|\\$14|14 apples|14.",
           "15|-14|141|1/4|14_5|\\le 14|17 \\to 14||x=14_5|\\leqslant 14|≥ 14|x \\geqslant 14"),
    "1000": ("1000|1,000|1{,}000|10^3|1\\,000", "100|10000|1,00"),
    "-3": ("-3|-3.0|-\\frac{6}{2}|- 3", "3|-2|+3"),
    "0.5": ("0.5|1/2|\\frac{1}{2}|\\frac12|\\dfrac{1}{2}|.5", "0.05|2|\\frac{1}{3}"),
    "\\frac{3}{4}": ("3/4|0.75|\\frac{6}{8}|\\tfrac34|\\frac{3}{4}", "4/3|0.7|\\frac{3}{5}"),
    "-\\frac{5}{2}": ("-5/2|-2.5|\\frac{-5}{2}|-\\dfrac{5}{2}", "5/2|-\\frac{2}{5}"),
    "2\\sqrt{3}": ("2\\sqrt{3}|2\\sqrt3|\\sqrt{12}|2 \\cdot \\sqrt{3}",
                   "\\sqrt{3}|3\\sqrt{2}|2\\sqrt{5}"),
    "\\frac{\\sqrt{2}}{2}": ("\\frac{\\sqrt{2}}{2}|\\frac{1}{\\sqrt{2}}|\\sqrt{2}/2",
                             "\\sqrt{2}|\\frac{\\sqrt{3}}{2}"),
    "\\frac{\\pi}{2}": ("\\frac{\\pi}{2}|\\pi/2|0.5\\pi", "\\pi|2\\pi|90"),
    "12\\pi": ("12\\pi|12 \\pi|\\pi \\cdot 12", "12|24\\pi"),
    "50\\%": ("50\\%|50|0.5|\\frac{1}{2}", "5\\%|500|0.05"),
    "70^\\circ": ("70^\\circ|70|70^{\\circ}|70 \\text{ degrees}", "20|7|110^\\circ"),
    "5\\text{ cm}": ("5\\text{ cm}|5|5\\text{cm}|5 \\mathrm{~cm}", "50|6\\text{ cm}"),
    "(3,\\frac{\\pi}{2})": ("(3,\\frac{\\pi}{2})|(3, \\pi/2)|\\left(3,\\frac{\\pi}{2}\\right)",
                            "(\\pi/2,3)|(3,\\pi)|3"),
    "(1,2,3)": ("(1,2,3)|(1, 2, 3)|\\left( 1, 2, 3 \\right)", "(3,2,1)|(1,2)|(1,2,4)"),
    "[1,2)": ("[1,2)|\\left[1,2\\right)|[1, 2)", "[1,2]|(1,2)|[1,3)"),
    "(-\\infty,3]": ("(-\\infty,3]|\\left(-\\infty, 3\\right]", "(-\\infty,3)|[3,\\infty)"),
    "[-2,1]\\cup[3,4]": ("[-2,1]\\cup[3,4]|[-2, 1] \\cup [3, 4]", "[-2,1]|[3,4]"),
    "\\{1,2\\}": ("\\{1,2\\}|\\{2,1\\}|\\{1, 2\\}", "\\{1\\}|\\{1,3\\}"),
    "x^2+2x+1": ("x^2+2x+1|(x+1)^2|1+2x+x^2|x^{2}+2x+1", "x^2+2x|x^2+1"),
    "2x+3": ("2x+3|3+2x|2 x + 3|y=2x+3", "3x+2|2x-3"),
    "\\text{Evelyn}": ("\\text{Evelyn}|Evelyn|\\text{evelyn}", "Debra|\\text{Angela}"),
    "\\text{(C)}": ("\\text{(C)}|C|(C)|\\text{C}", "B|\\text{(A)}"),
    "\\text{even}": ("\\text{even}|even", "odd|\\text{odd}"),
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}": (
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}|\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}|1"),
    "2^{10}": ("2^{10}|1024|2^10", "20|1023"),
    "6+9i": ("6+9i|9i+6|6 + 9i", "6-9i|15"),
    "3,5,7": ("3,5,7|3, 5, 7|7,5,3", "3,5|3,5,8"),
    "1.5": ("1.5|\\frac{3}{2}|1\\frac{1}{2}|3/2", "1.4|\\frac{2}{3}"),
    "\\frac{a}{b+c}": ("\\frac{a}{b+c}|a/(b+c)|\\frac{a}{c+b}", "\\frac{a}{b}+c|\\frac{b}{a+c}"),
    "\\sqrt{x^2+1}": ("\\sqrt{x^2+1}|\\sqrt{1+x^2}|(x^2+1)^{1/2}", "x+1|\\sqrt{x+1}"),
    "4:3": ("4:3|\\frac{4}{3}", "3:4"),
    "11,\\!111,\\!111,\\!100": ("11111111100|11,111,111,100", "1111111110"),
    "\\$32,\\!000": ("32000|\\$32,000|32,000", "3200|\\$32"),
    "10:30": ("10:30", "10:31"),
    "0": ("0|0.0|\\frac{0}{3}", "1|-1|\\text{none}"),
    "e^2": ("e^2|e^{2}|\\mathrm{e}^2|e \\cdot e", "2e|e"),
    "\\log_2 8": ("\\log_2 8|3|\\log_{2}{8}", "2|8"),
    "\\binom{5}{2}": ("\\binom{5}{2}|10", "5|20"),
    "x=3": ("x=3|3|x = 3", "4|x=-3"),
    "120_5": ("120_5|120_{5}|n=120_5|$120_5$.", "120_6|121_5|n=120_6|\\!120_6|n = 120_{6}"),
    "\\!$120_5$": ("120_5", "120_6"),
    "7!": ("5040|7!", "504|6!"),
}


def test_answers_are_graded_as_a_person_would():
    """250 pairs of the kinds that stand in the data: numbers, fractions, intervals, tuples, units,
    percent, text, matrices."""
    pairs = [(gold, answer, score) for gold, columns in GRADED.items()
             for score, column in zip((1, 0), columns) for answer in column.split("|")]
    assert len(pairs) > 200
    assert not [pair for pair in pairs if tasks.grade(pair[1], [pair[0]])[0] != pair[2]]


@pytest.mark.parametrize("answer, golds, score", [
    ("18,3,70000,540,20", FIVE, 1), ("18, 3, 70,000, 540, 20", FIVE, 1), ("18,3,1,1,1", FIVE, 0.4),
    ("3,18", ["18", "3"], 0), ("18", ["18", "3"], 0.5), ("(18,3)", ["18", "3"], 1),
    ("\\left(18, 3\\right)", ["18", "3"], 1), ("18, 70{,}000", ["18", "70000"], 1),
    ("(1,2),(3,4)", ["(1,2)", "(3,4)"], 1), ("\\{18, 3\\}", ["18", "3"], 1), ("18,3,120,540", FIVE, 0.6),
    ("1, 2, 3", ["1", "2"], 2 / 3), ("1, 2, 7, 1, 2", ["1", "2"], 0.4), ("1, 2, ", ["1", "2"], 1),
    ("\\$18,\\$3,1/2,5\\%,x", ["18", "3", "0.5", "5", "7"], 0.8), ("answer1=18, 3", ["18", "3"], 1)])
def test_lists_are_graded_position_by_position(answer, golds, score):
    """The paper's per-question score; a comma may also stand between thousands. Who gives more answers
    than there are questions has no full score."""
    assert tasks.grade(answer, golds) == (pytest.approx(score), True)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_no_answer_is_wrong_and_counted(answer):
    """What cannot be understood is wrong, and said to be so."""
    assert tasks.grade(answer, ["1"]) == (0.0, False)


def test_a_busy_machine_makes_no_answer_wrong(monkeypatch):
    """math-verify gives up after five seconds; where all takes 20 times as long, we wait."""
    assert tasks.grade("1/2", ["2/4"]) == (1.0, True)  # (what the first answer loads)
    parse, compare = parser.extract_target_from_pred, grader.sympy_expr_eq
    monkeypatch.setattr(signal, "alarm", lambda wait: signal.setitimer(signal.ITIMER_REAL, wait / 20))
    monkeypatch.setattr(parser, "extract_target_from_pred", lambda *a, **k: sleep(0.3) or parse(*a, **k))
    monkeypatch.setattr(grader, "sympy_expr_eq", lambda *a, **k: sleep(0.3) or compare(*a, **k))
    assert tasks.grade("21/28", ["\\frac{3}{4}"]) == (1.0, True)


# -- whatever the numbers are ---------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-10**6, 10**6).map(str),
                    st.builds("\\frac{{{}}}{{{}}}".format, st.integers(-99, 99), st.integers(2, 99)),
                    st.decimals(-99, 99, places=2).map(str), st.sampled_from(list(GRADED)))
DRESS = st.lists(st.sampled_from([" {}", "{} ", "${}$", "{}.", "\\!{}", "{}\\,"]), max_size=3)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, DRESS)
@example("-5", ["{}.", "${}$"])
@example("120_5", ["${}$"])
@example("120_5", ["${}$", "\\!{}"])
@example("120_5", ["${}$", "{}\\,"])
def test_an_answer_is_right_however_it_is_dressed(gold, dress):
    """Graded against itself, an answer is right; spaces, dollars and a full stop change nothing."""
    answer = gold
    for coat in dress:  # (a dollar within dollars is no dress, and neither is a full stop within them)
        if not (coat == "${}$" and ("$" in answer or answer.rstrip().endswith("."))):
            answer = coat.format(answer)
    assert tasks.grade(answer, [gold]) == (1.0, True)
    assert tasks.grade(f"{gold}", [answer]) == (1.0, True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-999, 999), min_size=2, max_size=5, unique=True), st.data())
def test_a_list_is_right_in_its_order_only(golds, data):
    """The score of a list is the share of places that are right, whatever stands around it."""
    answers = data.draw(st.permutations(golds))
    right = sum(a == b for a, b in zip(golds, answers)) / len(golds)
    around = data.draw(st.sampled_from(["{}", "({})", "\\{{{}\\}}", " {} "]))
    text = around.format(data.draw(st.sampled_from([",", ", "])).join(map(str, answers)))
    assert tasks.grade(text, list(map(str, golds))) == (pytest.approx(right), True)
    short = ",".join(map(str, golds[:-1]))
    assert tasks.grade(short, list(map(str, golds)))[0] == pytest.approx(1 - 1 / len(golds))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="0123456789"), max_size=30))
@example("\\frac{")
@example("\\boxed{}{}")
@example("}{")
def test_text_without_digits_is_no_number(text):
    """Never a fault, and never right, whatever stands in it. (Digits of other scripts are digits.)"""
    scores = tasks.grade(text, ["8713"])[0], tasks.grade(text, ["8713", "8714"])[0]
    assert scores == (0, 0) or any(character.isdecimal() for character in text)


# -- where problems come from ---------------------------------------------------------------------------

@pytest.mark.parametrize("answer, clean", [
    ("so\n#### 18", "18"), (["$x=2$"], "$x=2$"), (["1", "2"], "1, 2"), (7, "7"), (None, ""), ([], ""),
    ({"a": 1}, ""), (True, "")])
def test_answers_as_data_sets_have_them(answer, clean):
    """A solution before it, a list around it, several of them, a number; and what is no answer."""
    assert tasks.clean(answer) == clean


def gsm8k(path, count):
    """A file like GSM8K's, whose questions name their answers."""
    rows = ({"question": f"Q{i}?", "answer": f"because\n#### {i:,}"} for i in range(1000, 1000 + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("count, problems", [(5, 1), (23, 4), (639, 127), (640, 128), (1319, 128)])
def test_problems_of_five_questions(tmp_path, count, problems):
    """GSM8K lines make at most 128 problems of five questions, none twice, in the paper's words."""
    made = tasks.load("gsm8k-x5", gsm8k(tmp_path / "gsm.jsonl", count))
    assert len(made) == problems and all(len(problem["answers"]) == 5 for problem in made)
    for problem in made:
        first, *lines = problem["question"].splitlines()
        assert first == ("Solve these problems and return comma-separated answers "
                         "\\boxed{answer1,..., answer5} :")
        numbers = [answer.replace(",", "") for answer in problem["answers"]]
        assert lines == [f" {k}. Q{number}?" for k, number in zip((1, 2, 3, 4, 5), numbers)]
        assert tasks.grade(", ".join(problem["answers"]), problem["answers"]) == (1.0, True)
    assert len({answer for problem in made for answer in problem["answers"]}) == 5 * problems
    assert made == tasks.load("gsm8k-x5", str(tmp_path / "gsm.jsonl"))


def test_problems_of_five_are_drawn_from_all(tmp_path):
    """Not the first 640 of 1,319 questions, and not in their order."""
    made = tasks.load("gsm8k-x5", gsm8k(tmp_path / "gsm.jsonl", 1319))
    numbers = [int(answer.replace(",", "")) for problem in made for answer in problem["answers"]]
    assert len(numbers) == 640 and numbers != sorted(numbers) and max(numbers) > 2200


def test_how_long_an_answer_may_be():
    """Paper, appendix C: 16 tokens, 64 where answers are expressions, 1,024 where they are programs; and
    where each data set is, and how many problems it has."""
    hub = {name: (task.answer_tokens, *task.source[:2], *map(task.source[2].get, ("name", "split")),
                  task.group) for name, task in tasks.TASKS.items() if task.source}
    fresh = {name: task.answer_tokens for name, task in tasks.TASKS.items() if name not in hub}
    # (ten numbers, or a letter)
    assert fresh == {"lists": 40, "plans": 40, "reworded": 40, "races": 16, "own": 16}
    assert hub == {
        "limo": (16, "GAIR/LIMO", 817, None, "train", 1),
        "aime25": (16, "math-ai/aime25", 30, None, "test", 1),
        "olympiad-maths": (64, "Hothan/OlympiadBench", 674, "OE_TO_maths_en_COMP", "train", 1),
        "olympiad-physics": (64, "Hothan/OlympiadBench", 236, "OE_TO_physics_en_COMP", "train", 1),
        "gsm8k-x5": (16, "openai/gsm8k", 1319, "main", "test", 5),
        "math500": (64, "HuggingFaceH4/MATH-500", 500, None, "test", 1),
        "livecodebench": (1024, "livecodebench/code_generation_lite", 279, None, "train", 1)}
    # Its repository has a script, which load_dataset refuses; release_v5 has all files up to its own.
    files = ["test.jsonl", "test2.jsonl", "test3.jsonl", "test4.jsonl", "test5.jsonl"]
    assert tasks.TASKS["livecodebench"].source[2] == {
        "path": "json", "split": "train", "data_files": [
            f"hf://datasets/livecodebench/code_generation_lite/{file}" for file in files]}
    assert all(task.source[2]["path"] == task.source[0] for name, task in tasks.TASKS.items()
               if name in hub and name != "livecodebench")
    assert {task.form for name, task in tasks.TASKS.items() if name != "livecodebench"} == {"box"}


# Rows with the columns that the data sets have; what stands in them is ours.
OLYMPIAD = {"id": 1, "question": "Find $x$.", "solution": ["..."], "final_answer": ["$4$"],
            "context": None, "image_1": None, "modality": "Text-only", "difficulty": "Competition",
            "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None,
            "question_type": "Open-ended", "subfield": "Algebra", "subject": "Math",
            "language": "English"}
ROWS = {
    "limo": {"question": "How much is 3 + 4?", "solution": "...", "answer": "7"},
    "aime25": {"problem": "How much is 3 + 4?", "answer": "7", "id": "0"},
    "math500": {"problem": "How much is 3 + 4?", "solution": "...", "answer": "7", "subject": "Algebra",
                "level": 1, "unique_id": "test/1.json"},
    "olympiad-maths": OLYMPIAD, "olympiad-physics": {**OLYMPIAD, "context": "A train stands still."}}
TESTS = json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}])
CODE = {"question_title": "Sum", "question_content": "Add.", "platform": "atcoder", "contest_id": "abc",
        "question_id": "abc1", "contest_date": "2024-08-01T00:00:00", "starter_code": "",
        "difficulty": "easy", "public_test_cases": TESTS, "private_test_cases": "[]", "metadata": "{}"}


@pytest.fixture
def hub(monkeypatch):
    """Sets the rows that the hub has; what it is asked stands in a list."""
    asked = []

    def has(rows):
        monkeypatch.setattr(import_module("datasets"), "load_dataset",
                            lambda **how: asked.append(how) or rows)
        return asked
    return has


@pytest.mark.parametrize("name", ROWS)
def test_problems_from_the_hub(monkeypatch, hub, name):
    """Read from the columns that the data sets have; one that lacks them is an error in a sentence."""
    asked = hub([ROWS[name]])
    problem, = tasks.load(name)
    assert asked == [tasks.TASKS[name].source[2]]
    assert tasks.mark("4" if "olympiad" in name else "7", problem) == (1.0, True)
    assert ("Find $x$." if "olympiad" in name else "How much is 3 + 4?") in problem["question"]
    hub([{"other": "Q?"}])
    with pytest.raises(ValueError, match="row 0 of '.*' has no (question|field)"):
        tasks.load(name)

    def unreachable(*_, **__):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(import_module("datasets"), "load_dataset", unreachable)
    with pytest.raises(ValueError, match="could not be loaded.*no network.*--data FILE"):
        tasks.load(name)


def test_five_questions_from_the_hub(hub):
    """GSM8K's rows: the answer stands behind its solution."""
    hub([{"question": f"How much is 3 + {n}?", "answer": f"It is <<3+{n}=>>.\n#### {3 + n}"}
         for n in range(1, 6)])
    problem, = tasks.load("gsm8k-x5")
    assert sorted(problem["answers"]) == ["4", "5", "6", "7", "8"] and "3 + 5?" in problem["question"]


def test_programs_from_the_hub(tmp_path, monkeypatch):
    """LiveCodeBench's rows as the loader reads them: dates are no texts any more."""
    datasets, path = import_module("datasets"), tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({**CODE, "contest_date": f"{day}T00:00:00",
                                        "question_content": f"{day}: add."}) + "\n"
                            for day in ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01")))
    load, name = datasets.load_dataset, "livecodebench/code_generation_lite"
    monkeypatch.setattr(datasets, "load_dataset", lambda data_files, **how: load(
        data_files=[file.replace(f"hf://datasets/{name}", str(tmp_path)) for file in data_files[:1]],
        cache_dir=str(tmp_path / "cache"), **how))
    problems = tasks.load("livecodebench")
    assert [problem["question"][:10] for problem in problems] == ["2024-08-01", "2025-01-31"]
    assert all(problem["tests"] == [programs.Test("3 4", "7")] for problem in problems)


@pytest.mark.parametrize("count, twice", [(30, 0), (31, 0), (29, 0), (29, 2)])
def test_the_hub_has_other_problems_than_it_had(hub, capsys, count, twice):
    """What stands there twice is asked once; if their number is not the known one, a note says so."""
    rows = [{"problem": f"How much is {n}?", "answer": str(n)} for n in range(count)]
    hub(rows + [{**row, "answer": "8713"} for row in rows[:twice]])
    problems = tasks.load("aime25")
    assert [problem["answers"] for problem in problems] == [[row["answer"]] for row in rows]
    note = capsys.readouterr().err
    assert f"has {count} different problems, and not 30" in note if count != 30 else not note


def olympiad(**others):
    """A problem of OlympiadBench."""
    return tasks.olympiad({**OLYMPIAD, **others})


def test_a_problem_of_an_olympiad():
    """What it refers to comes first, what is wanted last, by the answer's type; units; many answers."""
    text = olympiad(context="A train stands still.", unit="m/s")["question"]
    assert text.startswith("A train stands still.\n\nFind $x$.\n\nThe answer is a number.")
    assert text.endswith("in units of m/s; leave the unit out.")
    text = olympiad(is_multiple_answer=True, answer_type="Equation")["question"]
    assert "several answers, each of them an equation: give all of them, separated by commas." in text
    for kinds in ("Need_human_evaluate", "Tuple", "Numerical,Tuple", None):
        assert olympiad(answer_type=kinds)["question"] == "Find $x$."
    for kinds, words in (("Numerical,Numerical", "each of them a number:"),
                         ("Numerical,Expression,Numerical", "in this order a number, an expression, a "
                          "number:"), ("Tuple,Equation", "There are several answers: give all")):
        assert words in olympiad(is_multiple_answer=True, answer_type=kinds)["question"]
    problem = olympiad(is_multiple_answer=True, final_answer=["$1$", "$-3$"])
    assert tasks.mark("-3, 1", problem)[0] == tasks.mark("1,-3", problem)[0] == 1
    assert tasks.mark("1, 3", problem)[0] == tasks.mark("1", problem)[0] == 0


@pytest.mark.parametrize("gold, error, right, wrong", [
    ("$2.36 \\times 10^{4}$", "5e2", ["23600", "2.4 \\times 10^4", "23150"], ["23000", "2.36", "x"]),
    ("9.8", "0.1", ["9.8", "9.7", "9.9", "\\frac{98}{10}", "x=9.75", "v \\approx 9.75",
                     "9.75 \\text{ m}", "9.75."],
     ["9.6", "10", "", "\\le 9.75", "9.75_5", "x \\ge 9.75", "x=9.6", "9.75, 9.8", "9.75, 3", "x", "="]),
    ("$x=9.8$", "0.1", ["9.75", "x = 9.75"], ["9.6"]),
    ("$23,600$", "5e2", ["23,150", "23150"], ["23,000"]),
    ("$9.8, 3.1$", "0.1,0.1", ["9.75, 3.15", "3.15, 9.75", "$9.8$, $3.1$", "(9.75, 3.1)",
                                "x=9.75, y=3.15"],
     ["9.75", "9.75, 3.3", "9.6, 3.1", "9.75, 9.75", "9.75, 3.15, 1", "9.75_5, 3.15", "3.15, 9.75_5"]),
    ("9.8, 3.1", "0.1", ["9.75, 3.15"], ["9.75, 3.3"]), ("900, 3", "50,,", ["880, 3"], ["880, 3.1"]),
    ("900, 3", "50,0.1", ["880, 3", "3.1, 880"], ["900, 40", "950, 53", "3.2, 900"]),
    ("(1.2, 3.4)", "0.1", ["(1.2, 3.4)"], ["(3.4, 1.2)", "(1.25, 3.4)"]),
    ("$4$", None, ["4", "4.0"], ["4.001", "5"]), ("$4$", "", ["4"], ["4.001"])])
def test_some_answers_may_be_off(gold, error, right, wrong):
    """By the tolerance that the problem states, and no more."""
    problem = olympiad(final_answer=[gold], error=error)
    assert all(tasks.mark(answer, problem)[0] == 1 for answer in right)
    assert all(tasks.mark(answer, problem)[0] == 0 for answer in wrong)


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "x=9^{9^{9^{9}}}"])
def test_a_number_that_takes_for_ever_is_wrong(monkeypatch, answer):
    """To work it out has a limit of time, whatever errors a problem allows; it ends nothing else."""
    monkeypatch.setattr(tasks, "PATIENCE", 1)
    before = signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("nobody has set a limit"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)
    try:
        assert tasks.mark(answer, olympiad(final_answer=["5"], error="0.1")) == (0.0, True)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("gold, right, wrong", [
    ("$x \\geq 9.8$", ["x \\geq 9.8", "9.8 \\leq x"], ["x \\leq 9.8", "x \\leq 9.75", "x=9.8", "9.8"]),
    ("$x = 9.8$", ["9.8", "x = 9.75"], ["x < 9.75", "x \\ge 9.8"])])
def test_a_relation_is_no_number(gold, right, wrong):
    """Only of an equation the right side counts."""
    problem = olympiad(final_answer=[gold], error="0.1")
    assert all(tasks.mark(answer, problem)[0] == 1 for answer in right)
    assert all(tasks.mark(answer, problem)[0] == 0 for answer in wrong)


def test_a_file_of_an_olympiad(tmp_path):
    """The data set's own rows, in a file: several answers, each with what it may be off by."""
    rows = [OLYMPIAD, {**OLYMPIAD, "question": "Find both.", "is_multiple_answer": True, "unit": "m",
                       "final_answer": ["$9.8, 3.1$"], "error": "0.1,0.01"}]
    (tmp_path / "physics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, both = tasks.load("olympiad-physics", str(tmp_path / "physics.jsonl"))
    assert tasks.mark("4", one) == (1.0, True) and "Find $x$." in one["question"]
    assert "separated by commas. It is in units of m; leave the unit out." in both["question"]
    assert tasks.mark("9.75, 3.1", both) == (1.0, True) and tasks.mark("9.8, 3.15", both) == (0.0, True)


@pytest.mark.parametrize("name, wrong, said", [
    ("olympiad-maths", {"question": None}, "has no question"),
    ("olympiad-maths", {"question": 1}, "has no question"),
    ("olympiad-maths", {"final_answer": None}, "has no answer: .*final_answer")])
def test_a_row_that_lacks_something_is_told_what(tmp_path, name, wrong, said):
    """In the words of the files with question and answer; and no starter code is none."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({**OLYMPIAD, **wrong}))
    with pytest.raises(ValueError, match=f"line 1 of '.*' {said}"):
        tasks.load(name, str(data))
    data.write_text(json.dumps({**CODE, "starter_code": None}))
    assert "standard input" in tasks.load("livecodebench", str(data))[0]["question"]


GOOD = '{"question": "a", "answer": "1"}\n'
WRONG = {
    GOOD + '{"question": \n': "line 2 of", GOOD + '{"question": "b"}\n': "line 2 of .* has no answer",
    "": "empty", "\n": "empty", GOOD * 2: "line 2 of .* same as line 1",
    '{"question": "a", "answer": null}': "no answer", '{"question": ["a"], "answer": "1"}': "line 1 of",
    "[1]": "no question", "[" * 100000: "line 1 of", '{"question": " ", "answer": "1"}': "no question"}


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_files_that_hold_no_problems(tmp_path, content):
    """One sentence that names the line."""
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=WRONG[content]) as refusal:
        tasks.load("own", str(tmp_path / "data.jsonl"))
    assert "\n" not in str(refusal.value)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.integers()), min_size=1, max_size=5,
                unique_by=lambda row: row[0]),
       st.sampled_from(["", "\ufeff"]), st.sampled_from(["\n", "\n\n"]))
def test_what_is_in_a_file_is_what_is_asked(tmp_path_factory, rows, start, gap):
    """Any text is a question, word for word; blank lines and a byte order mark are nothing."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text(start + gap.join(lines))
    assert tasks.load("own", str(path)) == [{"question": q, "answers": [str(a)]} for q, a in rows]
