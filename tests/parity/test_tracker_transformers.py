"""The tracker live against transformers 5.23.0 at a tiny size, through every directory that holds one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import from_pretrained, save_pretrained, tracker_from_pretrained
from sam3lt_jax.checkpoints import engine, tables
from sam3lt_jax.features import Clicks
from tests.parity.tracker import Watched, take_over, take_over_record
from tests.reference import import_torch_reference, randomise_, tiny_config
from tests.video.common import StubEngine

pytestmark = [pytest.mark.torch, pytest.mark.full]

ROWS, SLOTS = 4, 5
SIZE, WIDTH = 112, 128  # transformers' memory is 64 wide, whatever the configuration says


def _video_config():
  ref = import_torch_reference()
  detector = tiny_config("s0", image_size=SIZE, hidden_size=WIDTH)
  vision = detector.to_dict()["vision_config"]
  sizes = {"image_size": SIZE, "patch_size": 14}
  tracker = ref.transformers.Sam3TrackerVideoConfig(
    vision_config=vision,
    prompt_encoder_config={"hidden_size": WIDTH, **sizes},
    mask_decoder_config={
      "hidden_size": WIDTH, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
    },
    image_size=SIZE, memory_attention_hidden_size=WIDTH, memory_attention_num_layers=2,
    memory_attention_feed_forward_hidden_size=64, memory_attention_rope_feat_sizes=[8, 8],
    memory_encoder_hidden_size=WIDTH, mask_downsampler_embed_dim=WIDTH, memory_fuser_embed_dim=WIDTH,
    memory_fuser_intermediate_dim=64,
  )  # fmt: skip
  return ref.transformers.Sam3VideoConfig(
    detector_config=detector.to_dict(), tracker_config=tracker.to_dict(), low_res_mask_size=32
  )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
  """The same weights in a video directory and in those of both standalone trackers."""
  ref = import_torch_reference()
  from safetensors.torch import save_file

  folder = tmp_path_factory.mktemp("trackers")
  model = randomise_(ref.transformers.Sam3VideoModel(_video_config()).eval(), 0)
  tracker = model.tracker_model
  matrix = tracker.prompt_encoder.shared_embedding.positional_embedding
  tracker.shared_image_embedding.positional_embedding.copy_(matrix)
  tracker.mask_decoder.pred_obj_score_head.proj_out.bias.data.add_(2)  # or nothing is ever there, in a clip
  model.save_pretrained(folder / "saved")  # keys `tracker_model.tracker_model.`, unlike those on the hub
  model.config.save_pretrained(folder / "video")
  tensors = {k: v.clone() for k, v in model.state_dict().items()}
  save_file(tensors, folder / "video" / "model.safetensors", metadata={"format": "pt"})
  for name, kind in (("image", "Sam3TrackerModel"), ("interactive", "Sam3TrackerVideoModel")):
    alone = getattr(ref.transformers, kind).from_pretrained(folder / "video").eval()
    alone.save_pretrained(folder / name)
  return folder


@pytest.fixture(scope="module")
def pair(directories):
  """(transformers' tracker, our function of pixels, clicks and whether several masks are asked for)."""
  ref = import_torch_reference()
  reference = ref.transformers.Sam3TrackerModel.from_pretrained(directories / "video").eval()
  model, variables = from_pretrained(directories / "video")
  tracker, weights = tracker_from_pretrained(directories / "video", profile="transformers")

  @jax.jit
  def both(pixels, clicks):
    trunk = model.apply(variables, pixels, method="trunk_map")
    features = tracker.apply(weights, trunk, method="get_image_features")
    return [tracker.apply(weights, features, clicks, multimask) for multimask in (False, True)]

  @functools.cache  # both kinds of output at once
  def ours(name):
    rows, clicks = _clicks(**CASES[name])
    return jax.tree.map(lambda x: np.asarray(x)[:rows], both(PIXELS, clicks))

  return reference, ours


def _clicks(points=None, labels=None, boxes=None, masks=None, prompts=2):
  """Of 2 images with `prompts` each, [2, P, ...], to our rows, and how many: padded to `ROWS` and `SLOTS`."""
  rows = 2 * prompts
  xy = np.zeros((rows, 0, 2)) if points is None else points.reshape(rows, -1, 2)
  kinds = np.ones((rows, 0), np.int32) if labels is None else labels.reshape(rows, -1)
  if boxes is not None:
    xy = np.concatenate([xy, boxes.reshape(rows, 2, 2)], axis=1)
    kinds = np.concatenate([kinds, np.tile([2, 3], (rows, 1))], axis=1)
  more = ((0, ROWS - rows), (0, SLOTS - kinds.shape[1]))
  given = {}
  if masks is not None:
    masks = np.pad(masks, (more[0], (0, 0), (0, 0)))
    given = {"masks": jnp.asarray(masks), "has_mask": np.arange(ROWS) < rows}
  return rows, Clicks(
    np.pad(xy / SIZE, (*more, (0, 0))).astype(np.float32), np.pad(kinds, more).astype(np.int32),
    np.pad(np.ones(kinds.shape, bool), more), **given,
    image_index=np.pad(np.repeat(np.arange(2, dtype=np.int32), prompts), more[0]),
  )  # fmt: skip


_RNG = np.random.default_rng(0)
PIXELS = np.random.default_rng(1).uniform(-1, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
POINTS = _RNG.uniform(0, SIZE, (2, 2, 3, 2))
BOXES = np.sort(_RNG.uniform(0, SIZE, (2, 2, 2, 2)), axis=2).reshape(2, 2, 4)
MASKS = _RNG.normal(0, 8, (2, 32, 32)).astype(np.float32)
CASES = {
  "points": {"points": POINTS, "labels": np.array([[[1, 0, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 0]]])},
  "padded points": {
    "points": POINTS, "labels": np.array([[[1, -10, -10], [1, 1, -10]], [[0, 1, 1], [1, -1, 0]]]),
  },
  "boxes": {"boxes": BOXES},
  "points and boxes": {
    "points": POINTS, "labels": np.array([[[1, 0, -10], [1, 1, 1]], [[0, 1, 1], [1, 1, 0]]]), "boxes": BOXES,
  },
  "nothing": {"prompts": 1},
  "mask": {"masks": MASKS, "prompts": 1},
  "mask and points": {
    "masks": MASKS, "points": POINTS[:, :1], "labels": np.ones((2, 1, 3), int), "prompts": 1,
  },
}  # fmt: skip


@pytest.mark.parametrize("multimask", [True, False], ids=["multimask", "single"])
@pytest.mark.parametrize("name", CASES)
def test_as_transformers(pair, name, multimask):
  torch = import_torch_reference().torch
  reference, ours = pair
  case = CASES[name]
  asked = {
    "input_points": case.get("points"), "input_labels": case.get("labels"), "input_boxes": case.get("boxes"),
    "input_masks": None if "masks" not in case else case["masks"][:, None],
  }  # fmt: skip
  as_torch = {
    k: torch.as_tensor(v, dtype=torch.long if k == "input_labels" else torch.float32)
    for k, v in asked.items()
    if v is not None
  }
  with torch.inference_mode():
    want = reference(torch.as_tensor(PIXELS.transpose(0, 3, 1, 2)), **as_torch, multimask_output=multimask)
  got = ours(name)[multimask]
  for field, tolerance in (("pred_masks", 5e-4), ("iou_scores", 1e-5), ("object_score_logits", 1e-4)):
    theirs = getattr(want, field).numpy()
    theirs = theirs.reshape(-1, *theirs.shape[2:])
    difference = np.abs(np.asarray(getattr(got, field)) - theirs).max()
    assert difference <= tolerance, f"{field}: {difference:.2e}, values to {np.abs(theirs).max():.3g}"


def test_every_home_holds_the_same_tracker(directories):
  whole, weights = tracker_from_pretrained(directories / "video")
  for name in ("saved", "interactive", "image"):
    tracker, own = tracker_from_pretrained(directories / name)
    assert (tracker.config.memory is None) == (name == "image")
    expected = {k: weights["params"][k] for k in own["params"]}
    jax.tree.map(np.testing.assert_array_equal, own["params"], expected)
    assert tracker.config.replace(memory=whole.config.memory) == whole.config
  assert set(own["params"]) == {"neck", "prompt_encoder", "mask_decoder", "no_memory_embedding"}


def test_written_for_transformers_it_loads_there_whole(directories, tmp_path):
  ref = import_torch_reference()
  model, variables = from_pretrained(directories / "video")
  tracker = tracker_from_pretrained(directories / "video")
  save_pretrained(tmp_path / "out", model, variables, format="transformers", tracker=tracker)
  before = ref.transformers.Sam3VideoModel.from_pretrained(directories / "video").state_dict()
  for kind in ("Sam3VideoModel", "Sam3TrackerModel", "Sam3TrackerVideoModel"):
    cls = getattr(ref.transformers, kind)
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], kind
    if kind == "Sam3VideoModel":
      after = loaded.state_dict()
      assert after.keys() == before.keys()
      changed = [k for k in after if "num_batches" not in k and not ref.torch.equal(after[k], before[k])]
      # Its class row, which nothing reads, and what transformers itself fills in are not ours to keep.
      assert not changed, changed


def test_gradients_as_transformers(pair, directories):
  """Of every leaf that the image head reads, through the layout's own tables."""
  torch = import_torch_reference().torch
  reference, _ = pair
  tracker, weights = tracker_from_pretrained(directories / "image", profile="transformers")
  rng = np.random.default_rng(2)
  trunk = rng.normal(size=(2, 8, 8, 64)).astype(np.float32)
  case = CASES["mask and points"]
  pull = {"pred_masks": (2, 3, 32, 32), "iou_scores": (2, 3), "object_score_logits": (2, 1)}
  pull = {name: rng.normal(size=shape).astype(np.float32) for name, shape in pull.items()}

  rows, clicks = _clicks(**case)
  clicks = jax.tree.map(lambda x: x[:rows], clicks)
  reference.zero_grad()
  maps = reference.vision_encoder.neck(torch.as_tensor(trunk.transpose(0, 3, 1, 2)))[0]
  embeddings = [reference.mask_decoder.conv_s0(maps[0]), reference.mask_decoder.conv_s1(maps[1]), maps[2]]
  out = reference(
    image_embeddings=embeddings,
    input_points=torch.as_tensor(case["points"], dtype=torch.float32),
    input_labels=torch.as_tensor(case["labels"]),
    input_masks=torch.as_tensor(case["masks"][:, None]),
  )
  sum((getattr(out, name)[:, 0] * torch.as_tensor(w)).sum() for name, w in pull.items()).backward()
  grads = {}
  for name, p in reference.named_parameters():
    if "backbone" not in name:
      key = f"tracker_model.{name}".replace("tracker_model.vision_encoder.neck", "tracker_neck")
      grads[key] = np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
  matrix = "tracker_model.prompt_encoder.shared_embedding.positional_embedding"
  grads[matrix] = np.zeros((2, WIDTH // 2), np.float32)  # drawn once, never trained
  leaves = engine.flatten(weights)
  want = engine.load_tensors(tables.tracker_layout("transformers"), grads, leaves)

  @jax.jit
  @jax.grad
  def ours(weights):
    features = tracker.apply(weights, trunk, method="get_image_features")
    output = tracker.apply(weights, features, clicks)
    return sum(jnp.vdot(getattr(output, name), w) for name, w in pull.items())

  got = engine.flatten(ours(weights))
  largest = {leaf: float(np.abs(expected).max()) for leaf, expected in want.items()}
  apart = {leaf: float(np.abs(np.asarray(got[leaf]) - expected).max()) for leaf, expected in want.items()}
  # Sums of thousands of terms in another order: of the leaf's own scale, or near zero of all leaves'.
  floor = 1e-6 * max(largest.values())
  wrong = {leaf: (d, largest[leaf]) for leaf, d in apart.items() if d > 2e-4 * largest[leaf] + floor}
  assert not wrong, wrong
  assert sum(value > 1e-3 for value in largest.values()) > 140  # not what one-mask outputs and padding read


# ---------------------------------------------------------------- clips

CLIP = (
  np.random.default_rng(3).integers(0, 256, (14, SIZE // 7, SIZE // 7, 3), np.uint8).repeat(7, 1).repeat(7, 2)
)


@pytest.fixture(scope="module")
def clip(directories):
  """(transformers' tracker of clips with a session of ours to run beside, our predictor and its state)."""
  ref = import_torch_reference()
  reference = ref.transformers.Sam3TrackerVideoModel.from_pretrained(directories / "video").eval()
  model, variables = from_pretrained(directories / "video")
  tracker, weights = tracker_from_pretrained(directories / "video", profile="transformers")

  @jax.jit
  def features(pixels):
    trunk = model.apply(variables, (pixels / 255.0 - 0.5) / 0.5, method="trunk_map")
    return tracker.apply(weights, trunk, method="get_image_features")

  engine = StubEngine(tracker, weights, SIZE, lambda pixels: features(np.stack(pixels).astype(np.float32)))
  return reference, Watched(engine)


class Both:
  """The same session in both, compared at every step. Each frame's memory is then the reference's, see
  `taken_over`.
  """

  def __init__(self, clip):
    torch = import_torch_reference().torch
    self.torch, (self.reference, self.video) = torch, clip
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
      Sam3TrackerVideoInferenceSession,
    )

    frames = torch.as_tensor((CLIP.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    self.session = Sam3TrackerVideoInferenceSession(
      video=frames, video_height=SIZE, video_width=SIZE, dtype=torch.float32
    )
    self.state = self.video.init_state(CLIP)

  def compare(self, frame, records, theirs):
    for row, (i, record) in enumerate(records.items()):
      want = theirs.pred_masks[row].numpy().reshape(record.logits.shape)
      difference = np.abs(record.logits - want).max()
      assert difference <= 1e-4, f"frame {frame}, object {i}: {difference:.1e} of {np.abs(want).max():.3g}"
      assert abs(record.score - float(theirs.object_score_logits[row])) < 1e-4

  def prompt(self, frame, i, points=None, labels=None, mask=None):
    torch, session = self.torch, self.session
    index = session.obj_id_to_idx(i)
    if mask is None:
      given = torch.as_tensor(np.array(points, np.float32)), torch.as_tensor(np.array(labels))
      given = {"point_coords": given[0][None, None], "point_labels": given[1][None, None]}
      session.add_point_inputs(index, frame, given)
      self.video.add_new_points_or_box(self.state, frame, i, points, labels)
    else:
      large = torch.nn.functional.interpolate(
        torch.as_tensor(mask)[None, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True
      )
      session.add_mask_inputs(index, frame, (large >= 0.5).float())
      self.video.add_new_mask(self.state, frame, i, mask)
    session.obj_with_new_inputs = [i]
    with torch.inference_mode():
      theirs = self.reference(session, frame_idx=frame)
    if mask is None:
      row = list(self.state.objects).index(i)
      theirs = type(
        "Row", (), {k: getattr(theirs, k)[row : row + 1] for k in ("pred_masks", "object_score_logits")}
      )
      self.compare(frame, {i: self.state.objects[i].pending[frame]}, theirs)

  def propagate(self, start, count, reverse=False):
    with self.torch.inference_mode():
      theirs = list(self.reference.propagate_in_video_iterator(self.session, start, count, reverse))
    coming = {output.frame_idx for output in theirs}
    self.video._settle(self.state)  # makes the memory of prompts, which the first frame already reads
    for i, thing in self.state.objects.items():
      for frame, record in thing.records.items():
        if record.cond or frame not in coming:
          take_over_record(record, frame, self.memory(i, frame, record))
    ours = self.video.propagate_in_video(self.state, start, count, reverse)
    for output, (t, ids, _) in zip(theirs, ours, strict=True):
      assert t == output.frame_idx
      records = {i: self.state.objects[i].records[t] for i in ids}
      self.compare(t, records, output)
      for i, record in records.items():
        take_over(self.video, record, self.video.tracks.slots[i], t, self.memory(i, t, record))

  def memory(self, i, frame, record):
    """The reference's, (map [T, C], pointer [D])."""
    kinds = self.session.output_dict_per_obj[self.session.obj_id_to_idx(i)].values()
    (kept,) = (kind[frame] for kind in kinds if frame in kind)
    map_, pointer = kept["maskmem_features"][:, 0].float(), kept["object_pointer"]
    return map_.numpy().reshape(record.memory.shape), pointer.numpy().reshape(record.pointer.shape)


def test_a_clip_as_transformers(clip):
  both = Both(clip)
  both.prompt(1, 5, [[30, 40]], [1])
  both.propagate(1, 5)
  both.prompt(4, 5, [[70, 70], [20, 90]], [1, 0])  # with memory; the frame stays an ordinary one
  both.propagate(5, 4)


def test_a_mask_and_more_prompts_than_are_read_as_transformers(clip):
  both = Both(clip)
  mask = np.zeros((SIZE, SIZE), np.float32)
  mask[20:63, 30:81] = 1
  both.prompt(0, 1, mask=mask)
  for t in (2, 3, 5, 6):
    both.prompt(t, 1, [[10 * t, 90 - 5 * t]], [1])
  both.propagate(0, 9)
