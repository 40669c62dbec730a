"""Convert documents to tokens with a SentencePiece vocabulary, trained on the train split or copied from a file."""

import io
import random
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from jaxtyping import Int

from resmem_lm.errors import UserError, check_least
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import AnyPath, Record, local_path, sha256, to_path, write_bytes

_LINE_CHARACTERS = 1000  # SentencePiece skips training lines of more than 4,192 bytes


class Vocabulary:
    """A SentencePiece model with T5's ids: 0 is padding and BOS, 1 ends a document, 2 is unknown. Other files raise UserError."""

    def __init__(self, path: AnyPath) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(local_path(path)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a SentencePiece model ({error}): give a .model file, or None to train one") from None
        self.sha256 = sha256(path)
        self.size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self._processor.pad_id() != 0 or self.eos_id < 0:
            raise UserError(f"{path} needs padding id 0 and an end-of-sentence id: train it with pad_id=0, eos_id=1, unk_id=2")

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Return the token ids of a document, including the end-of-document id."""
        return np.array([*self._processor.encode(text), self.eos_id], np.int32)

    def encode_documents(self, documents: list[Document]) -> list[Int[np.ndarray, "_"]]:
        """Return the result of `encode` for each document, computed on all cores."""
        encoded = self._processor.encode([document.text for document in documents], num_threads=-1)
        return [np.array([*ids, self.eos_id], np.int32) for ids in encoded]

    def decode(self, ids: list[int] | Int[np.ndarray, " tokens"]) -> str:
        """Return the text of the tokens."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids: list[int] | Int[np.ndarray, " tokens"]) -> list[str]:
        """Return the SentencePiece piece of each token. A space replaces the word-boundary mark."""
        return [self._processor.id_to_piece(int(i)).replace("▁", " ") if i < self.size else f"<{i}>" for i in ids]


def load_vocabulary(run: Run) -> Vocabulary:
    """Return the vocabulary of a work directory."""
    return Vocabulary(run.vocabulary / "vocabulary.model")


def _training_lines(run: Run) -> Iterator[str]:
    for shard in shard_paths(run, "train"):
        for document in read_shard(shard):
            for line in document.text.splitlines():
                for start in range(0, len(line), _LINE_CHARACTERS):
                    yield line[start : start + _LINE_CHARACTERS]


def draw_lines(lines: Iterable[str], count: int) -> list[str]:
    """Return a uniform sample of at most `count` lines (reservoir sampling with a fixed seed).

    SentencePiece's own sampling is not reproducible: it differs between processes for every seed.
    """
    chance = random.Random(0)
    drawn: list[str] = []
    for number, line in enumerate(lines):
        if number < count:
            drawn.append(line)
        elif (place := chance.randrange(number + 1)) < count:
            drawn[place] = line
    return drawn


@stage(name="vocabulary", after=("documents",))
def make_vocabulary(run: Run, *, model: str | None = None, size: int = 4096, training_lines: int = 100_000) -> Record:
    """Write WORKDIR/vocabulary/vocabulary.model.

    Args:
        model: a SentencePiece model to copy, such as T5's; None trains one on the train split.
        size: number of pieces of a trained vocabulary.
        training_lines: number of random lines of the train split used to train a vocabulary.

    Raises:
        UserError: `model` is not a SentencePiece model, or the text has too few words or too many characters for `size` pieces.
    """
    check_least("make_vocabulary", 1, size=size, training_lines=training_lines)
    target = run.vocabulary / "vocabulary.model"
    if model is None:
        write_bytes(target, _train(draw_lines(_training_lines(run), training_lines), size))
    else:
        Vocabulary(to_path(model))
        write_bytes(target, to_path(model).read_bytes())
    vocabulary = load_vocabulary(run)
    return {"sha256": vocabulary.sha256, "size": vocabulary.size}


def _train(lines: list[str], size: int) -> bytes:
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=trained,
            vocab_size=size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            shuffle_input_sentence=False,
            num_threads=2,  # fixed, because the order of the sums over threads affects the pieces
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # Keep the reason only: a source position precedes it, and advice on a setting that does not exist here follows it.
        reason = str(error).rpartition("] ")[2].split(" or decrease ")[0]
        raise UserError(f"make_vocabulary.size = {size} does not suit this text: {reason}") from None
    return trained.getvalue()
