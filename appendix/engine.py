"""Appendix: which of our two ways to compute a pass works on a device."""
import sys
from importlib import import_module

import torch

from appendix import command, models

query_rotation = import_module("04_query_rotation")


def best_forward(device, attention="auto"):
    """How to run a pass: "torch" (chapter 4), "triton" (chapter 5; ValueError if it does not work here),
    or "auto": the latter on GPUs where it works."""
    models.use_device(device)
    if attention == "torch" or (attention == "auto" and torch.device(device).type != "cuda"):
        return query_rotation.forward
    try:
        kernel = import_module("05_triton_kernel")
        kernel.check(device)
        return kernel.Decoder()
    except Exception as error:  # of any kind: no Triton, no compiler, a GPU that it does not know
        if attention == "triton":
            raise ValueError(command.first_line(error)) from error
        print(f"attention runs without the Triton kernel: {command.first_line(error)}", file=sys.stderr)
        return query_rotation.forward
