"""The token table: building, files, and what is no vocabulary."""

import json

import pytest

from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError


def test_build_sorts_the_genes_and_appends_the_specials():
    vocabulary = Vocabulary.build(["B", "A", "C", "A"])
    assert vocabulary.tokens == {"A": 0, "B": 1, "C": 2, "<pad>": 3, "<cls>": 4, "<eoc>": 5}
    assert (vocabulary.pad, vocabulary.cls, vocabulary.eoc, vocabulary.size) == (3, 4, 5, 6)
    assert vocabulary.names == ["A", "B", "C", "<pad>", "<cls>", "<eoc>"]
    assert len(vocabulary) == 6


def test_files_are_the_same_bytes_for_the_same_vocabulary(tmp_path):
    first = Vocabulary.build(["GÉNE", "A"])
    again = Vocabulary(dict(reversed(first.tokens.items())))
    first.save(tmp_path / "first.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    loaded = Vocabulary.load(tmp_path / "first.json")
    assert loaded.tokens == first.tokens
    assert loaded.fingerprint == first.fingerprint == again.fingerprint
    assert Vocabulary.build(["A"]).fingerprint != first.fingerprint
    assert loaded == again and hash(loaded) == hash(again)
    assert loaded != Vocabulary.build(["A"]) and loaded != first.tokens


def test_specials_may_stand_anywhere_and_ids_may_have_gaps():
    vocabulary = Vocabulary({"<pad>": 0, "<cls>": 1, "G": 7, "<eoc>": 2})
    assert vocabulary.size == 8
    assert vocabulary.names == ["<pad>", "<cls>", "<eoc>", "", "", "", "", "G"]


SPECIALS = '"<pad>": 1, "<cls>": 2, "<eoc>": 3}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"A": "0"}', "not a JSON object"),
        ('{"A": 0.5}', "not a JSON object"),
        ('{"A": true}', "not a JSON object"),
        ('{"A": 0}', "lacks the special tokens <pad>, <cls>, <eoc>"),
        ('{"A": 0, "<pad>": 1, "<cls>": 2}', "lacks the special token <eoc>"),
        ('{"A": 1, ' + SPECIALS, "'A' and '<pad>' share the id 1"),
        ('{"A": 0, "A": 4, ' + SPECIALS, "names a token twice"),
        ('{"A": -1, ' + SPECIALS, "the id of 'A' is -1"),
        ('{"A": 4000000000, ' + SPECIALS, "outside 0"),
        ('{"A": 1000000, ' + SPECIALS, "without large gaps"),
        ("{" + SPECIALS, "holds no gene"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, text, message):
    path = tmp_path / "vocabulary.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"vocabulary\.json") as error:
        Vocabulary.load(path)
    assert message in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="there is no vocabulary"):
        Vocabulary.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        Vocabulary.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        Vocabulary.load(tmp_path / "binary.json")


def test_the_file_is_plain_json(tmp_path):
    Vocabulary.build(["A"]).save(tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == {"A": 0, "<pad>": 1, "<cls>": 2, "<eoc>": 3}
