"""A small world to train in: drawn scenes of shapes, phrases about them, and the models that learn it.

`scenes` draws, `phrases` says what is asked, `data` makes batches and held-out questions of both, `models`
holds the configurations of the bundled model and its teacher.
"""
