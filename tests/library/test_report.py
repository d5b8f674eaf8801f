import base64
import io
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
    return [Pictures(text, text, {text: picture}), Table(text, text, [text], [[text, text]])]


def parsed(path, **changes):
    return Page(report(path, **changes).read_text(encoding="utf-8"))


def test_everything_is_on_the_page(tmp_path):
    page = parsed(tmp_path / "new" / "report.html")
    for text in ("A mug", "five pictures", "Before and after", "Left the base", "400",
                 "subject hit", "81", "orthogonality error", "6e-7",
                 "learning_rate", "0.001", "a, b", "(none)", 'load_oft_weights(pipe, "runs/mug")'):  # fmt: skip
        assert text in page.text
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta")[0]["charset"] == "utf-8"


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
    assert page.all("svg")[0]["role"] == "img"
    assert page.all("svg")[0]["aria-label"].startswith("Loss over 4 steps")


@pytest.mark.parametrize(
    "attack", [ATTACK, "</title></pre></td><h1>", "\"'><img src=x onerror=alert(1)>", "кот 🐈 日本"]
)
def test_whatever_is_written_stays_text(tmp_path, attack):
    picture = Image.new("RGB", (4, 4))
    plain = parsed(tmp_path / "plain.html", facts={"a": 1}, settings={"b": 2}, sections=parts("x", picture))
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
    # title twice, lead, usage, a fact and its label, settings three times, heading and text twice, three cells
    assert page.text.count(attack) == 16


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), min_size=4, max_size=4))
def test_any_text_keeps_the_pages_shape(tmp_path_factory, texts):
    title, lead, usage, value = texts
    path = tmp_path_factory.mktemp("report") / "r.html"
    page = parsed(path, title=title, lead=lead, usage=usage, settings={"key": value})
    assert len(page.all("section")) == 5
    assert all(text in page.text for text in texts)


@given(losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_curve_stays_inside_its_frame(losses):
    curve = loss_curve(losses)
    page = Page(curve)
    width, height = map(float, page.all("svg")[0]["viewbox"].split()[2:])
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in page.all("circle")]
    line = [tuple(map(float, p.split(","))) for p in page.all("polyline")[0]["points"].split()]
    assert len(dots) == len(line) == len(losses)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in [*dots, *line])
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    if losses[0] > losses[-1] + max(losses) / 50:
        assert dots[0][1] < dots[-1][1]  # higher losses are higher up


@pytest.mark.parametrize(
    "losses", [[], [0.0], [1.0], [0.0] * 5, [float("nan")], [0.1, float("nan"), 0.2], [float("inf"), 0.1]]
)
def test_runs_that_went_wrong_still_have_a_page(tmp_path, losses):
    path = report(tmp_path / "r.html", losses=losses, sections=[], facts={}, settings={})
    Page(path.read_text(encoding="utf-8"))
    coordinates = re.findall(r'(?:cx|cy|points)="([^"]*)"', loss_curve(losses))
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
