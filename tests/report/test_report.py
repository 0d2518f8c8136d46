"""The report page: complete, escaped, self-contained, and whole or absent; the maps behind its
figures."""

import base64
import dataclasses
import html.parser
import io
import itertools
import re
import time
import types

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.report import advice, erased, maps, matrix, page, plots, verdicts
from jaxbd.report.content import (
    Activations,
    Content,
    Erased,
    Mask,
    Moment,
    PairScores,
    Panel,
    Repaired,
    Scan,
    Triggers,
)

HOSTILE = "<script>alert('x')</script>"
NAMES = [
    "zero",
    HOSTILE,
    "$\\frac{",
    "猫",
    "a\nb",
    '" onload="x',
    "--><b>",
    "\ud800",
    "x" * 300,
    "",
]


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def scan(names=NAMES, target=1, verdict="backdoored", **changes) -> Scan:
    classes = []
    for k, name in enumerate(names):
        levels = {"0.5": 0.9, "0.9": 0.991} if k == target else {"0.5": 0.02 * (k % 7), "0.9": 0.01}
        classes.append(
            {
                "class": k,
                "name": name,
                "attack_success_rate": max(levels.values()),
                "score": 0.1,
                "levels": levels,
            }
        )
    targets = [] if target is None else [target]
    known = dict(
        name="victim", verdict=verdict, targets=targets, classes=classes, threshold=0.8, doubt=0.4
    )
    return Scan(**{**known, **changes})


def triggers(channels=3, count=40) -> Triggers:
    random = np.random.default_rng(0)
    samples = {
        level: random.random((count, 3, 3, channels)).astype(np.float32) for level in (0.5, 0.9)
    }
    clean = random.integers(0, 256, (3, 16, 16, channels), np.uint8)
    mask = Mask(
        mask=random.random((16, 16, 1)),
        pattern=random.random((16, 16, channels)),
        norm=2.34,
        median=24.5,
    )
    return Triggers(
        samples=samples,
        original=random.random((3, 3, channels)),
        clean=clean,
        stamped=255 - clean,
        captions=[("deer", "ship"), ("ship", "ship"), (HOSTILE, "ship")],
        target=f"class 1 ({HOSTILE})",
        mask=mask,
    )


def pair_scores(count=4, names=NAMES, detected=((0, 1), (2, 1)), **changes) -> PairScores:
    scores = np.random.default_rng(0).normal(size=(count, count))
    np.fill_diagonal(scores, np.nan)
    for number, pair in enumerate(detected):
        scores[pair] = 12.25 + number
    known = dict(
        search=HOSTILE, scores=scores, names=names[:count], detected=detected, threshold=7.0
    )
    return PairScores(**{**known, **changes})


def activations() -> Activations:
    random = np.random.default_rng(1)
    clean = random.random(200)
    panel = lambda net, triggered, tv: Panel(
        net=net, channel=5, clean=clean, triggered=triggered, total_variation=tv
    )
    return Activations(
        layer=f"block/{HOSTILE}",
        suspect=panel("suspect", clean + 3, 0.987),
        corrected=panel("corrected", clean + 0.1, 0.123),
        others=[Panel(net=HOSTILE, channel=17, clean=clean, triggered=clean, note=HOSTILE)],
    )


def erasure(channels=3) -> Erased:
    random = np.random.default_rng(2)
    made = lambda side: random.integers(0, 256, (7, side, side, channels), np.uint8)
    moments = [Moment(step=step, samples=made(16), triggers=made(5)) for step in (1, 30, 300)]
    return Erased(
        moments=moments,
        amplified={9: (0.9996, 0.0321), 1: (0.9876, 0.0046), 4: (0.9988, None)},
        note=HOSTILE,
    )


def full() -> Content:
    return Content(
        title=f"Report {HOSTILE}",
        scans=[
            scan(
                sha256="ab" * 32,
                seconds={"compile": 1.5, "run": 2.0, "total": 3.5},
                n_images=360,
                searched=HOSTILE,
            ),
            scan(target=None, verdict="clean", name="clean twin"),
        ],
        repairs=[
            Repaired(
                method="mesa",
                clean_accuracy=(0.981, 0.972),
                attack_success_rate=(0.993, 0.0123),
                n_triggered=324,
                file="repaired.pth",
            ),
            Repaired(method=HOSTILE, note=HOSTILE),
            Repaired(
                method="guarded",
                source_inference_accuracy=0.931,
                true_positive_rate=0.944,
                false_positive_rate=0.058,
            ),
        ],
        pairs=[pair_scores()],
        activations=activations(),
        erased=erasure(),
        triggers=triggers(),
        curves={
            HOSTILE: {
                "step": [0, 10, 20],
                "values": {"level 0.5": [1.0, None, 0.5], "$x": [1, float("nan"), 0]},
            }
        },
        settings={
            "steps": 620,
            "mesa": {"patch": 3, "nested": {"deep": [1, HOSTILE]}},
            "empty": {},
        },
        seeds={"victim": 7},
        versions={"jaxbd": "0.1.0", "jax": HOSTILE},
        device=f"cpu {HOSTILE}",
        notes=[HOSTILE],
    )


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(full())


def picture(uri: str) -> np.ndarray:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_page_runs_no_script_and_loads_nothing(text):
    seen = Page(text)
    assert not seen.named("script") and not seen.named("b")
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png")) or tag == "a", (tag, value)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not seen.named("link") and not seen.named("iframe") and not seen.named("base")
    policies = [meta.get("content") for meta in seen.named("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_names_are_shown_as_text(text):
    seen = Page(text)
    # title, class, searched, method, note, curve, setting, version, device, search, pair, layer,
    # net and the notes of the net and the erasure
    assert seen.text.count(HOSTILE) >= 15
    assert "--><b>" in seen.text


def test_page_says_what_was_found(text):
    seen = Page(text)
    assert "Do not deploy “victim”; use the repaired file" in seen.text
    assert re.search(r"99\.1\s%\s+of images of other classes turn into class 1", seen.text)
    assert "No class stands out" in seen.text
    assert "A detector can find only the trigger families it searches" in seen.text
    for value in (
        "ab" * 32,
        "3.5 s total (2.0 s run, 1.5 s compile)",
        "360 images",
        "324 triggered images",
        "620",
    ):
        assert value in seen.text, value
    for rate in ("99.3", "1.2", "98.1", "97.2", "93.1", "94.4", "5.8"):
        assert re.search(f"<td[^>]*>{rate}\N{NO-BREAK SPACE}%<", text), rate
    assert "nested.deep" in seen.text and "victim" in seen.text


def test_figures_have_text_alternatives_and_headings_are_ordered(text):
    seen = Page(text)
    # planted, mask and pattern, samples per level, images without and with a trigger, two maps per
    # level, samples and triggers per moment
    assert len(seen.named("img")) == 1 + 2 + 2 + 2 * 3 + 2 * 2 + 3 * 2
    assert all(attributes.get("alt") for attributes in seen.named("img"))
    charts = [svg for svg in seen.named("svg") if svg.get("role") == "img"]
    assert len(charts) == 3 + 1 + 3 + 1 and all(svg["aria-label"] for svg in charts)
    assert [tag for tag, _ in seen.tags].count("h1") == 1
    depth = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(depth))
    identifiers = [
        attributes["id"] for tag, attributes in seen.tags if "id" in attributes and tag == "section"
    ]
    assert set(identifiers) >= {
        link["href"][1:] for link in seen.named("a") if link["href"].startswith("#")
    }


def test_page_shows_pairs_and_a_neuron(text):
    seen = Page(text)
    words = " ".join(seen.text.split())
    assert (
        "One cell per pair; 2 of 12 pairs are called attacked" in words
        and "a score above 7 is suspected" in words
    )
    assert words.index("13.25") < words.index("12.25")  # the table starts with the highest
    assert [row.get("class") for row in seen.named("tr")].count(
        "hit"
    ) == 2 + 1  # both pairs, the scan's target
    assert f"Layer block/{HOSTILE}, channel 5 of the suspect" in words
    assert "0.99 before the correction, 0.12 after it" in words and "Channel 17." in words


def test_page_shows_an_erasure(text):
    seen = Page(text)
    words = " ".join(seen.text.split())
    places = [words.index(f"After {step} iteration") for step in (1, 30, 300)]
    assert (
        places == sorted(places)
        and "After 1 iteration " in words
        and "After 30 iterations" in words
    )
    rows = [
        re.sub(r"\s+", " ", row)
        for row in re.findall(r'<tr><th scope="row">[149]</th>.*?</tr>', text, re.S)
    ]
    assert [re.findall(r">([^<>]+)</t[hd]>", row) for row in rows] == [
        ["1", "98.8 %", "0.5 %"],
        ["4", "99.9 %", "–"],
        ["9", "100.0 %", "3.2 %"],
    ]
    (chart,) = [
        svg["aria-label"]
        for svg in seen.named("svg")
        if "trigger 1 times" in svg.get("aria-label", "")
    ]
    assert "4 times: 99.9 % before, not measured after" in chart
    assert "Yan et al. 2023" in seen.text


def test_losses_of_an_erasure_are_two_charts():
    values = {
        "step": [10, 20],
        "discrepancy": [2.0, 1.0],
        "regulariser": [1.0, 0.5],
        "trigger_loss": [-1.0, -0.5],
    }
    assert erased.curves({**values, "learning_rate": [0.1, 0.01]}) == {
        "erasure: logit difference": {
            "step": [10, 20],
            "values": {
                "student and teacher": [2.0, 1.0],
                "student with and without trigger": [1.0, 0.5],
            },
        },
        "erasure: loss of generators": {"step": [10, 20], "values": {"triggers": [-1.0, -0.5]}},
    }


@pytest.mark.parametrize("measured", [True, False])
def test_a_page_from_a_repair_json(measured):
    rates = {
        "clean_accuracy": 0.951,
        "attack_success_rate": 0.993,
        "source_inference_accuracy": None,
    }
    counts = {"n_clean": 400, "n_triggered": 360}
    after = {**rates, "attack_success_rate": 0.021, "source_inference_accuracy": 0.912}
    figures = {
        "before": {**rates, **counts} if measured else None,
        "after": {**after, **counts} if measured else None,
        "curves": {"step": [1, 2], "discrepancy": [1.0, 0.5]},
        "config": {"inner_steps": 5},
        "model": {"path": "m.pth"},
        "data": {"source": "digits"} if measured else None,
        "seed": 3,
        "seconds": {"total": 4.5},
        "versions": {"jaxbd": "0.1.0"},
        "device": "cpu",
    }
    text = page.render(erased.content(figures, name=HOSTILE, moments=erasure().moments))
    words = " ".join(Page(text).text.split())
    title = " ".join(f"Backdoors erased from {HOSTILE} without data".split())
    assert words.count(title) == 2, "as title of the page and as its heading"
    assert "m.pth" in words and "4.5 s total" in words
    assert ("360 triggered images" in words) == ("99.3\N{NO-BREAK SPACE}%" in text) == measured
    assert ("nothing was measured" in words) == (not measured)
    assert (
        "After 300 iterations" in words and "logit difference" in words and "amplified" not in words
    )
    assert "A detector" not in words and "Losses on generated images do not show" in words
    assert ("finite set of images" in words) == measured and "This run was stopped" not in words
    resumed = erased.content({**figures, "resumed": {"step": 42, "seconds": 61.7}}, name="m")
    assert "This run was stopped at iteration 42 after 62 s" in page.render(resumed)


def test_absent_parts_leave_no_trace():
    content = Content(title="t", repairs=[Repaired(method="mesa", attack_success_rate=(0.9, 0.1))])
    seen = Page(page.render(content))
    assert not {"pairs", "activations", "erased"} & {
        section.get("id") for section in seen.named("section")
    }
    assert not re.search(
        "Flagged|Source accuracy|Activations|Erasure|Li et al. 2023|Yan et al. 2023", seen.text
    )
    only = Repaired(method="bna", source_inference_accuracy=0.9)
    text = Page(page.render(Content(title="t", repairs=[only]))).text
    assert "Source accuracy" in text and "Flagged" not in text


def test_page_is_the_same_every_time(text):
    assert page.render(full()) == text


@pytest.mark.parametrize(
    "content",
    [
        Content(title="nothing"),
        Content(title="bare scan", scans=[Scan(name="m", verdict="inconclusive")]),
        Content(
            title="no levels",
            scans=[
                Scan(
                    name="m",
                    verdict="backdoored",
                    classes=[
                        {"class": 0, "name": "a", "attack_success_rate": None},
                        {"class": 1, "name": "b", "attack_success_rate": 0.5},
                    ],
                )
            ],
        ),
        Content(title="grey", triggers=triggers(channels=1)),
        Content(title="four channels", triggers=triggers(channels=4, count=1)),
        Content(title="no samples", triggers=Triggers(samples={0.5: np.zeros((0, 3, 3, 3))})),
        Content(title="only original", triggers=Triggers(original=np.full((3, 3, 1), np.nan))),
        Content(
            title="other size",
            triggers=Triggers(samples=triggers().samples, original=np.ones((5, 5, 3))),
        ),
        Content(
            title="no pair has a score",
            pairs=[pair_scores(detected=(), scores=np.full((3, 3), np.nan))],
        ),
        Content(
            title="endless score",
            pairs=[pair_scores(detected=(), scores=np.array([[np.nan, np.inf], [0, -1]]))],
        ),
        Content(title="no threshold", pairs=[pair_scores(threshold=None, names=())]),
        Content(
            title="silent neuron",
            activations=Activations(
                layer="l",
                suspect=Panel(net="a", channel=0, clean=np.zeros(3), triggered=np.zeros(3)),
                corrected=Panel(
                    net="b", channel=0, clean=np.zeros(0), triggered=np.array([np.nan, np.inf])
                ),
            ),
        ),
        Content(title="nothing generated", erased=Erased()),
        Content(title="grey erasure", erased=erasure(channels=1)),
        Content(
            title="rates that are no numbers",
            erased=Erased(amplified={1: (None, float("nan")), 4: (None, None)}),
        ),
        Content(title="empty curve", curves={"loss": {"step": [], "values": {}}}),
    ],
    ids=lambda content: content.title,
)
def test_everything_is_optional(content):
    seen = Page(page.render(content))
    assert content.title in seen.text
    assert "Limits of this report" in seen.text


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["backdoored"], "Do not deploy this model"),
        (["clean"], "Nothing found"),
        (["clean", "clean"], "Nothing found in 2 models"),
        (["clean", "inconclusive"], "Undecided for 1 of 2 models"),
        (["backdoored", "inconclusive"], "Do not deploy “m”"),
    ],
)
def test_headline(verdicts, expected):
    assert (
        page.headline(Content(title="t", scans=[Scan(name="m", verdict=v) for v in verdicts]))
        == expected
    )


def judged(**changes) -> Scan:
    """A scan with signs: class 1 shows all, class 2 a patch alone."""
    whole = scan(names=["plane", "car", "bird", "cat"], target=1)
    rows = [
        {**row, "mask_norm": 20.5 + k, "rate_without_trigger": 0.012, "margin_p": 0.5}
        for k, row in enumerate(whole.classes)
    ]
    rows[1] |= {"mask_norm": 2.3, "score": -0.0 + 6.9, "margin_p": 0.00041}
    rows[3] |= {"attack_success_rate": None}
    known = dict(
        classes=rows,
        signs={"small": [1], "patch": [1, 2], "margin": [1]},
        natural=[2],
        searched="masks",
        repair="`jaxbd repair m.pth`",
    )
    return Scan(**{**vars(whole), **known, **changes})


def test_the_signs_of_each_class_are_a_table():
    text = page.render(Content(title="t", scans=[judged()]))
    body = text[text.index('class="scroll signs"') :]
    body = body[: body.index("</table>")]
    rows = [re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr.*?</tr>", body, re.S)]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    shown = "2.3|score 6.9|99.1 %|without 1.2 %|0.00041".replace(" %", "\N{NO-BREAK SPACE}%")
    assert rows[2] == ["1  car", *shown.split("|")]
    assert rows[3][:2] == ["2  bird", "natural"]
    assert rows[4][3:] == ["–", "0.5"]  # no patch was modelled
    assert body.count('class="sign"') == 3, "a natural patch is no sign of a backdoor"
    words = " ".join(Page(text).text.split())
    assert "nobody is known to have planted" in words and "Natural triggers" in words
    plain = page.render(Content(title="t", scans=[judged(signs=None, natural=[])]))
    assert "Natural" not in plain and "Small trigger" not in plain


def test_an_open_verdict_names_its_sign():
    """Rates of patches say nothing where another sign left the verdict open."""
    signs = {"small": [1], "patch": [2], "margin": [3]}
    said = verdicts.describe_reason(
        judged(verdict="inconclusive", targets=[], signs=signs, leads=[1, 3], natural=[2])
    )
    assert "car”): the mask that leads there is far smaller" in said and "bird" not in said
    assert "to class 3 (“cat”): its margin stands out" in said and "%" not in said
    unsaid = judged(verdict="inconclusive", targets=[], signs={}, leads=[])
    assert "strongest triggers found" in verdicts.describe_reason(unsaid)


def test_of_many_classes_those_with_signs_are_in_the_table():
    whole = scan(names=[f"name{k}" for k in range(43)], target=40)
    seen = verdicts.sign_rows(Scan(**{**vars(whole), "signs": {"small": [40], "patch": [3]}}))
    assert len(seen) == verdicts.MOST_SIGNS
    assert [row["label"].split()[0] for row in seen[:2]] == ["3", "40"]


def test_the_page_says_what_to_do_next():
    say = lambda scan, **more: " ".join(advice.lead(Content(title="t", scans=[scan], **more)))
    repaired = Repaired(
        method="unlearn",
        clean_accuracy=(0.781, 0.769),
        attack_success_rate=(0.98, 0.011),
        file="fixed.pth",
    )
    assert "Next: `jaxbd repair m.pth`, then scan the repaired file." in say(judged())
    used = say(judged(), repairs=[repaired])
    assert "The repaired file is “fixed.pth”" in used and "on 1.1" in used and "Next" not in used
    weak = dataclasses.replace(repaired, attack_success_rate=(0.98, 0.4))
    content = Content(title="t", scans=[judged()], repairs=[weak])
    assert page.headline(content) == "Do not deploy this model" and "Next" in say(
        judged(), repairs=[weak]
    )
    rows = [{**row, "attack_success_rate": 0.1} for row in judged().classes]
    weak = judged(classes=rows)  # its mask and its margin tell
    assert "on 10" not in say(weak) and "The signs below name class 1" in verdicts.describe_reason(
        weak
    )
    clean = say(judged(verdict="clean", targets=[]))
    assert "Searched: masks." in clean and "These searches do not cover" in clean
    assert say(judged(verdict="inconclusive", remedy="more images")) == "More images."
    assert "<code>jaxbd repair m.pth</code>" in page.render(Content(title="t", scans=[judged()]))
    assert page._mark_commands("a `<b>` c") == "a <code>&lt;b&gt;</code> c"


def test_images_with_triggers_say_what_the_model_answers(text):
    words = " ".join(Page(text).text.split())
    assert "deer → ship" in words and "the trigger does not work on this one" in words
    assert "L1 size 2.3 of 256 pixels; the median of all classes is 24.5" in words


def test_a_small_trigger_is_framed():
    clean = np.zeros((8, 8, 3), np.uint8)
    small, whole = clean.copy(), clean + 200
    small[5:7, 6:8] = 255
    colour = list(bytes.fromhex(plots.HIGHLIGHT[1:]))
    is_frame = lambda uri: (picture(uri)[..., :3] == colour).all(-1)
    framed = is_frame(plots.marked(clean, small, 80))
    rows, columns = np.nonzero(framed)
    assert (rows.min(), rows.max()) == (5 * 10 + 1 - 2, 7 * 10 + 1 + 1)
    assert columns.min() == 6 * 10 + 1 - 2 and not framed[52:70, 62:79].any()
    assert not is_frame(plots.marked(clean, whole, 80)).any()
    assert not is_frame(plots.marked(clean, clean, 80)).any()


def test_settings_are_folded_away(text):
    folded = text[text.index('<section id="settings"') :]
    assert folded.index("<details") < folded.index("nested.deep") < folded.index("</details>")
    assert "<details open" not in text


def test_many_classes_draw_the_highest_and_list_all():
    content = Content(title="t", scans=[scan(names=[f"name{k}" for k in range(100)], target=77)])
    seen = Page(page.render(content))
    assert "70 classes with lower rates are not drawn" in seen.text
    assert all(f"name{k}" in seen.text for k in range(100))


def test_many_pairs_are_one_picture_and_a_short_table():
    content = Content(
        title="t", pairs=[pair_scores(count=100, names=[f"name{k}" for k in range(100)])]
    )
    text = page.render(content)
    assert "9880 more pairs have lower scores" in text and "2 of 9900 pairs" in text
    assert len(text) < 200_000 and len(Page(text).named("image")) == 2  # the matrix and its scale


def test_cells_of_a_matrix_get_darker_with_the_score():
    shade = matrix._shades(np.array([[np.nan, -3.0, 0.0], [7.0, 14.0, np.inf]]), 14.0)[..., 3]
    np.testing.assert_allclose(shade, [[0, 0.06, 0.06], [0.53, 1, 1]])


def test_a_matrix_frames_what_was_detected():
    chart = matrix.draw(pair_scores().scores, detected=[(0, 1), (2, 1)], threshold=7.0)
    assert chart.lower().count(f"stroke: {plots.HIGHLIGHT.lower()}") == 2
    assert plots.HIGHLIGHT.lower() not in matrix.draw(pair_scores().scores, threshold=7.0).lower()
    axes = Figure().subplots()
    matrix._frame(axes, [(0, 2)], 4)
    assert axes.patches[0].get_xy() == (1.5, -0.5)  # sources are rows, targets columns


def test_histograms_share_one_axis():
    view = page._neuron_view(activations())
    assert len(view["panels"]) == 3 and view["before_after"] == ("0.99", "0.12")
    spans = []

    def record_span(values, *, span, alt):
        spans.append(span)
        return f"<svg>{alt}</svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "histograms", record_span)
        page._neuron_view(activations())
    (span,) = set(spans)
    assert span[0] < 0.1 and 3.9 < span[1] < 4.2


def test_write_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "report.html"
    page.write(path, full())
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "os", types.SimpleNamespace(**{**vars(files.os), "replace": refuse}))
    with pytest.raises(UserError, match=r"cannot write .*report\.html: No space left on device"):
        page.write(path, Content(title="second"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_write_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        page.write(tmp_path / "file" / "report.html", Content(title="t"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        page.write(tmp_path / "folder", Content(title="t"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_repeated_not_blurred(channels):
    trigger = np.random.default_rng(1).integers(0, 256, (3, 3, channels), np.uint8)
    shown = picture(plots.image(trigger, 120))
    assert shown.shape == (122, 122, 4)
    expected = np.broadcast_to(trigger.repeat(40, 0).repeat(40, 1), (120, 120, 3))
    np.testing.assert_array_equal(shown[1:-1, 1:-1, :3], expected)
    np.testing.assert_array_equal(picture(plots.image(trigger / 255, 120)), shown)


def test_a_grid_takes_stored_and_float_images_alike():
    stored = np.random.default_rng(6).integers(0, 256, (4, 4, 3), np.uint8)
    shown = picture(plots.grid((stored, stored / 255), columns=1, side=40))
    np.testing.assert_array_equal(shown[:42], shown[46:])
    assert (shown[42:46, :, 3] == 0).all()


def test_large_images_shrink():
    assert max(picture(plots.image(np.zeros((224, 200, 3)), 112)).shape) == 114


def test_map_marks_the_original_and_its_place():
    black = np.zeros((3, 3, 3))
    points = np.array([[0.0, 0.0], [1.0, 1.0]])
    args = points, np.stack([black, black]), np.array([0, 1]), "#0072B2"
    plain, marked = (
        picture(plots.trigger_map(*args)),
        picture(plots.trigger_map(*args, (np.array([1.0, 0.0]), black))),
    )
    orange = (marked[..., :3] == list(bytes.fromhex(plots.HIGHLIGHT[1:]))).all(-1) & (
        marked[..., 3] > 0
    )
    rows, columns = np.nonzero(orange)
    assert (
        rows.mean() > 600 and columns.mean() > 600
    )  # the second axis points upwards: bottom right
    assert (plain[:360, 360:, 3] > 0).any() and not (plain[360:, 360:, 3] > 0).any()
    np.testing.assert_array_equal(marked[:360], plain[:360])


def test_pca_is_the_centred_one():
    random = np.random.default_rng(2)
    samples = random.normal(size=(50, 27)) * np.linspace(1, 3, 27) + 5
    extra = random.normal(size=(1, 27))
    mean = samples.mean(0)
    axes = np.linalg.svd(samples - mean, full_matrices=False)[2][:2]
    expected = (np.concatenate([samples, extra]) - mean) @ axes.T
    np.testing.assert_allclose(np.abs(maps.pca(samples, extra)), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(maps.pca(samples), maps.pca(samples, extra)[:50], atol=1e-9)


def test_tsne_keeps_clusters_apart_is_repeatable_and_quick():
    random = np.random.default_rng(3)
    centres = np.repeat([0.0, 5.0, 10.0], 100)[:299, None]
    samples = centres + 0.1 * random.normal(size=(299, 27))
    started = time.process_time()
    points = maps.tsne(samples)
    assert time.process_time() - started < 20  # alone on a core about 2 s
    assert points.shape == (299, 2) and np.isfinite(points).all()
    nearest = np.square(points[:, None] - points).sum(-1) + np.diag(np.full(299, np.inf))
    assert (centres[nearest.argmin(1), 0] == centres[:, 0]).all()
    np.testing.assert_array_equal(points[:5], maps.tsne(samples)[:5])


@pytest.mark.parametrize("place", [maps.pca, maps.tsne])
@pytest.mark.parametrize("shape", [(1, 27), (2, 27), (3, 1), (5, 27), (40, 27), (6, 2)])
def test_maps_of_few_or_equal_points(place, shape):
    same = place(np.full(shape, 0.3))
    np.testing.assert_allclose(same, np.broadcast_to(same[0], (shape[0], 2)), atol=1e-9)
    varied = np.random.default_rng(4).random(shape)
    varied[0, 0] = np.nan
    assert np.isfinite(place(varied, varied[:1])).all()
    assert place(varied, varied[:1]).shape == (shape[0] + 1, 2)


def test_spread_out_keeps_a_maximal_set_in_order():
    points = np.random.default_rng(5).random((300, 2))
    kept = maps.spread_out(points, 0.1)
    far = np.sqrt(np.square(points[:, None] - points[kept]).sum(-1))
    np.testing.assert_array_equal(kept, np.sort(kept))
    assert kept[0] == 0 and len(kept) > 20
    assert (far[kept] + np.eye(len(kept)) >= 0.1).all()  # kept ones are apart,
    assert (far.min(1) < 0.1).all()  # and every other one is too near to one of them
    assert len(maps.spread_out(np.zeros((0, 2)), 0.1)) == 0


def test_unit_square_keeps_proportions():
    scaled = maps.unit_square(np.array([[0.0, 0.0], [4.0, 1.0], [2.0, 2.0]]))
    np.testing.assert_allclose(scaled, [[0, 0.25], [1, 0.5], [0.5, 0.75]])
    np.testing.assert_allclose(maps.unit_square(np.ones((3, 2))), 0.5)


def test_a_class_that_was_not_judged_is_not_the_next_highest():
    """A search that ended early has rates of its target alone."""
    scan = Scan(
        name="m",
        verdict="backdoored",
        targets=[1],
        classes=[
            {"class": k, "name": str(k), "attack_success_rate": rate, "score": 0.0}
            for k, rate in enumerate((float("nan"), 0.997, None))
        ],
    )
    reason = verdicts.describe_reason(scan)
    assert "99.7" in reason and "next highest" not in reason
