"""A small world to train in: drawn scenes of shapes, and phrases about them. `sam3lt demo` writes one.

scenes       draws: an image, its objects, exact masks
phrases      what can be asked for in words

What trained the bundled model in it is `examples/shapes`.
"""
