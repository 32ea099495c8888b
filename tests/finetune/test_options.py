"""The options of the command line: what they make of the library's arguments, and what they refuse."""

import pytest
import torch

from fsam_triton import FSAM, AdamWL2SP, FisherMask, FishMask, Mixup, MomentumSAM, Schedule
from fsam_triton.finetune.checks import check_arguments, check_mask, check_mixup
from fsam_triton.finetune.errors import InputError
from fsam_triton.finetune.optimizers import build_mixup, build_optimizer
from fsam_triton.finetune.options import FISHER, MEANINGS, RHO, SAM_TYPES, TRAINABLE, Arguments
from fsam_triton.optim.recipes import SAM_TYPES as FSAM_CODES_TYPES

EVERYTHING = {
    "alpha": 0.2,
    "beta": 0.25,
    "gamma": 0.75,
    "keep_ratio": 0.5,
    "mask_interval": 7,
    "mask_norm": "masked",
    "rho": 0.01,
}


def built(sam_type, total_steps=100, **options):
    arguments = Arguments(sam_type=[sam_type], **options)
    return build_optimizer(arguments, sam_type, torch.nn.Linear(8, 8), novel=(), total_steps=total_steps)


NO_BACKUP = (
    "--backup_format has no meaning for --sam_type none, only for sam, asam, esam, gsam, friendly-sam, "
    "preconditioned-sam, fisher-sam, fisher-esam, fisher-gsam, momentum-sam"
)


@pytest.mark.parametrize("sam_type", FSAM_CODES_TYPES)
def test_types_of_the_fsam_code_are_those_of_from_sam_type(sam_type):
    ours = built(sam_type, **EVERYTHING)
    options = {name: EVERYTHING[name] for name in ("beta", "gamma", "keep_ratio", "rho")}
    if sam_type.endswith("gsam"):
        options["alpha"] = EVERYTHING["alpha"]
    theirs = FSAM.from_sam_type(sam_type, torch.nn.Linear(8, 8).named_parameters(), mask_iter_e=7, **options)
    for name in ("alpha", "gamma", "mask"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("beta", "beta_per"):
        assert getattr(ours.ascent, name) == getattr(theirs.ascent, name)
    assert ours.ascent.mask_norm == ("masked" if sam_type in FISHER else "all")
    assert ours.param_groups[0]["rho"] == theirs.param_groups[0]["rho"]


def test_the_other_types_are_their_classes():
    assert type(built("none")) is AdamWL2SP
    assert type(built("momentum-sam", **EVERYTHING)) is MomentumSAM
    asam = built("asam", **EVERYTHING)
    assert asam.param_groups[0]["adaptive"]
    assert (asam.mask, asam.alpha, asam.ascent.beta, asam.gamma) == (None, 0, 1, 1)
    friendly = built("friendly-sam", sigma=0.8, lmbda=0.95).ascent
    assert (friendly.sigma, friendly.lmbda) == (0.8, 0.95)
    assert built("preconditioned-sam").ascent.preconditioned
    assert built("sam", ascent_fraction=0.25).ascent_fraction == 0.25


def test_range_of_sharp_steps_can_be_the_decay_of_the_learning_rate():
    assert built("sam", sam_last="decay").schedule.last == "decay"
    arguments = Arguments(lr_scheduler_type="warmup_stable_decay", lr_decay_ratio=0.25)
    assert arguments.scheduler_kwargs(50) == {"num_decay_steps": 13}
    assert Arguments().scheduler_kwargs(50) == {}


def test_mask_options_are_those_of_fisher_mask():
    options = {"mask_unit": 32, "mask_samples": 3, "mask_excluded": "never", "mask_scores": "random"}
    mask = built("fisher-sam", keep_ratio=0.5, mask_interval=4, **options).mask
    assert mask == FisherMask(0.5, interval=4, unit=32, samples=3, excluded="never", scores="random")


def test_schedule_options_make_one_schedule_of_the_runs_steps():
    optimizer = built("sam", sam_every=5, sam_reuse=0.7, sam_last=0.3, rho_warmup_ratio=0.5)
    assert optimizer.schedule == Schedule(every=5, reuse=0.7, last=0.3, total_steps=100, rho_warmup=15)
    optimizer = built("momentum-sam", rho_follows="cosine", rho_min=0.01, sam_last=0.5)
    assert optimizer.schedule == Schedule(last=0.5, total_steps=100, rho_follows="cosine", rho_min=0.01)


def test_rho_follows_the_learning_rate_from_its_peak():
    optimizer = built("sam", rho_follows="lr", learning_rate=3e-3)
    optimizer.param_groups[0]["lr"] = 1e-3
    group = optimizer.param_groups[0]
    assert optimizer.schedule.rho(50, 0.06, group["lr"], group["lr_max"]) == pytest.approx(0.02)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7])
def test_schedules_fit_runs_of_any_length(total_steps):
    built("sam", total_steps, sam_last=0.3, rho_warmup_ratio=1.0)
    built("sam", total_steps, sam_last=0.3, rho_follows="cosine", rho_warmup_ratio=1.0)


def test_a_comparison_gives_each_type_the_options_it_has_a_use_for():
    arguments = Arguments(sam_type=["sam", "gsam", "momentum-sam"], sam_every=2, sam_reuse=0.5, alpha=0.1)
    check_arguments(arguments)
    expected = {"rho": 0.02, "alpha": 0.1, "ascent_fraction": 1.0, "backup_format": None}
    assert arguments.of(FSAM, "gsam") == expected
    assert arguments.of(FSAM, "momentum-sam") == {"rho": 0.05, "backup_format": None}
    assert arguments.of(Schedule, "gsam").keys() == {"every", "last", "rho_warmup", "rho_follows", "rho_min"}
    assert arguments.of(Schedule, "momentum-sam").keys() == {"last", "rho_warmup", "rho_follows", "rho_min"}


def test_options_that_are_not_given_take_their_defaults():
    arguments = Arguments(sam_type=["none", "fisher-sam"])
    for meaning in MEANINGS:
        assert getattr(arguments, meaning.option) == (0.1 if meaning.option == "keep_ratio" else meaning.default)
    check_arguments(arguments)


def test_default_comparison_has_a_one_pass_method_and_a_rho_that_is_found():
    arguments = Arguments()
    assert arguments.sam_type == ["none", "momentum-sam", "fisher-sam"]
    assert [arguments.rho_of(sam_type) for sam_type in arguments.sam_type[1:]] == [0.05, "auto"]
    check_arguments(arguments)


@pytest.mark.parametrize(
    "options", [{"rho": 0.1}, {"gradient_accumulation_steps": 2}, {"ascent_fraction": 0.5}, {"task": "causal-lm"}]
)
def test_default_comparison_searches_no_rho_that_is_given_or_cannot_be_searched(options):
    arguments = Arguments(**options)
    assert arguments.rho_of("fisher-sam") == options.get("rho", 0.02)
    check_arguments(arguments)


def test_packaged_texts_have_defaults_of_their_own_and_labels_of_others_are_left_alone():
    packaged, own = Arguments(), Arguments(train_file="train.csv")
    assert (packaged.max_seq_length, packaged.num_train_epochs, packaged.label_noise) == (32, 5.0, 0.2)
    assert (own.max_seq_length, own.num_train_epochs, own.label_noise) == (96, 4.0, 0.0)
    assert Arguments(label_noise=0.0).label_noise == 0.0
    assert Arguments(train_file="train.csv", label_noise=0.1).label_noise == 0.1


@pytest.mark.parametrize("noise", [-0.1, 1.0])
def test_label_noise_is_a_share_below_one(noise):
    with pytest.raises(InputError, match=rf"^Invalid --label_noise: {noise}; must be in \[0, 1\)$"):
        check_arguments(Arguments(label_noise=noise))


@pytest.mark.parametrize(("given", "folder"), [(None, "out"), ("page", "page"), ("none", None)])
def test_report_goes_to_the_output_unless_another_folder_or_none_is_given(given, folder):
    assert Arguments(output_dir="out", report=given).report_folder == folder


@pytest.mark.parametrize("trainable", ["fish", "random", "bitfit"])
def test_training_some_weights_compares_methods_without_a_fisher_mask(trainable):
    arguments = Arguments(trainable=trainable)
    assert arguments.sam_type == ["none", "momentum-sam", "sam"]
    check_arguments(arguments)


@pytest.mark.parametrize("sam_type", sorted(SAM_TYPES.keys() - {"none"}))
def test_each_type_has_a_radius_of_its_own_scale(sam_type):
    assert Arguments(sam_type=["none", sam_type]).rho_of(sam_type) == RHO.get(sam_type, 0.02)
    assert Arguments(sam_type=[sam_type], rho=0.3).rho_of(sam_type) == 0.3


@pytest.mark.parametrize(
    ("options", "default"),
    [
        ({}, 0.1),
        ({"sam_type": ["none"]}, 0.1),
        ({"trainable": "fish"}, 0.005),
        ({"trainable": "random", "sam_type": ["none"]}, 0.005),
    ],
)
def test_keep_ratio_has_a_default_for_each_of_its_uses(options, default):
    assert Arguments(**options).keep_ratio == default
    assert Arguments(keep_ratio=0.25, **options).keep_ratio == 0.25


@pytest.mark.parametrize(
    ("sam_type", "trainable"),
    [(sam_type, value) for sam_type in SAM_TYPES for value in TRAINABLE if value == "all" or sam_type not in FISHER],
)
def test_every_option_is_accepted_or_has_no_meaning(sam_type, trainable):
    for name in {meaning.option for meaning in MEANINGS}:
        meanings = [meaning for meaning in MEANINGS if meaning.option == name]
        value = {"rho_follows": "lr", "backup_format": "8bit"}.get(name, meanings[0].default)
        arguments = Arguments(sam_type=[sam_type], trainable=trainable, dtype="bfloat16", **{name: value})
        if any({sam_type, trainable} & meaning.users for meaning in meanings):
            check_arguments(arguments)
        else:
            with pytest.raises(InputError, match=rf"^--{name} has no meaning for --\w+ \S+( --\w+ \S+)?, only for "):
                check_arguments(arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_fisher_samples": 64},
            "--num_fisher_samples has no meaning for --trainable all, only for fish",
        ),
        (
            {"num_fisher_samples": 64, "trainable": "random"},
            "--num_fisher_samples has no meaning for --trainable random, only for fish",
        ),
        (
            {"keep_ratio": 0.1, "trainable": "bitfit"},
            "--keep_ratio has no meaning for --sam_type none momentum-sam sam --trainable bitfit, "
            "only for fisher-sam, fisher-esam, fisher-gsam, fish, random",
        ),
        ({"num_fisher_samples": 0, "trainable": "fish"}, "Invalid --num_fisher_samples: 0; must be > 0"),
        ({"keep_ratio": 7.0, "trainable": "fish"}, "Invalid --keep_ratio: 7.0; must be in (0, 1]"),
        ({"save_delta": True}, "--save_delta needs --trainable fish, random or bitfit"),
        (
            {"trainable": "fish", "sam_type": ["sam", "fisher-sam", "fisher-gsam"]},
            "--trainable fish and --sam_type fisher-sam fisher-gsam exclude each other: "
            "what is perturbed is what is trained",
        ),
    ],
)
def test_options_of_training_some_weights_are_refused_where_they_have_no_meaning(options, message):
    with pytest.raises(InputError) as error:
        check_arguments(Arguments(**options))
    assert str(error.value) == message


@pytest.mark.parametrize("sam_type", [sam_type for sam_type in SAM_TYPES if sam_type not in FISHER])
def test_every_optimizer_but_the_fisher_types_trains_what_a_fish_mask_selects(sam_type):
    model = torch.nn.Linear(8, 8)
    mask = FishMask.random(model, 0.25)
    arguments = Arguments(sam_type=[sam_type], trainable="random")
    assert build_optimizer(arguments, sam_type, model, novel=(), total_steps=100, trainable=mask).trainable == mask


@pytest.mark.parametrize(
    ("sam_type", "options", "message"),
    [
        ("sam", {"alpha": 0.4}, "--alpha has no meaning for --sam_type sam, only for gsam, fisher-gsam"),
        ("gsam", {"alpha": -1.0}, "Invalid --alpha: -1.0; must be >= 0 and finite"),
        ("esam", {"beta": 0.0}, "Invalid --beta: 0.0; must be in (0, 1]"),
        ("esam", {"gamma": 2.0}, "Invalid --gamma: 2.0; must be in (0, 1]"),
        ("fisher-sam", {"mask_interval": 0}, "Invalid --mask_interval: 0; must be an int >= 1"),
        (
            "fisher-sam",
            {"mask_samples": 11},
            "Invalid --mask_samples: 11; must be from 1 to --mask_interval 10",
        ),
        ("sam", {"sam_every": 0}, "Invalid --sam_every: 0; must be an int >= 1"),
        ("sam", {"sam_last": 0.0}, 'Invalid --sam_last: 0.0; must be in (0, 1], or "decay"'),
        ("sam", {"sam_reuse": 0.5}, "--sam_reuse needs --sam_every > 1"),
        ("esam", {"sam_reuse": 0.5, "sam_every": 2}, "--sam_reuse with an esam type needs --beta_per element"),
        ("sam", {"rho_warmup_ratio": 2.0}, "Invalid --rho_warmup_ratio: 2.0; must be between 0 and 1"),
        ("sam", {"rho_min": 0.01}, "--rho_min needs --rho_follows"),
        ("sam", {"rho_min": 0.1, "rho_follows": "lr"}, "Invalid --rho_min: 0.1; must be at most --rho 0.02"),
        (
            "sam",
            {"rho_warmup_ratio": 0.1, "rho_follows": "lr"},
            "--rho_warmup_ratio and --rho_follows lr exclude each other: the learning rate has its own warm-up",
        ),
        ("sam", {"learning_rate": 0.0, "rho_follows": "lr"}, "--rho_follows lr needs --learning_rate > 0"),
        ("none", {"adam_beta2": 1.0}, "Invalid --adam_beta2: 1.0; must be in [0, 1)"),
        ("none", {"adam_epsilon": -1.0}, "Invalid --adam_epsilon: -1.0; must be a finite number >= 0"),
        ("none", {"max_grad_norm": -1.0}, "Invalid --max_grad_norm: -1.0; must be >= 0"),
        (
            "sam",
            {"release_gradients": True, "max_grad_norm": 0.0},
            "--release_gradients needs --sam_type none or momentum-sam: two passes need their gradients",
        ),
        (
            "none",
            {"release_gradients": True},
            "--release_gradients needs --max_grad_norm 0 and --gradient_accumulation_steps 1: gradients are not kept",
        ),
        ("none", {"master_weights": "24bit"}, "--master_weights needs --dtype bfloat16: float32 weights lose nothing"),
        ("sam", {"backup_format": "8bit"}, "--backup_format needs --dtype bfloat16"),
        ("none", {"backup_format": "8bit", "dtype": "bfloat16"}, NO_BACKUP),
        (
            "none",
            {"state_format": "8bit", "trainable": "fish"},
            "--state_format 8bit and --trainable exclude each other: the state of few weights is small",
        ),
        (
            "none",
            {"save_delta": True, "trainable": "fish", "dtype": "bfloat16"},
            "--save_delta needs --dtype float32: the weights that are not trained would be rounded",
        ),
    ],
)
def test_unusable_values_are_named_as_on_the_command_line(sam_type, options, message):
    with pytest.raises(InputError) as error:
        check_arguments(Arguments(sam_type=[sam_type], **options))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "Invalid --ema_decay: 1.0; must be in [0, 1) or None"),
        (
            {"ema_decay": 0.9, "trainable": "fish", "local_steps": 2},
            "--ema_decay and --local_steps exclude each other: workers merge weights, not averages of them",
        ),
        ({"label_smoothing_factor": 1.0}, "Invalid --label_smoothing_factor: 1.0; must be in [0, 1)"),
        ({"mixup_alpha": 0.0}, "Invalid --mixup_alpha: 0.0; must be > 0 and finite, or None"),
        ({"mixup_lambda": 2.0}, "Invalid --mixup_lambda: 2.0; must be in [0, 1] or None"),
        (
            {"mixup_alpha": 1.0, "mixup_lambda": 0.5},
            "Invalid --mixup_lambda: 0.5; must be None with alpha, which draws it",
        ),
        ({"mixup_lambda": 0.5, "mixup_start": 2.0}, "Invalid --mixup_start: 2.0; must be in [0, 1]"),
        ({"mixup_start": 0.0}, "--mixup_where and --mixup_start need --mixup_alpha or --mixup_lambda"),
        (
            {"gradient_accumulation_steps": 2, "sam_type": ["esam"]},
            "--gradient_accumulation_steps with an esam type needs --gamma 1: samples are chosen from the whole batch",
        ),
        ({"gradient_accumulation_steps": 0}, "Invalid --gradient_accumulation_steps: 0; must be > 0"),
        ({"save_steps": 0}, "Invalid --save_steps: 0; must be > 0"),
        (
            {"save_steps": 2, "trainable": "fish", "local_steps": 2},
            "--save_steps and --resume_from_checkpoint exclude --local_steps: a checkpoint is of one process",
        ),
        (
            {"resume_from_checkpoint": True, "overwrite_output_dir": True},
            "--overwrite_output_dir and --resume_from_checkpoint exclude each other",
        ),
        (
            {"mixup_alpha": 1.0, "sam_type": ["sam", "esam"]},
            "mixup with an esam type needs --gamma 1: rows are mixed with rows of the whole batch",
        ),
    ],
)
def test_options_that_cannot_be_together_are_refused(options, message):
    with pytest.raises(InputError) as error:
        check_arguments(Arguments(**options))
    assert str(error.value) == message


def test_mixup_options_are_those_of_mixup():
    arguments = Arguments(mixup_alpha=0.4, mixup_where="embeddings", mixup_start=0.25, seed=3)
    check_arguments(arguments)
    assert build_mixup(arguments, 100, rank=1) == Mixup(100, alpha=0.4, where="embeddings", start=0.25, seed=4)
    assert build_mixup(Arguments(mixup_lambda=0.5), 100) == Mixup(100, lam=0.5, seed=42)
    assert build_mixup(Arguments(), 100) is None


def test_model_that_mixup_finds_no_classifier_in_is_refused():
    with pytest.raises(InputError, match=r"^Invalid --mixup_where: 'pooled'; "):
        check_mixup(Arguments(mixup_alpha=1.0), torch.nn.Linear(8, 8))


def test_every_optimizer_averages():
    for sam_type in SAM_TYPES:
        assert built(sam_type, ema_decay=0.9).ema_decay == 0.9


def test_a_mask_that_would_choose_nothing_of_the_model_is_refused():
    arguments = Arguments(keep_ratio=0.01, mask_unit="row")
    check_arguments(arguments)
    with torch.device("meta"):
        small, large = torch.nn.Linear(8, 8), torch.nn.Linear(8, 800)
    check_mask(arguments, large)
    with pytest.raises(
        InputError, match=r"^Invalid --keep_ratio: 0\.01; keeps 0 of 64 weights, the largest unit has 8; "
    ):
        check_mask(arguments, small)
