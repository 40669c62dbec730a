import io
import json
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from resmem_lm.errors import UserError
from resmem_lm.text.documents import prepare_documents
from resmem_lm.text.packing import split_tokens
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import Vocabulary, draw_lines, load_vocabulary, make_vocabulary
from resmem_lm.workdir.run import Run

LETTERS = "abcdefghijklmnop"


def prepare(workdir):
    """Prepare documents with 200 lines of invented words."""
    chance = random.Random(0)
    words = ["".join(chance.choices(LETTERS, k=chance.randint(1, 8))) for _ in range(400)]
    records = [{"text": "\n".join(" ".join(chance.choices(words, k=20)) for _ in range(5))} for _ in range(40)]
    workdir.mkdir(exist_ok=True)
    (workdir / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare_documents(workdir, text=str(workdir / "text.jsonl"), shards=2)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = prepare(tmp_path_factory.mktemp("vocabulary"))
    make_vocabulary(workdir, size=300)
    return workdir


@pytest.fixture(scope="module")
def vocabulary(workdir):
    return load_vocabulary(Run(workdir))


def message(call, *args, **kwargs):
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_0_1_2_are_padding_end_and_unknown(vocabulary):
    assert vocabulary.pieces([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert vocabulary.eos_id == 1
    assert vocabulary.encode("漢").tolist()[-2:] == [2, 1]


def test_a_vocabulary_has_the_size_asked_for(vocabulary):
    assert vocabulary.size == 300


TEXTS = st.text(LETTERS + LETTERS.upper() + " \n\t漢é", max_size=60)


@given(TEXTS)
def test_a_document_ends_with_eos_and_nothing_else_does(vocabulary, text):
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int32
    assert tokens[-1] == vocabulary.eos_id
    assert (tokens[:-1] >= 2).all()
    assert (tokens < vocabulary.size).all()


@given(st.text(LETTERS + "  \n\tａｂªº㎏", max_size=60))
def test_decoding_gives_the_text_with_compatible_letters_and_single_spaces(vocabulary, text):
    normalized = " ".join(unicodedata.normalize("NFKC", text).split())
    assert vocabulary.decode(vocabulary.encode(text)) == normalized
    assert vocabulary.decode(vocabulary.encode(text).tolist()) == normalized


@given(st.text(LETTERS + " ", min_size=1, max_size=60))
def test_pieces_spell_the_text_with_a_space_before_it(vocabulary, text):
    pieces = vocabulary.pieces(vocabulary.encode(text)[:-1])
    assert "".join(pieces) == "".join(f" {word}" for word in text.split())


def test_ids_above_the_vocabulary_are_shown_as_numbers(vocabulary):
    assert vocabulary.pieces([299, 300, 4095])[1:] == ["<300>", "<4095>"]


@given(st.lists(TEXTS, max_size=5))
def test_encode_documents_equals_encode_of_each(vocabulary, texts):
    together = vocabulary.encode_documents([Document(str(number), text) for number, text in enumerate(texts)])
    assert [tokens.tolist() for tokens in together] == [vocabulary.encode(text).tolist() for text in texts]


def test_the_tokens_of_a_split_are_those_of_its_documents_in_order(workdir, vocabulary):
    documents = [document for path in shard_paths(Run(workdir), "train") for document in read_shard(path)]
    found = list(split_tokens(Run(workdir), "train", vocabulary))
    assert [tokens.tolist() for tokens in found] == [vocabulary.encode(document.text).tolist() for document in documents]
    assert len(found) > 30


@pytest.mark.parametrize("training_lines", [100_000, 120], ids=["every line", "lines drawn at random"])
def test_training_in_another_process_gives_the_same_bytes(tmp_path, training_lines):
    first, second = (prepare(tmp_path / run) for run in ("first", "second"))
    make_vocabulary(first, size=200, training_lines=training_lines)
    code = f"make_vocabulary({str(second)!r}, size=200, training_lines={training_lines})"
    subprocess.run([sys.executable, "-c", f"from resmem_lm.text.vocabulary import make_vocabulary; {code}"], check=True)
    one, two = ((run / "vocabulary" / "vocabulary.model").read_bytes() for run in (first, second))
    assert one == two


@given(st.lists(st.text(LETTERS, max_size=3), max_size=30), st.integers(1, 40))
def test_lines_are_drawn_without_repeating_one(lines, count):
    numbered = [f"{number} {line}" for number, line in enumerate(lines)]
    drawn = draw_lines(numbered, count)
    assert len(set(drawn)) == len(drawn) == min(count, len(lines))
    assert set(drawn) <= set(numbered)


def test_each_line_is_as_likely_to_be_drawn(tmp_path):
    drawn = np.array([int(line) for line in draw_lines(map(str, range(100_000)), 10_000)])
    counts = np.histogram(drawn, bins=10, range=(0, 100_000))[0]
    assert counts.min() > 850
    assert counts.max() < 1150


def test_only_the_train_split_is_training_text(tmp_path):
    workdir = prepare(tmp_path)
    for split in ("validation", "test"):
        (path,) = shard_paths(Run(workdir), split)
        path.write_text(json.dumps({"id": "a", "text": "漢字 " * 1000}) + "\n", encoding="utf-8")
    make_vocabulary(workdir, size=300)
    vocabulary = load_vocabulary(Run(workdir))
    assert not any("漢" in piece for piece in vocabulary.pieces(list(range(vocabulary.size))))


def test_a_given_vocabulary_is_copied(workdir, tmp_path):
    model = workdir / "vocabulary" / "vocabulary.model"
    result = make_vocabulary(prepare(tmp_path), model=str(model))
    assert (tmp_path / "vocabulary" / "vocabulary.model").read_bytes() == model.read_bytes()
    assert result == {"sha256": load_vocabulary(Run(workdir)).sha256, "size": 300}


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 100, None], ids=["empty", "text", "bytes", "missing"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, content):
    path = tmp_path / "given.model"
    if content is not None:
        path.write_bytes(content)
    for call in (lambda: Vocabulary(path), lambda: make_vocabulary(prepare(tmp_path / "run"), model=str(path))):
        error = message(call)
        assert error.startswith(f"{path} is not a SentencePiece model (")
        assert error.endswith("): give a .model file, or None to train one")
    assert not (tmp_path / "run" / "vocabulary").exists()


def test_a_model_that_does_not_pad_with_0_is_named(tmp_path):
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from"] * 5), model_writer=trained, vocab_size=17, minloglevel=2
    )
    path = tmp_path / "given.model"
    path.write_bytes(trained.getvalue())
    assert message(Vocabulary, path) == (f"{path} needs padding id 0 and an end-of-sentence id: train it with pad_id=0, eos_id=1, unk_id=2")


@pytest.mark.parametrize(
    ("size", "reason"),
    [(100_000, "Vocabulary size too high (100000). Please set it to a value <= "), (5, "smaller than required_chars. 5 vs 20. Increase")],
)
def test_an_error_about_the_size_names_a_possible_size(tmp_path, size, reason):
    error = message(make_vocabulary, prepare(tmp_path), size=size)
    assert error.startswith(f"make_vocabulary.size = {size} does not suit this text: ")
    assert reason in error
    assert not (tmp_path / "vocabulary").exists()


@pytest.mark.parametrize(("setting", "value"), [("size", 0), ("size", -1), ("training_lines", 0), ("training_lines", -1)])
def test_numbers_that_sentencepiece_refuses_are_named(tmp_path, setting, value):
    assert f"{setting} = {value}" in message(make_vocabulary, prepare(tmp_path), **{setting: value})
