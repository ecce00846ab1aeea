r"""Appendix: a finished collaboration in one forward pass: what each token saw, how to train on it.

Live, a run takes a forward pass for each token of a worker. recording.py puts all passes into one row
of tokens and two tables (chapter 3), and chapter 4's attention encodes that at once. A batch of runs is
a longer row. The tables take memory for tokens x rows; scores would take tokens x tokens, so queries
attend in pieces, and scores are computed again when their gradient is due. Train in plain PyTorch:

    ropes = query_rotation.attach(model)
    model.train().requires_grad_()
    recording.loss(model, ropes, [recording.Recording.of(run)]).backward()

Or with transformers' Trainer, one GPU per process: data_collator=lambda runs: {"recordings": runs}, the
argument remove_unused_columns=False, and in a subclass a `compute_loss` that returns the loss of
inputs["recordings"]. The model's own gradient checkpointing has to stay off (it takes the cache away),
and attention dropout is not applied.                        Run it: python appendix/encode_run.py
"""
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import command, models, recording  # noqa: E402

layouts = import_module("03_layouts")
query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")

UNSEEN = -1  # in place of a distance

PROBLEM = """Tom has 3 red apples and 5 green apples. Ann has 4 red apples and 2 green apples. How many
apples of each colour are there, and how many altogether?"""


def unfold(recorded):
    """Per row, distances [N, its length] from token to key as the token saw them, or UNSEEN.

    So `>= 0` is the mask of appendix B, and the numbers are its position differences.
    """
    tables, parts = recorded.tables, []
    for offset, visible, length in zip(tables.offset, tables.visible, recorded.lengths):
        j = torch.arange(length)
        distance = (tables.position + offset)[:, None] - j  # [N, length]
        parts.append(distance.masked_fill(j >= visible[:, None], UNSEEN))
    return parts


def tokens_fed(sizes, opening):
    """For steps of these sizes, over and over: (tokens fed in a pass, does that complete the step)."""
    while True:
        for size in sizes:
            yield min(opening, size), size <= opening
            yield from ((1, left == 0) for left in reversed(range(size - opening)))


def rehearse(name, lengths, passes, opening=3, prompt=8):
    """A Recording of a run that no model has made, in the layout of that name.

    lengths: per worker, the tokens of its steps, over and over; the first `opening` are fed at once.
    """
    layout, ledger = layouts.LAYOUTS[name], recording.Ledger(ropes=[])
    history = ledger.block(2**20)
    words = {word: ledger.block(1) for word in layout.separators(len(lengths))}
    own = [ledger.block(2**20) for _ in lengths]
    views = [layout.view(history, block, [b for b in own if b is not block], words) for block in own]
    layouts.number_rows([sum(ledger.parts.values(), [])], ledger.rows)  # as they are fed
    for i in range(1 + len(words)):
        ids = [i] * (1 if i else prompt)
        generate.feed(None, ledger, [[(ledger.blocks[:i + 1], ids)]], ledger.forward)
    workers = [tokens_fed(sizes, opening) for sizes in lengths]
    for fed in zip(*workers, range(passes)):
        writers = [(view, [4] * count) for view, (count, _) in zip(views, fed)]
        generate.feed(None, ledger, [writers], ledger.forward)
        ledger.label([5] * len(own))
        for block, (_, ends) in zip(own, fed):
            if ends and layout.moves:
                ledger.move(block, history)
    return ledger.recording()


SHADES = "█▓▒░·"  # 0-7, 8-15, 16-23, more tokens away; the last for UNSEEN


def draw(console, recorded, names):
    """A line per token, in the order in which they were fed; a column per key. names: of the rows."""
    title = [name[:length].ljust(length) for name, length in zip(names, recorded.lengths)]
    console.print(" " * 9, *title)
    for own, *line in zip(recorded.own.tolist(), *unfold(recorded)):
        cells = ("".join(SHADES[min(away // 8, 3)] for away in distances.tolist()) for distances in line)
        console.print(f"{names[own]:9}", *cells)


def encode_real_model(console):
    """A run of the bundled model against the same run in one pass. Returns the largest error."""
    model, tokenizer = models.load()
    settings = generate.Settings(max_passes=80, seed=1, check_every=64,
                                 prompt="{names} add up, step by step.\n\n{problem}")
    run = generate.Hogwild(model, tokenizer, PROBLEM, settings)
    live, forward = [], run.forward  # live: per pass [workers, vocabulary]
    run.forward = lambda *arguments: live.append(forward(*arguments)) or live[-1]
    while run.ending is None:
        run.advance()
    recorded = recording.Recording.of(run)
    with torch.no_grad():
        again, _ = recording.encode(model, run.cache.ropes, [recorded])  # [passes x workers, vocabulary]
    error = (again - torch.cat(live)).abs().max().item()
    console.print(f"{models.BUNDLED}, {len(recorded.ids)} tokens: one pass against {len(live)} passes\n"
                  f"  largest difference of a logit {error:.0e} (they reach {again.abs().max():.0f})")
    assert error < 1e-3 and any(record["closed"] for record in run.passes)
    return error


def saved_bytes(function):
    """How many bytes autograd keeps for the gradient of function()."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(sizes.values())


def measure_memory(console):
    """What is kept for the gradient, as runs grow."""
    model, kept = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)), []
    loss = partial(recording.loss, model, query_rotation.attach(model))
    console.print("\nkept for the gradient, MiB, 2 workers:\n  tokens  frugal  with the scores")
    for passes in (250, 500, 1000):
        example = rehearse("combined", [[70], [110]], passes)
        kept.append([saved_bytes(partial(loss, [example], frugal=f)) / 2**20 for f in (True, False)])
        console.print("  {:6} {:7.1f} {:16.1f}".format(len(example.ids), *kept[-1]))
    console.print("-> in proportion to the tokens; with the scores, nearly to their square\n")
    assert 0 < kept[-1][0] < 5 * kept[0][0]


def main():
    """Show the tables, check them on the real model, measure the memory."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)
    console.print("What each token saw (combined): █ 0-7 tokens away, ▓ 8-15, ▒ 16-23, ░ further.\n")
    names = ["prompt", "| others", "| <...>", "| own", "Alice 1", "Bob 1", "Alice 2", "Bob 2"]
    draw(console, rehearse("combined", [[7, 9], [10, 6]], 11), names)
    console.print("-> While Alice writes her first step, Bob sees it near by. Then it moves to the\n"
                  "   history: from one line of Bob 1 to the next it is further away.\n")
    error = encode_real_model(console)
    measure_memory(console)
    console.print(f"[OK] one pass gives the logits of many (to {error:.0e})")


# To rebuild this file and be checked: make exercise CHAPTER=recording DIR=mine. Questions, which
# `python appendix/solutions.py recording.1` and so on answer by measuring:
# 1. How many integers have the tables of a recording, and how many would a mask have?
# 2. Train SmolLM2 on a run that you like (learning rate 1e-5, ten steps). How does the loss change?

if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
