"""Appendix: which of our two ways to compute a pass works on a device."""
import sys
from importlib import import_module

from appendix import command, models

query_rotation = import_module("04_query_rotation")


def best_forward(model, attention="auto"):
    """How to run a pass: "torch" (chapter 4), "triton" (chapter 5; ValueError if it does not work here),
    or "auto": the latter on GPUs where it works. There, the model gets larger kernels, too ("triton":
    or else ValueError)."""
    models.use_device(model.device)
    if attention == "torch" or attention == "auto" and model.device.type != "cuda":
        return query_rotation.forward
    try:
        kernel = import_module("05_triton_kernel")
        kernel.check(model.device)
    except Exception as error:  # of any kind: no Triton, no compiler, a GPU that it does not know
        excuse("attention runs without the Triton kernel", error, attention)
        return query_rotation.forward
    if model.device.type == "cuda":
        small_kernels = import_module("appendix.small_kernels")
        try:
            query_rotation.attach(model)
            small_kernels.fuse(model)
        except Exception as error:
            small_kernels.restore(model)
            excuse("the model keeps its small kernels", error, attention)
    return kernel.Decoder()


def excuse(what, error, attention):
    """Say what is done instead of what was tried; or raise ValueError, if that had to be possible."""
    if attention == "triton":
        raise ValueError(command.first_line(error)) from error
    print(f"{what}: {command.first_line(error)}", file=sys.stderr)
