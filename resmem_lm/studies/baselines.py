"""Compare uses of the same memory (paper, section 3.2) by token frequency, neighbor distance and DeepNet's confidence."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from resmem_lm.evaluation.candidates import DEEPNET, Formula, Setting
from resmem_lm.evaluation.features import MEMORY
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import bootstrap_interval
from resmem_lm.evaluation.tuning import fit_gate
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.report.plots import INK, Figure, legend_above, line
from resmem_lm.report.tables import METHOD_TITLES, interval, percent
from resmem_lm.studies import infinigram
from resmem_lm.studies.infinigram import Continuations, Mixture
from resmem_lm.studies.sources import ALONE
from resmem_lm.studies.study import check_values, open_scorers, study, write_study
from resmem_lm.text.shards import query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import AnyPath, Record, is_local, local_path, read_json, remove, write_json

FORMULAS: dict[str, Formula] = {"knn": "knnlm", "knnlm": "knnlm", "resmem_paper": "resmem", "resmem": "resmem"}
FREQUENCIES = (10, 100, 1000, 10_000, 100_000)
CONFIDENCES = (0.1, 0.2, 0.4, 0.6, 0.8)
QUANTILES = (0.2, 0.4, 0.6, 0.8)
LINES = ("kNN-LM", "ResMem", "Adaptive ResMem")
WITH_DEEPNET = "infini-gram with DeepNet"
X_LABELS = {"frequency": "rows of the token", "distance": "distance of the nearest neighbor", "confidence": "DeepNet's confidence"}

Mask = Bool[np.ndarray, " tokens"]


@study(name="baselines")
def study_baselines(
    run: Run, *, lambdas: tuple[float, ...] | list[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
) -> Record:
    """Compare the test accuracy of all methods on all tokens, and on tokens grouped by frequency, distance and confidence.

    If the package infini-gram is installed, the study includes its model of the datastore's tokens, alone and mixed with DeepNet.

    Args:
        lambdas: weights of the infinity-gram model to try, independently for contexts with one continuation and with several.
    """
    check_values("study_baselines.lambdas", lambdas, lambda value: 0 <= value <= 1, "from 0 to 1")
    datastore = open_datastore(run.datastore)
    scorers = open_scorers(run, datastore)
    test = scorers["test"]
    found, note = _infinigram_methods(run, datastore, scorers, sorted(lambdas))
    correct = _memory_methods(run, scorers) | found
    rows: list[Record] = [
        {"by": by, "range": shown, "tokens": int(some.sum()), **{f"{name}, %": 100 * float(c[some].mean()) for name, c in correct.items()}}
        for by, shown, some in token_groups(test, datastore)
    ]
    text = (
        "Test accuracy by the frequency of the true token in the datastore, by the distance of the nearest neighbor (fifths), and by "
        f"DeepNet's probability of its prediction. Gain over DeepNet on all tokens, with 95% intervals: {_gains(correct, test)}. {note}"
    )
    title = "Baselines by frequency, distance and confidence (section 3.2)"
    return write_study(run, "baselines", title=title, text=text, rows=rows, draw=_draw)


def _memory_methods(run: Run, scorers: dict[str, SplitScorer]) -> dict[str, Mask]:
    """Return the tokens that DeepNet, methods of results.json, and gates with a single source predict correctly, by method title."""
    test, methods = scorers["test"], read_json(run.results)["splits"]["test"]["methods"]
    settings = {"deepnet": DEEPNET} | {name: Setting.of(formula, methods[name]["hyperparameters"]) for name, formula in FORMULAS.items()}
    found = test.predict(sorted(set(settings.values())))
    correct = {METHOD_TITLES[name]: found[setting][0] == test.queries.tokens for name, setting in settings.items()}
    for title, sources in {METHOD_TITLES["resmem_adaptive"]: MEMORY, **ALONE}.items():
        gate = fit_gate(scorers["validation"], settings["resmem"].sigma, sources)
        correct[title] = test.adaptive(gate).predictions == np.asarray(test.queries.tokens)
    return correct


def _infinigram_methods(
    run: Run, datastore: Datastore, scorers: dict[str, SplitScorer], lambdas: list[float]
) -> tuple[dict[str, Mask], str]:
    """Return the tokens that the infinity-gram model predicts correctly, alone and with DeepNet, and a note for the report."""
    if not is_local(run.path):
        return {}, "infini-gram reads local files only, and the work directory is in object storage: its columns are omitted."
    if not infinigram.installed():
        return {}, "infini-gram is not installed (pip install 'resmem_lm[infini-gram]'): its columns are omitted."
    folder = _infinigram_index(run, datastore)
    _, validation = _mix(run, folder, scorers["validation"])
    continuations, test = _mix(run, folder, scorers["test"])
    targets = scorers["validation"].queries.tokens
    chosen = max(itertools.product(lambdas, lambdas), key=lambda pair: int((validation.predict(*pair) == targets).sum()))
    targets = scorers["test"].queries.tokens
    correct = {"infini-gram": continuations.tokens[:, 0] == targets, WITH_DEEPNET: test.predict(*chosen) == targets}
    weights = f"lambda {chosen[0]:g}, and {chosen[1]:g} for contexts with a single continuation, chosen on validation"
    return correct, f"{WITH_DEEPNET}: {weights}."


def _infinigram_index(run: Run, datastore: Datastore) -> AnyPath:
    """Return the folder of infini-gram's index of the live documents. Build it unless it was built from this datastore."""
    folder = local_path(run.derived / "baselines" / "infini-gram")
    record, provenance = folder / "provenance.json", {"datastore": run.record("build")["result"]["manifest"]}
    if not record.exists() or read_json(record) != provenance:
        remove(folder)
        infinigram.build(folder, _live_documents(datastore))
        write_json(record, provenance)
    return folder


def _live_documents(datastore: Datastore) -> Iterator[Int[np.ndarray, "_"]]:
    """Yield the tokens of each live document of the datastore."""
    for shard, tokens in enumerate(datastore.shard_arrays("tokens")):
        for entry in datastore.documents(shard):
            first, rows = entry["first_row"], entry["rows"]
            if rows and not datastore.is_deleted(datastore.offsets[shard] + np.array([first]))[0]:
                yield np.asarray(tokens[first : first + rows], np.int64)


def _mix(run: Run, folder: AnyPath, scorer: SplitScorer) -> tuple[Continuations, Mixture]:
    """Return the continuations of a split's contexts, and their mixture with DeepNet's candidates."""
    vocabulary, q = load_vocabulary(run), scorer.queries
    documents = vocabulary.encode_documents(query_documents(run, scorer.name))
    found = infinigram.continuations(local_path(folder), vocabulary.eos_id, documents)
    log_z = np.asarray(q.log_partition)[:, scorer.unit_number]
    return found, infinigram.mixture(found, np.asarray(q.candidate_ids), np.exp(np.asarray(q.candidate_logits) - log_z[:, None]))


def token_groups(test: SplitScorer, datastore: Datastore) -> Iterator[tuple[str, str, Mask]]:
    """Yield (by, range, mask of the tokens): first all tokens, then those of each range of frequency, distance and confidence."""
    q = test.queries
    nearest = np.asarray(q.distances)[:, 0]
    nearest = np.where(np.isfinite(nearest), nearest, np.inf)
    confidence = np.exp(np.asarray(q.candidate_logits).max(axis=1) - np.asarray(q.log_partition)[:, test.unit_number])
    yield "all", "", np.ones(len(q.tokens), bool)
    for by, values, edges in (
        ("frequency", _frequencies(datastore, q.tokens), FREQUENCIES),
        ("distance", nearest, np.quantile(nearest, QUANTILES).tolist()),
        ("confidence", confidence, CONFIDENCES),
    ):
        yield from ((by, shown, some) for shown, some in ranges(values, edges))


def _frequencies(datastore: Datastore, tokens: Int[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
    """Return the number of live rows that have each token."""
    parts = datastore.shard_arrays("tokens")
    counts = np.zeros(1 + max(int(part.max(initial=0)) for part in (*parts, tokens)), np.int64)
    for first, part in zip(datastore.offsets, parts, strict=False):
        live = ~datastore.is_deleted(first + np.arange(len(part)))
        counts += np.bincount(part[live], minlength=len(counts))
    return counts[tokens].astype(np.float64)


def ranges(values: Float[np.ndarray, " tokens"], edges: Sequence[int | float]) -> Iterator[tuple[str, Mask]]:
    """Yield (range, mask of the tokens in it) for each range between edges that has tokens."""
    places = np.searchsorted(edges, values, side="right")
    shown = [f"{edge:,.0f}" if edge >= 1000 else f"{edge:.4g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(shown)]
    for place, name in enumerate([f"below {shown[0]}", *between, f"{shown[-1]} and above"]):
        some = places == place
        if some.any():
            yield name, some


def _gains(correct: dict[str, Mask], test: SplitScorer) -> str:
    """Format each method's gain over DeepNet, and Adaptive ResMem's over the infinity-gram model with DeepNet."""

    def gain(method: str, over: str) -> str:
        difference = correct[method].astype(np.float64) - correct[over]
        return f"{percent(float(difference.mean()))} {interval(bootstrap_interval(difference, test.queries.groups))}"

    deepnet, adaptive = METHOD_TITLES["deepnet"], METHOD_TITLES["resmem_adaptive"]
    shown = [f"{method} {gain(method, deepnet)}" for method in correct if method != deepnet]
    if WITH_DEEPNET in correct:
        shown.append(f"{adaptive} over {WITH_DEEPNET} {gain(adaptive, WITH_DEEPNET)}")
    return "; ".join(shown)


def _draw(figure: Figure, rows: list[Record]) -> None:
    for axes, by in zip(figure.subplots(1, len(X_LABELS), sharey=True), X_LABELS, strict=True):
        some = [row for row in rows if row["by"] == by]
        axes.axhline(0, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label="DeepNet")
        for number, method in enumerate(LINES):
            line(axes, number, range(len(some)), [row[f"{method}, %"] - row["DeepNet, %"] for row in some], method)
        axes.set_xticks(range(len(some)), [row["range"] for row in some], rotation=30, ha="right", fontsize=8)
        axes.set_xlabel(X_LABELS[by])
    figure.get_axes()[0].set_ylabel("gain over DeepNet, percentage points")
    legend_above(figure)
