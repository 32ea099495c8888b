"""Files of deltas: whole or not there; damaged and foreign ones are refused before anything is written."""

import copy
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from fsam_triton import DeltaError, FishMask, apply_delta, merge_deltas, save_delta
from fsam_triton.files import read_file, write_file
from tests.sparse_training.deltas import (
    Odd,
    assert_same,
    half_a_write,
    no_replace,
    odd_mask,
    small_delta,
    snapshot,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_byte_that_is_changed_is_noticed_before_anything_is_written(tmp_path):
    path = tmp_path / "delta"
    base = small_delta(path)
    before, data = snapshot(base), path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(DeltaError, match=r"damaged|must be a delta file"):
            apply_delta(base, path)
    assert_same(base, before)


def test_every_truncation_is_noticed_before_anything_is_written(tmp_path):
    path = tmp_path / "delta"
    base = small_delta(path)
    before, data = snapshot(base), path.read_bytes()
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        with pytest.raises(DeltaError, match="damaged"):
            apply_delta(base, path)
    assert_same(base, before)


def test_mask_file_is_no_delta(tmp_path):
    FishMask.random(Odd(), 0.5).save(tmp_path / "mask")
    with pytest.raises(DeltaError, match="is a FishMask file of version 1; must be a delta file"):
        apply_delta(Odd(), tmp_path / "mask")


def test_error_is_a_value_error():
    assert issubclass(DeltaError, ValueError)


FORGERIES = {
    "too_few_values": lambda tensors, meta: tensors.update({"values/0.weight": tensors["values/0.weight"][1:].clone()}),
    "no_values": lambda tensors, meta: tensors.pop("values/0.weight"),
    "more_values": lambda tensors, meta: tensors.update({"values/new": torch.zeros(1)}),
    "dtype": lambda tensors, meta: tensors.update({"values/0.weight": tensors["values/0.weight"].double()}),
    "shape": lambda tensors, meta: meta["base"]["0.weight"].__setitem__(1, [4, 4]),
    "mask_shape": lambda tensors, meta: meta["shapes"].__setitem__("0.weight", [1, 1]),
    "no_base": lambda tensors, meta: meta.pop("base"),
    "no_shapes": lambda tensors, meta: meta.pop("shapes"),
    "gap_type": lambda tensors, meta: tensors.update({"gaps/0.weight": torch.zeros(4)}),
    "negative_gap": lambda tensors, meta: tensors.update({"gaps/0.weight": torch.tensor([-5] * 6).int()}),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_file_that_contradicts_itself_is_refused_before_anything_is_written(forge, tmp_path):
    base = small_delta(tmp_path / "delta")
    before = snapshot(base)
    tensors, meta = read_file(tmp_path / "delta", "delta")
    del meta["sha256"]
    write_file(tmp_path / "delta", "delta", tensors, meta)
    apply_delta(copy.deepcopy(base), tmp_path / "delta")
    forge(tensors, meta)
    write_file(tmp_path / "delta", "delta", tensors, meta)
    with pytest.raises(DeltaError, match="contradicts itself"):
        apply_delta(base, tmp_path / "delta")
    assert_same(base, before)


# -- writes that do not end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(pathlib.Path, "write_bytes", half_a_write), (os, "replace", no_replace)]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(owner, name, failure, tmp_path, monkeypatch):
    base = Odd()
    mask = odd_mask(base)
    old = trained(base, mask)
    save_delta(old, mask, tmp_path / "delta")
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_delta(trained(base, mask, seed=2), mask, tmp_path / "delta")
    with pytest.raises((OSError, KeyboardInterrupt)):
        merge_deltas([tmp_path / "delta"], tmp_path / "delta", base)
    monkeypatch.undo()
    apply_delta(base, tmp_path / "delta")
    assert_same(base, snapshot(old))
    assert os.listdir(tmp_path) == ["delta"]


KILLED = """
import os, signal, sys, pathlib, torch
from fsam_triton import FishMask, save_delta

def killed(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.write_bytes = killed
model = torch.nn.Linear(4, 4)
save_delta(model, FishMask.random(model, 0.5), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_that_is_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    base = small_delta(tmp_path / "delta")
    before = (tmp_path / "delta").read_bytes()
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "delta")], check=False)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "delta").read_bytes() == before
    apply_delta(base, tmp_path / "delta")
