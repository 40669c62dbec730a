"""Set up all tests: two virtual CPU devices, a compilation cache, reproducible examples, and no gin settings from earlier tests."""

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
import gin
import hypothesis
import pytest

from tests.tiny import arguments

# JAX and OpenMP read these variables at import. No module above imports them. Subprocesses inherit the variables.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads of faiss would occupy the cores of other tests
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=30)
hypothesis.settings.load_profile("ci")


def pytest_report_header() -> str:
    """Return the versions that the tests run with."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "apache-beam", "faiss-cpu", "scann", "tensorflow", "t5x")
    installed = {distribution.metadata["Name"].lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return "versions: " + ", ".join(f"{name} {installed.get(name, 'not installed')}" for name in packages)


@pytest.fixture(autouse=True)
def _clear_settings() -> Iterator[None]:
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the work directory of a finished run, which all test processes share. Tests that change it use `tiny_copy`."""
    from resmem_lm.cli import main

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "tiny"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "run" / "report.html").exists():
            folder.mkdir(exist_ok=True)
            assert main(["run", *arguments(folder, folder / "run")]) == 0
            gin.clear_config()
    return folder / "run"


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, in a folder with its corpus and configuration."""
    shutil.copytree(tiny_run.parent, tmp_path / "tiny", symlinks=True)
    return tmp_path / "tiny" / "run"
