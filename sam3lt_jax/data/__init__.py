"""Data for training and evaluating the detector.

`records` says what a record is; `coco` and `saco` read annotation files into records (`load` either of them)
by what `annotations` (their entries), `numbers` and `rle` (masks) read and check; `augment` changes an image
together with its masks and boxes; `batches` makes the detector's batches of records. `prompts` reads files of
phrases.
"""
