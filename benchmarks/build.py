"""Compare a build through Beam, in one process, with a plain loop over the same encoder that writes nothing."""

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

TOKENS = 120_000  # at least, in whole documents; enough to make the start of a pipeline negligible


def run(run: Run) -> None:
    """Print the table."""
    binding = open_datastore(run.datastore).binding
    unit = units_of(run, 1)[0]
    vocabulary, documents, count = load_vocabulary(run), [], 0
    for document in read_shard(run.documents / unit.documents):
        if count < TOKENS:
            documents.append(document)
            count += len(vocabulary.encode(document.text))
    with tempfile.TemporaryDirectory(prefix="resmem-bench-") as name:
        scratch = Run(name)
        for folder in (run.checkpoints, run.vocabulary):
            Path(name, folder.name).symlink_to(folder.absolute())
        scratch.documents.mkdir()
        (scratch.documents / unit.documents).write_text(shard_content(documents), "utf-8")
        scratch.datastore.mkdir()
        for path in run.datastore.glob("projection*"):
            Path(name, "datastore", path.name).symlink_to(path.absolute())
        worker = EncodingWorker(scratch, binding)
        tokens = worker.vocabulary.encode_documents(documents)

        def plain() -> None:
            for _ in worker.encoder(tokens):
                pass

        def through_beam() -> None:
            for path in scratch.datastore.iterdir():
                if not path.name.startswith("projection"):
                    remove(path)
            with contextlib.redirect_stderr(io.StringIO()), locked(scratch.path):
                encode_units(scratch, binding, [unit], "")

        reset_peak_memory()
        times = interleaved({"plain loop": plain, "Beam": through_beam}, rounds=2)
        table(
            f"Build ({count:,} tokens; the peak of the process is {peak_memory() / 2**30:.2f} GiB)",
            ("way", "times the plain loop", "rows/s"),
            ((way, ratio(times, way, "plain loop"), f"{count / median(times, way):,.0f}") for way in times),
        )
