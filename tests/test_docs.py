"""The examples in docstrings, README and docs run, and their command lines are accepted."""

import dataclasses
import doctest
import importlib
import math
import pathlib
import re
import shlex

import pytest

from fsam_triton.finetune.checks import check_arguments
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.parser import parse

ROOT = pathlib.Path(__file__).parent.parent
MODULES = (
    "analysis.density",
    "analysis.hessian",
    "analysis.landscape",
    "analysis.rho",
    "analysis.sharpness",
    "batches.mixup",
    "batches.samples",
    "fisher.estimate",
    "fisher.losses",
    "integrations.lightning",
    "integrations.optim_args",
    "integrations.transformers",
    "masks.perturbed",
    "masks.trained",
    "optim.adamw_l2sp",
    "optim.balance",
    "optim.flat_lora",
    "optim.fsam",
    "optim.momentum_sam",
    "optim.sam",
    "optim.schedule",
    "optim.two_pass",
    "sparse_training.delta",
    "sparse_training.merger",
)


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
    assert command == "pip install -e '.[test]' && pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_that_pages_name_are_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pattern = r"\b(?:bench|docs|fsam_triton|kernels|tests)/[a-z0-9_/.]+\.(?:py|md|h|txt|jsonl?)\b"
    named = {name for page in pages for name in re.findall(pattern, page.read_text(encoding="utf-8"))}
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def command_lines():
    """The words of every fsam-finetune command in a bash block of a page, and that page."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if re.search(r"(^|&& )fsam-finetune\b", line):
                    yield pytest.param(shlex.split(line.split("fsam-finetune", 1)[1], comments=True), id=page.name)


@pytest.mark.parametrize("words", list(command_lines()))
def test_command_line_of_a_page_is_accepted(words):
    check_arguments(parse(words))


def test_recipes_have_the_updates_and_warm_up_of_the_fsam_codes_scripts():
    recipes = [parse(line.values[0]) for line in command_lines() if line.id == "recipes.md"]
    assert [(r.task_name, r.max_steps, math.ceil(r.max_steps * r.warmup_ratio)) for r in recipes] == [
        ("cola", 2668, 160),
        ("rte", 1018, 61),
    ]


def test_pages_of_the_command_line_name_every_option():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("finetune.md", "language_models.md")]
    rows = [row for page in pages for row in page.splitlines() if row.startswith("| `--")]
    named = {name for row in rows for name in re.findall(r"`--(\w+)`", row.split("|")[1])}
    aliases = {"mask_iter_e", "max_length", "block_size"}
    assert named - aliases == {field.name for field in dataclasses.fields(Arguments)}
