"""What all tests share: the chapters on the path, one thread, and the real model, loaded once."""
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
from appendix import models  # noqa: E402

# A shell that runs the tests in the background has switched Ctrl-C off.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # steadier than two on a shared machine, and no slower


@pytest.fixture(scope="session")
def smollm():
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, with its stock attention and weights."""
    return models.load()
