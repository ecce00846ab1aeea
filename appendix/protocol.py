r"""Appendix: the words of the protocol (paper, sections 3.3 and 3.4, appendix C), and rules about text.

Everything that the workers are told: a prompt that explains the page they see, a few strings that stand
between the blocks, a question for whoever may be doing redundant work, and a sentence that asks for an
answer.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

# ----------------------------------------------------------------------- what the workers are told

# Word for word from the paper.
PAST_STEPS = "### Past steps"
SEPARATORS = {"others": "\n\n### Work in progress (others)", "dots": " <...>",
              "own": "\n\n### Work in progress (own)"}
CHECK = "Quick check: am I doing redundant work? (yes/no): "
FINISHER = ("\n\nWait, given the limited time, I have to give an answer right now. Considering all my "
            "previous attempts, I have to conclude that the final answer is \\boxed{")

# In our own words (appendix C). Above the dashes: the system message. Below: the user's.
PROMPT = r"""# Several writers, one problem

You are one of {count} assistants who solve one problem together: {names}. All of you write at the same
time. You share a memory: whatever one of you writes, the others can read at once, word by word, while it
is being written.

How to read this page:
{view}
- The others go on writing while you write. A thought of theirs that looks cut off is simply not finished
  yet, and the next time you look there may be more of it, or a new one.

How to work together:
- Share the work in whatever way suits the problem: take different parts, try different approaches, check
  each other's results, discuss a plan and change it when it fails. Say who does what.
- Read what the others are doing, unfinished thoughts included, before you choose what to do, and look
  again every now and then. If somebody makes you a suggestion or asks you something, react to it.
- Never do work twice. If you see that somebody has done what you are doing, or is doing it right now,
  stop, say so (for example: "Wait, {example} is already on this, so I will ..."), and turn to something
  else.
- Keep steps short, and end each with a blank line. Whoever knows the final answer puts it within
  \boxed{}.

---
{names}, solve this problem together, without doing any of the work twice:

{problem}"""
PAST = """\
- Each thought is a step, a paragraph that starts with its author's name and the number of the step:
  **Name [step]:**
- Under '### Past steps' are the finished steps of all of you, in the order in which they were
  finished."""
VIEWS = {  # what the page looks like depends on the layout
    "combined": PAST + """
- Below '### Work in progress (others)', you see the unfinished steps of the others, each up to the mark
  <...>, where its author is writing at this moment.
- Below '### Work in progress (own)', at the very end, is your own unfinished step, which you
  continue.""",
    "interleaved": PAST + """ A step of somebody else appears there as a whole, once it is finished.
- At the very end is your own unfinished step, which you continue.""",
    "contiguous": """- First comes everything that the others have written so far, one after the other,
  behind its author's name: **Name [1]:**
- At the very end is everything that you have written so far, which you continue."""}
NAMES = ["Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi",
         "Ivan", "Judy", "Mallory", "Niaj", "Olivia", "Peggy", "Rupert", "Sybil"]
SOLO = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."


def header(name, step):
    """How step number `step` (from 1) of worker `name` begins."""
    return f"**{name} [{step}]:** "


def check_name(name, others):
    """Raise ValueError unless a worker can be called `name`, beside `others`."""
    if not re.fullmatch(r"(?!\d+$)[^\s*\[\]{}<>|\x00-\x1f\x7f-\x9f]{1,24}", name):
        raise ValueError(f"{name!r} is not a name for a worker (up to 24 characters, no spaces, no "
                         "brackets), nor a number of them (1 to 16); a problem stands before the names")
    if name in others:
        raise ValueError(f"two workers are called {name!r}; each needs a name of its own")


def instructions(settings, headers=True):
    """What the workers are told: (system message, user's message), with {problem} for the problem.

    Args:
        settings: its `prompt` is another one than ours, a text with {problem} in it; above a line `---`
            stands the system message. {names}, {count}, {example} (somebody's name) and {view} are
            filled in.
        headers: do the workers' blocks begin with their names? If not, ours speaks to one alone.
    Raises:
        ValueError: the prompt says {view}, and VIEWS has no words for the layout.
    """
    names, layout = settings.workers, settings.layout
    text = settings.prompt or (PROMPT if headers else SOLO)
    if "{view}" in text and layout not in VIEWS:
        raise ValueError(f"the prompt has {{view}} in it, and appendix/protocol.py, VIEWS, does not say "
                         f"what a page of the layout {layout!r} looks like")
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    for key, value in {"names": listed, "count": str(len(names)), "example": names[0],
                       "view": VIEWS.get(layout, "")}.items():
        text = text.replace("{" + key + "}", value)
    rules, _, task = (part.strip() for part in text.rpartition("\n---\n"))
    return rules, task


# --------------------------------------------------------------------------------- rules about text

MARKS = ".?!…。？！"  # of the end of a sentence
STEP_END = r"""["'”’»)\]}*_`$]*[ \t]*\n[ \t]*\n\s*$"""  # what may follow a mark: its dress, a blank line


def fence_open(text):
    """Does the text end inside a block of code?"""
    return text.count("```") % 2 == 1


def step_ended(text, marks=MARKS):
    """A blank line right after the end of a sentence, and no code fence open (appendix C).

    The end may be dressed: `.)`, `.**`, `.$`. The text decides, not the token: some models write a blank
    line as one token, others as two. `text` is what a worker wrote in this step, without the header;
    marks: characters that end a sentence.
    """
    return bool(re.search(f"[{re.escape(marks)}]{STEP_END}", text[-80:])) and not fence_open(text)


def inside_braces(text):
    r"""What stands before the brace that closes this text, or None. Braces nest; \{ and \} are none."""
    depth = 1
    for match in re.finditer(r"\\?[{}]", text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[:match.start()].strip()
    return None


def boxes(text):
    r"""The contents of all complete \boxed{...} in a text, in order; empty ones are none."""
    found = (inside_braces(text[match.end():]) for match in re.finditer(r"\\boxed\s*\{", text))
    return [content for content in found if content]


def find_boxed(text, given=()):
    r"""The content of the last complete \boxed{...} that is not one of `given` but for spaces, or
    None."""
    known = {re.sub(r"\s", "", content) for content in given}
    return next((box for box in reversed(boxes(text)) if re.sub(r"\s", "", box) not in known), None)


# ----------------------------------------------------------------------------- what an answer looks like

CODE_FINISHER = FINISHER.replace("answer is \\boxed{", "program is\n```python\n")


def inside_fence(text):
    """What stands before the line that closes this block of code, or None."""
    code, fence, _ = ("\n" + text).partition("\n```")
    return code.strip("\n") if fence else None


def find_code(text, given=()):
    r"""The last complete block of code of a text, if something is boxed behind it (a draft comes without
    a \boxed{}; this one may be in the prompt), or None."""
    parts = re.split(r"(?sm)^```[^\n`]*\n(.*?)^```", text)  # text, code, text ...
    return parts[-2].strip("\n") if parts[1:] and boxes(parts[-1]) else None


@dataclass(frozen=True)
class Form:
    """How an answer is written."""

    finisher: str  # makes a worker write one
    inside: Callable  # what follows the finisher -> the answer, or None: it is not complete yet
    find: Callable  # a worker's text, boxes that are in the prompt -> the answer in it, or None


FORMS = {"box": Form(FINISHER, inside_braces, find_boxed),
         "code": Form(CODE_FINISHER, inside_fence, find_code)}
