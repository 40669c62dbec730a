"""Documents -> tokens: a SentencePiece vocabulary, trained on the train split or given."""

import io
import random
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from jaxtyping import Int

from resmem_lm.errors import UserError
from resmem_lm.text.shards import read_shard, shard_paths
from resmem_lm.text.sources import Document
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import AnyPath, Record, local_path, sha256, to_path, write_bytes

# Longer lines are passed over by the trainer (its limit is 4,192 bytes).
TRAINING_LINE_CHARACTERS = 1000


class Vocabulary:
    """A SentencePiece model whose ids are T5's: 0 pads (and begins), 1 ends a document, 2 is unknown."""

    def __init__(self, path: AnyPath) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(local_path(path)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is no SentencePiece model ({error}): give a .model file, or None to train one") from None
        self.sha256 = sha256(path)
        self.size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self._processor.pad_id() != 0 or self.eos_id < 0:
            raise UserError(f"{path} must pad with id 0 and have an end-of-sentence id: train it with pad_id=0, eos_id=1, unk_id=2")

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """The ids of a document's tokens with the end-of-document id behind them."""
        return np.array([*self._processor.encode(text), self.eos_id], np.int32)

    def encode_documents(self, documents: list[Document]) -> list[Int[np.ndarray, "_"]]:
        """`encode` of each document, on all cores."""
        encoded = self._processor.encode([document.text for document in documents], num_threads=-1)
        return [np.array([*ids, self.eos_id], np.int32) for ids in encoded]

    def decode(self, ids: list[int] | Int[np.ndarray, " tokens"]) -> str:
        """The text of some tokens."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, ids: list[int] | Int[np.ndarray, " tokens"]) -> list[str]:
        """The vocabulary's own spelling of each token, with a space for its word-boundary mark."""
        return [self._processor.id_to_piece(int(i)).replace("▁", " ") if i < self.size else f"<{i}>" for i in ids]


def load_vocabulary(run: Run) -> Vocabulary:
    """The vocabulary of a work directory."""
    return Vocabulary(run.vocabulary / "vocabulary.model")


def _training_lines(run: Run) -> Iterator[str]:
    for shard in shard_paths(run, "train"):
        for document in read_shard(shard):
            for line in document.text.splitlines():
                for start in range(0, len(line), TRAINING_LINE_CHARACTERS):
                    yield line[start : start + TRAINING_LINE_CHARACTERS]


def draw_lines(lines: Iterable[str], count: int) -> list[str]:
    """At most `count` of the lines, each as likely as any other (reservoir sampling): always the same of the same lines.

    SentencePiece's own drawing differs from process to process, whatever its seed.
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
    """Writes WORKDIR/vocabulary/vocabulary.model.

    Args:
        model: a SentencePiece model to copy (T5's own, for example); None trains one on the train split.
        size: pieces of a trained vocabulary.
        training_lines: a trained vocabulary sees this many lines, drawn at random.

    Raises:
        UserError: `model` is no SentencePiece model, or the text has too few words or too many characters for `size` pieces.
    """
    if size < 1 or training_lines < 1:
        raise UserError(f"make_vocabulary.size = {size}, training_lines = {training_lines}: take 1 or more of each")
    target = run.vocabulary / "vocabulary.model"
    if model is not None:
        Vocabulary(to_path(model))
        write_bytes(target, to_path(model).read_bytes())
    else:
        trained = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(draw_lines(_training_lines(run), training_lines)),
                model_writer=trained,
                vocab_size=size,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                shuffle_input_sentence=False,
                num_threads=2,  # a constant: the sums of its threads decide the pieces
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            # Behind the place in SentencePiece's source and the condition; before advice that cannot be followed here.
            reason = str(error).rpartition("] ")[2].split(" or decrease ")[0]
            raise UserError(f"make_vocabulary.size = {size} does not suit this text: {reason}") from None
        write_bytes(target, trained.getvalue())
    vocabulary = load_vocabulary(run)
    return {"sha256": vocabulary.sha256, "size": vocabulary.size}
