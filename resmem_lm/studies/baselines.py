"""What other uses of the same memory reach (paper, section 3.2), and where: by token frequency, distance and DeepNet's confidence."""

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from resmem_lm.errors import UserError
from resmem_lm.evaluation.candidates import DEEPNET, Formula, Setting
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.evaluation.statistics import bootstrap_interval
from resmem_lm.evaluation.tuning import fit_gate
from resmem_lm.memory.datastore import Datastore, open_datastore
from resmem_lm.report.plots import INK, Figure, line
from resmem_lm.report.tables import METHOD_TITLES, interval, percent
from resmem_lm.studies import infinigram
from resmem_lm.studies.infinigram import Continuations, Mixture
from resmem_lm.studies.study import study, write_study
from resmem_lm.text.shards import QUERY_SPLITS, query_documents
from resmem_lm.text.vocabulary import load_vocabulary
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, is_local, local_path, read_json, remove, write_json

FORMULAS: dict[str, Formula] = {"knn": "knnlm", "knnlm": "knnlm", "resmem_paper": "resmem", "resmem": "resmem"}
FREQUENCIES = (10, 100, 1000, 10_000, 100_000)
CONFIDENCES = (0.1, 0.2, 0.4, 0.6, 0.8)
QUANTILES = (0.2, 0.4, 0.6, 0.8)
DRAWN = ("kNN-LM", "ResMem", "Adaptive ResMem")


@study(name="baselines")
def study_baselines(
    run: Run, *, lambdas: tuple[float, ...] | list[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
) -> Record:
    """Test accuracy of every method, of all tokens and of some: by frequency in the datastore, nearest distance, DeepNet's confidence.

    Where the package infini-gram is installed, its model of the datastore's tokens is among them, alone and mixed with DeepNet.

    Args:
        lambdas: weights of the infinity-gram model to try, each where one and where several continuations were seen.

    Raises:
        UserError: no such weight, or one that is no share.
    """
    if not lambdas or not all(0 <= lambda_ <= 1 for lambda_ in lambdas):
        raise UserError(f"study_baselines.lambdas = {lambdas}: take one or more numbers, from 0 to 1")
    datastore = open_datastore(run.datastore)
    scorers = {split: SplitScorer(split, open_queries(run, split), datastore) for split in QUERY_SPLITS}
    test = scorers["test"]
    targets, groups = np.asarray(test.queries.tokens), test.queries.groups
    right, sigma = _predicted(run, test)
    adapted = test.adaptive(fit_gate(scorers["validation"], sigma), sigma)
    right[METHOD_TITLES["resmem_adaptive"]] = adapted.predictions == targets
    notes = "infini-gram is not installed (pip install 'resmem_lm[infini-gram]'): its rows are left out."
    if not is_local(run.path):
        notes = "infini-gram reads local files only, and the work directory lies in object storage: its rows are left out."
    elif infinigram.installed():
        alone, mixed, chosen = _infinigram(run, datastore, scorers, sorted(lambdas))
        right |= {"infini-gram": alone, "infini-gram with DeepNet": mixed}
        notes = f"infini-gram with DeepNet: lambda {chosen[0]:g}, and {chosen[1]:g} where one continuation only was seen (validation)."

    rows: list[Record] = []
    for by, shown, some in _groups(test, datastore):
        accuracies = {f"{method}, %": 100 * float(of[some].mean()) for method, of in right.items()}
        rows.append({"by": by, "range": shown, "tokens": int(some.sum()), **accuracies})

    def told(method: str) -> str:
        gain = right[method].astype(np.float64) - right[METHOD_TITLES["deepnet"]]
        return f"{method} {percent(float(gain.mean()))} {interval(bootstrap_interval(gain, groups))}"

    def draw(figure: Figure) -> None:
        groups = ("frequency", "distance", "confidence")
        for axes, by in zip(figure.subplots(1, len(groups), sharey=True), groups, strict=True):
            some = [row for row in rows if row["by"] == by]
            axes.axhline(0, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label="DeepNet")
            for number, method in enumerate(DRAWN):
                line(axes, number, range(len(some)), [row[f"{method}, %"] - row["DeepNet, %"] for row in some], method)
            axes.set_xticks(range(len(some)), [row["range"] for row in some], rotation=30, ha="right", fontsize=8)
            axes.set_xlabel({"frequency": "rows of the token", "distance": "nearest distance", "confidence": "DeepNet's confidence"}[by])
        figure.get_axes()[0].set_ylabel("gain over DeepNet, points")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)

    gains = "; ".join(told(method) for method in right if method != METHOD_TITLES["deepnet"])
    text = (
        "Test accuracy by the frequency of the true token in the datastore, by the distance of the nearest neighbor (fifths), and by "
        f"DeepNet's probability of its prediction. Gain over DeepNet on all tokens, with 95% intervals: {gains}. {notes}"
    )
    return write_study(run, "baselines", title="Baselines, and where they differ (section 3.2)", text=text, rows=rows, draw=draw)


def _predicted(run: Run, test: SplitScorer) -> tuple[dict[str, Bool[np.ndarray, " tokens"]], float]:
    """Which tokens each method of the results gets right, by its title; and ResMem's sigma."""
    methods = read_json(run.results)["splits"]["test"]["methods"]
    settings = {METHOD_TITLES[name]: Setting.of(formula, methods[name]["hyperparameters"]) for name, formula in FORMULAS.items()}
    settings = {METHOD_TITLES["deepnet"]: DEEPNET} | settings
    found = test.predict(sorted(set(settings.values())))
    return {title: found[setting][0] == test.queries.tokens for title, setting in settings.items()}, settings[METHOD_TITLES["resmem"]].sigma


def _ranges(values: Float[np.ndarray, " tokens"], edges: list[float]) -> Iterator[tuple[str, Bool[np.ndarray, " tokens"]]]:
    """(range, which tokens are in it), those that hold none left out."""
    places = np.searchsorted(edges, values, side="right")
    shown = [f"{edge:,.0f}" if edge >= 1000 else f"{edge:.4g}" for edge in edges]
    for place in range(len(edges) + 1):
        some = places == place
        below = f"below {shown[0]}" if place == 0 else ""
        above = f"{shown[-1]} and above" if place == len(edges) else ""
        if some.any():
            yield below or above or f"{shown[place - 1]} to {shown[place]}", some


def _groups(test: SplitScorer, datastore: Datastore) -> Iterator[tuple[str, str, Bool[np.ndarray, " tokens"]]]:
    """(by what, range, which tokens)."""
    q, unit = test.queries, test.unit_number
    counts = np.zeros(1 + max(int(tokens.max(initial=0)) for tokens in (*datastore.shard_arrays("tokens"), q.tokens)), np.int64)
    for first, tokens in zip(datastore.offsets, datastore.shard_arrays("tokens"), strict=False):
        live = ~datastore.is_deleted(first + np.arange(len(tokens)))
        counts += np.bincount(tokens[live], minlength=len(counts))
    nearest = np.asarray(q.distances)[:, 0]
    nearest = np.where(np.isfinite(nearest), nearest, np.inf)
    confidence = np.exp(np.asarray(q.candidate_logits).max(axis=1) - np.asarray(q.log_partition)[:, unit])
    yield "all", "", np.ones(len(q.tokens), bool)
    for by, values, edges in (
        ("frequency", counts[q.tokens].astype(np.float64), list(map(float, FREQUENCIES))),
        ("distance", nearest, [float(edge) for edge in np.quantile(nearest, QUANTILES)]),
        ("confidence", confidence, list(CONFIDENCES)),
    ):
        yield from ((by, shown, some) for shown, some in _ranges(values, edges))


def _infinigram(
    run: Run, datastore: Datastore, scorers: dict[str, SplitScorer], lambdas: list[float]
) -> tuple[Bool[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"], tuple[float, float]]:
    """Which test tokens the infinity-gram model gets right, alone and with DeepNet, and the two weights chosen on validation."""
    vocabulary, folder = load_vocabulary(run), local_path(run.path) / "derived" / "baselines" / "infini-gram"
    checksum = run.record("build")["result"]["manifest"]
    made = folder / "made.json"
    if not made.exists() or read_json(made) != {"datastore": checksum}:
        remove(folder)
        infinigram.build(folder, _live(datastore))
        write_json(made, {"datastore": checksum})

    def mixed(split: str) -> tuple[Continuations, Mixture]:
        q = scorers[split].queries
        log_z = np.asarray(q.log_partition)[:, scorers[split].unit_number]
        found = infinigram.continuations(folder, vocabulary.eos_id, vocabulary.encode_documents(query_documents(run, split)))
        return found, infinigram.mixture(found, np.asarray(q.candidate_ids), np.exp(np.asarray(q.candidate_logits) - log_z[:, None]))

    (_, validation), targets = mixed("validation"), scorers["validation"].queries.tokens
    pairs = itertools.product(lambdas, lambdas)
    chosen = max(pairs, key=lambda pair: int((validation.predict(*pair) == targets).sum()))
    (alone, test), targets = mixed("test"), scorers["test"].queries.tokens
    return alone.tokens[:, 0] == targets, test.predict(*chosen) == targets, chosen


def _live(datastore: Datastore) -> Iterator[Int[np.ndarray, "_"]]:
    """The tokens of every document of the datastore that is not deleted."""
    for shard, tokens in enumerate(datastore.shard_arrays("tokens")):
        for entry in datastore.documents(shard):
            rows = datastore.offsets[shard] + entry["first_row"] + np.arange(entry["rows"])
            if len(rows) and not datastore.is_deleted(rows[:1])[0]:
                yield np.asarray(tokens[entry["first_row"] : entry["first_row"] + entry["rows"]], np.int64)
