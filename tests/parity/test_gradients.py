"""d(loss) / d(parameters) against torch on a tiny model, so that training can be trusted.

One loss reads every output, the decoder's intermediate layers included, so every gradient path counts:
box refinement looks back one layer, reference boxes that steer attention carry no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import from_pretrained
from sam3lt_jax.checkpoints.engine import flatten
from tests.reference import import_torch_reference, random_torch_model, save_torch, tiny_config

RELATIVE = 1e-3
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


def _inputs(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  mask = np.ones((2, 16), bool)
  mask[0, 5:] = mask[1, 9:] = False
  return {
    "pixel_values": rng.uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32),
    "input_ids": rng.integers(1, 299, (2, 16)).astype(np.int32),
    "attention_mask": mask,
    "input_boxes": np.array(
      [[[0.4, 0.5, 0.3, 0.2], [0.6, 0.6, 0.5, 0.7]], [[0.1, 0.2, 0.15, 0.25], [0.5, 0.4, 0.3, 0.3]]],
      np.float32,
    ),
    "input_boxes_labels": np.array([[1, 0], [1, -10]], np.int32),
  }


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Fixed random weights, so that the loss is a sum over every output with no symmetry to hide behind."""
  rng = np.random.default_rng(7)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sorted(shapes.items())}


def _torch_gradients(model, inputs, directory):
  """Our tree of torch's gradients: saved as if they were weights, read by the real loader."""
  torch = import_torch_reference().torch
  tensors = {k: torch.from_numpy(v.copy()) for k, v in inputs.items()}
  tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2).contiguous()
  for name in ("input_ids", "input_boxes_labels", "attention_mask"):
    tensors[name] = tensors[name].long()
  out = model(**tensors)
  shapes = {name: tuple(getattr(out, name).shape) for name in OUTPUTS}
  weights = _weights(shapes)
  loss = sum((getattr(out, name) * torch.from_numpy(weights[name])).mean() for name in OUTPUTS)
  loss.backward()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
  _, gradients = from_pretrained(save_torch(model, directory))
  return loss.item(), weights, flatten(gradients["params"])


@pytest.mark.torch
@pytest.mark.full
@pytest.mark.parametrize("variant", ["s0", "s1"])
def test_gradients_match_torch(variant, tmp_path):
  reference = random_torch_model(
    tiny_config(variant, image_size=112, vit_layers=2, global_layers=(1,)), seed=3
  )
  model, variables = from_pretrained(save_torch(reference, tmp_path / "weights"))
  inputs = _inputs()
  expected_loss, weights, expected = _torch_gradients(reference, inputs, tmp_path / "gradients")

  @jax.jit
  def loss_and_gradients(params):
    def loss(params):
      out = model.apply(variables | {"params": params}, **inputs)
      return sum(jnp.mean(getattr(out, name) * weights[name]) for name in OUTPUTS)

    return jax.value_and_grad(loss)(params)

  loss, gradients = loss_and_gradients(variables["params"])
  assert float(loss) == pytest.approx(expected_loss, rel=1e-4, abs=1e-5)
  got = flatten(gradients)
  assert got.keys() == expected.keys()
  scale = max(float(np.abs(x).max()) for x in expected.values())
  problems = []
  for path, want in expected.items():
    want, have = np.asarray(want), np.asarray(got[path])
    # Relative to the tensor's own gradient; tensors whose gradient is rounding noise are held to zero.
    norm = np.linalg.norm(want)
    error = np.linalg.norm(have - want)
    if error > RELATIVE * norm + 1e-7 * scale * np.sqrt(want.size):
      problems.append(f"{path}: error {error:.2e} of {norm:.2e}")
  assert not problems, "\n".join(problems)
  # The comparison is not of zeros with zeros.
  live = sum(np.abs(np.asarray(x)).max() > 1e-6 * scale for x in expected.values())
  assert live > 0.9 * len(expected)
