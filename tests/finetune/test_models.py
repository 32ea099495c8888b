"""The pretrained model and its texts: loading, encoding, saving."""

import math

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
    arguments = parse([*options, "--sam_type", sam_type])
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


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ROBERTA = {**SIZES, "max_position_embeddings": 24}
# Of each architecture the options of a small one, and the tokens that it has positions for.
POSITIONS = {
    "Bert": ({**SIZES, "max_position_embeddings": 24}, 24),
    "DistilBert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 24}, 24),
    "Roberta": ({**ROBERTA, "pad_token_id": 1}, 22),
    "XLMRoberta": ({**ROBERTA, "pad_token_id": 3}, 20),
    "MPNet": (ROBERTA, 22),
    "GPT2": ({"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}, 24),
    "XLNet": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, math.inf),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_longest_text_that_a_model_has_positions_for_fits_into_it(kind):
    sizes, limit = POSITIONS[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=20, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    assert models.position_limit(model) == limit
    words = torch.full((1, 60 if limit == math.inf else limit), 7)
    with torch.no_grad():
        assert model(input_ids=words).logits.isfinite().all()
        if limit < math.inf:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 7))


@pytest.fixture
def unlimited(tiny_bert, tmp_path):
    """The tiny model, with a tokenizer that knows no longest text."""
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, model_max_length=int(1e30))
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_texts_are_cut_to_the_positions_of_the_model_whatever_the_tokenizer_says(
    unlimited, options, reviews, tmp_path, capsys
):
    long = tmp_path / "long.csv"
    long.write_text("label,text\n" + "".join(f"{label},{'the film was ' * 30}\n" for label in ("pos", "neg") * 4))
    options = [*options, "--train_file", str(long), "--validation_file", str(long), "--sam_type", "sam"]
    assert models.load_tokenizer(unlimited).model_max_length > 1000
    trained(options, "--model_name_or_path", unlimited, "--max_seq_length", "512")
    assert "texts are cut to 32 tokens: model and tokenizer take no more" in capsys.readouterr().out
    trained(options, "--model_name_or_path", unlimited, "--max_seq_length", "16")
    assert "texts are cut" not in capsys.readouterr().out
