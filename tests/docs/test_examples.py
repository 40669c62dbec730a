"""The Python blocks of the documentation run, page by page and in order, in an empty directory."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(page.name for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, namespace = (DOCS / page).read_text(), {"__name__": page}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)  # a traceback has the line of the page


def test_the_python_page_has_a_block_for_every_stage() -> None:
    text = (DOCS / "python.md").read_text()
    calls = ["prepare_documents", "make_vocabulary", "train", "build_datastore", "build_index", "search", "evaluate", "write_report"]
    calls += ["inspect", "append", "delete", "compact", "verify"]
    blocks = "".join(BLOCK.findall(text))
    assert [name for name in calls if not re.search(rf"\b{name}\(", blocks)] == []
