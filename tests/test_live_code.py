"""Twenty problems of our own in LiveCodeBench's form (appendix/programs.jsonl): right programs pass
their tests, wrong ones do not; and chapter 7 runs on them."""
import json
import re
import shutil
from importlib import import_module

import pytest
from conftest import ROOT
from helpers import tiny, tokenizer

from appendix import models, products, tasks

FILE = str(ROOT / "appendix" / "programs.jsonl")
boxed = pytest.mark.skipif(not shutil.which("bwrap"), reason="apt install bubblewrap")

# title -> (a program that is right, a part of it, what makes it wrong instead)
PROGRAMS = {
    "Last bus": ("t, k = map(int, input().split())\nprint(-t % k)", "-t % k", "k - t % k"),
    "Shelf": ("n, *books = map(int, sys.stdin.read().split())\n"
              "print(sum(all(b > a for a in books[:i]) for i, b in enumerate(books)))",
              "b > a", "b >= a"),
    "Two lamps": ("a, b = map(int, input().split())\nprint(lcm(a, b))", "lcm(a, b)", "a * b"),
    "Mirror words": ("print(*reversed(input().split()))", "reversed", "sorted"),
    "Change": ("n = int(input())\nbest = [0] + [n] * n\nfor i in range(1, n + 1):\n"
               "    best[i] = 1 + min(best[i - c] for c in (1, 3, 4) if c <= i)\nprint(best[n])",
               "1 + min(best[i - c] for c in (1, 3, 4) if c <= i)",
               "1 + best[i - max(c for c in (1, 3, 4) if c <= i)]"),
    "Islands": ("r, c = map(int, input().split())\nland = {(i, j) for i in range(r)\n"
                "        for j, x in enumerate(input()) if x == '#'}\nn = 0\nwhile land:\n"
                "    n, todo = n + 1, [land.pop()]\n    while todo:\n        i, j = todo.pop()\n"
                "        for near in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):\n"
                "            if near in land:\n                land.remove(near)\n"
                "                todo.append(near)\nprint(n)", ", (i - 1, j)", ", (i + 1, j + 1)"),
    "Rest of a power": ("print(pow(*map(int, input().split())))", "pow(*",
                        "(lambda a, n, m: a * n % m)(*"),
    "Brackets": ("s = sys.stdin.read().strip()\nwhile '()' in s or '[]' in s:\n"
                 "    s = s.replace('()', '').replace('[]', '')\nprint('no' if s else 'yes')",
                 "'no' if s else 'yes'", "'no' if s.count('(') - s.count(')') else 'yes'"),
    "Common letters": ("print(''.join(sorted({*input()} & {*input()})) or '-')", "& {*", "| {*"),
    "Pairs": ("n, s = map(int, input().split())\nprint(sum(a + b == s for a, b in\n"
              "          combinations(map(int, input().split()), 2)))", "combinations", "permutations"),
    "Snail": ("h, u, d = map(int, input().split())\nprint(max(0, -(-(h - u) // (u - d))) + 1)",
              "(h - u)", "h"),
    "Longest run": ("class Solution:\n    def longestRun(self, numbers: List[int]) -> int:\n"
                    "        return max((len(list(g)) for _, g in groupby(numbers)), default=0)",
                    "groupby(numbers)", "groupby(sorted(numbers))"),
    "Second largest": ("class Solution:\n    def secondLargest(self, numbers):\n"
                       "        some = sorted({*numbers})\n"
                       "        return some[-2] if len(some) > 1 else None", "{*numbers}", "numbers"),
    "Merge spans": ("class Solution:\n    def mergeSpans(self, spans):\n        merged = []\n"
                    "        for a, b in sorted(spans):\n            if merged and a <= merged[-1][1]:\n"
                    "                merged[-1][1] = max(b, merged[-1][1])\n            else:\n"
                    "                merged.append([a, b])\n        return merged",
                    "max(b, merged[-1][1])", "b"),
    "Add digits": ("def addDigits(number):\n    return number and 1 + (number - 1) % 9",
                   "1 + (number - 1) % 9", "number % 9"),
    "Rotate": ("def rotateList(numbers, k):\n    k = len(numbers) and k % len(numbers)\n"
               "    return numbers[len(numbers) - k:] + numbers[:len(numbers) - k]",
               "len(numbers) and k % len(numbers)", "k"),
    "Stairs": ("def climb(n):\n    a = b = 1\n    for _ in range(n - 1):\n        a, b = b, a + b\n"
               "    return b", "a = b = 1", "a, b = 0, 1"),
    "Anagrams": ("def groupWords(words):\n    groups = defaultdict(list)\n    for word in words:\n"
                 "        groups[''.join(sorted(word))].append(word)\n"
                 "    return [sorted(group) for group in groups.values()]",
                 "sorted(group) for", "group for"),
    "Path sum": ("def cheapest(grid):\n    best = [0] + [inf] * (len(grid[0]) - 1)\n"
                 "    for row in grid:\n"
                 "        for j, cost in enumerate(row):\n"
                 "            best[j] = cost + min(best[j], best[j - 1] if j else inf)\n"
                 "    return best[-1]", "min(best[j], best[j - 1] if j else inf)",
                 "(min(best[j], best[j - 1]) if j else best[j] and inf)"),
    "Missing": ("def missing(numbers):\n    n = len(numbers)\n"
                "    return n * (n + 1) // 2 - sum(numbers)", "(n + 1)", "n"),
}
TITLES = [json.loads(line)["question_title"] for line in open(FILE, encoding="utf-8")]


def test_every_problem_has_a_program():
    """Twenty of them, of both kinds, some with packed tests; read as the real ones are."""
    problems = tasks.load("livecodebench", FILE)
    assert len(problems) == len(TITLES) == 20 and {*TITLES} == {*PROGRAMS}
    assert sum(problem["tests"][0].function is None for problem in problems) == 11
    assert all(len(problem["tests"]) >= 3 and not problem["answers"] for problem in problems)
    assert all(("standard input" in problem["question"]) == (problem["tests"][0].function is None)
               for problem in problems)


@boxed
@pytest.mark.parametrize("title", PROGRAMS)
def test_right_programs_pass_and_wrong_ones_do_not(title):
    """A wrong one differs in one place, and gives some right answers."""
    program, part, wrong = PROGRAMS[title]
    problem = tasks.load("livecodebench", FILE)[TITLES.index(title)]
    assert program.count(part) == 1
    assert tasks.mark(program, problem) == (1.0, True)
    assert tasks.mark(program.replace(part, wrong), problem) == (0.0, True)


@boxed
def test_chapter_7_runs_them(tmp_path, monkeypatch, capsys):
    """What a worker writes into a block of code is marked; this one writes what it was given."""
    evaluation, generate = import_module("07_eval_limo"), import_module("06_generate")
    toy = tiny("llama"), tokenizer()
    monkeypatch.setattr(models, "load", lambda *_, **__: toy)
    monkeypatch.setattr(products, "fast_products", lambda model: model)

    def sample(run, logits):
        title = next(title for title, problem in zip(TITLES, tasks.load("livecodebench", FILE))
                     if problem["question"] in run.prompt)
        ids = run.encode(f"```python\n{PROGRAMS[title][0]}\n```\nIt is \\boxed{{done}}.\n\n")
        return [ids[len(run.passes)]] * len(run.next_writers())
    monkeypatch.setattr(generate.Hogwild, "sample", sample)
    assert evaluation.main(["--task", "livecodebench", "--data", FILE, "--methods", "baseline",
                            "--model", models.BUNDLED, "--budgets", "20", "400", "--limit", "4",
                            "--answer-tokens", "2", "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[1:]]
    assert [row["answers"]["400"]["score"] for row in rows] == [1] * 4
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "baseline 4 " in said and "baseline: 100% right so far" in said and "| 3/4 [" in said
    assert re.search(r"passes of 4 runs take \d+\.\d\d s: all will take about \d+:\d\d:\d\d, if", said)
