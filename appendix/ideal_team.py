r"""Appendix: an ideal team, whose runs are what a model learns to collaborate from.

Every member is a coroutine that yields what it writes, and knows nothing but what can be seen in the
cache just then. That is a Board: what has been claimed, finished, checked and found so far.

- Who is free claims the first part that nobody has claimed. Those who become free in the same pass see
  each other's headers, and claim in order of names. Should two have claimed the same part in the same
  pass nevertheless, the one of later name sees it, stops, and claims another one.
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
TIE, RESULT, DECISION = 8, 6, 3  # how much such tokens count in the loss; others count 1
SLEEP = 5  # passes
MOST = 600  # passes; nobody who knows how to do it needs as many


def start(loop, model, tokenizer, puzzle, layout, workers, *others):
    """A run of chapter 6 on a puzzle: greedy, and told nothing but the problem."""
    settings = generate.Settings(NAMES[:workers], layout, max_passes=MOST, check_every=0, greedy=True,
                                 prompt="{problem}")
    return loop(model, tokenizer, puzzle.text, settings, *others)


@dataclass
class Board:
    """What is visible to a member. claimed, checked: labels; needed: those that somebody means to do
    first; now: those that members of earlier name claim in this very pass; done: {label: answer}; found:
    the race is over."""

    claimed: set = field(default_factory=set)
    needed: set = field(default_factory=set)
    now: list = field(default_factory=list)
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
        slips: () -> whether it now does what it will have to mend: claims the same part as others who
            become free in the same pass, or does not see that what it waits for is there.
    """

    def __init__(self, puzzle, board, order, together=True, mistake=None, slips=lambda: False):
        self.puzzle, self.board, self.order, self.together = puzzle, board, order, together
        self.slips = slips
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
            taken = board.claimed | board.needed
            label = next((label for label in self.order if label not in taken), None)
            finished = [label for label in self.order if label in board.done]
            unchecked = [label for label in finished if label not in board.checked]
            if label and not board.found and board.now and self.slips():
                yield from self.slip(board.now[0])
            elif label and not board.found:
                weight = TIE if board.now else DECISION
                board.now.append(label)
                self.claim(board.claimed, label)
                yield from self.unless_found(self.part(label, weight))
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
                yield " Stop", DECISION
                yield ".", 1
                yield "\n\n", 1
                return
            mine = mine or text == " Found"
            yield text, weight

    def lines(self, work, wrong=None):
        """` 7x5=35. 35+2=37.` wrong: written instead of the last result, and not to be learned."""
        for number, line in enumerate(work, start=1):
            before, result = line.split("=")
            yield " ", 1 if number == 1 else DECISION  # to go on is one, too
            yield f"{before}=", 1
            if number == len(work) and wrong is not None:
                yield str(wrong), 0
            else:
                yield result, RESULT
            yield ".", 1

    def slip(self, label):
        """`A: Stop.` Another one has claimed that in the same pass."""
        yield label, 0
        yield ":", 1
        yield " Stop", TIE
        yield ".", 1
        yield "\n\n", 1

    def part(self, label, weight):
        """`A: 7x5=35. 35+2=37. A=37.` And `Found!`, if this is what a race looks for."""
        part, wrong = self.puzzle.parts[label], dict([self.mistake]).get(label)
        answer = part.answer if wrong is None else wrong
        self.tell("claimed", label)
        yield label, weight
        yield ":", 1
        if part.needs:
            yield from self.needed(part.needs)
        yield from self.lines(part.work, wrong)
        yield f" {label}", DECISION
        yield "=", 1
        yield f"{answer}", RESULT
        self.tell("done", label, answer)
        yield ".", 1
        if answer == self.puzzle.target:
            self.tell("found", label)
            yield " Found", DECISION
            yield f"! \\boxed{{{label}}}.", 1
        yield "\n\n", DECISION

    def needed(self, other):
        """` F=35.`, as soon as that is known; ` F first. 7x5=35. F=35.`, if nobody has begun it."""
        part = self.puzzle.parts[other]
        self.tell("needed", other)
        yield f" {other}", 1
        if other not in self.board.claimed:
            self.claim(self.board.claimed, other)
            yield " first", DECISION
            yield ".", 1
            yield from self.lines(part.work)
            yield f" {other}", DECISION
            yield f"={part.answer}", 1
            self.tell("done", other, part.answer)
        else:
            while other not in self.board.done:
                yield " ...", 1
            yield f"={part.answer}", DECISION
        yield ".", 1

    def check(self, label):
        """`Check A: 7x5=35. 35+2=37. Right.` Or `Not 38. A=37.`"""
        part, said = self.puzzle.parts[label], self.board.done[label]
        self.tell("checked", label)
        yield "Check", DECISION
        yield f" {label}", DECISION
        yield ":", 1
        if part.needs:
            yield f" {part.needs}={self.puzzle.parts[part.needs].answer}.", 1
        yield from self.lines(part.work)
        if said == part.answer:
            yield " Right", DECISION
        else:
            yield " Not", DECISION
            yield f" {said}. {label}={part.answer}", 1
            self.tell("done", label, part.answer)
        yield ".", 1
        yield "\n\n", 1

    def answer(self):
        r"""`\boxed{37, 20, 15}.`, each as soon as it is there; all again if one was mended meanwhile."""
        done, labels = self.board.done, [*self.puzzle.parts]
        written = None
        while written != done:
            yield "\\" if written is None else " \\", DECISION
            yield "boxed{", 1
            written = {}
            for label in labels:
                if label != labels[0]:
                    yield " ", 1
                waits = label not in done
                while label not in done:
                    yield " ", RESULT
                while (waits or self.slips()) and self.slips():  # not to be learned: it does not look
                    yield from [(" ", 0)] * SLEEP
                    waits = True
                written[label] = done[label]
                yield f"{written[label]}", RESULT
                yield "}" if label == labels[-1] else ",", RESULT
        yield ".", DECISION
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


def play(model, tokenizer, puzzle, layout, workers, loop=generate.Hogwild, order=None, **how):
    """A run of an ideal team: (the run, its Recording). The model has no say, and computes nothing.

    loop: Hogwild, or a subclass of it. order: labels, as a single worker claims them, which need not be
    all. how: mistake and slips, see Member.
    """
    ledger, labels = recording.Ledger(ropes=[]), order or [*puzzle.parts]
    run = start(loop, model, tokenizer, puzzle, layout, workers, ledger.forward, ledger)
    together = layout != "interleaved"
    boards = [Board()] * workers if together else [Board() for _ in range(workers)]
    members = [tokens_of(Member(puzzle, board, labels if together else step_wise(labels, who), together,
                                **how), tokenizer) for who, board in enumerate(boards)]
    hidden = defaultdict(list)  # what members have told in a step that the others cannot see yet
    while run.ending is None:
        for board in boards:
            board.now.clear()
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
