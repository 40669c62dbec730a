"""Provide what all studies share: the stage, the checks of settings, and the output files."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from resmem_lm.errors import UserError
from resmem_lm.evaluation.evaluate import Grid
from resmem_lm.evaluation.neighbors import open_queries
from resmem_lm.evaluation.scorer import SplitScorer
from resmem_lm.memory.datastore import Datastore
from resmem_lm.report.plots import Figure, to_svg
from resmem_lm.text.shards import QUERY_SPLITS
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import Stage, stage
from resmem_lm.workdir.storage import Record, sha256, write_bytes, write_json

NEEDS = ("search", "build", "train", "evaluate")


def study(*, name: str, after: tuple[str, ...] = NEEDS) -> Callable[[Callable[..., Record]], Stage]:
    """Register a function as a study: a stage that writes WORKDIR/studies/NAME and reruns when its settings or inputs change."""
    return stage(name=f"study-{name}", after=after, policy="redo")


def check_values(setting: str, values: Sequence[int | float], allowed: Callable[[Any], bool], wanted: str) -> None:
    """Raise UserError if the setting has no values, or a value that is not allowed."""
    if not values or not all(map(allowed, values)):
        raise UserError(f"{setting} = {values}: take one or more numbers {wanted}")


def check_some(setting: str, values: Sequence[int | float], allowed: Callable[[Any], bool], wanted: str) -> list[Any]:
    """Return the values that are allowed. Raise UserError if there are none."""
    if not (usable := [value for value in values if allowed(value)]):
        raise UserError(f"{setting} = {values}: take one or more numbers {wanted}")
    return usable


def usable_grid(study: str, grid: Grid, searched: int, temperatures: Sequence[float]) -> Grid:
    """Return the values of a grid that a run can evaluate. Raise UserError if there are none or a value is out of range."""
    check_values(f"{study}.sigmas", grid.sigmas, lambda sigma: sigma > 0, "above 0")
    check_values(f"{study}.lambdas", grid.lambdas, lambda lambda_: lambda_ >= 0, "of 0 or more")
    check_some(f"{study}.lambdas", grid.lambdas, lambda lambda_: lambda_ < 1, "below 1")
    ks = check_some(f"{study}.ks", grid.ks, lambda k: 1 <= k <= searched, f"from 1 to {searched}")
    shared = check_some(f"{study}.temperatures", grid.temperatures, lambda value: value in temperatures, f"out of {list(temperatures)}")
    return Grid(ks, list(grid.sigmas), shared, list(grid.lambdas))


def open_scorers(run: Run, datastore: Datastore) -> dict[str, SplitScorer]:
    """Return the scorers of validation and test."""
    return {split: SplitScorer(split, open_queries(run, split), datastore) for split in QUERY_SPLITS}


def write_study(
    run: Run,
    name: str,
    *,
    title: str,
    text: str,
    rows: list[Record],
    draw: Callable[[Figure, list[Record]], None] | None = None,
    examples: list[Record] | None = None,
) -> Record:
    """Write results.json, table.csv and figure.svg; return the checksum of results.json.

    The report shows title, text (one paragraph), the plot that `draw` makes of the rows, and the table. All rows have the same columns.
    `examples` replace the table by a list with a search field.
    """
    folder = run.studies / name
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / "table.csv", table.getvalue().encode())
    if draw:
        write_bytes(folder / "figure.svg", to_svg(lambda figure: draw(figure, rows)).encode())
    more = {} if examples is None else {"examples": examples}
    write_json(folder / "results.json", {"title": title, "text": text, "rows": rows, **more})
    return {"sha256": sha256(folder / "results.json")}
