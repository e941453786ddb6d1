"""Text from a model: `generator` continues prompts, with the loops of `decode` (sampling) and
`beam`; `score` says how likely given texts are; `chat` turns messages into prompts.
"""
