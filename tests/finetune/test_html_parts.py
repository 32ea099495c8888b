"""Parts of the page of --report: sentences, pictures, tables and measurements, without a run of the command line."""

import dataclasses
import math
import re

import psutil
import pytest
import torch

pytest.importorskip("transformers")
for package in ("jinja2", "matplotlib", "scipy"):
    pytest.importorskip(package)

from fsam_triton import FishMask, analysis  # noqa: E402  (transformers, if installed)
from fsam_triton.finetune import html as html_report  # noqa: E402
from fsam_triton.finetune import models, probe  # noqa: E402
from fsam_triton.finetune.options import SAM_TYPES  # noqa: E402
from fsam_triton.finetune.report import draw_losses, line_style, steps_per_point  # noqa: E402
from tests.finetune.pages import RUN, Page, written  # noqa: E402

FLAT = analysis.Landscape(torch.arange(9.0) / 8 - 0.5, torch.ones(9, 9))


def judged(metric="accuracy", **values):
    return [dataclasses.replace(RUN, name=name, metric=metric, evaluations=[(2, x, 1.0)]) for name, x in values.items()]


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (judged(A=0.5), "At the end, accuracy on the validation texts is 0.5000."),
        (judged(A=0.5, B=0.5), "All reach the same accuracy on the validation texts: 0.5000."),
        (
            judged(A=0.5, B=0.9, C=0.9),
            "The best accuracy on the validation texts is 0.9000 (B, C), the worst 0.5000 (A), a gap of 4 texts in 10.",
        ),
        (
            judged("perplexity", A=7.0, B=8.0),
            "The best perplexity on the validation texts is 7.00 (A), the worst 8.00 (B).",
        ),
        (
            judged("perplexity", A=7.0, B=math.inf),
            "The best perplexity on the validation texts is 7.00 (A), the worst inf (B).",
        ),
    ],
)
def test_outcome_names_the_best_and_the_worst(runs, sentence):
    assert html_report.outcome(runs, 10) == sentence


def test_title_names_few_optimizers_and_counts_many():
    assert html_report.title(["A"]) == "Fine-tuning with A"
    assert html_report.title(["A", "B", "C"]) == "A, B and C compared"
    assert html_report.title(list("ABCDE")) == "5 optimizers compared"


def test_comparison_with_other_seeds_is_a_table_below_the_results(tmp_path, monkeypatch):
    rows = [("less AdamW", "here"), ("SAM, <i>accuracy</i>", "+0.01")]
    monkeypatch.setattr(html_report, "other_seeds", lambda arguments, runs: rows)
    page = Page(written(tmp_path, []).read_text(encoding="utf-8"))
    assert [list(row) for row in rows] == page.rows[2:4]
    assert "This seed and others" in page.text
    monkeypatch.setattr(html_report, "other_seeds", lambda arguments, runs: [])
    assert "This seed and others" not in Page(written(tmp_path, []).read_text(encoding="utf-8")).text


def test_no_two_runs_are_drawn_alike():
    styles = [line_style(number) for number in range(len(SAM_TYPES))]
    colors = len(html_report._COLORS)
    drawn = [(number % colors, style["linestyle"]) for number, style in enumerate(styles)]
    assert len(set(drawn)) == len(drawn)
    assert len({style["marker"] for style in styles}) == len(styles)


def test_pictures_take_all_their_colours_from_the_page():
    runs = [dataclasses.replace(RUN, name=str(number)) for number in range(10)]
    pictures = html_report.draw_pictures(runs, {})
    for picture in (pictures["losses"], pictures["evaluations"], *pictures["keys"]):
        assert re.findall(r"#[0-9a-f]{6}\b", picture) == []
    for number, picture in enumerate(pictures["keys"]):
        assert f"stroke: var(--run-{number % 5})" in picture


def test_ids_of_the_page_are_unique_and_all_references_are_to_them(tmp_path):
    runs = [dataclasses.replace(RUN, name=str(number)) for number in range(3)]
    sharpness = [probe.Sharpness(run.name, loss=1.0, landscape=FLAT) for run in runs]
    text = written(tmp_path, sharpness, runs).read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    references = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text)
    assert set(references) - set(ids) == set()
    assert references


@pytest.mark.parametrize(("steps", "count"), [(40, 1), (50, 1), (51, 2), (1200, 24)])
def test_long_curves_of_losses_are_means(steps, count):
    from matplotlib.figure import Figure

    run = dataclasses.replace(RUN, losses=[float(step) for step in range(1, steps + 1)])
    assert steps_per_point([run]) == count
    axes = Figure().subplots()
    draw_losses([run], axes)
    (line,) = axes.get_lines()
    assert line.get_xdata() == pytest.approx(line.get_ydata())
    assert len(line.get_xdata()) == math.ceil(steps / count)


def test_command_of_several_workers_starts_them(monkeypatch):
    monkeypatch.setattr(html_report.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    words = html_report.command_line(["--seed", "1"])
    assert " ".join(words) == "torchrun --nnodes 2 --nproc-per-node 4 -m fsam_triton.finetune --seed 1"


def test_share_of_all_layers_counts_weights():
    densities = {"a.0.w": 0.5, "a.1.w": 0.25, "head.b": 1.0}
    *_, shares, share = html_report.mask_table(densities, {"head.b": 2, "a.1.w": 4, "a.0.w": 12, "other": 100})
    assert shares == [7 / 16, 1.0]
    assert share == 9 / 18


def test_mask_of_the_trained_weights_is_shown_once():
    mask = FishMask.random(torch.nn.Linear(4, 4), 0.5)
    assert html_report.mask_densities([RUN, RUN], mask) == {"Trained in every run": mask.density_by_tensor()}
    assert html_report.mask_densities([RUN], None) == {}


def test_colours_of_densities_are_logarithmic():
    assert [html_report.shade(density) for density in (0.0, 1e-5, 1e-4, 1e-2, 1.0)] == pytest.approx([0, 0, 0, 0.5, 1])


def test_page_that_cannot_be_finished_leaves_the_one_before(tmp_path):
    (tmp_path / "report.html").write_text("old")

    def fail(path, text, encoding):
        path.write_bytes(text[:100].encode(encoding))
        raise OSError("no space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report.Path, "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            written(tmp_path, [])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def sample(tiny_bert):
    tokenizer = models.load_tokenizer(tiny_bert)
    model, _ = models.load_model(tiny_bert, ["a", "b"])
    return model, [dict(tokenizer(["the film", "the plot"], return_tensors="pt"), labels=torch.tensor([0, 1]))]


def test_diverged_model_has_no_figures_but_reasons(tiny_bert, tmp_path):
    model, batches = sample(tiny_bert)
    torch.nn.init.constant_(model.classifier.weight, math.nan)
    found = probe.measure("AdamW", model, batches)
    assert len(found.problems) == 4
    page = Page(written(tmp_path, [found]).read_text(encoding="utf-8"))
    assert page.rows[-1] == ["AdamW", *["not measured"] * 4]
    assert "Not measured: AdamW, m sharpness: the loss of batch 0 is nan" in page.text
    assert "Loss landscape" not in page.text


def test_eigenvalue_is_left_out_where_memory_is_short(tiny_bert, monkeypatch):
    model, batches = sample(tiny_bert)
    few = dataclasses.make_dataclass("Memory", ["available"])(2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    found = probe.measure("AdamW", model, batches)
    assert math.isnan(found.eigenvalue)
    assert found.worst_case >= 0
    assert found.problems == ["AdamW, eigenvalue: needs 0.0 GiB of memory; 0.0 GiB are free"]
