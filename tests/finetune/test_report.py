"""What is measured of a run and how it is shown."""

import gc
import mmap

import pytest

from fsam_triton.files import written_whole
from fsam_triton.finetune.report import PeakMemory, Run, format_table, plot_curves

RUN = Run(
    "FSAM",
    losses=[1.0, 0.5],
    step_seconds=[9.0, 0.1, 0.3],
    evaluations=[(1, 0.5, 1.0), (2, 0.75, 0.25)],
    peak_memory_bytes=3 * 2**20,
)


def test_table_shows_the_last_evaluation_the_median_step_and_the_peak():
    assert format_table([RUN], "words").splitlines()[1].split() == ["FSAM", "0.7500", "0.2500", "0.300", "3"]


def test_peak_memory_sees_what_was_freed_before_the_end():
    pytest.importorskip("psutil")
    gc.collect()  # What earlier tests have left could be freed in between.
    with PeakMemory("cpu") as idle:
        pass
    # Not a tensor: malloc may serve one from memory that earlier tests freed but the process still holds.
    with PeakMemory("cpu") as peak, mmap.mmap(-1, 256 * 2**20) as block:
        block.write(b"x" * len(block))
    assert peak.bytes > idle.bytes + 200 * 2**20


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    plot_curves([RUN], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with written_whole(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "old")]
