"""The page of `sam3lt app`: gradio widgets, each wired to a method of `session.Session`.

gradio has no tool for boxes, so the picture is an `<img>` with the listeners of picture.js.
"""

from __future__ import annotations

import functools
import html
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import save_file_to_cache

from sam3lt_jax.app.session import Session
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing.show import data_url

NO_TRACKER = (
  "Clicks that outline an object need SAM 3's tracker, which is not loaded: start the page with a full model"
  " and the tracker, as in <code>sam3lt app --model s0 --tracker facebook/sam3</code>."
)
# What a click or a drag on the picture means: value, name, whether it needs the tracker.
_ON, _OFF, _AROUND, _LIKE, _UNLIKE, _PICK = "on", "off", "around", "like", "unlike", "pick"
_TOOLS = (
  (_ON, "Click on an object", True),
  (_OFF, "Click on what is not part of it", True),
  (_AROUND, "Box around one object", True),
  (_LIKE, "Box: find things like this", False),
  (_UNLIKE, "Box: not things like this", False),
  (_PICK, "Click to choose a found object", False),
)
_MOST_SESSIONS = 16  # a full-size image's features are 140 MB; the one not used for longest is forgotten
_NO_OBJECT = -1  # in the list of objects
_SAVES = {"json": "COCO JSON", "masks": "Masks PNG", "overlay": "Overlay PNG"}

_HERE = pathlib.Path(__file__).parent
_PICTURE = """
<div class="stage ${tool}" ${value ? '' : 'hidden'}>
  <img alt="the photo with what was found" draggable="false" src="${value || ''}">
  <div class="band" hidden></div>
</div>"""
_DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""
_CSS = """
.gradio-container { max-width: 1320px !important; }
#title h1 { margin: 0; font-size: 1.2rem; }
#hint { padding: 4px; min-height: 3.9em; border-radius: 6px; background: var(--background-fill-secondary); }
#hint p { margin: 0; }
#no-tracker { padding: 0 4px; font-size: 0.9em; }
#picture, #picture > * { padding: 0 !important; }
#picture:has([hidden].stage) { display: none; }
"""


class Page:
  """The widgets of the page, and what each does to the session of who looks at it.

  Attributes:
    blocks: what gradio serves.
  """

  def __init__(self, predictor: Predictor, model: str, example: tuple[str, np.ndarray] | None = None):
    """Args:
    predictor: shared by all sessions.
    model: its name, to be read.
    example: name and uint8 [H, W, 3] of an image that the model knows something about.
    """
    self._example = example
    self._answers = itertools.count(1)
    self._clicks = predictor.engine.tracker is not None
    self._tools = [(name, tool) for tool, name, tracker in _TOOLS if self._clicks or not tracker]
    with gr.Blocks(
      title=f"sam3lt · {model}", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as self.blocks:
      self._session = gr.State(Session(predictor))  # gradio copies it for each visitor
      self._lay_out(model, predictor.processor.profile.score_threshold)
      self._wire()

  def _lay_out(self, model: str, threshold: float) -> None:
    gr.Markdown(f"# sam3lt · {html.escape(model)}", elem_id="title")
    with gr.Row():
      with gr.Column(scale=7, min_width=320):
        self._hint = gr.HTML(elem_id="hint")
        self._drop = gr.File(label="Photo", file_types=["image"], height=300, elem_id="drop")
        self._try = gr.Button("Or try it on a drawn scene", size="sm", elem_id="example")
        self._picture = gr.HTML(
          html_template=_PICTURE,
          css_template=(_HERE / "picture.css").read_text(encoding="utf-8"),
          js_on_load=(_HERE / "picture.js").read_text(encoding="utf-8"),
          tool=self._tools[0][1],
          answer=0,
          elem_id="picture",
        )
        with gr.Row():
          self._undo, self._clear, self._remove = (
            gr.Button(name, size="sm", min_width=80, elem_id=name.lower())
            for name in ("Undo", "Clear", "Remove")
          )
      with gr.Column(scale=3, min_width=320):
        self._phrases = gr.Textbox(
          label="Find all", placeholder="phrases, separated by commas", submit_btn="Find", elem_id="phrases"
        )
        self._threshold = gr.Slider(
          0, 1, threshold, step=0.01, label="with a score above", elem_id="threshold"
        )
        self._tool = gr.Radio(self._tools, value=self._tools[0][1], label="On the photo", elem_id="tool")
        gr.HTML(NO_TRACKER, visible=not self._clicks, elem_id="no-tracker")
        name = "Object that clicks change" if self._clicks else "Chosen object"
        self._objects = gr.Dropdown([], label=name, filterable=False, elem_id="objects")
        with gr.Row():
          self._saves = {
            kind: gr.Button(name, size="sm", min_width=80, elem_id=f"save-{kind}")
            for kind, name in _SAVES.items()
          }
        self._saved = gr.File(visible=False)
        with gr.Row(elem_id="another"):
          self._another = gr.UploadButton("Another photo", file_types=["image"], size="sm")

  def _wire(self) -> None:
    for files in (self._drop, self._another):
      self._on(files.upload, _open, files, self._phrases)
    self._on(self._try.click, self._open_example, self._phrases)
    self._on(self._phrases.submit, _find, self._phrases)
    self._on(self._threshold.release, _set_threshold, self._threshold)
    self._on(self._tool.input, lambda session, tool: None)
    self._on(self._objects.input, lambda session, tool, index: session.choose(index), self._objects)
    self._on(self._undo.click, lambda session, tool: session.undo())
    self._on(self._clear.click, lambda session, tool: session.clear())
    self._on(self._remove.click, lambda session, tool: session.remove())
    self._on(self.blocks.load, lambda session, tool: None)

    def pointed(session: Session, tool: str, event: gr.EventData) -> list[Any]:
      return self._do(_point, session, tool, event._data)

    for pointing in (self._picture.click, self._picture.select):
      self._answer(pointing, pointed)
    for kind, button in self._saves.items():
      save = functools.partial(self._save, kind)
      saved = button.click(save, self._session, self._saved, show_progress="hidden", api_visibility="private")
      saved.then(None, self._saved, None, js=_DOWNLOAD)

  def _open_example(self, session: Session, tool: str, text: str) -> str | None:
    name, pixels = self._example
    session.open(pixels, name)
    return _find(session, tool, text) if text.strip() else None

  def _save(self, kind: str, session: Session) -> str:
    with tempfile.TemporaryDirectory() as folder:
      # A copy where gradio looks for old files to delete.
      return save_file_to_cache(session.save(kind, folder), self._saved.GRADIO_CACHE)

  def _on(self, event: Any, do: Callable[..., str | None], *inputs: Any) -> None:
    """`do(session, tool, *values)` at an event of a widget; it may return what to say."""
    self._answer(event, functools.partial(self._do, do), *inputs)

  def _answer(self, event: Any, handler: Callable[..., list[Any]], *inputs: Any) -> None:
    event(
      handler,
      [self._session, self._tool, *inputs],
      self._shown,
      show_progress="minimal",
      show_progress_on=self._hint,
      trigger_mode="multiple",  # clicks may come faster than answers; all count, one after the other
      concurrency_id="model",
      concurrency_limit=1,
      api_visibility="private",
    )

  def _do(self, do: Callable[..., str | None], session: Session, tool: str, *values: Any) -> list[Any]:
    """A user's mistake is said in the page, and nothing changes."""
    try:
      said = do(session, tool, *values)
    except (ValueError, MemoryError) as e:
      said = f"{str(e)[:1].upper()}{str(e)[1:]}".rstrip(".") + "."
    return self._show(session, tool, said)

  @property
  def _shown(self) -> list[Any]:
    """The widgets in which a session's state is seen."""
    buttons = self._undo, self._clear, self._remove, *self._saves.values()
    return [self._drop, self._try, self._picture, self._hint, self._objects, *buttons]

  def _show(self, session: Session, tool: str, said: str | None) -> list[Any]:
    """Updates of `_shown`; `said` comes before what to do next."""
    opened, (things, current) = session.photo is not None, (session.state.things, session.state.current)
    choices = [("a new one" if self._clicks else "none", _NO_OBJECT)]
    choices += [
      (f"{i + 1}: {thing.found.labels[0]} {thing.found.scores[0]:.2f}", i) for i, thing in enumerate(things)
    ]
    return [
      gr.update(visible=not opened, value=None),
      gr.update(visible=not opened and self._example is not None),
      gr.update(value=data_url(session.picture()) if opened else None, tool=tool, answer=next(self._answers)),
      _line(said, _next(session, tool)),
      gr.update(choices=choices, value=_NO_OBJECT if current is None else current),
      gr.update(interactive=session.can_undo),
      gr.update(interactive=bool(things or session.state.examples)),
      gr.update(interactive=current is not None),
      *[gr.update(interactive=bool(things)) for _ in self._saves],
    ]


def launch(blocks: gr.Blocks, host: str, port: int) -> str:
  """Serves a page in threads and returns its address. Nothing is fetched from another machine or told to it.

  Raises:
    OSError: the port is in use.
  """
  _, address, _ = blocks.launch(
    server_name=host,
    server_port=port,
    prevent_thread_lock=True,
    quiet=True,
    share=False,
    ssr_mode=False,
    footer_links=[],
    theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    css=_CSS,
    max_file_size="200mb",
    state_session_capacity=_MOST_SESSIONS,
  )
  return address


# -------------------------------------------------------------------- what widgets do: (session, tool, value)


def _open(session: Session, tool: str, path: str | None, text: str) -> str | None:
  """A photo, and at once what was asked for by then."""
  if path is None:
    return None
  name = os.path.basename(path)
  with open(path, "rb") as f:
    data = f.read()
  try:
    session.open(data, name)
  except ValueError as e:
    raise ValueError(f"the file {name} cannot be opened: {e}") from e
  return _find(session, tool, text) if text.strip() else None


def _find(session: Session, tool: str, text: str) -> str:
  session.find(text.replace("\n", ",").split(","))
  return _found(session)


def _set_threshold(session: Session, tool: str, threshold: float) -> str | None:
  session.set_threshold(threshold)
  return _found(session) if session.photo is not None else None


def _point(session: Session, tool: str, event: dict[str, Any]) -> str | None:
  """A click or a drag on the picture, in fractions of its sides."""
  if session.photo is None:
    return None
  height, width = session.photo.shape[:2]
  if "box" in event:
    box = [fraction * side for fraction, side in zip(event["box"], (width, height) * 2)]
    if tool == _AROUND:
      session.outline(box)
      return None
    session.add_example(box, int(tool == _LIKE))
    return _found(session)
  x, y = (min(fraction * side, side - 1) for fraction, side in zip(event["at"], (width, height)))
  if tool == _PICK:
    session.choose(session.at(x, y))
  else:
    session.click(x, y, int(tool == _ON and not event["right"]))
  return None


# -------------------------------------------------------------------- what is shown


def _found(session: Session) -> str:
  count = sum(not thing.by_hand for thing in session.state.things)
  if count:
    return f"{count} found."
  if not session.state.phrases and not any(label for _, label in session.state.examples):
    return "Nothing is asked for yet: type a phrase, or draw a box around an example."
  return f"Nothing found with a score above {session.threshold:g}: try other words or a lower score."


def _next(session: Session, tool: str) -> str:
  """What the next click or drag will do."""
  if session.photo is None:
    return "Drop a photo to begin."
  if tool in (_AROUND, _LIKE, _UNLIKE):
    return {
      _AROUND: "Drag a box around one object: it alone is outlined.",
      _LIKE: "Drag a box around an example: everything like it is found.",
      _UNLIKE: "Drag a box around something that should not be found.",
    }[tool]
  if session.state.current is None:
    return {
      _ON: "Click on an object: it is outlined.",
      _OFF: "Choose an object first, then click on what is not part of it.",
      _PICK: "Click on a found object to choose it.",
    }[tool]
  chosen = f"object {session.state.current + 1}"
  return {
    _ON: f"Click on what else belongs to {chosen}, right-click on what does not.",
    _OFF: f"Click on what does not belong to {chosen}.",
    _PICK: f"You chose {chosen}.",
  }[tool]


def _line(*parts: str | None) -> str:
  return f'<p role="status">{" ".join(html.escape(part) for part in parts if part)}</p>'
