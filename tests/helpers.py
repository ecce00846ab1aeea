"""What several test files share: random models, a short prompt, runs whose logits are kept, guests."""
import copy
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module

import torch
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from appendix import batching, guests, models, protocol

generate = import_module("06_generate")
# A short prompt keeps the oracle's passes small.
SHORT = "{names} solve this together, in short paragraphs.\n\n{problem}"
PROBLEM = "How much is 3 + 4 + 5 + 6? Explain how you add numbers."

TINY = {"vocab_size": 49152, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": LlamaConfig(**TINY, head_dim=16),
    "llama3": LlamaConfig(**TINY, head_dim=16, rope_parameters=LLAMA3),
    "yarn": LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN), "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY, pad_token_id=0, rope_parameters=PARTIAL),
}


def tiny(name, **others):
    """A random model of that kind, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    config.update(others)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5.0)
    return model


def run_and_record(model, tokenizer, settings, passes, problem=PROBLEM, loop=generate.Hogwild,
                   between=None):
    """(run, prompt ids as the history had them, logits [workers, vocabulary] of each of its passes)

    between: called with (run, number of the coming pass) before each pass.
    """
    run, logits = loop(model, tokenizer, problem, settings), []
    run.forward = keeping(run.forward, logits)
    for number in range(passes):
        if between:
            between(run, number)
        assert run.ending is None
        del logits[number:]  # (separators for somebody who came)
        writers = len(run.next_writers())
        run.advance()
        # What outsiders say is fed last, and what is encoded anew comes later.
        logits[number:] = [logits[number][:writers]]
    prompt = tokenizer(run.prompt, add_special_tokens=tokenizer.chat_template is None).input_ids
    return run, prompt[:-1] if settings.layout == "independent" else prompt, logits


def keeping(forward, logits):
    """The same forward; what it returns is kept in the list `logits`, too."""
    def keep(*arguments):
        logits.append(forward(*arguments).clone())
        return logits[-1].clone()
    return keep


@lru_cache
def tokenizer():
    """The bundled model's, without the model."""
    return AutoTokenizer.from_pretrained(models.converted(models.bundled_gguf()))


@lru_cache
def random_model(kind):
    """One random model of each kind; gemma3 has a window of 32 tokens in two of its three layers."""
    if kind != "gemma3":
        return tiny(kind)
    torch.manual_seed(0)
    layers = ["sliding_attention"] * 2 + ["full_attention"]
    config = Gemma3TextConfig(**TINY, head_dim=16, sliding_window=32, layer_types=layers)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def nobody_answers(monkeypatch):
    """Let no text count as an answer."""
    form = replace(protocol.FORMS["box"], find=lambda *_: None)
    monkeypatch.setitem(protocol.FORMS, "box", form)


def often(monkeypatch, every):
    """Let steps end by the length of their text, so that they end at different times and often."""
    natural = generate.step_ended
    monkeypatch.setattr(generate, "step_ended",
                        lambda text, marks: natural(text, marks) or len(text) % every == 0)
    nobody_answers(monkeypatch)


def settings_for(layout, workers, seed=0, **others):
    """A short prompt, checks inserted every now and then, sampling."""
    return generate.Settings(workers=protocol.NAMES[:workers], layout=layout, seed=seed, max_passes=200,
                             check_every=30, prompt=SHORT, **others)


class Reencode(generate.Hogwild):
    """A finished step is encoded anew at the end of the history, not moved (chapter 7 has this, too)."""

    def to_history(self, w):
        ids = self.ids[w.block]
        self.cache.truncate(w.block, 0)
        if ids:
            generate.feed(self.model, self.cache, [[([self.history], ids)]], self.forward)
        self.ids[self.history], self.ids[w.block] = self.ids[self.history] + ids, []


def happen(events, run, number):
    """What comes between two passes: events is a list of (number of the coming pass, what)."""
    for when, what in events:
        if when == number:
            if what == "say":
                guests.say(run, "Eve", f"Is it {number}?")
            elif what == "add" and len(run.workers) < 5:
                names = {event[1] for event in run.events} | {w.name for w in run.workers}
                guests.add(run, next(name for name in map("Newcomer{}.{}".format, [number] * 9, range(9))
                                     if name not in names))
            elif what == "dismiss" and len(run.workers) > 1:
                guests.dismiss(run, run.workers[number % len(run.workers)].name)


@st.composite
def runs(draw):
    """A run: kind of model, layout, workers, seed, passes, how often steps end."""
    return (draw(st.sampled_from([*MODELS, "gemma3"])),
            draw(st.sampled_from([*generate.layouts.LAYOUTS])), draw(st.integers(1, 4)),
            draw(st.integers(0, 1000)), draw(st.integers(0, 30)), draw(st.integers(5, 40)))


LOOPS = st.sampled_from([generate.Hogwild, generate.Hogwild, Reencode])
EVENTS = st.one_of(st.just([]), st.lists(st.tuples(
    st.integers(0, 29), st.sampled_from(["say", "add", "dismiss"])), min_size=1, max_size=6))


def evaluated(runs, budgets):
    """What chapter 7's `evaluate` returns for runs that have a cache of their own, each."""
    current = []

    def remembered():
        for run in runs:
            current[:] = [run]
            yield run
    job = import_module("07_eval_limo").evaluate(remembered(), {"answers": ["7"]}, budgets)
    return batching.alone(job, lambda groups: [current[0].fed(*groups)])


class Launcher:
    """Stands in for a Triton kernel: kernel[grid](...) becomes launch(grid, ...)."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return partial(self.launch, grid)


@lru_cache
def waiting_model():
    """A model made by hand: it writes ` wait`, and ` count` once ` pears` is anywhere in its view.

    Attention is the mean of all tokens in view. Dimension 0 of a token is always 1, dimension 1 says
    that it is ` pears`; the mean of the latter goes to dimension 2.
    """
    model = tiny("llama")
    model.config.num_hidden_layers, model.model.layers = 1, model.model.layers[:1]
    model.config.max_position_embeddings = 10**6
    for name, parameter in model.named_parameters():
        if "k_proj" not in name:  # (queries are 0, so keys do not matter)
            parameter.fill_(float("norm" in name))
    pears, wait, count = (models.encode(tokenizer(), word)[0] for word in (" pears", " wait", " count"))
    attention = model.model.layers[0].self_attn
    model.model.embed_tokens.weight[:, 0] = model.model.embed_tokens.weight[pears, 1] = 1.0
    attention.v_proj.weight[0, 1] = attention.o_proj.weight[2, 0] = 1000.0
    model.lm_head.weight[wait, 0] = model.lm_head.weight[count, 2] = 1.0
    return model
