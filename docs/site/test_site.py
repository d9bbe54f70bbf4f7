"""The built site, runs/site/html: every link leads somewhere, lessons are whole, and pages are right in a browser.

`make test-site` builds it and runs this.
"""

import functools
import html
import http.server
import posixpath
import re
import shutil
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import nbformat
import pytest

from tools import pages

SITE = pages.ROOT / "runs" / "site" / "html"
PAGES = pages.collect(pages.ROOT)
LESSONS = [page for page in PAGES.values() if page.source.startswith("notebooks/")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
each_page = pytest.mark.parametrize("url", [page.url for page in PAGES.values()])
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda page: page.url)


class Contents(HTMLParser):
    """What the tests ask of a page: its ids, what it links to and loads, its headings and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.headings, self.pictures = set(), [], [], [], []
        self.terms, self.contents = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        if "id" in has:
            assert has["id"] not in self.ids, f"the id {has['id']} occurs twice"
            self.ids.add(has["id"])
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
            if has.get("class") == "term":
                self.terms.append((has["href"], has["title"]))
            if "md-nav__link" in has.get("class", "") and has["href"].startswith("#"):
                self.contents.append(has["href"][1:])
        if tag in ("img", "script", "iframe", "source") and "src" in has:
            self.loads.append(has["src"])
        if tag == "link" and has.get("rel") not in ("next", "prev"):
            self.loads.append(has["href"])
        if tag == "img":
            self.pictures.append(has)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))


@functools.cache
def contents(url):
    return Contents((SITE / url).read_text(encoding="utf-8"))


def without_spaces(text):
    """The generator takes spaces from the ends of lines."""
    return "".join(text.split())


# Files


@each_page
def test_every_link_and_picture_leads_somewhere(url):
    page = contents(url)
    assert len(page.links) > 20, "the menu alone has more"
    for target in page.links + page.loads:
        if re.match(r"(https?|mailto):", target):
            assert target not in page.loads, f"{target} would be fetched from elsewhere"
            continue
        assert not re.match(r"[a-z][a-z0-9+.-]*:|/", target), f"{target} holds on one machine only"
        path, fragment = urldefrag(target)
        file = posixpath.normpath(posixpath.join(posixpath.dirname(url), unquote(path))) if path else url
        file = "index.html" if file == "." else file
        assert (SITE / file).is_file(), f"{target} leads nowhere"
        if fragment:
            assert unquote(fragment) in contents(file).ids, f"{file} has no #{fragment}"


@each_page
def test_headings_are_in_order_and_pictures_have_a_text(url):
    page = contents(url)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:])), page.headings
    assert all(picture.get("alt", "").strip() for picture in page.pictures)


@each_lesson
def test_a_lesson_is_there_with_its_outputs(lesson):
    notebook = nbformat.read(pages.ROOT / lesson.source, as_version=4)
    text = (SITE / lesson.url).read_text(encoding="utf-8")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = sum(output.get("data", {}).get("text/html", "").count("<img") for output in outputs)
    drawn = sum(len(re.findall(r"!\[|<img", c.source)) for c in notebook.cells if c.cell_type == "markdown")
    assert len(contents(lesson.url).pictures) == figures + drawn
    words = without_spaces(html.unescape(re.sub(r"<[^>]+>", "", text)))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert without_spaces(cell.source) in words, cell.id
    for output in outputs:
        if output.output_type == "stream":
            assert without_spaces(output.text) in words
    folded = sum(bool(cell.metadata.get("collapsed")) for cell in notebook.cells)
    exercises = sum("# YOUR CODE HERE" in cell.source for cell in notebook.cells)
    assert text.count('<details class="answer">') == folded > 0
    assert text.count('<details class="exercise">') == exercises > 0
    assert text.count("</details>") == text.count("<details")


@each_lesson
def test_every_figure_is_within_three_clicks_of_the_front_page(lesson):
    """The lesson, the section in its contents, and the fold if the figure answers a prediction."""
    assert lesson.url in contents("index.html").links
    sections = re.findall(r'<h2 id="([^"]+)"', (SITE / lesson.url).read_text(encoding="utf-8"))
    assert len(sections) > 5 and set(sections) <= set(contents(lesson.url).contents)
    assert posixpath.basename(lesson.source) in contents(lesson.url).links, "the notebook itself can be downloaded"


def test_terms_say_what_the_glossary_says():
    glossary = pages.read_glossary((pages.ROOT / pages.GLOSSARY).read_text(encoding="utf-8"))
    terms = [term for lesson in LESSONS for term in contents(lesson.url).terms]
    assert len(terms) > len(LESSONS)
    assert all(title == glossary[urldefrag(target)[1]][1] for target, title in terms)
    assert set(glossary) <= contents("glossary.html").ids and not contents("glossary.html").terms


# In a browser


@pytest.fixture(scope="module")
def address():
    """Serves the site on this machine; returns its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"There is no Chromium ({', '.join(BROWSERS)}), so no page was looked at in a browser.")
    from playwright.sync_api import sync_playwright

    # Chromium asks its maker for updates and lists of its own, which the tests must not take for the site's requests.
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield opened
        opened.close()


LOOKED_AT = ["index.html", LESSONS[0].url, "symptoms.html"]


@pytest.fixture
def open_page(browser, address):
    """Returns a function that opens a page; what it complained of and asked for elsewhere is looked at in the end."""
    contexts, complaints = [], []

    def open_at(url, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # milliseconds: a busy machine is no fault of the page
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: request.url.startswith((address, "data:")) or complaints.append(request.url))
        page.goto(f"{address}/{url}", wait_until="networkidle")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("url", LOOKED_AT)
def test_a_page_is_right_in_a_browser(url, scheme, width, open_page):
    page = open_page(url, width, scheme)
    assert fits(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    if width > 1000:  # where the menu and the contents are shown, too
        page.wait_for_timeout(300)  # the theme fades colours in
        assert serious_violations(page) == []


def fits(page):
    """Is no part of the page wider than the window, with every fold open?"""
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    return page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        " && [...document.images].every(image => image.getBoundingClientRect().right <= innerWidth)"
    )


@pytest.mark.parametrize("url", [page.url for page in PAGES.values() if page.url not in LOOKED_AT])
def test_every_other_page_fits_a_narrow_window(url, open_page):
    assert fits(open_page(url, 400))


def serious_violations(page):
    """What axe finds that keeps people out, a line each."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def test_the_audit_finds_what_is_wrong(open_page):
    page = open_page("glossary.html")
    page.evaluate(
        """document.querySelector("article").innerHTML += '<img src="course.css"><p style="color: #eee">faint</p>'"""
    )
    assert {line.split(":")[0] for line in serious_violations(page)} >= {"image-alt", "color-contrast"}


def test_the_search_finds_a_lesson(open_page):
    page = open_page("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type(LESSONS[0].title.split(" ", 1)[1])
    page.locator(
        f"a[href*='{posixpath.basename(LESSONS[0].url)}']:visible", has_text=re.compile("adapter")
    ).last.wait_for()


def test_a_fold_opens_by_keyboard_and_a_term_explains_itself(open_page):
    lesson = LESSONS[0]
    page = open_page(lesson.url)
    fold = page.locator("details.answer").first
    assert not fold.locator(".output").is_visible()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    fold.locator(".output").wait_for()
    target, meaning = contents(lesson.url).terms[0]
    page.locator(f'a.term[href="{target}"]').first.focus()
    page.get_by_text(meaning, exact=True).wait_for()
