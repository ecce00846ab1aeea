"""Chapter 1: frequencies against transformers' own, rotations against complex numbers, shifts against
encoding."""
from functools import lru_cache, partial
from importlib import import_module

import mpmath
import pytest
import torch
import transformers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

rope = import_module("01_rope_shift")
check = partial(settings, deadline=None, max_examples=60)
SEEDS, DISTANCES = st.integers(0, 2 ** 32), st.integers(-100_000, 100_000)
U = 2.0 ** -24  # one float32 rounding changes a number by at most U times its size
FREQUENCIES = torch.tensor([1, 0.2, 0.01, 1e-4], dtype=torch.float64)  # [R/2], radians per position
ROTATION = 4 * U * 8  # a rotation is 4 roundings (cosine, sine, product, sum) of pairs shorter than 8

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8}


def llama(**parameters):
    """The config of a Llama with these rope parameters."""
    return hf.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **parameters})


CONFIGS = {
    "llama": llama(rope_type="default"),
    "linear": llama(rope_type="linear", factor=4.0),
    "llama3": llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=256),
    "yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
    "phi3, partial": hf.Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "phi3, longrope": hf.Phi3Config(  # 12 of 16 dimensions rotate: 6 factors
        **SIZES, partial_rotary_factor=0.75, original_max_position_embeddings=512,
        max_position_embeddings=4096, rope_parameters={
            "rope_type": "longrope", "short_factor": [1, 1.1, 1.5, 2, 3, 4], "long_factor": [9] * 6}),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=32),
    "gemma3": hf.Gemma3TextConfig(
        **SIZES, head_dim=16, layer_types=[SLIDING, FULL, SLIDING], rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}),
    "deepseek": hf.DeepseekV3Config(**SIZES, **LATENT, first_k_dense_replace=3),
}
record = {}  # layer -> the keys that its attention was given in the latest pass, [Hk, S, D]


def recording(module, query, key, *args, **kwargs):
    """Transformers' own attention, overheard."""
    record[module.layer_idx] = key[0]
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


@lru_cache
def tiny(name):
    """A tiny model with random weights that records its keys, and the Rope of each of its layers."""
    torch.manual_seed(0)
    hf.AttentionInterface.register("recording_01", recording)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="recording_01").eval()
    return model, rope.layer_ropes(model.config)


def rotated(x, angles, last=False):
    """The oracle, in float64: dimensions i and i + R/2 as a complex number, times exp(i angles[i])."""
    half, first = angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1] if last else 0
    shape = torch.broadcast_shapes(x.shape[:-1], angles.shape[:-1])
    result = x.detach().double().expand(*shape, -1).clone()
    for i in range(half):
        a, b = first + i, first + i + half
        z = torch.complex(result[..., a], result[..., b]) * torch.exp(1j * angles[..., i])
        result[..., a], result[..., b] = z.real, z.imag
    return result


def close(actual, expected, error):
    """Equal up to `error`, and not by both being zero. What differs is said, the shape first."""
    shape, wanted = tuple(actual.shape), tuple(expected.shape)
    assert shape == wanted, f"yours has the shape {shape}, and not {wanted}"
    off = (actual - expected).abs()
    assert (off <= error).all(), f"yours is off by {off.max():.1e} (mean {off.mean():.1e})"
    return bool(expected.abs().max() > 0)


@pytest.mark.parametrize("name", CONFIGS)
@check(max_examples=10)
@given(positions=st.lists(st.integers(0, 99), min_size=1, max_size=8))
def test_frequencies_are_the_models_own(name, positions):
    """Every layer's inv_freq is bit for bit that of the model, and cos_sin are its cosines, unscaled."""
    (model, ropes), config = tiny(name), CONFIGS[name]
    module = model.model.rotary_emb
    kinds = config.layer_types if name == "gemma3" else [None] * 3
    assert len(ropes) == 3 and len(set(ropes)) == len(set(kinds))  # layers of one type share one object
    assert ropes[0].rotates_last == (name == "deepseek")
    assert (ropes[0].attention_scaling > 1.05) == (name in ("yarn", "phi3, longrope"))
    for layer, kind in zip(ropes, kinds):
        prefix, options = (f"{kind}_", {"layer_type": kind}) if kind else ("", {})
        assert layer.attention_scaling == getattr(module, prefix + "attention_scaling")
        assert torch.equal(layer.inv_freq, getattr(module, prefix + "inv_freq").double())
        theirs = module(torch.zeros(1), torch.tensor([positions]), **options)  # cos and sin, [1, n, R]
        for mine, stock in zip(rope.cos_sin(layer, positions), theirs):
            stock = stock[0, :, :mine.shape[-1]] / layer.attention_scaling
            # angles up to 99 are float32 there; a few roundings
            assert (mine - stock).abs().max() <= 99 * U + 4 * U


@pytest.mark.parametrize("config", [llama(rope_type="dynamic", factor=2.0), hf.GPT2Config()],
                         ids=["dynamic", "gpt2"])
def test_what_cannot_be_moved_is_refused(config):
    """Angles that depend on the length seen, and a model without rotation, are refused."""
    with pytest.raises(ValueError):
        rope.layer_ropes(config)


@check()
@given(position=st.integers(-1_000_000, 1_000_000))
@example(position=99_991)
@example(position=100_000)
def test_angles_are_exact_far_out(position):
    """Cosines at position 100,000 are as good as near 0: those of 30 digits, rounded to float32. Of one
    position, or of some."""
    layer, some = rope.Rope(FREQUENCIES), torch.tensor([position, 3, -position])
    found, of_some = rope.cos_sin(layer, position), rope.cos_sin(layer, some)
    for mine, several, exact, name in zip(found, of_some, (mpmath.cos, mpmath.sin), ("cosine", "sine")):
        with mpmath.workdps(30):
            theirs = torch.tensor([float(exact(mpmath.mpf(f) * position)) for f in FREQUENCIES.tolist()])
        shapes, dtypes = [tuple(mine.shape), tuple(several.shape)], {mine.dtype, several.dtype}
        assert shapes == [(4,), (3, 4)], f"{name}s of one position and of three have shapes {shapes}"
        assert dtypes == {torch.float32}, f"{name}s are {dtypes}, and not float32"
        assert torch.equal(several[0], mine), f"a {name} depends on the positions beside its own"
        # numbers below 1 are rounded by U / 2, twice here; a float64 angle is off by 1e6 * 2^-53 (a
        # float32 one by 0.06)
        error = (mine - theirs).abs().max()
        assert error <= U + 2e-10, f"a {name} is off by {error:.0e} at position {position:,}"


def test_a_case_by_hand():
    """Pairs are (1, 3) and (2, 4): rotated by 90 degrees 1 + 3i is -3 + i, by 180 2 + 4i is -2 - 4i."""
    layer = rope.Rope(torch.tensor([torch.pi / 2, torch.pi], dtype=torch.float64))
    moved = rope.shift(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, layer)
    assert close(moved, torch.tensor([-3.0, -2.0, 1.0, -4.0]), ROTATION)


@check()
@given(seed=SEEDS, half=st.integers(1, 6), rest=st.integers(0, 5), last=st.booleans())
def test_rotate_is_complex_multiplication(seed, half, rest, last):
    """The first (or last) R dimensions rotate, by several angles at once, the others stay; gradients
    rotate back."""
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 2 * half + rest, requires_grad=True)  # [Hq, N, D]
    angles = 6.3 * torch.rand(4, 1, 3, half, dtype=torch.float64)  # [rows, 1, N, R/2]
    result = rope.rotate(x, angles.cos().float(), angles.sin().float(), last)  # [rows, Hq, N, D]
    assert close(result, rotated(x, angles, last), ROTATION)
    stays = slice(0, rest) if last else slice(2 * half, None)
    assert torch.equal(result[..., stays], x[..., stays].expand(4, 2, 3, rest))
    weights = torch.randn(result.shape)
    gradient, = torch.autograd.grad((weights * result).sum(), x)
    # a sum of four, each of them rounded again
    assert close(gradient, rotated(weights, -angles, last).sum(0), 8 * ROTATION)


@check()
@given(seed=SEEDS, a=st.lists(DISTANCES, min_size=1, max_size=6), b=DISTANCES, last=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_shifts_compose(seed, a, b, last, dtype):
    """Every slot shifts by its distance, exact up to one rounding, unscaled; two shifts are one; -a
    undoes a."""
    torch.manual_seed(seed)
    u = torch.finfo(dtype).eps / 2
    layer = rope.Rope(FREQUENCIES, attention_scaling=1.3, rotates_last=last)
    keys, a = torch.randn(2, len(a), 11).to(dtype), torch.tensor(a)  # [Hk, S, D], [S]
    once, exact = rope.shift(keys, a, layer), rotated(keys, a[:, None] * FREQUENCIES, last)
    assert once.dtype == dtype
    assert close(once, exact, u * exact.abs() + ROTATION)  # the arithmetic is float32 in any case
    both = rotated(keys, (a[:, None] + b) * FREQUENCIES, last)
    # two roundings of numbers below 8
    assert close(rope.shift(once, b, layer), both, 2 * (8 * u + ROTATION))
    assert close(rope.shift(once, -a, layer), keys.double(), 2 * (8 * u + ROTATION))


@check()
@given(seed=SEEDS, position=DISTANCES, distance=DISTANCES)
def test_scores_depend_on_the_distance_alone(seed, position, distance):
    """A key at p and a query at p + d score what the unrotated key and the query rotated by d do."""
    torch.manual_seed(seed)
    layer, (q, k) = rope.Rope(FREQUENCIES), torch.randn(2, 20, 8)
    scores = (rope.shift(q, position + distance, layer) * rope.shift(k, position, layer)).sum(-1)
    # a sum of 8 products of numbers that are below 8 and off by ROTATION each (and of its own roundings,
    # as many again)
    assert close(scores, (rotated(q, distance * FREQUENCIES) * k).sum(-1), 2 * 8 * 2 * 8 * ROTATION)


@pytest.mark.parametrize("name", CONFIGS)
@check(max_examples=10)
@given(seed=SEEDS, position=st.integers(0, 50), distance=st.integers(1, 50))
def test_shifted_keys_are_those_that_the_model_makes_there(name, seed, position, distance):
    """A text encoded at p, its keys shifted by d, is the text encoded at p + d: any layer, any model."""
    torch.manual_seed(seed)
    (model, ropes), ids = tiny(name), torch.randint(50, (1, 7))

    @torch.no_grad()
    def encode(first):
        model(ids, position_ids=torch.arange(first, first + 7)[None], use_cache=False)
        return [record[layer] for layer in range(3)]

    for layer, here, there in zip(ropes, encode(position), encode(position + distance)):
        # The model's angles are float32 and below 107, so keys on both sides are off by up to 107 U of
        # their size, and what deeper layers read by less (20 U in all were seen).
        assert close(rope.shift(here, distance, layer), there, 2 * 107 * U * there.abs().max())
        assert (here - there).abs().max() > 0.01 * there.abs().max()  # the keys did have to move
