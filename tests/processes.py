"""Several gloo processes of a test on one machine, and what each of them returns."""

import contextlib
import datetime
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fsam_triton.kernels import build
from tests.objects import freeze_objects

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def spawn(worker, n: int, folder: Path, *arguments) -> list[Any]:
    """Run `worker(rank, n, folder, *arguments)` in n processes; gives what each has returned."""
    folder.mkdir(exist_ok=True)
    start(_call, n, worker, n, folder, *arguments)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(n)]


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Processes that are started inside find the tests, however pytest was started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield


def start(function, n: int, *arguments) -> None:
    """Call `function(rank, *arguments)` in n processes."""
    with importable():
        mp.spawn(function, arguments, nprocs=n)


@contextlib.contextmanager
def eager_passes() -> Iterator[None]:
    """The passes as the processes have them: eager PyTorch's square roots can differ in the last bit from C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "available", lambda: False)
        yield


def _call(rank: int, worker, n: int, folder: Path, *arguments) -> None:
    torch.set_num_threads(1)
    freeze_objects()
    # To load what builds and loads the C++ takes each process two seconds.
    build.available = lambda: False
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timeout)
    torch.save(worker(rank, n, folder, *arguments), folder / f"result-{rank}.pt")
    dist.barrier()
    # A thread of gloo's that lets go of the last operation's tensors while Python shuts down aborts the process. To
    # destroy the group ends its threads only where no DistributedDataParallel is left that holds it.
    os._exit(0)


# What such an abort prints.
ABORTED = "terminate called without an active exception"


def run_example(page: str, file: str, folder: Path, processes: int = 2) -> str:
    """Run the example of a page whose first line is `# file` with torchrun; gives what it has printed."""
    blocks = re.findall(r"^```py\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    (folder / file).write_text(next(b for b in blocks if b.startswith(f"# {file}\n")), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    for _ in range(3):
        run = subprocess.run(
            [*torchrun, file],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        # It is after the example's last line, and rare.
        if ABORTED not in run.stderr:
            break
    assert run.returncode == 0, run.stderr
    return run.stdout
