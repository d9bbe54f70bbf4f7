"""The site's pages, made from notebooks and Markdown: what is folded, where links lead, and which terms are explained."""

import base64
import re

import nbformat
import pytest

from tools import editions, online, pages
from tools.build import ROOT

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAIAAAA2iEnWAAAAEElEQVR4nGP8z8AARAwQCgAf7QMBpf6lZgAAAABJRU5ErkJggg=="
)


def code(source, *outputs, folded=False, **metadata):
    cell = nbformat.v4.new_code_cell(source, outputs=list(outputs))
    if folded:
        cell.outputs.insert(0, editions.COVER)
        cell.metadata.update(editions.FOLDED)
    return cell


def printed(text):
    return nbformat.v4.new_output("stream", text=text)


def shown(**data):
    return nbformat.v4.new_output("display_data", data={f"text/{kind}": text for kind, text in data.items()})


@pytest.fixture
def course(tmp_path):
    """A checkout with two lessons, a deep dive and a glossary."""
    for folder in ("notebooks", "lessons", "docs/site/static", "images", "adapter_checks", "models/base", "classroom"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("adapter_checks/README", "models/base/README", "classroom/README", "CONTRIBUTING", "CHANGELOG"):
        (tmp_path / f"{name}.md").write_text(f"---\nkey: value\n---\n# Page of {name}\n")
    (tmp_path / "README.md").write_text(
        "# The course\n\n[one](notebooks/01_one.ipynb) [licence](LICENSE) [all](lessons)\n"
    )
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "docs" / "glossary.md").write_text(
        "# Glossary\n\n## rank, *r*\n\nThe *thin* side\nof A.\n\n## KL divergence, in nats\n\nHow far.\n\n## group\n\nReplies.\n"
    )
    (tmp_path / "docs" / "site" / "mkdocs.yml").write_text("site_name: The course\n")
    (tmp_path / "images" / "drawn.png").write_bytes(PNG)
    for name in ("01_one", "02_two", "deep_sea"):
        lesson(tmp_path, nbformat.v4.new_markdown_cell(f"# Title of {name}"), name=name)
    return tmp_path


def lesson(course, *cells, name="01_one"):
    notebook = nbformat.v4.new_notebook(cells=list(cells), metadata=editions.NOTEBOOK_METADATA)
    nbformat.write(notebook, course / "notebooks" / f"{name}.ipynb")


def rendered(course, *texts_and_cells, repository=""):
    """Return lesson 1's page, made of these cells, and the site's pictures."""
    cells = [nbformat.v4.new_markdown_cell(one) if isinstance(one, str) else one for one in texts_and_cells]
    lesson(course, nbformat.v4.new_markdown_cell("# Title of one"), *cells)
    glossary = pages.read_glossary((course / "docs" / "glossary.md").read_text())
    site = pages.Site(course, pages.collect(course), glossary, repository)
    return pages.render(site.pages["notebooks/01_one.ipynb"], site), site.pictures


def test_the_menu_has_core_lessons_before_deep_dives_and_all_pages_of_docs(course):
    (course / "docs" / "new_page.md").write_text("# A new page\n")
    (course / "notebooks" / "13_last.ipynb").write_bytes((course / "notebooks" / "02_two.ipynb").read_bytes())
    menu = pages.navigation(pages.collect(course).values())
    assert menu[0] == {"Start": "index.md"}
    sections = {name: entries for section in menu[1:] for name, entries in section.items()}
    assert list(sections) == ["Lessons", "Deep dives", "Look up", "More"]
    assert [list(entry.values()) for entry in sections["Lessons"]] == [
        ["lessons/01_one.md"],
        ["lessons/02_two.md"],
        ["lessons/13_last.md"],
    ]
    assert sections["Deep dives"] == [{"Deep dive: Title of deep_sea": "lessons/deep_sea.md"}]
    assert sections["Look up"] == [{"Glossary": "glossary.md"}, {"A new page": "new_page.md"}]
    assert {"Page of classroom/README": "classroom.md"} in sections["More"]


def test_outputs_are_shown_and_answers_to_predictions_are_folded(course):
    page, _ = rendered(
        course,
        code("print(1 < 2)", printed("\x1b[31mTrue & so on\x1b[0m\n")),
        code("show()", shown(plain="ignored", markdown="| a | b |\n|---|---|\n| 1 | 2 |"), folded=True),
        code("quiet()"),
    )
    assert "True &amp; so on</code></pre>" in page and "\x1b" not in page
    assert page.count('<details class="answer"><summary>Predict first, then click here.</summary>') == 1
    folded = page[page.index("<details") : page.index("</details>")]
    assert "<td>1</td>" in folded and "True" not in folded and "[]" not in folded
    assert page.count('<div class="output">') == 2


def test_an_output_that_cant_be_shown_is_said(course):
    with pytest.raises(pages.PageError, match=r"01_one\.ipynb: an output of the kinds \['text/latex'\]"):
        rendered(course, code("x", shown(latex="x")))


def test_an_exercise_is_folded_from_its_heading_to_its_cell(course):
    page, _ = rendered(
        course,
        "Before.\n\n### Exercise: count (core, 5 min)\n\nTask.",
        "More of the task.",
        code("def count():\n    # YOUR CODE HERE\n    return ..."),
        "After.",
        "### Exercise: last (core, 5 min)\n\nLast task.\n\n## Recap\n\nThe end.",
    )
    parts = page.split('<details class="exercise"><summary>Open the exercise</summary>')
    assert len(parts) == 3 and "Before." in parts[0] and "### Exercise: count" in parts[0]
    first, after = parts[1].split("</details>")
    assert "Task." in first and "More of the task." in first and "YOUR CODE HERE" in first
    assert "After." in after
    assert parts[2].index("Last task.") < parts[2].index("</details>") < parts[2].index("## Recap")


def test_headings_have_the_anchors_of_github(course):
    page, _ = rendered(course, "## What *is* `r`, and α?\n\ntext\n\n## Again\n\n## Again")
    assert re.findall(r"^##? .*\{ #(.+) \}$", page, re.MULTILINE) == [
        "title-of-one",
        "what-is-r-and-α",
        "again",
        "again-1",
    ]


def test_links_lead_to_pages_and_files_or_are_left_out(course):
    text = "[two](02_two.ipynb#recap) [web](https://example.org/a) [words](../docs/glossary.md) [licence](../LICENSE)"
    page, _ = rendered(course, text)
    for target in ("02_two.html#recap", "https://example.org/a", "../glossary.html"):
        assert f'<a href="{target}"' in page
    assert "LICENSE" not in page and "licence</p>" in page
    page, _ = rendered(course, text + " [folder](../lessons)", repository="someone/course")
    assert '<a href="https://github.com/someone/course/blob/main/LICENSE">licence</a>' in page
    assert '<a href="https://github.com/someone/course/tree/main/lessons">folder</a>' in page
    with pytest.raises(pages.PageError, match=r"notebooks/01_one\.ipynb links to 03_gone\.ipynb, which is not there"):
        rendered(course, "[three](03_gone.ipynb)")


def test_a_lesson_that_is_not_built_yet_is_no_broken_link(course):
    (course / "lessons" / "03_next.py").touch()
    page, _ = rendered(course, "[three](03_next.ipynb)")
    assert "<p>three</p>" in page


def test_pictures_become_files_with_their_size_and_text(course):
    data = base64.b64encode(PNG).decode()
    image = f'<img alt="a &amp; b" src="data:image/png;base64,{data}">'
    page, pictures = rendered(course, "![drawn](../images/drawn.png)", code("show()", shown(html=image + image)))
    assert pictures == {f"pictures/{name}.png": PNG for name in ("drawn", "01_one-1", "01_one-2")}
    assert '<img src="../pictures/drawn.png" alt="drawn" loading="lazy" width="2" height="3">' in page
    assert '<img alt="a &amp; b" src="../pictures/01_one-2.png" loading="lazy" width="2" height="3">' in page


def test_terms_are_explained_where_they_are_linked_and_sure_ones_at_their_first_mention(course):
    page, _ = rendered(
        course,
        "A rank, a group and `KL divergence` in code. **The KL divergence** and the KL divergence again.",
        "The [rank](../docs/glossary.md#rank-r) explains *r*.",
    )
    assert re.findall(r'<a class="term" href="([^"]+)" title="([^"]+)">([^<]+)</a>', page) == [
        ("../glossary.html#kl-divergence-in-nats", "How far.", "KL divergence"),
        ("../glossary.html#rank-r", "The thin side of A.", "rank"),
    ]
    assert "<strong>The <a" in page, "where it stands in the text"


def test_a_lesson_can_be_downloaded_and_opened_elsewhere_if_its_place_is_known(course):
    page, _ = rendered(course)
    assert page.count("md-button") == 1 and '<a class="md-button" href="01_one.ipynb" download>' in page
    page, _ = rendered(course, repository="someone/course")
    for address in online.ways("someone/course", "01_one.ipynb").values():
        assert f'href="{address}"' in page
    assert page.index("# Title of one") < page.index("md-button")


def test_everything_is_written_anew(course, tmp_path):
    folder = tmp_path / "written"
    (folder / "pages").mkdir(parents=True)
    (folder / "pages" / "old.md").touch()
    pages.write(course, folder)
    assert not (folder / "pages" / "old.md").exists()
    assert (folder / "pages" / "lessons" / "01_one.ipynb").read_bytes() == (
        course / "notebooks" / "01_one.ipynb"
    ).read_bytes()
    assert (folder / "mkdocs.yml").read_text().startswith("site_name: The course\nnav:\n- Start: index.md\n")
    front = (folder / "pages" / "index.md").read_text()
    assert "# The course" in front and 'href="lessons/01_one.html"' in front and "md-button" not in front
    assert "key: value" not in (folder / "pages" / "changelog.md").read_text()


def test_the_courses_own_glossary_is_read():
    glossary = pages.read_glossary((ROOT / pages.GLOSSARY).read_text(encoding="utf-8"))
    assert len(glossary) > 30 and all(term and meaning for term, meaning in glossary.values())
    term, meaning = glossary["base-model"]
    assert term == "base model" and meaning.startswith("The frozen model")
