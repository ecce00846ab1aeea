"""What all tests share: the chapters on the path, one thread, and the real model, loaded once."""
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
torch.set_num_threads(1)  # steadier than two on a shared machine, and no slower


@pytest.fixture(scope="session")
def smollm():
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, with its stock attention and weights."""
    return import_module("02_shared_cache").load_model()
