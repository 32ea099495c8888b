"""The documentation site has every page and every public name; building it is .ci/run's."""

import ast
import re
from pathlib import Path

import pytest

import fsam_triton

ROOT = Path(__file__).parents[1]


def test_every_page_is_once_in_the_navigation():
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    named = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(pages)


def test_code_of_the_pages_fits_beside_the_navigation():
    """128 columns on a screen of 1280 pixels, by docs/stylesheets/site.css."""
    too_long = [
        (page.name, line)
        for page in (ROOT / "docs").rglob("*.md")
        for block in re.findall(r"^```.*\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.M)
        for line in block.splitlines()
        if len(line) > 128
    ]
    assert too_long == []


def test_links_of_the_readme_lead_somewhere():
    """Those of the pages are checked by the build."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def names_in_the_api():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)}


def test_every_name_of_the_package_is_in_the_api():
    assert {f"fsam_triton.{name}" for name in fsam_triton.__all__} <= names_in_the_api()


def public_names(path):
    """What a module defines, and what it imports to give it on ("import x as x")."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname for alias in node.names if alias.asname)


@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("analysis", "analysis/__init__.py"),
        ("integrations.lightning", "integrations/lightning.py"),
        ("integrations.transformers", "integrations/transformers.py"),
    ],
)
def test_every_name_of_an_optional_module_is_in_the_api(module, file):
    public = {name for name in public_names(ROOT / "fsam_triton" / file) if not name.startswith("_")}
    assert public
    assert {f"fsam_triton.{module}.{name}" for name in public} <= names_in_the_api()


@pytest.mark.parametrize("folder", ["fsam_triton", "kernels"])
def test_docstrings_are_markdown(folder):
    """The site shows a role of reStructuredText as it stands."""
    for path in (ROOT / folder).rglob("*.py"):
        assert not re.search(r":(attr|class|func|meth|mod|ref):`", path.read_text(encoding="utf-8")), path
