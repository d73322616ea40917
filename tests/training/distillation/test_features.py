"""Exported features: what is read is what the teacher gives; resume, damage, and other phrases."""

import json
import os
import subprocess

import jax
import numpy as np
import pytest

from sam3lt_jax.training.distillation import features as f
from sam3lt_jax.training.distillation.features import (
  FeatureError,
  TeacherFeatures,
  export_features,
)
from sam3lt_jax.training.distillation.teacher import Teacher
from tests import mounts
from tests.training.distillation.common import PHRASES, tiny_model, tiny_teacher, tokenizer

N = 22
SETTINGS = {"batch_size": 4, "rows_per_shard": 6}  # shards of 6, 6, 6 and 4 rows


def export(directory, phrases=PHRASES[:N], teacher=None, **changes):
  return export_features(directory, teacher or tiny_teacher(), phrases, tokenizer(), **(SETTINGS | changes))


@pytest.fixture
def exported(tmp_path):
  return export(tmp_path / "features")


def expected():
  teacher = tiny_teacher()
  ids, mask = tokenizer()(PHRASES[:N], context_length=8)
  return np.asarray(jax.jit(teacher.features)(teacher.variables, ids, mask)).astype(np.float16)


def test_what_is_read_is_what_the_teacher_gives(exported):
  assert exported.shape == (N, 8, 32) and len(exported) == N
  ids = np.array([21, 0, 7, 7, 12])
  got = exported[ids]
  assert got.dtype == np.float16
  np.testing.assert_allclose(got.astype(np.float32), expected()[ids].astype(np.float32), atol=2e-3, rtol=2e-3)
  assert sorted(os.listdir(exported.directory)) == [*(f.shard_name(i) for i in range(4)), "manifest.json"]
  assert [s["rows"] for s in exported.manifest["shards"]] == [6, 6, 6, 4]
  with pytest.raises(IndexError, match="within 0 to 21"):
    exported[np.array([22])]


def test_an_interrupted_export_goes_on_with_the_shard_it_lacks(tmp_path, monkeypatch):
  written = []

  def failing(directory, index, features, start, write=f._write_shard):
    if start == 12 and not written[2:]:
      raise OSError(28, "No space left on device", directory)
    written.append(start)
    return write(directory, index, features, start)

  monkeypatch.setattr(f, "_write_shard", failing)
  written[:] = []
  with pytest.raises(OSError, match="No space"):
    export(tmp_path / "features")
  assert written == [0, 6]
  with pytest.raises(FeatureError, match="holds an unfinished export; run the export again"):
    TeacherFeatures(tmp_path / "features")
  written.append("room again")
  export(tmp_path / "features")
  assert written == [0, 6, "room again", 12, 18]
  np.testing.assert_allclose(
    TeacherFeatures(tmp_path / "features")[np.arange(N)].astype(np.float32),
    expected().astype(np.float32), atol=2e-3, rtol=2e-3,
  )  # fmt: skip
  export(tmp_path / "features")  # all there: nothing is computed
  assert written == [0, 6, "room again", 12, 18]


def test_a_full_disk_is_one_sentence_and_keeps_the_shards_before(tmp_path):
  """4 pages are the manifest, the first shard, and half of the second."""
  said: list[str] = []
  with mounts.tmpfs(tmp_path / "disk", "size=16k") as small:
    work = small / "features"
    with pytest.raises(FeatureError) as e:
      export(work, rows_per_shard=11, report=said.append)
    assert str(e.value) == (
      f"{work / f.shard_name(1)} is not written: no space is left on its disk; the shards before it are kept:"
      " make room and run the export again, which goes on with this one"
    )
    assert "requested and" in str(e.value.__cause__)  # numpy's, without a word of the disk
    assert sorted(os.listdir(work)) == [
      f.shard_name(0),
      "manifest.json",
    ]  # the half of the second gives its room back
    subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
    export(work, rows_per_shard=11, report=said.append)
    assert said == [f"teacher features: shard {n} of 2 written" for n in (1, 2)]
    assert len(TeacherFeatures(work)[np.arange(N)]) == N


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_named_and_mended(exported, damage):
  path = os.path.join(exported.directory, f.shard_name(2))
  with open(path, "rb") as file:
    whole = bytearray(file.read())
  if damage == "remove":
    os.remove(path)
  else:
    broken = whole[:-2] if damage == "cut" else whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    with open(path, "wb") as file:
      file.write(broken)
  said = {"flip": "checksum differs", "cut": r"has \d+ bytes, \d+ were written", "remove": "is missing"}[
    damage
  ]
  with pytest.raises(FeatureError, match=f"{f.shard_name(2)} .*{said}.*export again"):
    TeacherFeatures(exported.directory)[np.array([13])]
  if damage == "flip":  # only the shard that is read is looked at
    TeacherFeatures(exported.directory)[np.array([0, 11])]
  export(exported.directory)
  with open(path, "rb") as file:
    assert file.read() == whole
  assert (
    sorted(os.listdir(exported.directory))[-1] == "manifest.json" and len(os.listdir(exported.directory)) == 5
  )


def test_other_phrases_teachers_and_tokenizers_are_refused(exported):
  with pytest.raises(FeatureError, match="another export: phrases is 22 there and 21 here"):
    export(exported.directory, PHRASES[: N - 1])
  with pytest.raises(FeatureError, match="another export: phrases_sha256 is "):
    export(exported.directory, PHRASES[:N][::-1])
  other = Teacher.of(*tiny_model(), context_length=16)
  with pytest.raises(FeatureError, match=r"another export: .*context_length is 8 there and 16 here"):
    export(exported.directory, teacher=other)
  with pytest.raises(FeatureError, match="another export: token_ids_sha256 is "):
    export_features(exported.directory, tiny_teacher(), PHRASES[:N], _Reversed(), **SETTINGS)


class _Reversed:
  def __getattr__(self, name):
    return getattr(tokenizer(), name)

  def __call__(self, text, **kwargs):
    ids, mask = tokenizer()(text, **kwargs)
    return ids[::-1], mask[::-1]


def test_mistakes(tmp_path, exported):
  with pytest.raises(ValueError, match="phrases must hold at least one phrase"):
    export(tmp_path / "none", phrases=[])
  with pytest.raises(ValueError, match="rows_per_shard=0; accepted: 1 or more"):
    export(tmp_path / "none", rows_per_shard=0)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes.txt").write_text("mine")
  with pytest.raises(FeatureError, match="is not empty and holds no teacher features"):
    export(tmp_path / "full")
  with pytest.raises(FeatureError, match=r"notes\.txt is no directory"):
    export(tmp_path / "full" / "notes.txt")
  with pytest.raises(FeatureError, match=r"holds no teacher features \(no manifest.json\)$"):
    TeacherFeatures(tmp_path / "full")
  manifest = os.path.join(exported.directory, "manifest.json")
  with open(manifest) as file:
    data = json.load(file)
  with open(manifest, "w") as file:
    json.dump(data | {"version": 9}, file)
  with pytest.raises(FeatureError, match="is of version 9"):
    TeacherFeatures(exported.directory)
  with open(manifest, "w") as file:
    file.write('{"version": 1, ')
  with pytest.raises(FeatureError, match=r"manifest.json is damaged"):
    TeacherFeatures(exported.directory)


def test_beyond_float16_is_refused(tmp_path):
  model, variables = tiny_model()
  params = {**variables["params"]}
  params["text_projection"] = jax.tree.map(lambda x: x * 1e6, params["text_projection"])
  loud = Teacher.of(model, {**variables, "params": params}, context_length=8)
  with pytest.raises(FeatureError, match="features of phrase 0 are not finite in float16"):
    export(tmp_path / "loud", teacher=loud)
