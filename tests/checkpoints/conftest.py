import pytest

from sam3lt_jax.checkpoints import from_pretrained, save_pretrained


@pytest.fixture(scope="session")
def tiny():
  """A tiny S0-like model and its variables."""
  return from_pretrained("random:tiny")


@pytest.fixture(scope="session")
def tiny_s1():
  return from_pretrained("random:tiny-s1")


@pytest.fixture(scope="session")
def saved_s1(tiny_s1, tmp_path_factory):
  """A directory that `save_pretrained` wrote; not to be changed."""
  path = tmp_path_factory.mktemp("saved") / "m"
  save_pretrained(path, *tiny_s1)
  return path
