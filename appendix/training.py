r"""Appendix: a training that may be stopped, and may run in several processes.

What is drawn for a step depends on the seed, the step and the process alone, so a training goes on at
the step after its last checkpoint as if nothing had happened.
"""
import os
import random
import tempfile

import torch
import torch.distributed as dist

from appendix import journal


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


def train(folder, seed, steps, build, made, rate, warm_up, keep_every, also=()):
    """Train what `build` makes, or go on from the folder's checkpoint: AdamW on the mean gradient of all
    processes (torchrun's); the rate rises for `warm_up` steps, and falls to 0 in proportion.

    Args:
        folder: where log and checkpoint are kept (the latter until the end).
        build: () -> (parameters, loss(chance, progress from 0 to 1) -> a scalar tensor, keep(about)).
        made: the file by which one sees that the folder holds a finished training.
        keep_every: steps between two checkpoints; also: what the log says besides.
    Raises:
        ValueError: the folder holds a finished training, or one with other settings, or another file.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = folder / "checkpoint.pt"
    if (folder / made).exists() and not checkpoint.exists():
        raise ValueError(f"{str(folder)!r} has trained weights already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    parameters, loss_of, keep = build()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0)
    path = str(folder / "log.jsonl")
    about = {"seed": seed, "steps": steps, "processes": processes, **dict(also)}
    with journal.Journal(None if rank else path, "training", about, {"step": int, "loss": float}) as log:
        begun = restore(checkpoint, parameters, optimizer)
        for step in range(begun + 1, steps + 1):
            loss = loss_of(random.Random(f"{seed} {step} {rank}"), step / steps)
            optimizer.zero_grad()
            (loss / processes).backward()
            for parameter in parameters if processes > 1 else ():
                dist.all_reduce(parameter.grad)
            torch.nn.utils.clip_grad_norm_(parameters, 1)
            optimizer.param_groups[0]["lr"] = rate * min(1, step / warm_up) * (1 - step / (steps + 1))
            optimizer.step()
            if rank == 0 and (step % keep_every == 0 or step == steps):
                log.add({"step": step, "loss": loss.item()})
                with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                    torch.save([step, [p.detach() for p in parameters], optimizer.state_dict()], file)
                os.replace(file.name, checkpoint)
                print(f"step {step}: loss {loss:.4f}", flush=True)
        if rank == 0:
            keep(about)
            checkpoint.unlink()
    if processes > 1:
        dist.destroy_process_group()
