"""RepMixer blocks folded into plain convolutions.

At inference every BatchNorm is an affine map, so x + s * (conv(x) b1 + x b2 - x b3) is one depthwise
convolution with a bias, and the block's layer scale is a factor of its last linear layer.
Source: MobileCLIP's reparameterisation.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from sam3lt_jax.model import Sam3LiteText, Variables


def fuse(model: Sam3LiteText, variables: Variables) -> tuple[Sam3LiteText, Variables]:
  """(model, variables) with `config.text.fused` and no BatchNorm; the arguments are left as they are.

  Equal to the unfused model at inference up to rounding (tested to 1e-5). Of `jax.ShapeDtypeStruct`s it gives
  those of the fused variables.
  """
  text = model.config.text
  if text.fused or not text.use_repmixer_blocks or text.kind != "mobileclip":
    return model, variables
  config = model.config.replace(text=dataclasses.replace(text, fused=True))

  def folded(variables: Variables) -> Variables:
    encoder = dict(variables["params"]["text_encoder"])
    stats = variables["batch_stats"]["text_encoder"]
    for name in {"layers_0", f"layers_{text.num_hidden_layers - 1}"}:
      encoder[name] = _fuse_block(encoder[name], stats[name], text.batch_norm_eps)
    return {"params": variables["params"] | {"text_encoder": encoder}}

  shapes_only = isinstance(jax.tree.leaves(variables)[0], jax.ShapeDtypeStruct)
  return model.clone(config=config), jax.eval_shape(folded, variables) if shapes_only else folded(variables)


def _fuse_block(params, stats, eps):
  dtype = params["conv_feed_forward"]["mlp"]["fc2"]["kernel"].dtype
  params, stats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, stats))
  mixer, ffn = params["token_mixer"], params["conv_feed_forward"]
  mixer_stats, ffn_stats = stats["token_mixer"], stats["conv_feed_forward"]
  scale = mixer["layer_scale"]
  conv = mixer["mixer"]["conv"]["kernel"]  # [K, 1, D]
  conv_gain, conv_shift = _affine(
    mixer["mixer"]["batchnorm_conv"], mixer_stats["mixer"]["batchnorm_conv"], eps
  )
  skip_gain, skip_shift = _affine(
    mixer["mixer"]["batchnorm_skip"], mixer_stats["mixer"]["batchnorm_skip"], eps
  )
  ref_gain, ref_shift = _affine(mixer["reference_batchnorm"], mixer_stats["reference_batchnorm"], eps)
  middle = conv.shape[0] // 2
  kernel = (conv * (conv_gain * scale)).at[middle, 0].add(1.0 + scale * (skip_gain - ref_gain))
  bias = scale * (conv_shift + skip_shift - ref_shift)

  gain, shift = _affine(ffn["depthwise_batchnorm"], ffn_stats["depthwise_batchnorm"], eps)
  depthwise = ffn["depthwise_conv"]["kernel"] * gain
  fused = {
    "token_mixer": {"conv": {"kernel": kernel, "bias": bias}},
    "conv_feed_forward": {
      "depthwise_conv": {"kernel": depthwise, "bias": shift},
      "mlp": {
        "fc1": ffn["mlp"]["fc1"],
        "fc2": jax.tree.map(lambda x: x * params["layer_scale"], ffn["mlp"]["fc2"]),
      },
    },
  }
  return jax.tree.map(lambda x: x.astype(dtype), fused)


def _affine(params, stats, eps):
  """BatchNorm at inference as (gain, shift)."""
  gain = params["scale"] * jax.lax.rsqrt(stats["var"] + eps)
  return gain, params["bias"] - stats["mean"] * gain
