"""Larger kernels for a pass on a GPU: the same numbers, what does not fit is left alone, launches are
few, and none needs the host."""
import copy
from collections import Counter
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from helpers import Launcher
from test_04_query_rotation import CONFIGS, TINY
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, Qwen2Config

pytest.importorskip("triton", reason="Triton is not installed here")
fused = import_module("05_triton_kernel")
small = import_module("appendix.small_kernels")
attend, layouts = import_module("04_query_rotation"), import_module("03_layouts")
shared_cache = import_module("02_shared_cache")

KINDS = {**CONFIGS, "qwen2": Qwen2Config(**TINY)}
# How many norms, MLPs and attentions of each have other forwards (4 layers): Gemma's MLPs have another
# activation, and DeepSeek's attention makes its keys otherwise; its experts are left alone, too.
FUSED = {"llama": (9, 4, 4), "yarn": (9, 4, 4), "qwen2": (9, 4, 4), "qwen2-window": (9, 4, 4),
         "qwen3": (17, 4, 4), "phi3": (9, 4, 4), "gemma3": (25, 0, 4), "deepseek": (13, 4, 0)}


def make(name, layers=4, dtype=torch.float32):
    """A random attached model, with norms that do something."""
    torch.manual_seed(5)
    config = copy.deepcopy(KINDS[name])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for module_name, parameter in model.named_parameters():
        if "norm" in module_name or "bias" in module_name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    attend.attach(model)
    return model


def play(model):
    """Logits of a prompt and two passes of two workers, and the keys and values that are left."""
    cache = shared_cache.SharedCache(attend.attach(model))
    history, one, two = (cache.block(40) for _ in range(3))
    logits = []
    for writers in [[([history], 30)], *[[([history, two, one], 1), ([history, one, two], 1)]] * 2]:
        cache.reserve([(view[-1], count) for view, count in writers])
        ids = torch.arange(sum(count for _, count in writers)) * 7 % 250
        logits.append(attend.forward(model, cache, [layouts.fill_tables(writers)], ids, [-1]))
    used = [slot for block in cache.blocks for slot in range(block.start, block.start + block.length)]
    return torch.cat([torch.cat(logits).flatten(), *(
        memory[:, used].flatten() for memory in (*cache.keys.values(), *cache.values.values()))]).float()


@pytest.mark.parametrize("name", KINDS)
def test_the_same_numbers(name):
    """Whole models, whatever of them fits; and they can get their own forwards back."""
    model = make(name)
    before = play(model)
    assert small.fused(small.fuse(model)) == FUSED[name]
    after = play(model)
    assert (after - before).abs().max() <= 2e-5 * before.abs().max() and before.abs().max() > 0.1
    assert small.fused(small.fuse(model)) == FUSED[name]  # a second time, nothing happens
    small.restore(model)
    assert small.fused(model) == (0, 0, 0) and (play(model) - before).abs().max() <= 1e-5


def test_the_same_numbers_in_half_precision():
    """bfloat16: as near to float32 as the original is."""
    exact = play(make("qwen3"))
    model = make("qwen3", dtype=torch.bfloat16)
    errors = [(play(model) - exact).norm() / exact.norm()]
    assert sum(small.fused(small.fuse(model))) == 25
    errors.append((play(model) - exact).norm() / exact.norm())
    assert 0 < errors[1] <= 1.2 * errors[0] < 0.05


def test_what_does_not_fit_is_left_alone():
    """A norm with something on top, an MLP with a hook, linear layers of another kind, somebody else's
    forward: they stay, and the others change."""
    class Odd(torch.nn.Linear):
        """Not quite a linear layer."""

    model = make("llama")
    layers = model.model.layers
    kind = type(layers[0].input_layernorm)
    layers[0].input_layernorm.__class__ = type("OddRMSNorm", (kind,), {
        "forward": lambda self, x: kind.forward(self, x) + 0.1})
    layers[1].mlp.register_forward_hook(lambda module, given, output: output + 0.1)
    layers[2].self_attn.k_proj.__class__ = Odd
    layers[3].self_attn.forward = partial(type(layers[3].self_attn).forward, layers[3].self_attn)
    before = play(model)
    assert small.fused(small.fuse(model)) == (8, 3, 2)
    assert (play(model) - before).abs().max() <= 2e-5 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_a_little_on_top_is_another_one(dtype):
    """As wide as QwQ-32B: in bfloat16, too, a factor of 1.015 is no rounding, nor is 0.02 more."""
    kind, weight = type(make("llama").model.norm), 1 + 0.2 * torch.randn(5120)
    def found(on_top):
        module = type("OddRMSNorm", (kind,), {"forward": lambda self, x: on_top(kind.forward(self, x))})
        module = module(5120).requires_grad_(False).to(dtype)
        module.weight.copy_(weight)
        return small.norm_of(module)
    assert found(lambda y: y)
    assert not found(lambda y: 1.015 * y) and not found(lambda y: y + 0.02)


def test_who_asks_for_the_kernels_hears_that_they_fail(monkeypatch, capsys):
    """Not only on standard error, where by default the model keeps its own."""
    engine, restored = import_module("appendix.engine"), []
    monkeypatch.setattr(engine.models, "use_device", lambda device: None)
    monkeypatch.setattr(fused, "check", lambda device: None)
    monkeypatch.setattr(attend, "attach", lambda model: None)
    monkeypatch.setattr(small, "fuse", lambda model: [][0])
    monkeypatch.setattr(small, "restore", restored.append)
    model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert isinstance(engine.best_forward(model), fused.Decoder)
    assert "keeps its small kernels" in capsys.readouterr().err
    with pytest.raises(ValueError, match="out of range"):
        engine.best_forward(model, "triton")
    assert restored == [model, model]


# ------------------------------------------------------------------------------------ what is launched

class Launches(TorchDispatchMode):
    """Counts what operations would launch, and notes those that touch the host or read a number.

    Views launch nothing. F.rms_norm is one kernel on a GPU, whatever it is made of elsewhere.
    """

    VIEWS = {"view", "_unsafe_view", "reshape", "transpose", "unsqueeze", "squeeze", "expand", "slice",
             "select", "alias", "detach", "t", "permute", "split", "split_with_sizes", "as_strided",
             "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

    def __init__(self, device):
        super().__init__()
        self.device, self.count, self.outside = device, Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Do an operation and note it."""
        name = str(function)
        if "_local_scalar_dense" in name or "nonzero" in name:
            self.outside.append(name)
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device:
                self.outside.append(name)
        if name.split(".")[1] not in self.VIEWS:
            self.count[name] += 1
        return output

    def kernel(self, name):
        """A stand-in for a kernel of ours, which notes launches and computes nothing."""
        def launch(grid, *args, **kwargs):
            self.count[name] += 1
            self.outside += [name for tensor in tree_leaves((args, kwargs))
                             if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device]
        return Launcher(launch)


class OneNorm(TorchFunctionMode):
    """Lets F.rms_norm count as one launch."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Do it unseen, and count it."""
        if function is not torch.nn.functional.rms_norm:
            return function(*args, **(kwargs or {}))
        self.launches.count["rms_norm"] += 1
        return args[0].new_empty(args[0].shape)


def on_meta(model):
    """A model on the device `meta`, which has shapes but no numbers; what its new forwards keep, too."""
    def there(thing):
        if isinstance(thing, torch.nn.Linear):
            return copy.deepcopy(thing).to("meta")
        return thing.to("meta") if isinstance(thing, torch.Tensor) else thing
    for module in model.modules():
        if getattr(module.forward, "func", None) in (small.norm, small.gated, small.attention):
            module.forward = partial(module.forward.func, *tree_map(there, module.forward.args))
    return model.to("meta")


def recorded(name, layers, monkeypatch):
    """What the captured pass of two workers launches, on `meta`."""
    dtype = torch.bfloat16 if name == "deepseek" else torch.float32  # which its experts need on `meta`
    model, launches = on_meta(small.fuse(make(name, layers, dtype))), Launches("meta")
    monkeypatch.setattr(fused, "processors", lambda device: (132, 64, {}))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
    for module, names in ((fused, ["kernel", "merge"]), (small, ["silu_times", "rotate_and_store"])):
        for kernel in names:
            monkeypatch.setattr(module, kernel, launches.kernel(kernel))

    def capture(run):
        run(), launches.count.clear(), launches.outside.clear()
        with OneNorm(launches), launches:
            return (lambda: None), run()

    cache, ours = shared_cache.SharedCache(attend.attach(model)), fused.Decoder(capture)
    history, one, two = (cache.block(40) for _ in range(3))
    for writers in [[([history], 30)], *[[([history, two, one], 1), ([history, one, two], 1)]] * 2]:
        cache.reserve([(view[-1], count) for view, count in writers])
        ids = range(sum(count for _, count in writers))
        ours(model, cache, [layouts.fill_tables(writers)], ids, ids if len(ids) == 2 else [29])
    assert sum(made is not None for made in ours.captured.values()) == 1 and ours.possible
    return launches


@pytest.mark.parametrize("name", KINDS)
def test_few_launches_and_none_that_needs_the_host(name, monkeypatch):
    """A captured pass, traced: every tensor is on the device, no number is read; a layer of Llama, Qwen
    and Phi is at most 12 launches."""
    of_layers = []
    for layers in (3, 4):  # (whatever the kinds of layers, the fourth one is of a kind that was there)
        with monkeypatch.context() as patch:
            launches = recorded(name, layers, patch)
        assert not launches.outside, Counter(launches.outside)
        of_layers.append(launches.count)
    assert of_layers[0]["kernel"] == 3 == of_layers[0]["merge"]
    per_layer = of_layers[1].total() - of_layers[0].total()
    if FUSED[name][1:] == (4, 4):
        assert 10 <= per_layer <= 12, of_layers[1] - of_layers[0]
