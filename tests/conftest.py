"""What every test needs: two virtual CPU devices, reproducible examples, and no settings from the test before."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

import gin

# jax reads it when it is imported, which no line above does.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_settings_from_the_test_before() -> Iterator[None]:
    yield
    gin.clear_config()
