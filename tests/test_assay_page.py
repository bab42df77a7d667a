"""The pages in real Chromium: no console error, no request, plots drawn, hostile names shown as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitsmith.lab.demo import Demo
from bitsmith.report.assay_figures import ROLE_COLOURS, low_rank_against_int4
from bitsmith.report.assay_page import write_assay_page
from bitsmith.report.demo_report import write_demo_report
from bitsmith.report.page import Section, script_json, write_page
from bitsmith.run.assay import assay
from bitsmith.run.assay_result import Assay, Whitened
from bitsmith.run.evaluate import evaluate
from bitsmith.run.execute import compress
from chromium import Visit, read_png, visit

HOSTILE = (
    'a</script><script>console.error("ran")</script>.mlp.gate_proj.weight',
    '<img src=x onerror=console.error("ran")>.self_attn.q_proj.weight',
    "\x1b[31mred\u2028line\u202eback.mlp.up_proj.weight",
    '"><b>bold</b>&amp;%{x}$y$.mlp.down_proj.weight',
)
MAIN_PLOTS = 9
EACH_VIEW = """
const plots = [...document.querySelectorAll(".js-plotly-plot")];
const drawn = plot => plot.querySelectorAll(":is(.scatterlayer, .boxlayer, .barlayer) .trace").length;
(async () => { for (const plot of plots) for (const button of plot.layout.updatemenus?.[0]?.buttons ?? []) {
await Plotly.update(plot, ...button.args);
const wanted = plot.data.filter(trace => trace.visible).length;
console.log(`view ${plot.id} ${drawn(plot)} of ${wanted}: ${button.label}`); } })();
"""


def packed(pixels: np.ndarray) -> np.ndarray:
    """One integer 0xRRGGBB per pixel."""
    return pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)


def colours_shown(seen: Visit) -> dict[str, int]:
    """Pixels of exactly each of the plots' colours."""
    colours, counts = np.unique(packed(seen.pixels), return_counts=True)
    found = dict(zip(colours.tolist(), counts.tolist(), strict=True))
    return {colour: found.get(int(colour[1:], 16), 0) for colour in ROLE_COLOURS}


@pytest.fixture(scope="module")
def measured(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Assay:
    """A real assay of part of the demo model, with activations."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    chosen = r"layers\.[23]\.(self_attn|mlp)|lm_head"
    return assay(demo_model, match=chosen, text=text, resamples=10)


@pytest.fixture(scope="module")
def page(measured: Assay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assay_page(tmp_path_factory.mktemp("page") / "assay.html", measured)


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_assay_page_draws_its_plots_and_asks_for_nothing(page: Path, tmp_path: Path, dark: bool) -> None:
    seen = visit(page, tmp_path, dark=dark, size=(1280, 7500))
    assert seen.console == []
    assert seen.requests == []
    assert seen.dom.count('class="figure js-plotly-plot"') == MAIN_PLOTS
    assert seen.dom.count('class="trace scatter') >= 40
    assert seen.dom.count('class="trace boxes"') >= 4
    shown = colours_shown(seen)
    assert sum(count >= 100 for count in shown.values()) >= 8, shown
    background = seen.pixels[2, 2].astype(int)
    assert background.sum() < 100 if dark else background.sum() > 700
    assert len(np.unique(packed(seen.pixels))) > 1000
    bands = [np.abs(band.astype(int) - background).max() for band in np.array_split(seen.pixels[:5000], 25)]
    assert min(bands) > 60, "a stretch of the page is empty"


def test_the_page_says_what_was_found(page: Path, measured: Assay) -> None:
    text = page.read_text(encoding="utf-8")
    for line in (measured.verdict.text[1:], *measured.activations.verdicts):
        assert line.replace("'", "&#39;") in text
    for matrix in measured.matrices:
        assert matrix.name in text
    figures = json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', text)[1])
    assert len(figures) == MAIN_PLOTS
    assert len(text) < 8_000_000


def test_every_view_of_every_menu_draws_what_it_names(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / "views.html"
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{EACH_VIEW}</script></body>")
    )
    views = [line for line in visit(copy, tmp_path).console if "view " in line]
    counts = [re.search(r"view (\S+) (\d+) of (\d+)", line) for line in views]
    assert len(views) >= 20
    assert len({found[1] for found in counts}) >= 4
    for line, found in zip(views, counts, strict=True):
        assert int(found[2]) == int(found[3]) > 0, line


def test_what_the_inputs_weigh_is_shown_beside(measured: Assay, tmp_path: Path) -> None:
    """Data-aware results get views and a column of their own; here each matrix's plain ones stand in."""
    matrices = tuple(
        replace(m, whitened=Whitened("input diagonal", m.spectrum, m.rivals, m.verdict))
        for m in measured.matrices
    )
    with_inputs = low_rank_against_int4(replace(measured, matrices=matrices))
    plain = low_rank_against_int4(measured)
    labels = [button["label"] for button in with_inputs["layout"]["updatemenus"][0]["buttons"]]
    assert sum(name.endswith(", by the inputs") for name in labels) == len(labels) / 2
    assert len(with_inputs["data"]) == 2 * len(plain["data"])
    page = write_assay_page(tmp_path / "assay.html", replace(measured, matrices=matrices))
    assert "<th>weighted by the inputs</th>" in page.read_text(encoding="utf-8")


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrices = {name: rng.normal(size=(64, 32)).astype(np.float32) for name in HOSTILE}
    checkpoint = tmp_path / "</title><script>console.error('ran')<!--.safetensors".replace("/", "")
    save_file(matrices, checkpoint)
    found = assay(checkpoint, resamples=5)
    assert sorted(m.name for m in found.matrices) == sorted(HOSTILE)
    hostile_roles = tuple(replace(m, role=m.name) for m in found.matrices)
    page = write_assay_page(tmp_path / "assay.html", replace(found, matrices=hostile_roles))
    text = page.read_text(encoding="utf-8")
    assert not set("\x1b\u2028\u202e") & set(text)
    seen = visit(page, tmp_path, size=(1280, 5000))
    assert seen.console == []
    assert seen.requests == []
    assert "<img" not in seen.dom.partition("</script></head>")[2].replace("</script>", "")
    body = seen.dom[seen.dom.rindex("<h1>") :]
    for shown in ("&lt;img src=x", "&lt;b&gt;bold&lt;/b&gt;&amp;amp;", r"\x1b[31mred\u2028line\u202eback"):
        assert shown in body
    assert colours_shown(seen)[ROLE_COLOURS[0]] > 50


def test_the_demo_report_opens_without_error_or_request(demo_model: Path, tmp_path: Path) -> None:
    record = compress(demo_model, tmp_path / "demo.gguf", "Q8_0")
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    evaluation = evaluate(demo_model, tmp_path / "demo.gguf", text, ctx_tokens=64, chunks=4)
    sample = '</pre><script>console.error("ran")</script>'
    demo = Demo(tmp_path, record, evaluation, "import <b>", sample, 1.0)
    page, _, card = write_demo_report(demo)
    seen = visit(page, tmp_path, size=(1280, 1600))
    assert seen.console == []
    assert seen.requests == []
    assert "&lt;/pre&gt;&lt;script&gt;" in seen.dom
    assert all(row.hf_name in seen.dom for row in record.plan.rows)
    assert f"{record.file_bytes:,}" in card.read_text(encoding="utf-8")
    assert len(np.unique(packed(seen.pixels))) > 50


def test_the_check_sees_errors_and_requests(tmp_path: Path) -> None:
    """What the other tests rely on: a page that logs, throws and fetches is caught doing it."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><body style="background:#102030"><img src="http://img.invalid/i.png">'
        "<script>console.error('logged'); fetch('https://fetched.invalid/').catch(() => {});</script>"
        "<script>undefined_function()</script>"
    )
    seen = visit(bad, tmp_path, size=(400, 300))
    assert any("logged" in line for line in seen.console)
    assert any("undefined_function is not defined" in line for line in seen.console)
    assert {"http://img.invalid/i.png", "https://fetched.invalid/"} <= set(seen.requests)
    assert seen.pixels.shape == (300, 400, 3)
    assert (seen.pixels[-1, -1] == [0x10, 0x20, 0x30]).all()
    assert (read_png(seen.screenshot) == seen.pixels).all()


def test_the_pages_policy_forbids_fetching(tmp_path: Path) -> None:
    """Even if something slipped through: with the page's own policy the same page gets no request out."""
    page = write_page(tmp_path / "page.html", "t", [Section("h", figure={"data": [], "layout": {}})])
    sly = page.read_text(encoding="utf-8").replace(
        "<h1>",
        "<img src='http://img.invalid/i.png'><script>fetch('http://x.invalid/').catch(e => e)</script><h1>",
    )
    page.write_text(sly, encoding="utf-8")
    seen = visit(page, tmp_path)
    assert seen.requests == []
    assert any("Content Security Policy" in line for line in seen.console)


def test_script_json_cannot_leave_its_element() -> None:
    value = {"</script><!--": ["\u2028 & ' \" <b>", 1.5, None]}
    assert not set("<>&\u2028") & set(script_json(value))
    assert json.loads(script_json(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_a_page_replaces_an_earlier_one_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("x" * 10_000)
    write_page(page, "short", [Section("only")])
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert page.read_text(encoding="utf-8").endswith("</html>\n")
    assert "<script" not in page.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
