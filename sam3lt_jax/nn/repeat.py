"""Layers of one kind run as a scan whose backward pass computes each layer anew (rematerialisation).

A gradient then keeps one input a layer instead of everything in between. Parameters keep their names and
layout (`layers_0`, `layers_1`, ...); they are stacked inside the program. A scan, not `jax.checkpoint` in a
Python loop, because XLA:CPU merges the second computation with the first unless a loop keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Dtype

Tree = Any


def stack(layers: Sequence[Tree], dtype: Dtype) -> Tree:
  """Trees of equal structure -> one tree whose leaves have a leading layer axis.

  Kernels are cast to `dtype`, which every layer does with them anyway, so that the stack is no larger than
  need be. Other leaves (norms compute in float32) stay as they are.
  """

  def join(path, *leaves):
    if getattr(path[-1], "key", None) == "kernel":
      leaves = [leaf.astype(dtype) for leaf in leaves]
    return jnp.stack(leaves)

  return jax.tree_util.tree_map_with_path(join, *layers)


def scan(step: Callable[[Tree, Tree], tuple[Tree, Tree]], carry: Tree, layers: Tree) -> tuple[Tree, Tree]:
  """`jax.lax.scan` of `step` over stacked `layers`; the backward pass runs each step a second time.

  Args:
    step: (carry, one layer's slice) -> (carry, outputs or None). A pure function: apply modules unbound.
    carry: what goes from layer to layer.
    layers: leaves [layers, ...].

  Returns:
    (carry after the last layer, outputs stacked to [layers, ...]).
  """
  # prevent_cse inserts barriers that a loop does not need and that hinder fusion.
  return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, layers)


def layer_params(params: Mapping[str, Tree], count: int) -> list[Tree]:
  """The parameters of `layers_0` .. `layers_{count - 1}`."""
  return [params[f"layers_{i}"] for i in range(count)]
