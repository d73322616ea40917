"""The rules of one layer: how torch names its tensors, how we name ours, and the transform between."""

from __future__ import annotations

from sam3lt_jax.checkpoints.rules import Rule


def with_bias(source: str, target: str, transform: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/kernel", transform), Rule(f"{source}.bias", f"{target}/bias")]


def linear(source: str, target: str) -> list[Rule]:
  return with_bias(source, target, "linear")


def conv(source: str, target: str) -> list[Rule]:
  return with_bias(source, target, "conv")


def norm(source: str, target: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def batch_norm(source: str, target: str) -> list[Rule]:
  counter = f"{source}.num_batches_tracked"
  return [
    *norm(source, target),
    Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
    Rule(f"{source}.running_var", f"batch_stats/{target}/var", counter=counter),
  ]


def embedding(source: str, target: str) -> Rule:
  return Rule(f"{source}.weight", f"{target}/embedding")


def fused_qkv(weight: str, bias: str, target: str) -> list[Rule]:
  """One tensor for query, key and value, stacked along the output axis."""
  return [
    Rule(weight, tuple(f"{target}/{p}_proj/kernel" for p in "qkv"), "split_linear"),
    Rule(bias, tuple(f"{target}/{p}_proj/bias" for p in "qkv"), "split_bias"),
  ]


def torch_attention(source: str, target: str, out: str = "o_proj") -> list[Rule]:
  """torch.nn.MultiheadAttention."""
  return [
    *fused_qkv(f"{source}.in_proj_weight", f"{source}.in_proj_bias", target),
    *linear(f"{source}.out_proj", f"{target}/{out}"),
  ]
