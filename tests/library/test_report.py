import base64
import io
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oft_diffusion.errors import AdapterFileError
from oft_diffusion.report import Pictures, Table, loss_curve, write_report
from tests.library.support import assert_one_sentence

VOID = {"meta", "img", "br", "hr", "link", "input"}
ATTACK = "<script>alert('1')</script> \"quoted\" & $title ${x} $$ %s {0}"


class Page(HTMLParser):
    """A page's elements, with every tag closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def report(path, **changes):
    picture = Image.new("RGB", (24, 16), (200, 30, 30))
    arguments = {
        "title": "A mug",
        "lead": "Trained on five pictures.",
        "sections": [
            Pictures("Before and after", "Left the base.", {"Two mugs": picture}),
            Table("Figures", "Per cent.", ["", "adapter"], [["subject hit", "81"]]),
        ],
        "losses": [0.5, 0.4, 0.6, 0.3],
        "facts": {"steps": 400, "orthogonality error": "6e-7"},
        "settings": {"learning_rate": 1e-3, "targets": ["a", "b"], "class_word": None, "empty": []},
        "usage": 'load_oft_weights(pipe, "runs/mug")',
    }
    return write_report(path, **{**arguments, **changes})


def parts(text, picture):
    return [Pictures(text, text, {text: picture}, [text]), Table(text, text, [text, text], [[text, text]])]


def parsed(path, **changes):
    return Page(report(path, **changes).read_text(encoding="utf-8"))


def test_everything_is_on_the_page(tmp_path):
    page = parsed(tmp_path / "new" / "report.html")
    for text in ("A mug", "five pictures", "Before and after", "Left the base", "400",
                 "subject hit", "81", "orthogonality error", "6e-7",
                 "learning_rate", "0.001", "(none)", 'load_oft_weights(pipe, "runs/mug")'):  # fmt: skip
        assert text in page.text
    assert page.all("meta")[0]["charset"] == "utf-8"


def test_settings_that_are_empty_are_told_in_words_and_lists_item_by_item(tmp_path):
    settings = {"class_prompts": ["", "a cat, at night"], "negative_prompt": "", "targets": (), "class_word": None}
    page = (report(tmp_path / "r.html", settings=settings)).read_text(encoding="utf-8")
    shown = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert shown == {
        "class_prompts": "<ul><li>(empty)</li><li>a cat, at night</li></ul>",
        "negative_prompt": "(empty)",
        "targets": "(none)",
        "class_word": "(none)",
    }


def test_a_screen_reader_finds_language_title_headings_in_order_and_a_text_for_each_picture(tmp_path):
    page = parsed(tmp_path / "r.html")
    assert page.all("html")[0]["lang"] == "en"
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall("<title>(.*?)</title>", text) == ["A mug"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    [curve] = [attrs for _, attrs in page.elements if attrs.get("role") == "img"]
    assert re.fullmatch(r"Loss over 4 steps, from a mean of \S+ to \S+", curve["aria-label"] or "")
    assert len(page.all("main")) == 1
    assert {attrs.get("scope") for attrs in page.all("th")} == {"col", "row"}


def test_pictures_may_have_captions_each_beside_its_own(tmp_path):
    images = {"One": Image.new("RGB", (4, 4)), "Two": Image.new("RGB", (4, 4))}
    page = report(tmp_path / "r.html", sections=[Pictures("a", "b", images, ["Before", "After"])])
    found = re.findall('<figcaption>(.*?)</figcaption><img [^>]* alt="(.*?)">', page.read_text(encoding="utf-8"))
    assert found == [("Before", "One"), ("After", "Two")]
    with pytest.raises(ValueError, match="zip"):
        report(tmp_path / "r.html", sections=[Pictures("a", "b", images, ["Before"])])


def test_the_page_needs_nothing_but_itself(tmp_path):
    path = report(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    for tag, attrs in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert (attrs.get(name, "data:") or "").startswith("data:")
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"https?://|//\w|@import|url\(", path.read_text(encoding="utf-8").replace(ATTACK, ""))


def test_pictures_are_inside_and_have_a_text(tmp_path):
    noise = Image.effect_noise((20, 30), 90).convert("RGB")
    page = parsed(tmp_path / "r.html", sections=[Pictures("a", "b", {"Alt one": noise, "Alt two": noise})])
    images = page.all("img")
    assert [image["alt"] for image in images] == ["Alt one", "Alt two"]
    for image in images:
        assert (image["width"], image["height"]) == ("20", "30")
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    "attack", [ATTACK, "</title></pre></td><h1>", "\"'><img src=x onerror=alert(1)>", "кот 🐈 日本"]
)
def test_whatever_is_written_stays_text(tmp_path, attack):
    picture = Image.new("RGB", (4, 4))
    plain = parsed(tmp_path / "plain.html", facts={"a": 1}, settings={"b": [2, 3]}, sections=parts("x", picture))
    page = parsed(
        tmp_path / "attack.html",
        title=attack,
        lead=attack,
        usage=attack,
        facts={attack: attack},
        settings={attack: [attack, attack]},
        sections=parts(attack, picture),
    )
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.all("img")[0]["alt"] == attack
    # title twice, lead, usage, a fact and its label, settings three times, heading and text twice, caption, four cells
    assert page.text.count(attack) == 18
    assert page.all("td")[0]["data-column"] == attack


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), min_size=4, max_size=4))
def test_any_text_keeps_the_pages_shape(tmp_path_factory, texts):
    title, lead, usage, value = texts
    path = tmp_path_factory.mktemp("report") / "r.html"
    page = parsed(path, title=title, lead=lead, usage=usage, settings={"key": value})
    assert len(page.all("section")) == 5
    assert all(text in page.text for text in texts)


_POINT = re.compile(r"([\d.]+),([\d.]+)")


@given(losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_curve_stays_inside_its_frame(losses):
    curve = loss_curve(losses)
    page = Page(curve)
    width, height = map(float, page.all("svg")[0]["viewbox"].split()[2:])
    paths = {path["class"]: [(float(x), float(y)) for x, y in _POINT.findall(path["d"])] for path in page.all("path")}
    dots, line = paths["dots"], paths["mean"]
    assert len(dots) == len(line) == len(losses)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in [*dots, *line])
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    if losses[0] > losses[-1] + max(losses) / 50:
        assert dots[0][1] < dots[-1][1]  # higher losses are higher up


@pytest.mark.parametrize("count", [599, 600, 601, 20_000])
def test_a_long_runs_curve_has_few_dots_and_the_mean_of_all(count):
    losses = [1.0 + (i % 2) for i in range(count - 1)] + [2.0]
    curve = loss_curve(losses)
    paths = {path["class"]: _POINT.findall(path["d"]) for path in Page(curve).all("path")}
    assert len(paths["dots"]) == len(paths["mean"])
    assert 300 <= len(paths["dots"]) <= 601
    assert (paths["dots"][0][0], paths["dots"][-1][0]) == ("0.0", "1000.0")
    window = count // 10
    ended = sum(losses[-window:]) / window
    assert f"to {ended:.3g}" in curve
    assert 2 * (1 - float(paths["mean"][-1][1]) / 1000) == pytest.approx(ended, abs=2e-3)


@given(highest=st.floats(1e-9, 1e9))
def test_the_curves_levels_are_few_and_round_and_lie_where_they_say(highest):
    curve = loss_curve([highest / 2, highest], 90)
    assert "step 90" in curve
    assert "step 91" in curve
    levels = [float(text) for text in re.findall("<span>([^<s]+)</span>", curve)]  # from top to bottom
    assert 4 <= len(levels) <= 5
    assert levels[-1] == 0
    assert highest <= levels[0] * (1 + 1e-5)
    assert levels[0] < 2 * highest
    assert all(len(f"{level:g}".rstrip("0")) <= 8 for level in levels)
    paths = {path["class"]: _POINT.findall(path["d"]) for path in Page(curve).all("path")}
    heights = [1 - float(y) / 1000 for _, y in paths["lines"]]
    assert heights == pytest.approx([level / levels[0] for level in reversed(levels)], abs=1e-4)
    assert 1 - float(paths["dots"][1][1]) / 1000 == pytest.approx(highest / levels[0], abs=1e-4)


@pytest.mark.parametrize(
    "losses", [[], [0.0], [1.0], [0.0] * 5, [float("nan")], [0.1, float("nan"), 0.2], [float("inf"), 0.1]]
)
def test_runs_that_went_wrong_still_have_a_page(tmp_path, losses):
    path = report(tmp_path / "r.html", losses=losses, sections=[], facts={}, settings={})
    Page(path.read_text(encoding="utf-8"))
    coordinates = re.findall(r' d="([^"]*)"', loss_curve(losses))
    assert bool(coordinates) == any(map(math.isfinite, losses))
    assert "nan" not in " ".join(coordinates)
    assert "inf" not in " ".join(coordinates)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report(tmp_path / "r.html")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterFileError) as error:
        report(path, title="Another")
    assert_one_sentence(error, "r.html", "No space")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
