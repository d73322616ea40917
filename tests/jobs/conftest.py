import pytest

from tests.jobs import work


@pytest.fixture
def plan(tmp_path):
  return work.open_plan(tmp_path / "job", number=10, shard_size=4)
