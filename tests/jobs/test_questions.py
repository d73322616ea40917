"""Questions: phrases for all images, or each image's own from JSON lines; bad lines by their number."""

import json

import pytest

from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.processing.prompts import Prompt


def write(tmp_path, *lines):
  path = tmp_path / "prompts"
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
  return path


def test_phrases_for_all():
  questions = Questions.of_phrases(["a dog", " red car ", "a dog"])
  assert questions.for_item("x") == questions.for_item("y") == (Prompt("a dog"), Prompt("red car"))
  assert questions.phrases == ("a dog", "red car") and not questions.per_image
  assert questions.check_items(["x", "y"]) == 0
  for bad, message in (([], "at least one phrase"), (["a", " "], "empty"), ("dog", "list"), ([1], "string")):
    with pytest.raises(ValueError, match=message):
      Questions.of_phrases(bad)


def test_text_file(tmp_path):
  path = tmp_path / "p.txt"
  path.write_bytes("\ufeffred car\r\n\n  großer Hund \nred car\n".encode())
  questions = Questions.from_file(path)
  assert questions.phrases == ("red car", "großer Hund")
  assert questions.digest == Questions.of_phrases(["red car", "großer Hund"]).digest
  path.write_bytes(b"a\nb\xff\n")
  with pytest.raises(ValueError, match=r"p\.txt, line 2: not UTF-8"):
    Questions.from_file(path)
  path.write_bytes(b"a\n\nb\0\n")
  with pytest.raises(ValueError, match=r"p\.txt, line 3: a zero byte"):
    Questions.from_file(path)
  path.write_bytes(b" \n\n")
  with pytest.raises(ValueError, match=r"p\.txt holds no phrase"):
    Questions.from_file(path)


def test_own_questions_of_each_image(tmp_path):
  path = write(
    tmp_path,
    {"id": "a/1.jpg", "text": ["cat", "dog"], "boxes": [[1, 2, 30.5, 40]]},
    "",
    {"image": "2.jpg", "boxes": [[0, 0, 5, 5], [1, 1, 2, 2]], "box_labels": [1, 0]},
    {"id": "a/1.jpg", "text": "cat"},
    {"id": 7, "text": "bird", "boxes": []},
  )
  questions = Questions.from_file(path)
  box = (1.0, 2.0, 30.5, 40.0)
  assert questions.for_item("a/1.jpg") == (
    Prompt("cat", (box,), (1,)), Prompt("dog", (box,), (1,)), Prompt("cat", (), ()),
  )  # fmt: skip
  assert questions.for_item("2.jpg") == (Prompt(None, ((0, 0, 5, 5), (1, 1, 2, 2)), (1, 0)),)
  assert questions.for_item("7") == (Prompt("bird", (), ()),)
  assert questions.for_item("other") == ()
  assert questions.phrases == ("cat", "dog", "bird") and questions.per_image


def test_check_items(tmp_path):
  questions = Questions.from_file(write(tmp_path, {"id": "1", "text": "a"}, {"id": "2", "text": "a"}))
  assert questions.check_items(["1", "2", "3"]) == 1
  with pytest.raises(ValueError, match="about 1 images that the source does not have, such as '2'"):
    questions.check_items(["1", "3"])


def test_digest(tmp_path):
  one, two = {"id": "1", "text": "a"}, {"id": "2", "text": "b"}
  first = Questions.from_file(write(tmp_path, one, two)).digest
  assert len(first) == 64
  assert first == Questions.from_file(write(tmp_path, two, json.dumps(one, indent=None))).digest
  spaced = '{ "text":"a",  "id":"1" }'
  assert first == Questions.from_file(write(tmp_path, spaced, two)).digest
  changes = [
    [one],
    [one, two, two],
    [one, two | {"text": "c"}],
    [one, two | {"boxes": [[0, 0, 1, 1]]}],
    [one | {"text": "b"}, two | {"text": "a"}],
  ]
  digests = [Questions.from_file(write(tmp_path, *lines)).digest for lines in changes]
  assert len({first, *digests}) == 1 + len(changes)
  two_lines = [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}]
  there, back = (
    Questions.from_file(write(tmp_path, *lines)).digest for lines in (two_lines, two_lines[::-1])
  )
  assert there != back  # the order of one image's questions is the order of its results
  assert Questions.of_phrases(["a", "b"]).digest != Questions.of_phrases(["b", "a"]).digest


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"id": "1", "text": "a"', "is not JSON"),
    ('"a"', "an object is expected"),
    ({"text": "a"}, '"id" .* must name an image, got None'),
    ({"id": "", "text": "a"}, '"id"'),
    ({"id": "1"}, "nothing to look for"),
    ({"id": "1", "text": []}, "text must be a phrase or a list of phrases"),
    ({"id": "1", "text": ["a", ""]}, "a phrase is empty"),
    ({"id": "1", "text": ["a", None]}, "text must be a phrase"),
    ({"id": "1", "text": 3}, "text must be"),
    ({"id": "1", "box": [[0, 0, 1, 1]]}, "unknown key 'box'; accepted: id, image, text, boxes"),
    ({"id": "1", "boxes": [[0, 0, 1, 1], [0, 0, 1]]}, "box 1 of the image must be four numbers"),
    ({"id": "1", "boxes": [[5, 0, 1, 1]]}, "is inverted"),
    ('{"id": "1", "boxes": [[0, 0, 1, Infinity]]}', "box 0 of the image"),
    ({"id": "1", "boxes": "x"}, "boxes must be"),
    ({"id": "1", "boxes": [[0, 0, 1, 1]], "box_labels": [1, 0]}, "2 labels for 1 boxes"),
    ({"id": "1", "boxes": [[0, 0, 1, 1]], "box_labels": [2]}, "box_labels must be"),
    ({"id": "1", "text": "a", "box_labels": [1]}, "box_labels were given without boxes"),
  ],
)
def test_bad_lines_are_named(tmp_path, line, message):
  path = write(tmp_path, {"id": "0", "text": "fine"}, "", line)
  with pytest.raises(ValueError, match=rf"prompts, line 3.*{message}"):
    Questions.from_file(path)
