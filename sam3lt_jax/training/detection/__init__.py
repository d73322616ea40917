"""Training of the detector as set prediction: targets, matching, losses, LoRA and the fine-tuning run."""
