r"""Appendix: problems in plain English that small teams can share, generated with exact answers.

Three kinds. In all of them, nobody can tell beforehand how long a part will take:

    list   some things to work out: short sums, long rides of a bus, frogs that jump until they cannot;
           the answers, in order, within \boxed{}
    race   many sums, one of which has the result that is looked for: whoever finds it stops everybody
    plan   a list in which some parts need the answer of another one

What a model was trained on never comes up in a test: numbers are divided between the two (by a hash),
and so are the names of people and things. `patterns` does the same for the words of the questions:
"trained" ones, or "held-out" ones.
"""
import copy
import random
import zlib
from dataclasses import dataclass
from string import ascii_uppercase

KINDS = ["list", "race", "plan"]
PATTERNS = ["trained", "held-out"]
LIST = r"Solve all of these and give the answers in order, separated by commas, within \boxed{}:"
RACE = r"One of these has the answer {target}. Which one? Put its letter within \boxed{}:"
PEOPLE = {"train": ["Tom", "Ann", "Ben", "Eva", "Max", "Lia", "Sam", "Zoe", "Kim", "Leo", "Ida",
                    "Jon", "Mia", "Ned", "Una", "Gus"],
          "test": ["Ray", "Ivy", "Dan", "Amy", "Lou", "Eli", "Fay", "Joe"]}
THINGS = {"train": ["pens", "apples", "books", "cards", "coins", "eggs", "stamps", "shells", "balls",
                    "cups", "keys", "shirts"],
          "test": ["plums", "spoons", "hats", "nuts", "roses", "bricks"]}


# ------------------------------------------------------------------------------------- parts of problems

@dataclass(frozen=True)
class Family:
    """Questions of one kind. {a} {b} ... are numbers, {p} and {q} people, {t} things.

    draw: a source of chance -> numbers; work: numbers -> the lines of working it out, the last with the
    answer in the end.
    """

    draw: callable
    work: callable
    questions: list  # phrasings to train on
    held_out: list  # phrasings that only tests use


def digit(chance):
    """A number from 2 to 9."""
    return chance.randint(2, 9)


def ride(chance):
    """People in a bus, then changes."""
    return [chance.randint(12, 60), *(digit(chance) * chance.choice([1, -1])
                                      for _ in range(chance.randint(3, 5)))]


def sums(numbers):
    """23, -5, 18 -> ["23-5=18", "18+10=28", "28+8=36"]: tens, then ones."""
    total, lines = numbers[0], []
    for number in numbers[1:]:
        sign, size = (1 if number > 0 else -1), abs(number)
        for change in (sign * (size - size % 10), sign * (size % 10)):
            if change:
                lines.append(f"{total}{change:+}={total + change}")
                total += change
    return lines


def until(step, going):
    """numbers -> a line for each step, as long as it goes on. step: numbers -> (how, result)."""
    def work(numbers):
        here, lines = numbers[0], []
        while going(here, *numbers[1:]):
            how, there = step(here, *numbers[1:])
            lines.append(f"{here}{how}={there}")
            here = there
        return lines
    return work


def jumps(chance):
    """Where a frog begins, and the length of the three to nine jumps that it can take."""
    length = chance.randint(3, 9)
    return [length * chance.randint(3, 9) + chance.randint(1, length - 1), length]


def remainder(chance):
    """How many there are, how many of them are lost, and among how many the rest is shared."""
    each, among, lost = digit(chance), digit(chance), digit(chance)
    return [each * among + lost, -lost, among]


def times(a, b):
    """The line of a product."""
    return f"{a}x{b}={a * b}"


def shared(a, b):
    """The line of a division."""
    return f"{a}/{b}={a // b}"


FAMILIES = {
    "buy": Family(lambda r: [digit(r), digit(r)], lambda n: [times(*n)], [
        "{p} buys {a} {t} for {b} dollars each. How many dollars?",
        "{a} boxes hold {b} {t} each. How many {t}?",
        "{p} puts {b} {t} into each of {a} bags. How many {t}?"],
        ["{p} fills {a} rows with {b} {t} in each. How many {t}?"]),
    "more": Family(lambda r: [r.randint(11, 60), r.randint(3, 38)], sums, [
        "{p} has {a} {t} and finds {b} more. How many {t} now?",
        "{p} has {a} {t}, {q} has {b}. How many together?",
        "There are {a} {t} in a box. {p} adds {b}. How many?"],
        ["{p} owned {a} {t} and then got {b} from {q}. How many {t} in all?"]),
    "less": Family(lambda r: [r.randint(30, 90), -r.randint(3, 27)], sums, [
        "{p} has {a} {t} and loses {b}. How many are left?",
        "{p} gives {b} of {a} {t} to {q}. How many remain?",
        "Of {a} {t}, {b} are broken. How many are whole?"],
        ["{p} sells {b} out of {a} {t}. How many does {p} keep?"]),
    "share": Family(lambda r: (lambda b, c: [b * c, b])(digit(r), digit(r)),
                    lambda n: [shared(*n)], [
        "{p} shares {a} {t} among {b} people. How many each?",
        "{a} {t} go into {b} equal bags. How many in a bag?"],
        ["{b} friends split {a} {t} evenly. How many does each get?"]),
    "rest": Family(remainder, lambda n: [*sums(n[:2]), shared(n[0] + n[1], n[2])], [
        "{p} has {a} {t}, loses {b} and shares the rest among {c} people. How many each?",
        "Of {a} {t}, {b} are broken. The others go into {c} equal bags. How many in a bag?"],
        ["{p} keeps {b} of {a} {t}. {c} friends split what is left. How many does each get?"]),
    "boxes": Family(lambda r: [digit(r), digit(r), r.choice([-1, 1]) * digit(r)],
                    lambda n: [times(*n[:2]), *sums([n[0] * n[1], n[2]])], [
        "{p} has {a} boxes of {b} {t} and {gets} {c}. How many {t}?",
        "{a} bags with {b} {t} each; {p} {gets} {c} {t}. How many?",
        "{p} {gets} {c} {t}. Before, there were {a} packs of {b}. How many now?"],
        ["After {p} {gets} {c}, how many {t} are there, if there were {a} crates of {b}?"]),
    "both": Family(lambda r: [r.randint(5, 40), r.randint(2, 18)],
                   lambda n: [*sums(n), *sums([n[0], n[0] + n[1]])], [
        "{p} has {a} {t}, {q} has {b} more. How many together?",
        "{p} reads {a} pages today and {b} more than that tomorrow. How many in all?"],
        ["{q} has {b} {t} more than {p}, who has {a}. How many have both?"]),
    "rates": Family(lambda r: [r.randint(2, 6), r.randint(2, 9), r.randint(2, 5), r.randint(2, 8)],
                    lambda n: [times(*n[:2]), times(*n[2:]), *sums([n[0] * n[1], n[2] * n[3]])], [
        "{p} buys {a} {t} for {b} dollars each and {c} for {d} each. How many dollars?",
        "{p} works {a} days for {b} hours and {c} days for {d} hours. How many hours?"],
        ["{a} shelves with {b} {t} and {c} shelves with {d}: how many {t}?"]),
    "bus": Family(ride, sums, [
        "A bus has {a} people. {rest}. How many are in it?",
        "{a} people sit in a bus. {rest}. How many now?"],
        ["A bus leaves with {a} people. {rest}. How many stay in it?"]),
    "frog": Family(jumps, until(lambda x, b: (f"-{b}", x - b), lambda x, b: x >= b), [
        "A frog on stone {a} jumps {b} back while it can. Where does it stop?",
        "From {a}, take away {b} again and again. What is left in the end?"],
        ["{p} pours {b} litres at a time from a tank of {a} as long as possible. How many stay?"]),
    "halve": Family(lambda r: [r.choice([16, 32, 48, 64, 80, 96]) if r.random() < 0.4
                               else 4 * r.randint(1, 24)],
                    until(lambda x: ("/2", x // 2), lambda x: x % 2 == 0), [
        "Halve {a} while it is even. What comes out?",
        "{p} halves {a} {t} until the number is odd. How many {t} then?"],
        ["Cut {a} in half, again and again, as long as it is even. What remains?"]),
}
SHORT = ["buy", "more", "less", "share", "rest", "boxes", "both", "rates"]
LONG = ["bus", "bus", "frog", "frog", "frog", "halve"]


def for_tests(family, numbers):
    """Whether these numbers come up in tests only: one in five, by a hash."""
    return zlib.crc32(f"{family} {numbers}".encode()) % 5 == 0


@dataclass
class Part:
    """One part of a problem. text: the question; work: lines; answer: a number; needs: a label."""

    text: str
    work: list
    answer: int
    needs: str | None = None


def draw_part(chance, families, use, held_out):
    """A part for "train" or "test"; held_out: with a phrasing that is never trained on."""
    name = chance.choice(families)
    family = FAMILIES[name]
    while True:
        numbers = family.draw(chance)
        work = family.work(numbers)
        results = [int(line.split("=")[1]) for line in work]
        if for_tests(name, numbers) == (use == "test") and all(1 <= n <= 99 for n in results):
            break
    p, q = chance.sample(PEOPLE[use], 2)
    gets = chance.choice(["gets", "buys"]) if numbers[-1] > 0 else chance.choice(["loses", "sells"])
    rest = ", ".join(f"{abs(n)} get {'on' if n > 0 else 'off'}" for n in numbers[1:])
    fill = dict(zip("abcd", map(abs, numbers)), p=p, q=q, t=chance.choice(THINGS[use]), gets=gets)
    text = chance.choice(family.held_out if held_out else family.questions).format(**fill, rest=rest)
    return Part(text, work, results[-1])


# -------------------------------------------------------------------------------------------- problems

class Puzzle:
    r"""A problem: text, parts {label: Part}, answer (what belongs within \boxed{}), target (of a race).

    Args:
        chance: a random.Random.
        kind: one of KINDS.
        count: how many parts; None: 4 to 10, in a race 10 to 16.
        use: "train" or "test"; patterns: one of PATTERNS.
    """

    def __init__(self, chance, kind="list", count=None, use="test", patterns="trained"):
        if patterns not in PATTERNS:
            raise ValueError(f"patterns are {' or '.join(PATTERNS)}, not {patterns!r}")
        self.kind, held_out = kind, patterns == "held-out"
        count = count or (chance.randint(10, 16) if kind == "race" else chance.randint(4, 10))
        if kind == "race":
            self.race(chance, count, use, held_out)
            return
        labels = ascii_uppercase[:count]
        families = [LONG if chance.random() < 0.35 else SHORT for _ in labels]
        self.parts = {label: draw_part(chance, some, use, held_out)
                      for label, some in zip(labels, families)}
        if kind == "plan":
            self.link(chance, chance.choice([1, 1, 2]) if count > 3 else 1)
        self.ask()

    def ask(self):
        """The text and the answer of a list."""
        self.target, self.answer = None, ", ".join(str(part.answer) for part in self.parts.values())
        self.text = LIST + self.lines()

    def lines(self):
        """The parts, a line each."""
        return "".join(f"\n{label}. {part.text}" for label, part in self.parts.items())

    def race(self, chance, count, use, held_out):
        """One part has the result that is looked for, at any place."""
        families = [name for name in SHORT if name != "share"]
        winner, others = draw_part(chance, families, use, held_out), []
        while len(others) < count - 1:
            part = draw_part(chance, families, use, held_out)
            if part.answer != winner.answer:
                others.append(part)
        others.insert(chance.randrange(count), winner)
        self.parts = dict(zip(ascii_uppercase, others))
        self.target = winner.answer
        self.answer = next(label for label, part in self.parts.items() if part is winner)
        self.text = RACE.replace("{target}", str(winner.answer)) + self.lines()

    def share(self, labels):
        """A problem that consists of these parts. (What a race looks for may not be among them.)"""
        share = copy.copy(self)
        share.parts = {label: part for label, part in self.parts.items() if label in labels}
        if self.target is None:
            share.ask()
        else:
            share.text = self.text.split("\n")[0] + share.lines()
        return share

    def mistake(self, chance):
        """(label, wrong answer) that somebody might have miscalculated: early, so that others see it."""
        label = chance.choice([*self.parts][:2])
        answer = self.parts[label].answer
        wrong = answer + chance.choice([-10, -2, -1, 1, 2, 10])
        return label, wrong if 1 <= wrong <= 99 else answer + 1

    def link(self, chance, links):
        """Let some parts need the answer of another one (which needs none itself)."""
        labels = [*self.parts]
        for label in chance.sample(labels[1:], min(links, len(labels) - 1)):
            free = [other for other, part in self.parts.items() if other != label and not part.needs
                    and all(p.needs != label for p in self.parts.values()) and 12 <= part.answer <= 80]
            if free:
                other, n = chance.choice(free), digit(chance) * chance.choice([1, -1])
                how = f"{abs(n)} {'more' if n > 0 else 'less'} than"
                numbers = [self.parts[other].answer, n]
                self.parts[label] = Part(f"What is {how} the answer of {other}?", sums(numbers),
                                         sum(numbers), other)


def fresh(kind, number, patterns="trained"):
    """The test problem of that number: the same for everybody."""
    return Puzzle(random.Random(f"{kind} {patterns} {number}"), kind, None, "test", patterns)


NUMBER = 11  # of what is shown: a list of six parts, a race of fourteen
EXAMPLE = fresh("list", NUMBER).text  # what chapter 6 solves, if it is asked nothing else
