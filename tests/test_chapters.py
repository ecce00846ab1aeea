"""Every chapter, and what of the appendix is read like one, runs directly, as a reader would run it, and ends in [OK]."""
import subprocess
import sys

import pytest
from conftest import ROOT

CHAPTERS = [*sorted(path.name for path in ROOT.glob("0[0-9]_*.py")), "appendix/replay.py", "appendix/learn_to_collaborate.py"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_direct_run_ends_well(chapter, tmp_path):
    """From another working directory, within a minute, with [OK] at the end and nothing on standard error."""
    run = subprocess.run([sys.executable, str(ROOT / chapter)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                         check=False)
    assert run.returncode == 0, run.stderr
    assert "[OK]" in run.stdout and not run.stderr.strip(), run.stderr
