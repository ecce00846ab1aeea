"""What several test files share: random models of each kind, a short prompt, and a run whose logits are kept."""
import copy
from importlib import import_module

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

generate = import_module("06_generate")
SHORT = "{names} solve this together, in short paragraphs.\n\n{problem}"  # keeps the oracle's passes small
PROBLEM = "How much is 3 + 4 + 5 + 6? Explain how you add numbers."

TINY = {"vocab_size": 49152, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": LlamaConfig(**TINY, head_dim=16), "llama3": LlamaConfig(**TINY, head_dim=16, rope_parameters=LLAMA3),
    "yarn": LlamaConfig(**TINY, head_dim=16, rope_parameters=YARN), "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY, pad_token_id=0, rope_parameters=PARTIAL),
}


def tiny(name):
    """A random model of that kind, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5.0)
    return model


def run_and_record(model, tokenizer, settings, passes, problem=PROBLEM, loop=generate.Hogwild, between=None):
    """Run `passes` passes: (run, prompt ids as the history had them, logits [workers, vocabulary] of each pass).

    between: called with (run, number of the coming pass) before each pass.
    """
    run, logits = loop(model, tokenizer, problem, settings), []
    run.forward = keeping(run.forward, logits)
    for number in range(passes):
        if between:
            between(run, number)
        assert run.ending is None
        del logits[number:]  # (separators for somebody who came)
        writers = len(run.next_writers())
        run.advance()
        logits[number:] = [logits[number][:writers]]  # (what outsiders say is fed last, and re-encoding comes later)
    prompt = tokenizer(run.prompt, add_special_tokens=tokenizer.chat_template is None).input_ids
    return run, prompt[:-1] if settings.layout == "independent" else prompt, logits


def keeping(forward, logits):
    """The same forward; what it returns is kept in the list `logits`, too."""
    def keep(*arguments):
        logits.append(forward(*arguments).clone())
        return logits[-1].clone()
    return keep
