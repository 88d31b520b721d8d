"""Fixtures of the tests of ``nbdserver image``."""

from __future__ import annotations

import shutil

import pytest

from tests.image.kit import Sample, make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Images of many kinds, by name, that QEMU made: to be read only."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    return make_zoo(tmp_path_factory.mktemp("zoo"))
