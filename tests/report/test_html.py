"""Reports as HTML: self-contained, well-formed, and proof against hostile names."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
from helpers.reports import layer, report

from lobs_native.report.charts import Curve
from lobs_native.report.html import demo_page, report_page
from lobs_native.report.records import ErrorBound, Skipped
from lobs_native.report.text import visible

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31mred\nnext\u202eline\ud800"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


OLD = dict.fromkeys(
    (
        *("pattern", "dtype", "predicted", "energy", "condition", "peak_memory"),
        *("curve_sparsity", "curve_error"),
    )
)  # fields that a layer of an older run lacks


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
    """Collects tags and texts, and asserts that tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.code = {"style": "", "script": ""}
        self.numbers = []  # (exact, as shown), of cells and data elements
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        values = dict(attrs)
        if "data-v" in values or tag == "data":
            self.numbers.append([values.get("data-v", values.get("value")), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.code:
            self.code[self.open[-1]] += data
            return
        self.texts.append(data)
        if self.numbers and not self.numbers[-1][1] and data.strip():
            self.numbers[-1][1] = data.strip()

    @property
    def text(self):
        return " ".join(self.texts)


PAGES = {"report": report_page(report()), "demo": comparison()}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_is_well_formed_and_self_contained(page):
    reader = Reader(page)
    assert not {"link", "img", "iframe", "object", "embed", "form"} & set(reader.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in reader.attributes}
    for word in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttp", "innerHTML"):
        assert word not in page
    assert "prefers-color-scheme: dark" in page
    assert page.endswith("</html>\n")


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_policy_allows_the_page_s_own_style_and_script_and_nothing_else(page):
    reader = Reader(page)
    (policy,) = (v for name, v in reader.attributes if name == "content" and "default-src" in v)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, inside in reader.code.items():
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}
    assert not any(name == "style" or name.startswith("on") for name, _ in reader.attributes)


def test_hostile_names_are_shown_and_do_nothing():
    def named(word, many):
        return report(
            layer(word, kind=word, notes=(word,), status=word, asked=word, pattern=word),
            *(layer(f"{word}{k}", notes=(word,)) for k in range(many)),
            skipped=[Skipped(word, word)],
            bound=ErrorBound(False, word, parts={word: 1.0}),
            settings={word: {word: word}, "model": word},
            missing=(word,),
        )

    plain = Reader(report_page(named("x", 6)))
    demo = {*Reader(comparison()).tags, *plain.tags}
    other = comparison(facts={HOSTILE: HOSTILE}, legend=HOSTILE)
    for page, tags in ((report_page(named(HOSTILE, 6)), set(plain.tags)), (other, demo)):
        page.encode()
        reader = Reader(page)
        assert set(reader.tags) <= tags
        assert not any(name.startswith("on") for name, _ in reader.attributes)
        for character in "\x1b\u202e\ud800":
            assert character not in page
        assert visible(HOSTILE) in reader.text


def numbers_in(value):
    """All numbers among JSON values, and the strings that stand for numbers that JSON lacks."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for part in value for number in numbers_in(part)}
    return {value} if isinstance(value, (int, float)) or value in ("inf", "nan") else set()


def test_every_number_of_the_page_is_in_the_json_and_shown_as_it_is():
    bound = ErrorBound(True, "x", 122.0, 29.6, 8.47, 14.3, {"fc1": 20.0, "fc2": 9.6})
    settings = {"sparsity": 0.9, "plan": {"memory": 41_575_676, "seconds": 2.82}}
    layers = layer(), layer("fc2", error=math.inf, relative_error=math.inf, inherited=3.0)
    pruned = report(*layers, bound=bound, settings=settings)
    known = numbers_in(json.loads(json.dumps(pruned.to_dict(), allow_nan=False)))
    shown = Reader(report_page(pruned)).numbers
    assert len(shown) > 2 * 12
    for exact, read in shown:
        value = "inf" if exact == "inf" else float(exact)
        assert value in known, (exact, read)
        if value == "inf":
            assert read == "inf"
            continue
        amount = float(re.match(r"[\d.,e+-]+", read)[0].replace(",", ""))
        units = (value, 100 * value, value / 1e6)
        assert any(amount == pytest.approx(unit, rel=5e-3, abs=0.05) for unit in units), (
            exact,
            read,
        )


def test_unknown_values_are_dashes():
    old = report(layer(**OLD), layer("fc2", method="magnitude", scope="row", **OLD))
    page = report_page(old)
    blanks = re.findall(r'<td data-v="">(.*?)</td>', page)
    assert blanks == ["–"] * 6  # predicted, condition and memory, of two layers
    assert "None" not in page
    assert page.count(", no curve") == 2
    assert "trace" not in [v for name, v in Reader(page).attributes if name == "class"]


def test_an_unfinished_run_starts_with_that_and_lists_the_missing_layers():
    missing = [f"fc{k}" for k in range(2, 9)]
    page = report_page(report(missing=missing))
    text = Reader(page).text
    begin = text.index("Unfinished: 1 of 8 layers are done.")
    assert begin < text.index("of 19,200") if "of 19,200" in text else begin < text.index("weights")
    for name in missing:
        assert name in text
    assert "Unfinished" not in Reader(report_page(report())).text


def test_a_curve_ends_inside_its_panel_and_the_disc_marks_what_was_measured():
    wild = layer("b", curve_sparsity=(0.0, 0.5, 1.0), curve_error=(0.0, 1e-12, 1e9), sparsity=1.0)
    none = layer("c", relative_error=0.0, error=0.0)
    far = layer("d", relative_error=math.nan)
    page = report_page(report(layer(), wild, none, far))
    lines = re.findall(r'class="trace" d="M([^"]*)"', page)
    assert len(lines) == 4
    for line in lines:
        for x, y in (point.split() for point in line.split("L")):
            assert 0 <= float(x) <= 170
            assert 0 <= float(y) <= 104
    assert page.count('class="here"') == 3  # none where a number is missing


@pytest.mark.parametrize(("count", "limit"), [(36, 200_000), (300, 1_500_000)])
def test_pages_of_many_layers_stay_light(count, limit):
    points = tuple(k / 31 for k in range(31))
    layers = [
        layer(
            f"model.layers.{k}.self_attn.q_proj",
            notes=("1,234 rows were padding (attention_mask) and were left out", f"note {k}"),
            curve_sparsity=points,
            curve_error=tuple(0.123456789 * x for x in points),
            inherited=1.23456789,
        )
        for k in range(count)
    ]
    assert len(report_page(report(*layers)).encode()) < limit


def test_visible_keeps_letters_and_escapes_what_does_not_print():
    assert visible("encoder.0 naïve 层") == "encoder.0 naïve 层"
    assert visible("a\nb\x1b[0m\u2028\u200f") == "a\\nb\\x1b[0m\\u2028\\u200f"


def test_deviations_from_the_settings_are_on_the_page():
    changed = layer("fc2", status="damping raised", damping=0.1, notes=("Cholesky failed",))
    text = Reader(report_page(report(layer(), changed))).text
    assert "damping raised" in text
    assert "requested 0.01" in text
    assert "1 Cholesky failed fc2" in text
    assert "a status other than ok, in 1 of 2 layers" in text


def test_tokens_are_counted_and_memory_is_in_megabytes():
    """Also inside of what several texts were, and of the plan."""
    texts = [{"text": "a.txt", "tokens": 4096}, {"text": "b.txt", "tokens": 2048}]
    plan = {"layer": 3_000_000, "token_weights": 2_000_000}
    settings = {"texts": texts, "tokens": 6144, "plan": plan}
    text = Reader(report_page(report(settings=settings))).text
    for shown in ("a.txt tokens 4,096", "b.txt tokens 2,048", "tokens 6,144"):
        assert shown in text
    for shown in ("layer 3.0 MB", "token_weights 2.0 MB"):
        assert shown in text


def test_skipped_layers_come_with_the_reason():
    text = Reader(report_page(report(skipped=[Skipped("head", "never called")]))).text
    assert "Layers left alone" in text
    assert "head never called" in text


def test_the_bound_shows_all_three_numbers_and_their_share_of_the_output():
    text = Reader(report_page(report())).text
    text = re.sub(r"\s+", " ", text)
    for words in (
        "measured distance 8.47 0.592",
        "29.6 2.07",
        "122 8.53",
        "Bounds by Theorem 3.2.",
    ):
        assert words in text
    assert "Part of bound" not in text
    parts = ErrorBound(True, "x", 122.0, 29.6, 8.47, 14.3, {"fc1": 20.0})
    assert "Part of bound" in Reader(report_page(report(bound=parts))).text


def test_a_network_outside_the_theorem_has_the_reason_and_the_measured_error():
    bound = ErrorBound(False, "softmax is not covered", measured=8.47, output_norm=14.3)
    text = Reader(report_page(report(bound=bound))).text
    assert "No bound: softmax is not covered" in text
    assert "8.47" in text
    assert "bound with spectral" not in text


@pytest.mark.parametrize("errors", [(0.0,), (math.inf,), (math.nan,), (0.2, math.inf, 0.0, 0.1)])
def test_bars_stay_inside_their_frame_whatever_the_error(errors):
    page = report_page(report(*(layer(f"fc{k}", relative_error=e) for k, e in enumerate(errors))))
    widths = [float(v) for name, v in Reader(page).attributes if name == "width"]
    assert "NaN" not in page
    assert len(widths) == 2 * len(errors)
    assert all(0 <= width <= 100 for width in widths)


@pytest.mark.parametrize("before", [0.0, 0.028, 0.9])
@pytest.mark.parametrize("highest", [0.0, 0.003, 0.9, 1.0])
def test_the_plot_keeps_every_mark_inside_the_drawing(before, highest):
    curves = [Curve("lobs", ((0.5, 0.0), (0.9, highest))), Curve("one", ((0.5, highest),))]
    reader = Reader(comparison(curves=curves, before=before))
    assert all(0 <= float(v) <= 720 for name, v in reader.attributes if name in ("cx", "x"))
    assert all(0 <= float(v) <= 380 for name, v in reader.attributes if name in ("cy", "y"))
