"""Data: text or token ids from files and data sets, and samples cut from them."""

from hesse.data.samples import Samples, read_samples
from hesse.data.tokenizer import load_tokenizer, usable_tokenizer

__all__ = ["Samples", "load_tokenizer", "read_samples", "usable_tokenizer"]
