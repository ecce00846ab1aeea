import argparse
import json
import random
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")
replay = import_module("replay")

# ------------------------------------------------------------------------------------------------------------- the task

MODULUS = int(__import__("os").environ.get("MOD", "10"))
LABELS = "ABCDEFGHIJKL"
NAMES = generate.NAMES[:4]
END = ".\n\n"  # of a step that adds nothing


def chain(number):
    """Sum of the squares of the digits, again and again, until that is 1 or 4 (all other numbers lead there)."""
    numbers = [number]
    while numbers[-1] not in (1, 4):
        numbers.append(sum(int(digit) ** 2 for digit in str(numbers[-1])))
    return numbers


STARTS = [number for number in range(10, 100) if 2 <= len(chain(number)) - 1 <= (12 if MODULUS == 10 else 9)]


class Puzzle:
    """A list of numbers. How many steps does it take to bring them all down, altogether?"""

    def __init__(self, rng, items=(10, 12) if MODULUS == 10 else (9, 11)):
        self.starts = dict(zip(LABELS, rng.sample(STARTS, rng.randint(*items))))
        self.text = "\n".join(f"{label}: {number}" for label, number in self.starts.items())
        self.work = {label: [*(f" {n}" for n in chain(number)), f", {len(chain(number)) - 1} steps"]
                     for label, number in self.starts.items()}
        self.answer = str(sum(len(chain(number)) - 1 for number in self.starts.values()) % MODULUS)


def ideal(puzzle, me, own, seen, past):
    """The next word of worker `me`.

    own: words of its unfinished step; seen: {other worker: words of its unfinished step}; past: [(worker, words)].
    """
    last, finished = own[-1], dict(past)  # worker -> its latest finished step
    claims = [word[0] for words in [own, *seen.values(), *(words for _, words in past)] for word in words if is_claim(word)]
    if "done" in finished.get(me, ()):
        sums = {w: amount(words[0]) for w, words in [*past, *seen.items()] if "done" in words}
        if last == ", wait" or (len(own) == 1 and set(sums) != {me, *seen, *finished}):
            return ", wait"
        sums = [sums[w] for w in sorted(sums)]
        script = [f", {sum(sums[:k]) % MODULUS}" for k in range(2, len(sums))] + [", \\boxed{", str(sum(sums) % MODULUS), "}"]
        return script[len(own) - 1]
    if len(own) == 1 or (is_claim(last) and contested(last, me, seen, past)):
        free = LABELS.index(max(claims)) + 1 if claims else 0
        return LABELS[free] + ":" if free < len(puzzle.starts) else "done"
    if last == "done":
        return END
    mine = next(i for i in reversed(range(len(own))) if is_claim(own[i]))
    work = puzzle.work[own[mine][0]]
    return [*work, f", sum {(amount(own[0]) + len(work) - 2) % MODULUS}.\n\n"][len(own) - mine - 1]


def amount(word):
    """The sum that a step opens with."""
    return int(word[6:-3]) if word.startswith(", sum") else 0


def is_claim(word):
    return len(word) == 2 and word[1] == ":"


def contested(claim, me, seen, past):
    return any(claim in words and (words[-1] != claim or w < me) for w, words in seen.items()) or any(claim in words for _, words in past)


def play(puzzle, tokenizer, workers, layout, rng, slip=0.0):
    """A run of the ideal team, as chapter 6 would have recorded it. Returns (plan, prompt, separators, passes)."""
    plan = layouts.layout(layout, workers)
    encode = tokenizer.encode
    prompt = encode(f"{puzzle.text}\n\n" + (generate.PAST_STEPS if plan.moves else ""))
    if plan.headers:
        pending = [encode("\n\n" + generate.header(name, 1)) for name in NAMES[:workers]]
    else:
        prompt, pending = prompt[:-1], [prompt[-1:]] * workers
    own, past, steps, passes = [["\n\n"] for _ in range(workers)], [], [1] * workers, []
    while True:
        record = {"fed": dict(enumerate(pending)), "sampled": {}, "closed": []}
        words = []
        for w in range(workers):
            seen = {j: own[j] for j in range(workers) if j != w} if layout == "combined" else {}
            word = ideal(puzzle, w, own[w], seen, past)
            record["sampled"][w] = tokenizer.ids[word]
            if is_claim(word) and rng.random() < slip and word != "A:":
                word = rng.choice(LABELS[:LABELS.index(word[0])]) + ":"
                record["sampled"][w] = replay.NOTHING
            words.append(word)
        pending = [[tokenizer.ids[word]] for word in words]
        passes.append(record)
        if "}" in words:
            return plan, prompt, {name: encode(generate.SEPARATORS[name]) for name in plan.separator_views}, passes
        for w, word in enumerate(words):
            own[w] = [*own[w], word]
            if word.endswith(END):
                past.append((w, own[w][:-1]))
                own[w] = [word]
                steps[w] += 1
                record["closed"].append({"worker": w})
                if plan.headers:
                    pending[w] = pending[w] + encode(generate.header(NAMES[w], steps[w]))


# -------------------------------------------------------------------------------------------------------------- the model

class Words:
    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.cache = tokenizer, tokenizer.get_vocab(), {}

    def encode(self, text):
        if text not in self.cache:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(text) > 100:
                return ids
            self.cache[text] = ids
        return self.cache[text]


def make_tokenizer():
    words = ["<unk>", "<end>", generate.PAST_STEPS, *generate.SEPARATORS.values(), generate.CHECK, generate.FINISHER,
             "\n\n", END, "]:** ", *(f"**{name} [" for name in NAMES), "done", ", wait", ", \\boxed{", "}", *map(str, range(max(10, MODULUS)))]
    words += ["\n", *(label + ":" for label in LABELS), *(f", {d} steps" for d in range(2, 13))]
    words += [f" {number}" for number in sorted({n for start in STARTS for n in chain(start)})]
    words += [f", sum {d}.\n\n" for d in range(MODULUS)] + [f", {d}" for d in range(MODULUS)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    import re
    pattern = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def make_model(tokenizer, width=128, layers=4, heads=4, ffn=384, init=0.02):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None, initializer_range=init))
