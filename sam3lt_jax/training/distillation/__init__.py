"""Distillation of the text encoder: a small student learns to give the features of a large teacher.

`run.distill` does all of it; the parts can be used alone: `losses` (what is minimised), `teacher` and
`features` (what to learn from, computed on the fly or once), `student` (who learns, and where its weights
start), `step` (the loss as a function of parameters), `evaluate` (on phrases and on images), `text_part`
(splicing).
"""
