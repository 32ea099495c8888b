"""The optimizers' own tests again with the Triton kernels in the interpreter in place of the compiled passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Files, a selection of their tests, and how many there are at least.
SELECTIONS = {
    # Perturbations of every variant, fifty steps of one, exact restoring, 16-bit weights with and without masters.
    "fsam": (
        "optim/test_fsam.py optim/test_fsam_precision.py optim/test_fsam_non_finite.py",
        "(test_perturbation_equals_the_reference and dtype0 and not mixed)"
        " or (test_fifty_steps_equal_the_reference and dtype0 and several_groups and asam_norm)"
        " or test_restore_is_bit_exact"
        " or test_non_finite_update_gradient",
        30,
    ),
    # The second gradient in the update, in fp32 and fp64; LookSAM's component; the weights that ESAM draws.
    "variants": (
        "optim/test_gsam.py optim/test_looksam.py optim/test_esam.py",
        "(test_parameters_of_different_types and True)"
        " or (test_fused_update_equals_the_materialised_direction and ours)"
        " or test_about_beta_of_the_weights_move",
        10,
    ),
    "rules": (
        "optim/test_fsam_rules.py",
        "(test_twenty_steps_equal and dtype0 and ((nesterov and gsam) or (dampened and fisher) or (lion and gsam)))"
        " or (test_restore_is_bit_exact and ((sgd and bf16_master) or (lion and fp16_master)))",
        5,
    ),
    "around": ("optim/test_sam.py", "test_around_adamw or test_perturbation_moves_what_the_mask_chose", 4),
    # To the bit, in fp32 and fp64; SAM on the mask.
    "sparse": (
        "buffers/test_sparse.py",
        "(test_equals_dense_training and adamw and missing) or (test_sam_on_the_mask and clipped)",
        3,
    ),
    # L2-SP and clipping, gradients that are missing or not finite, rounding to 16 bits.
    "adamw": (
        "optim/test_adamw.py optim/test_adamw_precision.py optim/test_gradient_feeds.py",
        "(test_l2_sp_and_clipping_equal_the_reference and dtype0 and (groups or anchors_of))"
        " or test_parameter_without_gradient_is_left_alone_to_the_bit"
        " or test_coordinate_with_a_non_finite_gradient"
        " or test_parameter_is_its_master_rounded_to_nearest"
        " or test_stochastic_rounding_of_the_update_is_unbiased",
        10,
    ),
    "momentum": (
        "optim/test_momentum_sam.py optim/test_momentum_modes.py",
        "(test_fifty_steps_equal_the_reference and dtype0) or test_forward_pass_perturbs_and_restore",
        5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("files", "selection", "least"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_optimizers_equal_their_references_in_the_interpreter(files, selection, least):
    command = [sys.executable, "-m", "pytest", *(f"tests/{file}" for file in files.split()), "-k", selection]
    command += ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", run.stdout.splitlines()[-1])[1]) >= least
