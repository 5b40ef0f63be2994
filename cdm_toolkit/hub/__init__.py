"""Tokenizers and models by alias, path or hub id: the only place that loads through transformers."""
