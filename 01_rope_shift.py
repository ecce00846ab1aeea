r"""Chapter 1: a cached key can be moved without encoding it again.

The problem. Hogwild! Inference lets several workers read each other's attention memory, and each of them
lays that memory out in an order of its own. So one cached key has to stand at different positions for
different workers, and at new ones when the text before it grows. Encoding the text again for each of
them would cost a forward pass per token.

The way out. Rotary embeddings (RoPE) write a position into a key by *rotating* it: at position p,
dimension pair i is rotated by the angle p * inv_freq[i]. So rotating it once more, by d * inv_freq[i],
moves it from p to p + d (paper, section 3.1). This file does that, for every type of RoPE whose angles
stay fixed:

    inverse_frequencies   the angles per position, from any Hugging Face config
    rotate                rotate vectors by given angles
    shift                 move cached keys by a number of positions

Symbols, for QwQ-32B: Hk 8 key-value heads, S 8,192 cached tokens, D 128 head size, R 128 <= D dimensions
that rotate.

Left out: where the keys live (chapter 2).    Run it: python 01_rope_shift.py
"""
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it can be the key of a dictionary
class Rope:
    """How one kind of layer rotates its queries and keys."""

    inv_freq: torch.Tensor  # [R/2] float64, radians per position
    # yarn and longrope multiply cos and sin by this. The cached key contains it already, so nothing here
    # uses it: it is kept to show what goes wrong if one does.
    attention_scaling: float = 1.0
    # The dimensions that rotate are the last R of D, not the first: the mark of multi-head latent
    # attention (DeepSeek), whose models cache one compressed vector, a *latent*, per token.
    rotates_last: bool = False


def inverse_frequencies(config, layer_type=None):  # exercise
    """Read the rotation of a model off its Hugging Face config.

    Args:
        config: of any decoder with rotary embeddings (default, linear, llama3, yarn, longrope, ...).
        layer_type: "full_attention" or "sliding_attention", for models in which they differ (Gemma 3).
    Returns:
        Rope. Of longrope's two sets of frequencies, it has those for texts of up to
        `original_max_position_embeddings` tokens; keys that are cached cannot change to the others.
    Raises:
        ValueError: there are no rotary embeddings, or their angles depend on the length of the text.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError("a model with rotary position embeddings is needed; the config of "
                         f"{config.model_type!r} names none")
    layer_type = layer_type if layer_type in parameters else None
    parameters = parameters.get(layer_type, parameters)
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        raise ValueError("RoPE type 'dynamic' is refused: its angles change as the text grows, so a "
                         "cached key would belong to other angles than a new query; use yarn or linear")
    if kind == "default":  # (each model class of transformers has its own copy of these three lines)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        part = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
        size = int(head_dim * (part or 1.0))  # R
        inv_freq = 1.0 / parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)  # [R/2]
        scaling = 1.0
    elif kind in ROPE_INIT_FUNCTIONS:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, layer_type=layer_type)
    else:
        raise ValueError(f"RoPE type {kind!r} is not known; known are default, "
                         f"{', '.join(ROPE_INIT_FUNCTIONS)}")
    # The model computes its frequencies in float32. These very numbers are taken over, and multiplied in
    # float64.
    rotates_last = getattr(config, "qk_rope_head_dim", None) is not None
    return Rope(inv_freq.double(), scaling, rotates_last)


def layer_ropes(config):
    """The Rope of each layer, as a list. Layers of one type (in most models: all) share one object."""
    config = config.get_text_config()
    try:
        types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        ropes = {layer_type: inverse_frequencies(config, layer_type) for layer_type in set(types)}
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the rotary embeddings of {config.model_type!r} cannot be read off its "
                         f"config: {error}") from error
    return [ropes[layer_type] for layer_type in types]


def cos_sin(rope, positions):  # exercise
    """cos and sin of the angles at `positions`, an int or a tensor [...]: two float32 [..., R/2].

    The angles are float64. Float32 has 24 bits, and the angle 100,000 needs 17 of them for its integer
    part: the other 7 round its fraction to 0.004 radians. Cosines are small numbers, and may be float32.
    """
    angles = torch.as_tensor(positions, dtype=torch.float64)[..., None] * rope.inv_freq  # [..., R/2]
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin, rotates_last=False):  # exercise
    """Rotate the first (or the last) R dimensions of x [..., D] by angles, cos and sin [..., R/2].

    Half-split pairing, as in Llama, Qwen, Mistral, Phi, Gemma: dimension i is paired with i + R/2.
    (Chapter 4 refuses models that pair neighbours instead.) The sign: (x1 + i x2) * exp(+i angle). The
    other dimensions pass through. Differentiable.
    """
    half = cos.shape[-1]
    rest = x.shape[-1] - 2 * half
    if rotates_last:
        kept, x1, x2 = x.split([rest, half, half], -1)  # [..., D - R], [..., R/2], [..., R/2]
    else:
        x1, x2, kept = x.split([half, half, rest], -1)
    rotated = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]  # [..., R/2] each
    if rest:
        kept = kept.expand(*rotated[0].shape[:-1], rest)  # x may be rotated by several angles at once
        rotated = [kept, *rotated] if rotates_last else [*rotated, kept]
    return torch.cat(rotated, -1)


def shift(keys, distance, rope):  # exercise
    """Move cached keys [..., S, D] by `distance` positions: an int, or [S] integers, negative or not.

    The arithmetic is float32 and the result has the dtype of the keys, so in bfloat16 every shift rounds
    once. `attention_scaling` is not applied: a key that was cached by the model contains it.
    """
    cos, sin = (t.to(keys.device) for t in cos_sin(rope, distance))  # [S or nothing, R/2]
    return rotate(keys.float(), cos, sin, rope.rotates_last).to(keys.dtype)


# ------------------------------------------------------------------------------------- what one can see

def largest(x):
    """The largest absolute value in a tensor."""
    return x.abs().max().item()


def timed(function, *arguments):
    """(result, seconds) of a call."""
    start = perf_counter()
    return function(*arguments), perf_counter() - start


def shift_against_reencoding(tokens=256, distance=5000):
    """Encode a text at position 0 and at `distance`, and shift the first one there.

    Returns (largest error of a key, largest key, seconds to shift, seconds to encode). The model has ten
    layers of SmolLM2-135M's shape, and random weights: shifting is geometry, training has no part in it.
    """
    config = LlamaConfig(vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=10,
                         num_attention_heads=9, num_key_value_heads=3)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 1000, (1, tokens))

    def encode(first):
        positions = torch.arange(first, first + tokens)[None]
        cache = model(ids, position_ids=positions, logits_to_keep=1).past_key_values
        return torch.stack([layer.keys[0] for layer in cache.layers])  # [layers, Hk, S, D]

    keys, rope = encode(0), inverse_frequencies(config)
    encoded, encoding = timed(encode, distance)
    shifted, shifting = timed(shift, keys, distance, rope)
    return largest(shifted - encoded), largest(encoded), shifting, encoding


@torch.inference_mode()
def main():
    """Show that shifts compose, what scaling twice does, why angles are float64, what shifting saves."""
    torch.manual_seed(0)
    plain = inverse_frequencies(LlamaConfig(head_dim=64))
    q, k = torch.randn(2, 1000, 64)  # 1,000 random queries and keys, [1000, D] each
    composition = largest(shift(shift(k, 300, plain), -1234, plain) - shift(k, 300 - 1234, plain))
    near = (shift(q, 70, plain) * shift(k, 20, plain)).sum(-1)  # [1000] scores at distance 50 ...
    far = (shift(q, 9070, plain) * shift(k, 9020, plain)).sum(-1)  # ... and 9,000 positions later
    relativity = largest(near - far)
    print(f"two shifts in a row against one:     largest difference {composition:.1e}")
    print(f"scores at distance 50, near and far: largest difference {relativity:.1e}")
    print("  -> a block of keys can stand anywhere, as long as distances are right\n")

    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                  "original_max_position_embeddings": 2048}
    config = LlamaConfig(head_dim=64, max_position_embeddings=8192, rope_parameters=parameters)
    yarn = inverse_frequencies(config)
    scaling = yarn.attention_scaling
    cached = scaling * shift(k, 10, yarn)  # as a yarn model caches these keys at position 10
    encoded = (scaling * k).norm()  # their length, wherever they are encoded
    right, wrong = (shift(keys, 5, yarn).norm() / encoded for keys in (cached, scaling * cached))
    print(f"yarn scales keys by {scaling:.3f}. Length of keys moved from 10 to 15, against keys "
          f"encoded there:\n  shifted {right:.3f}, shifted and scaled again {wrong:.3f}   "
          "<- a wrong answer, no error\n")

    print("error of a cosine when angles are multiplied out in float32:")
    for position in (100, 10_000, 100_000):
        exact = (position * plain.inv_freq).cos()
        error = largest((position * plain.inv_freq.float()).cos() - exact)
        print(f"  position {position:>7,}: {error:.0e}")
    print("  -> float64 for angles; they are few, and computed once per forward pass\n")

    error, size, shifting, encoding = shift_against_reencoding()
    print(f"256 tokens, 10 layers: moved by 5,000 in {1e3 * shifting:.1f} ms, encoded again in "
          f"{1e3 * encoding:.0f} ms ({encoding / shifting:.0f} times longer)\n"
          f"  largest difference between the two sets of keys: {error:.1e} (keys reach {size:.1f})")

    # The stock model multiplies angles in float32, so at position 5,000 it is the *re-encoded* keys that
    # are off: by 5000 * 2^-24 = 3e-4 radians, times a key's size.
    assert composition < 1e-4 and relativity < 1e-3 and error < 1e-3 * size and encoding > shifting
    print(f"[OK] shifts compose ({composition:.0e}), scores see distances only ({relativity:.0e}), "
          f"shifting equals re-encoding ({error:.0e})\n\n"
          "Next: chapter 2 gives the keys a memory of blocks, each stored as if it began at position 0.")


# To rebuild this file and be checked: make exercise CHAPTER=1 DIR=mine. Questions, which
# `python appendix/solutions.py 1.1` and so on answer by measuring:
# 1. Write `rotate` with complex numbers. How far do the results differ?
# 2. Some models pair dimension 2i with 2i + 1 instead. Which permutation of D makes one of the other?
# 3. Shift a bfloat16 key by 1 a thousand times, and once by 1,000. How far off is each of them?

if __name__ == "__main__":
    main()
