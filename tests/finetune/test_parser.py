"""The words of a command line: what they mean, and what --help says about them."""

import dataclasses
import re

import pytest

from fsam_triton.finetune.errors import InputError
from fsam_triton.finetune.options import GROUPS, Arguments
from fsam_triton.finetune.parser import build_parser, parse


@pytest.fixture
def help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    return capsys.readouterr().out


def test_without_words_every_option_has_its_default():
    assert parse([]) == Arguments()


def test_words_become_values_of_the_options_types():
    words = "--sam_type sam fisher-sam --rho 0.1 --max_steps 7 --mask_unit 32 --train_file a.csv --trainable fish"
    arguments = parse(words.split())
    assert (arguments.sam_type, arguments.rho, arguments.max_steps) == (["sam", "fisher-sam"], 0.1, 7)
    assert (arguments.mask_unit, arguments.train_file, arguments.trainable) == (32, "a.csv", "fish")


@pytest.mark.parametrize(
    ("words", "value"), [([], False), (["--bf16"], True), (["--bf16", "True"], True), (["--bf16=false"], False)]
)
def test_a_switch_is_on_where_it_is_given_unless_it_says_false(words, value):
    assert parse(words).bf16 is value


@pytest.mark.parametrize("words", [["--train_file", "a-b.csv"], ["--train-file", "a-b.csv"], ["--train-file=a-b.csv"]])
def test_hyphens_of_an_option_are_underscores(words):
    assert parse(words).train_file == "a-b.csv"


def test_a_second_name_of_an_option_is_the_option():
    assert parse(["--mask_iter_e", "7"]).mask_interval == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainable", "some"], "argument --trainable: invalid choice: 'some'"),
        (["--mask_unit", "33"], "argument --mask_unit: invalid choice: '33'"),
        (["--sam_type", "none", "sgd"], "argument --sam_type: invalid choice: 'sgd'"),
        (["--rho"], "argument --rho: expected one argument"),
        (["--rh", "0.1"], "ambiguous option: --rh could match --rho"),
    ],
)
def test_words_that_are_no_values_are_named(words, message):
    with pytest.raises(InputError, match=message):
        parse(words)


def test_help_names_each_option_once_in_its_group(help_text):
    assert re.findall(r"^  (--\w+)", help_text, re.M) == [f"--{field.name}" for field in dataclasses.fields(Arguments)]
    assert re.findall(r"^(\S.*):$", help_text, re.M)[1:] == list(GROUPS.values())


def test_help_fits_into_eighty_columns(help_text):
    assert max(map(len, help_text.splitlines())) <= 80


def test_help_says_what_every_option_does_and_its_default(help_text):
    words = " ".join(help_text.split())
    assert "--rho X|auto radius of the perturbation; auto: found before each run (default: 0.02; asam 0.1" in words
    assert "(default: 0.1 or 0.005)" in words
    assert "--l2_sp X decay of the pretrained parameters towards their initial values (default: 0.0)" in words
    assert "--bf16 torch.autocast in bfloat16 over fp32 weights --" in words
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    assert all(action.help for action in actions)
