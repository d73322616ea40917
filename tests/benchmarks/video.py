"""Objects followed through a clip, beside transformers' `Sam3TrackerVideoModel`: seconds a frame, bytes held.

  python -m tests.benchmarks.video                                   # 1 object at 1008 px
  python -m tests.benchmarks.video --image-size 336 --objects 1 5 20
  python -m tests.benchmarks.video --objects 10 --held                # what is held of ten, without a time
  python -m tests.benchmarks.video --image-size 336 --objects 1 5 20 --dtype bfloat16 --json video.json

Both sides have the same random weights and start every frame from features that are there: the trunk, which
is most of a frame with few objects, is compared by `tests.benchmarks.compare --parts vision`. Frame by frame
one side follows the other, and only frames whose memory is full (7 maps) count. What our side holds is its
state and what its compiled program takes beside; what the other holds is its session.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks.timing import Elsewhere, say

FULL = 7  # frames until as many maps are read as ever are
SEED = 1
PATCH = 14


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  formatter = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(prog="video", description=__doc__, formatter_class=formatter)
  parser.add_argument("--image-size", type=int, default=1008, help="a multiple of 14 (default 1008)")
  parser.add_argument("--objects", type=int, nargs="+", default=[1], help="how many are followed (default 1)")
  parser.add_argument("--frames", type=int, default=5, help="that count (default 5)")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--held", action="store_true", help="only what our side holds; nothing is timed")
  parser.add_argument("--json", metavar="FILE", help="write all samples there")
  args = parser.parse_args(arguments)
  if args.image_size < PATCH or args.image_size % PATCH:
    parser.error(f"--image-size must be a multiple of {PATCH}, got {args.image_size}")
  if args.frames < 1 or min(args.objects) < 1:
    parser.error("--frames and --objects must be at least 1")
  return args


class Theirs:
  """transformers' tracker with random weights and a trunk of one layer, which is not timed."""

  def __init__(self, side: int, dtype: str):
    from convert import torch_reference

    ref = torch_reference.import_reference()
    self._torch, tf = ref.torch, ref.transformers
    self._dtype, self.side = getattr(self._torch, dtype), side
    grid, sizes = side // PATCH, {"image_size": side, "patch_size": PATCH}
    backbone = {
      "model_type": "sam3_vit_model", "hidden_size": 1024, "num_hidden_layers": 1, "global_attn_indexes": [],
      "num_attention_heads": 16, **sizes,
    }  # fmt: skip
    config = tf.Sam3TrackerVideoConfig(
      vision_config={
        "model_type": "sam3_vision_model", "backbone_config": backbone,
        "backbone_feature_sizes": [[n * grid] * 2 for n in (4, 2, 1)],
      },
      prompt_encoder_config=sizes, image_size=side, memory_attention_rope_feat_sizes=[grid, grid],
    )  # fmt: skip
    model = torch_reference.randomise_(tf.Sam3TrackerVideoModel(config).eval(), SEED)
    matrix = model.prompt_encoder.shared_embedding.positional_embedding
    with self._torch.no_grad():
      model.shared_image_embedding.positional_embedding.copy_(matrix)
      model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(2.0)  # or nothing would be there
    self.device = "cuda" if self._torch.cuda.is_available() else "cpu"
    self.model, self._config = model, config

  def save(self, folder: str) -> None:
    from safetensors.torch import save_file

    os.makedirs(folder)
    tensors = {
      k: v.clone().contiguous()
      for k, v in self.model.state_dict().items()
      if not k.startswith("vision_encoder.backbone.")
    }
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    self._config.save_pretrained(folder)
    self.model.to(self.device, self._dtype)

  def start(self, objects: int, frames: int, xy: np.ndarray) -> None:
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
      Sam3TrackerVideoInferenceSession as Session,
    )

    torch = self._torch
    video = torch.zeros(1, 3, self.side, self.side, dtype=self._dtype).expand(frames, -1, -1, -1)
    places = {name: self.device for name in ("inference_device", "inference_state_device")}
    self._session = Session(
      video=video, video_height=self.side, video_width=self.side, dtype=self._dtype, **places
    )
    for i in range(objects):
      index = self._session.obj_id_to_idx(i)
      points = torch.tensor(xy[i] * self.side, dtype=self._dtype, device=self.device)
      label = torch.ones(1, 1, 1, dtype=torch.int32, device=self.device)
      self._session.add_point_inputs(
        index, 0, {"point_coords": points[None, None, None], "point_labels": label}
      )
    self._session.obj_with_new_inputs = list(range(objects))

  def frame(self, index: int) -> float:
    """Seconds of a frame whose features are there."""
    with self._torch.inference_mode():
      self.model._prepare_vision_features(self._session, index, 1)
      self._wait()
      start = time.perf_counter()
      self.model(self._session, frame_idx=index)
      self._wait()
      return time.perf_counter() - start

  def _wait(self) -> None:
    if self.device == "cuda":
      self._torch.cuda.synchronize()

  def held(self) -> int:
    """Bytes of the session's outputs."""
    seen: dict[int, int] = {}

    def count(value: Any) -> None:
      if isinstance(value, self._torch.Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
      elif isinstance(value, dict):
        for one in value.values():
          count(one)
      elif isinstance(value, (list, tuple)):
        for one in value:
          count(one)

    count(self._session.output_dict_per_obj)
    return sum(seen.values())


class Ours:
  """The same weights, engine and all."""

  def __init__(self, folder: str, side: int, dtype: str):
    import jax
    import jax.numpy as jnp

    from sam3lt_jax import Sam3LiteText, Sam3LiteTextConfig, Sam3Processor, tracker_from_pretrained
    from sam3lt_jax.engine import Engine

    tracker, variables = tracker_from_pretrained(
      folder, profile="transformers", dtype=dtype, param_dtype=dtype, progress=False
    )
    config = Sam3LiteTextConfig.s0()
    model = Sam3LiteText(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    shapes = jax.eval_shape(model.init_variables, jax.random.key(0))
    processor = Sam3Processor(config, image_size=side)
    self._engine = Engine(model, shapes, processor, tracker=(tracker, variables))
    grid = side // PATCH
    trunk = np.random.default_rng(SEED).normal(size=(1, grid, grid, 1024)).astype(model.dtype)
    features = jax.jit(lambda v, x: tracker.apply(v, x, method="get_image_features"))
    self._features = features(self._engine.tracker_variables, trunk)
    self.device = jax.devices()[0].device_kind

  def start(self, objects: int, frames: int, xy: np.ndarray) -> None:
    from sam3lt_jax.features import Clicks
    from sam3lt_jax.video.tracks import Tracks

    self._frames = frames
    self._tracks = Tracks(self._engine, objects)
    self._tracks.add(range(objects), 0)
    clock = self._tracks.clock(0, frames=frames)
    one, h = np.ones((1, 1), bool), self._features.mask_side
    none = np.zeros((1, h, h), np.float32), ~one[0]
    clicks = {
      i: Clicks(xy[i][None, None].astype(np.float32), one.astype(np.int32), one, *none)
      for i in range(objects)
    }
    tracked = self._tracks.ask(self._features, clock, clicks)
    self._tracks.keep(self._features, clock, tracked, range(objects))

  def frame(self, index: int) -> float:
    clock = self._tracks.clock(index, frames=self._frames)
    start = time.perf_counter()
    np.asarray(self._tracks.advance(self._features, clock).object_score_logits)
    for leaf in vars(self._tracks.bank).values():
      leaf.block_until_ready()
    return time.perf_counter() - start

  def held(self) -> int:
    """Bytes of the state and of what the compiled step takes beside."""
    state = sum(x.nbytes for x in vars(self._tracks.bank).values())
    compiled = self._tracks.programs.advance.compiled()[-1].memory_analysis()
    return state + compiled.temp_size_in_bytes + compiled.output_size_in_bytes - compiled.alias_size_in_bytes


def _places(objects: int) -> np.ndarray:
  return np.random.default_rng(SEED).uniform(0.1, 0.9, (objects, 2))


def measure(args: argparse.Namespace, objects: int, theirs: Theirs, ours: Ours) -> dict[str, Any]:
  xy = _places(objects)
  last = FULL + args.frames
  for side in (theirs, ours):
    side.start(objects, last + 1, xy)
  theirs.frame(0)
  seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
  elsewhere, before = Elsewhere(), 0
  for index in range(1, last + 1):
    for name, side in (("theirs", theirs), ("ours", ours)):
      taken = side.frame(index)
      if index > FULL:
        seconds[name].append(taken)
    say(f"{objects} objects, frame {index} of {last}")
    if index == FULL:
      before = theirs.held()
  growth = (theirs.held() - before) / args.frames
  return {
    "objects": objects, **seconds, "ours_held": ours.held(), "theirs_a_frame": growth,
    "elsewhere": elsewhere.share(),
  }  # fmt: skip


def table(args: argparse.Namespace, rows: Sequence[dict[str, Any]], devices: str) -> str:
  lines = [
    f"A frame's masks and memory at {args.image_size} px, {args.dtype}, medians of {args.frames}; {devices}.",
    "",
    "| objects | ours, s a frame | transformers | ratio | ours holds, always | transformers, 1000 frames |",
    "| ---: | ---: | ---: | ---: | ---: | ---: |",
  ]
  for row in rows:
    ours, theirs = statistics.median(row["ours"]), statistics.median(row["theirs"])
    lines.append(
      f"| {row['objects']} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.2f}"
      f" | {row['ours_held'] / 1e6:.0f} MB | {row['theirs_a_frame'] / 1e6:.1f} GB |"
    )
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
  args = parse(arguments)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from tests.benchmarks import machine

  rows = []
  with tempfile.TemporaryDirectory() as folder:
    theirs = Theirs(args.image_size, args.dtype)
    theirs.save(f"{folder}/tracker")
    ours = Ours(f"{folder}/tracker", args.image_size, args.dtype)
    where = machine.describe()
    devices = f"{ours.device} and {theirs.device}, {where['cpu']}, {where['cores']} cores, {where['date']}"
    if args.held:
      for objects in args.objects:
        ours.start(objects, 2, _places(objects))
        ours.frame(1)
        print(f"{objects} objects, {args.image_size} px, {args.dtype}: {ours.held() / 1e6:.0f} MB; {devices}")
      return 0
    for objects in args.objects:
      rows.append(measure(args, objects, theirs, ours))
      if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
          json.dump({"command": sys.argv, "machine": where, "rows": rows}, f, indent=1)
  print(table(args, rows, devices))
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
