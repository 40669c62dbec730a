import bz2
import collections
import gzip
import json
import lzma
import os
import random
import tempfile
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.text.documents import assign_splits, prepare_documents
from resmem_lm.text.shards import SPLITS, position, read_shard, shard_paths
from resmem_lm.text.sources import Document, read_documents
from resmem_lm.workdir.run import Run

COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}
COMPRESSED = pytest.mark.parametrize("suffix", COMPRESS)


def documents_of(source):
    return list(read_documents(str(source), duplicate_threshold=0.7))


def texts(source):
    return [document.text for document in read_documents(source, duplicate_threshold=0.7)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def prepared(workdir, split=None):
    """Return the documents in the shards of a split, or of all splits."""
    splits = SPLITS if split is None else [split]
    return [document for name in splits for path in shard_paths(Run(workdir), name) for document in read_shard(path)]


def different_texts(count, words=30):
    return [" ".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=words)) for seed in range(count)]


def message(call, *args, **kwargs):
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = write(tmp_path / name, "Two lines,\none document.\n")
    assert documents_of(path) == [Document(str(path), "Two lines,\none document.\n")]


@pytest.mark.parametrize("name", ["c4.jsonl", "c4-train.00000-of-01024.json"])
def test_a_line_with_a_text_is_one_document_and_its_other_fields_are_ignored(tmp_path, name):
    record = {"text": "From C4.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com/"}
    path = write(tmp_path / name, lines(record) + "\n" + lines({"text": "ü\u2028\n", "meta": None}))
    assert documents_of(path) == [Document(f"{path}#1", "From C4."), Document(f"{path}#3", "ü\u2028\n")]


@COMPRESSED
def test_compressed_files_have_the_content_of_the_plain_ones(tmp_path, suffix):
    long_text = " ".join(different_texts(500))
    for name, content in {"a.txt": long_text, "b.jsonl": lines({"text": long_text}, {"text": "short"})}.items():
        plain = write(tmp_path / name, content)
        packed = write(tmp_path / (name + suffix), COMPRESS[suffix](content.encode()))
        assert texts(str(packed)) == texts(str(plain))


@COMPRESSED
def test_a_compressed_file_may_have_several_parts(tmp_path, suffix):
    long_text = " ".join(different_texts(500))
    compress = COMPRESS[suffix]
    path = write(tmp_path / f"a.txt{suffix}", compress(long_text.encode()) + compress(b"") + compress(b"end"))
    assert texts(str(path)) == [long_text + "end"]


def test_zstandard_frames_of_other_programs_are_skipped(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
    compress = COMPRESS[".zst"]
    path = write(tmp_path / "a.txt.zst", skippable + compress(b"one ") + skippable + compress(b"two") + skippable)
    assert texts(str(path)) == ["one two"]


def test_byte_order_marks_and_carriage_returns_are_dropped(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "four"}\r\n{"text": "five"}\r\n')
    assert texts(str(tmp_path)) == ["one\ntwo\nthree\n", "four", "five"]


def test_a_directory_is_searched_recursively_for_readable_files(tmp_path):
    for name in ("b.txt", "a/deep/c.md", "a/b.jsonl.gz", "a/picture.png", "a/notes", "z.gz"):
        write(tmp_path / name, gzip.compress(lines({"text": name}).encode()) if name.endswith(".jsonl.gz") else name)
    assert texts(str(tmp_path)) == ["a/b.jsonl.gz", "a/deep/c.md", "b.txt"]


def test_globs_and_lists_name_files_and_each_file_is_read_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.md", "sub/d.txt"):
        write(tmp_path / name, name)
    assert texts(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "sub/d.txt"]
    assert texts([f"{tmp_path}/c.md", f"{tmp_path}/[ab].txt", str(tmp_path), f"{tmp_path}/a.txt"]) == [
        "c.md",
        "a.txt",
        "b.txt",
        "sub/d.txt",
    ]
    assert texts((f"{tmp_path}/b.txt", f"{tmp_path}/a.txt")) == ["b.txt", "a.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    write(tmp_path / "notes[1].txt", "one")
    write(tmp_path / "folder [2]" / "a.txt", "two")
    assert texts([str(tmp_path / "notes[1].txt"), str(tmp_path / "folder [2]")]) == ["one", "two"]


def test_a_file_name_that_is_not_utf_8_becomes_an_id_that_is(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    try:
        write(path, "text")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert [document.id for document in documents_of(path)] == [f"{tmp_path}/caf\N{REPLACEMENT CHARACTER}.txt"]


# Text that cannot be read


@pytest.mark.parametrize("pattern", ["nothing-here", "*.txt", "sub", ""])
def test_a_pattern_that_matches_nothing_is_named(tmp_path, monkeypatch, pattern):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "picture.png", "not read")
    monkeypatch.chdir(tmp_path)
    assert message(texts, pattern) == f"no text found at {pattern!r}: TEXT takes files, directories and globs of .txt, .md, .jsonl, .json"


def test_an_error_about_a_name_with_a_line_break_is_one_line(tmp_path):
    assert message(texts, str(write(tmp_path / "two\nlines.jsonl", "{"))).startswith(f"{tmp_path}/two lines.jsonl, line 1 is not JSON (")


@pytest.mark.parametrize("name", ["picture.png", "README", "a.gz", "a.txt.zip"])
def test_an_unknown_suffix_is_named_with_the_known_ones(tmp_path, name):
    path = write(tmp_path / name, "text")
    assert message(texts, str(path)) == (
        f"{path} has an unknown suffix: TEXT takes .txt, .md, .jsonl, .json, also with .gz, .xz, .zst, .bz2"
    )


def test_text_that_is_not_utf_8_is_named_with_the_byte(tmp_path):
    path = write(tmp_path / "latin1.txt", b"x" * 100_000 + b"\xe9 and more")
    assert (
        message(texts, str(path)) == f"{path} is not UTF-8 (invalid continuation byte at byte 100000): convert it, for example with iconv"
    )


def test_a_line_that_is_not_utf_8_is_named_with_its_number(tmp_path):
    path = write(tmp_path / "latin1.jsonl", lines(*[{"text": "x" * 1000}] * 100) + "\n")
    path.write_bytes(path.read_bytes() + b'{"text": "\xe9"}\n')
    assert message(texts, str(path)) == (
        f"{path}, line 102 is not UTF-8 (invalid continuation byte at byte 10): convert it, for example with iconv"
    )


@pytest.mark.parametrize("line", ["{", '{"text": "a"', "text", "[" * 100_000, "{'text': 'a'}"], ids=lambda line: line[:8])
def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path, line):
    path = write(tmp_path / "a.jsonl", lines({"text": "fine"}) + "\n" + line + "\n")
    error = message(texts, str(path))
    assert error.startswith(f"{path}, line 3 is not JSON (")
    assert error.endswith("): correct or remove the line")


@pytest.mark.parametrize("record", [{}, {"content": "a"}, {"text": 3}, {"text": None}, {"text": ["a"]}, [], "text", 3, None])
def test_a_line_without_a_text_is_named_with_its_number(tmp_path, record):
    path = write(tmp_path / "a.jsonl", lines({"text": "fine"}, record))
    assert message(texts, str(path)) == f'{path}, line 2 has no field "text" with a string: every line must be {{"text": "..."}}'


def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": "whole \U0001f600"}, {"text": "half \ud83d"}))
    assert (
        message(texts, str(path)) == f'{path}, line 2 has a "text" that is not Unicode (surrogates not allowed): correct or remove the line'
    )


@COMPRESSED
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, suffix, kept):
    whole = COMPRESS[suffix](" ".join(different_texts(500)).encode())
    path = write(tmp_path / f"a.txt{suffix}", whole[: int(len(whole) * kept)])
    error = message(texts, str(path))
    assert error.startswith(f"{path} cannot be decompressed (")
    assert error.endswith("): fetch it again")


@COMPRESSED
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_does_not_match_its_suffix_is_named(tmp_path, suffix, name):
    path = write(tmp_path / f"{name}{suffix}", "plain text")
    error = message(texts, str(path))
    assert error.startswith(f"{path} cannot be decompressed (")
    assert error.endswith("): fetch it again")


def test_a_gzip_file_with_damage_inside_is_named(tmp_path):
    whole = bytearray(gzip.compress(" ".join(different_texts(500)).encode()))
    whole[2000:2100] = bytes(100)
    path = write(tmp_path / "a.txt.gz", bytes(whole))
    assert message(texts, str(path)).startswith(f"{path} cannot be decompressed (")


# Splits

FRACTIONS = st.floats(0, 1) | st.sampled_from([0.0, 0.02, 0.3, 0.5])
DIFFERENT = st.lists(st.integers(), unique=True, max_size=40).map(lambda ids: [Document(str(i), f"text {i}") for i in ids])


def split_of(documents, validation, test):
    """Return the split of each document, after checking that it has exactly one."""
    assigned = list(assign_splits(documents, validation_fraction=validation, test_fraction=test))
    assert collections.Counter(document for _, document in assigned) == collections.Counter(documents)
    return {document: split for split, document in assigned}


def natural(document, validation, test):
    place = position(document.text)
    return "test" if place < test else "validation" if place < test + validation else "train"


def inner(documents):
    """Return all documents except the two with the lowest positions and the one with the highest."""
    return sorted(documents, key=lambda document: position(document.text))[2:-1]


@given(DIFFERENT, FRACTIONS, FRACTIONS)
def test_every_document_is_in_exactly_one_of_the_splits(documents, validation, test):
    assert set(split_of(documents, validation, test).values()) <= set(SPLITS)


@given(DIFFERENT.filter(lambda documents: len(documents) >= 3), FRACTIONS, FRACTIONS)
def test_no_split_of_three_or_more_documents_is_empty(documents, validation, test):
    assert set(split_of(documents, validation, test).values()) == set(SPLITS)


@given(DIFFERENT, FRACTIONS, FRACTIONS)
def test_the_position_alone_decides_except_for_the_two_lowest_and_the_highest(documents, validation, test):
    splits = split_of(documents, validation, test)
    for document in inner(documents):
        assert splits[document] == natural(document, validation, test)


@given(DIFFERENT, st.floats(0.2, 0.4), st.floats(0.2, 0.4))
def test_the_position_alone_decides_if_no_split_would_be_empty(documents, validation, test):
    wanted = {document: natural(document, validation, test) for document in documents}
    if set(wanted.values()) == set(SPLITS):
        assert split_of(documents, validation, test) == wanted


@given(DIFFERENT, st.data(), FRACTIONS, FRACTIONS)
def test_a_documents_split_does_not_change_when_others_are_added(documents, data, validation, test):
    some = data.draw(st.lists(st.sampled_from(documents), unique=True)) if documents else []
    before, after = split_of(some, validation, test), split_of(documents, validation, test)
    for document in set(inner(some)) & set(inner(documents)):
        assert before[document] == after[document]


@given(DIFFERENT, st.randoms(use_true_random=False), FRACTIONS, FRACTIONS)
def test_splits_do_not_depend_on_the_order_of_documents(documents, chance, validation, test):
    shuffled = documents.copy()
    chance.shuffle(shuffled)
    assert split_of(shuffled, validation, test) == split_of(documents, validation, test)


@given(st.lists(st.integers(0, 20), max_size=60), FRACTIONS, FRACTIONS)
def test_documents_of_one_group_are_in_one_split(groups, validation, test):
    documents = [Document(str(i), f"text {i}", f"group {group}") for i, group in enumerate(groups)]
    splits = split_of(documents, validation, test)
    for document in documents:
        assert splits[document] == natural(Document("", document.group), validation, test)


def test_a_field_of_json_lines_groups_them(tmp_path):
    lines = [{"text": text, "book": f"book {number % 30}"} for number, text in enumerate(different_texts(120))]
    write(tmp_path / "in.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    prepare_documents(tmp_path / "run", text=str(tmp_path / "in.jsonl"), group="book", validation_fraction=0.3, test_fraction=0.3)
    book = {line["text"]: line["book"] for line in lines}
    books = [
        {book[document.text] for path in shard_paths(Run(tmp_path / "run"), split) for document in read_shard(path)} for split in SPLITS
    ]
    assert all(books)
    assert all(d.group == book[d.text] for split in SPLITS for path in shard_paths(Run(tmp_path / "run"), split) for d in read_shard(path))
    assert sum(len(some) for some in books) == len(set.union(*books))
    half = write(tmp_path / "half.jsonl", b'{"text": "a", "book": "\\ud83d"}\n')
    error = message(prepare_documents, tmp_path / "other", text=str(half), group="book")
    assert error == f'{half}#1 has a "book" that is not Unicode (surrogates not allowed): correct or remove the line'
    error = message(prepare_documents, tmp_path / "other", text=str(tmp_path / "in.jsonl"), group="author")
    assert error == f'{tmp_path / "in.jsonl"}#1 has no field "author" with a string: prepare_documents.group names a field of every line'


def test_fractions_are_shares_of_the_documents():
    splits = split_of([Document(str(i), f"text {i}") for i in range(10_000)], 0.05, 0.1)
    counts = collections.Counter(splits.values())
    assert counts["validation"] == pytest.approx(500, rel=0.15)
    assert counts["test"] == pytest.approx(1000, rel=0.15)


# The stage


def test_empty_documents_and_duplicates_are_counted_and_dropped(tmp_path):
    source = different_texts(8)
    records = [{"text": text} for text in [*source, "", source[0], " \n\t", source[3], source[0]]]
    path = write(tmp_path / "a.jsonl", lines(*records))
    counts = prepare_documents(tmp_path / "run", text=str(path), shards=2)["documents"]
    assert counts == {"train": 6, "validation": 1, "test": 1, "empty": 2, "duplicate": 3}
    assert {document.id for document in prepared(tmp_path / "run")} == {f"{path}#{number}" for number in range(1, 9)}


@settings(max_examples=20)
@given(st.lists(st.text(max_size=40), min_size=3, max_size=10), st.integers(1, 4))
def test_the_shards_have_the_documents_that_were_read(source, shards):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", lines(*[{"text": text} for text in source]))
        workdir = Path(folder) / "run"
        try:
            counts = prepare_documents(workdir, text=str(path), shards=shards)["documents"]
        except UserError as error:
            assert "different documents for 3 splits" in str(error)  # noqa: PT017 - most generated lists have enough
            return
        assert counts["empty"] == sum(not text.strip() for text in source)
        assert sum(counts.values()) == len(source)
        for document in prepared(workdir):
            assert document.text == source[int(document.id.rpartition("#")[2]) - 1]
        assert len(prepared(workdir)) == sum(counts[split] for split in SPLITS)


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_no_near_duplicates_survive_in_the_same_or_in_different_splits(seed):
    chance = random.Random(seed)
    originals = [chance.choices(["".join(chance.choices("abcdefgh", k=4)) for _ in range(1000)], k=200) for _ in range(12)]
    copies = []
    for number, words in enumerate(originals):
        for copy in range(3):
            edited = words.copy()
            for place in chance.sample(range(200), copy):
                edited[place] = "edited"
            copies.append({"text": " ".join(edited), "family": number})
    chance.shuffle(copies)
    family_of = {copy["text"]: copy["family"] for copy in copies}
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", lines(*copies))
        run = Path(folder) / "run"
        counts = prepare_documents(run, text=str(path), validation_fraction=0.3, test_fraction=0.3)["documents"]
        assert sorted(family_of[document.text] for document in prepared(run)) == list(range(12))
        assert counts["duplicate"] == 24


def test_train_documents_are_dealt_over_the_shards_and_other_splits_have_one(tmp_path):
    for number, text in enumerate(different_texts(23)):
        write(tmp_path / "in" / f"{number:02}.txt", text)
    record = prepare_documents(tmp_path, text=str(tmp_path / "in"), shards=4)
    sizes = [len(read_shard(path)) for path in shard_paths(Run(tmp_path), "train")]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == record["documents"]["train"]
    assert [path.name for path in shard_paths(Run(tmp_path), "test")] == ["test-00000-of-00001.jsonl"]
    assert {*record["checksums"], "manifest.json"} == {path.name for path in (tmp_path / "documents").iterdir()}


def test_the_same_text_gives_the_same_shards(tmp_path):
    for number, text in enumerate(different_texts(10)):
        write(tmp_path / "in" / f"{number}.txt", text)
    first, second = (prepare_documents(tmp_path / run, text=str(tmp_path / "in")) for run in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_documents_are_refused_without_an_output(tmp_path, count):
    source = different_texts(count)
    path = write(tmp_path / "a.jsonl", lines(*[{"text": text} for text in [*source, *source, " "]]))
    error = message(prepare_documents, tmp_path / "run", text=str(path))
    assert error == f"'{path}' has {count} different documents for 3 splits (1 more are empty, {count} are duplicates): give at least 3"
    assert not (tmp_path / "run" / "documents").exists()


def test_a_bad_line_is_refused_without_an_output(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*[{"text": text} for text in different_texts(5)], {}))
    assert "line 6" in message(prepare_documents, tmp_path / "run", text=str(path))
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {"stages", ".lock"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("shards", 0),
        ("shards", -1),
        ("duplicate_threshold", 0.0),
        ("duplicate_threshold", 1.1),
        ("duplicate_threshold", float("nan")),
        ("validation_fraction", -0.1),
        ("test_fraction", 1.1),
        ("test_fraction", float("nan")),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_value(tmp_path, setting, value):
    source = write(tmp_path / "a.jsonl", lines(*[{"text": text} for text in different_texts(5)]))
    error = message(prepare_documents, tmp_path / "run", text=str(source), **{setting: value})
    assert f"{setting} = {value}" in error
    assert "take" in error
