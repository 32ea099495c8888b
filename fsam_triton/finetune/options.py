"""The options of ``fsam-finetune``."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch

from .. import FSAM, FisherMask, FishMask, Schedule, estimate_fisher
from .errors import InputError

# The optimizers, and how tables and plots call them.
SAM_TYPES = {
    "none": "AdamW",
    "sam": "SAM",
    "asam": "ASAM",
    "esam": "ESAM",
    "gsam": "GSAM",
    "friendly-sam": "FriendlySAM",
    "preconditioned-sam": "preconditioned SAM",
    "fisher-sam": "Fisher-SAM",
    "fisher-esam": "Fisher-ESAM",
    "fisher-gsam": "Fisher-GSAM",
    "momentum-sam": "MomentumSAM",
}
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Which weights can be trained.
Trainable = Literal["all", "fish", "random", "bitfit"]
TRAINABLE: tuple[Trainable, ...] = get_args(Trainable)

_SHARP = SAM_TYPES.keys() - {"none"}
_TWO_PASSES = _SHARP - {"momentum-sam"}
ESAM = {"esam", "fisher-esam"}
_GSAM = {"gsam", "fisher-gsam"}
FISHER = {"fisher-sam", "fisher-esam", "fisher-gsam"}
AUTO: Final = "auto"
DECAY: Final = "decay"
WARMUP_STABLE_DECAY: Final = "warmup_stable_decay"
LRScheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "warmup_stable_decay"]
# Those whose rho has the scale of SAM's, which `find_rho` suggests.
AUTO_RHO = {"sam", "gsam", "fisher-sam", "fisher-gsam"}
# Default radius of those that have another scale: ASAM measures it in sizes of the weights, MomentumSAM's direction is
# an average of gradients. docs/evidence.md shows the grids.
RHO: dict[str, float | Literal["auto"]] = {"asam": 0.1, "momentum-sam": 0.05}
# The value of ``--report`` for no report.
NO_REPORT = "none"


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
    owner: Callable[..., object]
    argument: str
    default: float | str | None
    users: set[str]


MEANINGS: list[Meaning] = [
    Meaning("rho", FSAM, "rho", 0.02, _SHARP),
    Meaning("alpha", FSAM, "alpha", 0.4, _GSAM),
    Meaning("sigma", FSAM, "sigma", 1.0, {"friendly-sam"}),
    Meaning("lmbda", FSAM, "lmbda", 0.9, {"friendly-sam"}),
    Meaning("beta", FSAM, "beta", 0.5, ESAM),
    Meaning("gamma", FSAM, "gamma", 0.5, ESAM),
    Meaning("beta_per", FSAM, "beta_per", "tensor", ESAM),
    Meaning("ascent_fraction", FSAM, "ascent_fraction", 1.0, _TWO_PASSES - ESAM),
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
    Meaning("backup_format", FSAM, "backup_format", None, _SHARP),
]

# Options that one task alone has a use for. A classifier's gamma, because a Trainer has no losses of single samples.
TASK_OF = {
    **dict.fromkeys(
        (
            "task_name",
            "test_file",
            "label_column_name",
            "save_delta",
            "trainable",
            "local_steps",
            "gamma",
            "mixup_alpha",
            "mixup_lambda",
            "mixup_where",
            "mixup_start",
            "label_smoothing_factor",
            "label_noise",
        ),
        "sequence-classification",
    ),
    **dict.fromkeys(
        (
            "packing",
            "packing_strategy",
            "gradient_checkpointing",
            "lora",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
        ),
        "causal-lm",
    ),
}
# Defaults of options whose fields have none, by the situation; earlier ones go before later ones.
DEFAULTS: dict[str, dict[str, float]] = {
    "lora": {"learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05},
    "from scratch": {"learning_rate": 2e-3},
    "packaged texts": {"max_seq_length": 32, "num_train_epochs": 5.0, "label_noise": 0.2},
    "sequence-classification": {
        "label_noise": 0.0,
        "max_seq_length": 96,
        "num_train_epochs": 4.0,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-4,
    },
    "causal-lm": {
        "max_seq_length": 1024,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-5,
    },
}


def radius(word: str) -> float | Literal["auto"]:
    """Return a word as what ``--rho`` takes: a number, or auto."""
    return word if word == AUTO else float(word)


def share(word: str) -> float | Literal["decay"]:
    """Return a word as what ``--sam_last`` takes: a number, or decay."""
    return word if word == DECAY else float(word)


def option(default: object, text: str, **keywords: object) -> Any:
    """Return a dataclass field with a default and a line of ``--help``."""
    return dataclasses.field(default=default, metadata={"help": text, **keywords})


def tuning(text: str, **keywords: object) -> Any:
    """Return the field of an option whose default is in `MEANINGS`: None tells that it was not given."""
    return option(None, text, **keywords)


# The groups of ``--help``, by the option that each begins with.
GROUPS = {
    "model_name_or_path": "model and texts",
    "output_dir": "output",
    "sam_type": "what is trained, and by which optimizer",
    "lora": "LoRA (causal-lm)",
    "rho": "sharpness-aware steps",
    "mask_interval": "Fisher masks (fisher types)",
    "l2_sp": "regularization",
    "num_train_epochs": "steps and batches",
    "learning_rate": "AdamW and its learning rate",
    "dtype": "memory",
    "seed": "run",
}


@dataclass
class Arguments:
    """The options of the command line; the names are those of transformers' ``run_glue.py`` where it has them.

    What may be None is so after `__post_init__`, too, which gives other options that are not given their defaults.
    """

    model_name_or_path: str | None = option(
        None,
        "folder or hub name (default: the packaged all-MiniLM-L6-v2; causal-lm: a small GPT from scratch)",
        metavar="MODEL",
    )
    task: Literal["sequence-classification", "causal-lm"] = option(
        "sequence-classification", "what the model is trained for"
    )
    task_name: str | None = option(None, "GLUE task, loaded with the datasets package")
    train_file: str | None = option(
        None, ".csv, .tsv, .json or .jsonl (JSON: one object per line); causal-lm: or .txt", metavar="FILE"
    )
    validation_file: str | None = option(None, "the same formats (default: a fifth of --train_file)", metavar="FILE")
    test_file: str | None = option(None, "the same formats, labels not needed: predictions are written", metavar="FILE")
    text_column_names: str | None = option(
        None, "column with the texts, or two with a comma between for pairs", metavar="NAME[,NAME]"
    )
    label_column_name: str = option("label", "column with the labels: strings or integers")
    max_seq_length: int = option(None, "texts are cut to this many tokens", aliases=["--max_length", "--block_size"])
    packing: bool = option(False, "causal-lm: put several texts into each row of --max_seq_length tokens")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] | None = option(
        None, "causal-lm: bfd cuts long texts, bfd_split splits them, wrapped ignores where texts end (default: bfd)"
    )
    max_train_samples: int | None = option(None, "train on this many texts, drawn at random (always the same)")
    max_eval_samples: int | None = option(None, "validate on this many texts, drawn at random (always the same)")

    output_dir: str = option("fsam-finetune-output", "folder for models, figures and the plot", metavar="FOLDER")
    overwrite_output_dir: bool = option(False, "replace the files of an earlier run in --output_dir")
    report: str | None = option(
        None, "folder for report.html (default: --output_dir); none: no report, which saves some time", metavar="FOLDER"
    )
    save_delta: bool = option(False, "save the trained weights alone, for fsam_triton.from_pretrained")
    save_steps: int | None = option(None, "write a checkpoint to --output_dir every so many steps")
    resume_from_checkpoint: bool = option(False, "continue from the checkpoint in --output_dir, with the same options")

    sam_type: list[str] = option(
        None,
        f"{', '.join(SAM_TYPES)}; several are compared "
        "(default: none momentum-sam fisher-sam; sam instead of fisher-sam unless all weights are trained)",
        choices=list(SAM_TYPES),
        metavar="TYPE",
    )
    trainable: Trainable = option(
        "all", "weights: all, a share by Fisher information, one at random, or biases; a new head always"
    )
    keep_ratio: float = tuning(
        "fisher types: share of the weights that is perturbed; fish and random: share that is trained"
    )
    num_fisher_samples: int = tuning("fish: training texts that the Fisher information is estimated from")
    local_steps: int | None = option(None, "with torchrun: workers merge the trained weights every so many steps")

    lora: bool = option(False, "causal-lm: train a LoRA adapter, with PEFT", aliases=["--use_peft"])
    lora_r: int | None = option(None, "rank of the adapter's matrices")
    lora_alpha: float | None = option(None, "the adapter is scaled by this over its rank")
    lora_dropout: float | None = option(None, "dropout before the adapter's matrices")
    lora_target_modules: list[str] | None = option(
        None, "modules that get an adapter, or all-linear (default: PEFT's choice for the model)", metavar="NAME"
    )

    rho: float | Literal["auto"] = tuning(
        "radius of the perturbation; auto: found before each run "
        "(default: 0.02; asam 0.1, momentum-sam 0.05; without --sam_type auto)",
        type=radius,
        metavar="X|auto",
    )
    alpha: float = tuning("gsam types: weight of the surrogate gap")
    sigma: float = tuning("friendly-sam: how much of the average gradient is left out of the perturbation")
    lmbda: float = tuning("friendly-sam: decay of that average")
    beta: float = tuning("esam types: part of the tensors, or weights, that is perturbed")
    beta_per: Literal["tensor", "element"] = tuning("esam types: what --beta draws")
    gamma: float = tuning("esam types: part of the batch in the second pass")
    ascent_fraction: float = tuning("part of the batch in the first pass")
    sam_every: int = tuning("a sharpness-aware step every so many steps")
    sam_reuse: float = tuning("LookSAM: weight of the last sharpness-aware gradient in the steps between")
    sam_last: float | Literal["decay"] = tuning(
        "last part of the steps that is sharpness-aware; decay: those in which the learning rate falls",
        type=share,
        metavar="X|decay",
    )
    rho_warmup_ratio: float = tuning("share of these steps over which rho rises from 0")
    rho_follows: Literal["lr", "cosine"] | None = tuning(
        "rho rises and falls as the learning rate does, or falls on half a cosine (default: it is constant)"
    )
    rho_min: float = tuning("where rho ends, with --rho_follows")

    mask_interval: int = tuning("perturbations between two masks", aliases=["--mask_iter_e"])
    mask_unit: Literal["element", "tensor", "row", 32, 128] = tuning("what is chosen as a whole")
    mask_samples: int = tuning("perturbations whose squared gradients make a mask")
    mask_scores: Literal["fisher", "random"] = tuning("what decides; random is a control")
    mask_excluded: Literal["always", "never"] = tuning("perturb biases, embeddings and norm layers always or never")
    mask_norm: Literal["all", "masked"] = tuning("norm over all gradients or the mask's")

    l2_sp: float = option(0.0, "decay of the pretrained parameters towards their initial values")
    ema_decay: float | None = option(None, "evaluate and save an average of the weights with this decay, 0.999 say")
    mixup_alpha: float | None = option(None, "mixup, with lambda drawn for each step from Beta(alpha, alpha)")
    mixup_lambda: float | None = option(None, "mixup, with this lambda; 0.5 in Mixup-Transformer")
    mixup_where: Literal["pooled", "embeddings"] | None = option(None, "what mixup mixes (default: pooled)")
    mixup_start: float | None = option(None, "share of the steps before mixup begins (default: 0.5)")
    label_smoothing_factor: float = option(0.0, "share of each label that is spread over all labels")
    label_noise: float | None = option(
        None, "share of the training labels that are made wrong, to compare how optimizers bear it"
    )

    num_train_epochs: float = option(None, "times the training texts are seen")
    max_steps: int = option(-1, "if positive, the number of steps instead")
    per_device_train_batch_size: int = option(None, "texts per batch of training")
    gradient_accumulation_steps: int = option(1, "batches per step")
    per_device_eval_batch_size: int = option(32, "texts per batch of evaluation")

    learning_rate: float = option(
        None,
        "peak learning rate; for BERT-sized models 2e-5 to 5e-5 "
        "(default: 2e-4; causal-lm: 2e-5, from scratch 2e-3, with --lora 2e-4)",
    )
    lr_scheduler_type: LRScheduler = option(
        "linear", f"schedule of the learning rate: {', '.join(get_args(LRScheduler))}", metavar="NAME"
    )
    lr_decay_ratio: float = option(0.2, "warmup_stable_decay: share of the steps over which the learning rate falls")
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises")
    weight_decay: float = option(0.01, "decay towards 0; not of biases and norm layers")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "the descent gradient is clipped to this norm; 0: not at all")

    dtype: Literal["float32", "bfloat16"] = option("float32", "type of the weights and gradients")
    state_format: Literal["fp32", "bf16", "8bit"] | None = option(
        None, "how moments are kept (default: as the weights; fp32 with --master_weights)"
    )
    master_weights: Literal["24bit", "32bit"] | None = option(None, "keep of bfloat16 weights what rounding loses")
    backup_format: Literal["8bit"] | None = tuning("one byte instead of two to put bfloat16 weights back")
    gradient_checkpointing: bool = option(False, "causal-lm: recompute activations in the backward pass")
    release_gradients: bool = option(False, "none and momentum-sam: update in the backward pass, without gradients")

    seed: int = option(42, "of the new head, the batch order, dropout and a random mask")
    bf16: bool = option(False, "torch.autocast in bfloat16 over fp32 weights")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")

    def __post_init__(self) -> None:
        if self.sam_type is None:
            some = not self.trains_all or self.lora
            self.sam_type = ["none", "momentum-sam", "sam" if some else "fisher-sam"]
            if self.rho is None and not self.why_no_search:
                self.rho = AUTO
        self.sam_type = list(dict.fromkeys(self.sam_type))
        self.given: list[str] = list(dict.fromkeys(m.option for m in MEANINGS if getattr(self, m.option) is not None))
        for meaning in MEANINGS:
            name = meaning.option
            if name not in self.given and (getattr(self, name) is None or self.uses(meaning)):
                setattr(self, name, meaning.default)
        if self.task == "causal-lm" and "gamma" not in self.given:
            self.gamma = 1.0
        classifies = self.task == "sequence-classification"
        packaged = classifies and not (self.train_file or self.task_name or self.model_name_or_path)
        situations = {"lora": self.lora, "from scratch": self.from_scratch, "packaged texts": packaged, self.task: True}
        for situation, values in DEFAULTS.items():
            for name, value in values.items() if situations.get(situation) else ():
                if getattr(self, name) is None:
                    setattr(self, name, value)

    @property
    def from_scratch(self) -> bool:
        """Whether there is no pretrained model."""
        return self.task == "causal-lm" and not self.model_name_or_path

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu")

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained."""
        return self.trainable == "all"

    @property
    def why_no_search(self) -> str:
        """Why ``--rho auto`` cannot be had with the other options; empty where it can."""
        for wrong, why in (
            (
                self.task == "causal-lm",
                "--rho auto needs --task sequence-classification, for which its rule was calibrated",
            ),
            (
                not self.trains_all,
                f"--rho auto and --trainable {self.trainable} exclude each other: all weights are moved",
            ),
            (
                self.gradient_accumulation_steps > 1,
                "--rho auto needs --gradient_accumulation_steps 1: it is found on single batches",
            ),
            (
                self.ascent_fraction is not None and self.ascent_fraction < 1,
                "--rho auto needs --ascent_fraction 1: it is found on whole batches",
            ),
            (self.rho_min, "--rho auto and --rho_min exclude each other: the rho that is found may be smaller"),
        ):
            if wrong:
                return why
        return ""

    def rho_of(self, sam_type: str) -> float | Literal["auto"]:
        """Return the radius of a type: the given one, its own default, or `AUTO` if it is to be found."""
        if "rho" not in self.given or (self.rho == AUTO and sam_type not in AUTO_RHO):
            return RHO.get(sam_type, self.rho)
        return self.rho

    @property
    def report_folder(self) -> str | None:
        """The folder of the report, or None for no report."""
        return None if self.report == NO_REPORT else self.report or self.output_dir

    @property
    def mixes(self) -> bool:
        """Whether there is mixup."""
        return self.mixup_alpha is not None or self.mixup_lambda is not None

    @property
    def text_columns(self) -> list[str] | None:
        """The text columns as a list, or None where the user named none."""
        return [name.strip() for name in self.text_column_names.split(",")] if self.text_column_names else None

    @property
    def texts_per_step(self) -> int:
        """Training texts in a step of one worker."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def total_steps(self, texts: int, workers: int = 1) -> int:
        """Return the steps of each worker in a run on so many training texts."""
        steps = math.ceil(texts / self.texts_per_step) // workers
        if steps == 0:
            raise InputError(f"{workers} workers are more than an epoch has steps")
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps)

    def scheduler_kwargs(self, total_steps: int) -> dict[str, int]:
        """Return what `transformers.get_scheduler` takes for this schedule alone, in a run of so many steps."""
        if self.lr_scheduler_type != WARMUP_STABLE_DECAY:
            return {}
        return {"num_decay_steps": math.ceil(total_steps * self.lr_decay_ratio)}

    def of(self, owner: Callable[..., object], sam_type: str) -> dict[str, Any]:
        """Return the arguments that a class of the library takes from these options, as a dict."""
        return {
            meaning.argument: self.rho_of(sam_type) if meaning.option == "rho" else getattr(self, meaning.option)
            for meaning in MEANINGS
            if meaning.owner is owner and sam_type in meaning.users
        }

    def uses(self, meaning: Meaning) -> bool:
        """Whether an option has this use here."""
        return not meaning.users.isdisjoint({*self.sam_type, self.trainable})
