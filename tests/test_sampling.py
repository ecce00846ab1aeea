"""The appendix's models: what a model says of itself, and how tokens are picked."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import LLAMA3, TINY, YARN, generate, random_model, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from appendix import models


def refused(words, function, *args, **options):
    """One sentence with these words."""
    with pytest.raises(ValueError, match=words) as refusal:
        function(*args, **options)
    assert "\n" not in str(refusal.value) and str(refusal.value).isprintable()


# ----------------------------------------------------------------------- what a model says of itself

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


@pytest.mark.parametrize(
    "config, tokens",
    [
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (
            LlamaConfig(max_position_embeddings=128, rope_parameters=YARN),
            512,
        ),  # the old maximum, stretched by 4
        (LlamaConfig(max_position_embeddings=512, rope_parameters=YARN), 512),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters=LLAMA3), 4096),
        (
            Phi3Config(
                max_position_embeddings=4096,
                original_max_position_embeddings=128,
                hidden_size=32,
                pad_token_id=0,
                num_attention_heads=2,
                rope_parameters=LONGROPE,
            ),
            128,
        ),
    ],
)
def test_context(config, tokens):
    """As far as the angles hold: longrope's change at the original length; yarn's reach further."""
    assert models.context(SimpleNamespace(config=config)) == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_sees_every_tensor(dtype):
    """Whichever parameter's first number changes, the fingerprint does."""
    model = copy.deepcopy(random_model("qwen2")).to(dtype)
    seen = {models.fingerprint(model)}
    for parameter in model.parameters():
        parameter.flatten()[0] += 0.5
        seen.add(models.fingerprint(model))
    assert len(seen) == 1 + len([*model.parameters()]) and {len(one) for one in seen} == {12}


FORMAT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot known') }}{% endif %}"
    + FORMAT
)


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            FORMAT,
            "<|im_start|>system\nRules.<|im_end|>\n"
            "<|im_start|>user\nTask.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (NO_SYSTEM, "<|im_start|>user\nRules.\n\nTask.<|im_end|>\n<|im_start|>assistant\n"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}:",
            "Rules.\n\nTask.:",
        ),
        (None, "Rules.\n\nTask.\n\n"),
        ("I am busy.", "it drops what it is given"),
        ("{{ raise_exception('never\x1b[2J') }}", "never"),
        ("{{ messages[7].content }}", "cannot be used: "),
        ("{% for %}", "cannot be used: "),
        ("{{ messages[0].content[:3] }}", "it drops what it is given"),
    ],
)
def test_chat_templates(template, expected):
    """One that knows no system messages gets the rules from the user; one that fails or drops text is
    refused."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    if expected.endswith(("\n", ":")):
        assert models.chat(words, "Rules.", "Task.") == expected
        assert models.chat(words, "", "Task.").count("Task.") == 1
    else:
        refused(expected, models.chat, words, "Rules.", "Task.")


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im", "\n", " ", "system", "é", "<", "|>"]
)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(PIECES, max_size=12), template=st.booleans(), first=st.sampled_from(["", "Go "]))
@example(parts=[], template=True, first="")
def test_special_tokens_in_a_problem_are_text(bare, parts, template, first):
    """Whatever a problem says, the special tokens of its prompt are those of the chat format; also where
    it says one of them, and nothing else."""
    words, problem = tokenizer() if template else bare, first + "<|im_start|>" + "".join(parts)
    prompt = models.chat(words, "Rules.", "{problem}")
    ids, special = models.encode_prompt(words, prompt, problem), set(words.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in words(prompt).input_ids if i in special]
    assert models.decode(words, ids) == prompt.replace("{problem}", problem)
    assert not special & {*models.encode(words, problem)}


@pytest.fixture(scope="module")
def bare():
    """A tokenizer without a chat format."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = None
    return words


# ------------------------------------------------------------------------------------------ sampling

SILENT = {"temperature": None, "top_p": None, "top_k": None}
SAMPLED = {"do_sample": True, **SILENT}


def sampler(model, said, **ours):
    """(a model whose generation_config says so, its Sampler)"""
    model = SimpleNamespace(
        config=model.config,
        device=model.device,
        generation_config=copy.deepcopy(model.generation_config),
        get_output_embeddings=model.get_output_embeddings,
        _model=model,
    )
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    for name in ("_prepare_special_tokens", "_get_logits_processor"):
        setattr(model, name, getattr(type(model._model), name).__get__(model._model))
    wanted = generate.Settings(forbid=[], forbid_special=False, **ours)
    return model, models.Sampler(model, tokenizer(), wanted, prompt_length=3)


def probabilities(model, logits, seen):
    """What transformers' own generate would draw from: all of its processors, on the whole
    vocabulary."""
    config = copy.deepcopy(model.generation_config)
    model._prepare_special_tokens(config, device="cpu")
    every = model._get_logits_processor(config, 3, device="cpu", model_kwargs={})
    return every(torch.tensor([seen]), logits[None].clone()).softmax(-1)[0]


@pytest.fixture(scope="module")
def few_words():
    """A model with 40 words."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 40})).eval()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    said=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.2, 3),
            "top_k": st.integers(0, 45),
            "top_p": st.floats(0.1, 1),
            "min_p": st.floats(0, 0.3),
            "typical_p": st.floats(0.2, 1),
            "repetition_penalty": st.floats(0.8, 2),
            "epsilon_cutoff": st.floats(0.0001, 0.05),
            "no_repeat_ngram_size": st.integers(0, 3),
            "suppress_tokens": st.lists(st.integers(0, 39), max_size=3),
        },
    ),
)
def test_tokens_come_as_often_as_transformers_would_draw_them(few_words, seed, said):
    """The frequencies of tokens over a grid of draws are the probabilities of all processors
    together."""
    torch.manual_seed(seed)
    model, ours = sampler(
        few_words, {"temperature": 1.0, "top_p": 1.0, "top_k": 50, **said, "do_sample": True}
    )
    logits, draws, seen = 3 * torch.randn(40), [(i + 0.5) / 2000 for i in range(2000)], [5, 7, 5, 9, 5]
    picked = ours.pick(logits.expand(2000, -1), draws, lambda row: seen)
    frequencies = torch.bincount(torch.tensor(picked), minlength=40) / 2000
    expected = probabilities(model, logits, seen)
    assert (frequencies - expected).abs().max() <= 1.5 / 2000 and bool(
        (expected[frequencies > 0] > 0).all()
    )


def test_what_the_command_line_gives_wins(few_words):
    """Temperature, top-p and top-k; a model that says nothing is sampled with 0.6, 0.95 and 50."""
    torch.manual_seed(0)
    logits, draws = torch.randn(40), [(i + 0.5) / 2000 for i in range(2000)]
    for said, given_here, as_if in (
        ({"do_sample": None, **SILENT}, {}, {"temperature": 0.6, "top_p": 0.95, "top_k": 50}),
        ({**SAMPLED, "temperature": 0.7}, {"top_k": 3}, {"temperature": 0.7, "top_p": 1.0, "top_k": 3}),
        (
            {"do_sample": False, **SILENT},
            {"temperature": 2.0},
            {"temperature": 2.0, "top_p": 1.0, "top_k": 50},
        ),
        (
            {**SAMPLED, "top_k": 2},
            {"top_k": 0, "top_p": 0.5},
            {"temperature": 1.0, "top_p": 0.5, "top_k": 0},
        ),
    ):
        _, ours = sampler(few_words, said, **given_here)
        picked = ours.pick(logits.expand(2000, -1), draws, lambda row: [])
        model, _ = sampler(few_words, {**as_if, "do_sample": True})
        frequencies = torch.bincount(torch.tensor(picked), minlength=40) / 2000
        assert (frequencies - probabilities(model, logits, [1])).abs().max() <= 1.5 / 2000


@pytest.mark.parametrize(
    "said, ours",
    [
        ({"do_sample": False, **SILENT}, {}),
        ({**SAMPLED, "temperature": 0.0}, {}),
        ({**SAMPLED, "temperature": 0}, {}),
        (SAMPLED, {"greedy": True}),
        ({**SAMPLED, "temperature": 1.0}, {"greedy": True, "temperature": 2.0}),
    ],
)
def test_greedy(few_words, said, ours):
    """The likeliest token, after the penalties; a forbidden one never."""
    _, greedy = sampler(few_words, {**said, "repetition_penalty": 100.0}, **ours)
    logits = torch.arange(1.0, 41.0)
    assert greedy.pick(logits.expand(3, -1), [0.0, 0.5, 0.999], lambda row: [39, 38][:row]) == [
        39,
        38,
        37,
    ]
    greedy.forbidden = torch.tensor([37])
    assert greedy.pick(logits[None], [0.5], lambda row: [38, 39]) == [36]


ODD = st.one_of(
    st.sampled_from(
        [
            -1,
            0,
            2,
            1.5,
            -0.5,
            1e9,
            float("nan"),
            float("inf"),
            "hot",
            [],
            {},
            True,
            [1, "x"],
            {"a": 1},
            10**20,
            "\x1b[2J",
        ]
    ),
    st.none(),
)
FIELDS = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "do_sample",
]


@settings(deadline=None, max_examples=300)
@given(said=st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1, max_size=2))
def test_odd_values_are_refused_in_one_sentence(few_words, said):
    """Whatever a generation_config says: a token, or a ValueError of one sentence."""
    try:
        _, ours = sampler(few_words, said)
        picked = ours.pick(torch.arange(40.0)[None], [0.5], lambda row: [3, 4])
    except ValueError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert 0 <= picked[0] < 40


def test_a_config_that_cannot_be_used_is_said_to_be_one(few_words):
    """In one sentence that says why."""
    for said in ({"temperature": -1.0}, {"repetition_penalty": 0.0}, {"min_p": 7.0}, {"top_k": "x"}):
        refused(
            "generation_config of this model cannot be used: ", sampler, few_words, {**SAMPLED, **said}
        )
