r"""Appendix: encode a finished collaboration again, in one forward pass.

The problem. Live, a run takes a forward pass for each token of a worker. Sometimes all tokens are known
already: to train on a run, or to restore one whose cache was lost. Can they go through the model all at
once, like the tokens of a plain text? There, every token sees what stands before it. Here, each token
saw other lengths of other blocks at other distances, and most blocks have moved since.

The answer (paper, appendix B). All that a token's attention depends on, besides the keys, is its column
in chapter 3's two tables. Keep the columns of all passes, and many passes become one. There is one
catch: a step is first somebody's block and then a part of the history, which is *one* row of the live
tables. So every step has a row of its own here and is stored once, as if it began at position 0; that it
moved is another number in `offset`.

    Ledger             a cache that writes down what chapter 6's loop feeds, instead of computing it
    Recording.of(run)  a run, finished or not -> its tokens in one row, and the two tables
    encode             Recordings -> logits, in one pass through chapter 4's attention, with gradients
    loss               what to minimise in order to train on recorded runs
    restored           a fresh run and a trace's passes -> the run where the trace stopped
"""
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from appendix import guests, models
from appendix.protocol import SEPARATORS

rope = import_module("01_rope_shift")
shared_cache = import_module("02_shared_cache")
layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")

EVENTS = {"say": 3, "add": 2, "dismiss": 2}  # what happens between two passes; how many words tell of it
IGNORE = -100  # in `sampled`: nothing was picked from these logits (PyTorch's losses ignore this label)


@dataclass
class Recording:
    """A run of N tokens, in the order in which they were fed, and R rows of steps (int64, on a CPU)."""

    ids: torch.Tensor  # [N] the prompt, the separators, then what the workers fed, pass by pass
    sampled: torch.Tensor  # [N] the token that was picked from each token's logits, or IGNORE
    weight: torch.Tensor  # [N] float32: how much that pick counts in the loss
    own: torch.Tensor  # [N] the row that each token belongs to
    lengths: list  # [R] tokens of each row
    tables: layouts.Tables  # of all N tokens. A row's tokens have slots side by side
    prefill: int  # so many tokens were there before the first pass

    @classmethod
    def of(cls, run):
        """The Recording of a run of chapter 6, finished or not."""
        return repeated(run, run.passes)[1].recording()


class Ledger(shared_cache.SharedCache):
    """A cache that computes nothing, and remembers of which steps each block consists.

    parts: block of the run -> the steps in it, in order; each is a Block of its own, which never moves.
    """

    def __init__(self, ropes):
        super().__init__(ropes)
        self.parts, self.rows = {}, {}  # rows: as fill_tables numbers them
        self.columns, self.last = [], []  # per pass: its tables; which tokens its logits are of
        self.ids, self.sampled, self.weight, self.own, self.prefill = [], [], [], [], None

    def block(self, capacity):
        """As chapter 2's; the block consists of one step, an empty one."""
        block = super().block(capacity)
        self.parts[block] = [shared_cache.Block(0, capacity)]
        return block

    def move(self, source, target):
        """As chapter 2's: the steps of `source` are the target's last ones now; a new step begins."""
        super().move(source, target)
        self.parts[target] = self.parts[target] + self.parts[source]
        self.parts[source] = [shared_cache.Block(0, source.capacity)]

    def truncate(self, block, length):
        """As chapter 2's, for length 0: what was in the block is seen no more, and a new step begins."""
        super().truncate(block, length)
        self.parts[block] = [shared_cache.Block(0, block.capacity)]

    def forward(self, model, cache, tables, ids, last):
        """Stands where chapter 4's forward does: notes the pass, and returns zeros."""
        writers = [([part for block in view for part in self.parts[block]], count)
                   for view, count in tables[0].writers]
        for view, count in writers:
            view[-1].length += count
            self.own += [view[-1]] * count
        self.columns.append(layouts.fill_tables(writers, self.rows))
        self.last.append([len(self.ids) + int(i) for i in last])
        self.ids += ids
        self.sampled += [IGNORE] * len(ids)
        self.weight += [1.0] * len(ids)
        return torch.zeros(len(last), 1)

    def label(self, tokens, number=-1, weights=None):
        """These were picked from the logits of the pass of that number (the one that was noted last).
        weights: how much each counts in the loss; None: all alike."""
        if self.prefill is None:
            self.prefill = sum(len(column.position) for column in self.columns[:number])
        for place, token, weight in zip(self.last[number], tokens, weights or [1.0] * len(tokens)):
            self.sampled[place], self.weight[place] = token, weight

    def recording(self):  # exercise
        """All passes so far as a Recording."""
        steps, end = list(dict.fromkeys(step for step, _ in self.rows)), 0
        for step in steps:  # (the dots are several rows, but one step)
            step.start, end = end, end + step.length
        # A step that has not begun is not visible: [R, N] zeros.
        offset, visible = np.zeros((2, len(self.rows), len(self.ids)), np.int64)
        n = 0
        for column in self.columns:
            known, new = slice(len(column.offset)), slice(n, n + len(column.position))
            offset[known, new], visible[known, new], n = column.offset, column.visible, new.stop
        position = torch.cat([column.position for column in self.columns])
        start = torch.tensor([step.start for step, _ in self.rows])
        tables = layouts.Tables(start, position, torch.from_numpy(offset), torch.from_numpy(visible))
        row_of = {step: row for (step, before), row in self.rows.items() if before == 0}
        ids, sampled, own = (torch.tensor(numbers) for numbers in
                             (self.ids, self.sampled, [row_of[step] for step in self.own]))
        return Recording(ids, sampled, torch.tensor(self.weight), own,
                         [step.length for step, _ in self.rows], tables,
                         len(self.ids) if self.prefill is None else self.prefill)

    def fill(self, encoded):  # exercise
        """Take keys and values of all steps from `encode`'s cache, as if the passes had been live."""
        for memory, source in ((self.keys, encoded.keys), (self.values, encoded.values)):
            for layer, old in source.items():
                memory[layer] = old.new_empty(old.shape[0], self.slots, old.shape[2])
        for block, steps in self.parts.items():
            first = 0  # index in the block at which the next of its steps begins
            for step in steps:
                here = slice(step.start, step.start + step.length)
                there = slice(block.start + first, block.start + first + step.length)
                for layer, keys in encoded.keys.items():
                    self.keys[layer][:, there] = rope.shift(keys[:, here], first, self.ropes[layer])
                    self.values[layer][:, there] = encoded.values[layer][:, here]
                first += step.length
            assert first == block.length, "the ledger and the run disagree about a block"


def repeated(run, passes):
    """Go through recorded passes again, without the model: (a twin of the run, its Ledger).

    Everything but the cache (steps, pending tokens, checks) becomes what it was.
    Raises:
        ValueError: a pass does not follow from those before it: another model or other settings made it.
    """
    ledger, size = Ledger(run.cache.ropes), run.model.get_output_embeddings().weight.shape[0]
    twin = type(run)(run.model, run.tokenizer, run.problem, run.settings, ledger.forward, ledger)
    for number, past in enumerate(passes, start=1):
        for event in past["events"]:
            if len(event) != EVENTS.get("".join(event[:1])):
                raise ValueError(f"pass {number} of the trace has an event that is unknown here")
            getattr(guests, event[0])(twin, *event[1:])
        tokens = [past["sampled"].get(w.name, -1) for w in twin.next_writers()]
        column = len(ledger.columns)
        if not twin.ending and all(0 <= token < size for token in tokens):
            twin.advance(tokens)["seconds"] = past["seconds"]
            ledger.label(tokens, column)
        if twin.passes[number - 1:] != [past]:
            raise ValueError(f"pass {number} of the trace does not follow from those before it: it was "
                             "made by another model, or with other settings")
    return twin, ledger


def restored(run, passes):
    """A fresh run, another one's passes -> the run where that one stopped. Errors as of `repeated`."""
    if len(passes) > run.settings.max_passes:
        raise ValueError(f"the run has taken {len(passes)} passes already: max_passes has to be as many")
    twin, ledger = repeated(run, passes)
    recording = ledger.recording()
    recording.sampled.fill_(IGNORE)  # no logits are needed
    with torch.no_grad():
        _, encoded = encode(run.model, ledger.ropes, [recording])
    ledger.fill(encoded)
    twin.forward = run.forward
    return twin


def resumed(run, trace):
    """A fresh run, with the journal `trace` that it is kept in -> the run where the trace stopped.

    Raises:
        ValueError: the trace began with another prompt or other weights; or as of `repeated`.
    """
    start = {"prompt": run.prompt, "opening": {w.name: w.text for w in run.workers},
             "moves": run.layout.moves, "context": run.context, "weights": models.fingerprint(run.model),
             "lengths": {"history": run.history.length, **{word: len(run.encode(SEPARATORS[word]))
                                                           for word in run.layout.words}}}
    if not trace.rows:
        trace.add(start)
    elif {**start, **trace.rows[0]} != start:  # (older traces have no lengths)
        raise ValueError(f"{trace.path!r} began with another prompt or other weights: name another")
    passes = [row for row in trace.rows if "fed" in row]
    return restored(run, passes) if passes else run


# ------------------------------------------------------------------------------------------ one pass

def pieces_of(recording, base, size):  # exercise
    """The tables in pieces of at most `size` tokens, with the rows that these see. `base`: first slot.

    No piece has tokens of both prompt and workers: the prompt's would be rotated for all rows.
    """
    tables, total = recording.tables, len(recording.ids)
    firsts = [*range(0, recording.prefill, size), *range(recording.prefill, total, size)]
    for first, end in zip(firsts, [*firsts[1:], total]):
        seen = tables.visible[:, first:end].any(1)
        yield layouts.Tables(base + tables.start[seen], tables.position[first:end],
                             tables.offset[seen, first:end], tables.visible[seen, first:end])


def frugal_attention(q, k, v, tables, *others):
    """Chapter 4's attention, but it keeps queries alone: scores are computed again for gradients."""
    def attend(queries):  # with a copy of the tables: what is derived from them is not kept either
        return query_rotation.attention(queries, k, v, replace(tables), *others)
    return checkpoint(attend, q, use_reentrant=False, preserve_rng_state=False)


def encode(model, ropes, recordings, size=256, frugal=True):
    """Encode whole runs in one forward pass, as if each token had been fed when it was.

    Chapter 4 attends for each of several runs by itself; here a run is a piece of a recording.

    Args:
        model: attached to the shared cache; ropes: what query_rotation.attach returned.
        recordings: a list of Recordings, the batch.
        size: so many queries attend at a time; frugal: see there. Both change memory and time alone.
    Returns:
        (logits [M, vocabulary] of the M tokens from which one was sampled, in their order;
        a SharedCache with keys and values of all tokens: a recording's behind those of the one before)
    Raises:
        ValueError: there are no tokens, or pieces of no size.
    """
    query_rotation.check_attached(model)
    bases = [0, *accumulate(len(recording.ids) for recording in recordings)]
    if not bases[-1] or size < 1:
        raise ValueError(f"nothing to encode in {len(recordings)} recordings, pieces of {size} tokens")
    cache = shared_cache.SharedCache(ropes)
    cache.block(bases[-1])
    cache.new_slots = torch.cat([base + recording.tables.start[recording.own] + recording.tables.position
                                 for base, recording in zip(bases, recordings)])  # [N]
    pieces = [piece for base, recording in zip(bases, recordings)
              for piece in pieces_of(recording, base, size)]
    ids, position, sampled = (torch.cat(parts).to(model.device) for parts in zip(*(  # [N] each
        (recording.ids, recording.tables.position, recording.sampled) for recording in recordings)))
    function = frugal_attention if frugal and torch.is_grad_enabled() else query_rotation.attention
    output = model(ids[None], position_ids=position[None], past_key_values=cache, use_cache=True,
                   logits_to_keep=(sampled != IGNORE).nonzero()[:, 0],
                   hogwild=(cache, pieces, partial(query_rotation.run_by_run, function=function)))
    return output.logits[0], cache


def loss(model, ropes, recordings, **options):  # exercise
    """Mean cross-entropy (nats, a scalar tensor) of what the workers picked, given what each then saw,
    weighted as the recordings say. options: of `encode`.

    Raises:
        ValueError: nothing was sampled in these recordings.
    """
    logits, _ = encode(model, ropes, recordings, **options)
    picked = [recording.sampled != IGNORE for recording in recordings]
    sampled, weight = (torch.cat([getattr(recording, name)[some] for recording, some in
                                  zip(recordings, picked)]).to(logits.device)
                       for name in ("sampled", "weight"))  # [M] each
    if not weight.sum():
        raise ValueError("nothing was sampled in these recordings: there is nothing to learn from them")
    return F.cross_entropy(logits.float(), sampled, reduction="none") @ weight / weight.sum()
