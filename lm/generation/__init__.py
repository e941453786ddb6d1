"""Text from a model: `generator` continues prompts, with the loops of `decode` (sampling) and
`beam`; `score` gives the log-probabilities of texts; `chat` turns messages into prompts.
"""
