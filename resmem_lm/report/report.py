"""Write report.html: one self-contained page with the table, two plots, ten examples and the studies."""

import base64
import hashlib
import math
import sys
from pathlib import Path
from typing import Any

from etils import epy

from resmem_lm.errors import UserError
from resmem_lm.report.inspect import format_influence
from resmem_lm.report.plots import INK, INKS, Figure, legend_above, line, log_ticks, to_svg
from resmem_lm.report.tables import HEADER, METHOD_TITLES, differences, percent, rows, study_rows
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import stage
from resmem_lm.workdir.storage import AnyPath, Record, files_below, read_json, sha256, write_bytes

with epy.lazy_imports():
    import jinja2

# Show the examples of a study that contain every typed word. The page's policy allows only this script.
FILTER = """
for (const filtered of document.querySelectorAll(".filtered")) {
  const filter = filtered.querySelector(".filter"), input = filter.querySelector("input");
  const examples = [...filtered.querySelectorAll(".example")].map(example => {
    const parts = example.querySelectorAll("h3, .text, .token, .document");
    return [example, [...parts].map(part => part.textContent.toLowerCase()).join(" ")];
  });
  const update = () => {
    const words = input.value.toLowerCase().split(/\\s+/).filter(word => word);
    for (const [example, text] of examples) example.hidden = !words.every(word => text.includes(word));
    const shown = examples.filter(([example]) => !example.hidden).length;
    filter.querySelector("output").textContent = `${shown} of ${examples.length}`;
    filtered.querySelector(".list").scrollTop = 0;
  };
  input.addEventListener("input", update);
  filter.hidden = false;
  update();
}
"""


@stage(name="report", after=("evaluate",), policy="redo")
def write_report(run: Run) -> Record:
    """Write WORKDIR/report.html from results.json, studies and config.gin. Equal inputs give equal bytes.

    The page omits a study if its datastore or evaluation has changed, and standard error names it.
    Return the page's checksum.
    """
    results = read_json(run.results)
    test = results["splits"]["test"]
    if "groups" not in test:
        raise UserError(f"{run.results} was made by another version: delete it and run `resmem evaluate`")
    stages = run.current()
    studies = sorted({path.parent for path in files_below(run.studies) if path.name == "results.json"}, key=str)
    sections = []
    for folder in studies:
        if f"study-{folder.name}" in stages:
            sections.append(_study(folder))
        else:
            print(f"report: omits the study {folder.name}, whose inputs have changed: run `resmem study {folder.name}`", file=sys.stderr)
    script = FILTER if any(section["examples"] is not None for section in sections) else ""
    page = _template().render(
        results=results,
        test=test,
        header=HEADER,
        rows=rows(results),
        differences=differences(results),
        plots=_plots(results),
        studies=sections,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        certified=math.floor(1e4 * min(m["certified"] for m in test["methods"].values())) / 1e4,  # rounded down
        # The command `resmem` writes config.gin; stages called from Python do not.
        config=run.config.read_text("utf-8") if run.config.exists() else "",
        inks=INKS,
    )
    # A document id has surrogates if its file name is not UTF-8; UTF-8 cannot encode them.
    write_bytes(run.report, page.encode("utf-8", "replace"))
    return {"sha256": sha256(run.report)}


def _study(folder: AnyPath) -> dict[str, Any]:
    results, figure = read_json(folder / "results.json"), folder / "figure.svg"
    header, *rows = study_rows(results)
    plot = figure.read_text("utf-8") if figure.exists() else ""
    section = {name: results.get(name) for name in ("title", "text", "examples")}
    return section | {"header": header, "rows": rows, "plot": plot}


def _template() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "piece": _piece, "influence": format_influence}
    return environment.get_template("report.html")


def _piece(token: str) -> str:
    """Make a token's spaces visible, because many tokens differ only in a leading space."""
    return token.replace(" ", "␣")


def _plots(results: dict[str, Any]) -> str:
    """Plot test accuracy against k and against sigma, side by side in one SVG."""
    deepnet = 100 * results["splits"]["test"]["methods"]["deepnet"]["accuracy"]

    def draw(figure: Figure) -> None:
        for axes, (name, curve) in zip(figure.subplots(1, len(results["curves"]), sharey=True), results["curves"].items(), strict=True):
            axes.axhline(deepnet, color=f"{INK}0", linestyle=(0, (5, 3)), linewidth=1.2, label=METHOD_TITLES["deepnet"])
            for number, (method, accuracy) in enumerate(curve["accuracy"].items()):
                points = sorted(zip(curve["values"], [100 * value for value in accuracy], strict=True))
                line(axes, number, [x for x, _ in points], [y for _, y in points], METHOD_TITLES[method])
            log_ticks(axes, sorted(curve["values"]))
            axes.set_xlabel(name)
            axes.tick_params(labelleft=True)
            axes.set_ylabel("test accuracy, %")
        legend_above(figure)

    return to_svg(draw)
