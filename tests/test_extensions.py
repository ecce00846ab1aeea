"""Somebody adds a layout or a method: what fits works at once, what does not is refused in a sentence,
before anything is wrong that nobody sees."""
from functools import partial
from importlib import import_module

import pytest
from helpers import PROBLEM, SHORT, evaluated, random_model, tokenizer

from appendix import methods, models, protocol

layouts = import_module("03_layouts")
generate = import_module("06_generate")
evaluation = import_module("07_eval_limo")
Layout = layouts.Layout


def start(loop=generate.Hogwild, problem=PROBLEM, **options):
    """A run on a random model."""
    return loop(random_model("llama"), tokenizer(), problem, generate.Settings(**options))


def refused(words, function, *arguments, **options):
    """The call ends in one sentence with these words."""
    with pytest.raises(ValueError, match=words) as refusal:
        function(*arguments, **options)
    assert "\n" not in str(refusal.value)


# -- layouts --------------------------------------------------------------------------------------------

def left(history, own, others, words):
    """Everybody sees the unfinished step of the left neighbour alone (chapter 3, exercise 1)."""
    return [history, *[block for block in others if block.start < own.start][-1:], own]


@pytest.mark.parametrize("view", [
    lambda history, own, others, words: [history, own, *others],
    lambda history, own, others, words: [history, own, *others, own],
    lambda history, own, others, words: [history, *others],
])
def test_a_view_ends_with_the_own_block(monkeypatch, view):
    """Else a worker's tokens would go to somebody else's block: chapters 3 and 6 notice it."""
    monkeypatch.setitem(layouts.LAYOUTS, "wrong", Layout(view, moves=False))
    refused("'wrong' has to end with", start, layout="wrong", prompt=SHORT)
    with pytest.raises((AssertionError, ValueError)):
        list(layouts.play("wrong", 3))


def test_a_new_layout_wants_words_in_the_prompt(monkeypatch):
    """A prompt with {view} is refused without them; one without headers has the prompt of one alone."""
    monkeypatch.setitem(layouts.LAYOUTS, "left", Layout(left, moves=True))
    monkeypatch.setitem(layouts.LAYOUTS, "silent", Layout(layouts.independent, False, headers=False))
    for layout, prompt in (("left", None), ("silent", "{problem} {view}")):
        refused(f"VIEWS, .* '{layout}'", start, layout=layout, prompt=prompt)
    silent, independent = (start(layout=layout, seed=3) for layout in ("silent", "independent"))
    assert silent.prompt == independent.prompt and "Reason step by step" in silent.prompt
    monkeypatch.setitem(protocol.VIEWS, "left", "- Your neighbour's step comes first.")
    run = start(layout="left", workers=protocol.NAMES[:3])
    assert "- Your neighbour's step" in run.prompt and "{" not in run.prompt.replace("\\boxed{}", "")
    alice, bob, carol = (w.block for w in run.workers)
    views = [run.view(w) for w in run.workers]
    assert views == [[run.history, alice], [run.history, alice, bob], [run.history, bob, carol]]
    assert len(list(layouts.play("left", 9))) == 9


HEADED = Layout(lambda history, own, others, words: [history, *others, words["mine"], own], moves=False,
                words=("mine",))
REVERSED = Layout(lambda history, own, others, words: [
    history, words["own"], *([words["theirs"], *others] if others else []), own], moves=True,
    words=("own", "theirs"))


@pytest.mark.parametrize("layout", [HEADED, REVERSED])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_layout_with_other_words(monkeypatch, layout, workers):
    """Separators other than the combined layout's, in any order: runs, also of one; asks for answers."""
    monkeypatch.setitem(layouts.LAYOUTS, "other", layout)
    for word in ("mine", "theirs"):
        monkeypatch.setitem(protocol.SEPARATORS, word, f"\n\n### {word}")
    run = start(layout="other", workers=protocol.NAMES[:workers], prompt=SHORT, answer_tokens=2)
    run.advance(), run.advance()
    own = [w.block for w in run.workers]
    assert run.view(run.workers[-1], final=True) == [run.history, *own]
    assert isinstance(run.answer(), str) and len(run.passes) == 2
    assert all(block.length == len(ids) for block, ids in run.ids.items())


# -- the loop -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [[], [5], [5, 6, 7]])
def test_one_token_for_each_writer(tokens):
    """More or fewer are refused, and the run is as before."""
    run = start(prompt=SHORT)
    run.advance([5, 6])
    lengths = [block.length for block in run.cache.blocks]
    refused(f"2 workers write; .* not {len(tokens)}", run.advance, tokens)
    assert [block.length for block in run.cache.blocks] == lengths and len(run.passes) == 1


@pytest.mark.parametrize("problem", ["<|im_start|>", "<|im_end|>"])
def test_a_problem_that_is_a_special_token(problem):
    """It is text, and the chat format's own tokens are none."""
    run, other = (start(problem=one, prompt="{problem}") for one in (problem, "Solve it"))
    ids = run.ids[run.history]
    for token in ("<|im_start|>", "<|im_end|>"):
        special = tokenizer().convert_tokens_to_ids(token)
        assert ids.count(special) == other.ids[other.history].count(special) >= 2
    assert models.decode(tokenizer(), ids) == run.prompt and f"user\n{problem}<|im_end|>" in run.prompt


# -- methods --------------------------------------------------------------------------------------------

def test_only_the_end_of_the_context_ends_a_method_early():
    """What else goes wrong in a later stage is the run's error, not an ending."""
    def stages(error):
        yield start(layout="independent", workers=["A"], max_passes=2)
        raise error
    long = generate.TooLong("the prompt is too long")
    assert evaluated(stages(long), [9])["ending"] == "context"
    refused("NaN", evaluated, stages(ValueError("NaN")), [9])
    with pytest.raises(generate.TooLong, match="shorten"):
        start(context=100)


@pytest.mark.parametrize("others, words", [
    ({"layout": "combined"}, "layout 'combined'"), ({"workers": ["A"]}, "2 prompts for 1 workers"),
    ({"workers": ["A", "B", "C"]}, "2 prompts for 3 workers")])
def test_a_stage_has_its_own_settings(others, words):
    """A prompt per worker, and no headers: they would be written nowhere."""
    loop = partial(methods.Stage, prompts=[("a", ""), ("b", "")])
    settings = {**methods.SOLO, "workers": ["A", "B"]}
    assert len(start(loop, **settings).workers) == 2
    refused(words, start, loop, **{**settings, **others})


def test_a_method_of_several_runs(monkeypatch):
    """METHODS is all that has to know it: a function that starts runs of any class, with settings."""
    def relay(start, problem, workers):
        first = start(generate.Hogwild, workers, max_passes=3)
        yield first
        prompt = f"Go on: {methods.written(first)[0]}"
        yield start(partial(methods.Stage, prompts=[(prompt, "")]), 1, **methods.SOLO)
    monkeypatch.setitem(evaluation.METHODS, "relay", (relay, {"layout": "contiguous"}, 2))
    told = generate.Settings(seed=1, max_passes=9, prompt=SHORT, answer_tokens=2)
    asked = {"question": PROBLEM, "answers": ["7"]}
    runs = list(evaluation.runs_of("relay:3", random_model("llama"), tokenizer(), asked, told))
    assert [len(run.workers) for run in runs] == [3, 1]
    assert [run.settings.layout for run in runs] == ["contiguous", "independent"]
    assert [run.settings.max_passes for run in runs] == [3, 9] and runs[0].settings.seed == 1
    result = evaluated(evaluation.runs_of("relay", random_model("llama"), tokenizer(), asked, told),
                       [5, 8])
    assert result["passes"] == 8 and len(result["text"]) == 3
