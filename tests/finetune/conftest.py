"""What tests of the command line share: a tiny model, a few texts, and options that use them."""

import pytest
import torch

from tests.finetune.gpt import lm_options, sentences, tiny_gpt  # noqa: F401
from tests.finetune.running import SPECIAL, WORDS


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
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
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
        "--report",
        "none",
    ]
