import base64
import hashlib
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from pipeline import figures, report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></textarea><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "<!-- -->",
    "]]><iframe src=https://example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "../../etc/passwd",
    "CON",
    "a:b/c",
    "\U0001f680 rocket",
]
INVISIBLE = [
    "abc\u202egnp.exe",
    "zero\u200bwidth",
    "nul\x00",
    "\x1b[31mred",
    "line\nbreak",
    "half\ud83d",
    "\u2066x\u2069",
]
METRICS = {
    "micro_f1": 0.71234,
    "micro_precision": 0.75,
    "micro_recall": 0.68,
    "macro_f1": 0.5131,
    "macro_f1_all": 0.3079,
    "subset_accuracy": 0.99991,
    "p_at_1": 0.91,
    "p_at_5": 0.44,
    "ndcg_at_5": 0.88,
    "hamming_loss": 0.000123,
}


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would take them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.words, self.inside = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None
        if tag in ("b", "dt", "dd", "h3", "p"):
            self.words.append(" ")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def quick(monkeypatch):
    """Figures that cost nothing."""
    for name in ("support_curve", "label_scatter", "reliability"):
        monkeypatch.setattr(figures, name, lambda data, dark=False: b"dark" if dark else b"light")


def label_counts(labels, status="ok"):
    n = len(labels)
    support = np.maximum(0, n - 1 - np.arange(n))  # the last label is not in the test fold
    tp = support // 2
    ratio = pa.array([t / s if s else None for t, s in zip(tp.tolist(), support.tolist(), strict=True)], pa.float64())
    return pa.table(
        {
            "label_id": pa.array(range(n), pa.int32()),
            "label": pa.array(labels, pa.string()),
            "tp": tp,
            "fp": tp * 0,
            "fn": support - tp,
            "support": support,
            "train_support": support * 3,
            "precision": ratio,
            "recall": ratio,
            "f1": ratio,
            "threshold": pa.array([-1.25 if s else None for s in support.tolist()], pa.float64()),
            "status": pa.array([status] * n, pa.string()),
        }
    )


def rendered(**changes):
    content = {
        "title": "a run",
        "metrics": {
            "metrics": METRICS,
            "intervals": {},
            "conventions": {"ties": "a cut lies between two scores"},
            "counts": {"documents": 1234, "labels": 5, "labels_with_positives": 3, "tp": 7},
        },
        "label_counts": label_counts(["a", "b", "c"]),
        "reliability_bins": [],
        "stages": [],
        "settings": {"train.C": 10.0},
        "examples": [],
        "facts": {"documents": 5000},
    }
    return report.render(**content | changes)


def problems(text="a", **changes):
    row = {"row": 1, "doc_id": text, "label_id": 0, "label": text, "text": text, "labels": [text]}
    doubted = {"count": 11, "rows": [{**row, "score": 1.5, "probability": 0.25, "doubt": 0.75}]}
    content = {
        "near_duplicates": 7,
        "among": 200,
        "similarity": 0.9,
        "equal": 2,
        "pairs": [{**row, "other_row": 2, "other_doc_id": text, "other_labels": [text], "similarity": 0.9375}],
        "multi_class": False,
        "relations": 3,
        "related": [{"label": text, "other": text, "kind": kind, "documents": 30} for kind in RELATED],
        "suspicious": {"missing": doubted, "wrong": doubted},
    }
    return content | changes


RELATED = {
    "implies": "always comes with",
    "same": "is on the same documents as",
    "excludes": "is where there is no",
}


def everywhere(text):
    """`text` in every place that data can reach, except labels (Arrow has no lone surrogates)."""
    return rendered(
        title=text,
        metrics={
            "metrics": METRICS | {text: 0.5},
            "intervals": {},
            "conventions": {text: text},
            "counts": {"documents": 1, "labels": 1, "labels_with_positives": 1, text: 1},
        },
        stages=[
            {"stage": text, "seconds": 1.0, "cpu_seconds": 2.0, "peak_bytes": 3, "rows": {text: 1}, "summary": text}
        ],
        settings={text: text, "input.text": [text]},
        examples=[{"doc_id": text, "text": text, "gold": [text, "a"], "tags": [{"label": text, "probability": 0.5}]}],
        facts={text: text, "rejects": {text: 2}},
        problems=problems(text),
    )


def test_nothing_at_all_renders():
    page = Page(
        rendered(
            metrics={
                "metrics": dict.fromkeys(METRICS, 0.0),
                "intervals": {},
                "conventions": {},
                "counts": {"documents": 0, "labels": 0, "labels_with_positives": 0},
            },
            label_counts=label_counts([]),
            settings={},
            facts={},
        )
    )
    assert "No test document to show" in page.text
    assert "All 0 labels" in page.text
    assert len(page.all("img")) == 3


@pytest.mark.parametrize("text", HOSTILE + INVISIBLE)
def test_data_never_becomes_markup(quick, text):
    harmless, page = Page(everywhere("harmless")), Page(everywhere(text))
    marks = [name for name, _ in page.elements if name not in ("u", "i")]
    assert marks == [name for name, _ in harmless.elements]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert page.scripts == harmless.scripts
    if text in HOSTILE:
        assert page.text.count(text) == harmless.text.count("harmless") > 15


def test_labels_never_become_markup(quick):
    page = Page(rendered(label_counts=label_counts(HOSTILE, status="<script>alert(2)</script>")))
    assert len(page.scripts) == len(page.all("script")) == 1
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    for label in HOSTILE:
        assert label in page.text
    assert "<script>alert(2)</script>" in page.text


@pytest.mark.parametrize("text", INVISIBLE)
def test_characters_that_do_not_show_are_escaped(quick, text):
    page = everywhere(text)
    page.encode()  # a lone surrogate would not
    outside = [c for c in page if unicodedata.category(c)[0] == "C" and c != "\n"]
    assert not outside
    hidden = next(c for c in text if not c.isprintable())
    assert f"U+{ord(hidden):04X}" in Page(page).text


def test_title_of_the_window_is_plain_text(quick):
    assert "<title>a&lt;b&gt;U+202E: Tagmill report</title>" in rendered(title="a<b>\u202e")


def test_bidi_in_a_label_is_escaped(quick):
    page = rendered(label_counts=label_counts(["abc\u202egnp.exe", "b"]))
    assert "\u202e" not in page
    assert "abc<u>U+202E</u>gnp.exe" in page


def test_text_keeps_its_lines(quick):
    example = {"doc_id": "d", "text": "one\n\ttwo\u00a0three\rfour", "gold": [], "tags": []}
    assert "one\n\ttwo\u00a0three<u>U+000D</u>four" in rendered(examples=[example])


def test_the_page_asks_for_nothing_and_runs_one_known_script():
    html = rendered()
    page = Page(html)
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "url(" not in html
    assert "@import" not in html


def test_figures_are_pictures_for_light_and_dark(quick):
    page = Page(rendered())
    light, dark = (f"data:image/png;base64,{base64.b64encode(name).decode()}" for name in (b"light", b"dark"))
    assert [image["src"] for image in page.all("img")] == [light] * 3
    assert [source["srcset"] for source in page.all("source")] == [dark] * 3
    assert all("dark" in source["media"] for source in page.all("source"))


def test_both_denominators_of_macro_f1_are_printed(quick):
    text = Page(rendered()).text
    assert "Macro F1 0.513 over 3 labels with positives; 0.308 over all 5" in text


def test_accuracy_is_no_headline(quick):
    page = rendered()
    headline = page[page.index('class="tiles"') : page.index("At a glance")]
    assert "accuracy" not in headline
    for value in ("0.712", "0.513", "0.910", "0.440", "0.880"):
        assert value in headline


def test_every_metric_stands_in_a_group(quick):
    metrics = METRICS | {"p_at_7": 0.2, "a_new_one": 0.1}
    groups = dict(report.metric_groups(metrics))
    assert sorted(name for rows in groups.values() for name, _ in rows) == sorted(metrics)
    assert groups["Other"] == [("a_new_one", "")]
    assert dict(groups["First places of the ranking"])["p_at_7"] == "share of the top 7 labels that is gold"


def test_intervals_are_printed_where_there_are_some(quick):
    content = {
        "metrics": METRICS,
        "conventions": {},
        "counts": {"documents": 1, "labels": 1, "labels_with_positives": 1},
    }
    assert "0.701 to 0.723" in Page(rendered(metrics=content | {"intervals": {"micro_f1": [0.701, 0.723]}})).text


def test_5000_labels_are_cut_and_the_page_says_so():
    page = rendered(label_counts=label_counts([f"label {i}" for i in range(5000)]))
    assert len(page.encode()) < 2_000_000
    text = Page(page).text
    assert "The 500 labels with the most gold documents" in text
    assert "the 100 with the lowest F1" in text
    assert "4,400 of 5,000 labels are left out; tagmill show RUN --table label_counts shows all" in text
    assert page.count("<bdi>label ") == 600


def test_hostile_labels_do_not_swell_the_page(quick):
    page = rendered(label_counts=label_counts([f"{i % 50}" + "\u202e" * 900 for i in range(5000)]))
    assert len(page.encode()) < 2_500_000


def test_rows_are_the_most_frequent_then_the_worst_of_the_others():
    n = 1000
    rng = np.random.default_rng(0)
    table = label_counts([str(i) for i in range(n)])
    support = rng.integers(0, 50, n)
    f1 = np.where(support > 0, rng.integers(0, 9, n) / 8, rng.choice([0.0, np.nan], n))  # 0: tagged, never gold
    table = table.set_column(5, "support", pa.array(support)).set_column(9, "f1", pa.array(f1, from_pandas=True))
    frequent, lowest = report.label_rows(table)
    assert len(frequent) == report.FREQUENT
    assert len(lowest) == report.LOWEST
    assert [row["support"] for row in frequent] == sorted(support, reverse=True)[: report.FREQUENT]
    shown = {row["label_id"] for row in frequent}
    others = [(f1[i], -support[i]) for i in range(n) if i not in shown and support[i] > 0]
    assert [(row["f1"], -row["support"]) for row in lowest] == sorted(others)[: report.LOWEST]


def test_few_labels_are_all_shown(quick):
    n = report.FREQUENT + report.LOWEST
    page = rendered(label_counts=label_counts([f"label {i}" for i in range(n)]))
    assert page.count("<bdi>label ") == n
    assert "left out" not in Page(page).text.replace("Labels whose F1 is 0/0 are left out", "")


def test_undefined_is_a_dash_that_says_why(quick):
    page = Page(rendered(label_counts=label_counts(["only one"])))
    titles = [attributes.get("title") for name, attributes in page.elements if attributes.get("class") == "none"]
    assert titles == ["0/0: never tagged", "0/0: no gold in the test fold", "0/0: no gold and no tags", "never tagged"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.71234, "0.712"), (0.000123, "0.00012"), (0.0, "0.000"), (41.2834, "41.283"), (-2, "-2.000")]
)
def test_number(value, text):
    assert report._number(value) == text


@pytest.mark.parametrize("value", [None, float("nan")])
def test_number_that_is_not_defined(value):
    assert "not defined" in report._number(value)


@pytest.mark.parametrize(("size", "text"), [(512, "512 B"), (3 << 20, "3 MiB"), (5 << 30, "5.00 GiB")])
def test_bytes(size, text):
    assert report._bytes(size) == text


def test_examples_tell_hits_from_false_and_missed(quick):
    tags = [{"label": "hit one", "probability": 0.98}, {"label": "false one", "probability": 0.41}]
    example = {"doc_id": "d", "text": "t", "gold": ["missed one", "hit one"], "tags": tags}
    text = Page(rendered(examples=[example])).text
    assert "✓ hit one 98 % ✗ false one 41 % ○ missed one" in text


def test_stages_have_bars_by_seconds(quick):
    stage = {"cpu_seconds": None, "peak_bytes": None, "rows": {"documents": 12345}, "summary": "fine"}
    page = rendered(stages=[{"stage": "ingest", "seconds": 5.0, **stage}, {"stage": "train", "seconds": 20.0, **stage}])
    bars = [a["style"] for a in Page(page).all("span") if a.get("class") == "bar"]
    assert bars == ["--part:0.250", "--part:1.000"]
    assert "documents: 12,345" in page


def test_facts_may_be_unknown(quick):
    text = Page(rendered(facts={"terms": None, "rejects": {"no_text": 1200}, "models": {}})).text
    assert "terms not known rejects no_text: 1,200 models none" in text


@pytest.mark.parametrize(
    "group",
    [
        ["Spark", "spark", "SPARK"],
        ["caf\u00e9", "cafe\u0301"],
        ["python", "pyth\u043en"],
        ["a b", " a  b"],
        ["ab", "a\u200bb"],
        ["full", "\uff46\uff55\uff4c\uff4c"],
    ],
)
def test_look_alikes(group):
    assert report.look_alikes(["other", *group, "another"]) == [group]


def test_look_alikes_are_spelled(quick):
    page = Page(rendered(label_counts=label_counts(["python", "pyth\u043en", "<b>"])))
    assert "python pyth\u043eU+043En" in page.text


def test_no_look_alikes_no_section(quick):
    assert "look alike" not in rendered()


def test_long_text_is_cut_and_says_so():
    assert report.visible("x" * 300, limit=160) == "x" * 160 + '<i title="300 characters in all">…</i>'
    assert report.visible("x" * 160, limit=160) == "x" * 160


def test_problems_of_the_data_are_told(quick):
    page = Page(rendered(problems=problems("b")))
    assert {"href": "#problems"} in page.all("a")
    assert "7 of 200 test documents (3.5 %): at least 0.9 of all runs of three words" in page.text
    assert "2 have all of them in common" in page.text
    assert "3 pairs hold in every document of the corpus;" in page.text
    assert all(meaning in page.text for meaning in RELATED.values())
    assert "the 1 most doubtful of 11" in page.text
    assert "exactly one label" not in page.text


def test_problems_that_are_not_there_or_were_not_looked_for(quick):
    none = {"count": 0, "rows": []}
    nothing = problems(
        near_duplicates=None, pairs=[], relations=0, related=[], multi_class=True,
        suspicious={"missing": none, "wrong": none},
    )  # fmt: skip
    text = Page(rendered(problems=nothing)).text
    assert "Not looked for: split.near_duplicates is 0" in text
    assert text.count("None.") == 3
    assert "Every document carries exactly one label" in text
    assert "0 of 200 test documents (0.0 %)" in Page(rendered(problems={**nothing, "near_duplicates": 0})).text
    assert "Data problems" not in Page(rendered(problems={})).text
