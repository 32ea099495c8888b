"""Reads what a language model learns from: plain texts, conversations, prompts with their completions."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .texts import READERS, SUBSET_SEED, Records, decode, read_bbc_news, text_at, value_at, whole_characters

# The columns of the data types that TRL's SFTTrainer knows.
TEXT, CONVERSATION, COMPLETION = ("text",), ("messages",), ("prompt", "completion")


@dataclass
class Corpus:
    """Texts for a causal language model.

    Args:
        source: where they come from, for messages.
        columns: ``("text",)``, ``("messages",)`` or ``("prompt", "completion")``; the names that TRL knows.
        rows: one dict per text with these columns: strings, or lists of messages with ``role`` and ``content``.
        places: of each row, the file and the line, for messages.
        empty: how many texts without a character (other than white space) were left out.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_messages(self) -> bool:
        """Whether the rows need a chat template."""
        return isinstance(self.rows[0][self.columns[0]], list)

    @property
    def kind(self) -> str:
        """What each row is, in words."""
        return f"{' and '.join(self.columns)} as {'messages' if self.has_messages else 'strings'}"

    def select(self, indices: list[int]) -> Corpus:
        """Return the texts at ``indices``, in that order."""
        rows, places = [self.rows[i] for i in indices], [self.places[i] for i in indices]
        return Corpus(self.source, self.columns, rows, places, self.empty)

    def sample(self, count: int | None) -> Corpus:
        """Return ``count`` texts drawn at random (the same ones each time), or all when there are no more than that."""
        if count is None or count >= len(self):
            return self
        return self.select(sorted(random.Random(SUBSET_SEED).sample(range(len(self)), count)))

    def hold_out(self, fraction: float = 0.2) -> tuple[Corpus, Corpus]:
        """Split off a share of the texts, the same ones each time; return (the rest, those held out).

        Raises:
            InputError: there are too few.
        """
        count = int(len(self) * fraction)
        if not count:
            raise InputError(f"{self.source}: too few texts to hold any out for validation; give --validation_file")
        order = random.Random(SUBSET_SEED).sample(range(len(self)), len(self))
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))


def read_corpus(path: str | Path, text_column: str | None = None) -> Corpus:
    """Read a ``.txt`` file (one text per line), or one of the formats of `texts.read_texts`, UTF-8.

    Args:
        path: the file; its extension decides the format.
        text_column: the column with plain texts. Default: ``messages``, else ``prompt`` and ``completion``,
            else ``text``, else the only column.

    Returns:
        Corpus.

    Raises:
        InputError: the file is missing, not UTF-8, malformed, or has no text; it lacks a column; a text or a message
            cannot be used.
    """
    path = Path(path)
    readers = {".txt": _read_lines, **READERS}
    kind = path.suffix.lower()
    if kind not in readers:
        raise InputError(f"{path}: unknown extension '{path.suffix}'; accepted: {', '.join(readers)}")
    records = readers[kind](path, decode(path))
    if not records:
        raise InputError(f"{path}: no texts")
    source = _find_columns(path, list(records[0][1]), text_column)
    columns = source if source in (CONVERSATION, COMPLETION) else TEXT
    rows, places = [], []
    for line, record in records:
        row = {
            name: _content(path, line, record, column, columns) for name, column in zip(columns, source, strict=True)
        }
        if columns == COMPLETION and len({type(value) for value in row.values()}) > 1:
            raise InputError(f"{path}:{line}: 'prompt' and 'completion' must both be strings or both be messages")
        if not _is_empty(row):
            if rows and type(row[columns[0]]) is not type(rows[0][columns[0]]):
                now, before = ("strings", "lists of messages")[:: 1 if isinstance(row[columns[0]], str) else -1]
                raise InputError(f"{path}:{line}: {now}, where the rows before have {before}")
            rows.append(row)
            places.append(f"{path}:{line}")
    if not rows:
        raise InputError(f"{path}: no texts except empty ones")
    return Corpus(str(path), columns, rows, places, len(records) - len(rows))


def _read_lines(path: Path, text: str) -> Records:
    # Not splitlines(), which also splits at characters that may stand inside a text.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, {"text": line.removesuffix("\r")}) for number, line in lines if line.strip()]


def _find_columns(path: Path, columns: list[str], text_column: str | None) -> tuple[str, ...]:
    """Return the columns to read, of those of the first record."""
    if text_column:
        if text_column not in columns:
            raise InputError(f"{path}: no column '{text_column}'; the columns are: {', '.join(columns)}")
        return (text_column,)
    for usual in (CONVERSATION, COMPLETION, TEXT):
        if set(usual) <= set(columns):
            return usual
    if len(columns) == 1:
        return tuple(columns)
    known = "'text', 'messages', or 'prompt' and 'completion'"
    raise InputError(f"{path}: no columns {known}, and no --text_column_names; the columns are: {', '.join(columns)}")


def _content(
    path: Path, line: int, record: dict[str, Any], column: str, columns: tuple[str, ...]
) -> str | list[dict[str, str]]:
    """Return a string or a list of messages."""
    if columns == TEXT or (columns == COMPLETION and isinstance(record.get(column), str)):
        return text_at(path, line, record, column)
    messages = value_at(path, line, record, column)
    if not isinstance(messages, list) or not messages:
        expected = "a list of messages" if columns == CONVERSATION else "a string or a list of messages"
        raise InputError(f"{path}:{line}: '{column}' is {json.dumps(messages)}; {expected} is expected")
    for number, message in enumerate(messages):
        place = f"{column}[{number}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = ", ".join(message) if isinstance(message, dict) else json.dumps(message)
            raise InputError(f"{path}:{line}: '{place}' has {found or 'nothing'}; role and content are expected")
        for name, value in message.items():
            if not isinstance(value, str):
                raise InputError(f"{path}:{line}: '{place}.{name}' is {json.dumps(value)}; a string is expected")
            whole_characters(path, line, f"{place}.{name}", value)
    return messages


def _is_empty(row: dict[str, Any]) -> bool:
    """Whether a text has nothing but white space; a conversation has its roles."""
    return all(isinstance(value, str) and not value.strip() for value in row.values())


def read_packaged_news(train_per_label: int, validation_per_label: int) -> tuple[Corpus, Corpus]:
    """Return (training, validation) texts of the packaged BBC news articles, as `texts.read_bbc_news`."""
    train, validation = (
        Corpus(texts.source, TEXT, [{"text": text} for (text,) in texts.rows], [texts.source] * len(texts))
        for texts in read_bbc_news(train_per_label, validation_per_label)
    )
    return train, validation
