"""`sam3lt app`: a local page to point at things. `session` is what it does, `page` what is seen of it."""
