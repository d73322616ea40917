"""What a notebook or a window shows of results."""

from __future__ import annotations

import base64
import html as escaping
import io
import sys
from typing import TYPE_CHECKING

from PIL import Image

from sam3lt_jax.processing.images import load_image

if TYPE_CHECKING:
  from sam3lt_jax.processing.results import Results

_SIDE = 480  # pixels of the thumbnail
_ROWS = 10


def show(picture: Image.Image) -> None:
  """In the notebook that this runs in, or else in a window."""
  ipython = sys.modules.get("IPython")
  shell = ipython.get_ipython() if ipython else None
  if hasattr(shell, "kernel"):  # a terminal's shell has none
    ipython.display.display(picture)
  else:
    picture.show()


def html(results: Results) -> str:
  """A thumbnail where the image is remembered and still there, and a table of the first instances."""
  from sam3lt_jax.processing.render import instance_colors

  height, width = results.size
  count = f"{len(results)} instance{'' if len(results) == 1 else 's'}"
  colors = instance_colors(results.labels, ids=results.ids)
  rows = []
  for i in range(min(len(results), _ROWS)):
    swatch = f'<span style="color: rgb{colors[i]}">&#9632;</span>'
    name = escaping.escape(results.labels[i]) + ("" if results.ids is None else f" #{results.ids[i]}")
    box = ", ".join(f"{v:.0f}" for v in results.boxes[i])
    cells = (i, f"{swatch} {name}", f"{results.scores[i]:.2f}", box)
    rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
  if len(results) > _ROWS:
    rows.append(f'<tr><td colspan="4">... {len(results) - _ROWS} more</td></tr>')
  head = "<tr><th></th><th>label</th><th>score</th><th>x1, y1, x2, y2</th></tr>" if rows else ""
  table = f"<p>{count} in {width} x {height} pixels</p><table>{head}{''.join(rows)}</table>"
  return f"<div>{_thumbnail(results)}{table}</div>"


def _thumbnail(results: Results) -> str:
  if results.image is None:
    return ""
  try:
    picture = Image.fromarray(load_image(results.image))
    picture = results.render(picture, scale=min(1.0, _SIDE / max(picture.size)))
  except (OSError, ValueError):  # moved, changed: a display is no place to fail
    return ""
  return f'<img src="{data_url(picture)}" alt="the image with what was found">'


def data_url(picture: Image.Image) -> str:
  """The picture itself as an address, a JPEG: no file is left on the disk."""
  data = io.BytesIO()
  picture.save(data, "JPEG", quality=90, subsampling=0)
  return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
