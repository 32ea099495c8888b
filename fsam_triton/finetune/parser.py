"""Makes `Arguments` of the words of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import InputError
from .options import DEFAULTS, GROUPS, MEANINGS, Arguments

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """Raises an InputError for what argparse would print with the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise InputError(f"{message}; --help lists the options")


class HelpFormatter(argparse.HelpFormatter):
    """Shows each option's default, except None and off; their meaning is in the option's own text."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, max_help_position=32, **keywords)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "(default:" in text:
            return text
        defaults = [str(m.default) for m in MEANINGS if m.option == action.dest and m.default is not None]
        defaults += [str(values[action.dest]) for values in DEFAULTS.values() if action.dest in values]
        if not defaults and not any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            defaults = [str(action.default)]
        return f"{text} (default: {' or '.join(defaults)})" if defaults else text

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)


def build_parser() -> Parser:
    """Return the parser of the command line; it leaves words that it does not know."""
    parser = Parser(
        prog="fsam-finetune",
        description="Fine-tunes a text classifier or a causal language model with AdamW or a sharpness-aware "
        "optimizer, or compares several.",
        formatter_class=HelpFormatter,
        usage="%(prog)s [options]",
    )
    kinds, group = typing.get_type_hints(Arguments), parser
    for field in dataclasses.fields(Arguments):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        keywords = {"default": field.default, **field.metadata, **_keywords(kinds[field.name]), **field.metadata}
        group.add_argument(f"--{field.name}", *keywords.pop("aliases", ()), **keywords)
    return parser


def _keywords(kind: Any) -> dict[str, Any]:
    """Return what argparse needs to know of an option of a type."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind, *_ = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        return {"choices": list(choices.values()), "type": lambda word: choices.get(word, word)}
    if typing.get_origin(kind) is list:
        return {"nargs": "+"}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _truth}
    return {"type": kind, "metavar": _METAVARS[kind]}


def _truth(word: str) -> bool:
    if word.lower() not in _TRUTH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return _TRUTH[word.lower()]


def parse(words: Sequence[str]) -> Arguments:
    """Return the `Arguments` that the words of a command line ask for; ``--help`` prints and exits.

    Raises:
        InputError: a word is not an option, or not a value of one.
    """
    for word in words:
        if word != word.encode(errors="ignore").decode():
            raise InputError(f"{word!r} is not UTF-8")
    # --train-file is --train_file, as in other command lines of transformers.
    words = [re.sub(r"^--[^=]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in words]
    values, unknown = build_parser().parse_known_args(words)
    if unknown:
        raise InputError(f"unknown options: {' '.join(unknown)}; --help lists them")
    return Arguments(**vars(values))
