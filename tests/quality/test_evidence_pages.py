"""The pages about what was measured: links lead somewhere, claims are short, the worked example works."""

import re
import textwrap
from pathlib import Path

import pytest

from benchmarks.quality.reasons import fields
from benchmarks.quality.rows import BUDGETS, TABLES, Row

ROOT = Path(__file__).parents[2]
PAGES = ("docs/results.md", "docs/diary.md", "docs/quality.md", "benchmarks/results/TABLES.md",
         "benchmarks/results/PAPER.md", "docs/models.md",
         "benchmarks/results/quality/TABLES-0.1.md")  # fmt: skip


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have where it is shown."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue  # no page of ours
        path, _, anchor = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_what_is_claimed_is_short():
    for name, lines in (("results", 150), ("quality", 90)):
        assert len((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()) <= lines


def test_the_row_that_the_page_declares_is_one():
    shown = re.search(r"^    Row\(\n(?:        .*\n)+    \)$", (ROOT / "docs" / "quality.md").read_text(), re.M)
    row = eval(textwrap.dedent(shown[0]), {"Row": Row})
    assert row.spec(None, 30).config(BUDGETS["quick"], 30).attention.gate_init == 0.97
    assert row.field in fields() and set(row.also) <= set(TABLES) and row.reference == "base"
