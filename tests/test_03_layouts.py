"""Chapter 3: the two tables against views that are laid out token by token, the layouts against the
paper's words."""
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
# Blocks in letters: H history; a, b, c, d, e the workers; > and < the headings of others' and of one's
# own work; . dots.
VIEWS = {
    ("contiguous", 1): ["Ha"], ("contiguous", 2): ["Hba", "Hab"],
    ("contiguous", 3): ["Hbca", "Hacb", "Habc"],
    ("interleaved", 1): ["Ha"], ("interleaved", 2): ["Ha", "Hb"], ("interleaved", 3): ["Ha", "Hb", "Hc"],
    ("independent", 1): ["Ha"], ("independent", 2): ["Ha", "Hb"], ("independent", 3): ["Ha", "Hb", "Hc"],
    ("combined", 1): ["H<a"], ("combined", 2): ["H>b.<a", "H>a.<b"],
    ("combined", 3): ["H>b.c.<a", "H>a.c.<b", "H>a.b.<c"],
    ("contiguous", 5): ["Hbcdea", "Hacdeb", "Habdec", "Habced", "Habcde"],
    ("interleaved", 5): ["Ha", "Hb", "Hc", "Hd", "He"],
    ("independent", 5): ["Ha", "Hb", "Hc", "Hd", "He"],
    ("combined", 5): ["H>b.c.d.e.<a", "H>a.c.d.e.<b", "H>a.b.d.e.<c", "H>a.b.c.e.<d", "H>a.b.c.d.<e"],
}


def team(workers, layout):
    """(letters {block: letter}, history, [a worker's block], separators) of a new cache."""
    cache = shared_cache.SharedCache(ropes=[])
    history, *own = (cache.block(60) for _ in range(1 + workers))
    words = {word: cache.block(9) for word in layout.separators(workers)}
    letters = {history: "H", **dict(zip(own, "abcde"))}
    letters |= {block: {"others": ">", "own": "<", "dots": "."}[word] for word, block in words.items()}
    return cache, letters, history, own, words


def same(name, yours, right):
    """Equal; or else it is said which of both is the student's."""
    assert yours == right, f"{name}: yours is {yours}, right is {right}"


def views_of(layout, history, own, words, final=False):
    """The view of every worker."""
    lay_out = layout.final_view if final else layout.view
    return [lay_out(history, me, [other for other in own if other is not me], words) for me in own]


def expected_columns(writers):
    """The oracle: lay out each view token by token; per new token its in-block index, and the (slot,
    distance) of everything that it sees, sorted. A block that stands several times counts as often."""
    for view, count in writers:
        # what this writer sees, in its order
        strip = [(block.start + j, j) for block in view for j in range(block.length)]
        for place in range(len(strip) - count, len(strip)):  # it sees what stands before it, and itself
            cells = strip[:place + 1]
            yield strip[place][1], sorted((slot, place - i) for i, (slot, _) in enumerate(cells))


def seen(tables, n):
    """What token n sees according to the tables, as pairs (slot, distance), sorted."""
    rows = zip(tables.start.tolist(), tables.offset[:, n].tolist(), tables.visible[:, n].tolist())
    position = int(tables.position[n])
    return sorted((start + j, position + offset - j) for start, offset, visible in rows
                  for j in range(visible))


def assert_tables(tables, writers, rows):
    """The tables name, for each new token, just what it sees, each at its distance; `rows` rows."""
    expected = list(expected_columns(writers))
    assert tables.start.shape == (rows,) and tables.position.shape == (len(expected),)
    assert tables.offset.shape == tables.visible.shape == (rows, len(expected))
    parts = (tables.start, tables.position, tables.offset, tables.visible)
    assert all(t.dtype == torch.int64 for t in parts)
    blocks = "; ".join(", ".join(f"slots {block.start} to {block.start + block.length - 1}"
                                 for block in view if block.length) for view, _ in writers)
    for n, (position, cells) in enumerate(expected):
        found = seen(tables, n)
        more, less = ([*(Counter(one) - Counter(other)).elements()]
                      for one, other in ((found, cells), (cells, found)))
        assert found == cells, (f"views ({blocks}), new tokens {[count for _, count in writers]}: number"
                                f" {n} of them sees (slot, distance) {more} too much, {less} too little")
        assert tables.position[n] == position


def needed_rows(views):
    """A row per block, and more for a block that stands several times in one view."""
    return sum(max(view.count(block) for view in views) for block in {b for view in views for b in view})


@check()
@given(seed=st.integers(0, 2 ** 32), workers=st.integers(1, 5), shared=st.integers(0, 4))
def test_tables_of_any_views(seed, workers, shared):
    """Blocks that stand several times in a view or are empty, any number of new tokens: all fits."""
    pick = random.Random(seed)
    counts = [pick.choice([0, 1, 1, 1, 5]) for _ in range(workers)]
    lengths = [count + pick.choice([0, 1, 7]) for count in counts]
    lengths += [pick.choice([0, 1, 9]) for _ in range(shared)]
    blocks, views = [shared_cache.Block(20 * b, 20, length) for b, length in enumerate(lengths)], []
    for own in blocks[:workers]:
        others = [block for block in blocks if block is not own] * pick.choice([1, 1, 3])
        views.append([*pick.sample(others, pick.randint(0, len(others))), own])
    writers = list(zip(views, counts))
    pick.shuffle(writers)
    assert_tables(chapter.fill_tables(writers), writers, needed_rows(views))
    # with rows that were numbered before, by other views: they come first, and keep their numbers
    before = pick.sample(views, pick.randint(0, workers)) + [blocks[::-1]]
    rows = chapter.number_rows(before, {})
    numbered = dict(rows)
    tables = chapter.fill_tables(writers, rows)
    assert list(numbered.items()) == list(rows.items())[:len(numbered)]
    assert tables.start.tolist() == [block.start for block, _ in rows]
    assert list(rows.values()) == list(range(len(rows)))
    assert_tables(tables, writers, needed_rows(views + before))


@check()
@given(seed=st.integers(0, 2 ** 32), workers=st.integers(1, 5), name=st.sampled_from([*chapter.LAYOUTS]))
def test_tables_of_a_layout(seed, workers, name):
    """With steps of any length: distances are right, and others' work is seen at once or not at all."""
    pick, layout = random.Random(seed), chapter.LAYOUTS[name]
    cache, _, history, own, words = team(workers, layout)
    cache.reserve([(block, pick.randint(0, 9)) for block in cache.blocks])
    counts = [pick.choice([0, 1, 1, 6]) for _ in own]
    cache.reserve(list(zip(own, counts)))
    views = views_of(layout, history, own, words)
    writers = list(zip(views, counts))
    tables = chapter.fill_tables(writers)
    assert_tables(tables, writers, needed_rows(views))
    starts = torch.tensor([block.start for block, count in zip(own, counts) for _ in range(count)])
    # the tokens of the tables are those that were given these slots, in this order
    assert (starts + tables.position).tolist() == cache.new_slots.tolist()
    n = 0
    for me, count in zip(own, counts):
        for i in range(count):
            cells = {slot for slot, _ in seen(tables, n)}

            def sees(block, cells=cells):
                """How many leading slots of a block; it sees no others."""
                slots = [slot for slot in cells if block.start <= slot < block.start + block.capacity]
                assert sorted(slots) == list(range(block.start, block.start + len(slots)))
                return len(slots)

            assert sees(me) == me.length - count + i + 1  # never one's own future
            assert sees(history) == history.length
            for other in own:  # all of the others' tokens, those of this pass too; or none
                if other is not me:
                    assert sees(other) == other.length * (name in ("combined", "contiguous"))
            n += 1


def test_a_pass_by_hand():
    """Alice writes two tokens and Bob one, in a contiguous layout: the tables, literally."""
    history, alice, bob = (shared_cache.Block(start, 100, length)
                           for start, length in ((0, 10), (100, 5), (200, 3)))
    views = views_of(chapter.LAYOUTS["contiguous"], history, [alice, bob], {})
    rows = chapter.number_rows([[history, alice, bob]], {})
    tables = chapter.fill_tables(list(zip(views, (2, 1))), rows)
    same("start", tables.start.tolist(), [0, 100, 200])
    same("position", tables.position.tolist(), [3, 4, 2])
    # Alice is at distance 10 + 3 from the history's place, Bob at 10 + 5
    same("offset", tables.offset.tolist(), [[13, 13, 15], [0, 0, 5], [3, 3, 0]])
    same("visible", tables.visible.tolist(), [[10, 10, 10], [4, 5, 5], [3, 3, 3]])  # Bob sees all hers


def test_what_was_given_by_hand_is_kept():
    """An empty dict is filled in place, like any other; and the tables know their writers."""
    history, alice = shared_cache.Block(0, 100, 10), shared_cache.Block(100, 100, 5)
    writers, rows = [([history, alice], 2)], {}
    tables = chapter.fill_tables(writers, rows)
    assert rows == {(history, 0): 0, (alice, 0): 1}, f"`rows` was {{}} and is now {rows}"
    assert tables.writers == writers, "the tables lack `writers`, what they were filled from"


def test_a_block_that_stands_twice_by_hand():
    """Dots of one token after each of two others' steps: a row each, at their own distances."""
    counted = [("H", 0), ("b", 0), (".", 0), ("c", 0), (".", 1), ("a", 0)]
    same("occurrences of the view H b . c . a", [*chapter.occurrences("Hb.c.a")], counted)
    history, mine, bob, carol, dots = (shared_cache.Block(start, 100, length) for start, length in (
        (0, 10), (100, 1), (200, 3), (300, 4), (400, 1)))
    tables = chapter.fill_tables([([history, bob, dots, carol, dots, mine], 1)])
    same("start", tables.start.tolist(), [0, 200, 400, 300, 400, 100])
    same("position", tables.position.tolist(), [0])
    same("offset", tables.offset.tolist(), [[19], [9], [6], [5], [1], [0]])
    same("visible", tables.visible.tolist(), [[10], [3], [1], [4], [1], [1]])


@pytest.mark.parametrize("name, workers", VIEWS)
def test_layouts_are_those_of_the_paper(name, workers):
    """Section 3.2 and appendix A: who sees which blocks in which order, and which layouts move steps."""
    layout = chapter.LAYOUTS[name]
    _, letters, history, own, words = team(workers, layout)
    views = views_of(layout, history, own, words)
    spelled = ["".join(letters[block] for block in view) for view in views]
    same(f"views of the layout {name} for {workers} workers", spelled, VIEWS[name, workers])
    assert [view[-1] for view in views] == own  # the own block is the last
    assert all(view.count(block) == 1 for view, block in zip(views, own))
    assert layout.moves == (name in ("combined", "interleaved"))
    assert layout.headers == (name != "independent")


@pytest.mark.parametrize("name, workers", VIEWS)
def test_the_final_view_is_over_everything(name, workers):
    """The early stop reads history and all workers, once each, the asked one last; separators as in the
    layout."""
    layout = chapter.LAYOUTS[name]
    _, letters, history, own, words = team(workers, layout)
    separators = "." * (workers - 1) + "<" + ">" * (workers > 1) if name == "combined" else ""
    for block, view in zip(own, views_of(layout, history, own, words, final=True), strict=True):
        spelled, me = "".join(letters[one] for one in view), letters[block]
        others = [letter for letter in "abcde"[:workers] if letter != me]
        about = f"final view of {me} in the layout {name} with {workers} workers: yours is {spelled!r}"
        assert spelled[0] == "H" and spelled[-1] == me, f"{about}, which is not from H to {me}"
        between = sorted([*separators, *others])
        assert sorted(spelled[1:-1]) == between, f"{about}; between H and {me} belong {between}"


def test_the_final_view_of_a_layout_that_lacks_words():
    """With some separators, but not all of `combined`: no words, as in `contiguous`."""
    for some in (("own",), ("others", "own"), ("own", "dots")):
        layout = chapter.Layout(chapter.interleaved, moves=True, words=some)
        _, letters, history, own, words = team(2, layout)
        spelled = ["".join(letters[block] for block in view)
                   for view in views_of(layout, history, own, words, final=True)]
        same(f"final views of a layout with the words {some}", spelled, ["Hba", "Hab"])


@pytest.mark.parametrize("workers, names", [(1, ["own"]), (2, ["others", "dots", "own"]),
                                            (5, ["others", "dots", "own"])])
def test_separators_are_encoded_once(workers, names):
    """Each separator of a team has one block, in the order in which they are first seen; other layouts
    have none."""
    assert set(chapter.LAYOUTS) == {name for name, _ in VIEWS}
    assert list(chapter.LAYOUTS["combined"].separators(workers)) == names
    assert not any(layout.separators(workers) for name, layout in chapter.LAYOUTS.items()
                   if name != "combined")


def test_an_unknown_layout_is_refused():
    """By the loop that uses the layouts, in one sentence that names the choices."""
    with pytest.raises(ValueError, match="layout cannot be 'circular'") as refusal:
        import_module("06_generate").Settings(layout="circular")
    assert all(name in str(refusal.value) for name in chapter.LAYOUTS) and "\n" not in str(refusal.value)
