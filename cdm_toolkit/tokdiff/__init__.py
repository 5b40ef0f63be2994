"""Which bytes does an id stand for, where do they lie in a text, and how do two tokenizers differ?"""
