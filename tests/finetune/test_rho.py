"""``--rho auto``: each run trains with the rho that is found for it, and says so."""

import pytest

transformers = pytest.importorskip("transformers")

from fsam_triton.finetune.checks import check_arguments  # noqa: E402
from fsam_triton.finetune.errors import InputError  # noqa: E402
from fsam_triton.finetune.html import draw_pictures  # noqa: E402
from fsam_triton.finetune.options import AUTO_RHO, SAM_TYPES, Arguments  # noqa: E402
from fsam_triton.finetune.parser import parse  # noqa: E402
from tests.finetune.running import results, trained  # noqa: E402


def test_rho_that_is_found_trains_as_if_it_had_been_given(options, tmp_path, capsys):
    baseline, run = trained(options, "--sam_type", "none", "sam", "--rho", "auto")
    search = results(tmp_path)["runs"][1]["rho_search"]
    assert baseline.rho_search is None
    assert run.rho_search == search | {key: tuple(search[key]) for key in ("rhos", "losses")}
    assert f"SAM: rho {search['rho']:.3g} raises the loss of a batch by 0.01 of it" in capsys.readouterr().out
    assert results(tmp_path)["arguments"]["rho"] == "auto"
    (given,) = trained(options, "--sam_type", "sam", "--rho", repr(search["rho"]))
    assert given.rho_search is None
    assert given.losses == run.losses


def test_curve_is_drawn_where_rho_was_searched(options):
    runs = trained(options, "--max_steps", "1", "--sam_type", "none", "gsam", "--rho", "auto")
    assert "rho" in draw_pictures(runs, {})
    assert "rho" not in draw_pictures(runs[:1], {})


@pytest.mark.parametrize("sam_type", sorted(SAM_TYPES.keys() - AUTO_RHO - {"none"}))
def test_rho_of_another_scale_is_not_searched(sam_type):
    message = f"--rho auto has no meaning for --sam_type {sam_type}, only for sam, gsam, fisher-sam, fisher-gsam"
    with pytest.raises(InputError, match=f"^{message}$"):
        check_arguments(parse(["--sam_type", sam_type, "--rho", "auto"]))


def test_types_of_another_scale_keep_their_own_rho_in_a_comparison():
    arguments = parse(["--sam_type", "sam", "asam", "momentum-sam", "--rho", "auto"])
    check_arguments(arguments)
    assert [arguments.rho_of(sam_type) for sam_type in arguments.sam_type] == ["auto", 0.1, 0.05]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_type": ["none"]}, "--rho has no meaning for --sam_type none"),
        ({"sam_type": ["sam"], "trainable": "bitfit"}, "--rho auto and --trainable bitfit exclude each other"),
        ({"task": "causal-lm"}, "--rho auto needs --task sequence-classification"),
        ({"gradient_accumulation_steps": 2}, "--rho auto needs --gradient_accumulation_steps 1"),
        ({"sam_type": ["sam"], "ascent_fraction": 0.5}, "--rho auto needs --ascent_fraction 1"),
        ({"rho_follows": "cosine", "rho_min": 0.01}, "--rho auto and --rho_min exclude each other"),
    ],
)
def test_options_that_contradict_a_search_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_arguments(Arguments(rho="auto", **options))


@pytest.mark.parametrize("sam_type", sorted(AUTO_RHO))
def test_types_with_the_scale_of_sam_are_accepted(sam_type):
    check_arguments(Arguments(sam_type=["none", sam_type], rho="auto"))


def test_word_that_is_no_radius_is_named():
    with pytest.raises(InputError, match="--rho: invalid radius value: 'automatic'"):
        parse(["--rho", "automatic"])
