import jax
import numpy as np
import pytest

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.training.freezing import merge, split
from tests import tiny

TREE = {
  "text_encoder": {"layers_0": {"kernel": 1, "bias": 2}, "layers_1": {"kernel": 3}},
  "head": {"bias": 4},
}


def test_freeze_and_train_are_each_others_complement():
  trainable, frozen = split(TREE, freeze=["^text_encoder/layers_0/"])
  assert trainable == {"text_encoder": {"layers_1": {"kernel": 3}}, "head": {"bias": 4}}
  assert frozen == {"text_encoder": {"layers_0": {"kernel": 1, "bias": 2}}}
  assert split(TREE, train=["^text_encoder/layers_0/"]) == (frozen, trainable)


def test_patterns_are_searched_for_and_join():
  trainable, frozen = split(TREE, freeze=["bias$", "layers_1"])
  assert flatten(trainable) == {"text_encoder/layers_0/kernel": 1}
  assert len(flatten(frozen)) == 3


def test_no_pattern_trains_everything():
  assert split(TREE) == (TREE, {}) == split(TREE, freeze=[])


def test_merge_undoes_split_and_copies_nothing():
  _, variables = tiny.load(tiny.config())
  params = variables["params"]
  merged = merge(*split(params, freeze=["^vision_encoder/", "^text_encoder/layers_[01]/"]))
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))


def test_merge_works_under_jit_and_leaves_its_arguments():
  trainable, frozen = split({"a": {"w": np.float32(2), "b": np.float32(3)}}, freeze=["b"])
  assert jax.jit(lambda t, f: merge(t, f)["a"]["w"] * merge(t, f)["a"]["b"])(trainable, frozen) == 6
  assert trainable == {"a": {"w": 2}} and frozen == {"a": {"b": 3}}


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"freeze": ["text_encodr/"]}, "freeze: 'text_encodr/' matches no parameter; near names: text_encoder"),
    ({"train": ["head", "nothing_like_it"]}, "train: 'nothing_like_it' matches no parameter; near names: .+"),
    ({"freeze": ["["]}, r"freeze: '\[' is no regular expression"),
    ({"freeze": ["."]}, "nothing is left to train"),
    ({"train": []}, "nothing is left to train"),
    ({"freeze": ["head"], "train": ["head"]}, "give freeze or train, not both"),
    ({"freeze": "head"}, "freeze='head'; accepted: a list"),
  ],
)
def test_mistakes(kwargs, message):
  with pytest.raises(ValueError, match=message):
    split(TREE, **kwargs)


def test_a_parameter_in_both_trees():
  with pytest.raises(ValueError, match="merge: head/bias is in both"):
    merge(TREE, {"head": {"bias": 5}})
