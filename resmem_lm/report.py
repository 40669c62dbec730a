"""results.json -> report.html."""

from pathlib import Path

from resmem_lm.workdir import Record, stage


@stage(name="report", after=("evaluate",), output="report.html", redo=True)
def write_report(workdir: Path) -> Record:
    """x"""
    (workdir / "report.html").write_text("x")
    return {}
