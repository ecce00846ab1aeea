r"""Chapter 6: workers who write at the same time, and decide for themselves how to collaborate.

The problem. Chapters 1 to 5 let several workers of one model read each other's memory while it grows.
Nothing tells them what to do with that. The paper (sections 3.3, 3.4, appendix C) prescribes no
strategy: a prompt explains the situation, the text is cut into steps, and somebody is asked at times if
its work is redundant (all these words: appendix/protocol.py). In the combined layout, Alice sees:

    [the prompt] ### Past steps                            the history, one block for everybody
    **Alice [1]:** Let us take one half each.
    **Bob [1]:** I will take the second half.
    ### Work in progress (others)
    **Bob [2]:** 5 + 6 is <...>                            Bob is writing here, in his own block,
    ### Work in progress (own)
    **Alice [2]:** 3 + 4                                   and Alice here, in hers

One pass: pack every worker's newest tokens into one row, run the model once, pick one token per worker.
Where a step is over, its block moves to the end of the history, and the next step opens with a header.
It is fed together with the token that ended the step, so passes are ragged; the tables do not mind.

Left out: loading models, the display, files (appendix).    Run it: python 06_generate.py, or with --help
"""
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate

from appendix import adapters, batching, command, engine, journal, models, protocol, puzzles, screen
from appendix.guests import add, dismiss, say
from appendix.protocol import CHECK, FORMS, SEPARATORS, header, step_ended
from appendix.settings import Settings

shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")


class TooLong(ValueError):
    """What the workers have to read does not fit into the context, with an answer behind it."""


def feed(model, cache, groups, forward=query_rotation.forward):  # exercise
    """One forward pass for any number of runs.

    Args:
        groups: for each run, its writers: pairs (view, ids) of a list of Blocks and a list of ints, one
            at least; ids are written to the view's last block.
    Returns:
        a tuple: for each run, the logits [writers, vocabulary] of the writers' last tokens.
    Raises:
        BlockFull: a block lacks room. ValueError: NaN. After any failure, blocks are as long as before.
    """
    writers = [writer for group in groups for writer in group]
    ids = [i for _, ids in writers for i in ids]  # [N]
    last = [end - 1 for end in accumulate(len(ids) for _, ids in writers)]  # [writers]
    with cache.rewound(only_on_error=True):
        cache.reserve([(view[-1], len(ids)) for view, ids in writers])
        tables = [layouts.fill_tables([(view, len(ids)) for view, ids in group]) for group in groups]
        logits = forward(model, cache, tables, ids, last)
        if logits.isnan().any():
            raise ValueError("the model computes NaN; another --dtype may help (float32 or bfloat16)")
    return logits.split([len(group) for group in groups])


@dataclass
class Worker:
    """One writer: its block of the shared cache, and what it is about to feed."""

    name: str
    block: shared_cache.Block
    pending: list  # ids to feed next: the token sampled last, and a header where a step opens
    ids: list  # ids of the step so far, the pending ones included
    text: str  # what they decode to
    start: int  # where in `text` its own words begin, behind the header
    step: int = 1
    checks_due: int = 0  # so many of its next steps open with the collaboration check
    finished: bool = False  # wrote the end of text
    before: str = ""  # its own words in the steps before this one

    @property
    def own_text(self):
        """What it has written itself in this step: steps end in every layout (all: 07's `written`)."""
        return self.text[self.start:]


class Hogwild:
    """One collaboration on one problem.

        run = Hogwild(model, tokenizer, problem, Settings(workers=["Alice", "Bob"]))
        while run.ending is None:
            run.advance()          # one forward pass: every worker writes one token
        print(run.answer())        # may be asked at any time: it disturbs nothing

    An advance is writers() -> feed -> sample() -> take(); for several runs in one pass, call the parts.
    `passes` has a record per pass, ready for JSON: {"fed": {name: ids}, "sampled": {name: id}, "text":
    {name: what that id adds}, "closed": [{"worker", "step": its number, "text", "opened": how the next
    begins}], "events": [who came, left or said something], "in_view": longest view's tokens, "seconds"}.

    Args:
        model, tokenizer: any causal language model of transformers with rotary embeddings (models.load).
        forward: chapter 4's forward or chapter 5's Decoder; cache: one to share with other runs.
    Raises:
        ValueError: an empty problem; a model, layout or prompt of no use. TooLong: see there.
    """

    say, add_worker, dismiss = say, add, dismiss  # somebody does so between two passes

    def __init__(self, model, tokenizer, problem, settings=None, forward=None, cache=None):
        self.model, self.tokenizer, self.problem = model, tokenizer, problem.strip()
        self.forward, self.settings = forward or engine.best_forward(model), settings or Settings()
        if not self.problem:
            raise ValueError("the problem is empty; give the workers something to solve")
        self.encode, self.decode = partial(models.encode, tokenizer), partial(models.decode, tokenizer)
        layout = self.layout = layouts.LAYOUTS[self.settings.layout]
        ropes = query_rotation.attach(model)
        self.cache = shared_cache.SharedCache(ropes) if cache is None else cache
        self.template = models.chat(tokenizer, *protocol.instructions(self.settings, layout.headers))
        self.template += protocol.PAST_STEPS if layout.moves else ""
        self.prompt = self.template.replace("{problem}", self.problem)
        self.form, self.ends = FORMS[self.settings.form], models.end_ids(model, tokenizer)
        self.finisher = self.encode(self.form.finisher)
        self.given = protocol.boxes(self.prompt)  # whoever repeats one of these has not answered
        self.context = self.settings.context or models.context(model)
        self.passes, self.events, self.said = [], [], []  # see there; said: ids that the next pass reads
        self.generated, self.boxed = 0, None  # tokens sampled by all; the answer, once a step gives one
        self.ids, self.separators, self.workers = {}, {}, []  # block -> its ids; word -> block
        try:
            self.build(*self.openings())
        except Exception:
            self.release()
            raise

    def openings(self):
        """Token ids of the common text, and those with which each worker's block begins."""
        ids = models.encode_prompt(self.tokenizer, self.template, self.problem)
        if self.layout.headers:
            return ids, [self.encode(self.first_words(name)) for name in self.settings.workers]
        # The logits of the prompt's last token give everybody's first word.
        return ids[:-1], [ids[-1:] for _ in self.settings.workers]

    def first_words(self, name):
        """How the first step of a worker begins, where steps have headers."""
        return "\n\n" + header(name, 1) + (self.settings.opening or "").replace("{name}", name)

    def build(self, prompt_ids, openings):
        """Reserve memory for what the run is likely to need, and encode the prompt and the separators.

        A token per pass and worker; a quarter and 256 for headers and checks; 256 for outsiders' words;
        a step may be twice as long till a line ends. A run that needs more ends with "room".
        """
        self.sampler = models.Sampler(self.model, self.tokenizer, self.settings, len(prompt_ids))
        passes, longest = self.settings.max_passes, max(map(len, openings))
        likely = passes + (passes // 4 + 256 if self.layout.headers else 0)  # tokens of a worker
        history = len(prompt_ids) + 256 + (likely * len(openings) if self.layout.moves else 0)
        # Kept free in every block, for a header with a check (64 are enough) and the early stop:
        self.reserve = 64 + len(self.finisher) + self.settings.answer_tokens
        own = min(likely, 2 * self.settings.max_step) if self.layout.moves else likely
        self.capacity = min(own + longest + self.reserve, self.context)
        self.history = self.cache.block(min(history, self.context))
        self.ids[self.history] = list(prompt_ids)
        for name, ids in zip(self.settings.workers, openings):
            self.enlist(name, ids)
        if len(prompt_ids) + sum(map(len, openings)) + self.reserve > self.context:
            raise TooLong(f"the prompt takes {len(prompt_ids)} tokens, an answer {self.reserve}, and "
                          f"the context ends at {self.context}: shorten the problem")
        known = self.copy_beginning(prompt_ids)
        for i in range(known, len(prompt_ids), 512):  # in pieces: scores take tokens x context numbers
            self.fed([([self.history], prompt_ids[i:i + 512])])
        self.encode_separators()
        if self.ending in ("context", "room"):
            raise TooLong(f"the prompt leaves no room in {self.context} tokens: shorten the problem")

    def copy_beginning(self, ids):
        """What a prompt in the cache begins with, too, is copied and not encoded. Returns its length."""
        known = {block: len(os.path.commonprefix([ids, other]))
                 for block, other in self.cache.prompts.items()}
        if best := max(known, key=known.get, default=None):
            self.cache.copy(best, self.history, known[best])
        self.cache.prompts[self.history] = ids
        return known.get(best, 0)

    def enlist(self, name, ids):
        """Make a worker whose block opens with `ids`. (Without headers, they are nobody's text.)"""
        block, step = self.cache.block(self.capacity), ids if self.layout.headers else []
        text = self.decode(step)
        self.workers.append(Worker(name, block, ids, step, text, len(text)))
        self.ids[block] = []

    def encode_separators(self):
        """Encode the separators that the team lacks; each sees those that stand before it."""
        before, writers = [self.history], []
        for word in self.layout.separators(len(self.workers)):
            if word not in self.separators:
                ids = self.encode(SEPARATORS[word])
                self.separators[word] = self.cache.block(len(ids))
                before = [*before, self.separators[word]]
                writers.append((before, ids))
        if writers:
            self.fed(writers)

    def fed(self, writers):
        """The logits of a pass of this run alone."""
        return feed(self.model, self.cache, [writers], self.forward)[0]

    # -- one pass -----------------------------------------------------------------------------------

    def view(self, w, final=False):
        """The blocks that worker w sees, its own last (chapter 3); `final`: in the early stop's view."""
        others = [other.block for other in self.workers if other is not w]
        lay_out = self.layout.final_view if final else self.layout.view
        view = lay_out(self.history, w.block, others, self.separators)
        if w.block not in view[-1:] or view.count(w.block) > 1:  # tokens go to the last block
            raise ValueError(f"a view of the layout {self.settings.layout!r} has to end with its "
                             "worker's own block, and to have it only once")
        return view

    def next_writers(self):
        """The workers who write in the coming pass."""
        return [w for w in self.workers if not w.finished]

    def writers(self):
        """What the coming pass feeds: pairs (view, ids). What outsiders said comes last."""
        writers = [(self.view(w), w.pending) for w in self.next_writers()]
        return writers + ([([self.history], self.said)] if self.said else [])

    def advance(self, tokens=None):
        """One forward pass; every worker writes one token. Returns (and keeps) its record.

        Whether the run is over (`ending`) is the caller's to ask, before. tokens: ids to write instead
        of what the model would pick, one for each of next_writers(), or else a ValueError.
        """
        start, writing = time.perf_counter(), len(self.next_writers())
        if tokens is not None and len(tokens) != writing:
            raise ValueError(f"{writing} workers write; give a token for each, not {len(tokens)}")
        with self.cache.rewound(only_on_error=True):
            logits = self.fed(self.writers())
            tokens = self.sample(logits) if tokens is None else tokens
        record = self.take(tokens)
        record["seconds"] = time.perf_counter() - start
        return record

    def sample(self, logits):
        """A token for each of next_writers(), from logits [writers, vocabulary], as the model asks for.
        What is drawn depends on the seed, the worker's name and the number of the pass alone."""
        writing, seed = self.next_writers(), self.settings.seed
        draws = [random.Random(f"{seed} {w.name} {len(self.passes)}").random() for w in writing]
        # Some models do not want to repeat themselves: their penalties look at all ids in a view.
        return self.sampler.pick(logits[:len(writing)], draws, lambda row: sum(
            (self.ids.get(b, []) for b in self.view(writing[row])), []) + writing[row].pending)

    def take(self, tokens):
        """Give each writing worker its token, and close the steps that are over. Returns the record."""
        record = {"fed": {}, "sampled": {}, "text": {}, "closed": [], "events": self.events}
        writing = self.next_writers()
        self.ids[self.history], self.events, self.said = self.ids[self.history] + self.said, [], []
        for w, token in zip(writing, tokens):
            record["fed"][w.name], record["sampled"][w.name] = w.pending, token
            self.ids[w.block] += w.pending
            w.finished = token in self.ends
            w.pending = [] if w.finished else [token]
            w.ids = w.ids + w.pending
            before, w.text = w.text, self.decode(w.ids)
            record["text"][w.name] = w.text[len(before):]
        self.schedule_checks(writing)
        for w in writing:
            if w.finished or self.is_over(w):
                answer = self.found(w)
                if not w.finished:
                    w.before += w.own_text
                    record["closed"].append(self.close_step(w))
                if answer:
                    self.boxed_by(w, answer)
        record["in_view"] = max(sum(block.length for block in self.view(w)) for w in self.workers)
        self.passes.append(record)
        return record

    def is_over(self, w):  # exercise
        """Does w's step end here? By its text; or, where steps move, as it has `max_step` tokens with
        the one just sampled, and a line ends (not in a code fence; blanks may follow); or when, after
        this token and one more, fewer than `self.reserve` slots are free."""
        line_end = w.own_text.rstrip(" \t").endswith("\n") and not protocol.fence_open(w.own_text)
        long = w.block.length + 1 >= self.settings.max_step and line_end
        full = w.block.length + 2 + self.reserve > w.block.capacity  # 2: this token, and one more
        return step_ended(w.own_text, self.settings.marks) or (self.layout.moves and (long or full))

    def close_step(self, w):  # exercise
        """Move w's block to the history, and open the next step. Returns what the record says of it.

        Bob's block holds `**Bob [1]:** It is 5.`; the token he samples now completes a blank line. It is
        not fed yet, so it comes first in the new block, before `**Bob [2]:** `: the next pass feeds all
        that, and a token of everybody else. A header opens a paragraph, whatever the token was.
        """
        closed = {"worker": w.name, "step": w.step, "text": self.decode(w.ids[:-1])}
        opening = CHECK if w.checks_due else ""
        w.checks_due, w.step = max(0, w.checks_due - 1), w.step + 1
        if self.layout.moves:
            self.to_history(w)
            last = self.decode(w.ids[-1:])
            opening = "\n\n"[len(last) - len(last.rstrip("\n")):] + header(w.name, w.step) + opening
        inserted = self.encode(opening) if opening else []
        w.ids = w.pending = [w.ids[-1], *inserted]
        w.text = self.decode(w.ids)
        w.start = len(w.text)
        return {**closed, "opened": w.text if self.layout.moves else self.decode(inserted)}

    def schedule_checks(self, writing):  # exercise
        """Once every `check_every` of self.generated tokens (0: never, nor where steps have no headers),
        one of those in `writing` who have not finished is asked as it opens its next step. The n-th
        check (n = 0, 1, ...) goes to random.Random(f"{seed} check {n}").choice(those): runs repeat."""
        every, before = self.settings.check_every, self.generated
        self.generated += len(writing)
        asked = [w for w in writing if not w.finished]
        if every and asked and self.layout.headers:
            for number in range(before // every, self.generated // every):
                random.Random(f"{self.settings.seed} check {number}").choice(asked).checks_due += 1

    def boxed_by(self, w, answer):
        """Worker w has finished a step that gives this answer. (The next one has begun, if any.)"""
        self.boxed = answer if self.boxed is None else self.boxed

    def to_history(self, w):
        """Move the step that worker w has finished to the end of the history."""
        self.cache.move(w.block, self.history)
        self.ids[self.history], self.ids[w.block] = self.ids[self.history] + self.ids[w.block], []

    # -- the end ------------------------------------------------------------------------------------

    @property
    def ending(self):
        """Why the run is over: "answer", "end of text", "passes", or "context", "room" (there is still
        enough of both then for one more pass and an answer); None: it is not."""
        if self.boxed is not None:
            return "answer"
        if not self.next_writers():
            return "end of text"
        if len(self.passes) >= self.settings.max_passes:
            return "passes"
        writers, coming = self.writers(), len(self.finisher) + self.settings.answer_tokens
        views = [view for view, _ in writers] + [self.view(self.workers[-1], final=True)]
        seen = max(sum(block.length for block in view) for view in views)
        if seen + sum(len(ids) for _, ids in writers) + coming > self.context:
            return "context"
        lengths = {w.block: w.block.length + len(w.pending) for w in self.workers}  # after this pass
        steps = sum(lengths.values()) if self.layout.moves else 0  # should all of them end in it
        full = any(length + coming > block.capacity for block, length in lengths.items())
        full |= self.history.length + len(self.said) + steps > self.history.capacity
        return "room" if full else None

    def written_answer(self):
        """The answer that was written in time, in a finished step or else an unfinished one, or None."""
        return self.boxed or next(filter(None, map(self.found, self.workers)), None)

    def found(self, w):
        """The answer in w's own words (a program may stand in a step before its box), or None."""
        return self.form.find(w.before + w.own_text, self.given)

    def answer(self):
        """The answer now (early stop; paper, section 4.1 and appendix C). The run does not notice."""
        return batching.alone(self.asking(), lambda groups: [self.fed(*groups)])

    def asking(self):
        """`answer` as a job (appendix/batching.py): what a worker has boxed; or else the last worker,
        who for this once sees everything (final_view), is made to say it."""
        if (written := self.written_answer()) is not None:
            return written
        *others, last = self.workers
        unread = [(self.view(w), w.pending) for w in others if w.pending]  # none: its text has ended
        return (yield from self.concluding([(self.view(last, final=True), last.pending)], unread))[0]

    def concluding(self, asked, unread=()):  # exercise
        """A job: what the writers `asked`, pairs (view, ids), say if they have to answer now.

        Their blocks get the finisher, at most `answer_tokens` are decoded greedily, and all blocks are
        cut back. Nothing is encoded twice. `unread` is fed beside that, once.
        """
        lengths, said = {block: block.length for block in self.ids}, [[] for _ in asked]
        coming = {k: (view, ids + self.finisher) for k, (view, ids) in enumerate(asked)}
        try:
            while coming:
                logits = yield [*unread, *coming.values()]
                unread = ()
                for k, row in zip([*coming], logits[-len(coming):]):
                    said[k].append(int(row.argmax()))
                    coming[k] = coming[k][0], said[k][-1:]
                    if (len(said[k]) == self.settings.answer_tokens or said[k][-1] in self.ends
                            or self.form.inside(self.decode(said[k])) is not None):
                        del coming[k]
        finally:
            for block, length in lengths.items():
                block.length = length
        texts = [self.decode([i for i in ids if i not in self.ends]) for ids in said]
        return [text.strip() if (part := self.form.inside(text)) is None else part for text in texts]

    def release(self):
        """Give the memory of a run that is over back to its cache, for others."""
        self.cache.discard([*self.ids, *self.separators.values()])


# --------------------------------------------------------------------------------- the command line

def main(argv=None):
    """Run the command line; returns the exit code."""
    kinds = Settings, models.Options, screen.Options
    parser = command.Parser(kinds, description=__doc__.split("\n")[0])
    parser.add_argument("problem", nargs="?", default=puzzles.EXAMPLE, help="text; '-': standard input")
    settings, options, show, rest = parser.read(argv, ["prompt"], adapters.settings)
    problem = command.text(sys.stdin.read() if rest.problem == "-" else rest.problem, "problem")
    about = {"problem": problem, **asdict(settings), "model": options.model, "dtype": options.dtype}
    if team := models.processes():
        if show.save:
            raise ValueError("--save keeps what one process does: leave it out under torchrun")
        sys.stdout = sys.stdout if team.is_main_process else open(os.devnull, "w")
    with journal.Journal(show.save, "trace", about, screen.ROW, may_differ=["max_passes"]) as trace:
        model, tokenizer = models.prepared(options, team)
        if remark := adapters.remark(options.model, problem):
            print(remark, file=sys.stderr)
        run = Hogwild(model, tokenizer, problem, settings, engine.best_forward(model, options.attention))
        run = import_module("appendix.recording").resumed(run, trace)
        display = import_module("appendix.join_in").Screen(problem, trace.rows[0], show)
        with screen.Stopping() as stopping, display:
            for record in run.passes:
                display.show(record)
            while run.ending is None and not stopping.asked:
                with command.failing(f"pass {len(run.passes) + 1}"):
                    display.take_part(run)
                    trace.add(run.advance())
                display.show(run.passes[-1])
        if stopping.asked:
            raise KeyboardInterrupt
        end = {"ending": run.ending, "answer": run.answer()}
        if trace.rows[-1] != end:
            trace.add(end)
    display.finish(**end)
    assert all(block.length == len(ids) for block, ids in run.ids.items()) and run.passes
    where = ", ".join(f"{w.block.length} of {w.name}" for w in run.workers)
    display.print(f"[OK] each token is in the cache once: {run.history.length} in the history, {where}")
    return 0


# To rebuild this file and be checked: make exercise CHAPTER=6 DIR=mine. Questions, which
# `python appendix/solutions.py 6.1` and so on answer by measuring:
# 1. Which share of the tokens that are fed did nobody pick? What do they cost?
# 2. With --layout independent and combined: where do the same worker's texts part?
# 3. Ask for the answer every 32 passes. Does the run go on as if you had not?

if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
