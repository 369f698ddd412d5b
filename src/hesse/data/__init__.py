"""Text, or ready token ids, from where a person points to; and the samples that are cut from them."""

from hesse.data.samples import Samples, load_tokenizer, read_samples

__all__ = ["Samples", "load_tokenizer", "read_samples"]
