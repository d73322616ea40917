"""How good the results are: `cgf1` (SA-Co's metrics), `coco_ap` (COCO's), `run` (both, of a predictor on a
data set)."""
