import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from resmem_lm.errors import UserError
from resmem_lm.report.plots import STYLES
from resmem_lm.report.report import write_report
from resmem_lm.report.tables import METHOD_TITLES, rows
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import write_json

HOSTILE = "<script>alert('&')</script>"


def method(accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01],
        "tpr": 0.0431,
        "fpr": 0.0172,
        "gain": 0.0259,
        "gain_ci95": [0.0211, 0.0303],
        "certified": 0.99876,
        "hyperparameters": {"k": 50, "sigma": 0.5, "temperature": 1.0, "lambda": 0.8},
        **more,
    }


def some_results() -> dict[str, Any]:
    methods = {name: method(0.31234 + 0.01 * number) for number, name in enumerate(METHOD_TITLES)}
    methods["deepnet"] |= {"hyperparameters": {}, "certified": 1.0}
    on_simplex = {"deepnet": 43.21, "knnlm": 38.76, "knnlm_perplexity": 35.3, "resmem_calibrated": 34.5, "resmem_adaptive": 33.6}
    for name, perplexity in on_simplex.items():
        methods[name] |= {"perplexity": perplexity, "calibration_error": perplexity / 1000}
    methods["resmem_calibrated"] |= {"form": "clipped"}
    methods["resmem_adaptive"] |= {"hyperparameters": {"k": 50, "sigma": 0.5}}
    differences = [{"method": "resmem_adaptive", "over": "resmem", "accuracy": 0.00345, "accuracy_ci95": [0.0011, 0.0059]}]
    split = {"tokens": 12345, "documents": 17, "groups": 17, "recall_at_k": 0.98765, "methods": methods, "differences": differences}
    lines = ("knnlm", "resmem_lambda1", "resmem")
    neighbor = {"document": "python/ast.py", "context": "The name of", "token": " the", "distance": 0.61254, "weight": 0.21987}
    example = {
        "document": "jax/api.py",
        "context": "as in",
        "target": " the",
        "deepnet": " a",
        "resmem": " the",
        "neighbors": [neighbor] * 3,
    }
    return {
        "splits": {"validation": split, "test": split},
        "curves": {
            "k": {"values": [16, 1, 4], "accuracy": {name: [0.33, 0.31, 0.32] for name in lines}},
            "sigma": {"values": [0.25, 1.0], "accuracy": {name: [0.34, 0.33] for name in lines}},
        },
        "examples": [example],
        "datastore": {"rows": 1234567, "bytes_per_row": 606.05},
        "index": {"kind": "faiss"},
        "model": {"num_layers": 4, "emb_dim": 256, "vocab_size": 4096},
        "documents": {"train": 2100, "validation": 44, "test": 17, "empty": 2, "duplicate": 103},
        "seconds": {"train": 1234.56},
        "versions": {"jax": "0.10.2"},
    }


def page_of(workdir: Path, results: dict[str, Any], config: str | None = "train.steps = 20\n") -> str:
    write_json(workdir / "results.json", results)
    if config is not None:
        (workdir / "config.gin").write_text(config)
    assert set(write_report.function(Run(workdir))) == {"sha256"}
    return (workdir / "report.html").read_text("utf-8")


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_the_table_that_results_prints(tmp_path: Path) -> None:
    results = some_results()
    page = page_of(tmp_path, results)
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page.split("<tbody>")[1].split("</tbody>")[0])
    expected = rows(results)
    assert [cell.replace("&#39;", "'") for cell in cells] == [cell for row in expected for cell in row]
    assert [row[1] for row in expected] == [f"{31.23 + number:.2f}" for number in range(len(METHOD_TITLES))]


def test_the_page_has_facts_configuration_versions_and_times(tmp_path: Path) -> None:
    text = Elements(page_of(tmp_path, some_results())).text
    facts = [
        "12,345 tokens of 17 documents",
        "1,234,567 rows",
        "606.0 bytes",
        "faiss",
        "0.988",
        "at least 99.87%",
        "2,100 documents",
        "103 duplicates",
    ]
    for fact in [*facts, "2 empty", "train.steps = 20", "0.10.2", "1,234.6", "0.613", "0.220", "␣the", "␣a"]:
        assert fact in text


def test_the_page_names_the_groups_of_the_bootstrap(tmp_path: Path) -> None:
    results = some_results()
    assert "by bootstrap over the 17 documents;" in Elements(page_of(tmp_path, results)).text
    results["splits"]["test"]["groups"] = 3
    assert "by bootstrap over the 3 groups of documents;" in Elements(page_of(tmp_path, results)).text
    del results["splits"]["test"]["groups"]
    with pytest.raises(UserError, match=r"made by another version: delete it and run `resmem evaluate`"):
        page_of(tmp_path, results)


def test_plots_have_a_line_for_each_method_and_deepnet(tmp_path: Path) -> None:
    page = page_of(tmp_path, some_results())
    svg = page[page.index("<svg") : page.index("</svg>")]
    for title in ("DeepNet", "kNN-LM", "ResMem (lambda 1)", "ResMem"):
        assert f">{title}</text>" in svg
    inks = set(re.findall(r"var\((--ink-\d), #[0-9a-f]{6}\)", svg))
    assert "#" not in re.sub(r"var\(.*?\)|\"#\w+\"|url\(#\w+\)", "", svg), "every color must be one of the page's, light or dark"
    assert inks == {"--ink-0", "--ink-1", "--ink-2", "--ink-3", "--ink-9"}
    light, dark = page.split("prefers-color-scheme: dark")
    assert all(f"{ink}: #" in light and f"{ink}: #" in dark for ink in inks)


def test_five_lines_are_distinct_on_a_light_and_a_dark_page(tmp_path: Path) -> None:
    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for page in page_of(tmp_path, some_results()).split("prefers-color-scheme: dark"):
        colors = dict(re.findall(r"--(ink-\d|page): (#[0-9a-f]{6})", page))
        inks = [colors[f"ink-{number}"] for number in range(6)]
        assert len(set(inks)) == 6
        for ink in inks:
            dark, light = sorted((luminance(ink), luminance(colors["page"])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, ink
    assert len({marker for marker, _, _ in STYLES}) == len(STYLES) == 5


@pytest.mark.parametrize("place", ["context", "document", "target", "deepnet", "resmem", "neighbor", "config", "version"])
def test_the_page_escapes_text(tmp_path: Path, place: str) -> None:
    results = copy.deepcopy(some_results())
    example = results["examples"][0]
    if place in example:
        example[place] = HOSTILE
    elif place == "neighbor":
        example["neighbors"] = [{"document": HOSTILE, "context": HOSTILE, "token": HOSTILE, "distance": 1.0, "weight": 0.5}]
    elif place == "version":
        results["versions"][HOSTILE] = HOSTILE
    elements = Elements(page_of(tmp_path, results, config=HOSTILE if place == "config" else ""))
    assert "script" not in [tag for tag, _ in elements.found]
    assert HOSTILE in elements.text


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, some_results())
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        for name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_equal_results_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = page_of(tmp_path, some_results())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert page_of(tmp_path, some_results()) == first


def test_a_page_needs_no_examples_configuration_or_second_point(tmp_path: Path) -> None:
    results = some_results() | {"examples": []}
    for curve in results["curves"].values():
        curve["values"] = curve["values"][:1]
        curve["accuracy"] = {name: values[:1] for name, values in curve["accuracy"].items()}
    page = page_of(tmp_path, results, config=None)
    assert "There are none" in page
    assert "<details>" not in page


def test_a_document_id_without_an_encoding_is_replaced(tmp_path: Path) -> None:
    results = some_results()
    results["examples"][0]["document"] = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    assert "caf?.txt" in page_of(tmp_path, results)


@pytest.mark.parametrize("content", [None, "{"])
def test_missing_or_damaged_results_are_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        write_report.function(Run(tmp_path))
    assert not (tmp_path / "report.html").exists()
