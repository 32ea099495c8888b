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
        "(test_perturbation_equals_the_reference and several_groups and dtype0 and not mixed)"
        " or (test_fifty_steps_equal_the_reference and dtype0 and several_groups and asam_norm)"
        " or (test_restore_is_bit_exact and not of_large_rho)"
        " or (test_non_finite_update_gradient and nan)",
        15,
    ),
    # The second gradient in the update, in fp32 and fp64; LookSAM's component; what ESAM draws; SGD and Lion.
    "variants": (
        "optim/test_gsam.py optim/test_looksam.py optim/test_esam.py optim/test_fsam_rules.py",
        "(test_parameters_of_different_types and True)"
        " or (test_fused_update_equals_the_materialised_direction and ours and 1-)"
        " or (test_about_beta_of_the_weights_move and 0.3)"
        " or (test_twenty_steps_equal and dtype0 and gsam and (nesterov or lion) and not anchored)"
        " or (test_restore_is_bit_exact and ((sgd and bf16_master) or (lion and fp16_master)))",
        9,
    ),
    # SAM around another optimizer; sparse training to the bit, and the weights that are perturbed in it.
    "sparse": (
        "optim/test_sam.py buffers/test_sparse.py",
        "(test_around_adamw and FisherMask)"
        " or test_perturbation_moves_what_the_mask_chose"
        " or (test_equals_dense_training and adamw and dtype0 and missing)"
        " or test_perturbation_moves_selected_weights",
        5,
    ),
    # L2-SP and clipping, gradients that are missing or not finite, rounding to 16 bits.
    "adamw": (
        "optim/test_adamw.py optim/test_adamw_precision.py optim/test_gradient_feeds.py",
        "(test_l2_sp_and_clipping_equal_the_reference and dtype0 and groups)"
        " or test_parameter_without_gradient_is_left_alone_to_the_bit"
        " or (test_coordinate_with_a_non_finite_gradient and dtype1)"
        " or test_parameter_is_its_master_rounded_to_nearest"
        " or test_stochastic_rounding_of_the_update_is_unbiased",
        10,
    ),
    "momentum": (
        "optim/test_momentum_sam.py optim/test_momentum_modes.py",
        "(test_fifty_steps_equal_the_reference and dtype0)"
        " or (test_forward_pass_perturbs_and_restore and (fp32 or bf16))"
        " or (test_perturbation_after_the_first_step and plain)"
        " or (test_schedule_decides and warmup)"
        " or (test_any_rule and sgd and dtype0)",
        7,
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
