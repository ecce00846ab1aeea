"""The journal: what a cut, edited, foreign or busy file does, and a full disk; pictures; shapes."""
import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appendix import journal, screen

HEADER = {"problem": "3 + 4 = é?\u2028", "seed": 1, "workers": ["Alice", "Bob"]}
ROWS = [
    {"prompt": "### Past\x1b[2J\r\n", "opening": {"Alice": "**Alice"}, "moves": True, "context": 64,
     "weights": "0f"},
    *({"fed": {"Alice": [1, 2], "Bob": []}, "sampled": {"Alice": n}, "text": {"Alice": "\x85 7\n"},
       "in_view": 9,
       "events": [["say", "Eve", "Hm\u2029"]], "seconds": 0.25, "closed": [
           {"worker": "Bob", "step": n, "text": "\x0b.\n", "opened": ""}]} for n in range(3)),
    {"ending": "answer", "answer": "7"}]
check = partial(settings, deadline=None, max_examples=150)


def opened(path, header=HEADER, **options):
    """A journal of that header, for rows of a trace."""
    return journal.Journal(str(path), "trace", header, screen.ROW, **options)


def written(path, rows=ROWS, header=HEADER):
    """The bytes of a file with these rows."""
    with opened(path, header) as trace:
        for row in rows:
            trace.add(row)
    return path.read_bytes()


def refusal(path, *args, **options):
    """The sentence with which a file is refused; the file is unchanged, and free for others."""
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught, opened(path, *args, **options):
        pass
    sentence = str(caught.value)
    assert path.read_bytes() == before and sentence.isprintable()
    assert str(path) in sentence and len(sentence) < 900
    return sentence


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file that every example writes anew."""
    return tmp_path_factory.mktemp("journal") / "trace"


# ------------------------------------------------------------------------------- cut, edited, foreign

def test_what_is_written_is_read(tmp_path):
    """The header, and a line per row, as JSON; the same command reads what is there and adds to it."""
    data = written(tmp_path / "trace", ROWS[:2])
    with opened(tmp_path / "trace") as trace:
        assert trace.rows == ROWS[:2]
        for row in ROWS[2:]:
            trace.add(row)
            last = (tmp_path / "trace").read_bytes().split(b"\n")[-2]
            assert trace.rows[-1] == row == json.loads(last)
    lines = (tmp_path / "trace").read_bytes().split(b"\n")
    assert (tmp_path / "trace").read_bytes().startswith(data) and lines[-1] == b""
    assert [json.loads(line) for line in lines[:-1]] == [{"format": "hogwild-trace-2", **HEADER}, *ROWS]
    assert journal.read(tmp_path / "trace", "trace", screen.ROW) == (HEADER, ROWS,
                                                                     len(b"\n".join(lines)))
    with journal.Journal(None, "trace", HEADER, screen.ROW) as nothing:
        nothing.add(ROWS[0])
    assert nothing.rows == ROWS[:1]


def test_a_file_that_ends_anywhere_is_continued(place):
    """Whole lines are kept, the torn one goes; what comes then is what an undisturbed file holds."""
    data = written(place)
    for size in range(len(data)):
        place.write_bytes(data[:size])
        whole = max(0, data[:size].count(b"\n") - 1)
        with opened(place) as trace:
            assert trace.rows == ROWS[:whole]
            for row in ROWS[whole:]:
                trace.add(row)
        assert place.read_bytes() == data, size


@pytest.mark.parametrize("header", [{}, HEADER])
def test_a_header_is_written_once(tmp_path, header):
    """Also one that says nothing; that is another one than one that says something."""
    data = written(tmp_path / "trace", ROWS[:1], header)
    assert written(tmp_path / "trace", [], header) == data and data.count(b"\n") == 2
    assert "problem" in refusal(tmp_path / "trace", {} if header else HEADER)


def test_a_header_alone_is_nobodys_work(tmp_path):
    """A command that ended before its first row (its model is misspelt, say) does not keep the file."""
    written(tmp_path / "trace", [], {**HEADER, "seed": 7})
    data = written(tmp_path / "trace", ROWS[:1])
    assert data == written(tmp_path / "other", ROWS[:1])


FOREIGN = ["a note", "a note\n", "\x89PNG\r\n\x1a\n\0\0", "[1, 2]\n", "{}\n", '{"format": 1}\n',
           "null\n", "\n", " ",
           '{"format": "hogwild-evaluation-2", "seed": 1}\n', '{"format": "hogwild-trace-1"}\n',
           "[" * 10**5,
           '{"seed": 1, "format": "hogwild-trace-2"}\n', '{"format": "hogwild-trace-2"} x\n',
           '{"format": "hogwild-trace-2", "a": ' + "[" * 10**5 + "\n",
           '{"format": "hogwild-trace-2"}\nmore of a note\n', '{"format": "hogwild-trace-2"\r\n',
           "\x1b[2J\n"]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_files_of_others_are_refused_and_unchanged(place, text, encoding):
    """Notes, pictures, lists, other kinds of journals, other encodings. Only an empty file is ours."""
    place.write_bytes(text.encode(encoding))
    assert "name another file" in refusal(place)
    place.write_bytes(b"")
    assert written(place).startswith(b'{"format": "hogwild-trace-2"')


@check()
@given(data=st.binary(min_size=1, max_size=40))
def test_any_bytes_are_refused(place, data):
    """Whatever does not begin like a trace."""
    place.write_bytes(data)
    if not b'{"format": "hogwild-trace-2"'.startswith(data):
        assert "is no trace that this program wrote" in refusal(place)


ANYTHING = st.one_of(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                 lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3),
                                                                               inside, max_size=3)),
    st.sampled_from([10**400, -10**30, math.nan, math.inf, "\x1b[2J\r\n\x85\u2028", {}, [], [[]],
                     {"": {}}]))


def places(value, path=()):
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value,
                                                                                          list) else ()
    return [path, *(place for key, one in inside for place in places(one, (*path, key)))]


@check(max_examples=400)
@given(data=st.data(), other=ANYTHING, how=st.sampled_from(["replace", "remove", "add", "nest"]))
def test_edited_lines_are_refused_or_have_the_same_shape(place, data, other, how):
    """Types changed, keys removed, things added or nested, in any line: one sentence, or rows of that
    shape."""
    lines = json.loads(json.dumps([{"format": "hogwild-trace-2", **HEADER}, *ROWS]))
    *way, last = data.draw(st.sampled_from([path for path in places(lines) if path]))
    target = lines
    for key in way:
        target = target[key]
    if how == "remove" and len(lines) > 1:
        del target[last]
    elif how == "add" and isinstance(target, dict):
        target[data.draw(st.text(max_size=3))] = other
    else:
        target[last] = [target[last]] if how == "nest" else other
    place.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode())
    try:
        with opened(place) as trace:
            rows = trace.rows
    except ValueError:
        assert refusal(place)
    else:
        assert all(map(of_a_trace, rows)) and len(rows) == len(lines) - 1


def of_a_trace(row):
    """Is this a row of a trace? Spelled out, beside journal.matches."""
    def number(value):
        return type(value) is int

    def texts(value):
        return type(value) is dict and all(type(one) is str for one in value.values())
    if "ending" in row and "answer" in row:
        return type(row["ending"]) is str is type(row["answer"])
    if "prompt" in row and "weights" in row:
        return (type(row["prompt"]) is str is type(row["weights"]) and texts(row["opening"])
                and type(row["moves"]) is bool and number(row["context"]))
    return (all(type(ids) is list and all(map(number, ids)) for ids in row["fed"].values())
            and all(map(number, row["sampled"].values())) and texts(row["text"])
            and number(row["in_view"])
            and all(type(event) is list and all(type(word) is str for word in event)
                    for event in row["events"])
            and type(row["seconds"]) in (int, float)
            and all(number(one["step"]) and texts({key: one[key]
                                                   for key in ("worker", "text", "opened")})
                    for one in row["closed"]))


@check()
@given(at=st.integers(0, 10**4), byte=st.integers(0, 255), how=st.sampled_from(["change", "insert",
                                                                                "remove"]))
def test_changed_bytes_are_refused_or_read(place, at, byte, how):
    """One byte changed, inserted or removed anywhere: a sentence, or rows of the same shape."""
    place.unlink(missing_ok=True)
    data = written(place)
    at %= len(data)
    place.write_bytes(data[:at] + bytes([byte] * (how != "remove")) + data[at + (how != "insert"):])
    try:
        with opened(place) as trace:
            assert all(map(of_a_trace, trace.rows))
    except ValueError:
        assert refusal(place)


@pytest.mark.parametrize("theirs, words", [
    ({**HEADER, "seed": 2}, "holds work with seed 2, not 1"),
    ({**HEADER, "more": [1]}, "holds work with more [1], not None"),
    ({"problem": "x", "seed": 1}, "problem 'x', not '3 + 4"),
    ({**HEADER, "problem": "\x1b[2J" * 300}, "problem '"),
    ({**HEADER, "\x1b[2J\n": 1}, "holds work with"), ({**HEADER, "x": "\x9b2J"}, "holds work with x"),
    ({**HEADER, "seed": math.nan}, "seed nan"), ({**HEADER, "seed": 10**30}, "seed 1000")])
def test_other_headers_are_refused(tmp_path, theirs, words):
    """The difference is named, without control characters; keys that may differ do."""
    written(tmp_path / "trace", ROWS[:1], theirs)
    assert words in refusal(tmp_path / "trace")
    with opened(tmp_path / "trace", may_differ={*theirs, *HEADER}) as trace:
        assert trace.rows == ROWS[:1]


# ------------------------------------------------------------------------------ who else may be there

WRITER = """
from appendix import journal
with journal.Journal("PATH", "trace", {"seed": 1}, {}) as trace:
    print("open", flush=True)
    input()
    trace.add({"b": 1})
"""


def test_a_file_has_one_writer(tmp_path):
    """Another process, or the same one, is told so; when the first has ended, the file is free."""
    code = WRITER.replace("PATH", str(tmp_path / "trace"))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True,
                               cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert process.stdout.readline() == "open\n"
    assert "another process writes to" in refusal(tmp_path / "trace")
    process.communicate("\n")
    assert process.returncode == 0 and (tmp_path / "trace").read_text().count("\n") == 2
    with journal.Journal(tmp_path / "trace", "trace", {"seed": 1}, {}) as trace:
        assert trace.rows == [{"b": 1}]
        assert "another process" in refusal(tmp_path / "trace")


def test_what_is_not_a_file_is_refused(tmp_path):
    """Links, also to nowhere, folders, devices, pipes, places that are not there: one sentence, nothing
    is made."""
    (tmp_path / "notes").write_text("")
    for name, target in (("link", "notes"), ("dangling", "nothing"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("link", "it is a link"), ("dangling", "it is a link"),
                        ("loop", "it is a link"), (".", "irectory"),
                        ("pipe", "not a file"), ("/dev/null", "not a file"),
                        ("no/folder", "No such file"),
                        ("notes/below", "Not a directory"), ("a\0b", "null"), ("x" * 300, "too long")):
        with pytest.raises(ValueError, match=words) as caught:
            opened(tmp_path / name)
        assert str(caught.value).isprintable()
    assert (tmp_path / "notes").read_text() == "" and not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="cannot be read"):
        journal.read(tmp_path / "nothing", "trace", {})


# ---------------------------------------------------------------------------------------- a full disk

class Disk:
    """os.write of a disk with so much room; what does not fit is written in part."""

    def __init__(self, monkeypatch, path, room, some):
        self.write, self.path, self.room, self.some = os.write, path, room, some
        monkeypatch.setattr(os, "write", self)

    def __call__(self, file, data):
        used = self.path.stat().st_size
        fits = max(0, self.room - used)
        # As the system does: a part of it, and the error comes with the next call.
        if fits and self.some:
            return self.write(file, data[:fits])
        if len(data) > fits:
            self.write(file, data[:fits])
            raise OSError(28, "No space left on device")
        return self.write(file, data)


def whole_lines(path):
    """The rows of a file that must consist of whole lines."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[1:-1]]


@check(max_examples=60)
@given(room=st.integers(0, 300), later=st.integers(0, 5), some=st.booleans(), durable=st.booleans())
def test_a_full_disk_delays_rows(tmp_path_factory, room, later, some, durable):
    """They come when there is room again, in order; the file is whole lines at every moment; it is said
    once."""
    path = tmp_path_factory.mktemp("full") / "trace"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(words))
        with opened(path, durable=durable) as trace:
            disk = Disk(patch, path, path.stat().st_size + room, some)
            for number, row in enumerate(ROWS):
                if number == later:
                    disk.room = 10**9
                trace.add(row)
                rows = whole_lines(path)
                assert rows == ROWS[:len(rows)] and trace.rows == ROWS[:number + 1]
                if number >= later:
                    assert len(rows) == number + 1
        lost = len(ROWS) - len(whole_lines(path))
    assert len(said) <= 1 + (lost > 0)
    assert not lost or f"the last {lost} lines could not be" in said[-1][0]
    assert bool(said) >= (room < 100 and later > 0)
    with opened(path) as trace:
        assert trace.rows == ROWS[:len(ROWS) - lost]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"),
                                   OSError(28, "No space left on device")])
def test_a_row_that_does_not_reach_the_disk_comes_again(tmp_path, monkeypatch, error, capsys):
    """Where rows are to be durable, fsync has a say, too."""
    def fail(_):
        raise error
    with opened(tmp_path / "trace", durable=True) as trace:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            trace.add(ROWS[0])
            trace.add(ROWS[1])
            assert whole_lines(tmp_path / "trace") == []
        trace.add(ROWS[2])
        assert whole_lines(tmp_path / "trace") == ROWS[:3]
    assert capsys.readouterr().err.count(error.strerror) == 1


@pytest.mark.parametrize("some", [True, False])
def test_without_room_for_a_header_nothing_begins(tmp_path, monkeypatch, capsys, some):
    """One sentence, before a model is loaded; and the file can be used when there is room."""
    Disk(monkeypatch, tmp_path / "trace", 20, some)
    with pytest.raises(ValueError, match="cannot be written: .*No space left on device"):
        opened(tmp_path / "trace")
    assert not capsys.readouterr().err and (tmp_path / "trace").read_bytes() == b""
    monkeypatch.undo()
    assert written(tmp_path / "trace").count(b"\n") == 1 + len(ROWS)


# ---------------------------------------------------------------------------------- pictures and shapes

def test_pictures_of_others_stay(tmp_path):
    """New, or one of ours; not another file, an empty one, a link, a folder, a place that is not
    there."""
    (tmp_path / "ours").write_bytes(b"\x89PNG and more")
    (tmp_path / "notes").write_text("a note")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("ours", "new"):
        journal.own_picture(str(tmp_path / name), b"\x89PNG")
    for name in ("notes", "empty", "link", "dangling", ".", "no/picture", "notes/below", "a\0b"):
        with pytest.raises(ValueError) as caught:
            journal.own_picture(str(tmp_path / name), b"\x89PNG")
        assert str(caught.value).isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "notes", "empty", "link", "dangling"}
    assert (tmp_path / "notes").read_text() == "a note"


SHAPES = st.recursive(
    st.sampled_from([int, float, str, bool, None]),
    lambda inside: st.lists(inside, min_size=1, max_size=1) | st.dictionaries(st.just(str), inside,
                                                                              min_size=1)
    | st.dictionaries(st.text(max_size=3), inside, max_size=3) | st.tuples(inside, inside), max_leaves=6)


def fitting(shape):
    """A strategy for JSON values of a shape."""
    if isinstance(shape, tuple):
        return st.one_of(*map(fitting, shape))
    if isinstance(shape, list):
        return st.lists(fitting(shape[0]), max_size=3)
    if isinstance(shape, dict):
        if str in shape:
            return st.dictionaries(st.text(max_size=3), fitting(shape[str]), max_size=3)
        return st.fixed_dictionaries({key: fitting(one) for key, one in shape.items()},
                                     optional={"extra": st.integers()} if "extra" not in shape else {})
    simple = {int: st.integers(), float: st.floats() | st.integers(), str: st.text(),
              bool: st.booleans()}
    return simple[shape] if shape else st.none()


@check()
@given(data=st.data(), shape=SHAPES)
def test_values_of_a_shape_match(data, shape):
    """Whatever is made after a shape has it; also after a way through JSON."""
    value = data.draw(fitting(shape))
    assert journal.matches(value, shape) and journal.matches(json.loads(json.dumps(value)), shape)


@pytest.mark.parametrize("value, shape", [
    (True, int), (False, float), (1, bool), (1.0, int), ("1", int), (1, str), (None, str), (0, None),
    (False, None),
    ([1, "x"], [int]), ({"a": 1}, [int]), ([], {}), ([], {str: int}), ({"a": 1, "b": "x"}, {str: int}),
    ({}, {"a": int}), ({"a": None}, {"a": int}), ({"a": {"b": [1, True]}}, {"a": {"b": [int]}}),
    ("x", (int, None)),
    ([[1], 2], [[int]]), ("ab", [str]), (1, {}), ({"a": 1}, ({"a": str}, {"b": int})), ("1.0", float)])
def test_values_of_another_shape_do_not_match(value, shape):
    """Also those that Python would take for it."""
    assert not journal.matches(value, shape)
