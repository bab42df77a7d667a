"""The study page in real Chromium: quiet, filtering, usable by keyboard and by ear, hostile names as text.

`one` and `all` in scripts are the page's own: an element by its id, elements by a selector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.report.page import STYLE
from bitsmith.report.study_json import Study, read_study
from bitsmith.report.study_page import PAGE_ROWS, write_study_page
from chromium import read_png
from chromium_tab import Browser, Tab
from study_everything import HOSTILE, everything

SHOWN = "&lt;/script&gt;&lt;img src=x onerror=console.error"
PLOTS = ("pareto-0", "pareto-1", "layers", "components", "allocation", "spectra")
STATE = """(() => {
const drawn = id => one(id).data.flatMap(t => t.ids ?? []).length;
const count = s => document.querySelectorAll(s).length, rows = id => count(`#${id} tbody tr`);
const bars = one("components").data.length;
return [drawn("pareto-0"), drawn("pareto-1"), bars, rows("component-table"), rows("gates"), count("tr.out"),
  count(".sample:not([hidden]) article:not([hidden])"), one("status").textContent]; })()"""
EVERYTHING = [3, 4, 3, 9, 4, 0, 4, "4 of 4 artifacts shown"]
CENTRE = "(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
CENTRE += " return [r.x + r.width * {x}, r.y + r.height * {y}]; }})({element})"
FOCUS = """window.seen = []; addEventListener('focusin', e => { const s = getComputedStyle(e.target);
  seen.push([e.target, s.outlineStyle === 'solid' && parseFloat(s.outlineWidth) >= 2]); }); 0"""
CONTRASTS = """(() => {
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = c => {
  const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] === 1) return c.slice(0, 3); } return null; };
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !e.checkVisibility()) continue;
  if (e.closest("script, style, .heatmaplayer, .hoverlayer, .notifier-note")) continue;
  const style = getComputedStyle(e), ink = rgb(e.closest("svg") ? style.fill : style.color);
  const paper = behind(e);
  const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  if (ratio < 4.5 || style.opacity < 1)
    found.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 30), ratio]);
}
return found; })()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_page(tmp_path_factory.mktemp("page") / "study.html", read_study(everything()))


@pytest.fixture(scope="module")
def shared(browser: Browser, page: Path) -> Iterator[Tab]:
    tab = browser.open(page)
    yield tab
    tab.close()


@pytest.fixture
def tab(shared: Tab) -> Iterator[Tab]:
    """The page as it was opened; what a test did is undone by the page's own controls."""
    yield shared
    shared.do("one('everything').click()")
    shared.do("document.querySelectorAll('select[data-redraws]').forEach(e => {"
              " for (const o of e.options) o.selected = o.defaultSelected;"
              " e.dispatchEvent(new Event('change')); })")  # fmt: skip
    shared.do("document.querySelectorAll('[data-filters]').forEach(e => { e.value = '';"
              " e.dispatchEvent(new Event('input')); })")  # fmt: skip
    shared.prefer({"prefers-color-scheme": "light"})
    assert shared.console == []
    assert shared.requests == []


def centre(tab: Tab, element: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    at_x, at_y = tab.do(CENTRE.format(element=element, x=x, y=y))
    return at_x, at_y


def chosen(tab: Tab, element: str, value: str) -> None:
    events = "for (const name of ['input', 'change']) e.dispatchEvent(new Event(name));"
    tab.do(f"(e => {{ e.value = {value!r}; {events} }})({element})")


def test_a_real_click_on_a_point_or_a_bar_filters_everything_and_back(tab: Tab) -> None:
    assert tab.do(STATE) == EVERYTHING
    tab.click(*centre(tab, "document.querySelectorAll('#pareto-1 .points path')[2]"))
    assert tab.do(STATE) == [1, 1, 1, 3, 2, 3, 2, "1 of 4 artifacts shown"]
    assert tab.do("document.querySelector('tr.chosen').cells[0].textContent") == "four"
    tab.do("one('everything').click()")
    assert tab.do(STATE) == EVERYTHING
    tab.click(*centre(tab, "document.querySelectorAll('#components .bars .point path')[6]"))
    assert tab.do("document.querySelector('tr.chosen').cells[0].textContent") == "svd"
    tab.do("one('everything').click()")
    tab.click(*centre(tab, "document.querySelector('.group[data-group=\"1\"]')"))
    assert tab.do(STATE) == [1, 1, 1, 3, 1, 3, 1, "1 of 4 artifacts shown"]
    pressed = "all('.group').map(b => b.getAttribute('aria-pressed'))"
    assert tab.do(pressed) == ["false", "true", "false", "false"]


def test_a_click_on_a_cell_lists_its_tensors_and_on_a_line_its_matrix(tab: Tab) -> None:
    chosen(tab, "one('map-artifact')", "2")
    tab.click(*centre(tab, "document.querySelector('#allocation .hm image')", 1 / 6, 5 / 6))
    rows = "all('#tensors tbody tr').map(r => [...r.cells].slice(0, 4).map(c => c.textContent))"
    assert tab.do(rows) == [["four", "model.layers.2.mlp.up_proj.weight", "ffn.up", "2"]]
    assert tab.do("one('tensors-box').open") is True
    assert tab.do("one('tensors-count').textContent") == "1 of 27 lines"
    chosen(tab, "one('spectrum-what')", "α of the tail of σ²")
    assert tab.do("one('spectra').data.flatMap(t => t.y)") == [3.5]
    tab.click(*centre(tab, "document.querySelector('#spectra .points path')"))
    assert tab.do("one('spectrum-table').tBodies[0].rows.length") == 1


def test_tables_are_searched_filtered_and_sorted(tab: Tab) -> None:
    shown = "one('gates').tBodies[0].rows.length"
    chosen(tab, "document.querySelector('input[data-filters=gates]')", "COSINE")
    assert tab.do(shown) == 2
    assert tab.do("one('gates-count').textContent") == "2 of 4 lines"
    chosen(tab, "document.querySelector('input[data-filters=gates]')", "")
    chosen(tab, "document.querySelector('select[data-filters=gates]')", "FAIL")
    assert tab.do(shown) == 1
    sort = "all('#artifacts th button').find(b => b.textContent === 'bytes')"
    order = "[...one('artifacts').tBodies[0].rows].map(r => r.dataset.row)"
    tab.do(f"{sort}.click()")
    assert tab.do(order) == ["3", "2", "1", "0"]
    tab.do(f"{sort}.click()")
    assert tab.do(order) == ["0", "1", "2", "3"]
    assert tab.do(f"{sort}.parentElement.getAttribute('aria-sort')") == "descending"
    chosen(tab, "one('pareto-x')", "bpw")
    assert tab.do("one('pareto-0').layout.xaxis.title.text") == "bits per weight"


def test_keys_reach_everything_in_order_with_a_visible_focus_and_work(tab: Tab) -> None:
    tab.do("document.body.tabIndex = -1, document.body.focus(), document.body.removeAttribute('tabindex')")
    tab.do("scrollTo(0, 0)")
    tab.do(FOCUS)
    tab.press("Tab")
    assert tab.do("document.activeElement.className") == "skip"
    while not tab.do("document.activeElement.contains(one('facts-0'))") or (
        tab.do("document.activeElement === document.body")
    ):
        tab.press("Tab")
        assert tab.do("seen.length") < 400
    assert tab.do("seen.every(([e, seen]) => seen)"), "a focus is not seen"
    assert tab.do("seen.every(([e], i) => !i || seen[i - 1][0].compareDocumentPosition(e) & 4)"), (
        "out of order"
    )
    missed = "all('#filter button:enabled, .pick, select, input, th button, summary, .copy')"
    missed += ".filter(e => !e.closest('.facts'))"
    assert (
        tab.do(
            f"{missed}.filter(e => e.checkVisibility() && !seen.some(([s]) => s === e)).map(e => e.outerHTML)"
        )
        == []
    )
    tab.press("Shift+Tab")
    assert tab.do("document.activeElement.tagName") == "SUMMARY"
    for control, key, found in (
        (".group[data-group='2']", " ", "1 of 4 artifacts shown"),
        ("#everything", "Enter", "4 of 4 artifacts shown"),
        ("tr[data-row='3'] .pick", "Enter", "1 of 4 artifacts shown"),
        ("tr[data-row='2'] .pick", " ", "2 of 4 artifacts shown"),
    ):
        tab.do(f'document.querySelector("{control}").focus()')
        tab.press(key)
        assert tab.do("one('status').textContent") == found
    tab.do("document.querySelector('#gates th button').focus()")
    tab.press("Enter", " ")
    assert tab.do("document.querySelector('#gates th').getAttribute('aria-sort')") == "descending"


def test_the_page_can_be_heard(tab: Tab) -> None:
    assert tab.do("[document.documentElement.lang, document.title.startsWith('Study ')]") == ["en", True]
    for landmark in ("header", "nav[aria-label]", "main#main", "footer", "a.skip[href='#main']", "h1"):
        assert tab.do(f'document.querySelectorAll("{landmark}").length') == 1, landmark
    levels = tab.do("all('h1, h2, h3, h4').map(h => Number(h.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert tab.do("all('section').every(s => one(s.getAttribute('aria-labelledby')))")
    assert tab.do("all('table').every(t => t.caption.textContent && t.querySelector('th[scope=col]')"
                  " && [...t.tBodies[0].rows].every(r => r.cells[0].scope === 'row'))")  # fmt: skip
    unnamed = "all('select, input, .figure, .wide, pre[tabindex]')"
    unnamed += ".filter(e => !e.labels?.length && !e.getAttribute('aria-label')).length"
    assert tab.do(unnamed) == 0
    says = {plot: str(tab.do(f"one('{plot}-says').textContent")) for plot in PLOTS}
    assert "least 0.01" in says["pareto-0"]
    assert "On the front, smallest first: svd, four" in says["pareto-0"]
    assert "Points of others" in says["pareto-0"]
    assert "most 0.98 (svd" in says["layers"]
    assert "most 0.98 (svd, " in says["components"]
    assert "9 figures" in says["allocation"]
    assert all(tab.do(f"one('{plot}').getAttribute('aria-describedby')") == f"{plot}-says" for plot in PLOTS)
    assert tab.do("document.querySelectorAll('#layer-table tbody tr').length") == 9
    tab.do("document.querySelector('.group').click()")
    assert tab.do("one('status').getAttribute('role')") == "status"
    assert "Points" in tab.do("one('pareto-0-says').textContent")


def test_hostile_text_stays_text(tab: Tab, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not set("\x1b\u202e") & set(text)
    assert "49" not in text[text.rindex("<h1>") : text.index("</h1>", text.rindex("<h1>"))]
    assert tab.do("document.querySelectorAll('body img, body b').length") == 0
    body = str(tab.do("document.body.outerHTML"))
    assert body.count(SHOWN) > 30
    for part in (
        "artifacts",
        "gates",
        "tasks",
        "claims",
        "spectrum-table",
        "component-table",
        "peers",
        "layer-table",
    ):
        assert "</script><img" in tab.do(f"one('{part}').textContent"), part
    assert "</script><img" in tab.do("document.querySelector('article pre').textContent")
    tab.do("document.querySelectorAll('.group')[1].click()")
    chosen(tab, "document.querySelector('input[data-filters=gates]')", "onerror")
    assert tab.do("document.querySelectorAll('body img, body b').length") == 0


def test_commands_are_copied(tab: Tab) -> None:
    tab.click(*centre(tab, "document.querySelector('.copy')"))
    tab.do("new Promise(done => setTimeout(done, 200))")
    assert tab.do("one('copied').textContent") == "Copied: 1 command"
    tab.do("document.querySelector('input[data-filters=gates]').focus()")
    tab.call(
        "Input.dispatchKeyEvent", type="rawKeyDown", key="v", code="KeyV", modifiers=2, commands=["paste"]
    )
    assert tab.do("document.querySelector('input[data-filters=gates]').value") == "bitsmith study x.yaml"


def test_colours_follow_the_system_and_the_button(tab: Tab) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 31)"
    assert tab.do(paper) == light
    tab.prefer({"prefers-color-scheme": "dark"})
    assert tab.do(paper) == dark
    assert tab.do("one('theme').getAttribute('aria-pressed')") == "true"
    tab.do("one('theme').click()")
    assert tab.do(paper) == light
    tab.prefer({"prefers-color-scheme": "light"})
    tab.do("one('theme').click()")
    assert tab.do(paper) == dark
    assert tab.do("one('theme').getAttribute('aria-pressed')") == "true"
    tab.do("delete document.documentElement.dataset.theme")


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_stands_out_in_both_modes_by_the_style(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    assert STYLE.strip() in style
    for mode in (0, 1):
        colours = {name: luminance(both[mode]) for name, *both in found}
        for name, least in (
            ("ink", 7),
            ("note", 4.5),
            ("accent", 4.5),
            ("pass", 4.5),
            ("fail", 4.5),
            ("edge", 3),
        ):
            for paper in ("paper", "panel"):
                high, low = sorted((colours[name], colours[paper]), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, (name, paper, mode)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_as_drawn(tab: Tab, mode: str) -> None:
    tab.prefer({"prefers-color-scheme": mode})
    tab.do("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    tab.do("document.querySelector('.group').click()")
    assert tab.do(CONTRASTS) == []
    tab.do("document.querySelectorAll('details').forEach(d => { d.open = false; })")


def test_motion_is_reduced_and_print_shows_everything(tab: Tab) -> None:
    tab.do("document.body.style.transition = 'color 1s'")
    lasts = "getComputedStyle(document.body).transitionDuration"
    assert tab.do(lasts) == "1s"
    tab.prefer({"prefers-reduced-motion": "reduce"})
    assert tab.do(lasts) == "0s"
    tab.do("document.body.style.transition = ''")
    tab.prefer({"prefers-color-scheme": "dark"}, "print")
    assert tab.do("one('filter').checkVisibility()") is False
    assert tab.do("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.do("dispatchEvent(new Event('beforeprint'))")
    assert tab.do("document.querySelectorAll('details:not([open])').length") == 0
    tab.do("dispatchEvent(new Event('afterprint'))")
    assert tab.do("document.querySelectorAll('details[open]').length") == 0
    assert len(tab.call("Page.printToPDF")["data"]) > 10_000


def test_a_phone_scrolls_one_way(browser: Browser, page: Path) -> None:
    tab = browser.open(page, size=(390, 800), mobile=True)
    tab.do("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for width in (390, 320):
        tab.resize(width, 800)
        assert tab.do("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert tab.console == []
    tab.close()


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_everything_is_drawn(tab: Tab, tmp_path: Path, dark: bool) -> None:
    tab.prefer({"prefers-color-scheme": "dark" if dark else "light"})
    count = "(s => document.querySelectorAll(s).length)"
    for plot in PLOTS:
        assert tab.do(f"{count}('#{plot}.js-plotly-plot svg.main-svg[aria-hidden]')") >= 1, plot
    assert tab.do(f"{count}('.trace.scatter')") >= 9
    assert tab.do(f"{count}('.trace.bars')") == 3
    assert tab.do(f"{count}('#allocation .hm')") == 1
    assert tab.do(f"{count}('.errorbar')") >= 6
    assert tab.do(f"{count}('.modebar-btn')") > 0
    assert tab.do(f"{count}('[data-title*=loud], [data-title*=hart]')") == 0, "a button sends figures away"
    pixels = read_png(tab.screenshot(tmp_path / "page.png", whole=True))
    background = pixels[2, 2].astype(int)
    assert background.sum() < 100 if dark else background.sum() > 700
    bands = [np.abs(band.astype(int) - background).max() for band in np.array_split(pixels, 16)]
    assert min(bands) > 60, "a stretch of the page is empty"


def test_an_empty_study_makes_a_page_too(browser: Browser, tmp_path: Path) -> None:
    tab = browser.open(write_study_page(tmp_path / "e.html", Study(bitsmith="0", title="empty")))
    assert tab.console == []
    assert "How to repeat it" in tab.do("document.body.textContent")
    tab.close()


def large(lines: int, tensors: int, artifacts: int) -> dict[str, Any]:
    """A study with many gate lines, and tensors in many artifacts."""
    gates = [
        {"when": f"2026-01-01T00:00:{n % 60:02}Z", "who": "gate", "what": f"matter {n}",
         "value": float(lines - n), "limit": 1.0, "outcome": "FAIL" if n % 7 == 0 else "PASS",
         "artifact": f"a{n % artifacts}",
         "gate": "total error", "decision": "kept" if n % 7 else "replanned by row-int4",
         "evidence": {"matrix": n, "seen": [0.1 * n] * 4}}
        for n in range(lines)
    ]  # fmt: skip
    listed = [
        {"name": f"model.layers.{n // 12}.part{n % 12}.weight", "role": f"role{n % 12}", "layer": n // 12,
         "shape": [512, 512], "type": "Q4_K", "nbytes": 147_456, "squared_error": 0.01 + n / 1e5}
        for n in range(tensors)
    ]  # fmt: skip
    rows = [
        {"name": f"a{at}", "group": f"g{at % 3}", "file_bytes": 10**6 * (at + 1), "tensors": listed,
         "measures": {"mean_kld": {"value": 1 / (at + 1), "unit": "nats"}}}
        for at in range(artifacts)
    ]  # fmt: skip
    return {"bitsmith": "0", "title": "large", "artifacts": rows, "gates": gates}


def test_long_tables_are_turned_searched_and_sorted_as_a_whole(browser: Browser, tmp_path: Path) -> None:
    tab = browser.open(write_study_page(tmp_path / "l.html", read_study(large(250, 30, 2))))
    first = "one('gates').tBodies[0].rows[0].cells[4].textContent"
    lines = "one('gates-lines').textContent"
    assert tab.do(lines) == f"lines 1 to {PAGE_ROWS} of 250"
    for said in (f"lines {PAGE_ROWS + 1} to {2 * PAGE_ROWS} of 250", "lines 201 to 250 of 250"):
        tab.do("document.querySelector('#gates-pager [data-turns=\"1\"]').click()")
        assert tab.do(lines) == said
    assert tab.do("document.querySelector('#gates-pager [data-turns=\"1\"]').disabled") is True
    value = "all('#gates th button').find(b => b.textContent === 'value')"
    tab.do(f"{value}.click()")
    tab.do("document.querySelector('#gates-pager [data-turns=\"-1\"]').click()")
    tab.do("document.querySelector('#gates-pager [data-turns=\"-1\"]').click()")
    assert tab.do(first) == "matter 249"
    chosen(tab, "document.querySelector('input[data-filters=gates]')", "matter 248")
    assert tab.do(first) == "matter 248"
    assert tab.do(lines) == "lines 1 to 1 of 1"
    assert tab.console == []
    tab.close()


@pytest.mark.slow
def test_a_study_of_20000_gate_lines_and_4000_tensors_stays_usable(browser: Browser, tmp_path: Path) -> None:
    path = write_study_page(tmp_path / "l.html", read_study(large(20_000, 400, 10)))
    tab = browser.open(path)
    assert path.stat().st_size < 16_000_000
    assert tab.do("document.querySelectorAll('*').length") < 20_000
    chosen(tab, "document.querySelector('input[data-filters=gates]')", "matter 19999")
    assert tab.do("one('gates').tBodies[0].rows.length") == 1
    assert tab.console == []
    tab.close()


def test_the_hostile_string_is_hostile() -> None:
    assert HOSTILE.startswith("</script><img")
