"""What happens outside the model: images, phrases and boxes to arrays, and the model's outputs to results.

`images` and `tokenizer` read what a user has, `processor` (`Sam3Processor`) puts them together as
transformers does, `postprocess` holds the pure functions behind its `post_process_*` methods. Nothing is
imported here: each of them stands alone.
"""
