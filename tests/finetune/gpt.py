"""A tiny pretrained GPT, texts for it, and options that train it."""

import json

import pytest
import torch

from tests.finetune.running import WORDS, command_line

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('who is ' + m.role) }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word_tokenizer(words, **keywords):
    """A tokenizer of whole words; the end of a text is </s>."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate(["</s>", "<unk>", "<user>", "<assistant>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"eos_token": "</s>", "unk_token": "<unk>", **keywords},
        extra_special_tokens=["<user>", "<assistant>"],
    )


@pytest.fixture(scope="module")
def tiny_gpt(tmp_path_factory):
    """Folder with a GPT of one layer with tied weights, 24 positions, no padding token and a chat template."""
    transformers = pytest.importorskip("transformers")
    folder = str(tmp_path_factory.mktemp("tiny") / "gpt")
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=24,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Text file of 20 lines of different lengths."""
    texts = [f"the {WORDS[6 + i % 2]} was {' '.join(WORDS[:6][i % 3 :: i % 4 + 1])}" for i in range(20)]
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    path.write_text("\n".join(texts) + "\n")
    return str(path)


@pytest.fixture
def lm_options(tiny_gpt, sentences, tmp_path):
    """Options that train the tiny GPT on the lines and write to ``tmp_path/out``."""
    options = {
        "task": "causal-lm",
        "model_name_or_path": tiny_gpt,
        "train_file": sentences,
        "validation_file": sentences,
        "output_dir": tmp_path / "out",
        "learning_rate": 1e-2,
        "max_seq_length": 24,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
    }
    return [*command_line({**options, "report": "none"}), "--use_cpu"]


def write_rows(path, *rows):
    """Write one JSON object per line; return the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
