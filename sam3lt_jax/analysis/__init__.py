"""What a set of phrases asks of a text encoder: `prompts` (the report), `dimension`, `plots`."""
