"""Score a model: GSM8K, HumanEval, instruction following, bits per byte."""
