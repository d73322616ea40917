"""A small world to train in: drawn scenes of shapes, phrases about them, and the models that learn it.

scenes       draws: an image, its objects, exact masks
phrases      what can be asked for in words
data         questions about scenes (phrases, boxes) and training batches of them
models       configurations of the student and of its teacher, and their tokenizer
pretraining  what lies where: a start for the vision encoder
evaluation   held-out scenes, questions about them, and how well a model answers
"""
