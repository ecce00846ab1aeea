"""Chapter 6's words: what every worker sees, character by character, against the protocol stated
again on strings.

The oracle takes nothing from the chapter and nothing from a run's own records: it spells headings,
headers, checks and finisher as the paper has them, and what is compared is what was fed and what the
views consist of.
"""
import os
import random
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import guests, models, protocol

generate = import_module("06_generate")
shared_cache = import_module("02_shared_cache")
NAMES = ["Alice", "Bob", "Carol"]
TEMPLATE = "{names} work on this; the answer goes into \\boxed{answer}.\n\n{problem}"
CHAT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\n%s work on this; the answer goes into \\boxed{answer}.\n\n"
        "What is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n")
LISTED = {1: "Alice", 2: "Alice and Bob", 3: "Alice, Bob and Carol"}
PHRASES = ["It is 5.\n\n", "x = 1\n", "```", "So \\boxed{8}", " Wait, no: \\boxed{7}.\n\n",
           "A note:\n\n", "Yes!)\n\n",
           "**Really?**\n \n", "I say \\boxed{answer}.\n\n", " and so on", ".", "\n\n", "5\n\n"]


class Paper(shared_cache.SharedCache):
    """A cache without numbers: it remembers which token stands in which slot, and what each pass could
    see."""

    def __init__(self):
        super().__init__(ropes=[])
        self.at, self.views = {}, []

    def move(self, source, target):
        for j in range(source.length):
            self.at[target.start + target.length + j] = self.at[source.start + j]
        super().move(source, target)

    def forward(self, model, cache, tables, ids, last):
        """Stands where a forward pass does."""
        self.at.update(zip(self.new_slots.tolist(), ids))
        self.views.append([self.text(view) for view, _ in tables[0].writers])
        logits = torch.zeros(len(last), 49152)
        logits[:, 50] = 1.0
        return logits

    def text(self, view):
        """What stands in the blocks of a view."""
        return tokenizer().decode([self.at[block.start + j] for block in view
                                   for j in range(block.length)])


def start(**options):
    """(run, its Paper)"""
    paper = Paper()
    given_ = {"prompt": TEMPLATE, "check_every": 0, "workers": NAMES[:2]} | options
    run = generate.Hogwild(random_model("llama"), tokenizer(), "What is 3 + 4?",
                           generate.Settings(**given_),
                           paper.forward, paper)
    return run, paper


def is_over(text):
    """A blank line that follows the end of a sentence, which may be dressed, outside of code."""
    body = text.rstrip(" \t\n")
    blank = re.sub(r"[ \t]", "", text[len(body):]).count("\n") >= 2
    sentence = body.rstrip("\"'”’»)]}*_`$")[-1:] in tuple(".?!…")
    return bool(body) and blank and sentence and text.count("```") % 2 == 0


def box(text):
    """The last complete box, but the prompt's."""
    found = [content for content in re.findall(r"\\boxed\{([^{}]*)\}", text) if content != "answer"]
    return found[-1] if found else None


class Restated:
    """The protocol on strings, for workers that write the given tokens (as texts)."""

    def __init__(self, layout, workers, every, seed, max_step, room):
        self.layout, self.every, self.seed, self.max_step = layout, every, seed, max_step
        self.room = room  # of a step, before an answer
        self.names, self.moves = NAMES[:workers], layout in ("combined", "interleaved")
        self.history = CHAT % LISTED[workers] + "### Past steps" * self.moves
        opening = "\n\n**{} [1]:** " if layout != "independent" else ""
        self.pending = {name: opening.format(name) for name in self.names}
        self.block, self.own, self.step = ({name: value for name in self.names} for value in ("", "", 1))
        self.count, self.due, self.written, self.answer = dict.fromkeys(self.names, 0), [], 0, None
        self.closed, self.start = [], dict.fromkeys(self.names, 0)  # start: of the step in its block
        self.fed = {name: len(tokenizer()(text, add_special_tokens=False).input_ids)
                    for name, text in self.pending.items()}

    def views(self):
        """What everybody sees in the coming pass, in the order of the workers."""
        block = {name: self.block[name] + self.pending[name] for name in self.names}
        for name in self.names:
            others = [block[other] for other in self.names if other != name]
            if self.layout == "combined":
                seen = "".join(f"{text} <...>" for text in others)
                seen = "\n\n### Work in progress (others)" + seen if others else ""
                yield self.history + seen + "\n\n### Work in progress (own)" + block[name]
            elif self.layout == "contiguous":
                yield self.history + "".join(others) + block[name]
            else:
                yield self.history + block[name]

    def take(self, texts):
        """Everybody has written a token."""
        for name in self.names:
            self.block[name] += self.pending[name]
            self.count[name] += self.fed[name]
            self.pending[name], self.fed[name] = texts[name], 1
            self.own[name] += texts[name]
        before, self.written, self.closed = self.written, self.written + len(self.names), []
        if self.every and self.layout != "independent":
            for n in range(before // self.every, self.written // self.every):
                self.due.append(random.Random(f"{self.seed} check {n}").choice(self.names))
        for name in self.names:
            own = self.own[name]
            line_end = own.rstrip(" \t").endswith("\n") and own.count("```") % 2 == 0
            long = self.moves and self.count[name] + 1 >= self.max_step and line_end
            full = self.moves and self.count[name] + 2 > self.room
            if is_over(self.own[name]) or long or full:
                self.answer = self.answer or box(self.own[name])
                self.close(name)

    def close(self, name):
        """The step of this worker is over."""
        record = {"worker": name, "step": self.step[name], "text": self.block[name][self.start[name]:]}
        self.own[name], self.step[name], opening = "", self.step[name] + 1, ""
        if self.moves:
            self.history += self.block[name]
            self.block[name], self.count[name] = "", 0
            token = self.pending[name]
            opening = "" if token.endswith("\n\n") else "\n" if token.endswith("\n") else "\n\n"
            opening += f"**{name} [{self.step[name]}]:** "
        if name in self.due:
            self.due.remove(name)
            opening += "Quick check: am I doing redundant work? (yes/no): "
        self.pending[name] += opening
        self.start[name] = len(self.block[name])
        self.closed.append({**record, "opened": self.pending[name] if self.moves else opening})
        self.fed[name] += len(tokenizer()(opening, add_special_tokens=False).input_ids)


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(["combined", "combined", "contiguous", "interleaved", "independent"]),
       st.integers(1, 3),
       st.sampled_from([0, 1, 7, 20]), st.integers(0, 99), st.sampled_from([16, 24, 512]),
       st.integers(1, 40),
       st.lists(st.lists(st.sampled_from(PHRASES), min_size=3, max_size=12), min_size=3, max_size=3))
def test_everybody_sees_what_the_protocol_says(layout, workers, every, seed, max_step, budget, phrases):
    """Random texts in all layouts: views, steps, numbers, checks, budget and answers, in every pass."""
    run, paper = start(layout=layout, workers=NAMES[:workers], check_every=every, seed=seed,
                       max_step=max_step,
                       max_passes=budget)
    room = run.workers[0].block.capacity - run.reserve
    restated = Restated(layout, workers, every, seed, max_step, room)
    streams = {name: [i for _ in range(9) for phrase in phrases[n]
                      for i in tokenizer()(phrase, add_special_tokens=False).input_ids]
               for n, name in enumerate(NAMES[:workers])}
    assert run.prompt == restated.history and paper.text([run.history]) == (
        # its last token opens the blocks
        restated.history[:-1] if layout == "independent" else restated.history)
    if layout == "independent":
        restated.pending, restated.history = dict.fromkeys(restated.names, "\n"), restated.history[:-1]
        restated.start = dict.fromkeys(restated.names, 1)  # that is nobody's text
    for now in range(budget):
        tokens = {name: stream[now] for name, stream in streams.items()}
        run.advance(list(tokens.values()))
        for yours, wanted in zip(paper.views[-1], restated.views(), strict=True):
            same = len(os.path.commonprefix([yours, wanted]))
            assert yours == wanted, (f"after {yours[:same][-60:]!r} stands {yours[same:same + 60]!r} "
                                     f"and not {wanted[same:same + 60]!r}")
        restated.take({name: tokenizer().decode([token]) for name, token in tokens.items()})
        closed, right = run.passes[-1]["closed"], restated.closed
        assert closed == right, f"of closed steps, the record says {closed}, and not {right}"
        assert run.boxed == restated.answer
        if run.ending:
            assert run.ending == ("answer" if restated.answer else "passes")
            break
    assert restated.answer or len(run.passes) == budget
    assert run.generated == workers * len(run.passes)
    unfinished = next(filter(None, (box(restated.own[name]) for name in restated.names)), None)
    assert run.written_answer() == (restated.answer or unfinished)


def write(run, **texts):
    """Let every worker write its text, a token per pass; who has less to write says `so` meanwhile."""
    ids = {name: tokenizer()(text, add_special_tokens=False).input_ids for name, text in texts.items()}
    so, = tokenizer()(" so", add_special_tokens=False).input_ids
    for now in range(max(map(len, ids.values()))):
        run.advance([ids[w.name][now] if now < len(ids.get(w.name, ())) else so for w in run.workers])


def test_two_views_spelled_out():
    """Alice has finished two steps, Bob one; a check has fallen to Alice. (This model's blank line
    is two tokens:
    one ends a step, the other opens the next, and is made a blank line again.)"""
    run, paper = start(check_every=8, seed=1)
    write(run, Alice="I add.\n\nIt is 7.\n\nOr", Bob="Then I check that.\n\n3 + 4")
    paper.views.clear()
    run.advance([50, 50])
    alice, bob = (view.split("assistant\n")[-1] for view in paper.views[0])
    past = """### Past steps

**Alice [1]:** I add.


**Bob [1]:** Then I check that.


**Alice [2]:** Quick check: am I doing redundant work? (yes/no): It is 7.
"""
    assert alice == past + """

### Work in progress (others)

**Bob [2]:** 3 + 4 so so <...>

### Work in progress (own)

**Alice [3]:** Or"""
    assert bob == past + """

### Work in progress (others)

**Alice [3]:** Or <...>

### Work in progress (own)

**Bob [2]:** 3 + 4 so so"""


def test_a_box_counts_when_its_step_is_over():
    """Not before, not one of the prompt's; and the last one of a step."""
    run, _ = start()
    write(run, Alice="I guess \\boxed{8}. Wait, no: \\boxed{7}. Bob repeats \\boxed{answer}")
    assert run.boxed is None and run.ending is None and run.written_answer() == "7" == run.answer()
    write(run, Alice=".\n\n")
    assert run.boxed == "7" and run.ending == "answer" and run.answer() == "7"
    run, _ = start()
    write(run, Bob="We write \\boxed{answer}, or \\boxed{ answer }.\n\n")
    assert run.boxed is None and run.written_answer() is None and run.passes[-1]["closed"]


def test_a_box_counts_when_its_worker_has_ended():
    """Where workers may end their text, that ends the step, too."""
    run, _ = start(layout="independent", forbid_special=False)
    write(run, Alice="It is \\boxed{7}")
    assert run.boxed is None
    run.advance([tokenizer().eos_token_id, 50])
    assert run.boxed == "7" and run.ending == "answer"


def test_a_long_step_ends_at_a_line_end_outside_of_code():
    """In the middle only when its room is used up; nothing is dropped, and the header opens a
    paragraph."""
    run, paper = start(workers=["Alice"], max_step=20, max_passes=400)
    write(run, Alice="```\n" + "x = x + 1\n" * 4 + "```\nprint\n and so on")
    closed = [closed for record in run.passes for closed in record["closed"]]
    ends = [step["text"] for step in closed]
    assert len(ends) == 1, f"one step of this text is over, behind its code; yours ended {ends}"
    assert ends[0].endswith("```") and closed[0]["opened"] == "\n\n**Alice [2]:** "
    write(run, Alice=" so" * 150)
    closed = [closed for record in run.passes for closed in record["closed"]]
    assert len(closed) > 2 and closed[2]["text"].endswith(" so")
    assert closed[2]["opened"] == " so\n\n**Alice [4]:** "
    assert paper.text([run.history]) == run.prompt + "".join(step["text"] for step in closed)
    run, paper = start(workers=["Alice"], max_step=20)
    write(run, Alice="```\nx = 1\n" + "x" * 20 + "y = 2.\n\n" * 3 + "```")
    assert not any(record["closed"] for record in run.passes)  # a fence is open: no line end counts


def test_two_checks_for_one_worker_are_two():
    """The second one opens that worker's next step."""
    run, _ = start(workers=["Alice"], check_every=4)
    write(run, Alice="One two three four five six.\n\nSo.\n\nSo.\n\n")
    opened = [closed["opened"] for record in run.passes for closed in record["closed"]]
    assert [text.count("Quick check: am I doing redundant work? (yes/no): ")
            for text in opened] == [1, 1, 1]
    assert run.workers[0].checks_due == len(run.passes) // 4 - 3


def test_somebody_from_outside():
    """What is said stands in the history in the next pass, for all; who comes writes, who goes leaves
    a last step."""
    run, paper = start()
    write(run, Alice="I add", Bob="And I")
    run.say("Teacher", "Mind the units.")
    run.add_worker("Carol")
    run.advance([50, 50, 50])
    alice, bob, carol, _ = paper.views[-1]
    past = "### Past steps\n\n**Teacher:** Mind the units.\n\n### Work in progress (others)"
    assert alice.endswith(past + "\n\n**Bob [1]:** And I <...>\n\n**Carol [1]:**  <...>"
                          "\n\n### Work in progress (own)\n\n**Alice [1]:** I add")
    assert carol.endswith("\n\n### Work in progress (own)\n\n**Carol [1]:** ")
    assert bob.count("<...>") == 2
    run.dismiss("Alice")
    run.advance([50, 50])
    assert "Mind the units.\n\n**Alice [1]:** I add\n\n### Work" in paper.views[-1][0]
    assert [len(record["sampled"]) for record in run.passes[-2:]] == [3, 2]
    for wrong, word in ((lambda: run.add_worker("Bob"), "two workers"),
                        (lambda: run.dismiss("Zed"), "cannot"),
                        (lambda: run.say("Bob", "x"), "two workers"),
                        (lambda: run.say("Eve", "x " * 99999), "does not fit")):
        with pytest.raises(ValueError, match=word):
            wrong()


def test_everybody_may_begin_with_the_same_words():
    """Behind the header, with the name filled in, also of who joins later; they are nobody's own words,
    and without headers there are none."""
    def openings(layout):
        told = generate.Settings(NAMES[:2], layout, opening="Hi, I'm {name}. \\boxed{9}", max_passes=20)
        run = generate.Hogwild(random_model("llama"), tokenizer(), "What is 3 + 4?", told)
        guests.add(run, "Carol")
        assert run.written_answer() is None and all(w.own_text == "" for w in run.workers)
        run.advance()
        return [tokenizer().decode(run.passes[0]["fed"][w.name]) for w in run.workers]
    assert openings("combined") == [
        f"\n\n**{name} [1]:** Hi, I'm {name}. \\boxed{{9}}" for name in NAMES]
    assert not any("Hi" in text for text in openings("independent"))


def test_what_ends_a_sentence_is_a_setting(monkeypatch):
    """A semicolon, if somebody wants it; and nothing else then."""
    assert protocol.step_ended("one thing;\n\n", ";") and not protocol.step_ended("one thing;\n\n")
    assert not protocol.step_ended("one thing.\n\n", ";") and protocol.step_ended("a ]\n\n", "]^-")
    for marks, steps in ((";", 1), (protocol.MARKS, 0)):
        told = generate.Settings(NAMES[:1], marks=marks, max_passes=20)
        run = generate.Hogwild(random_model("llama"), tokenizer(), "What is 3 + 4?", told)
        ids = tokenizer()("one thing;\n\n").input_ids
        assert sum(len(run.advance([i])["closed"]) for i in ids) == steps


def test_the_budget_asks_in_the_papers_words():
    """Section 4.1: the finisher, word for word, at the end of the last worker's view."""
    run, paper = start(answer_tokens=3)
    write(run, Alice="I add", Bob="And I")
    run.answer()
    asked = paper.views[-3][-1]
    assert asked.endswith(
        "\n\n### Work in progress (own)\n\n**Bob [1]:** And I\n\nWait, given the limited time, I "
        "have to give an answer right now. Considering all my previous attempts, I have to conclude "
        "that the final answer is \\boxed{")
    said = tokenizer().decode([50])
    assert [view[-1] for view in paper.views[-2:]] == [asked + said, asked + said + said]
    # cut back; ` I` has not been fed
    assert paper.text([run.workers[1].block]) == "\n\n**Bob [1]:** And"


RULES = [  # appendix C: what a prompt has to say, by words that it cannot say it without
    "one of 2 assistants", "Alice and Bob", "at the same\ntime", "share a memory", "word by word",
         "**Name [step]:**",
    "### Past steps", "finished steps of all of you", "### Work in progress (others)",
         "unfinished steps of the others",
    "<...>", "### Work in progress (own)", "your own unfinished step", "not finished\n  yet",
         "Share the work",
    "Say who does what", "unfinished thoughts included", "Never do work twice", "stop,\n  say so",
    "Wait, Alice is already on this", "blank line", "\\boxed{}", "without doing any of the work twice",
         "What is 3 + 4?"]


def test_the_prompt_says_all_rules():
    """Who the workers are, how the page reads, that others' thoughts are partial, when to switch."""
    run, _ = start(prompt=None)
    words = " ".join(run.prompt.split())
    assert [rule for rule in RULES if " ".join(rule.split()) not in words] == []
    assert run.prompt.endswith("<|im_start|>assistant\n### Past steps")
    solo, _ = start(prompt=None, layout="independent")
    assert solo.prompt.endswith("<|im_start|>user\nWhat is 3 + 4?\n\nReason step by step, and put your "
                                "final answer "
                                "within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    for layout, words in (("interleaved", "appears there as a whole"),
                          ("contiguous", "have written so far")):
        other, _ = start(prompt=None, layout=layout)
        assert words in other.prompt and "Work in progress" not in other.prompt
        assert ("**Name [step]:**" in other.prompt) == (layout == "interleaved")


def test_a_reasoning_model_starts_with_its_thoughts():
    """<think> is added where the model knows the token and its template does not add it."""
    for vocabulary, ending, added in (({"<think>": 1}, "assistant\n", "<think>\n"),
                                      ({"<think>": 1}, "<think>\n", ""),
                                      ({}, "assistant\n", "")):
        fake = SimpleNamespace(chat_template="x", get_vocab=lambda vocabulary=vocabulary: vocabulary,
                               apply_chat_template=lambda messages, ending=ending,
                               **_: messages[-1]["content"] + ending)
        assert models.chat(fake, "", "Solve it.") == "Solve it." + ending + added


def test_special_tokens_in_a_problem_are_text():
    """Nobody changes roles from inside a problem, or by what an outsider says."""
    run = generate.Hogwild(random_model("llama"), tokenizer(), "Solve <|im_end|> it",
                           generate.Settings(prompt=TEMPLATE),
                           (paper := Paper()).forward, paper)
    special = tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert run.ids[run.history].count(special) == 2  # the chat format's own
    assert "Solve <|im_end|> it" in paper.text([run.history]) and run.prompt == paper.text([run.history])
    guests.say(run, "Eve", "<|im_end|>")
    assert special not in run.said


def test_names_and_forbidden_words():
    """The workers' names in order; headings, ends of thought and special tokens are never written."""
    assert protocol.NAMES[:4] == ["Alice", "Bob", "Carol", "Dave"] and len(set(protocol.NAMES)) == 16
    assert generate.Settings().forbid == ["</think>", "##", " ##", "###", " ###", "####", " ####"]
    run, _ = start()
    ids = {tokenizer().decode([i]) for i in run.sampler.forbidden.tolist()}
    assert {"<|im_end|>", "<|im_start|>", "##", "###"} <= ids
    assert protocol.header("Bob", 12) == "**Bob [12]:** "
