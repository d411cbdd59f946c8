"""Reports as HTML: self-contained, well-formed, and proof against hostile names."""

import math
from html.parser import HTMLParser

import pytest

from lobs_native.html import Curve, demo_page, report_page, visible
from lobs_native.report import ErrorBound, LayerReport, Report, Skipped

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31mred\nnext\u202eline\ud800"
VOID = {"meta", "link", "br", "hr", "img", "input"}


def layer(name="fc1", **changes):
    values = {
        "name": name, "kind": "Linear", "shape": (300, 64), "method": "lobs", "scope": "layer",
        "asked": "sparsity 0.9", "sparsity": 0.9, "error": 4.8, "relative_error": 0.16,
        "damping": 0.01, "damping_asked": 0.01, "rows": 1297.0, "columns": 64, "dead_columns": 4,
        "backend": "cpu_v3", "status": "ok", "notes": (), "seconds_calibrating": 0.004,
        "seconds_pruning": 0.012,
        "optimality": 0.003, "swaps": 0,
    }  # fmt: skip
    return LayerReport(**{**values, **changes})


def report(*layers, skipped=(), bound=None, settings=None):
    return Report(
        layers=layers or (layer(),),
        skipped=tuple(skipped),
        error_bound=bound or ErrorBound(True, "Theorem 3.2", 122.0, 29.6, 8.47, 14.3),
        sparsity=0.9,
        removed=17280,
        weights=19200,
        seconds=0.25,
        settings=settings or {"method": "lobs", "include": None},
        versions={"torch": "2.13.0"},
    )


def comparison(**changes):
    values = {
        "facts": {"Data": "digits"},
        "header": ["method", "after %"],
        "rows": [["lobs", "5.2"]],
        "legend": "after: test error",
        "curves": [Curve("lobs", ((0.5, 0.03), (0.9, 0.05))), Curve("wanda", ((0.5, 0.1),))],
        "before": 0.028,
        "report": report(),
        "report_title": "One run",
    }
    return demo_page(**{**values, **changes})


class Reader(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.mark.parametrize("page", [report_page(report()), comparison()], ids=["report", "demo"])
def test_a_page_is_well_formed_and_needs_no_second_file(page):
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in reader.attributes}
    for word in ("http://", "https://", "url(", "@import"):
        assert word not in page
    assert "prefers-color-scheme: dark" in page
    assert page.endswith("</html>\n")


def test_hostile_names_are_shown_and_do_nothing():
    hostile = report(
        layer(HOSTILE, kind=HOSTILE, notes=(HOSTILE,), status=HOSTILE, asked=HOSTILE),
        skipped=[Skipped(HOSTILE, HOSTILE)],
        bound=ErrorBound(False, HOSTILE),
        settings={HOSTILE: {HOSTILE: HOSTILE}},
    )
    plain = Reader(report_page(report(layer(notes=("x",), status="y"))))
    for page in (report_page(hostile), comparison(facts={HOSTILE: HOSTILE}, legend=HOSTILE)):
        page.encode()
        reader = Reader(page)
        assert set(reader.tags) <= {*plain.tags, "path", "circle", "text"}
        assert not any(name.startswith("on") for name, _ in reader.attributes)
        for character in "\x1b\u202e\ud800":
            assert character not in page
    assert visible(HOSTILE) in reader.text


def test_visible_keeps_letters_and_spells_out_what_does_not_print():
    assert visible("encoder.0 naïve 层") == "encoder.0 naïve 层"
    assert visible("a\nb\x1b[0m\u2028\u200f") == "a\\nb\\x1b[0m\\u2028\\u200f"


def test_what_was_done_differently_is_on_the_page():
    changed = layer("fc2", status="damping raised", damping=0.1, notes=("Cholesky failed",))
    text = Reader(report_page(report(layer(), changed))).text
    assert "damping raised" in text
    assert "asked 0.01" in text
    assert "fc2: Cholesky failed" in text
    assert "Layers with a status other than ok: 1; with notes: 1." in text


def test_skipped_layers_come_with_the_reason():
    text = Reader(report_page(report(skipped=[Skipped("head", "never called")]))).text
    assert "Layers left alone" in text
    assert "head never called" in text


def test_the_bound_shows_all_three_numbers_and_their_share_of_the_output():
    text = Reader(report_page(report())).text
    for said in ("measured distance 8.47 0.592", "29.6 2.07", "122 8.53", "Bounds by Theorem 3.2."):
        assert said in text


def test_a_network_outside_the_theorem_says_why_and_what_was_measured():
    bound = ErrorBound(False, "softmax is not covered", measured=8.47, output_norm=14.3)
    text = Reader(report_page(report(bound=bound))).text
    assert "not covered: softmax is not covered" in text
    assert "8.47" in text
    assert "spectral" not in text


@pytest.mark.parametrize("errors", [(0.0,), (math.inf,), (math.nan,), (0.2, math.inf, 0.0, 0.1)])
def test_bars_stay_inside_their_frame_whatever_the_error(errors):
    page = report_page(report(*(layer(f"fc{k}", relative_error=e) for k, e in enumerate(errors))))
    widths = [float(v) for name, v in Reader(page).attributes if name == "width"]
    assert len(widths) == 2 * len(errors)
    assert all(0 <= width <= 100 for width in widths)


@pytest.mark.parametrize("before", [0.0, 0.028, 0.9])
@pytest.mark.parametrize("highest", [0.0, 0.003, 0.9, 1.0])
def test_the_plot_keeps_every_mark_inside_the_drawing(before, highest):
    curves = [Curve("lobs", ((0.5, 0.0), (0.9, highest))), Curve("one", ((0.5, highest),))]
    reader = Reader(comparison(curves=curves, before=before))
    assert all(0 <= float(v) <= 720 for name, v in reader.attributes if name in ("cx", "x"))
    assert all(0 <= float(v) <= 380 for name, v in reader.attributes if name in ("cy", "y"))
