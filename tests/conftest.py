"""What every test needs: two virtual CPU devices, reproducible examples, and no settings from the test before."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import gin
import hypothesis
import pytest

from tests.tiny import arguments

# faiss's threads wait asleep: where processes share few cores, waiting awake is most of what they do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# jax reads it when it is imported, which no line above does.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=30)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_settings_from_the_test_before() -> Iterator[None]:
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run. Tests that change it take `tiny_copy`."""
    from resmem_lm.cli import main

    folder = tmp_path_factory.mktemp("tiny")
    assert main(["run", *arguments(folder, folder / "run")]) == 0
    gin.clear_config()
    return folder / "run"


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, in a folder with its corpus and configuration."""
    shutil.copytree(tiny_run.parent, tmp_path / "tiny", symlinks=True)
    return tmp_path / "tiny" / "run"
