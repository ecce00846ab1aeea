r"""Appendix: the rivals of chapter 7, each a few lines on chapter 6's loop.

    Reencode    finished steps are encoded anew instead of rotated (paper, appendix E.1)
    Samples     independent workers (self-consistency; section 4.1); Votes: the most frequent answer wins
    Stage       writers with prompts of their own, on which these build:
    skeleton    an outline, a thread per point, and one who reads them all (Ning et al., 2024)
    debate      independent solutions; then all read the others' and think again (Du et al., 2023)
    fork_join   one who writes hands parts over while it writes on (in the manner of Jin et al., 2025)

The last three are functions of (start, problem, workers) that yield runs, each of which reads what the
one before has written. start(class, workers, **settings) makes a run; the problem is a Problem. The
prompts are ours, in the structure of the published ones.
"""
import os
import re
from collections import Counter, namedtuple
from functools import partial
from importlib import import_module

from appendix import models, protocol, tasks

Hogwild = import_module("06_generate").Hogwild

# text; parts: how many numbers its answer has; passes: the largest budget.
Problem = namedtuple("Problem", "text parts passes")
# Who sees nobody may end its text and write headings: there are no others' steps to keep apart from.
SOLO = {"layout": "independent", "forbid": [], "forbid_special": False}


def written(run):
    """Per worker, all that it has written: its finished steps, and the unfinished one. Headers and
    checks are in it, as they are in the steps."""
    closed = [step for record in run.passes for step in record["closed"]]
    return ["".join(step["text"] for step in closed if step["worker"] == w.name) + w.text
            for w in run.workers]


class Reencode(Hogwild):
    """Ablation: a finished step is encoded anew at the end of the history. It sees the history, and
    nothing else."""

    def to_history(self, w):
        """Encode the step that worker w has finished."""
        self.cache.truncate(w.block, 0)
        if self.ids[w.block]:
            self.fed([([self.history], self.ids[w.block])])
        super().to_history(w)  # (moves nothing any more)


class Samples(Hogwild):
    r"""Independent samples: a \boxed{} ends its writer, not the run; the answer is asked for with all
    their text in view."""

    def boxed_by(self, w, answer):
        """Worker w is done."""
        w.finished = True

    def written_answer(self):
        """None: one sample's answer is not the team's."""
        return None


class Each(Samples):
    r"""Samples who are asked one by one, unless they have boxed something: `combined` makes one answer
    of all."""

    def asking(self):
        """A job, as in chapter 6."""
        answers = {w.name: self.form.find(text, self.given)
                   for w, text in zip(self.workers, written(self))}
        silent = [w for w in self.workers if not answers[w.name]]
        said = yield from self.concluding([(self.view(w), w.pending) for w in silent])
        answers.update(zip((w.name for w in silent), said))
        return self.combined([*answers.values()])


class Votes(Each):
    """The most frequent answer; of several, the one that was given first. parts: as of a Problem."""

    def __init__(self, *arguments, parts=1, **others):
        self.parts = parts
        super().__init__(*arguments, **others)

    def combined(self, answers):
        """Answers that are the same count as one, and empty ones not at all."""
        votes = Counter()
        for answer in filter(None, answers):
            votes[next((one for one in votes if self.same(answer, one)), answer)] += 1
        return max(votes, key=votes.get, default="")

    def same(self, answer, other):
        """Would one be right if the other is? (Programs are compared as texts.)"""
        golds = tasks.positions(other, self.parts) if self.parts > 1 else [other]
        return answer == other or (self.settings.form != "code" and len(golds) == self.parts
                                   and tasks.grade(answer, golds)[0] == 1)


def refuse_copies(specs):
    """Raise ValueError if workers of these methods would all write the same, should runs be greedy."""
    for spec in specs:
        name, _, workers = spec.partition(":")
        if name.startswith(("self-consistency", "vote", "debate")) and workers != "1":
            raise ValueError(f"the workers of {spec} would all write the same: give {name}:1, or leave "
                             "--greedy out (an adapter may set it, too)")


def vote(start, problem, workers):
    """Independent samples, who vote."""
    yield start(partial(Votes, parts=problem.parts), workers)


class Stage(Hogwild):
    """Writers who do not see each other, each with a prompt of its own.

    Args:
        arguments: chapter 6's, with the settings of SOLO; its problem is told to nobody.
        prompts: per worker (what the user says, how the reply begins): what stands before its own words.
        at_once: so many write in a pass, taking turns. None: all.
    Raises:
        ValueError: the layout has headers, or there are more or fewer workers than prompts.
    """

    def __init__(self, *arguments, prompts, at_once=None):
        self.prompts, self.at_once = prompts, at_once or len(prompts)
        super().__init__(*arguments)

    def openings(self):
        """What all prompts have in common is encoded once; the rest opens each writer's block, with one
        token at least."""
        if self.layout.headers or len(self.prompts) != len(self.settings.workers):
            raise ValueError(f"a Stage has SOLO's settings and a prompt per worker, not the layout "
                             f"{self.settings.layout!r} and {len(self.prompts)} prompts for "
                             f"{len(self.settings.workers)} workers")
        ids = [self.prompt_ids(*prompt) for prompt in self.prompts]
        self.common = os.path.commonprefix([one[:-1] for one in ids])
        return self.common, [one[len(self.common):] for one in ids]

    def prompt_ids(self, task, begun):
        """Token ids of a prompt."""
        chat = models.chat(self.tokenizer, "", "{problem}")
        return models.encode_prompt(self.tokenizer, chat, task) + self.encode(begun)

    def next_writers(self):
        """The next `at_once` of those who have not finished."""
        able = super().next_writers()
        first = len(self.passes) * self.at_once % max(1, len(able))
        return (able[first:] + able[:first])[:self.at_once]


class Threads(Samples, Stage):
    r"""Writers with prompts of their own; a \boxed{} ends its writer."""


class Jury(Votes, Stage):
    """Writers with prompts of their own, who vote."""


class Answers(Each, Stage):
    """Writers with prompts of their own, each of whom finds one part of the answer."""

    def combined(self, answers):
        """In order, with commas."""
        return ", ".join(answers)


# ------------------------------------------------------------------------------ Skeleton-of-Thought

OUTLINE = """You organise the work of others. Write only the skeleton of an answer to the question, not
the answer: a numbered list (1., 2., 3., ...) of 3 to 10 points that can be worked on independently of
each other, and instead of sentences 3 to 5 words for each.

Question:
How does one prepare a flat for winter?
Skeleton:
1. Seal windows and doors.
2. Check the heating.
3. Insulate pipes.
4. Bring plants inside.

Question:
1. How much is 12 plus 7? 2. Which number is one third of 42? 3. What is the cube of 3?
Skeleton:
1. Twelve plus seven.
2. One third of 42.
3. The cube of three.

Now write the skeleton for this question.
{problem}
Skeleton:"""
POINT = r"""Several writers answer the question below. You write one point of the answer, and none of the
others.
{problem}

The skeleton of the answer is
{outline}

Continue point {number}, and nothing else. Reason step by step, and put what comes out within \boxed{{}}:
that matters most."""


def skeleton(start, problem, workers):
    r"""Skeleton-of-Thought (paper, section 4.1 and appendix D.2). workers: so many of the points are
    worked on in a pass, in turns; None: all.

    An answer of several numbers consists of the threads' \boxed{} (the paper's GSM8K x 5). Or else one
    who has read them all goes on.
    """
    prompt = OUTLINE.format(problem=problem.text), "1."
    outline = start(partial(Stage, prompts=[prompt]), 1, max_passes=128)
    yield outline
    plan = "1. " + written(outline)[0].strip()
    points = (re.findall(r"^\s*\d+[.)]\s*(\S.*)$", plan, re.MULTILINE) or [plan])[:10]
    prompts = [(POINT.format(problem=problem.text, outline=plan, number=k), f"{k}. {point}")
               for k, point in enumerate(points, 1)]
    threads = start(partial(Answers if problem.parts > 1 else Threads, prompts=prompts, at_once=workers),
                    len(points))
    yield threads
    if problem.parts <= 1:  # (a program has none)
        read = "".join(f"{begun} {text.strip()}\n\n"
                       for (_, begun), text in zip(prompts, written(threads)))
        # `replace` and not `format`: the prompt has other braces.
        prompt = protocol.SOLO.replace("{problem}", problem.text), read
        yield start(partial(Stage, prompts=[prompt]), 1)


# ----------------------------------------------------------------------------------- debate, fork-join

AGAIN = r"""{problem}

This is what others have written about it:

{others}

And this is what you have written:

{own}

Look for what is right and what is wrong in all that, and solve the problem once more. Put your final
answer within \boxed{{}}."""


def debate(start, problem, workers, rounds=2):
    """Multi-agent debate: everybody solves the problem; then everybody reads what the others wrote, and
    solves it again; the last answers are votes. Every round has the same share of the largest budget, so
    at a budget within the first one's, a debate is a vote."""
    prompts = [(protocol.SOLO.replace("{problem}", problem.text), "")] * workers
    for _ in range(rounds):
        run = start(partial(Jury, prompts=prompts, parts=problem.parts), workers,
                    max_passes=max(1, problem.passes // rounds))
        yield run
        texts = [text.strip() for text in written(run)]
        prompts = [(AGAIN.format(problem=problem.text, own=own, others="\n\n".join(
            texts[:number] + texts[number + 1:])), "") for number, own in enumerate(texts)]


FORK = r"""{problem}

Solve this problem. What can be worked out by itself, do not work out. Write
<part>what is to be found, with all that one has to know for it</part>
instead, and go on at once: somebody else works on it while you write. Where you need the results, write
<join/>, and they are given to you. Reason step by step, and put your final answer within \boxed{{}}."""
PART = r"""{problem}

Somebody who solves this problem wants to know one thing from you:
{part}

Reason step by step, but be brief, and put what comes out within \boxed{{}}."""


class Fork(Samples, Stage):
    """One who writes (the last worker), and others who work on the parts that it hands over.

    Args: as of Stage, with one prompt; question: the problem, as parts are told of it.
    """

    def __init__(self, *arguments, question, **others):
        self.question, self.joined = question, 0
        super().__init__(*arguments, **others)

    def openings(self):
        """What the writer's prompt and those of parts have in common is encoded once."""
        own, part = (self.prompt_ids(task, "") for task in (
            self.prompts[0][0], PART.format(problem=self.question, part="...")))
        self.common = os.path.commonprefix([own[:-1], part[:-1]])
        return self.common, [own[len(self.common):]]

    def enlist(self, name, ids):
        """The one who writes, and comes first, may be given as many tokens as it writes."""
        usual = self.capacity
        if not self.workers:
            self.capacity = min(usual + self.settings.max_passes, self.context)
        super().enlist(name, ids)
        self.capacity = usual

    def next_writers(self):
        """All who have not finished; but who waits for the others only if these have."""
        writers, text = Hogwild.next_writers(self), written(self)[-1]
        return writers[:-1] or writers if text.count("<join/>") > self.joined else writers

    def boxed_by(self, w, answer):
        """A part has an answer, or the problem has."""
        if w is self.workers[-1]:
            self.boxed = answer
        w.finished = True

    def written_answer(self):
        """What the one who writes has boxed (in what it was given, there may be boxes, too)."""
        return self.boxed or self.found(self.workers[-1])

    def take(self, tokens):
        """Let somebody begin with each part that was handed over, and give results to who waits (their
        beginning, if all of it would leave no room for what it may still write)."""
        record, (*others, writer) = super().take(tokens), self.workers
        texts = written(self)
        handed = re.findall(r"<part>(.*?)</part>", texts[-1], re.DOTALL)[:len(protocol.NAMES) - 1]
        for part in handed[len(others):]:
            ids = self.prompt_ids(PART.format(problem=self.question, part=part.strip()), "")
            self.enlist(protocol.NAMES[len(self.workers)], ids[len(self.common):])
            self.workers.insert(-1, self.workers.pop())
        if texts[-1].count("<join/>") > self.joined and all(w.finished for w in self.workers[:-1]):
            self.joined += 1
            results = [f"{part.strip()}: {text.strip()}" for part, text in zip(handed, texts)]
            given = re.sub("<part>|<join/>", "", "\n\n".join(results))  # (nobody's but the writer's)
            seen = sum(block.length for block in self.view(writer, final=True))
            room = min(writer.block.capacity - writer.block.length, self.context - seen) - self.reserve
            room += len(self.passes) - self.settings.max_passes - len(writer.pending)
            ids = self.encode(f"\n{given}\n\n")[:max(0, room)]
            writer.pending, writer.ids = writer.pending + ids, writer.ids + ids
            writer.before += writer.own_text
            writer.text = self.decode(writer.ids)
            writer.start = len(writer.text)  # its own words begin behind them
        return record


def fork_join(start, problem, workers):
    """Fork and join: a model decides, while it writes, which parts are worked on beside it."""
    yield start(partial(Fork, prompts=[(FORK.format(problem=problem.text), "")], question=problem.text),
                1)
