"""markup.py: breaks, respellings and lexicons; other tags are named."""

from pathlib import Path

import pytest

from slm.tokenization.markup import load_lexicon, read_markup


def test_breaks_are_blank_lines_with_pauses() -> None:
    marked = read_markup(
        "One <break time=\"0.5s\"/> two.\n\nThree<break time='250ms'></break><break/>\n\n***\n four"
        '<break strength="strong"/>five <break/>'
    )
    assert marked.text == "One\n\ntwo.\n\nThree\n\n***\n four\n\nfive"
    assert marked.pauses == (0.5, None, 0.65, 0.8)
    assert marked.removed == ()
    assert read_markup(" a text  ").text == " a text  "


def test_other_tags_are_removed_and_named() -> None:
    marked = read_markup('<speak>a <prosody rate="slow">red</prosody> hen <br/> 5 < 6 > 4</speak>')
    assert marked.text == "a red hen  5 < 6 > 4"
    assert marked.removed == ("br", "prosody", "speak")


def test_tags_that_separate_words() -> None:
    marked = read_markup("<p>One<br>two<b>!</b></p><p>Three<!-- note --></p><?xml x?>")
    assert marked.text == "One two!\n\nThree"
    assert marked.removed == ("!", "?", "b", "br", "p")


def test_markdown_and_character_references() -> None:
    text = "# Part One\n\nA **very *old* red** `cat_x`:\n- Milk\n* Eggs!\n"
    text += "\u2022 _5_ &amp; 6&nbsp;&lt;7"
    assert read_markup(text).text == ("Part One.\n\nA very old red cat_x:\nMilk.\nEggs!\n5 & 6 <7.")
    for plain in (
        "2 * 3 * 4",
        "a_b_c",
        "-5 and - 5",
        "#1 &c; x&y;",
        "5*",
        "**",
        "http://a.org/b/c",
    ):
        assert read_markup(plain).text == plain


def test_phonemes_may_have_slashes() -> None:
    text = "say /t\u0259\u02c8me\u026a/ or [tomato](/t\u0259\u02c8m\u0251\u02d0/) and/or /usr/bin/"
    assert read_markup(text).text == (
        "say t\u0259\u02c8me\u026a or t\u0259\u02c8m\u0251\u02d0 and/or /usr/bin/"
    )


def test_respellings() -> None:
    lexicon = {"nguyen": "win", "new york": "noo york"}
    text = "Nguyen's [Nguyen](nwen), [here](https://a.org) in NEW YORK, [1] (so) Nguyens"
    assert read_markup(text, lexicon).text == "win's nwen, here in noo york, [1] (so) Nguyens"
    assert read_markup(text).text == text.replace("[Nguyen](nwen)", "nwen").replace(
        "[here](https://a.org)", "here"
    )
    assert read_markup(text, lexicon).respelled
    assert not read_markup("one <break/> two, here", lexicon).respelled


@pytest.mark.parametrize("tag", ['<break time="5"/>', "<break time='11s'>", '<break strength="x">'])
def test_breaks_without_a_time_are_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=r"break (time|strength) '"):
        read_markup(f"a {tag} b")


def test_a_lexicon_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.tsv"
    path.write_text("\ufeff# names\nNguyen\twin\n\nNew York\tnoo york\r\n", encoding="utf-8")
    assert load_lexicon(path) == {"nguyen": "win", "new york": "noo york"}
    path.write_text("Nguyen win\n")
    with pytest.raises(ValueError, match="line 1: give a word, a tab"):
        load_lexicon(path)
    with pytest.raises(ValueError, match="no lexicon"):
        load_lexicon(tmp_path / "none.tsv")
    path.write_text("nguyen\twin\n", encoding="utf-16")
    with pytest.raises(ValueError, match="is UTF-16, not UTF-8"):
        load_lexicon(path)
