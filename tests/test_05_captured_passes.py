"""Chapter 5: passes that are captured once and launched again.

Without a GPU, a Recorder stands in for CUDA graphs, and Triton's interpreter for the GPU.
"""
import copy
import gc
from importlib import import_module

import pytest
import torch
from helpers import Launcher, tiny
from test_04_query_rotation import CONFIGS
from test_05_triton_kernel import DEVICE, fused, poison  # noqa: F401 (a fixture that all tests here use)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

attend = import_module("04_query_rotation")
layouts = import_module("03_layouts")
shared_cache = import_module("02_shared_cache")
rope = import_module("01_rope_shift")


KERNELS = ["kernel", "merge"]  # what chapter 5 launches


class Recorder(TorchDispatchMode):
    """A CUDA graph in small: notes every operation with its very tensors, and can do them all again.

    Like the real one it freezes numbers that Python computed and addresses of tensors, and does not bear
    reading a tensor from Python. The kernels' launches are noted, too.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Do an operation and note it."""
        if "_local_scalar_dense" in str(function):
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def kernel(self, kernel):
        """A stand-in for a kernel that notes its launches, not what the interpreter does."""
        def launch(grid, *args, **kwargs):
            with torch.utils._python_dispatch._disable_current_modes():
                kernel[grid](*args, **kwargs)
            self.calls.append((kernel[grid], args, kwargs, None))
        return Launcher(launch)

    def launch(self):
        """Do it all again, into the same memory."""
        for function, args, kwargs, output in self.calls:
            new = function(*args, **kwargs)
            for old, fresh in zip(tree_leaves(output), tree_leaves(new)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)


def capture_on_cpu(monkeypatch):
    """Chapter 5's capture_graph for the CPU, and a list that grows with every launch."""
    launches = []

    def capture(run):
        run()
        recorder = Recorder()
        with monkeypatch.context() as patch, recorder, torch.no_grad():
            for name in KERNELS:
                patch.setattr(fused, name, recorder.kernel(getattr(fused, name)))
            output = run()
        output.fill_(float("nan"))  # a real capture computes nothing

        def launch():
            launches.append(1)
            with torch.no_grad():
                recorder.launch()
        return launch, output
    return capture, launches


def make(name):
    """A random model, of two layers: the interpreter takes its time."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers, config.layer_types = 2, getattr(config, "layer_types", None) and (
        config.layer_types[:2])
    model = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False).to(DEVICE)


def graphs(ours):
    """How many shapes of passes a Decoder has captured."""
    return sum(made is not None for made in ours.captured.values())


def decoder(monkeypatch):
    """(a Decoder that captures on any device, a list that grows with every launch; None on a GPU)."""
    capture, launches = capture_on_cpu(monkeypatch)
    return (fused.Decoder(capture), launches) if DEVICE == "cpu" else (fused.Decoder(), None)


def one_pass(forward, model, cache, writers, ids, last=None):
    """The logits of a pass of one run; writers: pairs (view, count)."""
    cache.reserve([(view[-1], count) for view, count in writers])
    last = torch.tensor([count for _, count in writers]).cumsum(0) - 1 if last is None else last
    return forward(model, cache, [layouts.fill_tables(writers)], ids, last).clone()


@pytest.mark.parametrize("name", ["yarn", "gemma3"])
def test_captured_passes_equal_eager_ones(name, monkeypatch):
    """14 passes of three workers with steps that end: logits as through chapter 4, mostly by graphs.

    Blocks grow, move and shrink between launches.
    """
    model, (ours, launches) = make(name), decoder(monkeypatch)
    ropes, layout, engines = attend.attach(model), layouts.LAYOUTS["combined"], []
    for forward in (attend.forward, ours):
        cache = shared_cache.SharedCache(ropes)
        history, *own = map(cache.block, (200, 40, 40, 40))
        engines.append((forward, cache, history, own, {word: cache.block(3) for word in layout.words}))
    generator, worst = torch.Generator().manual_seed(0), 0.0

    def feed(writers_of):
        nonlocal worst
        logits, ids = [], None
        for forward, cache, *blocks in engines:
            writers = writers_of(*blocks)
            if ids is None:
                ids = torch.randint(1, 256, (sum(n for _, n in writers),), generator=generator)
            logits.append(one_pass(forward, model, cache, writers, ids))
        assert logits[0].shape == logits[1].shape == (len(writers), 256)
        worst = max(worst, ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item())

    feed(lambda history, own, words: [([history], 70)])
    feed(lambda history, own, words: [([history, *list(words.values())[:i + 1]], 2) for i in range(3)])
    for now in range(14):
        opens = now % 7 == 3
        for _, cache, history, own, _ in engines:
            if opens:
                cache.move(own[now % 3], history)
            if now == 9:
                cache.truncate(own[1], 1)

        def writers(history, own, words, now=now, opens=opens):
            views = [layout.view(history, own[w], own[:w] + own[w + 1:], words) for w in range(3)]
            views = views if now % 11 else views[:2]  # at times one of them pauses: another shape
            return [(view, 5 if opens and w == now % 3 else 1) for w, view in enumerate(views)]
        feed(writers)
    assert worst < 1e-5
    assert graphs(ours) == 2 and (launches is None or len(launches) > 9)


class Outsiders(TorchDispatchMode):
    """Notes, without keeping them alive, the memories that operations read but did not make."""

    def __init__(self):
        super().__init__()
        self.made, self.outsiders = [], {}

    def note(self, tensors, inputs):
        """Note the storages of tensors that are read (inputs) or made."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if inputs and all(storage._cdata != mine._cdata for mine in self.made):
                    self.outsiders.setdefault(storage._cdata, (tensor.shape, StorageWeakRef(storage)))
                elif not inputs and storage._cdata not in self.outsiders:
                    self.made.append(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Do an operation and note it."""
        self.note((args, kwargs), inputs=True)
        output = function(*args, **(kwargs or {}))
        self.note(output, inputs=False)
        return output

    def kernel(self, kernel):
        """A stand-in for a kernel, which notes what it is given."""
        outer = self

        class Launcher:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    outer.note(args, inputs=True)
                    with torch.utils._python_dispatch._disable_current_modes():
                        kernel[grid](*args, **kwargs)
                return launch
        return Launcher()


@pytest.mark.skipif(DEVICE == "cuda", reason="watches operations on the CPU, in Triton's interpreter")
def test_what_a_graph_reads_stays_alive(monkeypatch):
    """A graph reads addresses, whoever owns them: somebody must keep what it reads from outside."""
    modes = []

    def capture(run):
        run()
        modes.append(Outsiders())
        with monkeypatch.context() as patch, modes[0], torch.no_grad():
            for name in KERNELS:
                patch.setattr(fused, name, modes[0].kernel(getattr(fused, name)))
            return (lambda run=run: None), run()

    model = make("gemma3")
    cache, ours = shared_cache.SharedCache(attend.attach(model)), fused.Decoder(capture)
    one, two = cache.block(30), cache.block(30)
    for _ in range(2):
        one_pass(ours, model, cache, [([two, one], 1), ([one, two], 1)], [5, 6])
    gc.collect()
    outsiders = list(modes[0].outsiders.values())
    assert len(outsiders) > 30 and not [shape for shape, alive in outsiders if alive.expired()]


def test_the_decoder_is_chapter_4s_forward(monkeypatch):
    """Any `last`, another model, another cache, more memory: never a graph of something else."""
    models, (ours, launches) = [make("llama"), make("llama")], decoder(monkeypatch)
    captures, capture = [], ours.capture or fused.capture_graph
    ours.capture = lambda run: captures.append(1) or capture(run)
    torch.nn.init.normal_(models[1].get_input_embeddings().weight, std=0.5)
    ropes = [attend.attach(model) for model in models][0]
    caches = [shared_cache.SharedCache(ropes) for _ in range(2)]
    for c, cache in enumerate(caches):
        cache.block(30), cache.block(30)
        one_pass(ours, models[0], cache, [([cache.blocks[0]], 3)], [7 + 50 * c, 8, 9])
    cases = [(0, 0, [0, 1], 0), (0, 0, [1, 0], 0), (1, 0, [0, 1], 0), (0, 0, [0, 1], 5),
             (0, 1, [0, 1], 0), (1, 1, [0, 1], 0), (1, 1, [1, 1], 0), (1, 1, [0, 1], 1)]
    for c, m, last, grows in cases:
        cache, logits = caches[c], []
        one, two, *_ = cache.blocks
        if grows:  # another text from here on, which the old memory does not hold
            cache.block(grows)
            cache.truncate(one, 0)
            one_pass(attend.forward, models[m], cache, [([one], 3)], [30 + grows, 60, 90])
        writers = [([two, one], 1), ([one, two], 1)]
        for forward in (ours, ours, attend.forward):
            logits.append(one_pass(forward, models[m], cache, writers, [5, 6], last))
            cache.truncate(one, 3), cache.truncate(two, 0)
        for result in logits[:2]:
            assert torch.allclose(result, logits[2], atol=1e-5), (c, m, last, grows)
        assert logits[2].abs().max() > 0.1
    # Every second pass of a case, and the first one where nothing but `last` is new.
    assert launches is None or len(launches) == len(cases) + 2
    assert len(captures) == 6, f"{len(captures)} captures: one for each model, cache and memory are 6"


def test_the_end_of_a_prompt_is_not_captured(monkeypatch):
    """A piece of one token looks like a pass that comes again. Only what has occurred is captured."""
    model, (ours, _) = make("llama"), decoder(monkeypatch)
    cache, made = shared_cache.SharedCache(attend.attach(model)), []
    history, own = cache.block(30), cache.block(30)
    for writer in [([history], 4), ([history], 1), ([history, own], 1), ([history, own], 1)]:
        one_pass(ours, model, cache, [writer], range(writer[1]), [writer[1] - 1])
        made.append(graphs(ours))
    assert made == [0, 0, 0, 1]


def test_passes_of_several_runs_are_captured(monkeypatch):
    """Each run with its own tables, which change between launches: what chapter 4 gives. The same shapes
    in another order are another graph; if a run feeds more than a token per writer, there is none."""
    model, (ours, launches) = make("gemma3"), decoder(monkeypatch)
    cache, made = shared_cache.SharedCache(attend.attach(model)), []
    blocks = [cache.block(60) for _ in range(3)]
    one_pass(ours, model, cache, [([block], 20) for block in blocks], range(60))
    alone, pair = [[blocks[0]]], [[blocks[1], blocks[2]], [blocks[2], blocks[1]]]
    for now, runs in enumerate([[alone, pair]] * 4 + [[pair, alone]] * 3 + [[alone, pair]]):
        groups, logits = [[(view, 1) for view in views] for views in runs], []
        if now == 3:
            groups[0] = [(alone[0], 7)]
        counts = torch.tensor([count for group in groups for _, count in group])
        ids = torch.randint(1, 256, (int(counts.sum()),))
        for forward in (attend.forward, ours):
            with cache.rewound(only_on_error=forward is ours):
                cache.reserve([(view[-1], count) for group in groups for view, count in group])
                tables = [layouts.fill_tables(group) for group in groups]
                logits.append(forward(model, cache, tables, ids, counts.cumsum(0) - 1).clone())
        assert torch.allclose(*logits, atol=1e-5) and logits[0].abs().max() > 0.1, now
        made.append(graphs(ours))
    assert made == [0, 1, 1, 1, 1, 2, 2, 2] and (launches is None or len(launches) == 5)


def test_few_graphs_are_kept(monkeypatch):
    """Each takes memory: of very many shapes, all are forgotten at times."""
    model, (ours, _) = make("llama"), decoder(monkeypatch)
    cache = shared_cache.SharedCache(attend.attach(model))
    blocks, made = [cache.block(4) for _ in range(40)], []
    monkeypatch.setattr(attend, "forward", lambda *_: torch.zeros(1))
    for count in range(1, 41):
        one_pass(ours, model, cache, [(blocks[:count], 1)], [5])
        made.append(len(ours.captured))
    assert made[:33] == [*range(1, 34)] and made[33:] == [*range(1, 8)]


@pytest.mark.parametrize("message", ["operation not permitted while capturing\nand more", "", None])
def test_what_cannot_be_captured_runs_eagerly(message, capsys, monkeypatch):
    """A model that reads a tensor from Python in its forward: one line that says so, and right logits.

    None: a longrope model, of which that is known before anything is captured.
    """
    calls, model = [], make("llama")
    cache = shared_cache.SharedCache(attend.attach(model))
    if message is None:
        parameters = {**model.config.rope_parameters, "rope_type": "longrope"}
        monkeypatch.setattr(model.config, "rope_parameters", parameters)

    def capture(run):
        run()
        calls.append(1)
        raise RuntimeError(message)

    block, ours, results = cache.block(30), fused.Decoder(capture), []
    for forward in (ours, ours, ours, attend.forward):
        results.append(one_pass(forward, model, cache, [([block], 1)], [5]))
        cache.truncate(block, 0)
    assert all(torch.allclose(result, results[3], atol=1e-5) for result in results)
    assert results[3].abs().max() > 0.1
    assert capsys.readouterr().err.count("\n") == 1 and len(calls) == (message is not None)


@pytest.mark.parametrize("captured", [False, True])
def test_chapter_6_writes_the_same_tokens(captured, smollm, monkeypatch):
    """Two workers through the kernel write what they write through chapter 4's function, launch by
    launch (on a GPU, the real model) and with captured passes.

    Steps count as ended after a few words here, so passes in which a worker opens a step come up, too.
    """
    generate = import_module("06_generate")
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) > (40 if captured else 1))
    monkeypatch.setattr(fused, "PROGRAMS_IN_THE_INTERPRETER", 3)
    fused.processors.cache_clear()
    (model, tokenizer), ours, launches = smollm, fused.Decoder(), None
    if captured:
        ours, launches = decoder(monkeypatch)
    if captured or DEVICE == "cpu":  # (the interpreter takes minutes for the real one)
        model = tiny("qwen3", num_hidden_layers=1)
    settings = generate.Settings(max_passes=20 if captured else 4, prompt="{problem}", greedy=True,
                                 answer_tokens=2)
    runs = [generate.Hogwild(model.to(DEVICE), tokenizer, "3 + 4?", settings, forward)
            for forward in (attend.forward, ours)]
    for run_ in runs:
        while run_.ending is None:
            run_.advance()
    model.to("cpu")
    assert [p["sampled"] for p in runs[0].passes] == [p["sampled"] for p in runs[1].passes]
    assert {*runs[0].passes[0]["sampled"]} == {"Alice", "Bob"}
    assert sum(len(p["closed"]) for p in runs[1].passes) >= 2
    assert DEVICE == "cuda" or not captured or len(launches) >= 5
    fused.processors.cache_clear()


def test_runs_side_by_side_write_the_same_tokens(smollm, monkeypatch):
    """Three runs, two at a time, whose steps end at times: as each writes alone, through chapter 4."""
    generate, batching = import_module("06_generate"), import_module("appendix.batching")
    monkeypatch.setattr(generate, "step_ended", lambda text, marks: len(text) > 40)
    monkeypatch.setattr(fused, "PROGRAMS_IN_THE_INTERPRETER", 3)
    fused.processors.cache_clear()
    model, (ours, launches) = tiny("qwen3", num_hidden_layers=1).to(DEVICE), decoder(monkeypatch)

    def written(forward, at_once):
        cache = shared_cache.SharedCache(attend.attach(model))

        def job(workers, passes):
            told = generate.Settings(["Alice", "Bob", "Carol"][:workers], prompt="{problem}",
                                     greedy=True, max_passes=passes, answer_tokens=2)
            run = generate.Hogwild(model, smollm[1], "3 + 4?", told, forward, cache)
            while run.ending is None:
                run.take(run.sample((yield run.writers())))
            run.release()
            return workers, [record["sampled"] for record in run.passes]
        jobs = (job(*how) for how in ((1, 14), (2, 20), (3, 8)))
        return dict(batching.side_by_side(
            jobs, lambda groups: generate.feed(model, cache, groups, forward), at_once))
    assert written(ours, 2) == written(attend.forward, 1)
    assert any(made and len(shapes) == 2 for shapes, made in ours.captured.items())
    assert launches is None or len(launches) > 8
    fused.processors.cache_clear()
