"""Generate pages of the site: the settings from the functions that gin configures, and CONTRIBUTING.md."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gin
import griffe

import resmem_lm.commands  # noqa: F401 - it registers every stage and study

ROOT = Path(__file__).parent.parent
SECTIONS = {  # of the settings page, with their modules in order
    "Text": ("resmem_lm.text.documents", "beam_pipelines.sample_documents", "resmem_lm.text.vocabulary"),
    "Model": ("resmem_lm.model.config", "resmem_lm.model.train", "resmem_lm.model.take_checkpoint"),
    "Memory": ("beam_pipelines.build_datastore", "beam_pipelines.build_index"),
    "Evaluation and report": ("beam_pipelines.search_neighbors", "resmem_lm.evaluation.evaluate", "resmem_lm.report.report"),
    "Plan": ("resmem_lm.planning.",),
    "Studies": ("resmem_lm.studies.",),
}


class Setting(NamedTuple):
    """One argument of a function."""

    name: str
    default: str
    description: str


class Configurable(NamedTuple):
    """A function or class that gin configures."""

    name: str
    module: str
    summary: str
    settings: list[Setting]


def configurables() -> list[Configurable]:
    """Return every function and class of this project that gin configures."""
    registered = [entry for _, entry in gin.config._REGISTRY.items()]  # noqa: SLF001 - gin lists them nowhere else
    own = [entry for entry in registered if entry.wrapped.__module__.startswith(("resmem_lm.", "beam_pipelines."))]
    return [_describe(entry.wrapped, set(entry.denylist or ())) for entry in own]


def _describe(function: Callable[..., Any], not_settings: set[str]) -> Configurable:
    sections = griffe.parse_google(griffe.Docstring(inspect.getdoc(function) or ""), warnings=False)
    text = [str(section.value) for section in sections if section.kind is griffe.DocstringSectionKind.text]
    summary = text[0] if text else ""
    return Configurable(function.__name__, function.__module__, summary, list(_settings(function, not_settings, sections)))


def _settings(function: Callable[..., Any], not_settings: set[str], sections: list[Any]) -> Iterator[Setting]:
    """Yield the settings of a function in the order of its signature."""
    kinds = (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes)
    described = {item.name: " ".join(item.description.split()) for section in sections if section.kind in kinds for item in section.value}
    for name, default in defaults(function).items():
        if name not in not_settings:
            yield Setting(name, shown(default), described.get(name, ""))


def shown(default: Any) -> str:
    """Return a default as the page shows it."""
    if default is inspect.Parameter.empty:
        return "required"
    return f"`{type(default).__name__}()`" if dataclasses.is_dataclass(default) else f"`{default!r}`"


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function, or the fields of a dataclass, with their defaults."""
    found = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    if dataclasses.is_dataclass(function):  # a default that a factory makes
        found |= {field.name: field.default_factory() for field in dataclasses.fields(function) if callable(field.default_factory)}
    return found


def settings_page() -> str:
    """Return Markdown with a table for each function."""
    lines: list[str] = []
    found = sorted(configurables(), key=lambda entry: entry.name)
    for title, modules in SECTIONS.items():
        lines += [f"## {title}", ""]
        for module in modules:
            for entry in (entry for entry in found if entry.module.startswith(module)):
                lines += [f"### {entry.name}", "", entry.summary, "", *_table(entry.settings), ""]
    return "\n".join(lines)


def _table(settings: list[Setting]) -> list[str]:
    cells = [(f"`{row.name}`", row.default, row.description) for row in settings]
    rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
    return ["| setting | default | meaning |", "| --- | --- | --- |", *rows] if rows else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the generated pages; MkDocs calls this for every page."""
    if page.file.src_uri == "settings.md":
        return markdown.replace("<!-- settings -->", settings_page())
    if page.file.src_uri == "contributing.md":
        return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    return markdown
