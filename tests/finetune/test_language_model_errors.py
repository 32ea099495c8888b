"""What a language model cannot be trained from, or with: it is said before training, in one line."""

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("peft")

from fsam_triton import finetune  # noqa: E402
from fsam_triton.finetune import sft  # noqa: E402
from fsam_triton.finetune.checks import check_arguments  # noqa: E402
from fsam_triton.finetune.errors import InputError  # noqa: E402
from fsam_triton.finetune.options import TASK_OF, Arguments  # noqa: E402
from tests.finetune.gpt import word_tokenizer, write_rows  # noqa: E402
from tests.finetune.running import WORDS, trained  # noqa: E402

USER, ANSWER, SYSTEM = ({"role": role, "content": "the film"} for role in ("user", "assistant", "system"))


def error_of(options, capsys):
    """Run the command line; return the one line that it ends with."""
    assert finetune.main(options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fsam-finetune")]
    return line.removeprefix("fsam-finetune: error: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text_column_names", "a,b"], "Invalid --text_column_names: a,b; must be one column"),
        (["--max_seq_length", "1"], "Invalid --max_seq_length: 1; must be > 1, or there is nothing to predict"),
        (["--model_name_or_path", "/no/such"], "--model_name_or_path /no/such: no such folder"),
        (["--lora", "--lora_target_modules", "nothing"], "--lora_target_modules: Target modules {'nothing'} not found"),
        (["--lora", "--lora_target_modules", "lm_head"], "--lora_target_modules: TRL trains no adapter of the output"),
        (["--train_file", "gone.txt"], "gone.txt: No such file or directory"),
    ],
)
def test_unusable_input_stops_before_training_with_one_line(lm_options, tmp_path, capsys, more, message):
    assert error_of([*lm_options, *more], capsys).startswith(message)
    assert not list(tmp_path.glob("out/*"))


# -- options -----------------------------------------------------------------------------------------------------------

VALUES = {
    "task_name": "rte",
    "test_file": "a.csv",
    "label_column_name": "stars",
    "trainable": "fish",
    "gamma": 1.0,
    "mixup_where": "pooled",
    "packing_strategy": "wrapped",
    "lora_target_modules": ["c_attn"],
}
SWITCHES = {"save_delta", "resume_from_checkpoint", "packing", "gradient_checkpointing", "lora"}


@pytest.mark.parametrize("name", TASK_OF)
def test_option_of_the_other_task_is_refused_by_name(name):
    (other,) = {"sequence-classification", "causal-lm"} - {TASK_OF[name]}
    value = name in SWITCHES or VALUES.get(name, 1)
    with pytest.raises(InputError, match=f"^--{name} has no meaning for --task {other}, only for {TASK_OF[name]}$"):
        check_arguments(Arguments(task=other, **{name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": True}, "--lora needs --model_name_or_path: an adapter is of a pretrained model"),
        ({"lora_r": 16}, "--lora_r needs --lora"),
        ({"lora": True, "lora_r": 0}, "Invalid --lora_r: 0; must be > 0"),
        ({"lora": True, "lora_alpha": -1.0}, "Invalid --lora_alpha: -1.0; must be > 0"),
        ({"lora": True, "lora_dropout": 1.0}, "Invalid --lora_dropout: 1.0; must be in [0, 1)"),
        (
            {"lora": True, "model_name_or_path": "gpt", "dtype": "bfloat16", "master_weights": "24bit"},
            "--master_weights and --backup_format exclude --lora: PEFT keeps an adapter in float32",
        ),
        ({"packing_strategy": "bfd"}, "--packing_strategy needs --packing"),
        ({"l2_sp": 0.1}, "--l2_sp needs pretrained weights that are trained: --model_name_or_path without --lora"),
        ({"validation_file": "a.txt"}, "--validation_file and --text_column_names need --train_file"),
        ({"rho": -1.0}, "Invalid --rho: -1.0; must be >= 0 and finite"),
    ],
)
def test_options_that_cannot_be_together_are_refused(options, message):
    with pytest.raises(InputError) as error:
        check_arguments(Arguments(task="causal-lm", **options))
    assert str(error.value) == message


def test_defaults_are_those_of_the_task():
    names = ("max_seq_length", "num_train_epochs", "per_device_train_batch_size", "learning_rate")
    some = {"task": "causal-lm", "model_name_or_path": "gpt"}
    for options, values in (
        ({"train_file": "a.csv"}, (96, 4.0, 16, 2e-4)),
        (some, (1024, 3.0, 8, 2e-5)),
        ({**some, "lora": True}, (1024, 3.0, 8, 2e-4)),
        ({"task": "causal-lm"}, (1024, 3.0, 8, 2e-3)),
    ):
        arguments = Arguments(**options)
        assert tuple(getattr(arguments, name) for name in names) == values
        check_arguments(arguments)
    assert Arguments(**some, lora=True).sam_type == ["none", "momentum-sam", "sam"]
    assert Arguments(**some, sam_type=["esam"]).gamma == 1.0


@pytest.mark.parametrize(("more", "missing"), [([], "trl and datasets"), (["--lora"], "trl and datasets and peft")])
def test_missing_packages_say_what_to_install(lm_options, capsys, monkeypatch, more, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = f"--task causal-lm needs {missing}: pip install 'fsam-triton[lm]'"
    assert error_of([*lm_options, *more], capsys) == message


def test_several_processes_are_refused(lm_options, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    assert error_of(lm_options, capsys) == "--task causal-lm trains in one process: start it without torchrun"


# -- models ------------------------------------------------------------------------------------------------------------


def test_encoder_that_sees_the_tokens_to_predict_is_refused(lm_options, tiny_bert, tmp_path, capsys):
    model = transformers.AutoModel.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path / "bert")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "bert")
    message = error_of([*lm_options, "--model_name_or_path", str(tmp_path / "bert")], capsys)
    assert message.endswith("'bert' sees the tokens that it is to predict; it is no causal language model")


def test_model_without_a_language_model_is_refused(lm_options, tmp_path, capsys):
    transformers.ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "vit")
    message = error_of([*lm_options, "--model_name_or_path", str(tmp_path / "vit")], capsys)
    assert message.endswith("vit: 'vit' has no causal language model")


def test_adapter_in_place_of_a_model_is_refused(lm_options, tmp_path, capsys):
    trained(lm_options, "--sam_type", "none", "--lora", "--max_steps", "1")
    options = [*lm_options, "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "new")]
    assert error_of(options, capsys).endswith("out: an adapter of PEFT's; merge it into its model first")


def test_tokenizer_without_an_end_of_text_is_refused(lm_options, tiny_gpt, tmp_path, capsys):
    transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt).save_pretrained(tmp_path / "gpt")
    word_tokenizer(WORDS, eos_token=None).save_pretrained(tmp_path / "gpt")
    message = error_of([*lm_options, "--model_name_or_path", str(tmp_path / "gpt")], capsys)
    assert message.endswith("gpt: its tokenizer has no token for the end of a text")


def test_tokenizer_without_padding_pads_with_the_end_of_text(lm_options, tiny_gpt, tmp_path):
    assert transformers.AutoTokenizer.from_pretrained(tiny_gpt).pad_token is None
    trained(lm_options, "--sam_type", "none", "--max_steps", "1")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "</s>"


# -- texts -------------------------------------------------------------------------------------------------------------


def test_file_with_one_text_needs_a_validation_file(lm_options, tmp_path, capsys):
    path = write_rows(tmp_path / "one.jsonl", {"text": "the film was good"})
    index = lm_options.index("--validation_file")
    alone = lm_options[:index] + lm_options[index + 2 :]
    message = error_of([*alone, "--train_file", path], capsys)
    assert message == f"{path}: too few texts to hold any out for validation; give --validation_file"
    (run,) = trained(lm_options, "--train_file", path, "--validation_file", path, "--sam_type", "sam")
    assert len(run.losses) == 3


def test_messages_need_a_chat_template_that_accepts_them(lm_options, tiny_gpt, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER]})
    files = ["--train_file", path, "--validation_file", path]
    message = error_of([*lm_options, *files], capsys)
    assert message == f"{path}:2: refused by the model's chat template (who is system)"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt).save_pretrained(tmp_path / "gpt")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "gpt")
    message = error_of([*lm_options, *files, "--model_name_or_path", str(tmp_path / "gpt")], capsys)
    assert message.endswith(f"gpt: its tokenizer has no chat template, which {path} needs")
    index = lm_options.index("--model_name_or_path")
    message = error_of([*lm_options[:index], *lm_options[index + 2 :], *files], capsys)
    assert message == f"{path}: messages need --model_name_or_path: a tokenizer with a chat template"


def test_validation_texts_must_be_of_the_kind_of_the_training_texts(lm_options, sentences, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": [USER], "completion": [ANSWER]})
    message = error_of([*lm_options, "--validation_file", path], capsys)
    assert message == f"{path}: prompt and completion as messages, but {sentences} has text as strings"
    other = write_rows(tmp_path / "b.jsonl", {"prompt": "the", "completion": " film"})
    message = error_of([*lm_options, "--train_file", path, "--validation_file", other], capsys)
    assert message == f"{other}: prompt and completion as strings, but {path} has prompt and completion as messages"


def test_texts_longer_than_the_model_takes_are_cut(lm_options, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("the film was good " * 30 + "\n\n" + "the plot was bad\n")
    path = str(tmp_path / "long.txt")
    options = [*lm_options, "--train_file", path, "--validation_file", path, "--sam_type", "none"]
    trained(options, "--max_length", "512")
    assert "texts are cut to 24 tokens: model and tokenizer take no more" in capsys.readouterr().out
    trained(options, "--block_size", "8")
    assert "texts are cut" not in capsys.readouterr().out


def test_prompts_that_leave_no_room_for_a_completion_are_left_out_and_counted(lm_options, tmp_path, capsys):
    long = {"prompt": "the film was good " * 9, "completion": " fine"}
    rows = [{"prompt": "the film", "completion": " fine"}, long, {"prompt": "", "completion": " "}]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    options = [*lm_options, "--train_file", path, "--validation_file", path, "--sam_type", "none", "--max_steps", "1"]
    trained(options)
    printed = capsys.readouterr().out
    assert "\nempty texts that are left out: 1\n" in printed
    assert "\ntraining texts without a token to predict, left out: 1\n" in printed
    assert "\nvalidation texts without a token to predict, left out: 1\n" in printed
    path = write_rows(tmp_path / "b.jsonl", long, long)
    for more in ([], ["--packing"]):
        message = error_of([*options, "--overwrite_output_dir", "--train_file", path, *more], capsys)
        assert message == "no training text has a token to predict within --max_seq_length 24"


@pytest.mark.parametrize(("strategy", "rows"), [("bfd", 1), ("bfd_split", 3), ("wrapped", 3)])
def test_packing_cuts_long_texts_or_splits_them(lm_options, tmp_path, strategy, rows):
    (tmp_path / "long.txt").write_text("the film was good " * 15 + "\n")
    files = ["--train_file", str(tmp_path / "long.txt"), "--validation_file", str(tmp_path / "long.txt")]
    seen = []
    train = sft.Trainer.train

    def noted(self, texts, *more):
        seen.append(len(texts))
        return train(self, texts, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.Trainer, "train", noted)
        trained(lm_options, *files, "--sam_type", "none", "sam", "--packing", "--packing_strategy", strategy)
    assert seen == [rows, rows]
