"""Passages: slices of the Markdown, none too long, nothing lost, and each knows its headings and its page."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from documents.passages import Splitter, embedded_text

MOST_TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SENTENCE = "The cat sat on the mat. "
PIECES = st.sampled_from(
    [
        "# Title\n",
        "## Part two ##\n\n",
        "###### deep\n",
        "Ruled\n=====\n",
        "Ruled too\n---\n",
        "#\n",
        "```\n# no heading\n```\n",
        "~~~~ python\n``` \n# nor this\n~~~~\n",
        "```",
        "| a | b |\n|---|---|\n| cell one | cell two |\n",
        "- item one\n  - item two\n",
        "> quoted\n> more\n",
        "    indented code()\n",
        "![picture](a.png) [link](http://example.com/a_b_c)\n",
        "\n\n",
        "   \t\n",
        "\r\n",
        SENTENCE,
        "漢字かな交じり文。",
        "한국어 문장입니다. ",
        "👩‍👩‍👧‍👦🇨🇭",
        "e\u0301\u0301\u0301",
        "x" * 300,
        "----",
        "****",
        "[[[[",
        "\u2028\x0b\x0c\u00a0",
        "&amp;<br/>",
        "---\ntitle: x\n---\n",
    ]
)
MARKDOWN = st.lists(PIECES | st.text(max_size=40), max_size=30).map("".join)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as BERT's: few words and all letters, unknown signs are one token."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "mat", "title", "漢", *LETTERS, *".,|-#`*[]()>!:/<&;="]
    vocabulary = {word: at for at, word in enumerate([*words, *(f"##{letter}" for letter in LETTERS)])}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = BertNormalizer()
    made.pre_tokenizer = BertPreTokenizer()
    special = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    made.enable_truncation(8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def splitter(tokenizer: Path) -> Splitter:
    return Splitter(tokenizer, most_tokens=MOST_TOKENS)


@pytest.fixture(scope="session")
def counting(tokenizer: Path) -> Tokenizer:
    made = Tokenizer.from_file(str(tokenizer))
    made.no_truncation()
    return made


@quick
@given(markdown=MARKDOWN)
def test_passages_are_slices_in_order_that_do_not_overlap(splitter: Splitter, markdown: str) -> None:
    end = 0
    for place, passage in enumerate(splitter.cut(markdown)):
        assert passage.place == place
        assert end <= passage.start < passage.end <= len(markdown)
        assert passage.text == markdown[passage.start : passage.end]
        assert passage.text.strip()
        end = passage.end


@quick
@given(markdown=MARKDOWN)
def test_no_passage_has_more_tokens_than_the_embedder_may_see(
    splitter: Splitter, counting: Tokenizer, markdown: str
) -> None:
    for passage in splitter.cut(markdown):
        assert passage.tokens == len(counting.encode(passage.text).ids)
        assert passage.tokens <= MOST_TOKENS


@quick
@given(markdown=MARKDOWN)
def test_no_character_is_lost_but_white_space_and_headings_that_the_next_path_has(
    splitter: Splitter, markdown: str
) -> None:
    end = 0
    for passage in splitter.cut(markdown):
        between = markdown[end : passage.start]
        left_out = [line.strip(" \t\r#") for line in between.split("\n") if line.strip(" \t\r#=-\u2028\x0b\x0c\u00a0")]
        assert all(" ".join(line.split()) in (passage.heading or "") for line in left_out)
        end = passage.end
    assert not markdown[end:].strip()


@quick
@given(markdown=MARKDOWN, most_tokens=st.integers(1, 60))
def test_without_a_tokenizer_four_bytes_are_a_token(markdown: str, most_tokens: int) -> None:
    for passage in Splitter(None, most_tokens=most_tokens).cut(markdown):
        assert passage.tokens == -(-len(passage.text.encode()) // 4)
        assert passage.tokens <= most_tokens or len(passage.text) == 1


@quick
@given(markdown=MARKDOWN)
def test_the_same_text_gives_the_same_passages(splitter: Splitter, tokenizer: Path, markdown: str) -> None:
    assert splitter.cut(markdown) == Splitter(tokenizer, most_tokens=MOST_TOKENS).cut(markdown)


def test_a_passage_knows_the_path_of_headings_that_it_is_under(splitter: Splitter) -> None:
    markdown = (
        f"Before. {SENTENCE}\n\n# Guide\n\n{SENTENCE * 2}\n\n### Set up ###\n\n{SENTENCE * 2}"
        f"\n\n## Use\n\n{SENTENCE * 2}\n\nNotes\n=====\n\n{SENTENCE * 2}"
    )
    found = splitter.cut(markdown)
    assert list(dict.fromkeys(passage.heading for passage in found)) == [
        None,
        "Guide",
        "Guide > Set up",
        "Guide > Use",
        "Notes",
    ]


def test_hashes_in_code_and_rules_of_tables_lists_and_front_matter_are_no_headings(splitter: Splitter) -> None:
    markdown = (
        f"---\ntitle: front\n---\n\n# Real\n\n```sh\n# comment\n~~~\n# another\n```\n\n    # indented\n\n#hashtag\n\n"
        f"| a |\n---\n\n- item\n---\n\n{SENTENCE}\nover\n---\n\n~~~\n# open to the end\n{SENTENCE}"
    )
    assert {passage.heading for passage in splitter.cut(markdown)} == {None, "Real"}


def test_a_heading_stays_with_the_text_that_follows_it(splitter: Splitter) -> None:
    found = splitter.cut(f"# One\n\n{SENTENCE}\n\n# Two\n\n{SENTENCE}")
    assert [passage.text.split("\n")[0] for passage in found if passage.text.startswith("#")] == ["# One", "# Two"]
    assert all(SENTENCE.strip() in passage.text for passage in found)


def test_a_heading_that_does_not_fit_before_its_text_is_in_the_path_only(splitter: Splitter) -> None:
    full = "cat " * (MOST_TOKENS - 2)
    assert [(passage.heading, passage.text) for passage in splitter.cut(f"# Title\n\n{full}")] == [
        ("Title", full.strip())
    ]


def test_headings_that_nothing_follows_are_kept(splitter: Splitter) -> None:
    assert [passage.text for passage in splitter.cut("# One\n\n# Two\n")] == ["# One\n\n# Two"]


@pytest.mark.parametrize("markdown", ["", " \n\t\n", "\u2028\x0c"])
def test_a_text_without_characters_has_no_passages(splitter: Splitter, markdown: str) -> None:
    assert splitter.cut(markdown) == []


def test_a_passage_is_on_the_page_that_it_starts_on(splitter: Splitter) -> None:
    page = SENTENCE * 3 + "\n\n"
    found = splitter.cut(page * 3, pages=[0, len(page), 2 * len(page)])
    assert {passage.page for passage in found} == {1, 2, 3}
    assert all(passage.page == 1 + passage.start // len(page) for passage in found)
    assert {passage.page for passage in splitter.cut(page)} == {None}


def test_the_first_line_of_code_keeps_its_indentation(splitter: Splitter) -> None:
    assert splitter.cut(f"{SENTENCE * 2}\n\n    code()\n    more()\n")[-1].text.startswith("    code()")


def test_the_digest_is_of_the_text_and_its_headings(splitter: Splitter) -> None:
    [one], [same] = splitter.cut("# A\n\ncat"), splitter.cut("\n\n# A\n\ncat")
    [other] = splitter.cut("# B\n\ncat")
    assert one.digest == same.digest != other.digest
    assert len(one.digest) == 32


def test_what_is_embedded_is_the_text_alone(splitter: Splitter) -> None:
    [passage] = splitter.cut("# A\n\ncat")
    assert embedded_text(passage) == "# A\n\ncat"


MONSTERS = {
    "one word": "x" * 100_000,
    "headings": "# a b\n" * 30_000,
    "sections": "# a b\n\ntext\n" * 10_000,
    "a table": "| a | b |\n|---|---|\n" + "| the cat | mat |\n" * 20_000,
    "Chinese": "漢字" * 20_000,
    "quotes": "> " * 50_000 + "a",
    "brackets": "[" * 100_000,
    "fences": "```\n# x\n" * 20_000,
    "a title": "# " + "word " * 50_000,
    "rules": "a\n\n---\n\n" * 20_000,
    "empty lines": "\n" * 300_000 + "x",
    "accents": "e" + "\u0301" * 50_000,
}


@pytest.mark.parametrize("markdown", MONSTERS.values(), ids=MONSTERS.keys())
def test_no_text_takes_long_or_makes_a_passage_long(tokenizer: Path, markdown: str) -> None:
    began = time.monotonic()
    found = Splitter(tokenizer, most_tokens=200).cut(markdown)
    assert time.monotonic() - began < 30  # 2 s at most alone; what is quadratic in all of it takes minutes
    assert max(len(passage.text) for passage in found) <= 200 * 8
