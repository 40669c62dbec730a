"""What every study has: a stage, and what it writes: numbers (JSON and CSV), a plot, and a section of the report."""

import csv
import io
from collections.abc import Callable

from resmem_lm.report.plots import Figure, to_svg
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.stages import Stage, stage
from resmem_lm.workdir.storage import Record, sha256, write_bytes, write_json

NEEDS = ("search", "build", "train", "evaluate")


def study(*, name: str, after: tuple[str, ...] = NEEDS) -> Callable[[Callable[..., Record]], Stage]:
    """Makes a function the study `name`: a stage that writes WORKDIR/studies/NAME and is done again when its settings or inputs change."""
    return stage(name=f"study-{name}", after=after, policy="redo")


def write_study(
    run: Run,
    name: str,
    *,
    title: str,
    text: str,
    rows: list[Record],
    draw: Callable[[Figure], None] | None,
    examples: list[Record] | None = None,
) -> Record:
    """Writes results.json, table.csv and figure.svg; returns the checksum of the numbers.

    Args:
        run: of the study.
        name: of the study.
        title: of its section, with the paper's figure or table.
        text: what is to be seen, in a paragraph.
        rows: the table, the same columns in each row.
        draw: draws into an empty figure; None for no plot.
        examples: shown in the report in place of the table, to be searched.
    """
    folder = run.studies / name
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / "table.csv", table.getvalue().encode())
    if draw:
        write_bytes(folder / "figure.svg", to_svg(draw).encode())
    more = {} if examples is None else {"examples": examples}
    write_json(folder / "results.json", {"title": title, "text": text, "rows": rows, **more})
    return {"sha256": sha256(folder / "results.json")}
