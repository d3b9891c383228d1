"""kvjax: which KV cache should a model have? Variants, codecs and conversions, measured."""
