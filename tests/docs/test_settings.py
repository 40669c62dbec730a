"""The settings page has every argument of every function that gin configures."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from resmem_lm import commands

HOOKS = Path(__file__).parents[2] / "docs" / "hooks.py"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", HOOKS)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_stage_and_study_is_on_the_page_once(hooks: ModuleType) -> None:
    stages = [value for value in vars(commands).values() if isinstance(value, commands.Stage)]
    names = {stage.__name__ for stage in stages} | {"ModelConfig"}
    assert len(stages) == 20
    found = [entry.name for entry in hooks.configurables()]
    assert names <= set(found)
    page = hooks.settings_page()
    assert [page.count(f"### {name}\n") for name in found] == [1] * len(found)


def test_every_setting_of_a_stage_is_on_the_page_with_its_default(hooks: ModuleType) -> None:
    entries = {entry.name: entry for entry in hooks.configurables()}
    page = hooks.settings_page()
    for value in list(vars(commands).values()):
        if isinstance(value, commands.Stage):
            rows = {row.name: row.default for row in entries[value.__name__].settings}
            parameters = list(value.signature.parameters.values())[1:]
            assert list(rows) == [parameter.name for parameter in parameters]
            for parameter in parameters:
                default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
                assert f"| `{parameter.name}` | {default} | " in page
                assert rows[parameter.name] == default


def test_every_function_has_a_summary_and_every_setting_a_description(hooks: ModuleType) -> None:
    bare = [entry.name for entry in hooks.configurables() if not entry.summary]
    bare += [f"{entry.name}.{row.name}" for entry in hooks.configurables() for row in entry.settings if not row.description]
    assert bare == []
