"""Phrases to token ids: CLIP's byte-pair encoding, cleaned and padded as the profile says.

Sources: the authors' `tokenizer_ve.py` (which is OpenCLIP's tokenizer) for text_cleaning="original";
transformers 5.23.0 `CLIPTokenizer` for "transformers". The two share vocabulary and merges and differ in
everything around them.
"""

from __future__ import annotations

import functools
import gzip
import html
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam3lt_jax.config import Profile
from sam3lt_jax.errors import warn

if TYPE_CHECKING:
  from tokenizers import Tokenizer

_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
# The original's names of the two; in a phrase they are one token, where they are a word of their own.
_ORIGINAL_SPECIALS = ("<start_of_text>", "<end_of_text>")
_WORDS = r"|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# The original matches without regard to case, which lets the long s (U+017F) stand for s.
_ORIGINAL_PATTERN = "|".join(_ORIGINAL_SPECIALS) + "|'[sſ]" + _WORDS
_TRANSFORMERS_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s" + _WORDS


@functools.cache
def bundled_merges() -> tuple[tuple[str, str], ...]:
  """CLIP's 48,894 merges in rank order, from `assets/bpe_merges.txt.gz` (see the NOTICE beside it)."""
  import importlib.resources

  data = (importlib.resources.files("sam3lt_jax") / "assets" / "bpe_merges.txt.gz").read_bytes()
  lines = gzip.decompress(data).decode("utf-8").splitlines()
  return tuple(tuple(line.split(" ")) for line in lines)


def _bundled_model():
  from tokenizers import models

  merges = bundled_merges()
  # The 256 characters that stand for bytes, in the order of CLIP's vocabulary: printable Latin-1 first.
  printable = "".join(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]))
  symbols = [*printable, *map(chr, range(256, 512 - len(printable)))]
  tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), _SOT, _EOT]
  return models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=list(merges),
    end_of_word_suffix="</w>",
    unk_token=_EOT,
  )


def _transformers_backend(model) -> Tokenizer:
  """The pipeline of transformers' CLIPTokenizer around a BPE model."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

  backend = Tokenizer(model)
  backend.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_TRANSFORMERS_PATTERN), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (_SOT, _EOT)])
  backend.post_processor = processors.RobertaProcessing(
    (_EOT, backend.token_to_id(_EOT)),
    (_SOT, backend.token_to_id(_SOT)),
    trim_offsets=False,
    add_prefix_space=False,
  )
  return backend


def clean_original(text: str) -> str:
  """The original's cleaning: ftfy, HTML entities unescaped twice, whitespace collapsed, lower case."""
  import ftfy

  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


UNKNOWN = "<|unknown|>"  # what a pruned vocabulary has for all that it cannot spell


class ClipTokenizer:
  """CLIP's tokenizer with the cleaning, padding and context length of a profile.

  Attributes:
    profile: decides `text_cleaning`, `pad_token_id` and `context_length`.
    sot_token_id, eot_token_id: what every phrase starts and ends with.
    vocab_size: number of ids, special tokens included.
  """

  def __init__(self, backend: Tokenizer | None = None, profile: str | Profile = "original"):
    """Wraps a `tokenizers.Tokenizer` that holds a CLIP-like BPE model; None: the bundled public CLIP table.

    Under text_cleaning="transformers" the backend's own normaliser and pre-tokenizer run; under "original"
    only its vocabulary and merges are used.

    Raises:
      ValueError: the backend has no start and end token, or `profile.pad_token_id` is not one of its ids.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    self.profile = profile = Profile.named(profile)
    if backend is None:
      backend = _transformers_backend(_bundled_model())
    backend.no_padding()
    backend.no_truncation()
    self._saved = backend
    self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
    self.sot_token_id = self._special_id(backend, _SOT, _ORIGINAL_SPECIALS[0])
    self.eot_token_id = self._special_id(backend, _EOT, _ORIGINAL_SPECIALS[1])
    if not 0 <= profile.pad_token_id < self.vocab_size:
      raise ValueError(
        f"profile.pad_token_id is {profile.pad_token_id}, but the tokenizer has {self.vocab_size} ids; "
        "give a profile that fits: dataclasses.replace(profile, pad_token_id=...)"
      )
    if profile.text_cleaning == "original":
      # A fresh Tokenizer around the same model: "<|startoftext|>" is ordinary text to the original.
      self._split = pre_tokenizers.Split(Regex(_ORIGINAL_PATTERN), behavior="removed", invert=True)
      backend = Tokenizer(backend.model)
      backend.pre_tokenizer = pre_tokenizers.Sequence(
        [self._split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
      )
      self._specials = dict(zip(_ORIGINAL_SPECIALS, (self.sot_token_id, self.eot_token_id)))
    self._backend = backend

  @property
  def pruned(self) -> bool:
    """Whether the vocabulary is one of `sam3lt_jax.pruning`, which cannot spell every word."""
    return self._saved.token_to_id(UNKNOWN) is not None

  @staticmethod
  def _special_id(backend: Tokenizer, *names: str) -> int:
    for name in names:
      if (token_id := backend.token_to_id(name)) is not None:
        return token_id
    raise ValueError(
      f"the tokenizer has none of the tokens {', '.join(names)}; a CLIP vocabulary is expected"
    )

  @classmethod
  def from_file(cls, path: str | os.PathLike, profile: str | Profile = "original") -> ClipTokenizer:
    """Reads a `tokenizer.json`, or the one in a directory; a custom (pruned) vocabulary works as well.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is not a tokenizer of the `tokenizers` package, or not a CLIP-like one.
    """
    from tokenizers import Tokenizer

    path = os.fspath(path)
    if os.path.isdir(path):
      path = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(path):
      raise FileNotFoundError(f"no tokenizer at {path}")
    try:
      backend = Tokenizer.from_file(path)
    except Exception as e:  # the package raises bare Exception
      raise ValueError(f"{path} is not a tokenizer.json that the tokenizers package can read: {e}") from e
    return cls(backend, profile)

  @classmethod
  def of_json(cls, text: str, profile: str | Profile = "original") -> ClipTokenizer:
    """What `to_json` gave."""
    from tokenizers import Tokenizer

    return cls(Tokenizer.from_str(text), profile)

  def save(self, path: str | os.PathLike) -> None:
    """Writes `tokenizer.json` as transformers reads it; a directory gets the file's usual name."""
    path = os.fspath(path)
    self._saved.save(os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path)

  def to_json(self) -> str:
    """What `save` writes."""
    return self._saved.to_str()

  def encode(self, text: str) -> list[int]:
    """One phrase to its ids, from the start to the end token, neither cut nor padded."""
    if not isinstance(text, str):
      raise ValueError(f"text must be a string, got {type(text).__name__}")
    if self.profile.text_cleaning == "original":
      ids = self._encode_original(clean_original(text))
    else:
      # A lone surrogate cannot be handed to the tokenizers package; ftfy, too, makes it U+FFFD.
      text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
      ids = self._backend.encode(text, add_special_tokens=False).ids
    return [self.sot_token_id, *ids, self.eot_token_id]

  def _encode_original(self, text: str) -> list[int]:
    if "_of_text>" not in text:
      return self._backend.encode(text, add_special_tokens=False).ids
    # Not as added tokens: those are found anywhere, the original's only where its pattern ends a word.
    ids = []
    for piece, _ in self._split.pre_tokenize_str(text):
      if piece in self._specials:
        ids.append(self._specials[piece])
      else:
        ids += self._backend.encode(piece, add_special_tokens=False).ids
    return ids

  def __call__(
    self, text: str | Sequence[str], truncation: bool = True, context_length: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Phrases to padded ids.

    Args:
      text: a phrase or a sequence of P phrases. An empty phrase is the start and the end token alone, as in
        both references.
      truncation: a phrase of more than `context_length` tokens is cut, its last id replaced by the end token,
        with a `UserWarning` that names it. False: all rows are padded to the longest instead, as
        transformers' processor does (the model was not trained on that).
      context_length: overrides the profile's.

    Returns:
      (input_ids, attention_mask): both int32 [P, T], T = context_length (or the longest row, if longer); the
      mask is 1 for tokens and 0 for padding. With a padding id that is an ordinary token, as the original's 0
      ("!") is, that id *inside* a phrase counts as padding under text_cleaning="original": the original looks
      at the ids alone.

    Raises:
      ValueError: something else than strings, or no phrase at all.
    """
    phrases = [text] if isinstance(text, str) else list(text)
    if not phrases:
      raise ValueError("text must hold at least one phrase, got an empty sequence")
    length = self.profile.context_length if context_length is None else int(context_length)
    if length < 2:
      raise ValueError(f"context_length must be at least 2, got {length}")
    rows = [self.encode(phrase) for phrase in phrases]
    for i, row in enumerate(rows):
      if truncation and len(row) > length:
        phrase = phrases[i] if len(phrases[i]) <= 200 else phrases[i][:197] + "..."
        warn(f"text {phrase!r} has {len(row)} tokens, the model reads {length}: the rest was cut off")
        rows[i] = [*row[: length - 1], self.eot_token_id]
    length = max(length, max(map(len, rows)))
    pad = self.profile.pad_token_id
    input_ids = np.full((len(rows), length), pad, np.int32)
    attention_mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
      input_ids[i, : len(row)] = row
      attention_mask[i, : len(row)] = 1
    if self.profile.text_cleaning == "original" and pad not in (self.sot_token_id, self.eot_token_id):
      attention_mask = (input_ids != pad).astype(np.int32)
    return input_ids, attention_mask
