"""Tied weights as a codebook and indices, in memory and in a file.

A codebook has each value once, and the index of each slice is the number of its value in the codebook, as in `Deep
Compression <https://arxiv.org/abs/1510.00149>`_. In a file, an index takes as few bits as possible: one bit for two
shared values, five bits for thirty-two.

Files have the `safetensors <https://github.com/huggingface/safetensors>`_ format. Their metadata contain the ties and a
hash of every tensor. Instead of the entries of a parameter ``weight``, a file has

- ``weight.codebook``: the values of the members of each group, shape ``[entries, *slice]``;
- ``weight.indices``: the index of each slice's entry, or the number of entries for a free slice. Indices are packed
  into uint8, each in one bit or more, the lowest bit first. If blocks of consecutive slices always occur together, such
  as the subvectors of product quantization, each block has one index ``i`` and stands for the entries from ``i *
  block`` on; ``block`` is in the metadata, and the format of such a file is 2, which version 1.0.0 cannot read;
- ``weight.free``: the entries of the parameter that are in no group, in their order, if there are any;
- ``weight.groups`` and ``weight.scales``, only with scales: the group and the scale of each entry of the codebook.

Joined parameters have one codebook, under the name of the first parameter. If a parameter has several ties, the second
is stored under ``weight.1``, and so on.
"""

from tieopt.export.codebook import encode
from tieopt.export.model_file import load, load_ties, save, stream

__all__ = ["encode", "load", "load_ties", "save", "stream"]
