"""Runs kernel launchers in Triton's interpreter, in a second process, so that this one can compile the same kernels."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from fsam_triton import ops


@pytest.fixture(scope="session")
def interpret(pytestconfig) -> Callable:
    """`interpret(launcher, *args)` calls the launcher where TRITON_INTERPRET is 1 and returns its result.

    Triton decides at import whether its own library is compiled or interpreted, hence the second process. Tensors are
    shared with it, so what the launcher writes in place is seen here.
    """
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as executor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.syspath_prepend(pytestconfig.rootpath)
            assert executor.submit(ops.interpreting).result()
        yield lambda launcher, *args: executor.submit(launcher, *args).result()


@pytest.fixture(scope="session")
def kernels(interpret) -> SimpleNamespace:
    """The passes over segments as the kernels do them, in place of the module `reference`."""
    from fsam_triton.kernels import descend, gap, norm, perturb

    return SimpleNamespace(
        norm_sq=lambda *args: interpret(norm.norm_sq, *args),
        norms_sq=lambda *args: interpret(norm.norms_sq, *args),
        gap=lambda *args: interpret(gap.gap, *args),
        perturb_=lambda *args: interpret(perturb.perturb_, *args),
        descend_=lambda *args: interpret(descend.descend_, *args),
    )
