"""Generated problems: their answers are worked out again from the words; what is trained on is never
tested."""
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import puzzles, tasks

SEEDS, KINDS = st.integers(0, 10**6), st.sampled_from(puzzles.KINDS)


def numbers_in(text):
    """The whole numbers of a text, in order."""
    return [int(number) for number in re.findall(r"\d+", text)]


def worked_out(text, answers):
    """The answer of one question, by reading it; answers: {label: answer} of the others."""
    n = numbers_in(text)
    if match := re.fullmatch(r"What is (\d+) (more|less) than the answer of ([A-Z])\?", text):
        return answers[match[3]] + int(match[1]) * (1 if match[2] == "more" else -1)
    if "get on" in text or "get off" in text:
        signs = [1 if way == "on" else -1 for way in re.findall(r"get (on|off)", text)]
        return n[0] + sum(sign * change for sign, change in zip(signs, n[1:], strict=True))
    if "frog" in text or "again and again. What is left" in text:
        return n[0] % n[1]
    if "litres" in text:
        return n[1] % n[0]
    if re.search(r"[Hh]al(ve|f)", text):
        while n[0] % 2 == 0:
            n[0] //= 2
        return n[0]
    if re.search(r"shares|equal bags|split", text):
        if len(n) == 3:  # what is left is shared
            return abs(n[0] - n[1]) // n[2]
        return max(n) // min(n) if n[0] != n[1] else 1
    sign = -1 if re.search(r"loses|sells", text) else 1
    if re.search(r"\bboxes of|bags with .*;|packs of|crates of", text):
        change, a, b = (n[2], n[0], n[1]) if re.match(r"\w+ has|\d", text) else n
        return a * b + sign * change
    if "more. How many together" in text or "more than that" in text:
        return 2 * n[0] + n[1]
    if "more than" in text:
        return 2 * n[1] + n[0]
    if len(n) == 4:
        return n[0] * n[1] + n[2] * n[3]
    if re.search(r"loses|broken|remain|sells", text):
        return max(n) - min(n)
    if re.search(r"for \d+ dollars each|boxes hold|into each|rows with", text):
        return n[0] * n[1]
    return n[0] + n[1]


@settings(deadline=None, max_examples=200)
@given(seed=SEEDS, kind=KINDS, use=st.sampled_from(["train", "test"]),
       patterns=st.sampled_from(puzzles.PATTERNS))
def test_answers_are_what_the_words_say(seed, kind, use, patterns):
    """Of every question, by an independent reading; and all numbers on the way stay between 1 and 99."""
    puzzle = puzzles.Puzzle(random.Random(seed), kind, None, use, patterns)
    lines = dict(re.match(r"([A-Z])\. (.*)", line).groups() for line in puzzle.text.split("\n")[1:])
    answers = {label: part.answer for label, part in puzzle.parts.items()}
    assert {label: worked_out(text, answers) for label, text in lines.items()} == answers
    for part in puzzle.parts.values():
        assert all(1 <= number <= 99 for number in [part.answer, *numbers_in(part.text)])
        for line in part.work:
            for left, sign, right, result in re.findall(r"(\d+)([-+x/])(\d+)=(\d+)", line):
                wanted = {"+": int(left) + int(right), "-": int(left) - int(right),
                          "x": int(left) * int(right), "/": int(left) / int(right)}[sign]
                assert wanted == int(result)
        assert numbers_in(part.work[-1])[-1] == part.answer
    if kind == "race":
        assert 10 <= len(lines) <= 16 and str(puzzle.target) in puzzle.text.split("\n")[0]
        assert [label for label, answer in answers.items() if answer == puzzle.target] == [puzzle.answer]
    else:
        assert 4 <= len(lines) <= 10 and puzzle.answer == ", ".join(map(str, answers.values()))
    needs = {label: part.needs for label, part in puzzle.parts.items() if part.needs}
    assert bool(needs) <= (kind == "plan")
    assert all(puzzle.parts[other].needs is None for other in needs.values())


def test_nothing_is_trained_on_and_tested():
    """Names, things and combinations of numbers; words of questions, unless a test wants them."""
    chance, texts, made_of, patterns = random.Random(0), {}, {}, {}
    for use in ("train", "test"):
        drawn = [puzzles.Puzzle(chance, "list", 10, use) for _ in range(300)]
        parts = [part for puzzle in drawn for part in puzzle.parts.values()]
        texts[use] = {part.text for part in parts}
        made_of[use] = {word for part in parts for word in re.findall(r"[A-Za-z]+", part.text)}
        made_of[use + " products"] = {line for part in parts for line in part.work
                                      if len(part.work) == 1 and "x" in line}
    assert not texts["train"] & texts["test"]
    assert made_of["test products"] and not made_of["train products"] & made_of["test products"]
    named = {use: {*puzzles.PEOPLE[use], *puzzles.THINGS[use]} for use in texts}
    assert not named["train"] & named["test"] and not named["train"] & made_of["test"]
    for name, family in puzzles.FAMILIES.items():
        assert family.questions and family.held_out and not {*family.questions} & {*family.held_out}
        numbers = [family.draw(chance) for _ in range(400)]
        share = sum(puzzles.for_tests(name, some) for some in numbers) / len(numbers)
        assert 0.05 < share < 0.5, (name, share)
        patterns |= dict.fromkeys(family.questions)
    unseen = [puzzles.Puzzle(chance, "list", 10, "test", "held-out") for _ in range(30)]
    shapes = {re.sub(r"\{[a-z]+\}", ".+", re.escape(question).replace(r"\{", "{").replace(r"\}", "}"))
              for question in patterns}
    assert not any(re.fullmatch(shape, part.text) for puzzle in unseen for part in puzzle.parts.values()
                   for shape in shapes)


def test_nobody_knows_how_long_a_part_takes():
    """Lengths have a heavy tail: one in fifty takes more than three times the median."""
    chance = random.Random(1)
    lengths = sorted(len(" ".join(part.work)) for _ in range(200)
                     for part in puzzles.Puzzle(chance).parts.values())
    assert lengths[len(lengths) * 49 // 50] > 3 * lengths[len(lengths) // 2]


def test_reworded_problems_are_asked_in_other_words():
    """Each part by a template that nothing was trained on; and patterns have two names only."""
    def shape(template):
        return re.sub(r"\\{[a-z]+\\}", ".+", re.escape(template))
    trained = [shape(text) for family in puzzles.FAMILIES.values() for text in family.questions]
    asked, usual = ([line[3:] for problem in tasks.load(name)[:50]
                     for line in problem["question"].split("\n")[1:]] for name in ("reworded", "lists"))
    assert not any(re.fullmatch(one, text) for text in asked[:300] for one in trained)
    assert all(any(re.fullmatch(one, text) for one in trained) for text in usual[:300])
    with pytest.raises(ValueError, match="trained or held-out"):
        puzzles.fresh("list", 0, "kept")


@pytest.mark.parametrize("name", ["lists", "races", "plans", "reworded"])
def test_fresh_problems_are_tasks_of_chapter_7(name):
    """Two hundred, the same every time, none of them twice; the right answer is graded as right."""
    problems = tasks.load(name)
    assert problems == tasks.load(name) and len({p["question"] for p in problems}) == 200
    for problem in problems[:20]:
        assert tasks.grade(", ".join(problem["answers"]), problem["answers"]) == (1.0, True)
    one = next(p for p in problems if len(p["answers"]) > 1 or name == "races")
    wrong = ["1" if one["answers"][0] != "1" else "2", *one["answers"][1:]]
    assert tasks.grade(", ".join(wrong), one["answers"])[0] < 1
    if name != "races":
        spaced = ",   ".join(one["answers"])
        assert tasks.grade(spaced, one["answers"]) == (1.0, True)
