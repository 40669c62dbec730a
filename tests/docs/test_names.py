"""The documentation names only files, commands and settings that exist."""

import re
from pathlib import Path

import pytest

from resmem_lm import cli, commands, config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(
        re.findall(
            r"\b((?:resmem_lm|beam_pipelines|benchmarks|configs|gin|tests|evaluation|memory|text|report)/[\w/]+\.(?:py|gin))\b",
            page.read_text(),
        )
    )
    named |= {f"benchmarks/{name}.py" for name in re.findall(r"-m benchmarks\.(\w+)", page.read_text())}
    assert [name for name in named if not (ROOT / name).exists() and not (ROOT / "resmem_lm" / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_study_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?:^    |`)resmem ([a-z]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= set(cli._group().commands)
    studies = re.findall(r"\bresmem study ([a-z-]+)\b", page.read_text())
    assert set(studies) <= set(commands.STUDIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_gives_is_accepted(page: Path) -> None:
    given = re.findall(r"--gin\.((?:study_)?[a-z]\w+\.[a-z]\w*)", page.read_text())
    for setting in given:
        config.parse([], [f"{setting} = None"])
