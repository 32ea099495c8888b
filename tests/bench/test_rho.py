"""What bench/rho.py makes of its runs, and how it reads its texts."""

import io
import pathlib
import tarfile
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("transformers")

from bench import rho
from bench.generalisation import put_into
from bench.records import recorded

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "rho.md"


def run(method, strength, seed, right, loss=0.5, **more):
    """The record of a run on 8 test texts, of which those with a 1 are right."""
    figures = {"accuracy": right.count("1") / 8, "loss": loss, "test_texts": 8, "right": f"{int(right, 2):x}"}
    return asdict(rho.setting_of(rho.FILM, method, strength, seed)) | figures | more


def grid(rights):
    return [run(rho.SAM, strength, seed, right) for strength, right in rights.items() for seed in rho.SEEDS]


def test_table_compares_the_suggestion_with_the_best_of_the_grid():
    records = grid({0.01: "00111111", 0.02: "01111111", 0.05: "00001111"})
    records += [run(rho.AUTO, 0.0, seed, "00111111", search={"rho": 0.0125}) for seed in rho.SEEDS]
    lines = rho.task_table(rho.FILM, records).splitlines()
    assert lines[1].split() == ["rho", "0.01", "0.02", "0.05", "auto"]
    assert lines[2].split() == ["seed", "1", "75.00", "87.50", "50.00", "75.00"]
    assert [line.split()[0] for line in lines[5:7]] == ["mean", "mean"]
    assert lines[7].startswith("0.05 less the best of the grid, 0.02: -37.50 [")
    assert lines[8].startswith("auto less the best of the grid, 0.02: -12.50 [")
    assert lines[9] == "auto: rho 0.0125, 0.0125, 0.0125"


def test_rho_that_lacks_a_seed_is_left_out():
    records = grid({0.01: "00111111", 0.02: "01111111"})[:-1]
    assert rho.task_table(rho.FILM, records).splitlines()[1].split() == ["rho", "0.01"]
    assert rho.task_table(rho.BBC, records) == ""


def test_leading_texts_that_are_wrong_count():
    bits = rho.right_bits(run(rho.SAM, 0.01, 1, "00010110"))
    assert bits.tolist() == [0, 0, 0, 1, 0, 1, 1, 0]


def test_interval_is_of_texts_and_of_seeds():
    same = grid({0.01: "00111111"})
    assert rho.points_apart(same, same) == (0.0, 0.0, 0.0)
    # Each of 3 seeds differs in one text of its own, so both draws spread the mean of 1/8.
    others = [run(rho.SAM, 0.02, seed, right) for seed, right in enumerate(("01111111", "10111111", "01111111"), 1)]
    mean, low, high = rho.points_apart(others, same)
    assert mean == 12.5
    assert low < 12.5 < high
    # Seeds that differ and texts that do not: of a run that is right in all texts and two that are in none, the mean
    # of three draws is 0 with probability 8/27 and 1 with 1/27, both more than 2.5 %.
    all_right, none_right = "11111111", "00000000"
    unequal = [run(rho.SAM, 0.02, seed, right) for seed, right in enumerate((all_right, none_right, none_right), 1)]
    assert rho.points_apart(unequal, grid({0.01: none_right})) == pytest.approx((100 / 3, 0.0, 100.0))


def test_judge_writes_which_texts_are_right():
    class Trainer:
        def logits(self, features):
            assert all("labels" not in feature for feature in features)
            return torch.eye(2)[[feature["answer"] for feature in features]]

    answers, labels = (0, 1, 1, 0, 1), (1, 1, 0, 0, 1)
    features = [{"answer": answer, "labels": label} for answer, label in zip(answers, labels, strict=True)]
    judged = rho.judge(Trainer(), features)
    assert rho.right_bits(judged).tolist() == [0, 1, 0, 1, 1]
    assert judged["accuracy"] == 0.6


@pytest.mark.slow
def test_page_has_the_tables_of_the_committed_file(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    put_into(copy, rho.report(recorded(rho.RESULTS)), rho.MARKER)
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def put(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_sentences_are_labelled_with_the_sign_of_their_rating(tmp_path):
    inner, path = io.BytesIO(), tmp_path / "sdist.tar.gz"
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        lines = "\ufeff1\t0.4\tGood \tone.\n2\t-1.2\tB\u00e4d.\n3\t0.0\tNeither.\n"
        put(archive, "hutto_ICWSM_2014/tweets_GroundTruth.txt", lines.encode())
    with tarfile.open(path, "w:gz") as archive:
        put(archive, "v-2.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    texts = rho.read_sentiments(path, "tweets")
    assert texts.rows == [("Good \tone.",), ("B\u00e4d.",)]
    assert texts.labels == ["1", "0"]
