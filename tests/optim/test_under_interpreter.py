"""The optimizer's own tests again with the Triton kernels in the interpreter in place of the compiled passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_tests(files: str, selection: str) -> str:
    """pytest's last line of that selection with TRITON_INTERPRET=1; it must all have passed."""
    command = [sys.executable, "-m", "pytest", *(f"tests/fsam_triton/{file}" for file in files.split())]
    command += ["-k", selection]
    command += ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout.splitlines()[-1]


def passed(summary: str) -> int:
    return int(re.search(r"(\d+) passed", summary)[1])


def test_fsam_equals_its_reference_in_the_interpreter():
    """Perturbations of every variant, fifty steps of one, exact restoring, 16-bit weights with and without masters."""
    selection = (
        "(test_perturbation_equals_the_reference and dtype0 and not mixed)"
        " or (test_fifty_steps_equal_the_reference and dtype0 and several_groups and asam_norm)"
        " or test_restore_is_bit_exact"
        " or test_non_finite_update_gradient"
    )
    assert passed(run_tests("test_fsam.py", selection)) >= 30


def test_variants_equal_their_references_in_the_interpreter():
    """The second gradient in the update, in fp32 and fp64; LookSAM's component; the weights that ESAM draws."""
    selection = (
        "(test_buckets_of_different_dtypes and True)"
        " or (test_fused_update_equals_the_materialised_direction and ours)"
        " or test_about_beta_of_the_weights_move"
    )
    assert passed(run_tests("test_gsam.py test_looksam.py test_esam.py", selection)) >= 10


def test_sparse_training_equals_dense_training_in_the_interpreter():
    """To the bit, in fp32 and fp64; SAM on the mask; the steps after a change of the mask."""
    selection = (
        "(test_equals_dense_training and arguments0)"
        " or (test_sam_on_the_mask and clipped)"
        " or (test_set_trainable_goes_on and FSAM)"
    )
    assert passed(run_tests("test_sparse.py", selection)) >= 4


def test_adamw_equals_its_reference_in_the_interpreter():
    """L2-SP and clipping, gradients that are missing or not finite, rounding to 16 bits."""
    selection = (
        "(test_l2_sp_and_clipping_equal_the_reference and dtype0 and (groups or anchors_of))"
        " or test_parameter_without_gradient_is_left_alone_to_the_bit"
        " or test_coordinate_with_a_non_finite_gradient"
        " or test_parameter_is_its_master_rounded_to_nearest"
        " or test_stochastic_rounding_of_the_update_is_unbiased"
    )
    assert passed(run_tests("test_adamw_l2sp.py", selection)) >= 10
