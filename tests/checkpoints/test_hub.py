"""Downloads from a stand-in of the hub, each in its own process: huggingface_hub reads its settings once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sam3lt_jax.checkpoints import hub
from tests.checkpoints.hub_server import TOKEN, HubServer, Repository

_pause = threading.Event()
_ROOT = Path(__file__).parents[2]
_NEW, _OLD = "b" * 40, "a" * 40
_REPO = "owner/sam3-litetext-s0"
_WEIGHTS = bytes(range(256)) * 800  # 204,800 bytes
_FILES = {
  "config.json": b'{"model_type": "sam3_lite_text"}',
  "tokenizer.json": b"{}",
  "model.safetensors": _WEIGHTS,
  "README.md": b"not wanted",
  "old.pt": b"not wanted either",
  "onnx/config.json": b"not wanted, in a folder",
}

# Chunks of 1 KiB instead of 10 MB, and no pause between retries, so that small files show what large ones do.
# The package's own __init__ is passed over, as it imports jax, which takes longer than all the rest.
_CHILD = """
import json, sys, time, types
package = types.ModuleType("sam3lt_jax.checkpoints")
package.__path__ = [sys.argv[2]]
sys.modules[package.__name__] = package
time.sleep = lambda s: None
import huggingface_hub.constants as c
c.DOWNLOAD_CHUNK_SIZE = 1024
from sam3lt_jax.checkpoints import hub
args = json.loads(sys.argv[1])
try:
  answer = {"path": hub.download(**args)}
except Exception as e:
  answer = {"error": type(e).__name__, "bases": [b.__name__ for b in type(e).__mro__], "message": str(e)}
print(json.dumps(answer))
"""


@pytest.fixture
def server():
  repositories = {
    _REPO: Repository(
      {_NEW: dict(_FILES), _OLD: _FILES | {"model.safetensors": b"old" * 100}}, {"main": _NEW, "v1": _OLD}
    ),
    "owner/gated": Repository({_NEW: dict(_FILES)}, {"main": _NEW}, gated=True),
    "owner/orbax": Repository(
      {_NEW: {"config.json": b"{}", "variables/manifest.ocdbt": b"m", "variables/d/ab12": _WEIGHTS}},
      {"main": _NEW},
    ),
    "owner/pickles": Repository({_NEW: {"deep/er/model.pt": _WEIGHTS, "readme": b""}}, {"main": _NEW}),
  }
  with HubServer(repositories) as hub_server:
    yield hub_server


@pytest.fixture
def environment(server, tmp_path):
  """Of a process that knows no hub but the stand-in."""
  clean = {
    k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")
  }
  return clean | {
    "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(_ROOT),
  }  # fmt: skip


@pytest.fixture
def child(environment, tmp_path):
  """Starts `hub.download(**args)` against the stand-in; returns the process."""

  def start(source=_REPO, env=None, **args):
    args = {"source": source, "cache_dir": str(tmp_path / "cache")} | args
    return subprocess.Popen(
      [sys.executable, "-c", _CHILD, json.dumps(args), str(_ROOT / "sam3lt_jax" / "checkpoints")],
      env=environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  return start


@pytest.fixture
def download(child):
  def run(*args, **kwargs):
    process = child(*args, **kwargs)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    return json.loads(out)

  return run


def test_downloads_once_then_reads_the_cache(server, download):
  path = download()["path"]
  assert {n for n in os.listdir(path)} == {"config.json", "tokenizer.json", "model.safetensors"}
  assert Path(path, "model.safetensors").read_bytes() == _WEIGHTS
  assert len(server.asked("GET", "/cdn/")) == 1
  server.requests.clear()
  assert download()["path"] == path
  assert not server.asked("GET", "/cdn/") and not server.asked("GET", "/resolve/")
  # A full commit hash that lies in the cache is found again without the branch's name.
  assert download(revision=_NEW)["path"] == path


def test_revision_pins_the_files(download):
  for revision in ("v1", _OLD):
    path = download(revision=revision)["path"]
    assert path.endswith(_OLD)
    assert Path(path, "model.safetensors").read_bytes() == b"old" * 100
  assert download()["path"].endswith(_NEW)


def test_a_repository_in_our_own_format(download):
  path = Path(download("owner/orbax")["path"])
  assert (path / "variables/d/ab12").read_bytes() == _WEIGHTS
  assert (path / "variables/manifest.ocdbt").read_bytes() == b"m"


def test_single_file_of_a_repository(server, download):
  for source in ("owner/pickles:deep/er/model.pt", "owner/pickles/deep/er/model.pt"):
    path = download(source)["path"]
    assert path.endswith("deep/er/model.pt")
    assert Path(path).read_bytes() == _WEIGHTS
  assert len(server.asked("GET", "/cdn/")) == 1


def test_token_opens_a_gated_repository_and_stays_with_the_hub(server, download):
  path = download("owner/gated", token=TOKEN)["path"]
  assert Path(path, "model.safetensors").read_bytes() == _WEIGHTS
  assert all(r.authorised for r in server.asked("HEAD", "/resolve/"))
  assert server.asked("GET", "/cdn/") and not any(r.authorised for r in server.asked("GET", "/cdn/"))


def test_cut_connection_is_resumed(server, download):
  server.cuts = [50_000, 60_000]
  path = download()["path"]
  assert Path(path, "model.safetensors").read_bytes() == _WEIGHTS
  ranges = [r.range for r in server.asked("GET", "/cdn/")]
  assert ranges[0] is None and len(ranges) == 3
  starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:]]
  assert 48_000 < starts[0] <= 50_000 and 106_000 < starts[1] <= 110_000


def test_killed_download_is_resumed_by_the_next_process(server, child, download):
  server.stall_after = 100_000
  process = child()
  assert server.stalled.wait(60)
  part = _wait_for_part(Path(json.loads(process.args[3])["cache_dir"]))
  process.kill()
  process.wait()
  process.stdout.close(), process.stderr.close()
  server.stall_after = None
  server.release.set()
  server.requests.clear()
  path = download()["path"]
  assert Path(path, "model.safetensors").read_bytes() == _WEIGHTS
  (request,) = server.asked("GET", "/cdn/")
  assert 90_000 < int(request.range.removeprefix("bytes=").removesuffix("-")) <= 100_000
  assert not part.exists()


def _wait_for_part(cache: Path) -> Path:
  for _ in range(600):
    for part in cache.glob("*/blobs/*.part"):
      if part.stat().st_size > 90_000:
        return part
    _pause.wait(0.05)
  raise AssertionError("no partial file was written")


def test_damaged_partial_file_is_not_used(server, download, tmp_path):
  path = download()["path"]
  blob = Path(os.path.realpath(Path(path, "model.safetensors")))
  blob.rename(blob.with_name(blob.name + ".part"))
  Path(path, "model.safetensors").unlink()
  damaged = blob.with_name(blob.name + ".part")
  damaged.write_bytes(b"\xff" * 1000 + damaged.read_bytes()[1000:70_000])
  assert Path(download()["path"], "model.safetensors").read_bytes() == _WEIGHTS


def test_connection_lost_for_good_says_how_far_it_came(server, download):
  server.cuts = [70_000] + [0] * 20
  answer = download()
  assert answer["error"] == "DownloadError" and "OSError" in answer["bases"]
  assert "broke off after 0 of 0 MB" in answer["message"] and "run it again" in answer["message"]
  server.cuts = []
  assert Path(download()["path"], "model.safetensors").read_bytes() == _WEIGHTS


def test_offline_with_cache(server, download):
  path = download()["path"]
  server.requests.clear()
  assert download(local_files_only=True)["path"] == path
  assert download(env={"HF_HUB_OFFLINE": "1"})["path"] == path
  assert server.requests == []
  server.down = True
  assert download()["path"] == path


@pytest.mark.full  # 3 s
@pytest.mark.parametrize("source", [_REPO, "owner/pickles:deep/er/model.pt"])
def test_no_network_and_nothing_cached(server, download, source):
  unreachable = download(source, endpoint="http://127.0.0.1:9")
  assert unreachable["error"] == "HubUnreachableError" and "ConnectionError" in unreachable["bases"]
  assert "http://127.0.0.1:9 cannot be reached" in unreachable["message"]
  assert f"hf download {source.partition(':')[0]}" in unreachable["message"]
  for kwargs in ({"local_files_only": True}, {"env": {"HF_HUB_OFFLINE": "1"}}):
    answer = download(source, **kwargs)
    assert answer["error"] == "HubUnreachableError"
    assert (
      "downloads are switched off" in answer["message"] and "not complete in the cache" in answer["message"]
    )
  assert server.requests == []
  server.down = True
  assert "503" in download(source)["message"]


@pytest.mark.full  # 4 s
@pytest.mark.parametrize(
  ("args", "error", "base", "text"),
  [
    ({"source": "owner/gated"}, "GatedRepositoryError", "PermissionError", "accept its licence at http://127.0"),
    ({"source": "owner/gated", "token": "hf_x"}, "GatedRepositoryError", "PermissionError", "hf auth login"),
    ({"source": "owner/no"}, "UnknownRepositoryError", "ValueError", "no model repository 'owner/no'"),
    (
      {"source": "simon7108528/sam3-litetex-s0"}, "UnknownRepositoryError", "ValueError",
      "did you mean 'Simon7108528/sam3-litetext-s0'",
    ),
    ({"source": _REPO, "revision": "v9"}, "UnknownRepositoryError", "ValueError", "has no revision 'v9'"),
    ({"source": f"{_REPO}:x.pt"}, "UnknownRepositoryError", "ValueError", "has no file 'x.pt'"),
    ({"source": "owner/pickles"}, "UnknownRepositoryError", "ValueError", "holds no *.safetensors"),
    ({"source": "not a repo"}, "UnknownRepositoryError", "ValueError", "is not a repository"),
    ({"source": "owner/--bad.."}, "UnknownRepositoryError", "ValueError", "not a repository name"),
  ],
)  # fmt: skip
def test_each_mistake_has_its_sentence(download, args, error, base, text):
  answer = download(**args)
  assert answer.get("error") == error, answer
  assert base in answer["bases"]
  assert text in answer["message"]
  assert "\n" not in answer["message"]


_OUT = "../../../../out"  # from blobs, snapshots or refs of a repository, past the cache


@pytest.mark.full  # 4 s
@pytest.mark.parametrize(
  ("source", "lies"),
  [
    (_REPO, {"ETag": f'"{_OUT}"'}),
    (_REPO, {"ETag": '".."'}),
    (_REPO, {"X-Linked-Etag": f'W/"{_OUT}"'}),
    (f"{_REPO}:model.safetensors", {"X-Linked-Etag": '"/tmp/out"'}),
    (f"{_REPO}:config.json", {"ETag": '"a/../../b"'}),
    (_REPO, {"sha": _OUT}),
    (f"{_REPO}:model.safetensors", {"X-Repo-Commit": _OUT}),
    (f"{_REPO}:config.json", {"X-Repo-Commit": "main"}),
  ],
)
def test_a_hub_cannot_name_a_place_outside_of_the_cache(server, download, tmp_path, source, lies):
  server.lies = lies
  answer = download(source)
  assert answer.get("error") == "DownloadError", answer
  assert "\n" not in answer["message"]
  assert "nothing was written" in answer["message"]
  assert set(os.listdir(tmp_path)) <= {"cache", "home"}
  assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.name == "out"]


@pytest.mark.parametrize("name", [f"variables/{_OUT}", f"variables/x/../../{_OUT}.json"])
def test_a_file_list_cannot_lead_out_of_the_cache(server, download, tmp_path, name):
  server.repositories["owner/odd"] = Repository({_NEW: _FILES | {name: b"x"}}, {"main": _NEW})
  answer = download("owner/odd")
  assert answer.get("error") == "DownloadError" and "it is refused" in answer["message"], answer
  assert set(os.listdir(tmp_path)) <= {"cache", "home"}


def test_a_revision_cannot_lead_out_of_the_cache(server, download, tmp_path):
  repository = server.repositories[_REPO]
  repository.refs[_OUT] = _NEW
  answer = download(revision=_OUT)
  assert answer.get("error") in ("DownloadError", "UnknownRepositoryError"), answer
  assert set(os.listdir(tmp_path)) <= {"cache", "home"}


def test_what_broke_off_is_not_taken_for_whole_without_a_network(server, download):
  server.cuts = [70_000] + [0] * 20
  assert download(revision=_NEW)["error"] == "DownloadError"
  server.down = True
  for revision in (None, _NEW):
    assert download(revision=revision, local_files_only=True)["error"] == "HubUnreachableError"


def test_a_cache_that_the_library_filled_is_used_and_the_other_way_round(
  server, environment, download, tmp_path
):
  path = download()["path"]
  server.requests.clear()
  code = (
    "import huggingface_hub as h, sys; kw = dict(cache_dir=sys.argv[1])\n"
    "print(h.hf_hub_download(sys.argv[2], 'model.safetensors', local_files_only=True, **kw))\n"
    "print(h.snapshot_download(sys.argv[2], revision='v1', **kw))"
  )
  command = [sys.executable, "-c", code, str(tmp_path / "cache"), _REPO]
  run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=True)
  ours, theirs = run.stdout.split()
  assert ours == os.path.join(path, "model.safetensors")
  server.requests.clear()
  assert download(revision="v1")["path"] == theirs
  assert not server.asked("HEAD", "/resolve/") and not server.asked("GET", "/cdn/")


def test_a_disk_without_links(monkeypatch, tmp_path):
  def refuse(*args, **kwargs):
    raise OSError(errno.EPERM, "Operation not permitted")

  monkeypatch.setattr(os, "symlink", refuse)
  (tmp_path / "blob").write_bytes(b"x")
  hub._link(str(tmp_path / "blob"), str(tmp_path / "snapshot" / "a" / "b"))
  assert (tmp_path / "snapshot" / "a" / "b").read_bytes() == b"x"


def test_full_disk_and_read_only_cache(monkeypatch, tmp_path):
  call = hub._Call(hub.HubSource(_REPO), None, None, str(tmp_path), "http://127.0.0.1:9")
  for code, text in ((errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written")):
    broken = hub._BrokeOff("model.safetensors", 10**9, 2 * 10**9, OSError(code, "x"))
    for e in (OSError(code, "x"), broken):
      explained = hub._explain(call, e)
      assert isinstance(explained, hub.DownloadError) and isinstance(explained, OSError)
      assert text in str(explained) and str(tmp_path) in str(explained)
  lost = hub._explain(call, hub._BrokeOff("model.safetensors", 10**9, 2 * 10**9, TimeoutError("slow")))
  assert "broke off after 1000 of 2000 MB (slow)" in str(lost)


@pytest.mark.parametrize(
  ("source", "parsed"),
  [
    ("a/b", ("a/b", None)),
    ("a/b:c/d.pt", ("a/b", "c/d.pt")),
    ("a/b/c/d.pt", ("a/b", "c/d.pt")),
    ("a/b/c", None),
    ("./b", None),
    ("../b", None),
    ("/b", None),
    ("b", None),
    ("a/b:", None),
    ("folder/file.safetensors", None),
    ("C:/file.pt", None),
  ],
)
def test_parse_source(source, parsed):
  assert hub.parse_source(source) == (parsed and hub.HubSource(*parsed))
