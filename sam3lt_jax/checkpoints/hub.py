"""Checkpoints from a model hub through huggingface_hub: revisions, progress, resume, offline cache, tokens.

huggingface_hub asks the hub, transfers and reads the cache. Where a file goes in the cache is decided here,
for two reasons. `hf_hub_download` (2.4.0) writes to a name drawn anew each time and removes it when the
connection breaks, so 2 GB that stop at 1.9 start at 0 again: here a part stays, and the next process goes on
from it. And it takes an answer's ETag and commit for file names as they are: `../` leads out of the cache.

The cache's layout is the documented one, shared with its other users: `blobs/ETAG`, links to them in
`snapshots/COMMIT/`, and `refs/REVISION` with the commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from sam3lt_jax.checkpoints.errors import CheckpointError

VARIABLES = "variables"  # the folder that orbax_io writes into; said here, where importing it loads no jax

# The released models, for suggestions.
KNOWN_REPOSITORIES = (
  "Simon7108528/sam3-litetext-s0",
  "Simon7108528/sam3-litetext-s1",
  "Simon7108528/sam3-litetext-l",
  "Simon7108528/EfficientSAM3",
  "yonigozlan/sam3-litetext-s0",
  "yonigozlan/sam3-litetext-s1",
  "yonigozlan/sam3-litetext-l",
  "vil-uob/sam3-litetext-s0",
  "vil-uob/sam3-litetext-s1",
  "vil-uob/sam3-litetext-l",
  "facebook/sam3",
)
# Configuration, processor, tokenizer; weights as safetensors with their index, or our Orbax variables.
_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer*", f"{VARIABLES}/*")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_PART = re.compile(r"[\w.-]+")  # a user's or a repository's name
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[\w+=-][\w.+=-]{0,199}", re.ASCII)
# Exceptions of requests, httpx and huggingface_hub that mean: no connection.
_NETWORK = {"ConnectError", "TimeoutException", "NetworkError", "ProtocolError", "ConnectionError", "Timeout"}


class UnknownRepositoryError(CheckpointError):
  """The hub has no such repository, revision or file (or hides it from this token)."""


class GatedRepositoryError(PermissionError):
  """The repository exists, but its licence has not been accepted, or the token is missing or refused."""


class HubUnreachableError(ConnectionError):
  """No network (or offline mode), and the files are not in the local cache."""


class DownloadError(OSError):
  """A download broke off: the disk is full, the cache cannot be written, or the server stopped answering."""


@dataclasses.dataclass(frozen=True)
class HubSource:
  """A repository `owner/name`, and one file of it or the whole model directory (`file` None)."""

  repo: str
  file: str | None = None

  def __str__(self) -> str:
    return self.repo if self.file is None else f"{self.repo}:{self.file}"


def parse_source(source: str) -> HubSource | None:
  """`owner/name`, `owner/name:path/file.pt` or `owner/name/path/file.pt`; None: not a hub id."""
  repo, colon, file = source.partition(":")
  parts = repo.split("/")
  if not colon and len(parts) > 2 and parts[-1].endswith(_WEIGHTS):
    parts, file = parts[:2], "/".join(parts[2:])
  elif colon and not file:
    return None
  # A leading dot is a relative path, not an owner.
  if len(parts) != 2 or not all(_PART.fullmatch(p) and not p.startswith(".") for p in parts):
    return None
  if not file and parts[1].endswith(_WEIGHTS):
    return None  # folder/file.safetensors
  return HubSource("/".join(parts), file or None)


def download(
  source: str,
  revision: str | None = None,
  token: str | bool | None = None,
  cache_dir: str | os.PathLike | None = None,
  local_files_only: bool = False,
  *,
  endpoint: str | None = None,
) -> str:
  """Brings a checkpoint into the local cache and returns its path.

  Args:
    source: `owner/name` for a model directory (transformers' layout), or `owner/name:path/file.pt` (also
      `owner/name/path/file.pt`) for one file.
    revision: branch, tag or commit; a full commit hash pins the files for good. Default: the main branch.
    token: access token; None uses `HF_TOKEN` or the one `hf auth login` stored, False sends none.
    cache_dir: where files are kept. Default: huggingface_hub's cache (`HF_HUB_CACHE`).
    local_files_only: only look in the cache. `HF_HUB_OFFLINE=1` does the same for every call.
    endpoint: address of the hub. Default: `HF_ENDPOINT`, else huggingface_hub's own.

  Returns:
    The path of the snapshot's directory, or of the file. Without a network, what the cache holds of the
    revision.

  Raises:
    UnknownRepositoryError: (ValueError) no such repository, revision or file, or a source of another form.
    GatedRepositoryError: (PermissionError) licence not accepted, or the token is missing or refused.
    HubUnreachableError: (ConnectionError) no network and nothing cached.
    DownloadError: (OSError) disk full, cache not writable, connection lost for good.
  """
  where = parse_source(source)
  if where is None:
    raise UnknownRepositoryError(
      f"source: {source!r} is not a repository; accepted: 'owner/name' or 'owner/name:path/to/file.pt'"
    )
  from huggingface_hub import constants

  call = _Call(
    where, revision, token, os.path.expanduser(os.fspath(cache_dir or constants.HF_HUB_CACHE)),
    (endpoint or constants.ENDPOINT).rstrip("/"),
  )  # fmt: skip
  local_files_only = local_files_only or constants.HF_HUB_OFFLINE
  reason: Exception | None = None
  if not local_files_only:
    try:
      return _from_hub(call)
    except Exception as e:
      if not _is_unreachable(e):
        raise _explain(call, e) from e
      reason = e
  try:
    return _from_cache(call)
  except Exception as e:
    raise _explain(call, reason or e, offline=local_files_only) from e


@dataclasses.dataclass(frozen=True)
class _Call:
  source: HubSource
  revision: str | None
  token: str | bool | None
  cache_dir: str
  endpoint: str

  def folder(self, *names: str) -> str:
    """A folder of the repository in the cache."""
    return os.path.join(self.cache_dir, "models--" + self.source.repo.replace("/", "--"), *names)


def _from_cache(call: _Call) -> str:
  import huggingface_hub

  kwargs = {"cache_dir": call.cache_dir, "revision": call.revision, "local_files_only": True}
  if call.source.file is not None:
    return huggingface_hub.hf_hub_download(call.source.repo, call.source.file, **kwargs)
  path = huggingface_hub.snapshot_download(call.source.repo, allow_patterns=list(_PATTERNS), **kwargs)
  _check_weights(call, os.listdir(path))
  return path


def _check_weights(call: _Call, names: Iterable[str]) -> None:
  if not any(name.endswith(".safetensors") or name.partition("/")[0] == VARIABLES for name in names):
    raise UnknownRepositoryError(
      f"{call.source.repo} holds no *.safetensors weights at the top; to load another file of it, "
      f"name the file: '{call.source.repo}:path/to/file.pt'"
    )


def _from_hub(call: _Call) -> str:
  """Brings what the cache lacks, each file resumable; links and the revision's name come last."""
  from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
  from huggingface_hub.utils import build_hf_headers

  file, commit, revision = call.source.file, None, call.revision or "main"
  if _COMMIT.fullmatch(revision):
    commit = revision
  if file is None:
    info = HfApi(endpoint=call.endpoint, token=call.token).model_info(call.source.repo, revision=revision)
    every, commit = [s.rfilename for s in info.siblings or ()], info.sha
    names = [n for n in every if any(fnmatch.fnmatch(n, p) for p in _PATTERNS)]
    names = [n for n in names if "/" not in n or n.startswith(f"{VARIABLES}/")]  # a * takes in a /
    _check_weights(call, names)
  else:
    names = [file]
  # Without compression: a part of a compressed transfer could not be continued.
  headers = build_hf_headers(token=call.token, library_name="sam3lt_jax") | {"Accept-Encoding": "identity"}
  links: dict[str, str] = {}
  for name in names:
    if commit is not None and os.path.exists(_inside(call.folder("snapshots", _commit(commit)), name)):
      continue
    url = hf_hub_url(call.source.repo, name, revision=commit or revision, endpoint=call.endpoint)
    # huggingface_hub adds keys of its own to the headers that it is given.
    meta = get_hf_file_metadata(url, token=call.token, headers=dict(headers), endpoint=call.endpoint)
    commit = _commit(commit or meta.commit_hash)
    send = headers
    if urlsplit(meta.location).netloc != urlsplit(url).netloc:
      send = {k: v for k, v in headers.items() if k.lower() != "authorization"}  # a signed address elsewhere
    links[_inside(call.folder("snapshots", commit), name)] = _fetch(call, name, meta, send)
  for link, blob in links.items():
    _link(blob, link)
  _remember(_inside(call.folder("refs"), revision), commit)
  snapshot = call.folder("snapshots", commit)
  return snapshot if file is None else os.path.join(snapshot, file)


def _commit(commit: str | None) -> str:
  if not _COMMIT.fullmatch(commit or ""):
    raise DownloadError(f"the hub's answer has {commit!r} for a commit, which is none; nothing was written")
  return commit


def _inside(folder: str, name: str) -> str:
  """The path of `name` in `folder`. A name that leads out of it is refused."""
  path = os.path.abspath(os.path.join(folder, name))
  if not path.startswith(os.path.abspath(folder) + os.sep):
    raise DownloadError(f"{name!r} lies outside of the cache's folder {folder}; it is refused")
  return path


def _fetch(call: _Call, name: str, meta: Any, headers: Mapping[str, Any]) -> str:
  """One file to `blobs/ETAG` by way of `.part` beside it, which stays when the connection breaks."""
  from huggingface_hub.file_download import http_get
  from huggingface_hub.utils import WeakFileLock

  etag, size = meta.etag, meta.size
  if size is None or not _ETAG.fullmatch(etag or ""):
    raise DownloadError(
      f"the hub's answer for {name} of {call.source.repo} is not usable (ETag {etag!r}, size {size}); "
      "nothing was written"
    )
  blob = os.path.join(call.folder("blobs"), etag)
  part, lock = blob + ".part", os.path.join(call.cache_dir, ".locks", os.path.basename(call.folder()), etag)
  for path in (blob, lock):
    os.makedirs(os.path.dirname(path), exist_ok=True)
  with WeakFileLock(f"{lock}.part.lock"):
    for _ in range(2):
      if os.path.exists(blob):
        return blob
      have = os.path.getsize(part) if os.path.exists(part) else 0
      if have > size:
        os.remove(part)
        have = 0
      try:
        with open(part, "ab", buffering=0) as f:  # on disk chunk by chunk, even if the process is killed
          http_get(
            meta.location, f, resume_size=have, headers=headers, expected_size=size, displayed_filename=name
          )
      except Exception as e:
        raise _BrokeOff(name, os.path.getsize(part) if os.path.exists(part) else 0, size, e) from e
      with open(part, "rb") as f:  # large files carry their SHA-256 as etag; git's hashes are not checked
        same = not re.fullmatch("[0-9a-f]{64}", etag) or hashlib.file_digest(f, "sha256").hexdigest() == etag
      if same and os.path.getsize(part) == size:
        os.replace(part, blob)
      else:
        os.remove(part)  # continued from another file's bytes, or damaged: once more from the start
    if os.path.exists(blob):
      return blob
  raise _BrokeOff(name, 0, size, OSError(f"the received file does not match its checksum {etag}"))


def _link(blob: str, link: str) -> None:
  os.makedirs(os.path.dirname(link), exist_ok=True)
  try:
    os.symlink(os.path.relpath(blob, os.path.dirname(link)), link)
  except FileExistsError:
    pass  # another process made it just now
  except OSError:  # a disk without links
    shutil.copyfile(blob, link)


def _remember(ref: str, commit: str) -> None:
  """Which commit a branch or tag was, for when there is no network."""
  if os.path.basename(ref) == commit:
    return
  with contextlib.suppress(OSError):  # a cache that is there, but cannot be written
    os.makedirs(os.path.dirname(ref), exist_ok=True)
    with open(f"{ref}.{os.getpid()}.tmp", "w", encoding="utf-8") as f:
      f.write(commit)
    os.replace(f.name, ref)


class _BrokeOff(Exception):
  """The transfer of one file failed after `have` of `size` bytes."""

  def __init__(self, name: str, have: int, size: int, cause: Exception):
    super().__init__(name)
    self.name, self.have, self.size, self.cause = name, have, size, cause


def _chain(e: BaseException) -> Iterator[BaseException]:
  while e is not None:
    yield e
    e = e.__cause__ or e.__context__


def _names(e: BaseException) -> set[str]:
  return {c.__name__ for c in type(e).__mro__}


def _status(e: BaseException) -> int | None:
  return getattr(getattr(e, "response", None), "status_code", None)


def _is_unreachable(e: BaseException) -> bool:
  """No connection, or a hub that is down. By name: huggingface_hub uses requests or httpx, by its version."""
  if isinstance(e, _BrokeOff):
    return False
  if _status(e) is not None:
    return _status(e) >= 500
  return bool(_NETWORK & _names(e))


def _explain(call: _Call, e: Exception, offline: bool = False) -> Exception:
  """The exception a user should see in place of `e`: one sentence on what happened and what to do."""
  if isinstance(e, (UnknownRepositoryError, DownloadError)):
    return e
  repo, revision, names = call.source.repo, call.revision or "main", _names(e)
  cause = e.cause if isinstance(e, _BrokeOff) else e
  codes = set() if _is_unreachable(cause) else {c.errno for c in _chain(cause) if isinstance(c, OSError)}
  if errno.ENOSPC in codes or errno.EDQUOT in codes:
    return DownloadError(
      f"the disk is full: {call.source} does not fit into the cache {call.cache_dir}; free some space, or "
      "pass cache_dir (or set HF_HUB_CACHE), a folder on a larger disk"
    )
  if codes & {errno.EACCES, errno.EPERM, errno.EROFS}:
    return DownloadError(f"the cache {call.cache_dir} cannot be written; pass cache_dir or set HF_HUB_CACHE")
  if isinstance(e, _BrokeOff):
    return DownloadError(
      f"the download of {e.name} from {repo} broke off after {e.have / 1e6:.0f} of {e.size / 1e6:.0f} MB "
      f"({_short(e.cause)}); run it again, and it goes on from there"
    )
  if "RevisionNotFoundError" in names:
    return UnknownRepositoryError(
      f"{repo} has no revision {revision!r}; accepted: a branch, tag or commit hash"
    )
  if "RemoteEntryNotFoundError" in names or names >= {"EntryNotFoundError", "HfHubHTTPError"}:
    return UnknownRepositoryError(f"{repo} has no file {call.source.file!r} at revision {revision!r}")
  if "GatedRepoError" in names or _status(e) == 403:
    return GatedRepositoryError(
      f"{repo} is gated, and access was not granted: accept its licence at {call.endpoint}/{repo} while "
      "logged in, then run `hf auth login` with a token of that account (or set HF_TOKEN, or pass token=)"
    )
  if "RepositoryNotFoundError" in names or _status(e) == 404:
    near = difflib.get_close_matches(repo.lower(), [k.lower() for k in KNOWN_REPOSITORIES], n=3, cutoff=0.6)
    near = " or ".join(repr(k) for k in KNOWN_REPOSITORIES if k.lower() in near)
    hint = f"did you mean {near}?" if near else f"for instance {KNOWN_REPOSITORIES[0]!r}"
    return UnknownRepositoryError(
      f"no model repository {repo!r} at {call.endpoint}; {hint} (a private one needs a token: "
      "`hf auth login` or HF_TOKEN)"
    )
  if _status(e) == 401:
    return GatedRepositoryError(
      f"the hub refused the token for {repo}; make a new one with read access and run `hf auth login`, "
      "or set HF_TOKEN"
    )
  if "HFValidationError" in names:
    return UnknownRepositoryError(f"source: {repo!r} is not a repository name ({_short(e)})")
  if offline or _is_unreachable(e) or "LocalEntryNotFoundError" in names:
    why = f"the hub {call.endpoint} cannot be reached ({_short(e)})"
    if offline:
      why = "downloads are switched off (local_files_only or HF_HUB_OFFLINE)"
    at = "" if call.revision is None else f" at revision {revision!r}"
    name = "" if call.source.file is None else f" {call.source.file}"
    return HubUnreachableError(
      f"{why}, and {call.source}{at} is not complete in the cache {call.cache_dir}; fetch it where "
      f"there is a network (`hf download {repo}{name} --local-dir DIR`) and pass what that wrote"
    )
  return DownloadError(f"downloading {call.source} failed ({_short(e)})")


def _short(e: BaseException) -> str:
  text = (str(e).strip() or type(e).__name__).splitlines()[0]
  return text if len(text) <= 120 else text[:117] + "..."
