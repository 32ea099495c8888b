"""Files of a FishMask: whole or not there."""

import os
import pathlib
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from fsam_triton import FishMask
from fsam_triton.files import read_file, write_file
from tests.masks.fish_masks import odd_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def with_gaps(*gaps: int) -> FishMask:
    indices = torch.tensor(gaps).cumsum(0) - 1
    return FishMask({"w": indices}, {"w": (int(indices[-1]) + 3,)})


FILES = {
    "odd": FishMask.from_scores(odd_scores(), 0.3),
    "all": FishMask.from_scores(odd_scores(), 1.0),
    "nothing": FishMask({}, {"w": (3, 4), "empty": (0,)}),
    "no_parameters": FishMask({}, {}),
    "odd_names": FishMask({"a/b.ü \"'": torch.tensor([1])}, {"a/b.ü \"'": (2,), "": (1,)}),
    "uint8": with_gaps(1, 254, 255, 256, 257, 510, 511, 512, *[3] * 50),
    "uint16": with_gaps(1, 65535, 65536, 65537, 131071, *[40_000] * 50),
    "int32": with_gaps(3, *[10**6] * 50),
    "int64": with_gaps(3, 2**31 - 1, 2**31, 2**31 + 1, 2**33),
}


@pytest.mark.parametrize("mask", FILES.values(), ids=FILES)
def test_masks_come_back_from_their_files(mask, tmp_path):
    mask.save(tmp_path / "mask")
    back = FishMask.load(str(tmp_path / "mask"))
    assert back == mask
    assert list(back.shapes) == list(mask.shapes)
    assert back.shapes == mask.shapes
    assert os.listdir(tmp_path) == ["mask"]


@pytest.mark.parametrize("name", ["uint8", "uint16", "int32"])
def test_gaps_are_stored_in_the_smallest_type(name, tmp_path):
    FILES[name].save(tmp_path / "mask")
    tensors, _ = read_file(tmp_path / "mask", "FishMask")
    assert tensors["gaps/w"].dtype == getattr(torch, name)


def test_a_mask_of_one_in_200_takes_a_byte_and_a_half_for_each_weight(tmp_path):
    """The mean gap is 200; exp(-255 / 200) of the gaps are above 254 and take more than one byte: 1.4 on average."""
    scores = {"w": torch.rand(2_000_000, generator=torch.Generator().manual_seed(0))}
    FishMask.from_scores(scores, 0.005).save(tmp_path / "mask")
    assert (tmp_path / "mask").stat().st_size < 1.5 * 10_000


def test_parameters_that_are_selected_whole_take_no_room(tmp_path):
    FishMask({"w": torch.arange(100_000)}, {"w": (100_000,)}).save(tmp_path / "mask")
    assert (tmp_path / "mask").stat().st_size < 500


def test_the_same_mask_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        FishMask.from_scores(odd_scores(), 0.3).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_byte_that_is_changed_is_noticed(tmp_path):
    path = tmp_path / "mask"
    FishMask({"w": torch.tensor([1, 5, 300])}, {"w": (20, 20), "b": (2,)}).save(path)
    data = path.read_bytes()
    for i in range(len(data)):
        for changed in (data[i] ^ 1, data[i] ^ 0x80):
            path.write_bytes(data[:i] + bytes([changed]) + data[i + 1 :])
            with pytest.raises(ValueError, match=r"damaged|must be a FishMask file"):
                FishMask.load(path)


def test_every_truncation_and_anything_appended_is_noticed(tmp_path):
    path = tmp_path / "mask"
    FishMask({"w": torch.tensor([1, 5, 300])}, {"w": (20, 20), "b": (2,)}).save(path)
    data = path.read_bytes()
    for cut in (*(data[:i] for i in range(len(data))), data + b"\0", data + data):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"damaged|not a FishMask"):
            FishMask.load(path)


FOREIGN = {
    "text": b"keep_ratio: 0.5\n",
    "list": (4).to_bytes(8, "little") + b"[{}]",
    "string": (18).to_bytes(8, "little") + b'{"__metadata__":1}',
    "pickle": pickle.dumps({"w": [1, 2]}),
    "zeros": bytes(100),
    "long_header": b"\xff" * 100,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "mask").write_bytes(content)
    with pytest.raises(ValueError, match="mask is not a FishMask file of fsam_triton"):
        FishMask.load(tmp_path / "mask")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_files_of_others_are_refused(metadata, tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "mask", metadata=metadata)
    with pytest.raises(ValueError, match="is not a FishMask file of fsam_triton"):
        FishMask.load(tmp_path / "mask")


def test_files_of_another_kind_or_version_are_refused_by_what_they_are(tmp_path, monkeypatch):
    write_file(tmp_path / "other", "delta", {}, {})
    with pytest.raises(ValueError, match="is a delta file of version 1; must be a FishMask file of version 1"):
        FishMask.load(tmp_path / "other")
    write_file(tmp_path / "newer", "FishMask", {}, {"version": 2})
    with pytest.raises(ValueError, match="is a FishMask file of version 2"):
        FishMask.load(tmp_path / "newer")


def test_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        FishMask.load(tmp_path / "mask")


def half_a_write(path: pathlib.Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("no space left on device")


def no_replace(*paths: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name", "failure"), [(pathlib.Path, "write_bytes", half_a_write), (os, "replace", no_replace)]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(owner, name, failure, tmp_path, monkeypatch):
    old, new = FILES["odd"], FILES["all"]
    old.save(tmp_path / "mask")
    monkeypatch.setattr(owner, name, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        new.save(tmp_path / "mask")
    monkeypatch.undo()
    assert FishMask.load(tmp_path / "mask") == old
    assert os.listdir(tmp_path) == ["mask"]


def test_errors_of_files_name_the_file(tmp_path):
    (tmp_path / "nonsense").write_bytes(b"x")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "nonsense"))):
        FishMask.load(tmp_path / "nonsense")
