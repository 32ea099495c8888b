"""Assemble the passes as a kernel for Hugging Face's Hub, from `kernels/` and `fsam_triton/ops.py`.

    python hub/assemble.py FOLDER

FOLDER becomes a project for kernel-builder: `build.toml`, `flake.nix`, `CARD.md` and `torch-ext/fsam_passes`. Its
`build/torch-<backend>` are what kernel-builder makes of a kernel in pure Python, so that `kernels.get_local_kernel`
loads FOLDER without a build. Needs Python 3.11, and no other package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import tomllib

HUB = Path(__file__).parent
ROOT = HUB.parent


def assemble(folder: Path) -> None:
    """Write the project and its build variants into a folder, which must not exist or be empty.

    Raises:
        FileExistsError: there is something in the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    leave = shutil.ignore_patterns("__pycache__", "assemble.py", "README.md")
    shutil.copytree(HUB, folder, dirs_exist_ok=True, ignore=leave)
    general = tomllib.loads((HUB / "build.toml").read_text(encoding="utf-8"))["general"]
    package = folder / "torch-ext" / general["name"].replace("-", "_")
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=leave)
    shutil.copy(ROOT / "fsam_triton" / "ops.py", package)
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(package, variant)
        metadata = {key: general[key] for key in ("name", "version", "license")}
        metadata |= {"id": f"_{package.name}_{backend}_{digest(package)}"}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def digest(folder: Path) -> str:
    """Seven digits for the content: several versions may be loaded at once, each under its own name."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:7]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    assemble(parser.parse_args().folder)


if __name__ == "__main__":
    main()
