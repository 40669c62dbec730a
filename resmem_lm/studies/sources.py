"""Study what each source adds to Adaptive ResMem: each alone, and all but one."""

import numpy as np

from resmem_lm.errors import UserError
from resmem_lm.evaluation.features import EVERY, MEMORY, Source
from resmem_lm.evaluation.statistics import bootstrap_interval, probability_metrics
from resmem_lm.evaluation.tuning import fit_gate
from resmem_lm.memory.datastore import open_datastore
from resmem_lm.report.tables import interval
from resmem_lm.studies.study import open_scorers, study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

TITLES: dict[Source, str] = {"neighbors": "neighbors", "matches": "their matches", "exact": "exact matches", "document": "the document"}
ALL = {MEMORY: "the memory", EVERY: "the memory and the document"}
ALONE: dict[str, tuple[Source, ...]] = {f"Adaptive ResMem ({TITLES[source]} alone)": (source,) for source in MEMORY}


@study(name="sources")
def study_sources(run: Run, *, rows: tuple[str, ...] | list[str] | None = None) -> Record:
    """Measure Adaptive ResMem on test with a gate for each selection of sources: each source alone, all, and all but one.

    Args:
        rows: the rows to measure, such as ("neighbors", "the memory"); the differences are to the first. None measures all.
    """
    scorers = open_scorers(run, open_datastore(run.datastore))
    test, sigma = scorers["test"], read_json(run.results)["splits"]["test"]["methods"]["resmem_adaptive"]["hyperparameters"]["sigma"]
    every = EVERY if test.queries.document_back.shape[1] else MEMORY
    targets, measured = np.asarray(test.queries.tokens), []
    by_title = {title: sources for sources, title in selections(every).items()}
    if unknown := set(rows or ()) - set(by_title):
        raise UserError(f"study_sources.rows has no {sorted(unknown)}: take some of {list(by_title)}")
    reference = None
    for title in rows or by_title:
        sources = by_title[title]
        found = test.adaptive(fit_gate(scorers["validation"], sigma, sources))
        right = (found.predictions == targets).astype(np.float64)
        reference = right if reference is None else reference
        metrics = probability_metrics(found, targets)
        measured.append(
            {
                "sources": title,
                "accuracy, %": 100 * float(right.mean()),
                "over the first row": 100 * float((right - reference).mean()),
                "95%": interval(bootstrap_interval(right - reference, test.queries.groups)),
                "perplexity": metrics["perplexity"],
                "ECE, %": 100 * metrics["calibration_error"],
            }
        )
    text = (
        "Test accuracy of Adaptive ResMem, whose gate sees DeepNet and some sources. The third column is the difference to the first "
        "row, in points, with its 95% interval."
    )
    return write_study(run, "sources", title="What each source adds", text=text, rows=measured)


def selections(every: tuple[Source, ...]) -> dict[tuple[Source, ...], str]:
    """Return the selections of sources with their titles: the neighbors first, then each source, all, and all but one."""
    alone = {(source,): TITLES[source] for source in every}
    whole = {some: title for some, title in ALL.items() if set(some) <= set(every)}
    largest = max(whole, key=len)
    without = {tuple(s for s in largest if s != source): f"{whole[largest]} without {TITLES[source]}" for source in largest}
    return alone | without | whole
