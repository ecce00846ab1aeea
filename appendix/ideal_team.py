r"""Appendix: an ideal team, whose runs are what a model learns to collaborate from.

Every member is a coroutine that yields what it writes, and knows nothing but what can be seen in the
cache just then. That is a Board: what has been claimed, finished, checked and found so far.

- Who is free claims the first part that nobody has claimed. Those who become free in the same pass see
  each other's headers, and claim in order of names.
- The answer is one more thing to claim, the last one. It is written while others still work, and waits
  (with spaces) for results that are not there yet.
- Whoever has nothing left checks what is finished. A mistake is mended, in the answer, too.
- In a race, whoever finds what is looked for says so, and all others stop in mid-step.
- A part that needs the answer of another one waits for it, or does it first, if nobody has begun it.

Members who see finished steps alone (step-wise) cannot know what the others are busy with. The best rule
we know for them: they begin at different places of the list, and meet somewhere.
"""
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import import_module

from appendix import models, protocol, recording

generate = import_module("06_generate")

NAMES = protocol.NAMES[:4]  # the team has four members at most
ANSWER = "\\boxed{"  # is claimed like a part, when none is left
MOST = 600  # passes; nobody who knows how to do it needs as many


def start(loop, model, tokenizer, puzzle, layout, workers, *others):
    """A run of chapter 6 on a puzzle: greedy, and told nothing but the problem."""
    settings = generate.Settings(NAMES[:workers], layout, max_passes=MOST, check_every=0, greedy=True,
                                 prompt="{problem}")
    return loop(model, tokenizer, puzzle.text, settings, *others)


@dataclass
class Board:
    """What is visible to a member. claimed, checked: labels; done: {label: answer}; found: the race is
    over."""

    claimed: set = field(default_factory=set)
    checked: set = field(default_factory=set)
    done: dict = field(default_factory=dict)
    found: bool = False

    def show(self, what, label, answer=None):
        """Something becomes visible."""
        if what == "found":
            self.found = True
        elif what == "done":
            self.claimed.add(label)
            self.done[label] = answer
        else:
            getattr(self, what).add(label)


class Member:
    """One worker of an ideal team.

    What it tells becomes visible to others when the text that it yields next has been written.

    Args:
        puzzle: see puzzles.py; board: what it sees; order: labels, as it would claim them.
        together: whether it sees unfinished steps, and is seen.
        mistake: (label, wrong answer) that it writes, should it claim that part; or None.
    """

    def __init__(self, puzzle, board, order, together=True, mistake=None):
        self.puzzle, self.board, self.order, self.together = puzzle, board, order, together
        self.mistake, self.told = mistake or (None, None), []

    def tell(self, *event):
        """Announce an event for the Board."""
        self.told.append(event)

    def claim(self, among, label):
        """Who is free in the same pass sees this one's header, and takes the next one."""
        if self.together:
            among.add(label)

    def writes(self):
        """Yields (text, how much it counts in the loss), without end."""
        board = self.board
        while True:
            label = next((label for label in self.order if label not in board.claimed), None)
            finished = [label for label in self.order if label in board.done]
            unchecked = [label for label in finished if label not in board.checked]
            if label and not board.found:
                self.claim(board.claimed, label)
                yield from self.unless_found(self.part(label))
            elif (self.puzzle.target is None and ANSWER not in board.claimed
                  and (self.together or len(finished) == len(self.order))):
                self.claim(board.claimed, ANSWER)
                yield from self.answer()
            elif unchecked and not board.found:
                self.claim(board.checked, unchecked[0])
                yield from self.unless_found(self.check(unchecked[0]))
            else:
                yield "...", 1
                while True:
                    yield " ...", 1

    def unless_found(self, step):
        """A step, cut short when somebody else finds what all are looking for."""
        mine = False
        for text, weight in step:
            if self.board.found and not mine:
                yield " Stop", 3
                yield ".", 1
                yield "\n\n", 1
                return
            mine = mine or text == " Found"
            yield text, weight

    def part(self, label):
        """`A: 7x5=35. 35+2=37. A=37.` And `Found!`, if this is what a race looks for."""
        part, (wrong, answer) = self.puzzle.parts[label], self.mistake
        *lines, last = part.work
        before = last[:-len(str(part.answer))]
        self.tell("claimed", label)
        yield label, 3
        yield ":", 1
        if part.needs:
            yield from self.needed(part.needs)
        if wrong == label:
            yield " " + ". ".join([*lines, before]), 1
            yield str(answer), 0
        else:
            answer = part.answer
            yield " " + ". ".join(part.work), 1
        yield f". {label}={answer}", 1
        self.tell("done", label, answer)
        yield ".", 1
        if answer == self.puzzle.target:
            self.tell("found", label)
            yield " Found", 3
            yield f"! \\boxed{{{label}}}.", 1
        yield "\n\n", 3

    def needed(self, other):
        """` F=35.`, as soon as that is known; ` F first. 7x5=35. F=35.`, if nobody has begun it."""
        first, part = other not in self.board.claimed, self.puzzle.parts[other]
        if first:
            self.tell("claimed", other)
        yield f" {other}", 1
        if first:
            yield " first", 3
            yield ". " + ". ".join(part.work) + f". {other}={part.answer}", 1
            self.tell("done", other, part.answer)
        else:
            while other not in self.board.done:
                yield " ...", 1
            yield f"={part.answer}", 3
        yield ".", 1

    def check(self, label):
        """`Check A: 7x5=35. 35+2=37. Right.` Or `Not 38. A=37.`"""
        part, said = self.puzzle.parts[label], self.board.done[label]
        self.tell("checked", label)
        yield "Check", 3
        yield f" {label}", 3
        yield ":", 1
        if part.needs:
            yield f" {part.needs}={self.puzzle.parts[part.needs].answer}.", 1
        yield " " + ". ".join(part.work) + ".", 1
        if said == part.answer:
            yield " Right", 3
        else:
            yield " Not", 3
            yield f" {said}. {label}={part.answer}", 1
            self.tell("done", label, part.answer)
        yield ".", 1
        yield "\n\n", 1

    def answer(self):
        r"""`\boxed{37, 20, 15}.`, each as soon as it is there; all again if one was mended meanwhile."""
        done, labels = self.board.done, [*self.puzzle.parts]
        written = None
        while written != done:
            yield "\\" if written is None else " \\", 3
            yield "boxed{", 1
            written = {}
            for label in labels:
                while label not in done:
                    yield " ", 2
                written[label] = done[label]
                yield f"{' ' if len(written) > 1 else ''}{written[label]}", 2
                yield "}" if label == labels[-1] else ",", 2
        yield ".", 2
        yield "\n\n", 1


def step_wise(labels, who):
    """The order in which member number `who` claims without seeing what the others are busy with: Alice
    from the front, Bob from the end, Carol and Dave from the middle."""
    front, back = labels[:len(labels) // 2], labels[len(labels) // 2:]
    return [labels, labels[::-1], back + front[::-1], front[::-1] + back][who]


def tokens_of(member, tokenizer):
    """Yields (token id, weight, what becomes visible to others with it)."""
    for text, weight in member.writes():
        told, member.told = member.told, []
        *ids, last = models.encode(tokenizer, text)
        for i in ids:
            yield i, weight, []
        yield last, weight, told


def play(model, tokenizer, puzzle, layout, workers, loop=generate.Hogwild, mistake=None, order=None):
    """A run of an ideal team: (the run, its Recording). The model has no say, and computes nothing.

    loop: Hogwild, or a subclass of it. mistake: see Member. order: labels, as a single worker claims
    them, which need not be all.
    """
    ledger, labels = recording.Ledger(ropes=[]), order or [*puzzle.parts]
    run = start(loop, model, tokenizer, puzzle, layout, workers, ledger.forward, ledger)
    together = layout != "interleaved"
    boards = [Board()] * workers if together else [Board() for _ in range(workers)]
    members = [tokens_of(Member(puzzle, board, labels if together else step_wise(labels, who), together,
                                mistake), tokenizer) for who, board in enumerate(boards)]
    hidden = defaultdict(list)  # what members have told in a step that the others cannot see yet
    while run.ending is None:
        ids, weights, told = zip(*map(next, members))
        for who, events in enumerate(told):
            for event in events:
                boards[who].show(*event)
                hidden[who].append(event)
        number = len(ledger.columns)
        record = run.advance([*ids])
        ledger.label(ids, number, weights)
        for closed in record["closed"] if not together else ():
            for event in hidden.pop(NAMES.index(closed["worker"]), ()):
                for board in boards:
                    board.show(*event)
    return run, ledger.recording()
