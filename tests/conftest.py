"""What all tests share: one thread each, and the real corpora where there are any."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: several workers on two cores must not fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no bug: what a test takes decides nothing.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items):
    if not os.environ.get("HLSTM_REAL_DATA"):
        skip = pytest.mark.skip(reason="HLSTM_REAL_DATA is not set")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with an4_sphere.tar.gz; only for tests marked `real`."""
    return Path(os.environ["HLSTM_REAL_DATA"])


@pytest.fixture
def store(tmp_path):
    """Saves records in a repository of their own and gives its root."""
    from hlstm_src import records

    def save(*made):
        for record in made:
            record.save(records.path_of(record.experiment, record.profile, record.seed, tmp_path))
        return tmp_path

    return save
