"""Which tile configuration the decode kernel takes for a weight and up to 64 tokens: rules, as measured on an H200.

choose.py       the whole story: candidates by cluster size, warps, ring, score, then refinements; begin there
case.py         what a configuration is chosen for, and what each CTA then has of the weight
lookups.py      warps of products of 16-bit values;  digits.py  integer products of one token: where they pay, warps
rings.py        stages of a warp's ring;  digit_rings.py  those of integer products
fill.py         which of these shared memory allows, how scales, codes and sums come to a CTA
indices.py      codes as the indices of sparse products
blocks_in_turn.py  integer products at all other sizes;  even_shares.py  look-ups where shares of a weight are uneven
many_digits.py  integer products of two and four tokens;  two_places.py  those of small weights, beside the next launch
many_tokens.py  wide tables, half blocks, fewer instructions: two to sixteen tokens
activations.py  pieces in which activations of eight and sixteen tokens come
places.py       places on a multiprocessor: who is alone, who holds one;  operands made ahead there
chains.py       all of it that differs in the chain of a decoding step
"""

from fdk.kernels.cuda.decode_choice.case import token_tile
from fdk.kernels.cuda.decode_choice.choose import choose_config

__all__ = ["choose_config", "token_tile"]
