"""A stand-in of the model hub on this machine: the routes that huggingface_hub asks when it downloads.

`GET /api/models/{repo}[/revision/{rev}]`, `GET /api/models/{repo}/tree/{rev}`, and `HEAD` or `GET` of
`/{repo}/resolve/{rev}/{file}` with ETag, X-Repo-Commit and Range. Large files redirect to `/cdn/{sha256}`
under another host name, which, as with the real hub, must not see the token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclasses.dataclass
class Repository:
  """revisions: commit -> file name -> bytes; refs: branch or tag -> commit."""

  revisions: dict[str, dict[str, bytes]]
  refs: dict[str, str]
  gated: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
  method: str
  path: str
  range: str | None
  authorised: bool


class HubServer:
  """Context manager; `url` is its address, `requests` what it was asked, in order."""

  def __init__(self, repositories: dict[str, Repository]):
    self.repositories = repositories
    self.requests: list[Request] = []
    self.cuts: list[int] = []  # the next large file's transfer ends after so many bytes, one entry a transfer
    self.stall_after: int | None = None  # instead of ending, a transfer hangs there until `release` is set
    self.stalled = threading.Event()
    self.release = threading.Event()
    self.down = False  # every answer is 503
    self.lies: dict[str, str | None] = {}  # headers of files, and "sha" of a repository, to be sent instead
    hub = self

    class Handler(_Handler):
      server_hub = hub

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self.port = self._server.server_port
    self.url = f"http://127.0.0.1:{self.port}"
    self.cdn = f"http://localhost:{self.port}/cdn"

  def __enter__(self) -> HubServer:
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self.release.set()
    self._server.shutdown()
    self._server.server_close()

  def asked(self, method: str, part: str) -> list[Request]:
    return [r for r in self.requests if r.method == method and part in r.path]


class _Handler(http.server.BaseHTTPRequestHandler):
  server_hub: HubServer
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self._answer()

  def do_GET(self):
    self._answer()

  def _answer(self):
    hub = self.server_hub
    path = unquote(urlsplit(self.path).path)
    token = self.headers.get("Authorization")
    hub.requests.append(Request(self.command, path, self.headers.get("Range"), token is not None))
    if hub.down:
      return self._send(503, b"")
    if path.startswith("/cdn/"):
      return self._cdn(path.removeprefix("/cdn/"))
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
    if match:
      return self._api(match[1], match[2], match[3] or "main")
    match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if match:
      return self._resolve(match[1], match[2], match[3], token)
    return self._send(404, b"")

  def _commit(self, name: str, revision: str) -> str | None:
    """The commit, or None after an error has been sent."""
    repository = self.server_hub.repositories.get(name)
    if repository is None:
      # The real hub hides what exists: 401 to anybody without a token.
      return self._send(
        401, b"", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
      )
    commit = repository.refs.get(revision, revision)
    if commit not in repository.revisions:
      return self._error(404, "RevisionNotFound")
    return commit

  def _api(self, name: str, what: str | None, revision: str):
    commit = self._commit(name, revision)
    if commit is None:
      return
    files = self.server_hub.repositories[name].revisions[commit]
    if what == "tree":
      body = [
        {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)} | _lfs(path, data)
        for path, data in files.items()
      ]
    else:
      sha = self.server_hub.lies.get("sha", commit)
      body = {"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]}
    self._send(200, json.dumps(body).encode(), **{"Content-Type": "application/json"})

  def _resolve(self, name: str, revision: str, path: str, token: str | None):
    commit = self._commit(name, revision)
    if commit is None:
      return
    repository = self.server_hub.repositories[name]
    if repository.gated and token != f"Bearer {TOKEN}":
      status = 401 if token is None else 403
      return self._send(
        status, b"", **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
      )
    data = repository.revisions[commit].get(path)
    if data is None:
      return self._error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if large := _lfs(path, data):
      sha = hashlib.sha256(data).hexdigest()
      headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
      headers["Location"] = f"{self.server_hub.cdn}/{sha}"
    else:
      headers["ETag"] = f'"{_git_hash(data)}"'
    headers |= {name: value for name, value in self.server_hub.lies.items() if name in headers}
    self._send(302 if large else 200, b"" if large else data, **headers)

  def _cdn(self, sha: str):
    hub = self.server_hub
    every = [d for r in hub.repositories.values() for files in r.revisions.values() for d in files.values()]
    data = next(d for d in every if hashlib.sha256(d).hexdigest() == sha)
    start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(data) - start))
    if start:
      self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    self.end_headers()
    if hub.stall_after is not None:
      self.wfile.write(data[start : hub.stall_after])
      hub.stalled.set()
      hub.release.wait(60)
      self.close_connection = True
    elif hub.cuts:
      self.wfile.write(data[start : start + hub.cuts.pop(0)])
      self.close_connection = True
    else:
      self.wfile.write(data[start:])

  def _error(self, status: int, code: str, **headers: str) -> None:
    self._send(status, b"", **{"X-Error-Code": code, "X-Error-Message": code}, **headers)

  def _send(self, status: int, body: bytes, **headers: str) -> None:
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)


def _git_hash(data: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs(path: str, data: bytes) -> dict:
  if not path.endswith((".safetensors", ".pt")):
    return {}
  return {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
