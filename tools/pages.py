"""Write the pages of the site, from README.md, notebooks/ and docs/, for a generator of static sites:

    python -m tools.pages runs/site

Text is rendered by the same rules as on GitHub and in JupyterLab (CommonMark with tables), so that a lesson that reads
well there reads well here. A page is Markdown whose headings are Markdown and whose other parts are HTML already, and
nothing runs inside the generator: it adds navigation, search and looks, and another one can take its place.
"""

import argparse
import base64
import functools
import html
import os
import posixpath
import re
import shutil
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pygments
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from tools import editions, online

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = "docs/glossary.md"


class PageError(Exception):
    """A page can't be made: it links to a file that is not there."""


@dataclass(frozen=True)
class Page:
    """A page of the site: where it comes from, where it stands, and how lists call it."""

    source: str  # path in the checkout
    url: str  # path on the site
    title: str


@dataclass
class Site:
    """What rendering a page needs to know of the others.

    `root` is the checkout, `pages` maps a source to its `Page`, `glossary` an anchor to (term, definition as plain
    text), `repository` is the course's owner/name on GitHub, or "" if it is not known. `pictures`, filled while
    pages are rendered, maps a path on the site to a PNG file's bytes.
    """

    root: Path
    pages: dict
    glossary: dict = field(default_factory=dict)
    repository: str = ""
    pictures: dict = field(default_factory=dict)


# Which pages there are


def collect(root):
    """Return {source: Page} in the order of the site: README, core lessons, deep dives, then the other pages."""
    root = Path(root)
    pages = [Page("README.md", "index.html", "Start")]
    for notebook in lessons(root):
        pages.append(Page(notebook, f"lessons/{Path(notebook).stem}.html", lesson_title(root / notebook)))
    for path in sorted((root / "docs").glob("*.md")):
        pages.append(Page(f"docs/{path.name}", f"{path.stem}.html", heading(path)))
    for source, name in (
        ("adapter_checks/README.md", "adapter_checks"),
        ("models/base/README.md", "base_model"),
        ("classroom/README.md", "classroom"),
        ("CONTRIBUTING.md", "contributing"),
        ("CHANGELOG.md", "changelog"),
    ):
        pages.append(Page(source, f"{name}.html", heading(root / source)))
    return {page.source: page for page in pages}


def lessons(root):
    """Return the notebooks' paths in the checkout: core lessons by number, then deep dives by name."""
    return [f"notebooks/{path.name}" for path in sorted(Path(root, "notebooks").glob("*.ipynb"))]


def lesson_title(path):
    """Return how the site's lists call the lesson: its label and its title."""
    notebook = nbformat.read(path, as_version=4)
    return f"{editions.label(path.stem)} {editions.title(notebook)}"


def heading(path):
    """Return the text of a Markdown file's first heading."""
    return re.search(r"^# +(.+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE)[1].strip()


# Pages


def render(page, site):
    """Return the page as Markdown. Raises `PageError` if it links to a file that is not there."""
    path = site.root / page.source
    writer = _Writer(page, site)
    if path.suffix == ".ipynb":
        writer.notebook(nbformat.read(path, as_version=4))
        writer.close()
        writer.parts.insert(1, buttons(path.name, site.repository))  # below the title
    else:
        writer.markdown(re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
        writer.close()
    front = yaml.safe_dump({"title": page.title}, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(writer.parts)


def buttons(notebook, repository):
    """Return HTML with the ways to run the lesson, of the notebook `notebook`: those that need `repository` if it is known."""
    ways = online.ways(repository, notebook) if repository else {}
    links = [f'<a class="md-button" href="{html.escape(url)}">{name}</a>' for name, url in ways.items()]
    links.append(f'<a class="md-button" href="{notebook}" download>Download the notebook</a>')
    return f'<div class="try">{" ".join(links)}</div>\n'


def read_glossary(text):
    """Return {anchor: (term, definition)} of the glossary's Markdown; the definition is plain text."""
    terms, slugs = {}, _Slugs()
    for part in re.split(r"^## +", text, flags=re.MULTILINE)[1:]:
        name, _, definition = part.partition("\n")
        shown = _plain(_markdown().parseInline(name))
        first = definition.strip().split("\n\n")[0].replace("\n", " ")
        terms[slugs.of(shown)] = (shown, _plain(_markdown().parseInline(first)))
    return terms


class _Writer:
    """Writes one page, cell by cell."""

    def __init__(self, page, site):
        self.page, self.site = page, site
        self.parts, self.section, self.slugs = [], [], _Slugs()
        self.folded = False  # inside an exercise
        self.explained = page.source == GLOSSARY
        self.unexplained = {} if self.explained else _patterns(site.glossary)

    def notebook(self, notebook):
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                self.markdown(cell.source)
            else:
                self.section.append(highlighted(cell.source, "python"))
                self.outputs(cell)
                if "# YOUR CODE HERE" in cell.source:
                    self.unfold()

    def markdown(self, text):
        environment = {}
        tokens = _markdown().parse(text, environment)
        start = 0
        for place, token in enumerate(tokens):
            if token.type == "heading_open":
                self.html(tokens[start:place], environment)
                self.heading(token, tokens[place + 1])
                start = place + 3
        self.html(tokens[start:], environment)

    def heading(self, opening, inline):
        self.close()
        name = _plain([inline])
        self.parts.append(f"{opening.markup} {inline.content} {{ #{self.slugs.of(name)} }}\n")
        if re.match(r"Exercise\b", name):
            self.section.append('<details class="exercise"><summary>Open the exercise</summary>')
            self.folded = True

    def unfold(self):
        if self.folded:
            self.section.append("</details>")
            self.folded = False

    def close(self):
        """End what stands below a heading: one block of HTML, which the generator leaves as it is."""
        self.unfold()
        if body := "\n".join(part for part in self.section if part):
            self.parts.append(f'<div class="section">\n{body}\n</div>\n')
        self.section = []

    def html(self, tokens, environment):
        for token in tokens:
            if token.type == "inline":
                self.explain(token)
        self.section.append(self.linked(_markdown().renderer.render(tokens, _markdown().options, environment)))

    def outputs(self, cell):
        """Write the outputs of a code cell, folded if they answer a prediction."""
        shown = [output for output in cell.outputs if output != editions.COVER]
        if not shown:
            return
        folded = cell.metadata.get("jupyter", {}).get("outputs_hidden")
        if folded:
            self.section.append(f'<details class="answer"><summary>{editions.COVER.data.text}</summary>')
        self.section.append('<div class="output">')
        for output in shown:
            self.section.append(self.output(output))
        self.section.append("</div>")
        if folded:
            self.section.append("</details>")

    def output(self, output):
        data = output.get("data", {})
        if output.output_type == "stream":
            return _text(output.text)
        if "text/html" in data:
            return self.linked(data["text/html"])
        if "text/markdown" in data:
            return self.linked(_markdown().render(data["text/markdown"]))
        if "text/plain" in data:
            return _text(data["text/plain"])
        raise PageError(f"{self.page.source}: an output of the kinds {sorted(data)} can't be shown.")

    # Links and pictures

    def linked(self, text):
        """Return HTML with every relative link led to where it stands on the site, and pictures in files of their own."""
        text = re.sub(r'(<img\b[^>]*?\bsrc=")([^"]*)("[^>]*>)', self.picture, text)
        text = re.sub(r'<a href="([^"]*)"([^>]*)>(.*?)</a>', self.link, text, flags=re.DOTALL)
        # Material's script wraps plain tables itself; these scroll within themselves, and can be reached by keyboard.
        text = re.sub(r"<table\b", '<div class="table"><table class="data"', text)
        return text.replace("</table>", "</table></div>")

    def link(self, found):
        target, more, inner = html.unescape(found[1]), found[2], found[3]
        if re.match(r"[a-z][a-z0-9+.-]*:|//|#", target):
            return found[0]
        path, _, fragment = target.partition("#")
        source = self.source_of(path)
        fragment = f"#{fragment}" if fragment else ""
        if source in self.site.pages:
            url = posixpath.relpath(self.site.pages[source].url, posixpath.dirname(self.page.url) or ".") + fragment
            term = self.site.glossary.get(fragment[1:]) if source == GLOSSARY else None
            if term and not self.explained:
                return f'<a class="term" href="{html.escape(url)}" title="{html.escape(term[1])}"{more}>{inner}</a>'
            return f'<a href="{html.escape(url)}"{more}>{inner}</a>'
        if not self.site.repository:
            return inner  # The file is no page, and nobody knows where the checkout lies on the web.
        kind = "tree" if (self.site.root / source).is_dir() else "blob"
        return f'<a href="https://github.com/{self.site.repository}/{kind}/main/{html.escape(source)}{fragment}"{more}>{inner}</a>'

    def picture(self, found):
        before, target, after = found[1], html.unescape(found[2]), found[3]
        if target.startswith("data:image/png;base64,"):
            number = sum(name.startswith(f"pictures/{Path(self.page.source).stem}-") for name in self.site.pictures)
            name, content = (
                f"pictures/{Path(self.page.source).stem}-{number + 1}.png",
                base64.b64decode(target.split(",", 1)[1]),
            )
        else:
            source = self.source_of(target)
            name, content = f"pictures/{Path(source).name}", (self.site.root / source).read_bytes()
        self.site.pictures[name] = content
        url = posixpath.relpath(name, posixpath.dirname(self.page.url) or ".")
        return f'{before}{html.escape(url)}{after[:-1].rstrip("/ ")} loading="lazy"{_size(content)}>'

    def source_of(self, target):
        """Return the path in the checkout of a file that the page links to. Raises `PageError` if there is none."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.page.source), unquote(target)))
        lesson = f"lessons/{Path(path).stem}.py"
        if (
            path.startswith("notebooks/")
            and not (self.site.root / path).exists()
            and (self.site.root / lesson).exists()
        ):
            return lesson  # A lesson that was not built yet.
        if path.startswith("..") or not (self.site.root / path).exists():
            raise PageError(f"{self.page.source} links to {target}, which is not there.")
        return path

    # Terms of the glossary

    def explain(self, inline):
        """Make a link of the page's first mention of each term that has its meaning in the glossary alone."""
        children, depth = [], 0
        for token in inline.children:
            if token.type in ("link_open", "link_close"):
                depth += 1 if token.type == "link_open" else -1
                self.unexplained.pop(token.attrGet("href") and token.attrGet("href").partition("#")[2], None)
            if token.type == "text" and not depth:
                children += self.with_terms(token)
            else:
                children.append(token)
        inline.children = children

    def with_terms(self, token):
        for anchor, pattern in self.unexplained.items():
            if found := pattern.search(token.content):
                del self.unexplained[anchor]
                href = posixpath.relpath(GLOSSARY, posixpath.dirname(self.page.source) or ".") + f"#{anchor}"
                before, term, after = token.content[: found.start()], found[0], token.content[found.end() :]
                return [
                    *self.with_terms(_text_token(before)),
                    Token("link_open", "a", 1, attrs={"href": href}),
                    _text_token(term),
                    Token("link_close", "a", -1),
                    *self.with_terms(_text_token(after)),
                ]
        return [token] if token.content else []


def _patterns(glossary):
    """Return {anchor: pattern} of the terms that mean in plain text what the glossary says.

    Those are terms of several words, and abbreviations; "group" and "block" also stand for other things, so of such
    words only those are explained that the author has linked to the glossary.
    """
    patterns = {}
    for anchor, (term, _) in glossary.items():
        names = [name.split(",")[0].strip() for name in term.split(";")]
        names = [name for name in names if re.fullmatch(r"[\w-]+( [\w-]+)+|[\w-]*[A-Z][\w-]*[A-Z0-9][\w-]*", name)]
        if names:
            patterns[anchor] = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})s?(?![\w-])")
    return patterns


# Pieces


@functools.cache
def _markdown():
    return MarkdownIt("commonmark", {"html": True, "highlight": _fence}).enable(["table", "strikethrough"])


def _fence(code, language, attributes):
    return highlighted(code, language)


def highlighted(code, language):
    """Return code as HTML in the colours of the theme."""
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    inner = pygments.highlight(code, lexer, HtmlFormatter(nowrap=True))
    # markdown-it takes what begins with <pre as the whole block, hence no <div> around it.
    return f'<pre class="highlight"><code>{inner}</code></pre>'


def _text(text):
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).rstrip("\n")
    return f'<pre class="text"><code>{html.escape(text)}</code></pre>' if text else ""


def _text_token(text):
    return Token("text", "", 0, content=text)


def _plain(tokens):
    """Return the text of inline tokens, without markup."""
    return "".join(
        _plain(token.children) if token.children else " " if token.type == "softbreak" else token.content
        for token in tokens
        if token.type not in ("html_inline",)
    )


class _Slugs:
    """Anchors of headings, as GitHub makes them: a second heading of the same name gets -1."""

    def __init__(self):
        self.seen = {}

    def of(self, name):
        slug = re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")
        self.seen[slug] = self.seen.get(slug, -1) + 1
        return slug if not self.seen[slug] else f"{slug}-{self.seen[slug]}"


def _size(content):
    """Return width and height of a PNG file as attributes, so that the page does not jump when it has loaded."""
    width, height = struct.unpack(">II", content[16:24])
    return f' width="{width}" height="{height}"'


# The command


def write(root, folder, repository=""):
    """Write every page, its pictures, the notebooks themselves and the generator's settings to `folder`, made anew."""
    root, folder = Path(root), Path(folder)
    glossary = read_glossary((root / GLOSSARY).read_text(encoding="utf-8"))
    site = Site(root, collect(root), glossary, repository)
    texts = {page: render(page, site) for page in site.pages.values()}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "docs" / "site" / "static", folder / "pages")
    for page, text in texts.items():
        path = folder / "pages" / markdown_name(page)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, content in site.pictures.items():
        path = folder / "pages" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for lesson in lessons(root):
        shutil.copy(root / lesson, folder / "pages" / "lessons")
    settings = (root / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    menu = yaml.safe_dump({"nav": navigation(site.pages.values())}, allow_unicode=True, sort_keys=False)
    (folder / "mkdocs.yml").write_text(settings + menu, encoding="utf-8")


def markdown_name(page):
    """Return the name of the page's Markdown file."""
    return page.url.removesuffix(".html") + ".md"


def navigation(pages):
    """Return the site's menu: README, core lessons, deep dives, what to look things up in, and the rest."""
    sections = {"": [], "Lessons": [], "Deep dives": [], "Look up": [], "More": []}
    for page in pages:
        folder, _, name = page.source.rpartition("/")
        section = {"notebooks": "Deep dives" if name.startswith("deep_") else "Lessons", "docs": "Look up"}
        section = "" if page.source == "README.md" else section.get(folder, "More")
        sections[section].append({page.title: markdown_name(page)})
    return sections.pop("") + [{name: entries} for name, entries in sections.items() if entries]


def main(arguments=None):
    """Write what the command line asks for. Returns an exit status or a sentence for stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where to; what is there is deleted")
    try:
        write(ROOT, parser.parse_args(arguments).folder, os.environ.get("GITHUB_REPOSITORY", ""))
    except (PageError, OSError) as error:
        return str(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
