"""The examples in docstrings, README and docs run."""

import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ("adamw_l2sp", "fsam", "masks")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"fsam_triton.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def python_blocks():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)):
            yield pytest.param(block, id=f"{page.name}-{i}")


@pytest.mark.parametrize("block", list(python_blocks()))
def test_example_of_a_page_runs(block):
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})


def test_continuous_integration_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", readme)[1]
    assert command == "pip install -e '.[test]' && pytest"
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
