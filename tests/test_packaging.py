"""What is in the wheel and the sdist, and that the folder kernels/ is nobody's top-level module."""

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fsam_triton

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


# What an earlier build, an editable install or a run of the tests has left must get in nowhere.
LEFTOVERS = shutil.ignore_patterns(
    *(
        ".git",
        ".venv",
        ".*_cache",
        ".benchmarks",
        ".hypothesis",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "runs",
        "site",
    )
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("package") / "source", symlinks=True, ignore=LEFTOVERS)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "-w", folder], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> set[str]:
    """The names of the files in the sdist of a copy of the sources, below its top folder."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def in_metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (path for path in wheel.namelist() if ".dist-info/" in path and path.endswith(name))
    return wheel.read(path).decode()


def test_wheel_has_every_module_and_header_of_every_package(wheel):
    roots = {ROOT / "fsam_triton": Path("fsam_triton"), ROOT / "kernels": Path("fsam_triton/kernels")}
    expected = {
        str(package / path.relative_to(root))
        for root, package in roots.items()
        for pattern in ("*.py", "*.h")
        for path in root.rglob(pattern)
    }
    assert {name for name in wheel.namelist() if name.endswith((".py", ".h"))} == expected


@pytest.mark.parametrize("folder", [".ci", ".github", "bench", "docs", "fsam_triton", "hub", "kernels", "tests"])
def test_sdist_has_the_whole_folder(folder, source, sdist):
    assert {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()} <= sdist


def test_sdist_has_what_tests_and_checks_need_beside_the_folders(sdist):
    pages = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    settings = {".gitignore", ".pre-commit-config.yaml", "CITATION.cff", "MANIFEST.in", "mkdocs.yml", "pyproject.toml"}
    assert pages | settings <= sdist


def test_wheel_has_one_top_level_package(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fsam_triton"}


def test_wheel_says_that_it_is_typed(wheel):
    assert "fsam_triton/py.typed" in wheel.namelist()


@pytest.mark.parametrize("name", ["templates/report.html", "evidence.json"])
def test_wheel_has_the_data_of_the_command_line(wheel, name):
    assert f"fsam_triton/finetune/{name}" in wheel.namelist()


def test_wheel_has_the_license(wheel):
    assert in_metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_wheel_has_the_packages_version_and_name(wheel):
    metadata = email.message_from_string(in_metadata(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("fsam-triton", fsam_triton.__version__)


def test_wheel_has_the_command_line(wheel):
    entries = configparser.ConfigParser()
    entries.read_string(in_metadata(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == {"fsam-finetune": "fsam_triton.finetune:main"}


def test_unpacked_wheel_takes_a_step_without_the_repository(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, fsam_triton, fsam_triton.kernels.reference as reference
for module in (fsam_triton, reference):
    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
p = torch.nn.Parameter(torch.ones(3))
p.sum().backward()
fsam_triton.AdamWL2SP([p]).step()
assert (p < 1).all()
"""
    # Eager: this is not about compiled passes.
    env = {**os.environ, "CXX": str(tmp_path / "no_compiler")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_transformers_does_not_take_the_folder_for_the_package_kernels():
    """In the repository's root, which `python -c` puts first on the path."""
    pytest.importorskip("transformers")
    code = """
import importlib.metadata
from transformers.utils import is_kernels_available
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    assert not is_kernels_available()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
