"""The page of --report: what it shows, when it is refused, and that a browser needs nothing else and finds no fault."""

import contextlib
import dataclasses
import importlib.util
import io
import math
import re
import shlex
import shutil

import pytest
import torch

pytest.importorskip("transformers")
for package in ("jinja2", "matplotlib", "scipy"):
    pytest.importorskip(package)

from fsam_triton import analysis, finetune  # noqa: E402  (transformers, if installed)
from fsam_triton.finetune import html as html_report  # noqa: E402
from fsam_triton.finetune import models, probe  # noqa: E402
from fsam_triton.finetune.options import SAM_TYPES, Arguments  # noqa: E402
from fsam_triton.finetune.texts import SUBSET_SEED, read_texts  # noqa: E402
from tests.finetune.pages import RUN, Page, written  # noqa: E402
from tests.finetune.running import results, trained  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LABELS = ["<b>bad</b>", "</title><script>alert(1)</script>"]


@dataclasses.dataclass
class Made:
    """What a run of the command line with --report has left behind."""

    argv: list
    folder: object
    printed: str
    progress: str
    path: object
    page: Page


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory):
    """AdamW and Fisher-SAM on reviews whose file's and labels' names are HTML."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "<img src=x onerror='alert(1)'> & co.csv"
    words = {LABELS[0]: "bad", LABELS[1]: "good"}
    data.write_text("label,text\n" + "".join(f"{label},the film was {words[label]}\n" for label in LABELS * 12))
    argv = ["--model_name_or_path", tiny_bert, "--train_file", str(data), "--validation_file", str(data)]
    argv += ["--output_dir", str(folder / "out"), "--report", str(folder / "page"), "--max_steps", "3", "--use_cpu"]
    argv += ["--sam_type", "none", "fisher-sam", "--rho", "auto"]
    printed, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        assert finetune.main(argv) == 0
    path = folder / "page" / "report.html"
    return Made(argv, folder, printed.getvalue(), progress.getvalue(), path, Page(path.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_page_refers_to_nothing_outside_itself(made):
    for tag, attributes in made.page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    text = made.path.read_text(encoding="utf-8")
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")


@pytest.mark.slow
def test_page_has_the_figures_that_are_printed(made):
    lines = made.printed.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("optimizer "))
    assert " ".join(lines[table].split()) == "optimizer accuracy loss 4-bit accuracy m-sharpness s/step peak MiB"
    printed = [line.split() for line in lines[table + 1 : table + 3]]
    assert [row[0] for row in printed] == ["AdamW", "Fisher-SAM"]
    assert made.page.rows[1:3] == printed


def test_page_has_the_rho_that_was_found(made):
    (found,) = re.findall(r"Fisher-SAM: rho (\S+) raises the loss", made.printed)
    text = " ".join(made.page.text.split())
    assert (
        f"the rho at which the loss of a batch is 1 % higher than at the weights. It is {found} for Fisher-SAM." in text
    )


def test_page_begins_with_what_was_trained_and_what_came_out(made):
    head, _, _ = " ".join(made.page.text.split()).partition(" Results ")
    assert "AdamW and Fisher-SAM compared" in head
    assert f"{made.argv[1]}, trained for 3 steps on {made.argv[3]}: 24 training and 24 validation texts" in head
    assert html_report.outcome(finetune_runs(made), 24) in head


def finetune_runs(made):
    """The runs as far as `outcome` looks at them."""
    return [dataclasses.replace(RUN, name=run["name"], evaluations=run["evaluations"]) for run in json_of(made)["runs"]]


def test_command_of_the_page_is_the_one_that_was_typed(made):
    assert shlex.split(made.page.command) == ["fsam-finetune", *made.argv]


def test_names_that_the_user_gave_are_text(made):
    assert not {"b", "img", "script"} & {tag for tag, _ in made.page.elements}
    assert ", ".join(sorted(LABELS)) in made.page.text
    assert made.argv[3] in made.page.text


def test_page_says_what_its_figures_depend_on(made):
    facts = html_report.facts(Arguments(seed=7), {"labels": "a"}, None)
    assert {"date", "device", "labels", "python", "triton", "transformers", "fsam-triton"} <= facts.keys()
    assert facts["torch"] == torch.__version__
    assert facts["seeds"].startswith("7 for training")
    assert "24 training and 24 validation texts, 2 labels" in made.page.text
    for field in dataclasses.fields(Arguments):
        assert f"--{field.name}" in made.page.text


def test_sharpness_is_that_of_the_weights_saved(made):
    tokenizer = models.load_tokenizer(made.argv[1])
    features = models.encode(tokenizer, read_texts(made.argv[3]), 96, sorted(LABELS))
    batches = list(models.draw_batches(tokenizer, features, probe.TEXTS, probe.BATCH, SUBSET_SEED))
    found = {}
    for sam_type in ("none", "fisher-sam"):
        folder = made.folder / "out" / sam_type
        saved = models.transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        found[SAM_TYPES[sam_type]] = saved
    for row, (name, model) in zip(made.page.rows[4:6], found.items(), strict=True):
        losses = [model.eval()(**batch).loss.item() for batch in batches]
        sharpness = analysis.m_sharpness(model, lambda model, batch: model(**batch).loss, batches, 0.05)
        assert row[:3] == [name, f"{sum(losses) / len(losses):.3g}", f"{sharpness:.3g}"]
        assert all(math.isfinite(float(cell)) for cell in row[3:])


def test_landscapes_are_of_the_runs_with_one_scale(made):
    labels = [attributes["aria-label"] for _, attributes in made.page.elements if attributes.get("role") == "img"]
    assert len(labels) == 6
    assert "AdamW" in labels[3]
    assert "Fisher-SAM" in labels[4]
    assert made.page.text.count("mean loss") == 1  # the label of the scale of colours


def test_mask_of_a_fisher_type_is_a_table_of_its_densities(made):
    rows = {row[0]: row[1:] for row in made.page.rows[6:]}
    (densities,) = [run["mask_density"] for run in json_of(made)["runs"] if run["mask_density"]]
    assert densities["bert.embeddings.word_embeddings.weight"] == 1.0
    column = rows["layer"].index("attention.self.query.weight")
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        assert rows[layer][column] == f"{100 * densities[layer + '.attention.self.query.weight']:.3g}"
    assert rows["classifier"][column] == ""


def json_of(made):
    return results(made.folder)


def test_table_of_a_mask_ends_with_the_share_of_all_layers(made, tiny_bert):
    rows = {row[0]: row[1:] for row in made.page.rows[6:]}
    model, _ = models.load_model(tiny_bert, LABELS)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    (densities,) = [run["mask_density"] for run in json_of(made)["runs"] if run["mask_density"]]
    name = "attention.self.query.weight"
    both = [densities[f"bert.encoder.layer.{i}.{name}"] for i in (0, 1)]
    assert rows["all layers"][rows["layer"].index(name)] == f"{100 * sum(both) / 2:.3g}"
    share = sum(densities[name] * sizes[name] for name in sizes) / sum(sizes.values())
    assert f"Perturbed by Fisher-SAM, last mask: {100 * share:.3g} % of all weights" in " ".join(made.page.text.split())


def test_sharpness_at_unequal_losses_is_not_to_be_compared(made, tmp_path):
    losses = sorted(float(row[1]) for row in made.page.rows[4:6])
    assert f"The rows are at different losses, from {losses[0]:.3g} to {losses[-1]:.3g}." in made.page.text
    page = written(tmp_path, [probe.Sharpness("AdamW", loss=0.5)]).read_text(encoding="utf-8")
    assert "different losses" not in page


def test_what_is_being_measured_is_said_before_and_meanwhile(made):
    lines = made.printed.splitlines()
    assert lines.index("measuring sharpness and loss landscapes of 2 models") < len(lines) - 2
    for what in ("AdamW: m sharpness", "AdamW: landscape", "Fisher-SAM: eigenvalue", "10/10"):
        assert what in made.progress


@pytest.mark.slow
def test_runs_are_the_same_with_a_report_and_saved_deltas_are_measured(options, tmp_path):
    options = [*options, "--trainable", "random", "--keep_ratio", "0.3", "--save_delta"]
    plain = trained(options)
    reported = trained(options, "--report", str(tmp_path / "page"))
    assert [run.losses for run in reported] == [run.losses for run in plain]
    page = Page((tmp_path / "page" / "report.html").read_text(encoding="utf-8"))
    adamw, sam = page.rows[4:6]
    assert adamw[1] != sam[1]


def test_report_folder_that_is_a_file_stops_before_training(options, reviews, tmp_path, capsys):
    assert finetune.main([*options, "--report", reviews]) == 2
    assert f"--report {reviews}: File exists" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_missing_package_stops_before_training(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert finetune.main([*options, "--report", str(tmp_path / "page")]) == 2
    assert "--report needs matplotlib: pip install 'fsam-triton[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, as it is installed."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ["--disable-gpu", "--disable-quic"]
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=program, args=quiet) as browser:
        yield browser


def opened(browser, path, **view):
    """Open a page; return it, the addresses it asked for, and what the browser found wrong with it."""
    page, requests, faults = browser.new_page(**view), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.goto(path.as_uri())
    return page, requests, faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_browser_finds_no_fault_and_fits_the_page_into_its_window(browser, made, width, scheme):
    page, requests, faults = opened(browser, made.path, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert faults == []
    assert requests == [made.path.as_uri()]
    assert page.title() == "AdamW, Fisher-SAM: fsam-finetune report"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (sum_of(paper) < sum_of(ink)) == (scheme == "dark")
    page.close()


# Of each element with a text of its own, how its colour contrasts with the nearest background (WCAG 2).
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true})
  const pixel = color => {
    context.clearRect(0, 0, 1, 1)
    context.fillStyle = color
    context.fillRect(0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data]
  }
  const luminance = rgb => {
    const [r, g, b] = rgb.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b
  }
  const contrast = (...colors) => {
    const [low, high] = colors.map(color => luminance(pixel(color))).sort((a, b) => a - b)
    return (high + .05) / (low + .05)
  }
  const background = element => {
    const own = getComputedStyle(element).backgroundColor
    return pixel(own)[3] ? own : background(element.parentElement)
  }
  document.querySelectorAll('details').forEach(element => element.open = true)
  const own = element => [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())
  const seen = [...document.body.querySelectorAll('*')].filter(element => own(element) && element.checkVisibility())
  const texts = seen.map(element => {
    const style = getComputedStyle(element)
    return [contrast(element.closest('svg') ? style.fill : style.color, background(element)), element.outerHTML]
  })
  const page = getComputedStyle(document.body)
  const curves = [0, 1, 2, 3, 4].map(number => {
    const color = getComputedStyle(document.documentElement).getPropertyValue(`--run-${number}`)
    return [contrast(color, page.backgroundColor), color]
  })
  return [texts, curves]
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_curves_stand_out_from_the_page(browser, made, scheme):
    page, _, _ = opened(browser, made.path, color_scheme=scheme)
    texts, curves = page.evaluate(CONTRASTS)
    page.close()
    assert len(texts) > 100
    assert [(found, what) for found, what in texts if found < 4.5] == []
    assert [(found, what) for found, what in curves if found < 3] == []


def test_what_is_folded_on_screen_is_open_in_print(browser, made):
    page, _, _ = opened(browser, made.path)
    options = page.get_by_text("--num_train_epochs")
    assert not options.is_visible()
    page.emulate_media(media="print")
    assert options.is_visible()
    page.close()


def test_page_is_printed_on_white_for_a_reader_with_a_dark_theme(browser, made):
    page, _, _ = opened(browser, made.path, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


def test_printed_page_is_as_wide_as_the_paper(browser, made):
    a4 = 680  # pixels at 96 dpi, within margins of 1.5 cm
    page, _, _ = opened(browser, made.path, viewport={"width": a4, "height": 1046})
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= a4
    page.close()


def sum_of(color):
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("<script>console.error('wrong')</script>", "error: wrong"),
        ("<script>throw new Error('wrong')</script>", "exception: wrong"),
        ("<img src='gone.png' alt=''>", "failed: "),
    ],
)
def test_faults_of_a_page_are_seen(browser, tmp_path, fault, found):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><title>faulty</title>{fault}")
    page, _, faults = opened(browser, path)
    assert [text for text in faults if text.startswith(found)]
    page.close()
