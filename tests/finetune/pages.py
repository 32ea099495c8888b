"""Reads the page of --report, and writes one without training."""

import html.parser
import types

from fsam_triton.finetune import html as html_report
from fsam_triton.finetune.options import Arguments
from fsam_triton.finetune.report import Run

RUN = Run("AdamW", losses=[1.0, 0.5], step_seconds=[0.1, 0.1], evaluations=[(2, 0.75, 0.25)])


class Page(html.parser.HTMLParser):
    """What is in a page: its elements as (tag, attributes), the cells of each table row, the command, all text.

    Args:
        text: the page's HTML.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows, self.command, self.text = [], [], "", ""
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "img"):
            self._inside.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._inside):
            self.rows[-1][-1] += data
        elif "pre" in self._inside:
            self.command += data


def written(tmp_path, sharpness, runs=(RUN,)):
    arguments = Arguments(sam_type=["none"], report=str(tmp_path))
    own = {"model": "a model", "labels": "a, b"}
    task = types.SimpleNamespace(description="data", facts=lambda arguments: own, sizes={}, validation=["text"])
    return html_report.write_report(arguments, [], task, list(runs), None, sharpness)
