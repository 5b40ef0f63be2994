"""The bytes of each token id, the byte spans of tokens in a text, and the differences between two tokenizers."""
