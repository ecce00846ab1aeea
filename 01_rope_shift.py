r"""Chapter 1: a cached key can be moved without encoding it again.

The problem. Hogwild! Inference lets several workers read each other's attention memory, and every worker lays that
memory out in its own order. So one cached key has to stand at different positions for different workers, and at a new
position once the text before it grows. Encoding the text again for each of them would cost a forward pass per token.

The way out. Rotary embeddings (RoPE) write a position into a key by *turning* it: dimension pair i of a key at
position p is turned by the angle p * inv_freq[i]. Turning once more by d * inv_freq[i] is all it takes to move the key
from p to p + d (paper, section 3.1). This file builds exactly that, for every RoPE type whose angles stay fixed:

    inverse_frequencies   the angles per position, from any Hugging Face config
    rotate                turn vectors by given angles
    shift                 move cached keys by a number of positions

What to notice: scores depend on distances alone; yarn's extra factor is already inside the cached key; angles need
float64. Left out: where the keys live (chapter 2).

Symbols, in every chapter: W workers, B rows of the tables (a row is a block), N new tokens of a forward pass, S slots of
memory, Hq query heads, Hk key-value heads, G = Hq // Hk, D head size, R <= D rotated dimensions.

Run it: python 01_rope_shift.py
"""
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True, eq=False)  # eq=False: compared and hashed by identity, so that it can be the key of a cache
class Rope:
    """How one kind of layer turns its queries and keys."""

    inv_freq: torch.Tensor  # [R/2] float64, radians per position
    attention_scaling: float = 1.0  # yarn and longrope multiply cos and sin by it. The cached key contains it already,
    #                                 so nothing here uses it: it is kept to show what goes wrong if one does
    rotates_last: bool = False  # the turned dimensions are the last R of D, not the first: the mark of multi-head latent
    #                             attention (DeepSeek), whose models cache one compressed vector, a *latent*, per token


def inverse_frequencies(config, layer_type=None):
    """Read the rotation of a model off its Hugging Face config.

    Args:
        config: the config of any decoder with rotary embeddings (default, linear, llama3, yarn, longrope, ...).
        layer_type: "full_attention" or "sliding_attention" where a model turns them differently (Gemma 3), else ignored.
    Returns:
        Rope, whose inv_freq is [R/2] float64. longrope gives its short factors: they hold up to
        `original_max_position_embeddings`, and a cache cannot change its frequencies half-way.
    Raises:
        ValueError: the model has no rotary embeddings, or a rotation that depends on the length seen so far.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError(f"a model with rotary position embeddings is needed; the config of {config.model_type!r} names none")
    layer_type = layer_type if layer_type in parameters else None
    parameters = parameters[layer_type] if layer_type else parameters
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        raise ValueError("RoPE type 'dynamic' is refused: its angles change as the text grows, so a cached key would "
                         "belong to other angles than a new query; use a fixed type, such as yarn or linear")
    if kind == "default":  # (each model class of transformers has its own copy of these three lines)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        factor = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        exponent = torch.arange(0, int(head_dim * factor), 2).float() / int(head_dim * factor)  # [R/2]
        inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponent, 1.0
    elif kind in ROPE_INIT_FUNCTIONS:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, layer_type=layer_type)
    else:
        raise ValueError(f"RoPE type {kind!r} is not known; known are default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    # The model computes its frequencies in float32. We take over those very numbers and only *multiply* in float64.
    return Rope(inv_freq.double(), scaling, rotates_last=getattr(config, "qk_rope_head_dim", None) is not None)


def layer_ropes(config):
    """The Rope of each layer, as a list. Layers of one type share one object (all of them, in most models)."""
    config = config.get_text_config()
    try:
        types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        if types[0] not in (getattr(config, "rope_parameters", None) or {}):  # one rotation for all layers
            types = [None] * config.num_hidden_layers
        ropes = {layer_type: inverse_frequencies(config, layer_type) for layer_type in set(types)}
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the rotary embeddings of {config.model_type!r} cannot be read off its config: {error}") from error
    return [ropes[layer_type] for layer_type in types]


def cos_sin(rope, positions):
    """cos and sin of the angles at `positions` (an int, or a tensor of any shape [...]): two [..., R/2] float32 tensors.

    A float32 carries 24 bits. Of an angle of 100,000 radians, 17 of them stand before the binary point, and the 7 that
    are left for the fraction round it to 0.004 radians. In float64 plenty remain; the cosine itself may be float32.
    """
    angles = torch.as_tensor(positions, dtype=torch.float64)[..., None] * rope.inv_freq  # [..., R/2]
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin, rotates_last=False):
    """Turn the first (or the last) R dimensions of x [..., D] by angles given as cos and sin [..., R/2].

    Half-split pairing, as in Llama, Qwen, Mistral, Phi, Gemma: dimension i is paired with i + R/2. (Chapter 4 refuses
    models that pair neighbours instead.) The sign is that of (x1 + i x2) * exp(+i angle). Dimensions beyond R pass
    through. Differentiable.
    """
    half, size = cos.shape[-1], x.shape[-1]
    first = size - 2 * half if rotates_last else 0  # first turned dimension
    x1, x2 = x[..., first:first + half], x[..., first + half:first + 2 * half]  # [..., R/2] each
    turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)  # [..., R]
    if 2 * half == size:
        return turned
    same = x[..., :first] if rotates_last else x[..., 2 * half:]
    same = same.expand(*turned.shape[:-1], size - 2 * half)  # x may be turned by several angles at once
    return torch.cat([same, turned] if rotates_last else [turned, same], -1)


def shift(keys, distance, rope):
    """Move cached keys [..., S, D] by `distance` positions (an int, or [S] integers; negative: towards the start).

    The arithmetic is float32 and the result has the dtype of the keys, so in bfloat16 every move rounds once.
    `attention_scaling` is not applied: a key that was cached by the model contains it.
    """
    cos, sin = (t.to(keys.device) for t in cos_sin(rope, distance))
    return rotate(keys.float(), cos, sin, rope.rotates_last).to(keys.dtype)


# ---------------------------------------------------------------------------------------------------- what one can see

def composition_and_relativity(rope, head_dim):
    """Two shifts are one shift by the sum; a score is a function of the distance. Returns both errors."""
    q, k = torch.randn(2, 1000, head_dim)  # 1000 random queries and keys, [1000, D] each
    twice = shift(shift(k, 300, rope), -1234, rope)
    composition = (twice - shift(k, 300 - 1234, rope)).abs().max().item()
    near = (shift(q, 70, rope) * shift(k, 20, rope)).sum(-1)  # distance 50 near the start ...
    far = (shift(q, 9070, rope) * shift(k, 9020, rope)).sum(-1)  # ... and 9,000 positions later
    return composition, (near - far).abs().max().item()


def float32_angle_error(rope, position):
    """Largest error of a cosine when the angle at `position` is multiplied out in float32."""
    exact = (position * rope.inv_freq).cos()
    hasty = (torch.tensor(float(position)) * rope.inv_freq.float()).cos()
    return (exact - hasty).abs().max().item()


@torch.inference_mode()
def shift_against_reencoding(tokens=256, distance=5000):
    """Encode a text at position 0 and at `distance`, and shift the first one there.

    Returns (largest error of a key, largest key, seconds to shift, seconds to encode).

    The model has SmolLM2-135M's shape and random weights: moving a key is geometry, training has no part in it.
    """
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, head_dim=64,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
    model, rope = AutoModelForCausalLM.from_config(config).eval(), inverse_frequencies(config)
    ids = torch.randint(0, 49152, (1, tokens))

    def encode(first):
        cache = model(ids, position_ids=torch.arange(first, first + tokens)[None], logits_to_keep=1).past_key_values
        return torch.stack([layer.keys[0] for layer in cache.layers])  # [layers, Hk, S, D]

    keys = encode(0)
    start = perf_counter()
    there = encode(distance)
    encoding = perf_counter() - start
    shift(keys, distance, rope)  # warm-up
    start = perf_counter()
    moved = shift(keys, distance, rope)
    shifting = perf_counter() - start
    return (moved - there).abs().max().item(), there.abs().max().item(), shifting, encoding


def main():
    torch.manual_seed(0)
    plain = inverse_frequencies(LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e5}))
    yarn_config = LlamaConfig(head_dim=64, max_position_embeddings=32768, rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192})
    yarn = inverse_frequencies(yarn_config)

    composition, relativity = composition_and_relativity(plain, 64)
    print(f"two shifts in a row against one:     largest difference {composition:.1e}")
    print(f"scores at distance 50, near and far: largest difference {relativity:.1e}")
    print("  -> a block of keys can stand anywhere, as long as distances are right\n")

    key = torch.randn(64)
    cached = yarn.attention_scaling * shift(key, 10, yarn)  # what a yarn model leaves in its cache at position 10
    right, wrong = shift(cached, 5, yarn), yarn.attention_scaling * shift(cached, 5, yarn)
    length = yarn.attention_scaling * key.norm()  # of that key, wherever it stands
    print(f"yarn scales keys by {yarn.attention_scaling:.3f}. Length of a key moved from 10 to 15, against one encoded at 15:")
    print(f"  shifted: {right.norm() / length:.3f}    shifted and scaled again: {wrong.norm() / length:.3f}   "
          "<- a wrong answer, no error\n")

    print("error of a cosine when angles are multiplied out in float32:")
    for position in (100, 10_000, 100_000):
        print(f"  position {position:>7,}: {float32_angle_error(plain, position):.0e}")
    print("  -> float64 for angles; they are few, and computed once per forward pass\n")

    error, size, shifting, encoding = shift_against_reencoding()
    print(f"256 tokens through 30 layers: moved by 5,000 in {1e3 * shifting:.1f} ms, encoded again in {1e3 * encoding:.0f} ms "
          f"({encoding / shifting:.0f} times longer)")
    print(f"  largest difference between the two sets of keys: {error:.1e} (keys reach {size:.1f})")

    # The stock model multiplies angles in float32, so at position 5,000 it is the *re-encoded* keys that are off:
    # 5000 * 2^-24 = 3e-4 radians, times a key's size.
    assert composition < 1e-4 and relativity < 1e-3 and error < 1e-3 * size and encoding > shifting
    print(f"[OK] shifts compose ({composition:.0e}), scores see distances only ({relativity:.0e}), "
          f"shifting equals re-encoding ({error:.0e})")
    print("\nNext: chapter 2 gives the keys a memory of blocks, each stored as if it began at position 0.")


# Exercises
# 1. Write `rotate` with complex numbers (torch.view_as_complex) and check that it agrees to 1e-6.
# 2. Some models pair dimension 2i with 2i + 1 instead. Show that the two pairings differ by a fixed permutation of D.
# 3. Move a bfloat16 key by +1 a thousand times, and once by +1000. How far apart are they, and why does chapter 2 move
#    a finished step only once?

if __name__ == "__main__":
    main()
