"""What is said where transformers will find other things than the model that is saved for it."""

import dataclasses
import warnings

import pytest

from sam3lt_jax import save_pretrained
from sam3lt_jax.checkpoints.save import OtherRules, transformers_note
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.training.outcome import write_outcome
from sam3lt_jax.training.rules import fitting, saved_config
from tests import tiny

THEIRS = Profile.transformers()


def test_rules_that_decide_what_is_found_are_named_with_what_to_do():
  note = transformers_note(Sam3LiteTextConfig.s0("original"))
  for part in ("pad_token_id 0 and not 49407", "geometry_cls 'always'", "context_length 16 and not 32",
               "sam3lt finetune --profile transformers"):  # fmt: skip
    assert part in note
  assert "\n" not in note and transformers_note(Sam3LiteTextConfig.s0("transformers")) is None


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"geometry_cls": "with_any_boxes"}, None),  # transformers' own, in batches
    ({"score_threshold": 0.5, "training_dropout": "original", "vit_layer_norm_eps": 1e-5}, None),
    ({"context_length": 16}, "context_length"),
    ({"position_policy": "slice"}, "position_policy"),
  ],
)
def test_a_mixture_of_rules(changes, said):
  config = Sam3LiteTextConfig.s0().replace(profile=dataclasses.replace(THEIRS, **changes))
  note = transformers_note(config)
  assert note is None if said is None else said in note


def test_a_table_of_all_32_rows_is_not_resampled_and_a_pruned_vocabulary_has_its_own_padding():
  profile = dataclasses.replace(THEIRS, position_policy="slice", pad_token_id=24)
  config = Sam3LiteTextConfig.s0().replace(profile=profile)
  text = dataclasses.replace(config.text, vocab_size=25, max_position_embeddings=32)
  assert transformers_note(config.replace(text=text)) is None


def test_saving_says_so_once(tmp_path):
  model, variables = tiny.load(tiny.config())
  with pytest.warns(OtherRules, match=f"^{tmp_path}/a: transformers will find other things"):
    save_pretrained(tmp_path / "a", model, variables, format="transformers")
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    save_pretrained(tmp_path / "b", model, variables)  # our own format keeps the rules
    said = []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write_outcome(tmp_path, model, variables, {}, name="x", title="x", report=said.append)
  assert not [w for w in caught if issubclass(w.category, OtherRules)]
  assert [line for line in said if line.startswith(f"{tmp_path}/transformers: transformers will find")]


def test_a_profile_fits_the_vocabulary_of_the_checkpoint():
  config = saved_config("shapes")
  shapes = fitting("transformers", config)
  assert shapes == dataclasses.replace(THEIRS, pad_token_id=24)  # the end token of its 25
  assert fitting("original", config).context_length == 16
  assert fitting("transformers", saved_config("random:tiny")) == THEIRS


def test_a_file_beside_another_models_configuration_tells_its_own(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  (tmp_path / "sam3_litetext.pt").write_bytes(b"")
  assert saved_config(tmp_path / "sam3_litetext.pt") is None
