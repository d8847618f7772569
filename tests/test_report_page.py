"""The report's page in a real headless Chromium: what a reader clicks, types, hovers over and sees."""

import itertools
import re

import chromium
import pytest
from reporting import PROJECT
from test_report import HOSTILE

from conftest import forked_python

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine: apt-get install chromium")

SHOWN = "[...document.querySelectorAll('.check')].filter(c => !c.hidden).map(c => c.querySelector('.title').textContent)"
MOVES, NAMED, STAYS, MISSING = (
    "test_it.py::test_moves",
    "test_it.py::test_name [<b>]",
    "test_it.py::test_stays",
    "test_new.py::test_new",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the report of four checks, made by a real run, whose tokens are hostile."""
    import os
    import subprocess

    root = tmp_path_factory.mktemp("repo")
    (root / "test_it.py").write_text(
        PROJECT.format(texts=HOSTILE) + "\ndef test_name(golden_trace):\n    golden_trace.check(rollouts(SHIFT), name='<b>')\n"
    )

    def run(*arguments, **env):
        command = [forked_python(), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        subprocess.run(command, cwd=root, env={**os.environ, **env}, check=False, capture_output=True)

    run("--update-golden")
    (root / "test_new.py").write_text("def test_new(golden_trace): golden_trace.check(3)")
    run("--parity-report=report", SHIFT="-0.3", NOISE="0.4")
    return root / "report"


@pytest.fixture
def page(browser, report):
    """The page, just opened."""
    browser.look()
    browser.requests.clear()
    browser.problems.clear()
    browser.open(report / "index.html")
    yield browser
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    assert browser.run("window.pwned") is None


def test_it_opens_offline_worst_first_and_the_worst_is_unfolded(page):
    assert page.run(SHOWN) == [MOVES, NAMED, MISSING, STAYS]
    assert page.run("document.title") == "Logprob parity: 2 fail, 1 misused, 1 pass"
    assert page.run("[...document.querySelectorAll('.check')].map(c => c.open)") == [True, False, False, False]
    assert page.run("document.querySelectorAll('.check')[0].querySelectorAll('figure svg').length") == 4
    for name, least in (("aria-labelledby", 10), ("aria-describedby", 60)):
        told = f"document.getElementById(s.getAttribute('{name}')).textContent"
        assert page.run(f"[...document.querySelectorAll('figure svg')].every(s => {told}.length > {least})")


def test_search_and_filters_narrow_it_down_and_the_address_remembers(page):
    page.run("document.querySelector('#search').focus()")
    for letter in "name":
        page.key(letter, letter)
    assert page.run(SHOWN) == [NAMED]
    assert page.run("location.hash") == "#q=name"
    assert page.run("document.querySelector('#shown').textContent") == "1 of 4 checks"
    page.run("search.value = '', search.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('[data-verdict=passed]').click()")
    assert page.run(SHOWN) == [STAYS]
    page.run("document.querySelector('[data-verdict=passed]').click()")
    page.run("(s => { s.value = 'test_new.py'; s.dispatchEvent(new Event('input')) })(document.querySelector('[name=file]'))")
    assert page.run(SHOWN) == [MISSING]
    assert page.run("location.hash") == "#file=test_new.py"
    page.run("search.value = 'nowhere', search.dispatchEvent(new Event('input'))")
    assert page.run("document.querySelector('#none').checkVisibility()") is True


def test_a_linked_view_opens_as_it_was(page, report):
    page.open(report / "index.html", "#verdict=failed&q=moves")
    assert page.run(SHOWN) == [MOVES]
    assert page.run("document.querySelector('[data-verdict=failed]').getAttribute('aria-pressed')") == "true"
    page.open(report / "index.html", "#check-4")
    assert page.run("document.querySelector('#check-4').open") is True


def test_light_and_dark_follow_the_system_and_the_button(page):
    def colour(name):
        return page.run(f"getComputedStyle(document.body).{name}")

    light = colour("backgroundColor")
    page.look(dark=True)
    dark = colour("backgroundColor")
    assert _lightness(dark) < 40 < 200 < _lightness(light)
    assert _lightness(colour("color")) > 200
    page.run("document.querySelector('#theme').click()")  # auto, then light
    assert (colour("backgroundColor"), page.run("document.querySelector('#theme').textContent")) == (light, "theme: light")
    axis = "getComputedStyle(document.querySelector('figure svg text')).fill"
    before = page.run(axis)
    page.run("document.querySelector('#theme').click()")
    assert colour("backgroundColor") == dark
    assert page.run(axis) != before  # the plots go along
    page.run("document.querySelector('#theme').click()")


def _lightness(colour):
    return sum(int(n) for n in re.findall(r"\d+", colour)[:3]) / 3


def test_hovering_over_a_token_shows_both_sides(page):
    page.hover(".tokens span.l4")
    tip = page.run("tip.innerText")
    assert page.run("tip.checkVisibility()") is True
    assert all(
        word in tip
        for word in ("golden", "this run", "logprob", "probability", "rank", "golden's top", "this run's top", "ratio")
    )
    token = page.run("(t => [t.closest('.tokens').dataset.sequence, t.dataset.i])(document.querySelector('.tokens span.l4'))")
    sequence, i = (int(n) for n in token)
    shown = page.run(f"(s => [s.golden[{i}], s.now[{i}], s.diff[{i}]])(dataOf(checks[0]).sequences[{sequence}])")
    assert all(f"{number:.4f}" in tip for number in shown)


def test_the_keyboard_reaches_every_token(page):
    page.run("document.querySelector('.tokens [tabindex=\"0\"]').focus()")
    at = "Number(document.activeElement.dataset.i)"
    first = page.run(at)
    page.key("Home")
    assert page.run(at) == 0
    page.key("ArrowRight")
    assert page.run(at) == 1
    page.key("End")
    assert page.run(at) == 29
    page.key("ArrowRight")
    assert page.run(at) == 29
    assert page.run("tip.checkVisibility() && document.activeElement.getAttribute('aria-describedby') === 'tip'")
    page.key("Escape")
    assert page.run("tip.checkVisibility()") is False
    assert page.run("document.activeElement.closest('.tokens').querySelectorAll('[tabindex=\"0\"]').length") == 1
    assert 0 <= first < 30


def test_a_command_is_copied(page):
    page.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve() }")
    page.run("document.querySelector('[data-copy]').click()")
    assert page.run("window.copied").startswith("logprob-parity accept parity-obtained/test_it/test_moves-")
    assert page.run("document.querySelector('[data-copy]').textContent") == "copied"


@pytest.mark.parametrize("width", [320, 390, 500, 900])
def test_a_narrow_window_does_not_scroll_sideways_and_cuts_no_limit_off(page, width):
    page.look(width=width)
    page.run("document.querySelector('#unfold').click()")
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.run("[...document.querySelectorAll('.scroll:has(.gates)')].every(box => box.scrollWidth <= box.clientWidth)")
    label = "getComputedStyle(document.querySelector('.gates td:nth-child(5)'), '::before').content"
    assert page.run(label) == '"limit "'  # each number says what it is, where there is no head


@pytest.mark.parametrize("width", [320, 500, 1200])
def test_no_text_of_a_chart_overlaps_another_one_or_is_cut_off(page, width):
    page.look(width=width)
    boxes = page.run(
        "[...document.querySelectorAll('.check:first-of-type figure svg')].map(svg => [svg, ...svg.querySelectorAll('text')]"
        ".map(e => (({left, top, right, bottom}) => [left, top, right, bottom, e.textContent])(e.getBoundingClientRect())))"
    )
    assert len(boxes) == 4
    for (left, top, right, bottom, _), *texts in boxes:
        assert len(texts) > 8
        for text in texts:
            assert left - 1 <= text[0]
            assert top - 1 <= text[1]
            assert text[2] <= right + 1
            assert text[3] <= bottom + 1
        apart = 2  # a line's height is more than that of its letters
        overlapping = [
            (a[4], b[4])
            for a, b in itertools.combinations(texts, 2)
            if a[0] < b[2] and b[0] < a[2] and a[1] + apart < b[3] and b[1] + apart < a[3]
        ]
        assert overlapping == []


def test_a_wide_window_has_a_table_with_a_head(page):
    """The negative control: the labels of a narrow window are not in a wide one."""
    page.look(width=1200)
    assert page.run("document.querySelector('.gates thead').checkVisibility()") is True
    assert page.run("getComputedStyle(document.querySelector('.gates td:nth-child(5)'), '::before').content") == "none"


def test_hostile_tokens_are_text(page):
    shown = page.run("[...new Set([...document.querySelectorAll('.tokens span[data-i]')].map(t => t.textContent))]")
    assert "<script>window.pwned = 1</script>" in shown
    assert "⟨U+202E⟩gnp.exe" in shown
    assert page.run("document.querySelectorAll('.tokens script, .tokens img, .title b').length") == 0
    for i in range(4):
        page.run(f"checks[{i}].open = true")
    page.run(
        "document.querySelectorAll('.tokens span[data-i]').forEach(t => { t.focus(); describe(t) })"
    )  # the tip's texts too
    assert page.run("tip.querySelectorAll('script, img').length") == 0


def test_the_same_tokens_unescaped_would_run(browser, report, tmp_path):
    """The negative control: escaping and the policy each keep them from it; without both they run, and it is seen."""
    text = (report / "index.html").read_text("utf-8")
    escaped = "&lt;script&gt;window.pwned = 1&lt;/script&gt;"
    assert escaped in text
    broken = text.replace(escaped, "<script>window.pwned = 1</script>")
    (tmp_path / "escape.html").write_text(broken, "utf-8")
    browser.open(tmp_path / "escape.html")
    assert browser.run("window.pwned") is None  # the policy alone
    (tmp_path / "both.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", broken), "utf-8")
    browser.open(tmp_path / "both.html")
    assert browser.run("window.pwned") == 1


def test_it_looks_like_something(page):
    """Not blank: a picture of a page has many colours, in light and in dark."""
    import io

    from PIL import Image

    for dark in (False, True):
        page.look(dark=dark)
        colours = Image.open(io.BytesIO(page.picture())).convert("RGB").getcolors(1 << 24)
        assert len(colours) > 200
