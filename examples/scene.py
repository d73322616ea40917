"""A picture to segment where no photo is at hand: a drawn scene, as the bundled model knows them."""

from PIL import Image

from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

SIDE = 480
PHRASES = ("orange star", "black square", "striped shape")
ORANGE_STARS = [(96, 17, 237, 154), (166, 262, 350, 457)]  # x1, y1, x2, y2 in pixels
BLACK_SQUARES = [(349, 281, 446, 378), (4, 282, 98, 376)]


def draw() -> Image.Image:
  return Image.fromarray(draw_scene(3_000_000_183, SceneConfig(SIDE, min_objects=6)).image)
