"""results.json -> the table, as text."""

from collections.abc import Sequence
from typing import Any

METHOD_TITLES = {
    "deepnet": "DeepNet",
    "knn": "kNN",
    "knnlm": "kNN-LM",
    "knnlm_perplexity": "kNN-LM (for perplexity)",
    "resmem_paper": "ResMem (paper's k, sigma, T, lambda)",
    "resmem_lambda1": "ResMem (lambda 1)",
    "resmem": "ResMem",
    "resmem_calibrated": "Calibrated ResMem",
    "resmem_adaptive": "Adaptive ResMem",
}


def percent(value: float) -> str:
    """0.1234 -> 12.34."""
    return f"{100 * value:.2f}"


def interval(values: Sequence[float] | None) -> str:
    """[12.34, 13.45], or - where there is none."""
    return f"[{percent(values[0])}, {percent(values[1])}]" if values else "-"


def hyperparameters(values: dict[str, int | float]) -> str:
    """k 50, sigma 1, T 1, lambda 1."""
    names = {"k": "k", "sigma": "sigma", "temperature": "T", "lambda": "lambda"}
    return ", ".join(f"{names[key]} {value:g}" for key, value in values.items())


def rows(results: dict[str, Any], split: str = "test") -> list[list[str]]:
    """One row a method: name, accuracy, its interval, TPR, FPR, gain, its interval, perplexity, calibration error, hyperparameters."""
    found = []
    for name, title in METHOD_TITLES.items():
        m = results["splits"][split]["methods"][name]
        simplex = [f"{m['perplexity']:.1f}", percent(m["calibration_error"])] if "perplexity" in m else ["-", "-"]
        shares = [percent(m["tpr"]), percent(m["fpr"]), percent(m["gain"]), interval(m["gain_ci95"])]
        shares = ["-"] * 4 if name == "deepnet" else shares
        found.append(
            [title, percent(m["accuracy"]), interval(m["accuracy_ci95"]), *shares, *simplex, hyperparameters(m["hyperparameters"])]
        )
    return found


HEADER = ["test tokens, %", "accuracy", "95%", "TPR", "FPR", "gain", "95%", "perplexity", "ECE", "hyperparameters"]


def aligned(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table's lines for a terminal."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in (header, *lines)]
    return [text[0], "-" * len(text[0]), *text[1:]]


def table(results: dict[str, Any]) -> str:
    """The table of all methods on the test split, aligned for a terminal."""
    test = results["splits"]["test"]
    facts = (
        f"{test['tokens']:,} tokens of {test['documents']} documents; {results['datastore']['rows']:,} datastore rows; "
        f"{results['index']['kind']} index, recall@k {test['recall_at_k']:.3f}; hyperparameters chosen on validation"
    )
    return "\n".join(["", *aligned(HEADER, rows(results)), facts, *differences(results)])


def differences(results: dict[str, Any], split: str = "test") -> list[str]:
    """How much more accurate the methods are than each other, a line each."""
    return [
        f"{METHOD_TITLES[d['method']]} over {METHOD_TITLES[d['over']]}: {100 * d['accuracy']:+.2f} {interval(d['accuracy_ci95'])}"
        for d in results["splits"][split]["differences"]
    ]


def study_rows(results: dict[str, Any]) -> list[list[str]]:
    """A study's table as text, its header first."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    header = list(results["rows"][0]) if results["rows"] else []
    return [header, *([cell(row[name]) for name in header] for row in results["rows"])]
