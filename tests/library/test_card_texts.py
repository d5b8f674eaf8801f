"""Texts of users and strangers in a card: shown as they are, unable to become markup, code or a path."""

import ast
import html
import re
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oft_diffusion.pipeline.card import CARD_NAME, write_model_card
from oft_diffusion.pipeline.escaping import code, line, plain, python, without_local_paths
from tests.library.cards import REPO, bare, block, card_of

# Hostile texts

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "`</code><b>x</b>` ``` ``",
    "```\n---\n# heading\n| a | b |\n|---|---|",
    "x\n---\nlicense: mit\ntags: [x]\n---\n",
    "--- !!python/object/apply:os.system ['true']",
    '\'; rm -rf ~; echo "$(id)" `id` \\',
    '"""\nraise SystemExit\n"""',
    "{{ 7 * 7 }} {% raw %} ${HOME} %(x)s {trigger} {0}",
    "yes",
    "null",
    "*a* _b_ ~~c~~ ^d^ :smile: @someone #1 www.evil.example https://evil.example $$x$$ &lt;b&gt; &#60;",
    "<!-- oft-diffusion 0000000000000000 -->",
    "\x00\x1b[31m\x85\u2028\u202eevil\ud800\ufeff",
    "кот 猫 🐈‍⬛ é",
    "x" * 5000,
]


class Outline(HTMLParser):
    """Elements and the attributes that act, apart from texts."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple((k, v) for k, v in attrs if k != "alt" and not (k == "src" and "sample-" in v))))

    def handle_comment(self, data):
        self.found.append(("comment", re.sub(r"[0-9a-f]{16}", "", data)))


def outlines(text):
    """As CommonMark with raw HTML, tables and links that make themselves sees it, and as Python-Markdown does."""
    markdown_it, markdown = pytest.importorskip("markdown_it"), pytest.importorskip("markdown")
    strict = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [Outline(page).found for page in (strict.render(text), markdown.markdown(text, extensions=["fenced_code"]))]


def hostile_card(tmp_path, text):
    """A card in which every text that a user or a stranger may choose is this one."""
    folder = bare(
        tmp_path,
        trigger=text,
        class_word=text,
        base={"name": text, "components": {"unet": text}, "family": text, "pipeline": text},
        training={"instance_prompt": text, "imported_from": text, "mixed_precision": text, "combined": text},
    )
    settings = {"prompt": text, "negative_prompt": text, "scheduler": text, "seed": 1, "model": text}
    sample = SimpleNamespace(image=Image.new("RGB", (4, 4)), settings=settings)
    (folder / CARD_NAME).unlink(missing_ok=True)
    return write_model_card(folder, REPO, license=text, sample_images=[sample]).parent


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_breaks_out(tmp_path, text):
    harmless, card = card_of(hostile_card(tmp_path, "harmless")), card_of(folder := hostile_card(tmp_path, text))
    assert set(card.data.to_dict()) == set(harmless.data.to_dict())
    assert card.data.tags == harmless.data.tags
    assert card.data.license == "other"
    [entry] = card.data.widget
    assert entry["text"] == entry["parameters"]["negative_prompt"] == line(text)
    assert card.data.instance_prompt == line(text.replace("{trigger}", text).replace("{class_word}", text))
    assert outlines(card.text) == outlines(harmless.text)
    source = block(folder, "python")
    compile(source, "card", "exec")
    assert (source.count("\n"), block(folder, "bash").count("\n")) == (11, 1)
    words = shlex.split(block(folder, "bash"))
    assert words[:5] == ["oft-diffusion", "generate", line(text), "--model", words[4]]
    assert words[words.index("--negative") + 1] == line(text)


@given(text=st.text())
def test_any_text_is_shown_as_it_is(text):
    md = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True})
    shown = line(text)
    assert "\n" not in shown
    shown.encode()
    [paragraph] = re.findall(r"<p>x <code>(.*)</code></p>\n", md.render(f"x {code(text)}"))
    assert html.unescape(paragraph) == (shown or " ")
    [picture] = md.parseInline(f"![{plain(text)}](x.png)")[0].children or []
    assert (picture.type, picture.attrs["src"]) == ("image", "x.png")
    assert "".join(token.content for token in picture.children or []) == shown
    assert ast.literal_eval(python(text)) == shown


# No leaks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/models/sd.safetensors", "sd.safetensors"),
        ("/home/me/my models/sd 1.5/", "sd 1.5"),
        ("C:\\Users\\me\\sd", "sd"),
        ("C:/Users/me/sd", "sd"),
        ("\\\\server\\share\\me\\sd", "sd"),
        ("trained on /home/me/a.png, (C:\\me\\b.png) and 'file:///me/c.png'", "trained on a.png, (b.png) and 'c.png'"),
        ("--model=/home/me/sd", "--model=sd"),
        ("some-org/model", "some-org/model"),
        (
            "see https://huggingface.co/some-org/model, and/or 1/2",
            "see https://huggingface.co/some-org/model, and/or 1/2",
        ),
        (r"down_blocks\.\d+\.attn/.*", r"down_blocks\.\d+\.attn/.*"),
        ("a mug / a cup", "a mug / a cup"),
        ("", ""),
    ],
)
def test_of_absolute_paths_the_last_part_is_kept(text, expected):
    assert without_local_paths(text) == expected
    assert without_local_paths({"a": [text, 1, None, True, 0.5]}) == {"a": [expected, 1, None, True, 0.5]}
