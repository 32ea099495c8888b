"""The kernel for Hugging Face's Hub: assembled, loaded by `kernels`, and its numbers."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.every_pass import PASSES
from fsam_triton.kernels import reference, spec
from fsam_triton.kernels.segments import Plan, Segments

ROOT = Path(__file__).parent.parent
BACKENDS = ["cpu", "cuda", "rocm"]
SCRIPT = """
import sys
from pathlib import Path
import kernels, torch

passes = kernels.get_local_kernel(Path(sys.argv[1]))
given = torch.load(sys.argv[2])
weights, gradients = given["weights"], given["gradients"]
plan = passes.Plan([p.numel() for p in weights], torch.device("cpu"))
segments = passes.Segments(plan, weights, gradients)
backup = torch.zeros(plan.size, dtype=weights[0].dtype)
norm = passes.norm_sq(segments, False, None)
passes.perturb_(segments, backup, None, given["coefficients"], given["keys"], False, True, False)
torch.save({"weights": weights, "backup": backup, "norm": norm, "all": passes.__all__}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("tomllib")
    path = tmp_path_factory.mktemp("hub") / "project"
    specification = importlib.util.spec_from_file_location("assemble", ROOT / "hub" / "assemble.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.assemble(path)
    with pytest.raises(FileExistsError):
        module.assemble(path)
    return path


def run(script: str, *arguments: object, interpreted: bool = False) -> None:
    """In another process, and away from the folder `kernels` of this repository."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=arguments[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_variant_is_the_package_and_its_metadata(folder):
    package = folder / "torch-ext" / "fsam_passes"
    files = {path.relative_to(package): path.read_bytes() for path in package.rglob("*") if path.is_file()}
    assert files[Path("kernels/perturb.py")] == (ROOT / "kernels" / "perturb.py").read_bytes()
    assert Path("kernels/cpu/perturb.h") in files
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        found = {path.relative_to(variant): path.read_bytes() for path in variant.rglob("*") if path.is_file()}
        assert backend in found.pop(Path("metadata.json")).decode()
        assert found == files


def test_build_configuration_and_metadata_pass_the_checks_of_kernels(folder):
    run(
        "import sys; from kernels._rust import Build, Metadata\n"
        "build = Build.open(sys.argv[1])\n"
        f"assert [str(backend) for backend in build.general.backends] == {BACKENDS}\n"
        "for backend in build.general.backends:\n"
        "    metadata = Metadata.read_from_file(f'{sys.argv[1]}/build/torch-{backend}/metadata.json')\n"
        "    assert metadata.backend.backend_type == backend and metadata.name.python_name == 'fsam_passes'\n",
        folder,
    )


@pytest.mark.parametrize("interpreted", [False, True], ids=["on the CPU", "interpreted"])
def test_loaded_passes_give_the_numbers_of_the_reference(folder, tmp_path, interpreted):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (2 * spec.BLOCK + 77,)]
    weights, gradients = ([torch.randn(s, generator=generator).bfloat16() for s in shapes] for _ in range(2))
    coefficients = torch.zeros(len(shapes), len(spec.PERTURB))
    coefficients[:, spec.PERTURB.index("scale")] = 0.05
    keys = torch.arange(3, dtype=torch.int32)
    given = {"weights": weights, "gradients": gradients, "coefficients": coefficients, "keys": keys}
    torch.save(given, tmp_path / "given")
    run(SCRIPT, folder, tmp_path / "given", tmp_path / "found", interpreted=interpreted)
    found = torch.load(tmp_path / "found")
    plan = Plan([p.numel() for p in weights], torch.device("cpu"))
    segments, backup = Segments(plan, weights, gradients), torch.zeros(plan.size, dtype=torch.bfloat16)
    # Squares are added in fp32, in another order; none of them is negative.
    bound = plan.size * 2.0**-24
    torch.testing.assert_close(found["norm"], reference.norm_sq(segments, False, None), rtol=bound, atol=0)
    reference.perturb_(segments, backup, None, coefficients, keys, False, True, False)
    assert all(map(torch.equal, found["weights"], weights))
    assert torch.equal(found["backup"], backup)
    assert set(PASSES) <= set(found["all"])


def test_example_of_the_card_runs(folder):
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    example = card.partition("```python\n")[2].partition("```")[0]
    call = 'get_kernel("{{ repo_id }}", version={{version}}, trust_remote_code=True)'
    assert call in example
    example = example.replace(call, "get_local_kernel(Path(sys.argv[1]))").replace("import get_kernel", "import *")
    example = example.replace('"cuda"', '"cpu"')
    moved = "total = sum(float((w - b).square().sum()) for w, b in zip(weights, clean)) ** 0.5\n"
    run(
        "import sys; from pathlib import Path\n"
        + example.replace("plan =", "clean = [w.clone() for w in weights]\nplan =")
        + moved
        # Weights of about 1, whose roundings are 2**-24 and of random sign.
        + "assert abs(total - 0.05) < 2**-24 * 1077 ** 0.5, total\n",
        folder,
    )
