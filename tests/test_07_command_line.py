"""Chapter 7's command line: results that survive anything, the figures of the report, what is
refused."""
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest
import transformers
from conftest import ROOT
from helpers import tiny, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from appendix import command, journal, models, products, protocol

evaluation = import_module("07_eval_limo")
generate = import_module("06_generate")


def call(arguments):
    """The command line's exit code."""
    try:
        return command.one_sentence(lambda: evaluation.main(arguments))
    except SystemExit as ended:
        return ended.code


@pytest.fixture(scope="module")
def without_loading(smollm):  # (loaded before models.load is another function)
    """The command line works on a tiny model at once."""
    toy = tiny("llama"), tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_, **__: toy)
        patch.setattr(products, "fast_products", lambda model: model)
        yield


PLAIN = ["--model", models.BUNDLED, "--task", "own"]
ARGUMENTS = [*PLAIN, "--methods", "baseline", "hogwild:2", "--budgets", "2", "4", "--limit", "4",
             "--seeds", "0", "1", "--device", "cpu", "--out"]
SHORT = [*PLAIN, "--methods", "baseline", "self-consistency:1", "--budgets", "1", "2", "--limit", "2",
         "--device", "cpu", "--answer-tokens", "1", "--batch", "1", "--out"]


def lines_of(path):
    """The results in a file, without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    for row in rows:
        row.pop("seconds", None)
        for entry in row["answers"].values():
            entry.pop("seconds")
    return sorted(rows, key=evaluation.key_of)


def test_killed_at_twenty_moments_it_ends_as_if_undisturbed(without_loading, tmp_path, capfd):
    """SIGKILL at random moments, started again each time: every run is there once, with the same
    answers."""
    assert call([*ARGUMENTS, str(tmp_path / "calm.jsonl")]) == 0
    path, chance, kills = tmp_path / "killed.jsonl", random.Random(0), 0
    for _ in range(100):
        child = os.fork()
        if child == 0:
            os._exit(call([*ARGUMENTS, str(path)]))
        if kills < 20:
            time.sleep(chance.uniform(0.02, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and kills >= 20:
            break
        if kills in (5, 12) and path.exists():  # and in the middle of a line
            with open(path, "ab") as file:
                file.write(b'{"method": "baseline", "prob')
    assert os.WEXITSTATUS(status) == 0 and kills == 20, status
    results = lines_of(path)
    assert len(results) == 16 == len({evaluation.key_of(result) for result in results})
    assert results == lines_of(tmp_path / "calm.jsonl")
    capfd.readouterr()


@pytest.fixture(scope="module")
def calm(without_loading, tmp_path_factory):
    """The file of an undisturbed evaluation."""
    path = tmp_path_factory.mktemp("calm") / "calm.jsonl"
    assert call([*SHORT, str(path)]) == 0
    return path


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
@example(0)
@example(30)
def test_cut_at_any_byte_it_ends_as_if_undisturbed(calm, cut):
    """Whatever is left of the file: the same command completes it, and every run is there once."""
    path, whole = calm.parent / "cut.jsonl", calm.read_bytes()
    path.write_bytes(whole[:cut % len(whole)])
    assert call([*SHORT, str(path)]) == 0
    assert lines_of(path) == lines_of(calm) and len(lines_of(path)) == 4
    assert path.read_bytes().splitlines()[0] == whole.splitlines()[0]


JSON = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(0, 1), st.text(max_size=3),
                 st.just([]), st.just({}), st.just("\x1b[2J"))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_an_edited_file_is_reported_or_refused(calm, data):
    """Any value of any line replaced or removed: a report, or one sentence; never a traceback."""
    rows = [json.loads(line) for line in calm.read_text().splitlines()]
    place = data.draw(st.sampled_from(rows))
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        del place[key]
    path = calm.parent / "edited.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with np.errstate(all="ignore"):
        assert call(["--report", str(path)]) in (0, 2)


def faults_in(report):
    """What the second table of a report says of each method."""
    lines = [line for line in report.splitlines() if line.startswith(("  baseline", "  hogwild"))]
    return [line.split()[-2] for line in lines[2:]]


def test_a_fault_is_recorded_and_the_rest_goes_on(without_loading, tmp_path, monkeypatch, capsys):
    """One problem fails: said in a sentence, counted as not right, and tried again by the next start."""
    start = evaluation.runs_of

    def fail(spec, model, tokenizer, question, *others):
        if "have together" in question["question"] and broken:
            raise RuntimeError("broken on purpose")
        return start(spec, model, tokenizer, question, *others)

    monkeypatch.setattr(evaluation, "runs_of", fail)
    path, broken, png = tmp_path / "out.jsonl", True, tmp_path / "out.png"
    assert call([*ARGUMENTS, str(path), "--png", str(png)]) == 1
    said = capsys.readouterr()
    assert "4 of 16 runs failed" in said.err and "broken on purpose" in said.err
    assert "[OK]" not in said.out and said.err.count("\n") == 1
    rows = lines_of(path)
    assert len(rows) == 16 and sum("broken on purpose" in (row["error"] or "") for row in rows) == 4
    # It says where, too: the function and the line.
    errors = [row["error"] for row in rows if row["error"]]
    assert all(re.fullmatch(r"RuntimeError \(fail:\d+\): broken on purpose", one) for one in errors)
    assert png.stat().st_size > 10_000
    assert call(["--report", str(path), str(path)]) == 0
    said = capsys.readouterr().out
    assert "    16" not in said and "      8" in said
    assert faults_in(said) == ["2", "2"]
    broken = False
    assert call([*ARGUMENTS, str(path), "--png", str(png)]) == 0
    said = capsys.readouterr().out
    assert "4 runs to do" in said.replace("\n", " ") and "[OK] 16 runs" in said
    assert call(["--report", str(path)]) == 0
    said = capsys.readouterr().out
    assert faults_in(said) == ["0", "0"]


def test_five_faults_in_a_row_end_it(without_loading, tmp_path, monkeypatch, capsys):
    """Nobody waits for a thousand runs that fail: exit code 1; four faults and a success do not
    count."""
    calls, start = [], evaluation.runs_of

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 5:
            return start(*arguments)
        raise RuntimeError("out of memory")
    monkeypatch.setattr(evaluation, "runs_of", fail)
    path = tmp_path / "out.jsonl"
    assert call([*ARGUMENTS, str(path), "--batch", "1"]) == 1
    assert "5 runs in a row failed" in capsys.readouterr().err
    assert len(lines_of(path)) == 10 == len(calls)
    assert sum(bool(row["error"]) for row in lines_of(path)) == 9
    # Side by side, as long as more are at work than have failed, these may do better.
    calls.clear()
    path, broken = tmp_path / "side.jsonl", iter([True] * 5 + [False] * 99)

    def fail_late(run):
        if next(broken):
            raise RuntimeError("out of memory")
        return "1"
    monkeypatch.setattr(evaluation, "runs_of", start)
    monkeypatch.setattr(generate.Hogwild, "written_answer", fail_late)
    assert call([*ARGUMENTS, str(path), "--batch", "16"]) == 1
    assert "runs failed" in capsys.readouterr().err
    assert len(lines_of(path)) == 16 and sum(bool(row["error"]) for row in lines_of(path)) == 5


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_keeps_what_was_done(without_loading, calm, tmp_path, monkeypatch, capsys, name):
    """Ctrl-C or SIGTERM in the third run: exit code 130, two results are kept, the same command goes
    on."""
    take, passes, path = generate.Hogwild.take, [], tmp_path / "out.jsonl"

    def interrupt(run, tokens):
        passes.append(1)
        if len(passes) == 6:
            signal.raise_signal(getattr(signal, name))
        return take(run, tokens)
    monkeypatch.setattr(generate.Hogwild, "take", interrupt)
    assert call([*SHORT, str(path)]) == 130
    assert len(lines_of(path)) == 2 and "goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert call([*SHORT, str(path)]) == 0 and lines_of(path) == lines_of(calm)
    # Nothing is left to do: no model is needed.
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert call([*SHORT, str(path)]) == 0


def test_one_file_has_one_writer_and_is_ours(without_loading, calm, tmp_path, monkeypatch, capsys):
    """A second process on the same file, and a file of somebody else, are refused; nothing is
    overwritten.
    What other processes wrote beside it counts."""
    path = tmp_path / "a[1].b"
    with journal.Journal(str(path), "evaluation", {}, evaluation.ROW):
        assert call([*SHORT, str(path)]) == 2 and "another process" in capsys.readouterr().err
    for notes in (tmp_path / "notes", tmp_path / "notes.png"):
        notes.write_text('{"my": "notes"}')
        assert call([*SHORT, str(notes) if notes.suffix != ".png" else str(tmp_path / "x"), "--png",
                     str(notes) if notes.suffix == ".png" else str(tmp_path / "x.png")]) == 2
        assert notes.read_text() == '{"my": "notes"}'
    header, *rows = calm.read_text().splitlines(keepends=True)
    path.write_text(header + rows[0])
    (tmp_path / "a[1].b.rank1-of-2").write_text(header + rows[1] + rows[2][:9])
    (tmp_path / "a1.b.rank1-of-2").write_text("somebody's")
    assert evaluation.files_of(str(path)) == [str(path), f"{path}.rank1-of-2"]
    capsys.readouterr()
    assert call([*SHORT, str(path)]) == 0 and "2 runs to do" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 4
    (tmp_path / "a[1].b.rank1-of-2").write_text(header.replace('"own"', '"limo"') + rows[1])
    assert call([*SHORT, str(path)]) == 2 and "other settings" in capsys.readouterr().err


def test_budgets_may_be_added(without_loading, tmp_path, monkeypatch, capsys):
    """Runs that were not asked at all of them are done again, and say the same at the old ones; tables
    are about budgets that all results have."""
    path = tmp_path / "out.jsonl"
    assert call([*SHORT, str(path)]) == 0
    before = lines_of(path)
    assert call([*SHORT, str(path), "--budgets", "2", "3", "--limit", "1"]) == 0
    assert "2 runs to do" in capsys.readouterr().out
    after = {evaluation.key_of(row): row for row in evaluation.one_each(lines_of(path)[::-1])}
    assert len(after) == len(before) == 4 and len(lines_of(path)) == 6
    for row in before:
        again = after[evaluation.key_of(row)]["answers"]
        assert again["2"] == row["answers"]["2"] and ("3" in again) == (row["problem"] == 0)
    assert call([*SHORT, str(path), "--budgets", "3", "--limit", "1"]) == 0
    assert "0 runs to do" in capsys.readouterr().out
    # Where that fails, the older answers are kept, and nobody says that there are more.
    with monkeypatch.context() as broken:
        broken.setattr(generate.Hogwild, "take", lambda *_: 1 / 0)
        assert call([*SHORT, str(path), "--budgets", "2", "4", "--limit", "1"]) == 1
    said = capsys.readouterr()
    assert "[OK]" not in said.out and "2 of 2 runs failed" in said.err and "other budgets" in said.err
    assert call(["--report", str(path)]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "method runs 1 2 baseline" in said


def test_a_debate_keeps_its_budgets(without_loading, tmp_path, capsys):
    """Its rounds are shares of the largest one: with others, it is refused in the same file."""
    run = [*SHORT, str(tmp_path / "out.jsonl"), "--limit", "1", "--methods", "debate", "--budgets", "2"]
    assert call([*run, "4"]) == 0 == call([*run, "4"]) and "0 runs to do" in capsys.readouterr().out
    for others in ([], ["3", "4"], ["4", "8"]):
        assert call([*run, *others]) == 2
        said = capsys.readouterr().err
        assert "budgets" in said and "another file" in said and said.count("\n") == 1


# -- what is refused ------------------------------------------------------------------------------------

GOOD = '{"question": "a", "answer": "1"}\n'
WRONG = {
    "broken": (GOOD + '{"question": \n', [], "line 2 of"),
    "field": (GOOD + '{"question": "b"}\n', [], "line 2 of"),
    "empty": ("", [], "empty"), "twice": (GOOD * 2, [], "line 2 of"),
    "few": (GOOD, ["--task", "gsm8k-x5"], "only 1"),
    "method": (GOOD, ["--methods", "magic"], "no method"),
    "workers": (GOOD, ["--methods", "hogwild:99"], "1 to 16"),
    "none": (GOOD, ["--methods", "hogwild:0"], "1 to 16"),
    "solo": (GOOD, ["--methods", "baseline:2"], "1 to 1"),
    "task": (GOOD, ["--task", "magic"], "no task"),
    "budgets": (GOOD, ["--budgets", "8", "8"], "increasing"),
    "budget": (GOOD, ["--budgets", "0"], "increasing"), "many": (GOOD, ["--budgets", "many"], "many"),
    "limit": (GOOD, ["--limit", "0"], "at least 1"), "seed": (GOOD, ["--seeds", "-1"], "seed"),
    "seeds": (GOOD, ["--seeds", "1", "1"], "twice"), "context": (GOOD, ["--context", "0"], "context"),
    "out": (GOOD, ["--out", "no/such/folder.jsonl"], "cannot be written"),
    "png": (GOOD, ["--png", "no/such/folder.png"], "cannot be written"),
    "data": (None, [], "cannot be read"),
    "report": (GOOD, ["--report", "nothing.jsonl"], "cannot be read"),
    "nothing": (GOOD, ["--report", "eval.jsonl"], "no results"),
    "torchrun": (GOOD, ["--tensor-parallel", "--out", "tp.jsonl"], "torchrun"),
    "answers": (GOOD, ["--answer-tokens", "0"], "answer_tokens"),
    "null": ('{"question": "a", "answer": null}', [], "no answer"),
    "list": ('{"question": ["a"], "answer": "1"}', [], "line 1 of"),
    "greedy": (GOOD, ["--greedy", "--seeds", "1", "2"], "give one"),
    "picture": (GOOD, ["--png", "x.jpg"], "end in .png"),
    "device": (GOOD, ["--device", "toaster"], "device"),
    "foreign": (GOOD, ["--out", "data.jsonl"], "same file"),
    "one": (GOOD, ["--out", "a.png", "--png", "a.png"], "same"),
    "notes": (GOOD, ["--out", "notes"], "name another file"), "no out": (GOOD, ["--out", ""], "empty"),
    "math": (GOOD, ["--budgets", "2", "4"], "math_verify"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_a_model_is_loaded(case, tmp_path, monkeypatch, capsys):
    """One sentence that names the line, the value or the difference; exit code 2."""
    content, arguments, word = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "notes").write_text("notes")
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content)
    if case == "nothing":  # (a run of theirs, which stops as soon as its file is there)
        monkeypatch.setattr(models, "prepared", lambda *_: sys.exit(9))
        assert call(["--data", "data.jsonl", "--budgets", "2", "4"]) == 9
        capsys.readouterr()
    if case == "math":
        monkeypatch.setitem(sys.modules, "math_verify", None)
    code, said = call(["--data", "data.jsonl", *arguments]), capsys.readouterr().err
    assert code == 2 and word in said and said.count("\n") == 1, said
    assert content is None or (tmp_path / "data.jsonl").read_text() == content
    assert (tmp_path / "notes").read_text() == "notes"


def test_a_hub_that_is_out_of_reach(monkeypatch, capsys, tmp_path):
    """Names the data set, and the way out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))

    def offline(*arguments, **options):
        raise ConnectionError("no route to the hub\nand a long story")
    monkeypatch.setattr(import_module("datasets"), "load_dataset", offline)
    assert call(["--task", "limo", "--out", str(tmp_path / "x.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "GAIR/LIMO" in said and "no route" in said and "--data" in said and said.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()


def test_what_all_results_have_in_common(without_loading, tmp_path, monkeypatch):
    """The first line names everything that shapes an answer: another data file is another evaluation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(GOOD)
    run = ["--data", "data.jsonl", "--task", "math500", "--budgets", "1", "--methods", "baseline",
           "--device", "cpu", "--model", models.BUNDLED]
    assert call(run) == 0
    header, rows, _ = journal.read("eval.jsonl", "evaluation", evaluation.ROW)
    digest = hashlib.sha256(GOOD.encode()).hexdigest()[:12]
    assert len(rows) == 1 and header == {
        "model": "SmolLM2-135M-Instruct", "dtype": "auto", "task": "math500", "budgets": [1],
        "data": f"data.jsonl ({digest})", "greedy": False, "check_every": 1024, "answer_tokens": 64,
        "context": None, "marks": protocol.MARKS, "opening": None, "prompt": None}
    (tmp_path / "data.jsonl").write_text(GOOD.replace("1", "2"))
    assert call(run) == 2
    what = evaluation.Evaluation(model="hub/name")
    assert what.budgets == [256, 512, 1024, 2048, 4096] and what.limit is None
    what = evaluation.Evaluation()
    assert what.budgets == [80, 160, 240] and what.limit == 2


def test_a_prompt_is_for_teams(without_loading, tmp_path, monkeypatch):
    """From a file; who is alone gets the plain one. It belongs to the results, as the opening does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("Work together, {names}: {problem}")
    prompts, build = {}, generate.Hogwild.build
    monkeypatch.setattr(generate.Hogwild, "build", lambda run, *what: (
        prompts.update({len(run.settings.workers): run.prompt}), build(run, *what))[1])
    run = [*PLAIN, "--methods", "baseline", "hogwild:2", "--budgets", "2", "--limit", "1", "--device",
           "cpu", "--opening", "I'm {name}."]
    assert call([*run, "--prompt", "prompt.txt"]) == 0
    assert "Work together, Alice and Bob: A shelf" in prompts[2] and "Work together" not in prompts[1]
    assert "Reason step by step" in prompts[1]
    assert call(run) == 2 and call([*run, "--prompt", "nowhere.txt"]) == 2
    (tmp_path / "prompt.txt").write_text("Work together")
    assert call([*run, "--prompt", "prompt.txt", "--out", "other.jsonl"]) == 2


def test_processes_share_the_problems_or_the_model(smollm, tmp_path):
    """torchrun: two processes split the runs; three shard a model with SmolLM2's 9 and 3 heads. Same
    words as one process."""
    model, tokenizer = smollm
    config = model.config.to_dict()
    for key in ("quantization_config", "layer_types", "_name_or_path"):
        config.pop(key, None)
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_hidden_layers": 2}))
    small.load_state_dict(model.state_dict(), strict=False)  # its first layers, with the real weights
    small.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    watch = tmp_path / "watch.py"  # the chapter, saying how many key heads a process keeps
    watch.write_text(
        f"import os, sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom importlib import import_module\n"
        "evaluation = import_module('07_eval_limo')\n"
        "cache = import_module('02_shared_cache').SharedCache\n"
        "free = 10**15 * (os.environ.get('RANK', '0') == '0')\n"  # the others have no memory left
        "import_module('appendix.models').products.available_memory = lambda: free\n"
        "write, heads = cache.write, set()\n"
        "cache.write = lambda self, layer, k, v: heads.add(k.shape[0]) or write(self, layer, k, v)\n"
        "code = evaluation.main()\n"
        "with open(f'{sys.argv[-1]}.heads', 'a') as file:\n    file.write(f'{heads}\\n')\n"
        "sys.exit(code)\n")
    common = ["--model", str(tmp_path / "model"), "--budgets", "6", "--methods", "baseline", "hogwild:2",
              "--limit", "2", "--greedy", "--device", "cpu"]
    rows = {}
    for count, extra in ((1, []), (2, []), (3, ["--tensor-parallel"])):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
        out = str(tmp_path / f"{count}.jsonl")
        program = [sys.executable, *torchrun, str(watch), *common, *extra, "--out", out]
        run = subprocess.run(program, capture_output=True, text=True, check=False,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr[-2000:]
        heads = f"{{{3 if count < 3 else 1}}}\n" * count
        assert (tmp_path / f"{count}.jsonl.heads").read_text() == heads
        assert run.stdout.count("[OK] 4 runs") == 1
        files = evaluation.files_of(out)
        assert len(files) == (2 if count == 2 else 1)
        rows[count] = [row for file in files for row in lines_of(tmp_path / file)]
    texts = [{evaluation.key_of(row): (row["text"], row["answers"]) for row in rows[count]}
             for count in (1, 2, 3)]
    assert len(texts[0]) == 4 and texts[0] == texts[1] == texts[2]


def test_what_was_written_unasked(calm, capsys):
    """The report says of the baseline's own run what it had written in time, without a run more."""
    rows = [{**row, "seconds": 0.0} for row in lines_of(calm) if row["method"] == "baseline"]
    for row, entry in ((one, entry) for one in rows for entry in one["answers"].values()):
        assert isinstance(entry["answer"], str) and not entry["in_time"]
        entry.update(in_time=row is rows[0], score=1, seconds=0.0)
    some = calm.with_name("some.jsonl")
    some.write_text("\n".join([calm.read_text().split("\n")[0], *map(json.dumps, rows), ""]))
    assert len(rows) == 2 and call(["--report", str(some)]) == 0
    shown = re.findall(r"^ +(\S+) +2 +(\d+%)", capsys.readouterr().out, re.MULTILINE)
    assert shown == [("baseline", "100%"), ("no-early-stop", "50%")]
