"""Format results.json and the results of studies as text tables."""

import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

METHOD_TITLES = {
    "deepnet": "DeepNet",
    "knn": "kNN",
    "knnlm": "kNN-LM",
    "knnlm_perplexity": "kNN-LM (for perplexity)",
    "knnlm_confident": "kNN-LM (NEST's confidence)",
    "resmem_paper": "ResMem (paper's k, sigma, T, lambda)",
    "resmem_lambda1": "ResMem (lambda 1)",
    "resmem": "ResMem",
    "resmem_calibrated": "Calibrated ResMem",
    "resmem_adaptive": "Adaptive ResMem",
    "knnlm_cache": "kNN-LM with a cache of the document",
    "resmem_document": "ResMem with the document",
    "resmem_adaptive_document": "Adaptive ResMem with the document",
}
HEADER = ["test tokens, %", "accuracy", "95%", "TPR", "FPR", "gain", "95%", "perplexity", "ECE", "hyperparameters"]


def percent(value: float) -> str:
    """Return 0.1234 as 12.34."""
    return f"{100 * value:.2f}"


def interval(values: Sequence[float] | None) -> str:
    """Return an interval as [12.34, 13.45], or - if there is none."""
    return f"[{percent(values[0])}, {percent(values[1])}]" if values else "-"


def hyperparameters(values: dict[str, int | float]) -> str:
    """Return hyperparameters as "k 50, sigma 1, T 1, lambda 1"."""
    names = {"k": "k", "sigma": "sigma", "temperature": "T", "lambda": "lambda", "cache_sigma": "cache sigma", "cache_weight": "mu"}
    return ", ".join(f"{names[key]} {value:g}" for key, value in values.items())


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Return one row per method, with the columns of `HEADER`."""
    found, methods = [], results["splits"]["test"]["methods"]
    for name, title in METHOD_TITLES.items():
        if name not in methods:  # the document is not used
            continue
        m = methods[name]
        simplex = [f"{m['perplexity']:.1f}", percent(m["calibration_error"])] if "perplexity" in m else ["-", "-"]
        shares = [percent(m["tpr"]), percent(m["fpr"]), percent(m["gain"]), interval(m["gain_ci95"])]
        shares = ["-"] * 4 if name == "deepnet" else shares
        found.append(
            [title, percent(m["accuracy"]), interval(m["accuracy_ci95"]), *shares, *simplex, hyperparameters(m["hyperparameters"])]
        )
    return found


def aligned(header: list[str], lines: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Return a table for a terminal; `right` aligns all columns but the first to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(header):
        table.add_column(title, justify="right" if right and number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    text = io.StringIO()
    Console(file=text, width=10_000, markup=False, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def format_results(results: dict[str, Any]) -> str:
    """Return the table of all methods on the test split, with the differences between them."""
    test = results["splits"]["test"]
    facts = (
        f"{test['tokens']:,} tokens of {test['documents']} documents; {results['datastore']['rows']:,} datastore rows; "
        f"{results['index']['kind']} index, recall@k {test['recall_at_k']:.3f}; hyperparameters chosen on validation"
    )
    return "\n".join(["", aligned(HEADER, rows(results)), facts, *differences(results)])


def differences(results: dict[str, Any]) -> list[str]:
    """Return a line per pair of methods, with the difference of their accuracies and its interval."""
    return [
        f"{METHOD_TITLES[d['method']]} over {METHOD_TITLES[d['over']]}: {100 * d['accuracy']:+.2f} {interval(d['accuracy_ci95'])}"
        for d in results["splits"]["test"]["differences"]
    ]


def study_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return a study's table as rows of text, the header first."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    header = list(results["rows"][0]) if results["rows"] else []
    return [header, *([cell(row[name]) for name in header] for row in results["rows"])]


def format_study(results: dict[str, Any]) -> str:
    """Return a study's title and table; for examples, only their number."""
    if "examples" in results:
        return "\n".join(["", results["title"], "", f"{len(results['examples']):,} examples", ""])
    header, *lines = study_rows(results)
    return "\n".join(["", results["title"], "", aligned(header, lines), ""])
