"""What each stage costs on this machine: short runs of the real stages on little text, with the configured shapes.

A stage is run at two sizes at least, in a temporary work directory, so that what it costs once (programs to compile, checkpoints to
read) stands apart from what it costs per token or query. The model has those of the rehearsed training, or fresh
parameters where there is none.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import sentencepiece

from beam_pipelines.build_datastore import build_datastore
from beam_pipelines.build_index import build_index
from beam_pipelines.search_neighbors import search
from resmem_lm.evaluation.evaluate import evaluate
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.memory.encoder import ROWS
from resmem_lm.memory.exact_index import ExactIndex
from resmem_lm.memory.index import QUERY_BLOCK, SMALL, in_threads, rank_candidates
from resmem_lm.memory.open_index import index_manifest, open_index
from resmem_lm.model.checkpoints import STATE, checkpoint_manager, save_config
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import train
from resmem_lm.planning.machine import least, peak_memory, reset_peak_memory
from resmem_lm.planning.tree_costs import TreeCosts, measure_tree
from resmem_lm.text.shards import QUERY_SPLITS, read_shard, shard_name, shard_paths, write_manifest
from resmem_lm.text.sources import Document
from resmem_lm.text.vocabulary import Vocabulary
from resmem_lm.text.windows import WindowSpec, window_rows
from resmem_lm.workdir.storage import AnyPath, files_below, local_path, read_json, write_json

ENOUGH = 8.0  # seconds by which a longer run must outlast the shortest: compiling the same program varies by one or two
FEW_QUERIES, MANY_QUERIES = 2048, 16384  # the fewer are more than a batch of the adaptive gate, whose fit takes the same from there on
QUERY_RATES = ("query_tokens_per_second", "queries_per_second", "evaluated_queries_per_second")
TRAIN_TOKENS = 2048  # in a step of the rehearsal: the batch of an accelerator would take a processor minutes


class Cost(NamedTuple):
    """Seconds that something takes once, and for each unit."""

    once: float
    each: float

    def seconds(self, units: int | float) -> float:
        """For so many units."""
        return self.once + units * self.each


@dataclasses.dataclass
class Costs:
    """What was measured; None is not asked for. Units: tokens trained on, window tokens, queries."""

    save: float = 0.0  # one checkpoint
    checksum: float = 0.0  # per byte
    tokenize: float = 0.0  # per token
    train: Cost | None = None
    build: Cost | None = None
    tree: TreeCosts | None = None
    queries: Cost | None = None  # all of `search` but the index, per window token
    index: float = 0.0  # one query and one row, where every row is compared
    rescore: float = 0.0  # one query's candidates
    exact: float = 0.0  # one query and one row in exact search
    validation: Cost | None = None  # of `evaluate`
    test: Cost | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # peak of a stage, in bytes


def window_tokens(documents: list[np.ndarray], window: WindowSpec) -> int:
    """Tokens that the model computes for these documents: context comes twice, and batches are filled up."""
    return sum(batch.tokens.size for batch in window_rows(documents, window, ROWS))


def save_fresh_checkpoint(directory: Path, model: ModelConfig, *, optimizer_state: bool) -> float:
    """Writes a checkpoint like that of `train` after its first step, or of `take_checkpoint`; returns its seconds."""
    import orbax.checkpoint as ocp

    from resmem_lm.model.decoder import init_parameters
    from resmem_lm.model.train_loop import optimizer, to_train_state

    adafactor = optimizer(lambda _: 0.0)

    def state() -> dict[str, Any]:
        parameters = init_parameters(model, 0)
        # Moments of one step: zeros would be compressed to nothing.
        moments = adafactor.update(parameters, adafactor.init(parameters), parameters)[1]
        return to_train_state(parameters, moments, 1) if optimizer_state else {"target": parameters}

    sharding: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if optimizer_state:
        sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.local_devices()), ("data",)), jax.sharding.PartitionSpec())
    content = jax.block_until_ready(jax.jit(state, out_shardings=sharding)())
    with checkpoint_manager(directory) as manager:
        start = time.monotonic()
        manager.save(1, args=ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(content)}))
        return time.monotonic() - start


def bytes_of(folder: AnyPath) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in files_below(folder))


def measure(settings: dict[str, dict[str, Any]], documents: list[Document], vocabulary: Path | None, wanted: set[str]) -> Costs:
    """Rehearses the stages in `wanted`.

    Args:
        settings: of every stage, by the names of their functions.
        documents: text to rehearse on, of any amount.
        vocabulary: the SentencePiece model; None trains a small one on the documents.
        wanted: the rates to measure, by the names of the arguments of `resmem_lm.plan.plan`.
    """
    stderr = sys.stderr
    with tempfile.TemporaryDirectory(prefix="resmem-plan-") as folder, contextlib.redirect_stderr(io.StringIO()):
        # The stages' own progress is not that of anything the user waits for.
        return _Rehearsal(Path(folder), settings, documents, vocabulary, lambda line: print(line, file=stderr, flush=True)).measure(wanted)


class _Rehearsal:
    def __init__(
        self,
        folder: Path,
        settings: dict[str, dict[str, Any]],
        documents: list[Document],
        vocabulary: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.settings, self.say, self.costs = folder, settings, say, Costs()
        self.shared, self.model = folder / "shared", settings.get("take_checkpoint", settings.get("train"))["model"]  # type: ignore[index]
        path = self.shared / "vocabulary" / "vocabulary.model"
        path.parent.mkdir(parents=True)
        path.write_bytes(vocabulary.read_bytes() if vocabulary else _small_vocabulary(documents, self.model.vocab_size))
        self.vocabulary = Vocabulary(path)
        # Some hundred tokens each, so that any amount can be put together.
        texts = [text for document in documents for text in _pieces(document.text, 1000)]
        self.pool = [(text, len(self.vocabulary.encode(text))) for text in texts]

        build = settings["build_datastore"]
        self.window = WindowSpec(build["window_length"], build["window_context"])
        save_config(self.shared / "checkpoints", self.model, self.vocabulary.sha256)
        save_fresh_checkpoint(self.shared / "checkpoints", self.model, optimizer_state=False)

    def measure(self, wanted: set[str]) -> Costs:
        if "train_tokens_per_second" in wanted:
            self._train()
        if wanted & {"tokens_per_second", *QUERY_RATES}:
            run = self._build()
            if wanted & set(QUERY_RATES):
                build_index.function(run, **self.settings["build_index"] | {"pipeline_options": "", "memory_gib": 1024.0})
                self._search(run, wanted)
        if wanted & {"index_rows_per_second", "queries_per_second"} and self.settings["build_index"]["kind"] != "exact":
            self.say("measure index")
            index = self.settings["build_index"]
            chosen = {name: index[name] for name in ("kind", "candidates", "training_rows", "threads")}
            self.costs.tree = measure_tree(self.settings["build_datastore"]["key_dimensions"] or self.model.emb_dim, **chosen)
        return self.costs

    def _workdir(self, name: str, tokens: dict[str, list[int]], shared: Path) -> Path:
        """A work directory with shards of so many tokens, which has everything else of `shared`."""
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)  # of an earlier run of the same size
        run.documents.mkdir(parents=True)
        texts = itertools.cycle(self.pool)
        for split, shards in tokens.items():
            for shard, wanted in enumerate(shards):
                with (run.documents / shard_name(split, shard, len(shards))).open("w", encoding="utf-8") as file:
                    number = 0
                    while wanted > 0:
                        text, length = next(texts)
                        # A document of about the wanted length, as text has it on average.
                        text, length = (text, length) if length <= wanted else (text[: max(1, len(text) * wanted // length)], wanted)
                        file.write(json.dumps(Document(f"{split} {shard} {number}", text)._asdict()) + "\n")
                        wanted, number = wanted - length, number + 1
        for path in itertools.chain(shared.iterdir(), (shared / "documents").glob("train-*")):
            if path != shared / "documents" and not (run / path.relative_to(shared)).exists():
                (run / path.relative_to(shared)).symlink_to(path)
        write_manifest(run.documents)
        return run

    def _seconds(self, stage: str, function: Callable[..., Any], workdir: Path, **settings: Any) -> float:
        self.say(f"measure {stage}: {run.name}")
        reset_peak_memory()
        start = time.monotonic()
        function(run, **settings)
        seconds = time.monotonic() - start
        self.costs.memory[stage] = peak_memory()
        return seconds

    def _train(self) -> None:
        settings, devices = self.settings["train"], len(jax.local_devices())
        rows = min(settings["batch_size"], max(1, TRAIN_TOKENS // settings["sequence_length"]))
        settings = settings | {"batch_size": -(-rows // devices) * devices}
        step = settings["batch_size"] * settings["sequence_length"]

        def run(steps: int) -> float:
            run = self._workdir(f"train-{steps}", {"train": [2 * step]}, self.shared)
            (run.checkpoints).unlink()
            return self._seconds("train", train.function, run, **settings | {"steps": steps, "checkpoint_steps": steps})

        once, each, last = _line(run, 1, 64)
        self.costs.train = Cost(once, each / step)
        # The other stages take the model that has learned most: it knows which tokens are frequent, and those have the lowest ids, so that
        # the largest entries of a residual are found sooner than among those of fresh parameters.
        shutil.rmtree(self.shared / "checkpoints")
        shutil.copytree(self.folder / f"train-{last}" / "checkpoints", self.shared / "checkpoints")
        self.costs.tokenize = least(lambda: self.vocabulary.encode_documents([Document("", text) for text, _ in self.pool]), times=1) / sum(
            n for _, n in self.pool
        )
        self.costs.save = save_fresh_checkpoint(self.folder / "save", self.model, optimizer_state=True)

    def _build(self) -> Path:
        settings = self.settings["build_datastore"] | {"shards": None, "pipeline_options": ""}
        computed: dict[int, int] = {}

        def run(batches: int) -> float:
            tokens = [batches * ROWS * self.window.stride] * 2
            run = self._workdir(f"build-{batches}", {"train": tokens, "validation": [1], "test": [1]}, self.shared)
            seconds = self._seconds("build", build_datastore.function, run, **settings)
            computed[batches] = sum(
                window_tokens(self.vocabulary.encode_documents(read), self.window) for read in map(read_shard, shard_paths(run, "train"))
            )
            return seconds

        once, each, last = _line(run, 1, 64)
        few, many = computed[1], computed[last]
        self.costs.build = Cost(max(0.0, once + each - few * each * (last - 1) / (many - few)), each * (last - 1) / (many - few))
        run = self.folder / f"build-{last}"
        datastore = open_datastore(run.datastore)
        self.costs.checksum = least(lambda: open_datastore(run.datastore, checksums=True)) / datastore.bytes
        return run

    def _search(self, shared: Path, wanted: set[str]) -> None:
        settings, datastore = self.settings["search"], open_datastore(shared / "datastore")
        k = min(settings["neighbors"], datastore.rows)
        index, _ = open_index(shared, datastore, index_manifest(shared, datastore), 0)
        keys = datastore.keys(np.arange(min(datastore.rows, 2 * QUERY_BLOCK)))
        searched = least(lambda: index.search(keys, k)) / len(keys)
        sample = keys[: min(len(keys), max(1, settings["recall_queries"]))]
        self.costs.exact = least(lambda: ExactIndex(datastore).search(sample, k)) / len(sample) / datastore.rows
        candidates = np.random.default_rng(0).integers(
            datastore.rows, size=(QUERY_BLOCK, max(k, self.settings["build_index"]["candidates"]))
        )
        queries = np.resize(keys, (QUERY_BLOCK, keys.shape[1]))
        ranked = least(lambda: in_threads(lambda some, rows: rank_candidates(datastore, some, rows, k), queries, candidates))
        self.costs.rescore = ranked / QUERY_BLOCK
        compares_all = isinstance(index, ExactIndex) or datastore.rows < SMALL
        self.costs.index = searched / datastore.rows if compares_all else self.costs.exact
        if not wanted & {"query_tokens_per_second", "evaluated_queries_per_second"}:
            return

        computed: dict[int, int] = {}
        workdirs = {}

        def run(queries: int) -> float:
            run = workdirs[queries] = self._workdir(f"search-{queries}", {split: [queries] for split in QUERY_SPLITS}, shared)
            seconds = self._seconds(
                "search", search.function, run, **settings | {"neighbors": k, "recall_queries": 1, "pipeline_options": ""}
            )
            computed[queries] = sum(
                window_tokens(self.vocabulary.encode_documents(read_shard(shard_paths(run, split)[0])), self.window)
                for split in QUERY_SPLITS
            )
            return seconds - searched * len(QUERY_SPLITS) * queries

        once, each, last = _line(run, FEW_QUERIES, MANY_QUERIES)
        few, many = computed[FEW_QUERIES], computed[last]
        slope = each * (last - FEW_QUERIES) / (many - few)
        self.costs.queries = Cost(max(0.0, once + each * FEW_QUERIES - few * slope), slope)
        if "evaluated_queries_per_second" in wanted:
            self._evaluate(workdirs[FEW_QUERIES], workdirs[last], last)

    def _evaluate(self, few: Path, many: Path, queries: int) -> None:
        mixed = self.folder / "mixed"
        shutil.copytree(few, mixed, symlinks=True)
        facts = {workdir: read_json(run.neighbors / "neighbors.json") for run in (few, many)}
        for record in facts[many]["validation"]["shards"]:
            shutil.copytree(many / "neighbors" / record["folder"], mixed / "neighbors" / record["folder"])
        write_json(mixed / "neighbors" / "neighbors.json", facts[few] | {"validation": facts[many]["validation"]})
        shutil.copy(local_path(shard_paths(many, "validation")[0]), local_path(shard_paths(mixed, "validation")[0]))

        def run(workdir: Path) -> float:
            for name in ("documents", "vocabulary", "train", "build", "index", "search"):
                write_json(run.record_path(f"{name}"), {"finished": True, "seconds": 0, "result": {"documents": {}}})
            return self._seconds("evaluate", evaluate.function, run, **self.settings["evaluate"])

        # The first compiles, which the others are spared.
        first, *seconds = [run(run) for run in (few, few, mixed, many)]
        each = [max(longer - shorter, 1e-3) / (queries - FEW_QUERIES) for shorter, longer in itertools.pairwise(seconds)]
        self.costs.validation = Cost(max(0.0, first - FEW_QUERIES * sum(each)), each[0])
        self.costs.test = Cost(0.0, each[1])


def _pieces(text: str, characters: int) -> Iterator[str]:
    return (text[start : start + characters] for start in range(0, len(text), characters))


def _small_vocabulary(documents: list[Document], pieces: int) -> bytes:
    """Which pieces it has does not matter for what things cost, and ASCII is few characters."""
    trained = io.BytesIO()
    lines = (line.encode("ascii", "ignore").decode() for document in documents for line in document.text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=trained, vocab_size=min(1000, pieces), pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2
    )
    return trained.getvalue()


def _line(run: Callable[[int], float], small: int, limit: int) -> tuple[float, float, int]:
    """Runs at growing sizes until the difference tells; seconds once and for each unit, and the largest size."""
    # The first run of a process also imports and allocates.
    shortest, size = min(run(small), run(small)), 4 * small
    while True:
        longer = max(run(size) - shortest, 1e-3)
        each = longer / (size - small)
        if longer > ENOUGH or size >= limit:
            return max(0.0, shortest - small * each), each, size
        size = min(limit, int(size * min(8.0, max(2.0, 1.5 * ENOUGH / longer))))
