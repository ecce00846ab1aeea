r"""Appendix: models that have learned something since: a folder with an adapter (LoRA) of another model.

An adapter is added to the weights when it is loaded, so that everybody else sees a plain model. One that
was made here (learn_to_collaborate.py) also says, in hogwild.json, how a run has to be set up for what
it has learned, and what that is.
"""
import json
import warnings
from pathlib import Path

from appendix.command import first_line

COLLABORATOR = "collaborator"  # the one that comes with this project
OWN = Path(__file__).resolve().parent / COLLABORATOR
NOTES = {"settings": dict, "begins": list, "learned": str}  # of hogwild.json, besides what made it
SETTINGS = {"prompt": str, "check_every": int, "greedy": bool}  # of chapter 6, that it may set


def folder_of(name):
    """The folder of the adapter of that name (or path), or None: it is none."""
    folder = OWN if name == COLLABORATOR else Path(name or "")
    return folder if (folder / "adapter_config.json").is_file() else None


def read(folder, file):
    """The object in a JSON file of the folder. Raises ValueError if there is none."""
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(folder / file)!r} cannot be read: {first_line(error)}") from error


def base_of(folder):
    """The name of the model that an adapter belongs to."""
    name = read(folder, "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{str(folder)!r} does not say which model its adapter belongs to")
    return name


def merged(model, folder):
    """The model with the adapter in its weights. Raises ValueError if the two do not belong together."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("adapters need another package: pip install peft") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what changes in libraries
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # of any kind: a damaged file, another model's adapter
        raise ValueError(f"the adapter in {str(folder)!r} could not be added to its model: "
                         f"{first_line(error)}") from error


def notes(name):
    """What the adapter of that name says of itself (see NOTES); {} if there is nothing."""
    folder = folder_of(name)
    if not folder or not (folder / "hogwild.json").exists():
        return {}
    said = read(folder, "hogwild.json")
    if not (all(isinstance(said.get(key), kind) for key, kind in NOTES.items())
            and all(type(value) is SETTINGS.get(key) for key, value in said["settings"].items())):
        raise ValueError(f"{str(folder / 'hogwild.json')!r} lacks one of {', '.join(NOTES)}, or sets "
                         f"something else than {', '.join(SETTINGS)}")
    return said


def settings(name):
    """How chapter 6 has to be set up for the model of that name: {setting: value}."""
    return notes(name).get("settings", {})


def remark(name, problem):
    """A sentence, if a model is asked what it has not learned; or else None."""
    said = notes(name)
    if not said or any(str(begin) in problem for begin in said["begins"]):
        return None
    return f"{name} has learned to solve {said['learned']}, and little else; --model names another model"
