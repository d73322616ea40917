"""A picture to segment where no photo is at hand: red circles and blue squares on grey."""

from PIL import Image, ImageDraw

RED_CIRCLES = [(30, 40, 130, 140), (200, 150, 280, 230)]  # x1, y1, x2, y2 in pixels
BLUE_SQUARES = [(170, 30, 250, 110), (50, 170, 120, 240)]


def draw() -> Image.Image:
  image = Image.new("RGB", (320, 260), (196, 196, 196))
  canvas = ImageDraw.Draw(image)
  for box in RED_CIRCLES:
    canvas.ellipse(box, fill=(206, 44, 44), outline=(90, 10, 10), width=3)
  for box in BLUE_SQUARES:
    canvas.rectangle(box, fill=(52, 84, 204), outline=(10, 20, 90), width=3)
  return image
