"""Adapters of transformers models: a delta, and what it takes to make the model again."""

import json
import os

import pytest
import torch

from fsam_triton import DeltaError, FishMask, from_pretrained, save_delta, save_pretrained
from tests.sparse_training.deltas import assert_same, no_replace, snapshot, trained

pytestmark = pytest.mark.usefixtures("one_thread")


LABELS = {0: "business", 1: "politics", 2: "sports"}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base_dir(transformers, tmp_path_factory):
    """A saved encoder without a classifier."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def classifier(transformers, folder, dtype=torch.float32):
    """A model with a new head, trained in a few of its weights, and its mask."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=LABELS, label2id={name: i for i, name in LABELS.items()}, dtype=dtype
    )
    mask = FishMask.random(base, 0.05, always_trainable=["classifier"])
    model = trained(base, mask)
    with torch.no_grad():
        for p in model.parameters():
            p.nan_to_num_(0.5, 0.5, 0.5)
    return model.eval(), mask


@pytest.mark.parametrize("given", ["path", "recorded", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_gives_the_trained_model_with_its_labels_and_new_head(transformers, base_dir, dtype, given, tmp_path):
    model, mask = classifier(transformers, base_dir, dtype)
    save_pretrained(model, mask, tmp_path / "a" / "adapter")
    torch.manual_seed(77)
    own = transformers.BertForSequenceClassification.from_pretrained(base_dir, num_labels=3, dtype=dtype)
    base = {"path": base_dir, "recorded": None, "model": own}[given]
    back = from_pretrained(base, tmp_path / "a" / "adapter")
    assert type(back) is type(model)
    assert (back is own) == (given == "model")
    assert not back.training
    assert_same(back, snapshot(model))
    if given != "model":
        assert back.config.id2label == LABELS
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert sorted(os.listdir(tmp_path / "a" / "adapter")) == ["fsam_delta.safetensors", "fsam_delta_config.json"]


def test_adapter_remembers_the_dtype_the_model_was_cast_to(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model.bfloat16(), mask, tmp_path)
    assert_same(from_pretrained(base_dir, tmp_path), snapshot(model))


def test_base_may_have_a_head_for_other_labels(transformers, base_dir, tmp_path):
    other = transformers.BertForSequenceClassification.from_pretrained(base_dir, num_labels=7)
    other.save_pretrained(tmp_path / "other")
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    assert_same(from_pretrained(tmp_path / "other", tmp_path), snapshot(model))


def test_adapter_config_says_what_it_was_made_from_and_with(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    config = json.loads((tmp_path / "fsam_delta_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_dir)
    assert config["architecture"] == "BertForSequenceClassification"
    assert config["dtype"] == "float32"
    assert config["keep_ratio"] == mask.density
    assert config["trained_weights"] == mask.count
    assert config["versions"].keys() == {"fsam_triton", "torch", "transformers"}
    assert config["config"]["id2label"] == {str(i): name for i, name in LABELS.items()}


def test_loading_an_adapter_reports_no_new_weights(transformers, base_dir, tmp_path, caplog, capfd):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    verbosity = transformers.logging.get_verbosity()
    capfd.readouterr()
    caplog.clear()
    from_pretrained(base_dir, tmp_path)
    assert "newly initialized" not in caplog.text + "".join(capfd.readouterr())
    assert transformers.logging.get_verbosity() == verbosity


def test_new_parameters_that_are_not_selected_whole_are_named(transformers, base_dir, tmp_path):
    model, _ = classifier(transformers, base_dir)
    save_pretrained(model, FishMask.random(model, 0.05), tmp_path)
    with pytest.raises(DeltaError, match=r"differ in 'classifier.weight'.*\(always_trainable\)"):
        from_pretrained(base_dir, tmp_path)


def test_adapter_files_of_two_savings_are_told_apart(transformers, base_dir, tmp_path):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    save_delta(trained(model, mask, seed=3), mask, tmp_path / "fsam_delta.safetensors")
    with pytest.raises(DeltaError, match="is damaged, or not the one"):
        from_pretrained(base_dir, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"delta_sha256": 1}'])
def test_damaged_adapter_config_is_refused(transformers, base_dir, content, tmp_path):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    (tmp_path / "fsam_delta_config.json").write_text(content)
    with pytest.raises(DeltaError, match=r"fsam_delta_config.json was not written by save_pretrained, or is damaged"):
        from_pretrained(base_dir, tmp_path)


@pytest.mark.parametrize("architecture", ["BertForEverything", "AutoConfig", "logging", "__name__"])
def test_architecture_that_is_no_model_of_transformers_is_refused(transformers, base_dir, architecture, tmp_path):
    save_pretrained(*classifier(transformers, base_dir), tmp_path)
    config = json.loads((tmp_path / "fsam_delta_config.json").read_text())
    (tmp_path / "fsam_delta_config.json").write_text(json.dumps({**config, "architecture": architecture}))
    with pytest.raises(DeltaError, match=f"has no model '{architecture}'"):
        from_pretrained(base_dir, tmp_path)


def test_adapter_that_cannot_be_written_leaves_the_old_one(transformers, base_dir, tmp_path, monkeypatch):
    model, mask = classifier(transformers, base_dir)
    save_pretrained(model, mask, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    monkeypatch.setattr(type(model.config), "to_json_string", no_replace)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(trained(model, mask, seed=4), mask, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_one_in_200_weights_of_minilm_take_less_than_a_hundredth_of_the_dense_checkpoint(transformers, tmp_path):
    """A random mask is the longest to write down. The shapes are the packaged all-MiniLM-L6-v2's."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=5
    )
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    mask = FishMask.random(model, 0.005, always_trainable=["classifier"])
    save_delta(model, mask, tmp_path / "delta")
    dense = 4 * sum(p.numel() for p in model.parameters())
    assert mask.count == 113_575
    assert (tmp_path / "delta").stat().st_size < 0.01 * dense
