"""appendix/player.html in a real browser (Debian's packages chromium and chromium-driver, and selenium),
against chapter 3's tables as chapter 6's loop filled them; and, without one, what stands in its file."""
import json
import os
import random
import re
import shutil
import time
from importlib import import_module
from itertools import accumulate

import pytest
import torch
from conftest import ROOT
from helpers import PROBLEM, SHORT, random_model, tokenizer

from appendix import guests, journal, protocol, recording, screen

generate = import_module("06_generate")
layouts = import_module("03_layouts")
shared_cache = import_module("02_shared_cache")
PLAYER = ROOT / "appendix" / "player.html"
WRITE = ["A: 3 + 4 = 7. A=7.\n\n", "It is easy.\n\n", "B: 12 is more than 5.\n\n",
         "So \\boxed{7, {12}}.\n\n"]


# ------------------------------------------------------------------------------------- without a browser

def test_the_page_of_a_run_is_what_is_written_today(tmp_path):
    """appendix/run.html: player.html as it is now, with the trace that is in there."""
    page = (ROOT / "appendix" / "run.html").read_text(encoding="utf-8")
    rows = json.loads(page.split('id="trace">')[1].split("</script>")[0])
    screen.write_page(str(tmp_path / "run.html"), rows)
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == page and len(rows) > 50


def test_the_page_is_small_and_needs_no_network():
    """600 lines of 105 columns; nothing is loaded, and a policy forbids it; no markup is made."""
    page = PLAYER.read_text()
    assert len(page.splitlines()) <= 600 and max(map(len, page.splitlines())) <= 105
    assert not re.search(r"https?:|src=(?!\"data:)|@import|url\(|fetch|XMLHttp|WebSocket|eval\(", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", page)
    assert "default-src 'none'" in page and "unsafe" not in page


def test_a_trace_is_put_into_the_page_as_data(tmp_path, capsys):
    """Nothing in it ends its element; what is somebody's is not overwritten; errors are one sentence."""
    trace, page = tmp_path / "run.jsonl", tmp_path / "run.html"
    rows = synthetic(2, 9, text="</script><!--<script>\u2028 é")
    trace.write_text(lines(rows))
    for _ in range(2):  # its own page is written again
        assert screen.main([str(trace), "--html", str(page)]) == 0
    data = page.read_text().split('id="trace">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data) == rows
    assert page.read_text().count("</script>") == PLAYER.read_text().count("</script>")
    mine = tmp_path / "mine.html"
    shutil.copy(PLAYER, mine)
    rows[2]["seconds"] = float("nan")
    trace.with_name("nan.jsonl").write_text(lines(rows))
    for bad in ([trace, "--html", mine], [trace, "--html", trace],
                [trace, "--html", tmp_path / "no" / "x"],
                [trace.with_name("nan.jsonl"), "--html", tmp_path / "new.html"]):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            screen.main([str(word) for word in bad])
    assert mine.read_text() == PLAYER.read_text() and not (tmp_path / "new.html").exists()
    capsys.readouterr()


# ----------------------------------------------------------------------------------------- what is shown

def lines(rows):
    """Rows as a file has them."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def synthetic(workers, passes, text=" is", layout="combined"):
    """The rows of a trace that no model wrote: each step has 20 passes, and begins with a claim."""
    names = protocol.NAMES[:workers]
    lengths = {"history": 90, "others": 9, "dots": 3, "own": 9}
    rows = [{"format": "hogwild-trace-2", "problem": "Why?", "workers": names, "layout": layout},
            {"prompt": "Why?", "opening": {name: f"\n\n**{name} [1]:** " for name in names},
             "moves": True, "context": 10**6, "weights": "", "lengths": lengths}]
    fresh, step = dict.fromkeys(names, True), dict.fromkeys(names, 1)
    for number in range(passes):
        record = {"fed": {name: [7] * (8 if fresh[name] else 1) for name in names}, "closed": [],
                  "sampled": dict.fromkeys(names, 7), "events": [], "in_view": 100, "seconds": 0.01,
                  "text": {name: "C:" if fresh[name] else text for name in names}}
        for w, name in enumerate(names):
            fresh[name] = (number + w) % 20 == 19
            if fresh[name]:
                step[name] += 1
                record["closed"].append({"worker": name, "step": step[name] - 1, "text": "",
                                         "opened": f"\n\n**{name} [{step[name]}]:** "})
        rows.append(record)
    return [*rows, {"ending": "passes", "answer": "because"}]


def record_run(layout, path, passes=70):
    """Play chapter 6's loop without a model; returns (run, what chapter 3's tables said in each pass).

    Of a pass: {reader: {(block, how often before): [offset, visible] for the reader's newest token}}.
    """
    seen, said = [], []

    def forward(model, cache, tables, ids, last):  # looks at the tables, and computes nothing
        rows = layouts.number_rows([view for view, _ in tables[0].writers], {})
        ends = accumulate(count for _, count in tables[0].writers)
        seen.append({})
        for (view, _), end in zip(tables[0].writers, ends):
            if len(view) > 1:  # (else it is a guest, who speaks)
                seen[-1][view[-1]] = {key: [int(tables[0].offset[rows[key], end - 1]),
                                            int(tables[0].visible[rows[key], end - 1])]
                                      for key in layouts.occurrences(view)}
        return torch.zeros(len(last), 1)

    settings = generate.Settings(workers=protocol.NAMES[:3], layout=layout, prompt=SHORT, check_every=30,
                                 max_passes=200)
    run = generate.Hogwild(random_model("llama"), tokenizer(), PROBLEM, settings, forward,
                           shared_cache.SharedCache([]))
    words = {name: [i for text in WRITE[k % 4:] + WRITE[:k % 4] for i in run.encode(text)]
             for k, name in enumerate(protocol.NAMES)}
    path.unlink(missing_ok=True)
    tables = []
    about = {"problem": PROBLEM, "layout": layout}
    with journal.Journal(str(path), "trace", about, screen.ROW) as trace:
        run = recording.resumed(run, trace)
        for number in range(passes):
            if number == 20:
                guests.say(run, "Eve", "Is it <b>7</b>?")
                guests.add(run, "Dave")
            if number == 40:
                guests.dismiss(run, "Bob")
            trace.add(run.advance([words[w.name][number % len(words[w.name])]
                                   for w in run.next_writers()]))
            names = {run.history: "history", **{block: word for word, block in run.separators.items()},
                     **{w.block: w.name for w in run.workers}}
            tables.append({names[own]: {(names[block], before): pair
                                        for (block, before), pair in view.items()}
                           for own, view in seen[-1].items()})
            said.append({w.name: w.text for w in run.workers})
    return tables, said


@pytest.fixture(scope="module")
def browser():
    """A page in Chromium, without a window."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (chromium and driver):
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for option in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1280,800",
                   "disable-background-networking", "disable-component-update", "no-first-run"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = selenium.Chrome(options, selenium.ChromeService(driver))
    yield page
    page.quit()


@pytest.fixture(autouse=True)
def no_complaints(request):
    """Whatever a test does in the browser, nothing is printed on its console."""
    yield
    if "browser" in request.fixturenames:
        assert request.getfixturevalue("browser").get_log("browser") == []


def opened(browser, path, text=None):
    """Open the player and give it a file, as a person would; returns what was refused, or ''."""
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if "player.html" not in browser.current_url:
        browser.get(PLAYER.as_uri())
    js(browser, "run = null; $('file').value = ''; $('refusal').hidden = true")
    browser.find_element("id", "file").send_keys(str(path))
    for _ in range(200):
        if js(browser, "return run !== null || !$('refusal').hidden"):
            break
        time.sleep(0.02)
    return js(browser, "return $('refusal').hidden ? '' : $('refusal').textContent")


def js(browser, script, *arguments):
    """What this script returns in the page."""
    return browser.execute_script(script, *arguments)


NAME = """const name = block => block === run.history ? 'history'
          : block.name ?? Object.keys(run.words).find(word => run.words[word] === block);"""


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_offset_is_the_one_of_the_tables(layout, browser, tmp_path):
    """Of all blocks, for all readers, in all passes, with guests; also if a trace lacks lengths."""
    path = tmp_path / "run.jsonl"
    tables, texts = record_run(layout, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for old in (True, False):
        start = {key: value for key, value in rows[1].items() if key != "lengths" or not old}
        assert opened(browser, path, lines([rows[0], start, *rows[2:]])) == ""
        shown = js(browser, NAME + """return run.passes.map((_, i) => Object.fromEntries(
            memoryIn(run, i + 1).map(({worker, places}) => [worker.name, places.map(
                one => [name(one.block), one.before, one.offset, one.visible])])))""")
        for number, (expected, found) in enumerate(zip(tables, shown, strict=True), start=1):
            assert {reader: {(name, before): pair for name, before, *pair in view}
                    for reader, view in found.items()} == expected, number
    look_at_pass(browser, tables, 33)
    for number, text in ((7, texts[6]), (70, texts[69])):
        js(browser, "show(arguments[0])", number)
        columns = js(browser, """return Object.fromEntries([...columns].map(
            ([worker, {text}]) => [worker.name, text.textContent]))""")
        if layout != "independent":
            assert columns.keys() == text.keys()
        for name in columns if rows[1]["moves"] else ():
            closed = next((one for one in rows[number + 1]["closed"] if one["worker"] == name), None)
            assert columns[name].strip() == (closed["text"] if closed else text[name]).strip()


def look_at_pass(browser, tables, number):
    """Point at the middle of every third block in the strips; the rows then say what chapter 3 says."""
    from selenium.webdriver import ActionChains
    js(browser, "$('reach').value = 'all'; show(arguments[0]); $('strips').scrollIntoView()", number)
    where = NAME + """
        const {views, row, scale} = strips, box = $('strips').getBoundingClientRect();
        return views.flatMap(({worker, places, total}, i) => places
            .filter(one => one.visible * scale > 3).map(one => [
                worker.name, name(one.block), one.before, box.x + width - 6
                - (total - one.place - Math.floor(one.visible / 2) - 0.5) * scale,
                box.y + i * row + row / 2, Math.floor(one.visible / 2)]))"""
    assert (count := len(js(browser, where))) >= 6
    for spot in range(0, count, 3):  # (rows that come may move what is below them)
        reader, block, before, x, y, slot = js(browser, where)[spot]
        actions = ActionChains(browser)
        actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        actions.perform()
        cells = js(browser, """return [...$('rows').rows].map(
            row => [...row.cells].map(td => td.textContent).concat(row.style.cssText.slice(8, -1)))""")
        marked = js(browser, "return document.querySelector('.reader').cells[0].textContent")
        assert marked == reader and [row[0] for row in cells] == list(tables[number - 1])
        picked = browser.find_element("id", "picked").text
        assert abs((found := int(re.search(r"slot (\d+)", picked)[1])) - slot) <= 1, (block, picked)
        for name, _, offset, visible, turn, distance, drawn in cells:
            assert drawn == turn.replace("°", "deg").replace("–", "0deg")
            view = tables[number - 1][name]
            if (block, before) not in view:
                assert (offset, visible, distance) == ("–", "0", "unseen")
                continue
            expected, own = view[block, before], view[name, 0][1]
            assert [int(offset), int(visible)] == expected
            assert int(distance) == own - 1 + expected[0] - found
            assert (int(turn[:-1]) - expected[0] * 0.01 * 57.29578 + 1) % 360 <= 2


def test_keys_buttons_and_the_slider(browser, tmp_path):
    """Step, scrub, jump, play to the end, stop by hand."""
    from selenium.webdriver.common.keys import Keys
    assert opened(browser, tmp_path / "run.jsonl", lines(synthetic(3, 45))) == ""
    body, now = browser.find_element("tag name", "body"), lambda: js(browser, "return pass")
    assert now() == 1
    for key, expected in ((Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_LEFT, 2),
                          (Keys.END, 46), (Keys.ARROW_RIGHT, 46), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0),
                          (Keys.SHIFT + Keys.ARROW_RIGHT, 19), (Keys.SHIFT + Keys.ARROW_RIGHT, 20),
                          (Keys.SHIFT + Keys.ARROW_LEFT, 19)):
        body.send_keys(key)
        assert now() == expected, key
    browser.find_element("id", "forth").click()
    assert now() == 20 and "pass 20 of 45" in browser.find_element("id", "where").text
    assert "60 tokens" in browser.find_element("id", "figures").text
    js(browser, "$('scrub').value = 30; $('scrub').oninput()")
    assert now() == 30
    assert [mark.text for mark in browser.find_elements("css selector", "#marks .claim")] == ["C"] * 6
    js(browser, "$('speed').value = '60'")
    body.send_keys(" ")
    assert browser.find_element("id", "play").text == "Pause"
    for _ in range(100):
        if now() == 46:
            break
        time.sleep(0.05)
    assert now() == 46 and browser.find_element("id", "play").text == "Play"
    assert "because" in browser.find_element("id", "marks").text
    js(browser, "$('speed').value = '2'")
    body.send_keys(" ")  # from the beginning again
    body.send_keys(Keys.ARROW_LEFT)
    assert now() < 40 and js(browser, "return playing") is None


def test_checks_claims_and_boxes_are_marked(browser, tmp_path):
    """Each where it stands in the text, and nothing else."""
    rows = synthetic(2, 30)
    rows[8]["text"]["Alice"] = " \\boxed{7}."
    for closed in sum((record["closed"] for record in rows[2:-1]), []):
        closed["opened"] += protocol.CHECK
    assert opened(browser, tmp_path / "run.jsonl", lines(rows)) == ""
    claims, box, checks = js(browser, """show(29); return ["claim", "box", "check"].map(name =>
        [...document.querySelectorAll(`.text .${name}`)].map(span => span.textContent).join(""))""")
    assert claims == "C:" * 4 and box == " \\boxed{7}." and checks.count(protocol.CHECK.strip()) == 2


def test_a_trace_can_be_dropped_on_the_page(browser, tmp_path):
    """And what is written in the pass that is shown is marked as new, in each column, and only there."""
    assert opened(browser, tmp_path / "run.jsonl", lines(synthetic(2, 25))) == ""
    js(browser, """run = null; const data = new DataTransfer();
        data.items.add(new File([arguments[0]], "run.jsonl"));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}))""",
       lines(synthetic(3, 25)))
    for _ in range(200):
        if js(browser, "return run !== null"):
            break
        time.sleep(0.02)
    for number in (4, 5):
        js(browser, "show(arguments[0])", number)
        fresh = js(browser, """return [...document.querySelectorAll('.new')].map(span => [
            owners.get(span)[0].author.name, spans.get(pieceOf({part: owners.get(span)[0],
            j: owners.get(span)[1]})) === span, span.textContent, span.nextSibling])""")
        assert fresh == [[name, True, " is", None] for name in protocol.NAMES[:3]]


def test_a_finished_step_moves_visibly(browser, tmp_path):
    """It flies from its column to the history; the token that was pointed at is the same one there."""
    assert opened(browser, tmp_path / "run.jsonl", lines(synthetic(2, 45))) == ""
    js(browser, "show(20); const part = run.workers[0].steps[0]; pointAt(part, 10)")
    place, distance = (f"return $('rows').rows[0].cells[{column}].textContent" for column in (1, 5))
    before = int(js(browser, distance))
    assert js(browser, "return kept(pick).block.name") == "Alice" and int(js(browser, place)) > 90
    start, end = js(browser, """show(21); const ghost = document.querySelector('.flying');
        const rect = () => ghost.getBoundingClientRect().x, before = rect();
        ghost.getAnimations()[0].finish(); return [before, rect()]""")
    assert start > end + 100  # the columns are on the right
    assert js(browser, "return kept(pick).block === run.history") and int(js(browser, place)) == 0
    assert int(js(browser, distance)) > before  # Bob's unfinished step stands between them now
    js(browser, "show(20)")
    assert int(js(browser, distance)) == before


EVIL = "</script><script>hacked=1</script><img src=x onerror=hacked=1>\u2028\u2029<svg/onload=hacked=1>"


def hostile():
    """Files that nobody should trust: {name: (text, a word of the refusal, or '': it is shown)}."""
    def changed(change):
        rows = json.loads(json.dumps(synthetic(2, 25)))
        change(rows)
        return lines(rows)
    good = lines(synthetic(2, 25))
    return {
        "evil text": (changed(lambda rows: [row["text"].update(Alice=EVIL) for row in rows[2:-1]]), ""),
        "evil prompt": (changed(lambda rows: rows[1].update(prompt=EVIL)), ""),
        "evil answer": (changed(lambda rows: rows[-1].update(answer=EVIL, ending=EVIL)), ""),
        "evil name": (good.replace("Alice", EVIL.replace('"', "")), ""),
        "prototype": (good.replace("Alice", "__proto__").replace("Bob", "constructor"), ""),
        "evil guest": (changed(lambda rows: rows[9].update(events=[["say", EVIL, EVIL]])), ""),
        "evil layout": (changed(lambda rows: rows[0].update(layout=EVIL)), "LAYOUTS"),
        "layout of the prototype": (changed(lambda rows: rows[0].update(layout="toString")), "LAYOUTS"),
        "torn": (good[:-20], ""), "not json": (good.replace('"fed"', "fed", 1), "not JSON"),
        "huge text": (changed(lambda rows: rows[5]["text"].update(Alice="x" * 3_000_000)), ""),
        "huge number": (changed(lambda rows: rows[5].update(in_view=10**30)), "Line 6"),
        "no text": (changed(lambda rows: rows[5].pop("text")), "Line 6"),
        "a list": (changed(lambda rows: rows.__setitem__(4, [1])), "Line 5"),
        "null": (changed(lambda rows: rows.__setitem__(1, None)), "Line 2"),
        "stranger": (changed(lambda rows: rows[5]["fed"].update(Mallory=[1])), "Mallory"),
        "crowd": (changed(lambda rows: rows[5].update(
            events=[["add", f"w{i}"] for i in range(70)])), "64"),
        "deep": ('{"format": "hogwild-trace-2", "x": ' + "[" * 200_000 + "\n", "JSON"),
        "empty": ("", "no trace"), "bytes": ("\0\ud800\xff", "no trace"),
        "no pass": (lines(synthetic(2, 0)), "no pass"),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_trace_is_text_or_is_refused(name, browser, tmp_path):
    """Nothing in it runs, becomes an element, or asks for the network; a refusal is one sentence."""
    text, word = hostile()[name]
    before = js(browser, "return document.querySelectorAll('script, img').length") if "player" in \
        browser.current_url else 2
    refusal = opened(browser, tmp_path / "evil.jsonl", text)
    assert word in refusal and bool(word) == bool(refusal) and len(refusal) < 200
    if not word:
        for number in (0, 5, 24, 26):
            js(browser, "show(arguments[0]); pointAt(run.workers[0].steps[0], 0)", number)
    assert js(browser, "return typeof hacked") == "undefined"
    assert js(browser, "return document.querySelectorAll('script, img').length") == before == 2
    assert js(browser, "return performance.getEntriesByType('resource').length") == 0
    if name == "evil text":
        assert EVIL in js(browser, "return $('history').textContent")


def test_an_embedded_trace_opens_by_itself(browser, tmp_path):
    """Also one that tries to leave its element."""
    (tmp_path / "run.jsonl").write_text(lines(synthetic(2, 25, text=EVIL)))
    screen.main([str(tmp_path / "run.jsonl"), "--html", str(tmp_path / "run.html")])
    browser.get((tmp_path / "run.html").as_uri() + "#24")
    assert js(browser, "return [pass, run.workers.length, typeof hacked]") == [24, 2, "undefined"]
    assert EVIL in browser.find_element("id", "history").get_property("textContent")


def test_dark_light_and_a_phone(browser, tmp_path):
    """The system's wish, the switch, and nothing wider than the screen."""
    assert opened(browser, tmp_path / "run.jsonl", lines(synthetic(4, 60))) == ""
    paper = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for wish in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": wish}]})
        colours.append(js(browser, paper))
    browser.find_element("id", "theme").click()
    assert js(browser, paper) == colours[0] != colours[1]
    js(browser, "document.documentElement.style.colorScheme = ''")
    for width, height in ((390, 844), (1280, 800), (1920, 1080)):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        js(browser, "show(41)")
        assert js(browser, "return document.documentElement.scrollWidth") <= width
        size = "return parseFloat(getComputedStyle(document.body).fontSize)"
        assert float(js(browser, "return $('strips').getContext('2d').font").split("px")[0]) == (
            pytest.approx(12.5 / 15 * js(browser, size), rel=0.01))  # it grows with all other text
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_sixteen_workers_and_4000_passes_stay_fluid(browser, tmp_path):
    """30 frames in a second while it plays, each with a pass that is new; any pass is there at once; the
    page does not grow. In seconds of the page's own thread, as other work may share this machine."""
    assert opened(browser, tmp_path / "run.jsonl", lines(synthetic(16, 4000))) == ""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def busy():
        metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(one["value"] for one in metrics if one["name"] == "TaskDuration")

    costs = [1]
    for first in range(1000, 4000, 500):
        if min(costs) <= 1 / 30:  # (other work on the machine makes it twice as slow, at times)
            break
        before = busy()
        js(browser, """show(arguments[0]); left = 20;
            const next = () => { show(pass + 1); if (--left) requestAnimationFrame(next); };
            requestAnimationFrame(next)""", first)
        while js(browser, "return left"):
            time.sleep(0.1)
        costs.append((busy() - before) / 20)  # seconds for a pass that is shown in a frame of its own
    print("milliseconds for a frame:", *(round(1e3 * cost, 1) for cost in costs[1:]))
    assert js(browser, "return document.querySelectorAll('*').length") < 16 * 400 + 40 * 30
    if min(costs) > 1 / 30 and os.getloadavg()[0] > os.cpu_count():
        pytest.skip(f"other work keeps this machine busy: {min(costs):.3f} seconds for a frame")
    assert min(costs) <= 1 / 30, costs
    before = busy()
    for k in range(9):
        js(browser, "show(arguments[0]); $('rows').offsetHeight", random.Random(k).randrange(4001))
    assert (busy() - before) / 9 < 0.1
