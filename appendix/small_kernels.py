r"""Appendix: fewer and larger kernels for a pass on a GPU.

The problem. A layer of Qwen2 launches forty kernels, and thirty of them are tiny: eight for each norm,
ten that rotate queries and keys, two that store keys and values. Products wait for memory, these for
being launched. A model of the hardware says that they take a tenth of a pass of QwQ-32B on an H100 and
more on faster cards (a prediction: nobody has measured it).

What is done. Modules get other forwards, instances only; each is compared with the original on random
numbers first, and what differs by more than rounding (or has no such parts) stays as it is:

    norms       F.rms_norm, one kernel instead of eight
    gated MLPs  one product makes gate and up, one kernel their silu(gate) * up
    attention   one product makes queries, keys and values; one kernel norms and rotates queries and
                keys, and writes keys and values to where the shared cache wants them

That leaves 12 launches per layer: 4 products, 2 norms, 2 sums, and this file's and chapter 5's two each.
"""
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")


@triton.jit
def silu_times(both, out, width, BLOCK: tl.constexpr):
    """both [N, 2 width], gate first -> out [N, width] = silu(gate) * up, rounded as the model does."""
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both += token * 2 * width
    gate = tl.load(both + i, mask=i < width, other=0)
    up = tl.load(both + width + i, mask=i < width, other=0).to(tl.float32)
    gated = (gate.to(tl.float32) * tl.sigmoid(gate.to(tl.float32))).to(gate.dtype).to(tl.float32)
    tl.store(out + token * width + i, (gated * up).to(gate.dtype), mask=i < width)


@triton.jit
def rotate_and_store(made, q, keys, values, cos, sin, slots, q_weight, k_weight, eps, key_slots,
                     HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                     NORM: tl.constexpr, D_TILE: tl.constexpr):
    """One program: one token's query, key or value of one head.

    made [N, (Hq + 2 Hk) D], cos and sin [N, 2 HALF] -> q [N, Hq, D], and slots [N] of keys and values
    [Hk, S, D]. Of each head 2 HALF dimensions rotate, from the first on.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    d, slot = tl.arange(0, D_TILE), tl.load(slots + token)
    rotates, other = d < 2 * HALF, tl.where(d < HALF, d + HALF, d - HALF)
    made += (token * (HQ + 2 * HK) + head).to(tl.int64) * D
    x = tl.load(made + d, mask=d < D, other=0)
    if head >= HQ + HK:
        tl.store(values + ((head - HQ - HK) * key_slots + slot) * D + d, x, mask=d < D)
    else:
        y = tl.load(made + other, mask=rotates, other=0).to(tl.float32)  # the other one of each pair
        result = x.to(tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(result * result, 0) / D + eps)
            weight = q_weight if head < HQ else k_weight
            result *= factor * tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
            y *= factor * tl.load(weight + other, mask=rotates, other=0).to(tl.float32)
        cosine = tl.load(cos + token * 2 * HALF + d, mask=rotates, other=1).to(tl.float32)
        sine = tl.load(sin + token * 2 * HALF + d, mask=rotates, other=0).to(tl.float32)
        result = (result * cosine + tl.where(d < HALF, -y, y) * sine).to(x.dtype)
        if head < HQ:
            tl.store(q + (token * HQ + head) * D + d, result, mask=d < D)
        else:
            tl.store(keys + ((head - HQ) * key_slots + slot) * D + d, result, mask=d < D)


# ---------------------------------------------------------------------------------------- other forwards

def norm(weight, eps, x):
    """An RMS norm's forward, in one kernel on a GPU."""
    return F.rms_norm(x, weight.shape, weight, eps)


def gated(mlp, both, x):
    """A gated MLP's forward: x [1, N, hidden]."""
    made = both(x)  # [1, N, 2 width]
    width = made.shape[-1] // 2
    out = made.new_empty(*made.shape[:-1], width)
    silu_times[out.numel() // width, triton.cdiv(width, 1024)](made, out, width, BLOCK=1024)
    return mlp.down_proj(out)


def attention(module, made_by, norms, told, original, hidden_states, position_embeddings=None,
              attention_mask=None, past_key_values=None, hogwild=None, **others):
    """An attention module's forward; `told`: what it tells the attention function (scale and window)."""
    cache, layer = past_key_values, module.layer_idx
    if hogwild is None or layer not in cache.keys:  # (the first pass of all makes the memory)
        return original(hidden_states, position_embeddings=position_embeddings, hogwild=hogwild,
                        attention_mask=attention_mask, past_key_values=cache, **others)
    keys, values, (cos, sin) = cache.keys[layer], cache.values[layer], position_embeddings
    heads, slots, size = keys.shape  # Hk, S, D
    made = made_by(hidden_states)[0]  # [N, (Hq + 2 Hk) D]
    q = made.new_empty(len(made), made.shape[1] // size - 2 * heads, size)  # [N, Hq, D]
    weights, eps = norms or ((made, made), 0.0)
    rotate_and_store[len(made), made.shape[1] // size](
        made, q, keys, values, cos, sin, cache.new_slots.to(made.device), *weights, eps, slots,
        HQ=q.shape[1], HK=heads, D=size, HALF=cos.shape[-1] // 2, NORM=norms is not None,
        D_TILE=triton.next_power_of_2(size))
    output, _ = query_rotation.hook(module, q.transpose(0, 1)[None], None, None, None, hogwild=hogwild,
                                    **told)
    return module.o_proj(output.flatten(2)), None


# ------------------------------------------------------------------------ what fits, and is it the same?

def fuse(model):
    """Give modules of an attached model forwards of fewer kernels, where they fit. Returns the model.

    There is no gradient, and a norm's weight that changes later may go unnoticed. Weights of joint
    products are views of one memory from then on; nothing is stored twice.
    """
    ropes = rope.layer_ropes(model.config.get_text_config())
    with torch.no_grad():
        for module in [*model.modules()]:
            if plain(module) and type(module).__name__.endswith("RMSNorm"):
                fuse_norm(module)
            elif plain(module) and hasattr(module, "down_proj") and not hasattr(module, "experts"):
                fuse_mlp(module)
            elif plain(module) and hasattr(module, "o_proj") and hasattr(module, "layer_idx"):
                fuse_attention(module, ropes)
    return model


def restore(model):
    """Give modules their own forwards back."""
    for module in model.modules():
        if getattr(module.forward, "func", None) in (norm, gated, attention):
            del module.forward


def fused(model):
    """How many modules of a model have other forwards: (norms, MLPs, attentions)."""
    found = [getattr(module.forward, "func", None) for module in model.modules()]
    return tuple(map(found.count, (norm, gated, attention)))


def plain(module):
    """Has nobody else changed what a call of this module does?"""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def same(ours, theirs):
    """Do two results differ by rounding alone, all in all? (In bfloat16, by 1.2 per cent at most.)"""
    apart, size = (ours.float() - theirs.float()).norm(), theirs.float().norm()
    return bool(apart <= size * max(1e-5, 1.5 * torch.finfo(theirs.dtype).eps))


def norm_of(module):
    """(weight, eps) with which F.rms_norm does what the module does, or None."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    x = 3 * torch.randn(5, *module.weight.shape).to(module.weight)
    for weight in (module.weight, 1 + module.weight):  # (Gemma's are stored as differences from 1)
        if eps is not None and same(norm(weight, eps, x), module(x)):
            return weight.detach(), eps
    return None


def fuse_norm(module):
    """A norm, if it is one."""
    if found := norm_of(module):
        module.forward = partial(norm, *found)


def joint(module, names, together):
    """One linear layer for several: the one that is called `together`, or one that is made of them.

    None if there is neither. The weights of those that it is made of become views of its own.
    """
    parts = [getattr(module, name, None) for name in names]
    if type(getattr(module, together, None)) is torch.nn.Linear:
        return getattr(module, together)
    if any(type(part) is not torch.nn.Linear or not plain(part) for part in parts):
        return None
    outside, biased = sum(part.out_features for part in parts), [part.bias is not None for part in parts]
    if len({*biased}) > 1 or len({type(part.weight) for part in parts}) > 1:
        return None
    made = torch.nn.Linear(parts[0].in_features, outside, biased[0], device="meta")
    for name in ["weight", "bias"][:1 + biased[0]]:
        numbers = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(made, name, torch.nn.Parameter(numbers, requires_grad=False))
        for part, piece in zip(parts, numbers.split([part.out_features for part in parts])):
            getattr(part, name).data = piece
    return made


def fuse_mlp(module):
    """A gated MLP with silu."""
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if "silu" not in type(activation).__name__.lower():
        return
    both = joint(module, ["gate_proj", "up_proj"], "gate_up_proj")
    if both is not None:
        x = torch.randn(1, 3, both.in_features).to(both.weight)
        if same(gated(module, both, x), module(x)):
            module.forward = partial(gated, module, both)


def fuse_attention(module, ropes):
    """An attention module: both forwards have to tell the attention function the same."""
    made_by = joint(module, ["q_proj", "k_proj", "v_proj"], "qkv_proj")
    if made_by is None or ropes[module.layer_idx].rotates_last:
        return
    norms = [norm_of(getattr(module, name)) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    if None in norms:
        return
    norms = (tuple(weight for weight, _ in norms), norms[0][1]) if norms else None
    x = torch.randn(1, 3, made_by.in_features).to(made_by.weight)
    original, told = module.forward, {}
    theirs = heard(module, original, ropes, x, told)
    ours = partial(attention, module, made_by, norms, told, original)
    if all(map(same, heard(module, ours, ropes, x, {}, twice=original), theirs)):
        module.forward = ours


def heard(module, forward, ropes, x, told, twice=None):
    """What an attention function is given by a forward, what that wrote, and what it makes of an output.

    told: to be filled with scale and window. twice: a forward to be called before.
    """
    cache, (_, new, _) = shared_cache.SharedCache(ropes), x.shape
    tables = [layouts.fill_tables([([cache.block(8)], 0)])]
    given = []

    def function(q, keys, values, tables, rotation, scale, window):
        told.update(scaling=scale, sliding_window=window)
        given[:] = [q, keys[:, cache.new_slots], values[:, cache.new_slots]]
        return q[..., :values.shape[-1]].sin()

    cos, sin = (torch.cat([part, part], -1)[None].to(x) for part in
                rope.cos_sin(ropes[module.layer_idx], 100 + torch.arange(new)))
    for call, slots in ((twice, [5, 6, 7]), (forward, [0, 3, 2])):
        if call:
            cache.new_slots = torch.tensor(slots)
            output, _ = call(x, position_embeddings=(cos, sin), attention_mask=None,
                             past_key_values=cache, hogwild=(cache, tables, function))
    return *given, output
