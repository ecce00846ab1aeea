r"""Chapter 6: workers that write at once, see each other write, and decide for themselves how to collaborate.

The problem. Chapters 1 to 5 let several workers of one model read each other's memory while it grows. Nothing tells
them what to do with that. Hogwild! Inference (paper, sections 3.3 and 3.4, appendix C) does not prescribe a strategy:
it explains the situation to the model in a prompt, cuts the text into steps, and asks now and then whether anybody is
doing redundant work.

    PROMPT and the protocol strings    what the workers are told, and the few words that stand between the blocks
    step_ended, find_boxed             two rules about text: when a step is over, and what an answer is
    Hogwild                            the decoding loop: start from a problem, advance by one pass, ask for the answer
    Screen                             the live display, which reads nothing but the records of the passes
    main                               the command line

The loop in one breath: feed every worker's newest tokens, all packed into one row; one forward pass; pick one token per
worker; where a step is over, move its block to the history and open the next one with a header. That header is fed
together with the token that ended the step, so passes are ragged, and the tables of chapter 3 do not mind.

Run it: python 06_generate.py                       (Alice and Bob, on a small model that comes with the project)
        python 06_generate.py --help
"""
import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import jinja2
import torch
import transformers
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

# ------------------------------------------------------------------------------------------------ what is said to them

# Protocol strings, word for word those of the paper.
PAST_STEPS = "### Past steps"
SEPARATORS = {"others": "\n\n### Work in progress (others)", "dots": " <...>", "own": "\n\n### Work in progress (own)"}
CHECK = "Quick check: am I doing redundant work? (yes/no): "
FINISHER = ("\n\nWait, given the limited time, I have to give an answer right now. Considering all my previous attempts, "
            "I have to conclude that the final answer is \\boxed{")


def header(name, step):
    """How the step number `step` (from 1) of worker `name` begins."""
    return f"**{name} [{step}]:** "


# The rules of the paper's appendix C, in our own words. {names}, {count}, {example}, {view} and {problem} are filled in.
# What stands above the line of dashes is the system message, what stands below is the user's.
PROMPT = r"""# Several writers, one problem

You are one of {count} assistants who solve one problem together: {names}. All of you write at the same time. You share
a memory: whatever one of you writes, the others can read at once, word by word, while it is being written.

How to read this page:
- Each thought is a step, a paragraph that starts with its author's name and the number of the step: **Name [step]:**
{view}
- The others go on writing while you write. A thought of theirs that looks cut off is simply not finished yet, and the
  next time you look there may be more of it, or a new one.

How to work together:
- Share the work in whatever way suits the problem: take different parts, try different approaches, check each other's
  results, discuss a plan and change it when it fails. Say who does what.
- Read what the others are doing, unfinished thoughts included, before you choose what to do, and look again every now
  and then. If somebody makes you a suggestion or asks you something, react to it.
- Never do work twice. If you see that somebody has done what you are doing, or is doing it right now, stop, say so (for
  example: "Wait, {example} is already on this, so I will ..."), and turn to something else at once.
- Keep steps short, and end each with a blank line. Whoever knows the final answer puts it within \boxed{}.

---
{names}, solve this problem together, without doing any of the work twice:

{problem}"""

# What the page looks like depends on the layout; {view} is replaced by one of these.
VIEWS = {
    "combined": """\
- Under '### Past steps', the finished steps of all of you are gathered in the order in which they were finished.
- Below '### Work in progress (others)', you see the unfinished steps of the others, each up to the mark <...>, where
  its author is writing at this moment.
- Below '### Work in progress (own)', at the very end, is your own unfinished step, which you continue.""",
    "interleaved": """\
- Under '### Past steps', the finished steps of all of you are gathered in the order in which they were finished. A
  step of somebody else appears there as a whole, once it is finished.
- At the very end is your own unfinished step, which you continue.""",
    "contiguous": """\
- First comes everything that the others have written so far, one after the other.
- At the very end is everything that you have written so far, which you continue.""",
}
SOLO_PROMPT = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."  # nobody sees anybody

PROBLEM = """Tom has 3 red apples and 5 green apples. Ann has 4 red apples and 2 green apples. How many apples of each colour
are there, and how many altogether?"""
NAMES = ["Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi",
         "Ivan", "Judy", "Mallory", "Niaj", "Olivia", "Peggy", "Rupert", "Sybil"]
BUNDLED_MODEL = f"SmolLM2-135M-Instruct ({shared_cache.BUNDLED})"
FORBIDDEN = ["</think>", "##", " ##", "###", " ###", "####", " ####"]  # ends of thought, and headings: those are ours

# ------------------------------------------------------------------------------------------------- two rules about text

STEP_END = re.compile(r"""[.?!…。？！]  ["'”’»)\]}*_`$]*  [ \t]*\n[ \t]*\n\s*$""", re.VERBOSE)


def step_ended(text):
    """Is a step over? Its text ends in a blank line right after the end of a sentence, and no code fence is open.

    The end of a sentence may be dressed: `.)`, `.**`, `."`, `.$`. A colon or a comma does not end a step (appendix C).
    The text decides, not the token: some models write a blank line as one token, others as two.
    """
    return bool(STEP_END.search(text[-80:])) and text.count("```") % 2 == 0


def find_boxed(text):
    r"""The content of the last complete \boxed{...} in `text`, or None. Braces nest; \{ and \} do not count as braces."""
    answer = None
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for i in range(match.end(), len(text)):
            if text[i - 1] != "\\":
                depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                answer = text[match.end():i].strip() or answer
                break
    return answer


# ----------------------------------------------------------------------------------------------------- the decoding loop

@dataclass
class Settings:
    """Everything that shapes a run, besides the model and the problem."""

    workers: list = field(default_factory=lambda: ["Alice", "Bob"])
    layout: str = "combined"
    max_passes: int = 256  # the budget: sequential forward passes
    check_every: int = 1024  # generated tokens, of all workers together, between two collaboration checks; 0: never
    answer_tokens: int = 16  # longest early-stop answer (the paper: 16, 64 for OlympiadBench, 1024 for code)
    max_step: int = 1024  # a step that has grown to so many tokens is over, whatever its text says
    seed: int = 0
    greedy: bool = False
    temperature: float | None = None  # None: the model's own generation_config, or else 0.6
    top_p: float | None = None  # None: the model's own, or else 0.95
    top_k: int | None = None  # None: the model's own, or else 50
    prompt: str | None = None  # a template with {problem} in it, see PROMPT; None: PROMPT
    forbid: list = field(default_factory=lambda: list(FORBIDDEN))  # tokens that workers may not write ...
    forbid_special: bool = True  # ... and the special ones: end of text, roles

    def __post_init__(self):
        """Raise ValueError, with one sentence, if a setting makes no sense."""
        if not 1 <= len(self.workers) <= len(NAMES):
            raise ValueError(f"{len(self.workers)} workers were asked for; there can be 1 to {len(NAMES)}")
        for name in self.workers:
            if not re.fullmatch(r"[^\s*\[\]{}]{1,24}", name):
                raise ValueError(f"{name!r} is no name for a worker: up to 24 characters, no spaces or brackets (and a problem "
                                 "stands before the names)")
            if self.workers.count(name) > 1:
                raise ValueError(f"two workers are called {name!r}; each needs a name of its own")
        layouts.layout(self.layout, len(self.workers))
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise ValueError("the prompt has no {problem} in it, so the workers would never see the problem")
        smallest = {"max_passes": 1, "check_every": 0, "answer_tokens": 1, "max_step": 64, "seed": 0, "top_k": 0}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{name} is {value}; it must be at least {least}, and below 2^31")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature is {self.temperature}; it must be above 0 (for no randomness: --greedy)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}; it must be above 0 and at most 1")


def best_forward(device, attention="auto"):
    """How to run a forward pass: "torch" (chapter 4) or "triton" (chapter 5); "auto" is the latter on GPUs, if it works there.

    Raises:
        ValueError: there is no such device; or Triton was asked for by name, and is not installed, or does not work there.
    """
    shared_cache.use_device(device)
    on_gpu = torch.device(device).type == "cuda"
    if attention == "torch" or (attention == "auto" and not on_gpu):
        return query_rotation.forward
    try:
        triton_kernel = import_module("05_triton_kernel")
        if not on_gpu and not triton_kernel.INTERPRETED:
            raise ValueError("the Triton kernel needs a GPU (--device cuda); without one it can be tried, slowly, in Triton's "
                             "interpreter: set TRITON_INTERPRET=1")
        triton_kernel.check(device)
    except Exception as error:  # of any kind: no Triton, no compiler that it needs, a GPU that it does not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if attention == "auto":
            print(f"attention runs through PyTorch, without the Triton kernel: {reason}", file=sys.stderr)
            return query_rotation.forward
        raise ValueError(reason) from error
    return triton_kernel.Decoder()


def chat(tokenizer, rules, task):
    """The model's own chat format, up to where the assistant's turn begins. Not every template knows system messages."""
    system = [{"role": "system", "content": rules}] if rules else []
    for messages in ([*system, {"role": "user", "content": task}],
                     [{"role": "user", "content": f"{rules}\n\n{task}".lstrip()}]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError) as error:
            refusal = error
            continue
        if all(message["content"].strip() in text for message in messages):
            return text
        refusal = "it drops what it is given"
    raise ValueError(f"the chat template of this model cannot be used: {refusal}")


@dataclass
class Worker:
    """One writer: its block of the shared cache, and what it is about to feed."""

    name: str
    index: int
    generator: torch.Generator  # its own random numbers
    pending: list  # token ids to be fed in the next pass: the one sampled last, and a header where a step opens
    step: int = 1  # number of the step being written
    ids: list = field(default_factory=list)  # token ids of the step so far, the pending ones included
    shown: int = 0  # how many characters of the step's text the records contain so far
    check_due: bool = False  # the next step opens with the collaboration check
    finished: bool = False  # wrote the end of text (only where that is not forbidden) or, in chapter 7, an answer of its own

    @property
    def block(self):
        """Number of the worker's block in the cache."""
        return 1 + self.index


class Hogwild:
    """One collaboration of the workers on one problem.

        run = Hogwild(model, tokenizer, problem, Settings(workers=["Alice", "Bob"]))
        while run.ending is None:
            run.advance()
        print(run.answer())

    `answer` may be asked at any time: it disturbs nothing. `passes` is the list of records, one per forward pass:

        {"fed": {worker: ids}, "sampled": {worker: id},  what went through the model, and what came out
         "text": {worker: str},                          what that adds to the worker's text
         "closed": [{"worker", "step", "text",           steps that are over: whose, its number, what its block held,
                     "opened", "opens_with_check"}],     and the words with which the next one opens
         "view": tokens in the longest view, "seconds": float}

    How a step ends. Bob's block holds `**Bob [1]:** It is 5.`; the token that he samples now completes a blank line, so the
    step is over: the block moves to the history. That token was sampled but not fed, so it comes first in the new block:
    pending are now that token and `**Bob [2]:** `, which the next pass feeds while everybody else feeds one token.
    (Where a tokenizer has full stop and blank line in one token, the full stop moves along to the next block.)

    Args:
        model, tokenizer: any causal language model of transformers with rotary embeddings (chapter 2's load_model).
        problem: the text of the problem.
        forward: chapter 4's `forward`, or chapter 5's Decoder, which takes the same arguments; None: see best_forward.
    Raises:
        ValueError: unusable settings, an empty problem, a model that cannot be used, a prompt longer than its context.
    """

    def __init__(self, model, tokenizer, problem, settings=None, forward=None):
        self.model, self.tokenizer, self.problem = model, tokenizer, problem
        self.settings, self.forward = settings or Settings(), forward or best_forward(model.device)
        if not problem.strip():
            raise ValueError("the problem is empty; give the workers something to solve")
        self.layout = layouts.layout(self.settings.layout, len(self.settings.workers))
        ropes = query_rotation.attach(model)
        self.end_ids = self._end_ids()
        self.forbidden = self._forbidden_ids()
        self.warpers, self.top_k = self._sampling()

        self.prompt = self._prompt_text()
        prompt_ids, first = self._openings()
        self.workers = [Worker(name, i, torch.Generator().manual_seed(self.settings.seed + i), ids,
                               ids=list(ids) if self.layout.headers else [])  # (the end of a prompt is nobody's text)
                        for i, (name, ids) in enumerate(zip(self.settings.workers, first))]
        self.opening = {w.index: self._new_text(w) for w in self.workers}
        self.finisher = self.encode(FINISHER)
        self.opening_room = 2 + max(len(self.encode("\n\n" + header(name, 9999) + CHECK)) for name in self.settings.workers)
        self.reserve = len(self.finisher) + self.settings.answer_tokens + self.opening_room  # kept free for the early stop
        self.separators = {name: self.encode(SEPARATORS[name]) for name in self.layout.separator_views}
        self.context = self._context()
        self.cache = shared_cache.SharedCache(self._rooms(prompt_ids), ropes)
        self.rows = [self.cache.blocks[b] for b in self.layout.blocks]
        self.passes, self.generated = [], 0  # records; tokens sampled by all workers
        self.boxed = None  # the answer, once a worker has written one
        self.check_generator = random.Random(self.settings.seed)  # chooses who is asked the collaboration check
        needed = len(prompt_ids) + sum(map(len, self.separators.values())) + sum(len(w.pending) for w in self.workers)
        if needed + self.reserve > self.context:
            raise ValueError(f"the prompt takes {needed} tokens and an answer {self.reserve}, "
                             f"but the model's context ends at {self.context}: shorten the problem")
        self._encode_prompt(prompt_ids)
        if self.ending == "context":
            raise ValueError(f"the prompt leaves no room to write in a context of {self.context} tokens: shorten the problem")

    # -- starting -----------------------------------------------------------------------------------------------------

    def encode(self, text, special=False):
        """Token ids of `text`, as a list, without the tokenizer's own additions unless `special`."""
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def decode(self, ids):
        """Text of token ids, exactly as written."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _openings(self):
        """Token ids of the common block, and for each worker those with which its own block opens, in the first pass."""
        ids = self.encode(self.prompt, special=self.tokenizer.chat_template is None)
        if self.layout.headers:
            return ids, [self.encode("\n\n" + header(name, 1)) for name in self.settings.workers]
        return ids[:-1], [ids[-1:]] * len(self.settings.workers)  # the logits of the last one give everybody's first word

    def _prompt_text(self):
        names = self.settings.workers
        template = self.settings.prompt
        if template is None:
            template = SOLO_PROMPT if self.layout.name == "independent" else PROMPT
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        fill = {"names": listed, "count": str(len(names)), "example": names[0], "view": VIEWS.get(self.layout.name, ""),
                "problem": self.problem.strip()}  # the problem last: its braces are its own business
        rules, line, task = template.partition("\n---\n")
        rules, task = (rules.strip(), task.strip()) if line else ("", template)
        for key, value in fill.items():
            rules, task = (text.replace("{" + key + "}", value) for text in (rules, task))
        if self.tokenizer.chat_template is None:
            text = f"{rules}\n\n{task}\n\n".lstrip()
        else:
            text = chat(self.tokenizer, rules, task)
            if "<think>" in self.tokenizer.get_vocab() and not text.rstrip().endswith("<think>"):
                text += "<think>\n"  # a reasoning model: the assistant's turn starts with its thoughts
        return text + PAST_STEPS if self.layout.moves else text

    def _end_ids(self):
        ends = self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id] if ends is None else ends
        return {i for i in (ends if isinstance(ends, list) else [ends]) if i is not None}

    def _forbidden_ids(self):
        ids = set()
        if self.settings.forbid_special:
            ids = self.end_ids | {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        for text in self.settings.forbid:
            token = self.encode(text)
            if len(token) == 1:  # a text of several tokens (such as </think> for a model that has no such token) is
                ids.add(token[0])  # never written by accident
        return torch.tensor(sorted(i for i in ids if i < self.model.get_output_embeddings().weight.shape[0]),
                            dtype=torch.long)

    def _sampling(self):
        """The model's own way of sampling: (temperature and top-p as logits processors, or None for greedy; top-k)."""
        def pick(name, default):
            chosen, own = getattr(self.settings, name), getattr(self.model.generation_config, name, None)
            return chosen if chosen is not None else own if own is not None else default

        temperature = float(pick("temperature", 0.6))
        if self.settings.greedy or temperature < 1e-3:
            return None, 0
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if pick("top_p", 0.95) < 1:
            warpers.append(TopPLogitsWarper(float(pick("top_p", 0.95))))
        return warpers, max(0, pick("top_k", 50))

    def _context(self):
        config = self.model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        if parameters.get("rope_type") == "longrope" or parameters.get("llama_4_scaling_beta"):
            # beyond that the model turns its keys by other angles, or scales its queries by their position
            return parameters["original_max_position_embeddings"]
        return config.max_position_embeddings

    def _rooms(self, prompt_ids):
        """Slots per block, for the worst case: a memory that never grows. No block outgrows the context."""
        opening = self.opening_room
        written = self.settings.max_passes * opening  # by one worker, if each pass ended a step and opened the next
        history = len(prompt_ids) + (len(self.workers) * written if self.layout.moves else 0)
        opening = max(opening, *(len(w.pending) for w in self.workers))
        own = (min(written, self.settings.max_step) if self.layout.moves else written) + opening + self.reserve
        rooms = [min(own, self.context)] * (1 + max(self.layout.blocks))
        rooms[layouts.HISTORY] = min(history, self.context)
        for name, view in self.layout.separator_views.items():
            rooms[self.layout.blocks[view[-1]]] = len(self.separators[name])
        return rooms

    def _encode_prompt(self, prompt_ids, chunk=512):
        """Fill the common block, then the separators, each in its place of the view (prefill).

        In chunks, since the scores of a chunk take chunk x context numbers per head.
        """
        for i in range(0, len(prompt_ids), chunk):
            self._feed([([layouts.HISTORY], prompt_ids[i:i + chunk])])
        if self.separators:
            self._feed([(view, self.separators[name]) for name, view in self.layout.separator_views.items()])

    # -- advancing ----------------------------------------------------------------------------------------------------

    def _feed(self, writers):
        """One forward pass. `writers`: pairs (view, ids). Returns the logits [len(writers), vocabulary] of last tokens.

        If the pass fails, or is interrupted, the blocks are as long as before.
        """
        lengths = [block.length for block in self.cache.blocks]
        try:
            self.cache.append({self.layout.blocks[view[-1]]: len(ids) for view, ids in writers})
            tables = layouts.fill_tables(self.rows, [(view, len(ids)) for view, ids in writers])
            packed = [i for _, ids in writers for i in ids]  # [N]
            last = torch.tensor([len(ids) for _, ids in writers]).cumsum(0) - 1
            return self.forward(self.model, self.cache, tables, packed, last)
        except BaseException:
            self._cut_back(lengths)
            raise

    def _cut_back(self, lengths):
        for b, length in enumerate(lengths):
            self.cache.cut(b, length)

    @property
    def ending(self):
        """Why the run is over: "answer", "passes", "context", "end of text"; None while it is not."""
        writing = [w for w in self.workers if not w.finished]
        if self.boxed is not None:
            return "answer"
        if not writing:
            return "end of text"
        if len(self.passes) >= self.settings.max_passes:
            return "passes"
        coming = sum(len(w.pending) for w in writing)
        if self.longest_view + coming + self.reserve > self.context:
            return "context"
        return None

    @property
    def longest_view(self):
        """Tokens that are in view of the worker who sees most of them."""
        return max(sum(self.rows[row].length for row in view) for view in (*self.layout.views, self.layout.final_view))

    def advance(self):
        """One forward pass of all workers; each of them writes one token. Returns (and keeps) the record of the pass."""
        start = time.perf_counter()
        writing = self._writing()
        lengths = [block.length for block in self.cache.blocks]
        logits = self._feed([(self.layout.views[w.index], w.pending) for w in writing])
        try:
            tokens = self.sample(logits, writing)
        except BaseException:
            self._cut_back(lengths)
            raise
        record = {"fed": {}, "sampled": {}, "text": {}, "closed": []}
        for w, token in zip(writing, tokens):
            record["fed"][w.index], record["sampled"][w.index] = w.pending, token
            w.finished = token in self.end_ids
            w.pending = [] if w.finished else [token]
            w.ids.append(token)
        self._schedule_check(writing)
        for w in writing:
            text = self.decode(w.ids)
            if "}" in text[w.shown:]:
                self._answered(w, find_boxed(text))
            full = self.layout.moves and self.cache.blocks[w.block].length + 1 >= self.settings.max_step
            if (full or step_ended(text)) and not w.finished:
                record["closed"].append(self._close_step(w))
            else:
                record["text"][w.index] = self._new_text(w)
        record.update(view=self.longest_view, seconds=time.perf_counter() - start)
        self.passes.append(record)
        return record

    # Four methods that chapter 7's baselines and ablations replace: _openings above, and these three.

    def _writing(self):
        """The workers who write in the coming pass."""
        return [w for w in self.workers if not w.finished]

    def _answered(self, w, answer):
        """Worker w closed a brace; `answer` is what its step says in \\boxed{...}, or None."""
        self.boxed = answer or self.boxed

    def _to_history(self, w):
        """Move the step that worker w has finished to the history."""
        self.cache.move(w.block, layouts.HISTORY)

    def sample(self, logits, writing):
        """Pick one token per worker from logits [workers, vocabulary], each with the worker's own random numbers."""
        logits = logits.float()
        if logits.isnan().any():
            raise ValueError("the model computes NaN; another --dtype may help (float32 or bfloat16)")
        logits[:, self.forbidden.to(logits.device)] = float("-inf")
        if self.warpers is None:
            return logits.argmax(-1).tolist()
        ids = None
        if self.top_k:  # the k best first: temperature and top-p then have k numbers to look at, not a vocabulary
            logits, ids = logits.topk(min(self.top_k, logits.shape[-1]))
        weights = self.warpers(None, logits).softmax(-1).cpu()
        picks = [torch.multinomial(p, 1, generator=w.generator) for p, w in zip(weights, writing)]
        return [int(pick) if ids is None else int(ids[i, pick]) for i, pick in enumerate(picks)]

    def _schedule_check(self, writing):
        """Once every `check_every` generated tokens, one worker is asked a question as it opens its next step."""
        every, before = self.settings.check_every, self.generated
        self.generated += len(writing)
        writing = [w for w in writing if not w.finished]
        if every and writing and self.generated // every > before // every and self.layout.headers:
            self.check_generator.choice(writing).check_due = True

    def _close_step(self, w):
        """The step of worker w is over: move it to the history, open the next one. Returns what the record says of it.

        The token that ended the step was sampled but not yet fed, so it is the first one of the next block.
        """
        closed = {"worker": w.index, "step": w.step, "text": self.decode(w.ids[:-1]), "opens_with_check": w.check_due}
        opening = CHECK if w.check_due else ""
        w.check_due = False
        w.step += 1
        if self.layout.moves:
            self._to_history(w)
            opening = header(w.name, w.step) + opening
        w.pending = [w.ids[-1], *self.encode(opening)] if opening else [w.ids[-1]]
        w.ids, w.shown = list(w.pending), 0
        closed["opened"] = self._new_text(w)
        return closed

    def _new_text(self, w):
        """What worker w has written since the last call. Half a character (some bytes of an emoji) has to wait."""
        text = self.decode(w.ids).rstrip("\ufffd")
        new, w.shown = text[w.shown:], max(w.shown, len(text))
        return new

    # -- answering ----------------------------------------------------------------------------------------------------

    def answer(self):
        """The answer now, without disturbing the run (early stop; paper, section 4.1 and appendix C).

        If a worker wrote \\boxed{...}, that is the answer. Otherwise the last worker, who sees everything, is made to
        say it: the finisher is appended to its block, at most settings.answer_tokens are decoded greedily, and the
        blocks are cut back. Nothing that is in the cache is encoded again, and the run does not notice.
        Returns:
            The text inside the braces, without surrounding space; all of the answer if the brace was not closed in time.
        """
        if self.boxed is not None:
            return self.boxed
        lengths = [block.length for block in self.cache.blocks]
        view, last, text, ids = self.layout.final_view, self.workers[-1], "", []
        writers = [(self.layout.views[w.index], w.pending) for w in self.workers[:-1] if w.pending]
        feed = last.pending + self.finisher
        coming = sum(len(ids) for _, ids in writers) + len(feed) + self.settings.answer_tokens
        if self.longest_view + coming > self.context:
            writers = []  # the context ends here: the others' newest tokens are left out
        try:
            while len(ids) < self.settings.answer_tokens:
                logits = self._feed([*writers, (view, feed)])[-1]
                token = int(logits.argmax())
                if token in self.end_ids:
                    break
                ids.append(token)
                text = self.decode(ids)
                closed = find_boxed("\\boxed{_" + text)  # with the _ an empty box ends here, too
                if closed:
                    return closed[1:].strip()
                writers, feed = [], [token]
            return text.strip()
        finally:
            self._cut_back(lengths)


# ------------------------------------------------------------------------------------------------------------ the trace

def trace_of(run, model_name, ending, answer, error=None):
    """Everything about a run as one JSON-ready dict: enough to show it again, or to compute every table anew."""
    return {
        "format": "hogwild-trace-1", "problem": run.problem, "prompt": run.prompt, "settings": asdict(run.settings),
        "model": model_name, "device": str(run.model.device), "dtype": str(run.model.dtype),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "separators": {name: SEPARATORS[name] for name in run.separators}, "opening": run.opening, "context": run.context,
        "passes": run.passes, "tokens": run.generated, "ending": ending, "answer": answer, "error": error,
    }


def save_trace(path, trace):
    """Write the trace to `path`, whole or not at all."""
    path = os.path.realpath(path)  # where a link points to, so that it stays a link
    temporary = Path(f"{path}.part")
    temporary.write_text(json.dumps(trace, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def load_trace(path):
    """Read a trace. Raises ValueError if the file is none."""
    try:
        trace = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the trace {path!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path!r} is not a trace: {error}") from error
    if not isinstance(trace, dict) or trace.get("format") != "hogwild-trace-1":
        raise ValueError(f"{path!r} is not a trace that --save wrote")
    try:
        for key in ("problem", "prompt", "settings", "context", "tokens", "ending", "answer", "error"):
            trace[key]
        if not isinstance(trace["passes"], list):
            raise ValueError("its passes are no list")
        for record in trace["passes"]:  # JSON turned the worker numbers into strings
            for key in ("fed", "sampled", "text"):
                record[key] = {int(worker): value for worker, value in record[key].items()}
            record["seconds"] = float(record["seconds"])
            if not all(type(token) is int and token >= 0 for token in [*sum(record["fed"].values(), []),
                                                                       *record["sampled"].values()]):
                raise ValueError("a token id is no natural number")
        trace["opening"] = {int(worker): text for worker, text in trace["opening"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the trace {path!r} is damaged: {type(error).__name__}: {error}") from error
    return trace


# ---------------------------------------------------------------------------------------------------------- the display

COLOURS = ["cyan", "magenta", "green", "yellow", "bright_blue", "bright_red", "bright_green", "bright_magenta"]


class Screen:
    """Shows a run, live or replayed, from the records of its passes alone.

    On a terminal: the history above, one column per worker below, a line of figures at the bottom. Elsewhere: one line
    per finished step.
    """

    def __init__(self, names, opening, moves, live, title, context, console):
        self.names, self.moves, self.title, self.context, self.console = names, moves, title, context, console
        self.history = []  # (worker, text) of each finished step, where finished steps move
        self.current = dict(opening)  # worker -> text of its block
        self.passes, self.tokens, self.view = 0, 0, 0
        self.recent = deque(maxlen=50)  # (tokens, seconds) of the last passes
        self.live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self.next_refresh = 0.0

    def __enter__(self):
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.__exit__(*exception)

    def show(self, record):
        """Take in the record of one pass."""
        for worker, text in record["text"].items():
            self.current[worker] += text
        for closed in record["closed"]:
            worker, text = closed["worker"], closed["text"]
            if self.moves:
                self.history.append((worker, text))
                self.current[worker] = closed["opened"]
                if not self.live:
                    self.console.print(self.styled(worker, text.strip()), soft_wrap=True)
            else:
                self.current[worker] += closed["opened"]
        self.passes += 1
        self.tokens += len(record["sampled"])
        self.recent.append((len(record["sampled"]), record["seconds"]))
        self.view = record["view"]
        now = time.perf_counter()
        if self.live and now >= self.next_refresh:
            self.live.update(self.frame(), refresh=True)
            took = time.perf_counter() - now
            self.next_refresh = now + max(0.1, 40 * took)  # drawing takes at most a fortieth of the time

    def styled(self, worker, text):
        """Text in the worker's colour, with the inserted checks marked."""
        styled = Text(text, style=COLOURS[worker % len(COLOURS)])
        styled.highlight_words([CHECK.strip()], "black on yellow")
        styled.highlight_regex(r"\*\*[^*\n]+ \[\d+\]:\*\*", "bold")
        return styled

    def figures(self):
        """The line of figures."""
        tokens, seconds = (sum(column) for column in zip(*self.recent or [(0, 1)]))
        rate = tokens / seconds if seconds else 0.0
        return (f"pass {self.passes} · {self.tokens} tokens · {rate:.1f} tokens/s · {self.view:,} of {self.context:,} tokens "
                "of context in view")

    def frame(self):
        """What the terminal shows now."""
        width, height = self.console.size
        rows = max(5, (height - 6) // 2 if self.moves else height - 6)

        def last_lines(text, columns, lines):
            return Text("\n").join(text.wrap(self.console, max(1, columns))[-max(1, lines):])

        grid = Table.grid(expand=True)
        inner = width // len(self.names) - 4
        if inner >= 12:
            for _ in self.names:
                grid.add_column(ratio=1)
            grid.add_row(*(Panel(last_lines(self.styled(i, self.current[i].strip()), inner, rows - 2), title=name, height=rows,
                                 border_style=COLOURS[i % len(COLOURS)]) for i, name in enumerate(self.names)))
        else:  # too many workers for columns: one line each, the end of what they write
            rows = len(self.names)
            for i, name in enumerate(self.names):
                tail = " ".join(self.current[i].split())[-max(1, width - len(name) - 3):]
                grid.add_row(Text.assemble((f"{name}: ", "bold"), self.styled(i, tail), no_wrap=True))
        parts = [grid, Text(self.figures(), style="dim")]
        if self.moves:
            past = Text("\n\n").join(self.styled(worker, text.strip()) for worker, text in self.history[-40:])
            parts.insert(0, Panel(last_lines(past, width - 4, height - rows - 5), title="past steps",
                                  height=max(3, height - rows - 3), border_style="white"))
        return Group(*parts)

    def finish(self):
        """Print what has not been printed yet: all of it after a live display, the unfinished steps otherwise."""
        if self.live:
            self.console.print(Text(self.title, style="bold"), soft_wrap=True)
            for worker, text in self.history:
                self.console.print(self.styled(worker, text.strip()), soft_wrap=True)
        for worker, text in self.current.items():
            unfinished = Text.assemble(self.styled(worker, text.strip()), (SEPARATORS["dots"], "dim"))
            if not self.moves:
                unfinished = Text.assemble((f"{self.names[worker]}: ", "bold"), unfinished)
            self.console.print(unfinished, soft_wrap=True)


def report(console, trace):
    """The answer, and one line of figures."""
    passes, tokens = len(trace["passes"]), trace["tokens"]
    seconds = sum(record["seconds"] for record in trace["passes"])
    how = {"answer": "a worker wrote it", "passes": "asked when the passes were used up", "end of text": "all have finished",
           "context": "asked when the model's context was used up"}.get(trace["ending"], trace["ending"])
    if trace["answer"] is not None:
        console.print(Text.assemble("\nAnswer: ", (trace["answer"] or "(none)", "bold"), f"   ({how})"), soft_wrap=True)
    else:
        console.print(f"\nNo answer: {trace['ending']}", markup=False, soft_wrap=True)
    console.print(f"{passes} passes, {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s; one worker alone would need "
                  f"{tokens} passes for as many tokens ({tokens / max(passes, 1):.2f} x)", markup=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a page when something is wrong."""

    def error(self, message):
        """Print the sentence and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv):
    """The command line."""
    parser = Parser(description="Workers of one language model solve a problem together, writing at once and reading each "
                                "other's words as they appear (Hogwild! Inference).",
                    epilog="example: python 06_generate.py 'What is 17 * 23 + 19 * 21?' --workers 3 --max-passes 400 --seed 1",
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110))
    default = Settings()
    task = parser.add_argument_group("what to solve")
    task.add_argument("problem", nargs="?", help="the problem; '-' reads it from standard input (default: a built-in one)")
    task.add_argument("--file", metavar="FILE", help="read the problem from a file")
    task.add_argument("--prompt", metavar="FILE", help="another prompt: a text with {problem} in it, and {names}, {count}, "
                      "{example}, {view} where wanted; what stands above a line '---' is the system message")
    who = parser.add_argument_group("who solves it")
    who.add_argument("--model", metavar="NAME", help="hub name, local folder, or GGUF file (default: the bundled SmolLM2-135M)")
    who.add_argument("--workers", nargs="+", default=default.workers, metavar="NAME",
                     help="their names, or how many of them, 1 to 16 (default: Alice Bob)")
    who.add_argument("--layout", default=default.layout, metavar="LAYOUT",
                     help=f"who sees what: {', '.join(layouts.LAYOUTS)} (default: {default.layout})")
    who.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one there is)")
    who.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                     help="default: that of the checkpoint")
    who.add_argument("--attention", default="auto", choices=["auto", "torch", "triton"],
                     help="chapter 4's (torch), chapter 5's kernel (triton), or the kernel on a GPU (auto, the default)")
    how = parser.add_argument_group("how")
    how.add_argument("--max-passes", type=int, metavar="N",
                     help=f"budget of forward passes (default: {default.max_passes})")
    how.add_argument("--check-every", type=int, default=default.check_every, metavar="N",
                     help=f"generated tokens between checks for redundant work, 0 for none (default: {default.check_every})")
    how.add_argument("--answer-tokens", type=int, default=default.answer_tokens, metavar="N",
                     help=f"length of an answer given when the budget ends (default: {default.answer_tokens})")
    how.add_argument("--seed", type=int, default=default.seed, metavar="N", help="for the random numbers (default: 0)")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--temperature", type=float, metavar="T", help="default: the model's own, or 0.6")
    how.add_argument("--top-p", type=float, metavar="P", help="default: the model's own, or 0.95")
    how.add_argument("--top-k", type=int, metavar="K", help="default: the model's own, or 50; 0 for no limit")
    how.add_argument("--forbid", nargs="*", default=default.forbid, metavar="TOKEN",
                     help=f"what workers may not write, besides special tokens (default: {' '.join(map(repr, FORBIDDEN))})")
    show = parser.add_argument_group("showing and keeping")
    show.add_argument("--no-live", action="store_true", help="plain lines instead of the live display")
    show.add_argument("--save", metavar="FILE", help="write the trace of the run, also if it is interrupted or fails")
    show.add_argument("--resume", metavar="FILE", help="go on with a saved run where it stopped, its problem and settings as "
                      "they were (a larger --max-passes takes it further), and save it to the same FILE, or where --save says")
    show.add_argument("--replay", metavar="FILE", help="show a saved run again; needs no model")
    show.add_argument("--svg", metavar="FILE", help="write the last picture of the display as an SVG")
    return parser.parse_args(argv)


def settings_of(args):
    """Settings from the command line."""
    names = args.workers
    if len(names) == 1 and re.fullmatch(r"-?\d+", names[0]):
        if not 1 <= int(names[0]) <= len(NAMES):
            raise ValueError(f"{names[0]} workers were asked for; there can be 1 to {len(NAMES)}")
        names = NAMES[:int(names[0])]
    prompt = None if args.prompt is None else read_text(args.prompt, "prompt")
    max_passes = Settings.max_passes if args.max_passes is None else args.max_passes
    return Settings(list(names), args.layout, max_passes, args.check_every, args.answer_tokens, seed=args.seed,
                    greedy=args.greedy, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, prompt=prompt,
                    forbid=list(args.forbid))


def read_text(path, what):
    """The text of a file, or a ValueError of one sentence."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the {what} {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_problem(args):
    """The problem from the argument, a file, standard input, or the built-in one."""
    if args.file is not None:
        if args.problem is not None:
            raise ValueError("the problem is given twice, as an argument and with --file; give it once")
        problem = read_text(args.file, "problem")
    else:
        problem = sys.stdin.read() if args.problem == "-" else PROBLEM if args.problem is None else args.problem
    try:
        problem.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the problem is not valid UTF-8 text") from error
    if not problem.strip():  # (said here too, before a model is loaded)
        raise ValueError("the problem is empty; give the workers something to solve")
    return problem


def check_writable(path):
    """Raise ValueError, before anything is computed, if a file cannot be written in the end."""
    part = Path(f"{path}.part")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no ordinary file")
        part.touch()
        part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path!r} cannot be written ({error.strerror or error}): give a file name in a folder that exists "
                         "and is writable") from error


def best_device():
    """cuda, mps or cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def replay(path, console, live):
    """Show a saved run again, at the pace at which it went."""
    trace = load_trace(path)
    try:
        settings = Settings(**trace["settings"])
        moves = layouts.layout(settings.layout, len(settings.workers)).moves
        title, context = trace["problem"].strip(), trace["context"]
        with Screen(settings.workers, trace["opening"], moves, live, title, context, console) as screen:
            for record in trace["passes"]:
                screen.show(record)
                if live:
                    time.sleep(record["seconds"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"the trace {path!r} is damaged: {type(error).__name__}: {error}") from error
    return screen, trace


def resumed(args):
    """Settings and trace of --resume; `args` takes over from it what was not given."""
    trace = load_trace(args.resume)
    given = vars(args)
    fixed = set(given) - {"resume", "model", "max_passes", "device", "dtype", "attention", "no_live", "save", "svg"}
    changed = [name for name, default in vars(parse([])).items() if name in fixed and given[name] != default]
    if changed:
        raise ValueError(f"a resumed run keeps its problem and settings: leave out {changed[0].replace('_', '-')} (what may be "
                         "given: --max-passes, --model, --device, --dtype, --attention, --save, --svg, --no-live)")
    try:
        settings = Settings(**trace["settings"] | ({} if args.max_passes is None else {"max_passes": args.max_passes}))
        args.model = args.model or (None if trace["model"] == BUNDLED_MODEL else trace["model"])
        args.dtype = trace["dtype"].removeprefix("torch.") if args.dtype == "auto" else args.dtype
        args.save = args.save or args.resume
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the trace {args.resume!r} is damaged: {type(error).__name__}: {error}") from error
    if settings.max_passes < len(trace["passes"]):
        raise ValueError(f"the run has taken {len(trace['passes'])} passes already; --max-passes {settings.max_passes} is less")
    return settings, trace


def collaborate(args, settings, problem, console, live, past=None):
    """Load the model and run the workers; go on from the trace `past`, if there is one.

    Returns (screen, trace); the trace says how it ended, whatever happened.
    """
    name = args.model or BUNDLED_MODEL
    console.print(f"loading {name} ...", style="dim", soft_wrap=True, markup=False)
    device = args.device or best_device()
    if device == "cpu":  # leave a core to the rest of the machine: one thread that has to wait makes all the others wait
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    forward = best_forward(device, args.attention)
    model, tokenizer = shared_cache.load_model(args.model, device, args.dtype)
    run = Hogwild(shared_cache.pack_linears(model), tokenizer, problem, settings, forward)
    if past:
        if (run.prompt, run.opening) != (past["prompt"], past["opening"]):
            raise ValueError(f"the trace {args.resume!r} began with another prompt than this model would be given now")
        import_module("appendix.replay").restore(run, past["passes"])
    ending, answer, error = None, None, None
    screen = Screen(settings.workers, run.opening, run.layout.moves, live, problem.strip(), run.context, console)
    try:
        with screen:
            for record in run.passes:
                screen.show(record)
            saved = time.monotonic()
            while run.ending is None:
                screen.show(run.advance())
                if args.save and time.monotonic() > saved + 10:  # nobody can catch a power cut
                    save_trace(args.save, trace_of(run, name, "interrupted", None))
                    saved = time.monotonic()
            ending = run.ending
            answer = run.answer()
    except KeyboardInterrupt:
        ending = "interrupted"
    except (Exception, SystemExit) as failure:  # whatever fails in there (rich exits when nobody reads), nothing is lost
        ending, error = f"failed: {type(failure).__name__}: {failure}", traceback.format_exc()
    trace = trace_of(run, name, ending, answer, error)
    if args.save:
        save_trace(args.save, trace)
    return screen, trace


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = parse(argv)
    console = Console(highlight=False)
    live = console.is_terminal and not args.no_live
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat it like Ctrl-C
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another one
    try:
        if args.replay is not None and args.resume is not None:
            raise ValueError("give either --replay, to show a run again, or --resume, to go on with it")
        for path in filter(None, (args.save or args.resume, args.svg)):
            check_writable(path)
        if args.replay is not None:
            screen, trace = replay(args.replay, console, live)
        else:
            settings, past = (settings_of(args), None) if args.resume is None else resumed(args)
            problem = past["problem"] if past else read_problem(args)
            screen, trace = collaborate(args, settings, problem, console, live, past)
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: out of memory, for instance
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    screen.finish()
    report(console, trace)
    if args.svg:
        picture = Console(record=True, width=120, height=38, file=open(os.devnull, "w"), force_terminal=True)
        screen.console = picture
        picture.print(screen.frame())
        picture.save_svg(args.svg, title="Hogwild! Inference")
    if trace["error"]:
        print(f"the run failed after {len(trace['passes'])} passes: {trace['ending']}", file=sys.stderr)
        return 1
    if trace["ending"] == "interrupted":
        return 130
    steps = sum(len(record["closed"]) for record in trace["passes"])
    assert trace["tokens"] == sum(len(record["sampled"]) for record in trace["passes"]) and trace["answer"] is not None
    console.print(f"[OK] {len(trace['passes'])} passes, {len(screen.names)} workers, one cache, {steps} steps finished",
                  markup=False)
    return 0


# Exercises
# 1. Let Alice and Bob speak different languages: a prompt file and --prompt. Do they still build on each other's steps?
# 2. Run the same problem with --layout independent and --layout combined, same seed. Where do the texts part?
# 3. Ask for the answer every 32 passes in a loop of your own, and check that the run goes on as if you had not.

if __name__ == "__main__":
    sys.exit(main())
