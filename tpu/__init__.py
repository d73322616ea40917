"""Commands and scripts for TPU slices and GPU clusters, run from a checkout; see README.md here."""
