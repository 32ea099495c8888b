"""The options of ``fsam-finetune``, and the optimizer that they ask for."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .adamw_l2sp import AdamWL2SP
from .fish import FishMask
from .fisher import estimate_fisher
from .fsam import FSAM
from .masks import FisherMask
from .mixup import Mixup
from .momentum_sam import MomentumSAM
from .schedule import Schedule
from .texts import InputError

# The optimizers, and how tables and plots call them.
SAM_TYPES = {
    "none": "AdamW",
    "sam": "SAM",
    "asam": "ASAM",
    "esam": "ESAM",
    "gsam": "GSAM",
    "fisher-sam": "FSAM",
    "fisher-esam": "Fisher-ESAM",
    "fisher-gsam": "Fisher-GSAM",
    "momentum-sam": "MomentumSAM",
}
# Which weights can be trained.
TRAINABLE = ("all", "fish", "random", "bitfit")

_SHARP = SAM_TYPES.keys() - {"none"}
_TWO_PASSES = _SHARP - {"momentum-sam"}
_ESAM = {"esam", "fisher-esam"}
_GSAM = {"gsam", "fisher-gsam"}
FISHER = {"fisher-sam", "fisher-esam", "fisher-gsam"}


@dataclass(frozen=True)
class Meaning:
    """A use that the library has for an option; one option may have several.

    Args:
        option: its name.
        owner: the class or function that takes it.
        argument: what it is called there, and in that owner's errors.
        default: its value where the command line does not give it.
        users: the values of ``--sam_type`` or of ``--trainable`` that have this use for it.
    """

    option: str
    owner: Callable
    argument: str
    default: float | str | None
    users: set[str]


MEANINGS = [
    Meaning("rho", FSAM, "rho", 0.05, _SHARP),
    Meaning("alpha", FSAM, "alpha", 0.4, _GSAM),
    Meaning("beta", FSAM, "beta", 0.5, _ESAM),
    Meaning("gamma", FSAM, "gamma", 0.5, _ESAM),
    Meaning("beta_per", FSAM, "beta_per", "tensor", _ESAM),
    Meaning("keep_ratio", FisherMask, "keep_ratio", 0.1, FISHER),
    Meaning("keep_ratio", FishMask, "keep_ratio", 0.005, {"fish", "random"}),
    Meaning("num_fisher_samples", estimate_fisher, "num_samples", 1024, {"fish"}),
    Meaning("mask_interval", FisherMask, "interval", 10, FISHER),
    Meaning("mask_unit", FisherMask, "unit", "element", FISHER),
    Meaning("mask_samples", FisherMask, "samples", 1, FISHER),
    Meaning("mask_scores", FisherMask, "scores", "fisher", FISHER),
    Meaning("mask_excluded", FisherMask, "excluded", "always", FISHER),
    Meaning("mask_norm", FSAM, "mask_norm", "all", FISHER),
    Meaning("sam_every", Schedule, "every", 1, _TWO_PASSES),
    Meaning("sam_reuse", Schedule, "reuse", 0.0, _TWO_PASSES - _GSAM),
    Meaning("sam_last", Schedule, "last", 1.0, _SHARP),
    Meaning("rho_warmup_ratio", Schedule, "rho_warmup", 0.0, _SHARP),
    Meaning("rho_follows", Schedule, "rho_follows", None, _SHARP),
    Meaning("rho_min", Schedule, "rho_min", 0.0, _SHARP),
]

# The option behind each name that an error of the library begins with.
_OPTION_OF = {meaning.argument: meaning.option for meaning in MEANINGS} | {
    "learning rate": "learning_rate",
    "beta parameter at index 0": "adam_beta1",
    "beta parameter at index 1": "adam_beta2",
    "eps value": "adam_epsilon",
    "weight_decay value": "weight_decay",
    "l2_sp value": "l2_sp",
    "ema_decay": "ema_decay",
}
# The same for `Mixup`.
_MIXUP_OPTION_OF = {
    "alpha": "mixup_alpha",
    "lam": "mixup_lambda",
    "where": "mixup_where",
    "start": "mixup_start",
}


def option(default, text, **keywords):
    """Return a dataclass field with a default and a line of ``--help``."""
    return dataclasses.field(default=default, metadata={"help": text, **keywords})


def tuning(text, **keywords):
    """Return the field of an option whose default is in `MEANINGS`: None tells that it was not given."""
    return option(None, text, **keywords)


@dataclass
class Arguments:
    """The options of the command line; the names are those of transformers' ``run_glue.py`` where it has them."""

    model_name_or_path: str | None = option(None, "folder or hub name (default: the packaged all-MiniLM-L6-v2)")
    task_name: str | None = option(None, "GLUE task, loaded with the datasets package")
    train_file: str | None = option(None, ".csv, .tsv, .json or .jsonl (JSON: one object a line)")
    validation_file: str | None = option(None, "the same formats (default: a fifth of --train_file)")
    test_file: str | None = option(None, "the same formats, labels not needed: predictions are written")
    text_column_names: str | None = option(None, "column with the texts, or two with a comma between for pairs")
    label_column_name: str = option("label", "column with the labels: strings or integers")
    max_seq_length: int = option(96, "texts are cut to this many tokens")
    max_train_samples: int | None = option(None, "train on this many texts, drawn at random (always the same)")
    max_eval_samples: int | None = option(None, "validate on this many texts, drawn at random (always the same)")
    output_dir: str = option("fsam-finetune-output", "folder for models, figures and the plot")
    report: str | None = option(None, "folder for report.html: curves, sharpness, loss landscapes and this command")

    sam_type: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "choices": list(SAM_TYPES),
            "help": "one, or several to compare (default: none fisher-sam, or none sam unless all weights are trained)",
        },
    )
    trainable: Literal[TRAINABLE] = option(
        "all", "weights: all, a share by Fisher information, one at random, or biases; a new head always"
    )
    num_fisher_samples: int | None = tuning("fish: training texts that the Fisher information is estimated from")
    save_delta: bool = option(False, "save the trained weights alone, for fsam_triton.from_pretrained")
    local_steps: int | None = option(None, "with torchrun: workers merge the trained weights every so many steps")
    rho: float | None = tuning("radius of the perturbation")
    alpha: float | None = tuning("gsam types: weight of the surrogate gap")
    beta: float | None = tuning("esam types: part of the tensors, or weights, that is perturbed")
    beta_per: Literal["tensor", "element"] | None = tuning("esam types: what --beta draws")
    gamma: float | None = tuning("esam types: part of the batch in the second pass")
    keep_ratio: float | None = tuning(
        "fisher types: share of the weights that is perturbed; fish and random: share that is trained"
    )
    mask_interval: int | None = tuning("fisher types: perturbations between two masks", aliases=["--mask_iter_e"])
    mask_unit: Literal["element", "tensor", "row", 32, 128] | None = tuning("fisher types: what is chosen as a whole")
    mask_samples: int | None = tuning("fisher types: perturbations whose squared gradients make a mask")
    mask_scores: Literal["fisher", "random"] | None = tuning("fisher types: what decides; random is a control")
    mask_excluded: Literal["always", "never"] | None = tuning(
        "fisher types: perturb biases, embeddings and norm layers always or never"
    )
    mask_norm: Literal["all", "masked"] | None = tuning("fisher types: norm over all gradients or the mask's")
    sam_every: int | None = tuning("a sharpness-aware step every so many steps")
    sam_reuse: float | None = tuning("LookSAM: weight of the last sharpness-aware gradient in the steps between")
    sam_last: float | None = tuning("last part of the steps that is sharpness-aware")
    rho_warmup_ratio: float | None = tuning("share of these steps over which rho rises from 0")
    rho_follows: Literal["lr", "cosine"] | None = tuning(
        "rho rises and falls as the learning rate does, or falls on half a cosine (default: it is constant)"
    )
    rho_min: float | None = tuning("where rho ends, with --rho_follows")
    l2_sp: float = option(0.0, "decay of the pretrained parameters towards their initial values")
    ema_decay: float | None = option(None, "evaluate and save an average of the weights with this decay, 0.999 say")
    mixup_alpha: float | None = option(None, "mixup, with lambda drawn for each step from Beta(alpha, alpha)")
    mixup_lambda: float | None = option(None, "mixup, with this lambda; 0.5 in Mixup-Transformer")
    mixup_where: Literal["pooled", "embeddings"] | None = option(None, "what mixup mixes (default: pooled)")
    mixup_start: float | None = option(None, "share of the steps before mixup begins (default: 0.5)")
    label_smoothing_factor: float = option(0.0, "share of each label that is spread over all labels")

    learning_rate: float = option(2e-4, "peak learning rate; for BERT-sized models 2e-5 to 5e-5")
    weight_decay: float = option(0.01, "decay towards 0; not of biases and norm layers")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "the descent gradient is clipped to this norm; 0: not at all")
    num_train_epochs: float = option(4.0, "times the training texts are seen")
    max_steps: int = option(-1, "if positive, the number of steps instead")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = option(
        "linear", "schedule of the learning rate"
    )
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises")
    per_device_train_batch_size: int = option(16, "texts a step")
    per_device_eval_batch_size: int = option(32, "texts a batch of evaluation")
    seed: int = option(42, "of the new head, the batch order, dropout and a random mask")
    bf16: bool = option(False, "torch.autocast in bfloat16 over fp32 weights")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")

    def __post_init__(self):
        self.sam_type = list(dict.fromkeys(self.sam_type or ["none", "fisher-sam" if self.trains_all else "sam"]))
        self.given = list(dict.fromkeys(m.option for m in MEANINGS if getattr(self, m.option) is not None))
        for meaning in MEANINGS:
            name = meaning.option
            if name not in self.given and (getattr(self, name) is None or self._uses(meaning)):
                setattr(self, name, meaning.default)

    @property
    def device(self):
        """The device that trains."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def trains_all(self):
        """Whether all weights are trained."""
        return self.trainable == "all"

    @property
    def mixes(self):
        """Whether there is mixup."""
        return self.mixup_alpha is not None or self.mixup_lambda is not None

    @property
    def text_columns(self):
        """The text columns as a list, or None where the user named none."""
        return self.text_column_names and [name.strip() for name in self.text_column_names.split(",")]

    def total_steps(self, texts, workers=1):
        """Return the steps of each worker in a run on so many training texts."""
        batches = math.ceil(texts / self.per_device_train_batch_size) // workers
        if batches == 0:
            raise InputError(f"{workers} workers are more than there are batches of training texts")
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * batches)

    def of(self, owner, sam_type):
        """Return the arguments that a class of the library takes from these options, as a dict."""
        return {
            meaning.argument: getattr(self, meaning.option)
            for meaning in MEANINGS
            if meaning.owner is owner and sam_type in meaning.users
        }

    def _uses(self, meaning):
        """Whether an option has this use here."""
        return not meaning.users.isdisjoint({*self.sam_type, self.trainable})

    def check(self):
        """Raise InputError for a value that would only fail, or mislead, once training is under way."""
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "max_seq_length",
            "num_train_epochs",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "num_fisher_samples",
            "local_steps",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"Invalid --{name}: {value}; must be > 0")
        for name in ("warmup_ratio", "rho_warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"Invalid --{name}: {getattr(self, name)}; must be between 0 and 1")
        if not 0 <= self.label_smoothing_factor < 1:
            raise InputError(f"Invalid --label_smoothing_factor: {self.label_smoothing_factor}; must be in [0, 1)")
        if not self.max_grad_norm >= 0:
            raise InputError(f"Invalid --max_grad_norm: {self.max_grad_norm}; must be >= 0")
        if self.task_name and self.train_file:
            raise InputError("--task_name and --train_file exclude each other")
        if (self.validation_file or self.text_column_names) and not self.train_file:
            raise InputError("--validation_file and --text_column_names need --train_file")
        if self.text_columns and len(self.text_columns) > 2:
            raise InputError(f"Invalid --text_column_names: {self.text_column_names}; must be one column or two")
        self._check_meaning()
        self._check_together()
        build_mixup(self, total_steps=100)
        with naming_options():
            FisherMask(**self.of(FisherMask, "fisher-sam"))
        # A throw-away model, because the optimizers themselves know best which values they accept. The mask takes all
        # of it: `check_mask` looks whether it would take anything of the real one.
        whole = dataclasses.replace(self, keep_ratio=1.0)
        for sam_type in self.sam_type:
            model = torch.nn.Linear(8, 8)
            trainable = None if self.trains_all else FishMask.magnitude(model, keep_ratio=1.0)
            build_optimizer(whole, sam_type, model, novel=(), total_steps=100, trainable=trainable)

    def _check_meaning(self):
        """Raise InputError for an option that nothing asked for has a use for."""
        for name in self.given:
            meanings = [meaning for meaning in MEANINGS if meaning.option == name]
            if not any(map(self._uses, meanings)):
                users = set().union(*(meaning.users for meaning in meanings))
                choices = {
                    f"--sam_type {' '.join(self.sam_type)}": SAM_TYPES,
                    f"--trainable {self.trainable}": TRAINABLE,
                }
                asked = " ".join(choice for choice, values in choices.items() if not users.isdisjoint(values))
                only = ", ".join(user for user in (*SAM_TYPES, *TRAINABLE) if user in users)
                raise InputError(f"--{name} has no meaning for {asked}, only for {only}")

    def _check_together(self):
        """Raise InputError for options that contradict each other."""
        by_tensor = self.beta_per == "tensor" and not _ESAM.isdisjoint(self.sam_type)
        selects = self.gamma < 1 and not _ESAM.isdisjoint(self.sam_type)
        masked = [sam_type for sam_type in self.sam_type if sam_type in FISHER]
        for wrong, message in (
            (
                masked and not self.trains_all,
                f"--trainable {self.trainable} and --sam_type {' '.join(masked)} exclude each other: "
                "what is perturbed is what is trained",
            ),
            (self.save_delta and self.trains_all, "--save_delta needs --trainable fish, random or bitfit"),
            (self.local_steps and self.trains_all, "--local_steps needs --trainable fish, random or bitfit"),
            (
                self.mask_interval >= 1 and not 1 <= self.mask_samples <= self.mask_interval,
                f"Invalid --mask_samples: {self.mask_samples}; must be from 1 to --mask_interval {self.mask_interval}",
            ),
            (
                self.local_steps and self.ema_decay is not None,
                "--ema_decay and --local_steps exclude each other: workers merge weights, not averages of them",
            ),
            (
                (self.mixup_where or self.mixup_start is not None) and not self.mixes,
                "--mixup_where and --mixup_start need --mixup_alpha or --mixup_lambda",
            ),
            (
                self.mixes and selects,
                "mixup with an esam type needs --gamma 1: rows are mixed with rows of the whole batch",
            ),
            (self.sam_reuse > 0 and self.sam_every == 1, "--sam_reuse needs --sam_every > 1"),
            (self.sam_reuse > 0 and by_tensor, "--sam_reuse with an esam type needs --beta_per element"),
            (self.rho_min > 0 and not self.rho_follows, "--rho_min needs --rho_follows"),
            (
                0 <= self.rho < self.rho_min,
                f"Invalid --rho_min: {self.rho_min}; must be at most --rho {self.rho}",
            ),
            (
                self.rho_warmup_ratio > 0 and self.rho_follows == "lr",
                "--rho_warmup_ratio and --rho_follows lr exclude each other: the learning rate has its own warm-up",
            ),
            (
                self.rho_follows == "lr" and self.learning_rate == 0,
                "--rho_follows lr needs --learning_rate > 0",
            ),
        ):
            if wrong:
                raise InputError(message)

    def check_mask(self, model):
        """Raise InputError if a mask would choose nothing of a model, which may be on the meta device."""
        if not FISHER.isdisjoint(self.sam_type):
            with naming_options():
                mask = FisherMask(**self.of(FisherMask, "fisher-sam"))
                mask.count([p.shape for name, p in model.named_parameters() if mask.selects_from(name, p)])

    def check_mixup(self, model):
        """Raise InputError if nothing of a model, which may be on the meta device, can be mixed."""
        mixup = build_mixup(self, total_steps=1)
        if mixup is not None:
            with naming_options(_MIXUP_OPTION_OF), dataclasses.replace(mixup, start=0.0).draw(1, 0).applied(model):
                pass


@contextlib.contextmanager
def naming_options(option_of=_OPTION_OF):
    """Turn the library's ValueErrors into InputErrors that name the option instead of the argument."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).removeprefix("Invalid ").partition(": ")
        name = option_of.get(argument)
        raise InputError(f"Invalid --{name}: {rest}" if name else str(error)) from error


def build_optimizer(arguments, sam_type, model, novel, total_steps, trainable=None):
    """Return the optimizer of a run.

    Args:
        arguments: the options.
        sam_type: one of `SAM_TYPES`.
        model: its parameters are moved into the optimizer's buffers.
        novel: names of the parameters that have no pretrained value.
        total_steps: steps of the run.
        trainable: the FishMask of the weights to train (default: None, all).

    Raises:
        InputError: an option is out of its range.
    """
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1], "weight_decay": arguments.weight_decay},
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    keywords = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "max_grad_norm": arguments.max_grad_norm or None,
        "l2_sp": arguments.l2_sp,
        "seed": arguments.seed,
        "ema_decay": arguments.ema_decay,
        "trainable": trainable,
    }
    if arguments.l2_sp:
        keywords["anchors"] = {n: p.detach().clone() for n, p in model.named_parameters() if n not in novel}
    with naming_options():
        if sam_type == "none":
            return AdamWL2SP(groups, **keywords)
        keywords |= arguments.of(FSAM, sam_type)
        keywords["schedule"] = build_schedule(arguments, sam_type, total_steps)
        if sam_type == "momentum-sam":
            return MomentumSAM(groups, **keywords)
        if sam_type == "asam":
            return FSAM(groups, adaptive=True, **keywords)
        if sam_type in FISHER:
            keywords["mask"] = FisherMask(**arguments.of(FisherMask, sam_type))
        return FSAM.from_sam_type(sam_type, groups, **keywords)


def build_mixup(arguments, total_steps, rank=0):
    """Return the `Mixup` of a run of so many steps, for a worker of this rank; None if the options ask for none.

    Raises:
        InputError: an option is out of its range.
    """
    if not arguments.mixes:
        return None
    given = {argument: getattr(arguments, name) for argument, name in _MIXUP_OPTION_OF.items()}
    with naming_options(_MIXUP_OPTION_OF):
        given = {argument: value for argument, value in given.items() if value is not None}
        return Mixup(total_steps, seed=arguments.seed + rank, **given)


def build_schedule(arguments, sam_type, total_steps):
    """Return the `Schedule` of a run of so many steps."""
    keywords = arguments.of(Schedule, sam_type)
    warmup_ratio = keywords.pop("rho_warmup")
    schedule = Schedule(total_steps=total_steps, **keywords)
    warmup = math.ceil(warmup_ratio * (total_steps - schedule.first))
    return dataclasses.replace(schedule, rho_warmup=warmup)
