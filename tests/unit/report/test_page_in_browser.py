"""The pages in a real browser: light, dark, at phone width and without JavaScript. Screenshots are left in the tests'
temporary folder, or in PAGE_SCREENSHOTS."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, look, running
from page_runs import big_run, small_run, started, store
from PIL import Image

from laasp_ray.report.page.reading import RunReader, RunRecord
from laasp_ray.report.page.run import run_page
from laasp_ray.report.page.several import Compared, comparison_page
from laasp_ray.report.sweep import row_from
from laasp_ray.store.storage import Storage

NOW = 1_800_000_000.0
pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here (or name one by CHROMIUM)")

LOOK = """(() => {
  const shown = (e) => e.checkVisibility();
  const inside = (e) => {
    for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX === 'auto') return true;
    return false;
  };
  const all = [...document.body.querySelectorAll('*')].filter(shown);
  const wide = all.filter((e) => !inside(e) && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1);
  const texts = [...document.querySelectorAll('svg text')].map((t) => [t, t.getBoundingClientRect()]);
  const out = texts.filter(([t, b]) => {
    const s = t.closest('svg').getBoundingClientRect();
    return b.left < s.left - 4 || b.right > s.right + 4 || b.top < s.top - 4 || b.bottom > s.bottom + 4;
  });
  const meets = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const clash = [];
  texts.forEach(([t, b], i) => texts.slice(i + 1).forEach(([u, c]) => {
    if (t.closest('svg') === u.closest('svg') && !t.getAttribute('transform') && !u.getAttribute('transform')
        && meets(b, c)) clash.push(t.textContent + ' / ' + u.textContent);
  }));
  const same = all.filter((e) => e.childNodes.length && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
      && getComputedStyle(e).color === getComputedStyle(document.body).backgroundColor);
  return {
    width: document.documentElement.scrollWidth - innerWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 80)),
    empty: texts.filter(([t, b]) => !t.textContent.trim() || b.width === 0).length,
    out: out.map(([t]) => t.textContent),
    clash: clash,
    unseen: same.map((e) => e.textContent.slice(0, 40)),
    texts: texts.length,
    svgs: document.querySelectorAll('svg').length,
    undrawn: [...document.querySelectorAll('svg')].filter((s) => s.getBoundingClientRect().height < 60).length,
    missing: [...document.querySelectorAll('h1, h2, h3, .tile .value, th, td.num')].filter(
      (e) => shown(e) && !e.textContent.trim()).length,
    back: getComputedStyle(document.body).backgroundColor,
    buttons: document.querySelectorAll('th button').length,
  };
})()"""

SORT = """(() => {
  const table = [...document.querySelectorAll('table.sortable')].find((t) => t.tHead.textContent.includes('criterion'));
  const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === 'FLOPs gone');
  const read = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
  const button = table.tHead.rows[0].cells[column].querySelector('button');
  const found = [read()];
  button.click(); found.push(read());
  button.click(); found.push(read());
  return found;
})()"""


def pages():
    """Name -> a page of each kind."""
    events, rankings = big_run(iterations=60, layers=30, criteria=4)
    losses = {number: [(one.layer, one.criterion, one.loss) for one in ranking] for number, ranking in rankings.items()}
    big = RunRecord(
        name="big",
        uri="runs/big",
        events=events,
        times=[NOW + number for number in range(len(events))],
        candidates=losses,
    )
    begun = RunRecord(name="begun", uri="runs/begun", events=[started()], times=[NOW])
    small = small_run()
    rows = [row_from(f"run-{number}", small, target="25.00%", folder="x") for number in (1, 2, 3)]
    return {
        "big": run_page(big, NOW),
        "begun": run_page(begun, NOW),
        "several": comparison_page([Compared(row=row, config=small[0].config) for row in rows], NOW),
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The port of a browser, and the addresses of the pages by name."""
    folder = tmp_path_factory.mktemp("pages")
    record = RunReader(store(Storage.open(str(folder / "small")), small_run())).read()
    urls = {}
    for name, page in {"small": run_page(record, NOW), **pages()}.items():
        path = folder / f"{name}.html"
        path.write_text(page)
        urls[name] = path.as_uri()
    with running(chromium(), tmp_path_factory.mktemp("profile")) as port:
        yield port, urls


def kept(seen, name, tmp_path):
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    (folder / f"{name}.png").write_bytes(seen.screenshot)
    return np.asarray(Image.open(io.BytesIO(seen.screenshot)).convert("RGB"))


@pytest.mark.parametrize("name", ["small", "big", "begun", "several"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_pages_are_whole_in_a_browser(shown, tmp_path, name, width, dark):
    port, urls = shown
    seen = look(port, urls[name], LOOK, width=width, dark=dark)
    pixels = kept(seen, f"{name}-{width}-{'dark' if dark else 'light'}", tmp_path)
    assert seen.complaints == [] and seen.requests == [urls[name]]
    found = seen.asked
    nothing = {"wide": [], "out": [], "clash": [], "unseen": [], "empty": 0, "undrawn": 0, "missing": 0}
    assert {key: found[key] for key in nothing} == nothing and found["width"] <= 0
    assert found["svgs"] == {"small": 7, "big": 7, "begun": 0, "several": 2}[name] and found["buttons"] > 0
    assert pixels.shape[1] == width and pixels.shape[0] > 900
    assert (np.median(pixels) < 60) if dark else (np.median(pixels) > 200)


def test_tables_are_sorted_by_a_click_on_a_head(shown):
    port, urls = shown
    seen = look(port, urls["small"], SORT, width=1280)
    assert seen.asked == [["1", "2"], ["1", "2"], ["2", "1"]] and seen.complaints == []


def test_pages_are_read_without_javascript(shown, tmp_path):
    port, urls = shown
    seen = look(port, urls["small"], LOOK, width=1280, scripts=False)
    pixels = kept(seen, "small-without-scripts", tmp_path)
    assert seen.requests == [urls["small"]] and seen.complaints == []
    assert pixels.shape[0] > 2000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200


def test_a_printed_page_is_light_and_unfolded(shown, tmp_path):
    port, urls = shown
    folded = "[...document.querySelectorAll('details td')].map((e) => e.getBoundingClientRect().height > 0)"
    seen = look(port, urls["small"], folded, width=1000, dark=True, media="print")
    assert np.median(kept(seen, "small-printed", tmp_path)) > 250
    assert len(seen.asked) > 100 and all(seen.asked)
