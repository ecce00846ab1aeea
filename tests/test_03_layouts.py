"""Chapter 3: the two tables against views that are laid out token by token, the layouts against the paper's words."""
import random
from collections import Counter
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

shared_cache = import_module("02_shared_cache")
chapter = import_module("03_layouts")
check = partial(settings, deadline=None, max_examples=100)
LAYOUTS = ["contiguous", "interleaved", "combined", "independent"]
# Blocks in words: H history; a, b, c, d, e the workers; > and < the headings of others' and of one's own work; . dots.
VIEWS = {
    ("contiguous", 1): ["Ha"], ("contiguous", 2): ["Hba", "Hab"], ("contiguous", 3): ["Hbca", "Hacb", "Habc"],
    ("interleaved", 1): ["Ha"], ("interleaved", 2): ["Ha", "Hb"], ("interleaved", 3): ["Ha", "Hb", "Hc"],
    ("independent", 1): ["Ha"], ("independent", 2): ["Ha", "Hb"], ("independent", 3): ["Ha", "Hb", "Hc"],
    ("combined", 1): ["H<a"], ("combined", 2): ["H>b.<a", "H>a.<b"],
    ("combined", 3): ["H>b.c.<a", "H>a.c.<b", "H>a.b.<c"],
    ("contiguous", 5): ["Hbcdea", "Hacdeb", "Habdec", "Habced", "Habcde"],
    ("interleaved", 5): ["Ha", "Hb", "Hc", "Hd", "He"], ("independent", 5): ["Ha", "Hb", "Hc", "Hd", "He"],
    ("combined", 5): ["H>b.c.d.e.<a", "H>a.c.d.e.<b", "H>a.b.d.e.<c", "H>a.b.c.e.<d", "H>a.b.c.d.<e"],
}


def words(plan, view):
    """The blocks of a view's rows, a letter each."""
    names = "H" + "abcde"[:len(plan.views)] + "><."
    return "".join(names[plan.blocks[row]] for row in view)


def expected_tables(rows, writers):
    """The oracle: lay out each view token by token; measure the distance to each of them that has been written."""
    for view, count in writers:
        strip = [(row, j) for row in view for j in range(rows[row].length)]  # what this writer sees, in its order
        for place in range(len(strip) - count, len(strip)):  # a new token: it sees what stands before it, and itself
            yield strip[place][1], {cell: place - i for i, cell in enumerate(strip[:place + 1])}


def assert_tables(tables, rows, writers):
    """The tables name, for each new token, just the cells that it sees, each at its distance."""
    expected = list(expected_tables(rows, writers))
    assert tables.start.tolist() == [row.start for row in rows] and tables.position.shape == (len(expected),)
    assert tables.offset.shape == tables.visible.shape == (len(rows), len(expected))
    assert all(t.dtype == torch.int64 for t in (tables.start, tables.position, tables.offset, tables.visible))
    for n, (position, distances) in enumerate(expected):
        assert tables.position[n] == position
        offset, visible = tables.offset[:, n].tolist(), tables.visible[:, n].tolist()  # [B] each
        assert {(b, j): position + offset[b] - j for b in range(len(rows)) for j in range(visible[b])} == distances


@check()
@given(seed=st.integers(0, 2 ** 32), workers=st.integers(1, 5), shared=st.integers(0, 4))
def test_tables_of_any_views(seed, workers, shared):
    """Any order of rows, blocks that stand several times or are empty, any number of new tokens: distances fit."""
    pick = random.Random(seed)
    counts = [pick.choice([0, 1, 1, 1, 5]) for _ in range(workers)]
    lengths = [count + pick.choice([0, 1, 7]) for count in counts] + [pick.choice([0, 1, 9]) for _ in range(shared)]
    blocks = [shared_cache.Block(20 * b, 20, length) for b, length in enumerate(lengths)]
    rows = blocks + [pick.choice(blocks) for _ in range(pick.choice([0, 3]))]
    writers = []
    for own, count in enumerate(counts):
        others = [row for row in range(len(rows)) if rows[row] is not blocks[own]]
        writers.append(([*pick.sample(others, pick.randint(0, len(others))), own], count))
    pick.shuffle(writers)
    assert_tables(chapter.fill_tables(rows, writers), rows, writers)


@check()
@given(seed=st.integers(0, 2 ** 32), workers=st.integers(1, 5), name=st.sampled_from(LAYOUTS))
def test_tables_of_a_layout(seed, workers, name):
    """In a layout, with steps of any length: distances are right, and others' work is seen at once or not at all."""
    pick = random.Random(seed)
    plan = chapter.layout(name, workers)
    cache = shared_cache.SharedCache([20] * (1 + max(plan.blocks)), ropes=[])
    cache.append({b: pick.randint(0, 9) for b in range(len(cache.blocks))})
    counts = {1 + worker: pick.choice([0, 1, 1, 6]) for worker in range(workers)}
    cache.append(counts)
    rows = [cache.blocks[b] for b in plan.blocks]
    writers = list(zip(plan.views, counts.values()))
    tables = chapter.fill_tables(rows, writers)
    assert_tables(tables, rows, writers)
    assert (tables.start[[view[-1] for view, count in writers for _ in range(count)]] + tables.position).tolist() == (
        cache.new_slots.tolist())  # the tokens of the tables are those that were given these slots, in this order
    n = 0
    for me, count in counts.items():
        for i in range(count):
            index = cache.blocks[me].length - count + i
            assert tables.visible[me, n] == index + 1 and tables.offset[me, n] == 0  # never one's own future
            for other in counts.keys() - {me}:  # all of the others' tokens, those of this pass too; or none
                seen = cache.blocks[other].length if name in ("combined", "contiguous") else 0
                assert tables.visible[other, n] == seen
            assert tables.visible[chapter.HISTORY, n] == cache.blocks[0].length
            n += 1


def test_a_pass_by_hand():
    """Alice writes two tokens and Bob one, in a contiguous layout: the tables, literally."""
    history, alice, bob = (shared_cache.Block(start, 100, length) for start, length in ((0, 10), (100, 5), (200, 3)))
    plan = chapter.layout("contiguous", 2)
    tables = chapter.fill_tables([history, alice, bob], list(zip(plan.views, (2, 1))))
    assert tables.start.tolist() == [0, 100, 200]
    assert tables.position.tolist() == [3, 4, 2]
    assert tables.offset.tolist() == [[13, 13, 15], [0, 0, 5], [3, 3, 0]]  # Alice: 10 + 3 + 5; Bob: 10 + 5 + 3
    assert tables.visible.tolist() == [[10, 10, 10], [4, 5, 5], [3, 3, 3]]  # Bob sees both of Alice's new tokens


@pytest.mark.parametrize("name, workers", VIEWS)
def test_layouts_are_those_of_the_paper(name, workers):
    """Section 3.2 and appendix A: who sees which blocks in which order, and which layouts move finished steps."""
    plan = chapter.layout(name, workers)
    assert [words(plan, view) for view in plan.views] == VIEWS[name, workers]
    assert [view[-1] for view in plan.views] == list(range(1, workers + 1))  # a worker's own row is 1 + its number
    assert all(len(set(view)) == len(view) for view in plan.views)  # no row twice: each has a single offset
    assert plan.name == name and plan.moves == (name in ("combined", "interleaved"))
    assert plan.headers == (name != "independent")


@pytest.mark.parametrize("name, workers", VIEWS)
def test_the_final_view_is_over_everything(name, workers):
    """The early stop reads history and all workers, once each, the last worker last; separators as in the layout."""
    plan = chapter.layout(name, workers)
    separators = {} if name != "combined" else {"<": 1} if workers == 1 else {">": 1, "<": 1, ".": workers - 1}
    seen = words(plan, plan.final_view)
    assert Counter(seen) == Counter("H" + "abcde"[:workers]) + Counter(separators)
    assert len(set(plan.final_view)) == len(plan.final_view) and seen[0] == "H" and seen[-1] == "abcde"[workers - 1]


@pytest.mark.parametrize("workers, views", [
    (1, {"own": "H<"}), (2, {"others": "H>", "dots": "H>.", "own": "H>.<"}),
    (5, {"others": "H>", "dots": "H>.", "own": "H>.<"})])
def test_separators_are_encoded_once(workers, views):
    """Each separator block is written once, after the history and the separators before it; other layouts have none."""
    plan = chapter.layout("combined", workers)
    assert {separator: words(plan, view) for separator, view in plan.separator_views.items()} == views
    assert not any(chapter.layout(name, workers).separator_views for name in LAYOUTS if name != "combined")


def test_an_unknown_layout_is_refused():
    """In one sentence that names the choices."""
    with pytest.raises(ValueError, match="'circular' is not known") as refusal:
        chapter.layout("circular", 2)
    assert all(name in str(refusal.value) for name in LAYOUTS) and "\n" not in str(refusal.value)
