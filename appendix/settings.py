"""Appendix: everything that shapes a run of chapter 6, besides the model and the problem, and whether it
makes sense."""
from dataclasses import dataclass
from importlib import import_module

from appendix import command, protocol
from appendix.command import option
from appendix.protocol import FORMS, NAMES

layouts = import_module("03_layouts")


@dataclass
class Settings:
    """Everything that shapes a run, besides the model and the problem."""

    workers: list[str] = option(NAMES[:2], "their names, or how many of them")
    layout: str = option("combined", f"who sees what: {', '.join(layouts.LAYOUTS)}")
    max_passes: int = option(256, "budget of sequential forward passes")
    check_every: int = option(1024, "generated tokens between checks for redundant work; 0: never")
    form: str = option("box", f"how the answer is written: {', '.join(FORMS)}")
    answer_tokens: int = option(16, "longest answer when the budget ends")
    max_step: int = option(512, "a step that has grown to so many tokens is over at the next line end")
    seed: int = option(0, "of the random numbers")
    greedy: bool = option(False, "always the likeliest token: no randomness")
    temperature: float | None = option(None, "default: the model's own, or 0.6")
    top_p: float | None = option(None, "default: the model's own, or 0.95")
    top_k: int | None = option(None, "default: the model's own, or 50; 0: no limit")
    context: int | None = option(None, "tokens that may be in view (default: what the config says)")
    marks: str = option(protocol.MARKS, "what ends a sentence; a blank line behind it ends a step")
    opening: str | None = option(None, "how everybody begins, such as \"Hi, I'm {name}. \"")
    prompt: str | None = option(None, "another prompt, with {problem} in it (here: its file)")
    forbid: list[str] = option(["</think>", "##", " ##", "###", " ###", "####", " ####"],
                               "tokens that workers may not write, besides special ones; '': none")
    forbid_special: bool = option(True, "workers may not end their text, or change roles")

    def __post_init__(self):
        """Raise ValueError, one sentence, if a setting makes no sense."""
        if self.workers in [[str(count)] for count in range(1, len(NAMES) + 1)]:  # how many, not who
            self.workers = NAMES[:int(self.workers[0])]
        rules = [("workers", 1 <= len(self.workers) <= len(NAMES), f"1 to {len(NAMES)} of them"),
                 ("layout", self.layout in layouts.LAYOUTS, f"one of {', '.join(layouts.LAYOUTS)}"),
                 ("form", self.form in FORMS, f"one of {', '.join(FORMS)}"),
                 ("temperature", self.temperature is None or 0 < self.temperature < 1e9, "above 0"),
                 ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
                 ("prompt", "{problem}" in (self.prompt or "{problem}"), "a text with {problem} in it")]
        for name, holds, wanted in rules:
            if not holds:
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}; it has to be {wanted}")
        command.at_least(self, max_passes=1, check_every=0, answer_tokens=1, max_step=16, seed=0,
                         top_k=0, context=1)
        for i, name in enumerate(self.workers):
            protocol.check_name(name, self.workers[:i])
        if self.prompt:
            protocol.instructions(self)  # (it may have a {view} that nobody has described)
