"""Tied weights as a codebook and indices, in memory and in a file.

Tied slices need not be stored one by one. A codebook has each value once, and an index says for each slice which entry
of the codebook it is: `Deep Compression <https://arxiv.org/abs/1510.00149>`_ stores k-means clusters in this way. In a
file an index takes as few bits as it can: one bit for two shared values, five bits for thirty-two.

Files have the `safetensors <https://github.com/huggingface/safetensors>`_ format. Their metadata contain the ties and a
hash of every tensor. Instead of the entries of a parameter ``weight``, a file has

- ``weight.codebook``: the values of the members of each group, shape ``[entries, *slice]``;
- ``weight.indices``: the index of each slice's entry, or the number of entries for a free slice. Indices are packed
  into uint8, each in one bit or more, the lowest bit first. Where blocks of consecutive slices always occur together,
  as the subvectors of product quantization, each block has one index ``i`` and stands for the entries from
  ``i * block`` on; ``block`` is in the metadata, and the format of such a file is 2, which version 1.0.0 cannot read;
- ``weight.free``: the entries of the parameter that are in no group, in their order, if there are any;
- ``weight.groups`` and ``weight.scales``, only with scales: the group and the scale of each entry of the codebook.

Joined parameters have one codebook, under the name of the first of them. If a parameter has several ties, the second is
stored under ``weight.1``, and so on.
"""

from tieopt.export.codebook import encode
from tieopt.export.model_file import load, load_ties, save, stream

__all__ = ["encode", "load", "load_ties", "save", "stream"]
