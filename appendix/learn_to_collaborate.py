r"""Appendix: a small language model learns to collaborate.

SmolLM2 (135 million parameters) can read, and calculate a little. What it cannot do is work in a team:
claim what nobody has claimed, use what another one is writing just now, stop when the work is done. That
can be taught. Ideal teams (ideal_team.py) solve problems in plain English (puzzles.py) in chapter 6's
own loop; their runs are recorded, and encoded in one pass each, with gradients (recording.py); LoRA
adapts the model to write what they wrote. There is no code for collaboration in decoding.

    python appendix/learn_to_collaborate.py                  what it learns from: an ideal team at work
    torchrun --nproc-per-node 2 appendix/learn_to_collaborate.py --train collaborator2
"""
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from appendix import adapters, command, ideal_team, journal, models, puzzles, recording  # noqa: E402
from appendix.command import option  # noqa: E402

query_rotation = import_module("04_query_rotation")
generate = import_module("06_generate")
methods = import_module("appendix.methods")


@dataclass
class Options:
    """The command line."""

    train: str | None = option(None, "train into this folder; goes on where it was stopped")
    seed: int = option(0, "of the training")
    steps: int = option(600, "of the training")
    adapter: str | None = option(None, "begin with what the adapter in this folder has learned")


# ---------------------------------------------------------------------------------------- training

TOKENS = 800  # each process takes whole runs until it has so many; gradients are averaged
KEEP_EVERY = 20  # steps between two checkpoints
RATE, WARM_UP = 2e-3, 25  # half the rate, if it begins with an adapter
GROWING = 0.3  # problems grow to their full size in this share of the steps (of a first training)
RANK = 16  # of the adapter
WEIGHTS = "adapter_model.safetensors"  # peft calls the file so
MISTAKES = 0.3  # of the teams that share a list, this share contains one
TIES = 8  # of so many teams, half of the lessons take the one in which most claim in the same pass
SLIPS = 0.4  # how often somebody slips, where one may

# How a run has to be set up for what was learned, and what that is.
KNOWS = {"settings": {"prompt": "{problem}", "check_every": 0, "greedy": True},
         "begins": [puzzles.LIST.split("\\")[0], puzzles.RACE.split("{")[0]],
         "learned": "lists, races and plans like those of appendix/puzzles.py"}


def ties(recorded):
    """How often one who became free in the same pass as another had to find what is left for it."""
    return (recorded.weight == ideal_team.TIE).sum().item()


def lesson(model, tokenizer, chance, progress):
    """Recordings of ideal teams for one step. progress: 0 to 1, how much of the training is over."""
    recordings, size = [], min(1, progress / GROWING)
    while sum(len(recorded.ids) for recorded in recordings) < TOKENS:
        kind = chance.choice(["list"] * 6 + ["plan"] * 2 + ["race"] * 3)
        most = round(4 + 12 * size) if kind == "race" else round(3 + 7 * size)
        count = chance.randint(2, most) if chance.random() < 0.7 else most
        puzzle, way = puzzles.Puzzle(chance, kind, count, "train"), chance.random()
        labels, workers, others = [*puzzle.parts], chance.choice([1, 2, 2, 3, 4, 4]), 0
        if way < 0.1:  # nobody sees unfinished steps
            how = {"layout": "interleaved", "workers": chance.choice([2, 4])}
        elif way < 0.2:  # nobody sees anybody; parts may be left out, or come in any order
            if kind == "list" and chance.random() < 0.6:
                puzzle = puzzle.share(chance.sample(labels, chance.randint(1, count)))
            how = {"layout": "independent", "workers": 1,
                   "order": chance.sample([*puzzle.parts], len(puzzle.parts)) if way < 0.13 else None}
        elif way < 0.3:  # finished steps are encoded anew
            how = {"layout": "combined", "workers": max(2, workers), "loop": methods.Reencode}
        else:
            how = {"layout": "combined", "workers": workers}
            if kind == "list":
                how["slips"] = lambda: chance.random() < SLIPS
                if workers > 1 and chance.random() < MISTAKES:
                    how["mistake"] = puzzle.mistake(chance)
                elif workers > 1 and chance.random() < 0.5:
                    others = TIES - 1
        tried = [puzzle, *(puzzles.Puzzle(chance, kind, count, "train") for _ in range(others))]
        recordings.append(max((ideal_team.play(model, tokenizer, one, **how)[1] for one in tried),
                              key=ties))
    return recordings


def train(folder, seed, steps, start=None):
    """Train an adapter, or go on from the folder's last checkpoint as if nothing had happened: what is
    drawn for a step depends on the seed, the step and the process alone.

    AdamW on the mean gradient of all processes (torchrun's); the rate rises while it warms up, and
    falls to 0 in proportion. start: the folder of an adapter to begin with, or None.

    Raises:
        ValueError: the folder holds a finished training, or one with other settings, or another file.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = folder / "checkpoint.pt"
    if (folder / WEIGHTS).exists() and not checkpoint.exists():
        raise ValueError(f"{str(folder)!r} has trained weights already; name another folder")
    about = {"seed": seed, "steps": steps, "processes": processes}
    if start:
        about["start"] = adapters.notes(start)["training"]
    folder.mkdir(parents=True, exist_ok=True)
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    model, tokenizer = models.load()
    ropes, adapted = query_rotation.attach(model), adapter(model, start)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    begun = [parameter.detach().clone() for parameter in parameters] if start else parameters
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0)
    fast = model.device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    with journal.Journal(None if rank else str(folder / "log.jsonl"), "training", about,
                         {"step": int, "loss": float}) as log:
        taken = restore(checkpoint, parameters, optimizer)
        for step in range(taken + 1, steps + 1):
            recordings = lesson(model, tokenizer, random.Random(f"{seed} {step} {rank}"),
                                1 if start else step / steps)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
                loss = recording.loss(model, ropes, recordings, frugal=False)
            optimizer.zero_grad()
            (loss / processes).backward()
            for parameter in parameters if processes > 1 else ():
                dist.all_reduce(parameter.grad)
            torch.nn.utils.clip_grad_norm_(parameters, 1)
            optimizer.param_groups[0]["lr"] = (RATE / 2 if start else RATE) * min(
                1, step / WARM_UP) * (1 - step / (steps + 1))
            optimizer.step()
            if rank == 0 and (step % KEEP_EVERY == 0 or step == steps):
                log.add({"step": step, "loss": loss.item()})
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                    torch.save([step, [p.detach() for p in parameters], optimizer.state_dict()], file)
                os.replace(file.name, checkpoint)
                print(f"step {step}: loss {loss:.4f}", flush=True)
        if rank == 0:
            keep(adapted, folder, parameters, begun, about)
            checkpoint.unlink()
    if processes > 1:
        dist.destroy_process_group()


def adapter(model, start):
    """Give the model an adapter, with the weights of the one in the folder `start` unless it is None."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    if start:
        set_peft_model_state_dict(adapted, load_file(adapters.folder_of(start) / WEIGHTS))
    return adapted


def restore(checkpoint, parameters, optimizer):
    """Load a checkpoint, if there is one. Returns the number of steps that were taken."""
    try:
        steps, weights, moments = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        optimizer.load_state_dict(moments)
        return steps
    except FileNotFoundError:
        return 0
    except Exception as error:  # of any kind: it may be any file
        raise ValueError(f"{str(checkpoint)!r} is no checkpoint of this training; delete it") from error


def keep(adapted, folder, parameters, begun, about):
    """Save the adapter in bfloat16, and what one has to know about it.

    A training that began with an adapter ends half-way between the two: what both can do stays, and the
    noise of the last lessons does not (Wortsman et al., 2022, average fine-tuned weights likewise).
    """
    for parameter, before in zip(parameters, begun):
        parameter.data = parameter.data.lerp(before, 0.5).bfloat16()
    adapted.peft_config["default"].base_model_name_or_path = models.BUNDLED
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()  # a form to fill in
    (folder / "hogwild.json").write_text(json.dumps({**KNOWS, "training": about}, indent=1) + "\n")


def main(argv=None):
    """Run the command line; returns the exit code."""
    options, = command.Parser([Options], description=__doc__.split("\n")[0]).read(argv)
    command.at_least(options, seed=0, steps=1)
    torch.set_num_threads(1)
    if options.train:
        if options.adapter and not adapters.folder_of(options.adapter):
            raise ValueError(f"--adapter {options.adapter!r} is no folder of an adapter")
        train(Path(options.train), options.seed, options.steps, options.adapter)
        return 0
    puzzle, (model, tokenizer) = puzzles.Puzzle(random.Random("example")), models.load()
    print(f"{puzzle.text}\n\nTwo who know how to share it:\n")
    runs = [ideal_team.play(model, tokenizer, puzzle, "combined", workers)[0] for workers in (1, 2)]
    for record in runs[1].passes:
        for closed in record["closed"]:
            print(closed["text"].strip())
    assert all(run.boxed.split() == puzzle.answer.split() for run in runs)
    one, two = (len(run.passes) for run in runs)
    print(f"\n[OK] right, in {two} passes, where one who is alone takes {one}")
    return 0


if __name__ == "__main__":
    sys.exit(command.one_sentence(main))
