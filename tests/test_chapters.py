"""Every chapter, and what of the appendix is read like one, runs directly, as a reader would run it;
the house is as small as it says: tokens, lines, columns, and imports that run backwards only; and what
tests/mutations.py would change stands where it says."""
import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT
from mutations import MUTATIONS

CHAPTERS = sorted(path.name for path in ROOT.glob("0[0-9]_*.py"))
APPENDIX = sorted(f"appendix/{path.name}" for path in (ROOT / "appendix").glob("*.py"))
POSSIBLE = [f"appendix/{name}.py" for name in (
    "compare_teams", "demo", "drawings", "encode_run", "ideal_team", "judge", "learn_to_collaborate",
    "methods", "moved_steps", "programs", "puzzles")]
FOR_GPUS = ["appendix/small_kernels.py"]
FOR_COURSES = ["appendix/exercises.py", "appendix/solutions.py"]
JOINING = ["appendix/guests.py", "appendix/join_in.py"]
RUN = [*CHAPTERS, "appendix/encode_run.py", "appendix/learn_to_collaborate.py",
       "appendix/moved_steps.py"]


@pytest.mark.parametrize("chapter", RUN)
def test_a_direct_run_ends_well(chapter, tmp_path):
    """From another working directory, within two minutes, with [OK] at the end and nothing on standard
    error."""
    run = subprocess.run([sys.executable, str(ROOT / chapter)], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "[OK]" in run.stdout and not run.stderr.strip(), run.stderr


def tokens(path):
    """Python tokens of a file, without comments, docstrings, newlines and indents."""
    source = (ROOT / path).read_text()
    parts = (ast.Module, ast.FunctionDef, ast.ClassDef)
    first = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, parts)
             and node.body]
    docstrings = {one.lineno for one in first if isinstance(one, ast.Expr)
                  and isinstance(one.value, ast.Constant)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER, tokenize.ENCODING}
    return sum(token.type not in skipped and not (token.type == tokenize.STRING
                                                  and token.start[0] in docstrings)
               for token in tokenize.generate_tokens(io.StringIO(source).readline))


def test_the_house_is_small():
    """Chapters: 17,500 tokens together; what they stand on in the appendix: 15,550; what they make
    possible: 16,900; what only GPUs need: 2,400, only courses: 5,200, only who joins in: 1,600; no file
    over 450 lines, no line over 105 columns."""
    assert 10_000 < sum(map(tokens, CHAPTERS)) <= 17_500
    others = {*POSSIBLE, *FOR_GPUS, *FOR_COURSES, *JOINING}
    assert sum(map(tokens, {*APPENDIX} - others)) <= 15_550 and others < {*APPENDIX}
    assert sum(map(tokens, FOR_GPUS)) <= 2_400 and sum(map(tokens, FOR_COURSES)) <= 5_200
    assert sum(map(tokens, POSSIBLE)) <= 16_900 and sum(map(tokens, JOINING)) <= 1_600
    for path in [*CHAPTERS, *APPENDIX, *(f"tests/{path.name}"
                                         for path in (ROOT / "tests").glob("*.py"))]:
        lines = (ROOT / path).read_text().splitlines()
        assert len(lines) <= 450 and max(map(len, lines)) <= 105, path


def imported(path):
    """What of this project a file imports, anywhere in it."""
    source = (ROOT / path).read_text()
    chapters = re.findall(r'import_module\("(0\d_\w+)"\)', source)
    leaves = re.findall(r'import_module\("appendix\.(\w+)"\)|^from appendix\.(\w+) import', source,
                        re.MULTILINE)
    for names in re.findall(r"^from appendix import ([\w, ]+)", source, re.MULTILINE):
        leaves += [(name.strip(), "") for name in names.split(",")]
    return {f"{name}.py" for name in chapters} | {f"appendix/{a or b}.py" for a, b in leaves}


def test_imports_run_backwards():
    """A chapter imports earlier chapters only, also by way of the appendix, and there are no circles."""
    reached = {path: imported(path) for path in [*CHAPTERS, *APPENDIX]}
    assert "02_shared_cache.py" in reached["03_layouts.py"]
    assert "appendix/journal.py" in reached["06_generate.py"]
    for _ in reached:
        for path, others in reached.items():
            reached[path] = others.union(*(reached[other] for other in others))
    for path, others in reached.items():
        assert path not in others
        if path in CHAPTERS:
            assert all(other < path for other in others if other in CHAPTERS), (path, others)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_every_mutation_applies(mutation):
    """What is to be replaced occurs exactly once in the file as it is now."""
    _, path, old, new, _ = mutation
    assert (ROOT / path).read_text().count(old) == 1 and old != new
