"""Adapters: merged they compute what they computed; what they say of themselves sets up a run; whatever
is wrong with one is said in a sentence."""
import json
from importlib import import_module

import pytest
import torch
from helpers import tiny, tokenizer
from peft import LoraConfig, get_peft_model

from appendix import adapters, command, models, screen

generate = import_module("06_generate")
NOTES = {"settings": {"prompt": "Do this: {problem}", "check_every": 0, "greedy": True},
         "begins": ["Sort these"], "learned": "to sort"}


@pytest.fixture
def folder(tmp_path):
    """An adapter of a tiny model in another folder, and what the two compute together."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "hogwild.json").write_text(json.dumps(NOTES))
    with torch.no_grad():
        expected = adapted.eval()(torch.arange(9)[None]).logits
    return tmp_path / "adapter", expected


def test_a_merged_adapter_computes_what_it_computed(folder):
    """And is a plain model: the base's parameters, nothing beside them."""
    path, expected = folder
    model, _ = models.load(str(path))
    base, _ = models.load(adapters.base_of(path))
    assert [*dict(model.named_parameters())] == [*dict(base.named_parameters())]
    assert type(model) is type(base) and not any(p.requires_grad for p in model.parameters())
    ids = torch.arange(9)[None]
    assert torch.allclose(model(ids).logits, expected, atol=1e-3)
    assert not torch.allclose(base(ids).logits, expected, atol=1e-1)
    assert models.fingerprint(model) != models.fingerprint(base)
    half, _ = models.load(str(path), dtype="bfloat16")
    assert half.dtype is torch.bfloat16


def test_what_an_adapter_says_sets_up_the_run(folder, tmp_path):
    """Its prompt, no checks, no randomness; what is asked for on the command line wins."""
    parser = command.Parser([generate.Settings, models.Options, screen.Options])
    settings, *_ = parser.read(["--model", str(folder[0])], ["prompt"], adapters.settings)
    assert (settings.prompt, settings.check_every, settings.greedy) == ("Do this: {problem}", 0, True)
    (tmp_path / "prompt.txt").write_text("Please: {problem}")
    parser = command.Parser([generate.Settings, models.Options, screen.Options])
    given = ["--model", str(folder[0]), "--check-every", "7", "--prompt", str(tmp_path / "prompt.txt")]
    settings, *_ = parser.read(given, ["prompt"], adapters.settings)
    assert (settings.prompt, settings.check_every, settings.greedy) == ("Please: {problem}", 7, True)
    parser = command.Parser([generate.Settings, models.Options, screen.Options])
    settings, *_ = parser.read(["--model", str(tmp_path / "base")], ["prompt"], adapters.settings)
    assert (settings.prompt, settings.check_every, settings.greedy) == (None, 1024, False)


def test_who_is_asked_something_else_says_what_it_has_learned(folder):
    """One line, and only then."""
    path = str(folder[0])
    assert adapters.remark(path, "Sort these: 3 2 1") is None
    assert "to sort" in adapters.remark(path, "How are you?")
    assert adapters.remark(models.BUNDLED, "How are you?") is None


@pytest.mark.parametrize("file, content, words", [
    ("adapter_config.json", "{", "cannot be read"), ("adapter_config.json", "[]", "no object"),
    ("adapter_config.json", "{}", "which model"), ("hogwild.json", "[1]", "no object"),
    ("hogwild.json", '{"settings": {}}', "lacks one"),
    ("adapter_model.safetensors", "no weights", "added"),
    ("hogwild.json", json.dumps({**NOTES, "settings": {"workers": 3}}), "sets something else"),
    ("hogwild.json", json.dumps({**NOTES, "settings": {"greedy": 1}}), "sets something else"),
])
def test_what_is_wrong_is_said_in_a_sentence(folder, file, content, words, capsys):
    """Damaged files of an adapter: exit code 2, one line."""
    (folder[0] / file).write_text(content)
    arguments = ["--model", str(folder[0]), "--max-passes", "2", "--device", "cpu", "1 + 1?"]
    assert command.one_sentence(lambda: generate.main(arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count("\n") == 0 and "Traceback" not in error


def test_an_adapter_of_another_model_or_in_many_processes_is_refused(folder, tmp_path):
    """Shapes that do not fit; shares of weights."""
    config = json.loads((folder[0] / "adapter_config.json").read_text())
    other = tiny("qwen2")
    other.save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    (folder[0] / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="could not be added"):
        models.load(str(folder[0]))
    with pytest.raises(ValueError, match="one device"):
        models.load(str(folder[0]), distributed_config=None)
