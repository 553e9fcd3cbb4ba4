"""The page of `flora report` in a real browser: it draws, answers to mouse, keyboard, theme and paper, and asks for nothing."""
import os
import shutil
import socket

import pytest
from page_runs import HOSTILE, make, make_hostile

from flora.page import write_report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
REQUIRED = os.environ.get("FLORA_REQUIRE_BROWSER") == "1"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without one the tests are skipped, or fail where FLORA_REQUIRE_BROWSER is 1."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        said = (f"no {'chromium' if CHROMIUM is None else 'playwright'} here, so not tested: that the page of flora report draws "
                "its plots, sorts, changes its colours, prints, and sends no request")
        pytest.fail(said) if REQUIRED else pytest.skip(said)
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    """The files of a page of one run, of two, and of one with hostile names."""
    place = tmp_path_factory.mktemp("browsed")
    runs = make(place, ("one", "two"))
    return {"one": write_report([runs["one"]], place / "one.html"),
            "two": write_report([runs["one"], runs["two"]], place / "two.html"),
            "hostile": write_report([make_hostile(place)], place / "hostile.html")}


@pytest.fixture
def opened(browser, pages):
    """Opens a page by name, with the errors that it meets in .errors; that it asked for nothing and met none is checked at the end.
    Options are a context's."""
    contexts, seen = [], []

    def open_(name, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.asked, page.errors = [], []
        seen.append(page)
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(pages[name].as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length")
        return page

    yield open_
    assert [(page.errors, len(page.asked), page.asked[0][:8]) for page in seen] == [([], 1, "file:///")] * len(seen)
    for context in contexts:
        context.close()


def test_it_draws_every_plot_without_an_error_or_a_request(opened, pages):
    page = opened("two")
    empty = page.evaluate("""[...document.querySelectorAll('.plot')].filter(box => !box.querySelector(
        '.scatterlayer path, .barlayer path, .boxlayer path')).map(box => box.id)""")
    sections = page.evaluate("[...document.querySelectorAll('section')].filter(s => s.querySelector('.plot')).map(s => s.id)")
    assert empty == [] and sections == ["reached", "clients", "labels", "traffic", "seconds", "errors", "spectrum"]
    assert page.errors == [] and page.asked == [pages["two"].as_uri()]
    assert page.locator("#reached .legend li").count() == 2


def test_the_policy_lets_no_other_script_run_and_no_request_out(opened):
    """A listener on this machine hears nothing of a script, an image and a fetch that are put into the page."""
    page = opened("one")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        page.evaluate("""where => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';
            document.body.append(s); const i = new Image(); i.src = where + 'x.png'; document.body.append(i);
            return fetch(where).catch(() => 0); }""", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        page.wait_for_timeout(300)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert page.evaluate("window.pwned") is None
    assert len([said for said in page.errors if "Content Security Policy" in said]) >= 3
    page.errors.clear()
    del page.asked[1:]


def test_hovering_a_point_says_what_it_is(opened):
    page = opened("two")
    for plot, words in {"reached-0": ("rounds done: 1", "one", "two"), "clients-0": ("rank", "rows", "change"),
                        "labels-0": ("rows",), "traffic-0": ("one, up",), "spectrum-1": ("ranks",)}.items():
        mark = page.locator(f"#{plot} .points path").nth(1)
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator(f"#{plot} .hoverlayer text").first.wait_for(timeout=5000)
        said = page.locator(f"#{plot} .hoverlayer").text_content()
        assert all(word in said for word in words), (plot, said)


def column(page, number):
    return page.evaluate("n => [...document.querySelectorAll('#clients-table-0 tbody tr')].map(row => row.cells[n].textContent)",
                         number)


def test_tables_sort_by_click_and_by_keyboard(opened):
    page = opened("one")
    head = page.locator("#clients-table-0 th")
    assert column(page, 1) == ["8", "4", "4", "2"]
    head.nth(1).locator("button").click()
    assert column(page, 1) == ["2", "4", "4", "8"] and head.nth(1).get_attribute("aria-sort") == "ascending"
    head.nth(0).locator("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert column(page, 0) == ["client-3", "client-2", "client-1", "client-0"]
    assert [head.nth(n).get_attribute("aria-sort") for n in (0, 1)] == ["descending", "none"]
    head.nth(10).locator("button").click()                      # bytes, which are sorted as numbers and not as texts
    values = page.evaluate("""[...document.querySelectorAll('#clients-table-0 tbody tr')].map(
        row => parseFloat(row.cells[10].dataset.v))""")
    assert values == sorted(values) and len(set(values)) == 3


def colours(page):
    return page.evaluate("""[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('#reached-0 .scatterlayer .js-line')).stroke,
        getComputedStyle(document.querySelector('#reached-0 .xtick text')).fill]""")


def test_the_theme_follows_the_system_and_the_button(opened):
    page = opened("one", color_scheme="light")
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("light => getComputedStyle(document.querySelector('#reached-0 .js-line')).stroke != light", arg=light[1])
    dark = colours(page)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    seen = []
    for _ in range(3):
        page.locator("#theme").click()
        seen.append((page.locator("#theme-name").text_content(), colours(page)))
    assert seen == [("light", light), ("dark", dark), ("auto", dark)]


@pytest.mark.parametrize("name", ["two", "hostile"])
def test_a_phone_scrolls_down_only(opened, name):
    page = opened(name, viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate("""[...document.querySelectorAll('.plot .main-svg, h1, h2, h3, p, dd, li, figure')].filter(
        one => one.getBoundingClientRect().right > 361).map(one => one.outerHTML.slice(0, 80))""")
    assert wide == [] and page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('#clients .scroll'))")


def test_hostile_names_are_read_and_not_run(opened):
    page = opened("hostile")
    said = set()
    for mark in page.locator("#clients-0 .points path").all():
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(150)
        said.add(page.locator("#clients-0 .hoverlayer").text_content())
    assert all(any(name in one for one in said) for name in HOSTILE), said
    ticks = page.locator("#clients-0 .ytick text").all_text_contents()
    assert sorted(ticks) == sorted(name[:17] + "…" for name in HOSTILE)
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main b, main a, main script").count() == 0
    assert page.locator(".plot a").count() == 0 and "<img src=x" in page.locator("#failures").text_content()
    assert page.locator("h1").text_content() == "a <b>run<b>"


def test_it_prints_with_its_plots_in_the_colours_of_paper(opened, tmp_path):
    page = opened("two", color_scheme="dark")
    before = colours(page)
    page.evaluate("addEventListener('beforeprint', () => { window.printed = [...document.querySelectorAll('.plot .main-svg')].map("
                  "one => one.getBoundingClientRect().width); })")
    data = page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert data.startswith(b"%PDF") and len(data) > 50_000
    assert max(page.evaluate("window.printed")) <= 650 and colours(page) == before
