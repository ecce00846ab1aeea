r"""Appendix: fast matrix products on an x86 CPU.

A decoding pass multiplies one row per worker by every weight, which should cost what *reading* it costs.
PyTorch's product can take twice as long. So each of a few other ways is tried when a model is loaded,
compared with PyTorch's result, timed, and taken where it is faster.
"""
import contextlib
import platform
from collections import defaultdict
from functools import partial
from time import thread_time

import torch


def stock(x, weight, bias):
    """PyTorch's own product."""
    return torch.nn.functional.linear(x, weight, bias)


def flipped(x, weight, bias):
    """The weight times the rows of x as columns, which is faster with two to four of them."""
    rows = (weight @ x.mT).mT.contiguous()
    return rows if bias is None else rows + bias


def transposed(x, weight, bias):
    """On a transposed weight, whose rows are scaled and added up: for one row of x."""
    return x @ weight if bias is None else x @ weight + bias


def reordered(x, weight, bias):
    """On a weight that was reordered once, in the way that oneDNN reads fastest."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


WAYS = {reordered: lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, 4),
        stock: torch.detach, flipped: torch.detach, transposed: lambda weight: weight.t().contiguous()}


def fast_products(model):
    """Let linear layers on an x86 CPU take the fastest of a few ways, by measuring. Returns the model.

    Results differ by rounding; there is no gradient, and later changes of a weight go unnoticed. The
    originals stay (the embedding may share them), so it is done where memory allows it. What fails (no
    oneDNN for a dtype) leaves layers as they were.
    """
    alike = defaultdict(list)  # layers whose weights have one shape and dtype
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.device.type == "cpu":
            alike[module.weight.shape, module.weight.dtype, module.bias is None].append(module)
    needed = sum(module.weight.nbytes for modules in alike.values() for module in modules)
    if platform.machine() not in ("x86_64", "AMD64") or available_memory() < 2 * needed:
        return model
    for modules in alike.values():
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            best = fastest(modules)
            for module in modules if {*best} != {stock} else ():
                stored = {way: WAYS[way](module.weight.detach()) for way in {*best}}
                module.forward = partial(product, [(way, stored[way]) for way in best], module.bias)
    return model


def product(ways, bias, x):
    """A linear layer's forward, in the way that was fastest for as many rows."""
    way, weight = ways[min(x.shape[-2] if x.dim() > 1 else 0, len(ways) - 1)]
    return way(x, weight, bias)


def fastest(modules, rounds=3):
    """The fastest of WAYS for 0 to 4 and more rows, measured on as many layers as outgrow the caches.

    A way that gives other numbers is none. Against noise, the usual one has to be beaten by 8 %.
    """
    weights = [module.weight.detach() for module in modules[:1 + 2**26 // modules[0].weight.nbytes]]
    stored = {way: [store(weight) for weight in weights] for way, store in WAYS.items()}
    best, bias = [stock], modules[0].bias  # without rows, PyTorch's
    for rows in (1, 2, 3, 4):
        x = torch.randn(1, rows, weights[0].shape[1]).to(weights[0].dtype)
        expected, times, usual = stock(x, weights[0], bias), {}, stock if rows < 3 else reordered
        near = expected.abs().max() * max(1e-5, 2 * torch.finfo(x.dtype).eps)
        for way in ([*WAYS] if rows == 1 else [*WAYS][:3]) * rounds:
            start = thread_time()
            for weight in stored[way]:
                way(x, weight, bias)
            taken = (thread_time() - start) * (1 if way is usual else 1.08)
            if (way(x, stored[way][0], bias) - expected).abs().max() <= near:
                times[way] = min(taken, times.get(way, taken))
        best.append(min(times, key=times.get))
    return [*best, reordered if reordered in times else stock]


def available_memory():
    """Bytes that can be had without swapping; 0 where nobody says."""
    with contextlib.suppress(ImportError):
        import psutil  # (accelerate brings it)
        return psutil.virtual_memory().available
    return 0
