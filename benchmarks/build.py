"""The build through Beam, in one process, against a plain loop over the same encoder that keeps nothing."""

import contextlib
import io
import tempfile
from pathlib import Path

from beam_pipelines.build_datastore import encode_units, units_of
from benchmarks.measure import interleaved, median, ratio, table
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encode_documents import EncodingWorker
from resmem_lm.planning.machine import peak_memory, reset_peak_memory
from resmem_lm.text.shards import read_shard, shard_content
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.lock import locked
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import remove

TOKENS = 120_000  # or a little more: whole documents; enough that a pipeline's start is a small part


def run(workdir: Path) -> None:
    """Prints the table."""
    binding = open_datastore(workdir / "datastore").binding
    unit = units_of(Run(workdir), 1)[0]
    vocabulary, documents, count = load_vocabulary(Run(workdir)), [], 0
    for document in read_shard(workdir / "documents" / unit.documents):
        if count < TOKENS:
            documents.append(document)
            count += len(vocabulary.encode(document.text))
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as name:
        scratch = Path(name)
        for folder in ("checkpoints", "vocabulary"):
            (scratch / folder).symlink_to((workdir / folder).absolute())
        (scratch / "documents").mkdir()
        (scratch / "documents" / unit.documents).write_text(shard_content(documents), "utf-8")
        (scratch / "datastore").mkdir()
        for path in (workdir / "datastore").glob("projection*"):
            (scratch / "datastore" / path.name).symlink_to(path.absolute())
        worker = EncodingWorker(Run(scratch), binding)
        tokens = worker.vocabulary.encode_documents(documents)

        def plain() -> None:
            for _ in worker.encoder(tokens):
                pass

        def through_beam() -> None:
            for path in (scratch / "datastore").iterdir():
                if not path.name.startswith("projection"):
                    remove(path)
            with contextlib.redirect_stderr(io.StringIO()), locked(scratch):
                encode_units(Run(scratch), binding, [unit], "")

        reset_peak_memory()
        times = interleaved({"plain loop": plain, "Beam": through_beam}, rounds=2)
        table(
            f"Build ({count:,} tokens; the peak of the process is {peak_memory() / 2**30:.2f} GiB)",
            ("way", "times the plain loop", "rows/s"),
            ((way, ratio(times, way, "plain loop"), f"{count / median(times, way):,.0f}") for way in times),
        )
