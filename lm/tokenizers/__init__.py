"""Tokenizers: bytes, SentencePiece and Hugging Face files, their special tokens and vectors."""
