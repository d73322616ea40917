"""Sam3LiteText: sizes, shapes, the ways to call it, and its resolutions."""

import dataclasses
import functools
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import Sam3LiteText, Sam3LiteTextConfig, TextFeatures, VisionFeatures
from sam3lt_jax.checkpoints.engine import unflatten
from sam3lt_jax.checkpoints.pretrained import abstract_leaves
from sam3lt_jax.config import PADDING_LABEL, TextConfig
from sam3lt_jax.ops import target
from tests import tiny

# Two compilations of one function differ in the order of sums: 1e-6 of values of order 1 to 10.
ATOL = 2e-5


def outputs(out):
  return {name: np.asarray(getattr(out, name)) for name in tiny.OUTPUTS}


def assert_same(a, b, atol=ATOL):
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def model():
  return tiny.load(tiny.config())[0]


@pytest.fixture(scope="module")
def variables():
  return tiny.load(tiny.config())[1]


@pytest.fixture(scope="module")
def encode(model, variables):
  """Pixels to `VisionFeatures`, compiled once a shape."""
  run = tiny.jit(lambda v, pixels: model.apply(v, pixels, method="get_vision_features"))
  return lambda pixels: run(variables, pixels)


@pytest.fixture(scope="module")
def read(model, variables):
  """ids, mask to `TextFeatures`."""
  run = tiny.jit(lambda v, *args: model.apply(v, *args, method="get_text_features"))
  return lambda *args: run(variables, *args)


@pytest.fixture(scope="module")
def detect(model, variables):
  """Features of both kinds and the rest of `__call__`'s arguments to its output."""
  run = tiny.jit(lambda v, vision, text, **kw: model.apply(v, vision_embeds=vision, text_embeds=text, **kw))
  return lambda vision, text, **kw: run(variables, vision, text, **kw)


@pytest.fixture(scope="module")
def whole(model, variables):
  """One full call from pixels and ids, with intermediates: 2 images, a phrase and 2 boxes each."""
  inputs = tiny.inputs()
  run = tiny.jit(lambda v, inputs: model.apply(v, **inputs, output_intermediates=True))
  return inputs, run(variables, inputs)


def row(tree, i):
  """Row i of every array of a struct, as a batch of one."""
  return jax.tree.map(lambda x: x[i : i + 1], tree)


# Sizes


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def abstract():
  """Variables of S0 at full size as shapes."""
  return unflatten(abstract_leaves(Sam3LiteText(Sam3LiteTextConfig.s0())))  # kept for other files, too


def test_parameter_counts(abstract):
  params = abstract["params"]
  assert count(params["text_encoder"]) + count(params["text_projection"]) == 42_541_312
  assert count(params["vision_encoder"]) == 454_038_784
  assert set(params) == {
    "vision_encoder", "text_encoder", "text_projection", "geometry_encoder", "detr_encoder", "detr_decoder",
    "dot_product_scoring", "mask_decoder",
  }  # fmt: skip


@pytest.mark.full  # 3 s
@pytest.mark.parametrize(
  "name, expected", [("s0", 42_541_312), ("s1", 63_528_192), ("l", 123_800_320), ("sam3", 353_724_672)]
)
def test_text_parameter_counts(name, expected):
  """The text side alone; the vision side of every variant is the same (see test_config)."""
  model = Sam3LiteText(getattr(Sam3LiteTextConfig, name)())
  init = functools.partial(model.init, method="get_text_features")
  variables = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))
  assert set(variables["params"]) == {"text_encoder", "text_projection"}
  assert count(variables["params"]) == expected
  assert ("batch_stats" in variables) == (name == "s0")


def test_full_size_shapes(abstract):
  model = Sam3LiteText(Sam3LiteTextConfig.s0())
  shape = jax.ShapeDtypeStruct
  out = jax.eval_shape(
    lambda v, pixels, ids, boxes: model.apply(v, pixels, ids, input_boxes=boxes, output_intermediates=True),
    abstract,
    shape((1, 1008, 1008, 3), jnp.float32),
    shape((1, 16), jnp.int32),
    shape((1, 2, 4), jnp.float32),
  )
  shapes = {name: getattr(out, name).shape for name in tiny.OUTPUTS}
  assert shapes == {
    "pred_masks": (1, 200, 288, 288),
    "pred_boxes": (1, 200, 4),
    "pred_logits": (1, 200),
    "presence_logits": (1, 1),
    "semantic_seg": (1, 1, 288, 288),
  }
  assert {getattr(out, name).dtype for name in tiny.OUTPUTS} == {jnp.dtype("float32")}
  taps = {name: value.shape for name, value in out.intermediates.items()}
  assert [taps[f"neck_{i}"] for i in range(4)] == [(1, n, n, 256) for n in (288, 144, 72, 36)]
  assert taps["vit_block_31"] == (1, 72, 72, 1024)
  assert taps["prompt_tokens"] == (1, 16 + 2 + 1, 256)
  assert taps["encoder_output"] == (1, 5184, 256)
  assert taps["decoder_boxes"] == (6, 1, 200, 4)


def test_full_size_features(abstract):
  model = Sam3LiteText(Sam3LiteTextConfig.s0(), dtype=jnp.bfloat16)
  shape = jax.ShapeDtypeStruct
  text = jax.eval_shape(
    lambda v, ids: model.apply(v, ids, method="get_text_features"), abstract, shape((3, 16), jnp.int32)
  )
  assert (text.last_hidden_state.shape, text.pooler_output.shape) == ((3, 16, 512), (3, 16, 256))
  assert (text.pooler_output.dtype, text.attention_mask.dtype) == (jnp.bfloat16, jnp.bool_)
  vision = jax.eval_shape(
    lambda v, pixels: model.apply(v, pixels, method="get_vision_features"),
    abstract,
    shape((2, 1008, 1008, 3), jnp.float32),
  )
  maps = (*vision.convolved, vision.image, vision.mixed)
  assert [m.shape for m in maps] == [(2, n, n, 256) for n in (288, 144, 72, 72)]


def test_param_dtype_is_what_is_stored():
  bf16 = jax.eval_shape(
    Sam3LiteText(tiny.config(), param_dtype=jnp.bfloat16).init_variables, jax.random.key(0)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(bf16["params"])} == {jnp.dtype("bfloat16")}
  assert {leaf.dtype for leaf in jax.tree.leaves(bf16["batch_stats"])} == {jnp.dtype("float32")}


# The ways to call it


def test_features_in_place_of_pixels_and_ids(whole, encode, read, detect):
  inputs, out = whole
  vision, text = encode(inputs["pixel_values"]), read(inputs["input_ids"], inputs["attention_mask"])
  assert isinstance(vision, VisionFeatures) and isinstance(text, TextFeatures)
  boxes = {k: inputs[k] for k in ("input_boxes", "input_boxes_labels")}
  by_parts = detect(vision, text, **boxes)
  assert_same(by_parts, out)


def test_projected_tokens_with_their_mask_are_text_features(whole, model, variables):
  """The same program, so nothing has to run."""
  inputs, _ = whole
  tokens, mask = jnp.zeros((2, 6, 16)), jnp.ones((2, 6), bool)

  def program(text):
    return str(
      jax.make_jaxpr(
        lambda tokens, mask: model.apply(variables, inputs["pixel_values"], **text(tokens, mask)),
      )(tokens, mask)
    )

  struct = program(lambda tokens, mask: {"text_embeds": TextFeatures(tokens, tokens, mask)})
  assert program(lambda tokens, mask: {"text_embeds": tokens, "attention_mask": mask}) == struct


@pytest.mark.full  # 3 s
def test_image_index_equals_separate_calls(encode, read, detect):
  """Three prompts over two images in one call, against a call each with that image's features alone."""
  vision, text = encode(tiny.pixels(2)), read(*tiny.phrases(3))
  index = np.array([1, 0, 1], np.int32)
  boxes = np.random.default_rng(0).uniform(0.2, 0.6, (3, 1, 4)).astype(np.float32)
  together = detect(vision, text, image_index=index, input_boxes=boxes)
  assert together.pred_masks.shape == (3, tiny.QUERIES, 24, 24)
  for p, image in enumerate(index):
    alone = detect(row(vision, image), row(text, p), input_boxes=boxes[p : p + 1])
    for name in tiny.OUTPUTS:
      np.testing.assert_allclose(getattr(together, name)[p], getattr(alone, name)[0], atol=ATOL, err_msg=name)
  other = detect(vision, text, image_index=np.array([0, 0, 0], np.int32), input_boxes=boxes)
  assert np.abs(other.pred_masks[0] - together.pred_masks[0]).max() > 0.01
  np.testing.assert_allclose(other.pred_masks[1], together.pred_masks[1], atol=ATOL)


@pytest.mark.full  # four programs; the test above and test_properties say it of image_index
def test_one_image_serves_all_prompts_and_one_prompt_all_images(encode, read, detect):
  vision, text = encode(tiny.pixels(2)), read(*tiny.phrases(3))
  one_image, one_prompt = detect(row(vision, 0), text), detect(vision, row(text, 0))
  by_index = functools.partial(detect, vision, text)
  assert_same(one_image, by_index(image_index=np.zeros(3, np.int32)))
  both = by_index(image_index=np.array([0, 1, 1], np.int32))
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(getattr(one_prompt, name)[0], getattr(both, name)[0], atol=ATOL)
  assert_same(row(one_prompt, 1), detect(row(vision, 1), row(text, 0)))
  assert one_image.pred_logits.shape[0] == 3
  assert one_prompt.pred_logits.shape[0] == 2


@pytest.mark.full  # 3 s
def test_what_is_shared_by_prompts_is_what_each_would_compute(model, variables, encode):
  """Text, boxes and both: the fusion encoder's first self-attention once an image, and once a prompt."""
  vision = encode(tiny.pixels(2))
  assert vision.mixed is not None
  ids, mask = tiny.phrases(3)
  boxes = np.full((3, 1, 4), 0.5, np.float32)
  labels = np.array([[1], [0], [PADDING_LABEL]], np.int32)
  kwargs = {"input_boxes": boxes, "input_boxes_labels": labels, "image_index": np.array([1, 0, 1], np.int32)}

  def run(features, **kwargs):
    return model.apply(variables, None, ids, mask, vision_embeds=features, **kwargs)

  rest = {k: v for k, v in kwargs.items() if k != "image_index"}
  by_prompt = jax.tree.map(lambda x: x[kwargs["image_index"]], vision.replace(mixed=None))
  wanted = tiny.jit(lambda v: run(v, **rest))(by_prompt)
  assert_same(tiny.jit(lambda v: run(v, **kwargs))(vision), wanted, 1e-4)


def test_a_phrase_alone_gets_the_token_of_its_image(encode, read, detect):
  """Kept with the image, computed for the prompt, or computed beside an empty slot."""
  vision, text = encode(tiny.pixels(1)), read(*tiny.phrases(2))
  assert vision.without_boxes.shape == (1, 1, vision.image.shape[-1])
  wanted = detect(vision.replace(without_boxes=None), text)
  assert_same(detect(vision, text), wanted)
  empty = np.zeros((2, 1, 4), np.float32), np.full((2, 1), PADDING_LABEL, np.int32)
  assert_same(detect(vision, text, input_boxes=empty[0], input_boxes_labels=empty[1]), wanted)


def test_rows_that_fill_an_accelerators_products_change_nothing(model, variables, encode, read, detect):
  """7 rows of the decoder as 8, and 9 prompt tokens as 16."""
  vision, text = encode(tiny.pixels(2)), read(*tiny.phrases(2, tokens=8))
  with target.traced_for(["cuda"]):
    padded = tiny.jit(lambda *args: model.apply(variables, vision_embeds=args[0], text_embeds=args[1]))
    program = padded.lower(vision, text)
  assert "tensor<2x8x16xf32>" in program.as_text() and "tensor<2x16x16xf32>" in program.as_text()
  assert_same(program.compile()(vision, text), detect(vision, text))


def test_intermediates(whole, model):
  inputs, out = whole
  P, T, D, W, S, Q, h = 2, inputs["input_ids"].shape[1], 16, 32, 36, tiny.QUERIES, 6
  L = T + 2 + 1
  shapes = {name: value.shape for name, value in out.intermediates.items()}
  assert shapes == {
    **{f"vit_block_{i}": (2, h, h, W) for i in range(2)},
    **{f"neck_{i}": (2, n, n, D) for i, n in enumerate((24, 12, 6, 3))},
    "text_embeddings": (P, T, 32),
    **{f"text_block_{i}": (P, T, 32) for i in range(3)},
    "text_features": (P, T, D),
    "prompt_tokens": (P, L, D),
    "prompt_mask": (P, L),
    "encoder_output": (P, S, D),
    "decoder_hidden_states": (2, P, Q, D),
    "decoder_boxes": (2, P, Q, 4),
    "decoder_logits": (2, P, Q),
    "decoder_presence_logits": (2, P, 1),
    "pixel_embed": (P, 24, 24, D),
  }
  taps = out.intermediates
  # The outputs are the last layer's, and the masks' width is the decoder's.
  np.testing.assert_allclose(taps["decoder_logits"][-1], out.pred_logits, atol=1e-6)
  np.testing.assert_allclose(taps["decoder_presence_logits"][-1], out.presence_logits, atol=1e-6)
  centre, size = np.split(np.asarray(taps["decoder_boxes"][-1]), 2, axis=-1)
  corners = np.concatenate([centre - size / 2, centre + size / 2], axis=-1)
  np.testing.assert_allclose(corners, out.pred_boxes, atol=1e-6)
  labels = inputs["input_boxes_labels"] != -10
  wanted = np.concatenate([inputs["attention_mask"].astype(bool), labels, np.ones((2, 1), bool)], axis=1)
  np.testing.assert_array_equal(taps["prompt_mask"], wanted)


def test_no_intermediates_unless_asked(model, variables, whole):
  inputs, _ = whole
  out = jax.eval_shape(lambda v: model.apply(v, **inputs), variables)
  assert out.intermediates is None


def test_missing_optional_arguments_mean_all_of_them(whole, encode, model, variables):
  """No mask: all are tokens. No labels: all are positive."""
  inputs, _ = whole
  vision = encode(inputs["pixel_values"])

  @tiny.jit  # compiles what leads to the prompt and no further
  def prompt(v, **kwargs):
    taps = model.apply(v, vision_embeds=vision, output_intermediates=True, **kwargs).intermediates
    return taps["prompt_tokens"], taps["prompt_mask"]

  given = {k: inputs[k] for k in ("input_ids", "input_boxes")}
  ones = {"attention_mask": np.ones((2, 6), bool), "input_boxes_labels": np.ones((2, 2), np.int32)}
  for a, b in zip(prompt(variables, **given), prompt(variables, **given, **ones)):
    np.testing.assert_allclose(a, b, atol=ATOL)


def test_outputs_are_in_range(whole):
  _, out = whole
  assert np.abs(out.pred_logits).max() <= 12
  centre = np.asarray(out.pred_boxes).reshape(-1, 2, 2).mean(axis=1)
  assert centre.min() >= 0 and centre.max() <= 1
  for name, value in outputs(out).items():
    assert np.isfinite(value).all(), name
    assert value.std() > 1e-3, name


# Resolutions


@pytest.mark.full  # 3 s
@pytest.mark.parametrize("side", [28, 70, 168])
def test_other_resolutions(side, model, variables, encode):
  """A grid of 2 is smaller than a window and than the position table, 5 divides neither, 12 both."""
  grid = side // 14
  vision = encode(tiny.pixels(1, side))
  maps = (*vision.convolved, vision.image, vision.mixed)
  assert [m.shape for m in maps] == [(1, n * grid, n * grid, 16) for n in (4, 2, 1, 1)]
  assert all(np.isfinite(m).all() and m.std() > 1e-3 for m in maps)
  ids, _ = tiny.phrases(1)
  out = jax.eval_shape(
    lambda v: model.apply(v, vision_embeds=vision, input_ids=ids, input_boxes=np.full((1, 1, 4), 0.5)),
    variables,
  )
  assert out.pred_masks.shape == (1, tiny.QUERIES, 4 * grid, 4 * grid)


def test_positions_are_tiled(model, variables):
  """84 px is a grid of 6; the table of 4 starts again at row and column 4."""
  v = jax.tree.map(np.asarray, variables)
  params = v["params"]["vision_encoder"]["backbone"]["embeddings"]
  table = params["position_embeddings"].reshape(4, 4, -1)

  out = []

  def intercept(next_function, args, kwargs, context):
    result = next_function(*args, **kwargs)
    if type(context.module).__name__ == "Embeddings" and context.method_name == "__call__":
      out.append(result)
    return result

  with flax.linen.intercept_methods(intercept):

    def run(v):
      model.apply(v, jnp.zeros((1, 84, 84, 3)), method="get_vision_features")
      return out[-1]

    embedded = tiny.jit(run)(variables)
  np.testing.assert_array_equal(embedded[0], np.tile(table, (2, 2, 1))[:6, :6])


# Text encoders


def test_longer_phrases_where_positions_are_interpolated():
  config = tiny.config("transformers")
  model, variables = tiny.load(config)
  out = jax.eval_shape(lambda: model.apply(variables, np.ones((1, 40), np.int32), method="get_text_features"))
  assert out.pooler_output.shape == (1, 40, 16)


def test_text_kinds_share_one_encoder():
  """SAM 3's tower is causal: a later token cannot change an earlier one; MobileCLIP's can."""
  text = TextConfig(
    vocab_size=300, hidden_size=16, intermediate_size=16, projection_dim=16, num_attention_heads=2,
    num_hidden_layers=1,
  )  # fmt: skip
  ids = np.array([[5, 6, 7, 8], [5, 6, 7, 99]], np.int32)
  change = {}
  for kind in ("mobileclip", "clip"):
    model, variables = tiny.load(tiny.config(text=dataclasses.replace(text, kind=kind)))
    run = tiny.jit(lambda v, model=model: model.apply(v, ids, method="get_text_features").last_hidden_state)
    hidden = np.asarray(run(variables))
    change[kind] = np.abs(hidden[0] - hidden[1]).max(axis=-1)
  assert np.all(change["clip"][:3] == 0) and change["clip"][3] > 1e-3
  assert np.all(change["mobileclip"] > 1e-5)
