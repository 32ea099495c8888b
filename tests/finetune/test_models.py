"""The pretrained model and its texts: loading, encoding, saving."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fsam_triton.finetune import command, models, training  # noqa: E402
from fsam_triton.finetune.parser import parse  # noqa: E402
from fsam_triton.finetune.texts import read_texts  # noqa: E402
from tests.finetune.running import trained  # noqa: E402


def test_only_the_head_is_novel(tiny_bert):
    _, novel = models.load_model(tiny_bert, ["a", "b", "c"])
    assert novel == {"classifier.weight", "classifier.bias"}


def test_head_of_a_classifier_with_other_labels_is_novel(options, tmp_path):
    trained(options, "--sam_type", "none", "--max_steps", "1")
    _, novel = models.load_model(str(tmp_path / "out"), ["a", "b", "c"])
    assert novel == {"classifier.weight", "classifier.bias"}


def test_pairs_are_encoded_as_two_segments(tiny_bert, tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,label\nthe film,was good,1\n")
    texts = read_texts(tmp_path / "pairs.csv")
    (feature,) = models.encode(models.load_tokenizer(tiny_bert), texts, 32)
    assert feature["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_texts_are_cut_to_max_seq_length(tiny_bert, reviews):
    features = models.encode(models.load_tokenizer(tiny_bert), read_texts(reviews), 4)
    assert {len(feature["input_ids"]) for feature in features} == {4}


@pytest.mark.parametrize("sam_type", ["fisher-sam", "momentum-sam"])
def test_saved_model_has_normal_size_and_reloads_with_identical_logits(options, tiny_bert, tmp_path, sam_type):
    arguments = parse(options)
    tokenizer = models.load_tokenizer(tiny_bert)
    train, _ = command.read_data(arguments)
    features = models.encode(tokenizer, train, 32, ["neg", "pos"])
    trainer = training.Trainer(arguments, sam_type, tiny_bert, ["neg", "pos"], tokenizer, total_steps=4)
    trainer.train(features, features)
    models.save(trainer.model, tokenizer, tmp_path / "saved")

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

    tokenizer = models.load_tokenizer(tiny_bert)
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    model, _ = models.load_model(tiny_bert, ["a", "b", "c"])
    with pytest.raises(OSError, match="no space"):
        models.save(model, tokenizer, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
