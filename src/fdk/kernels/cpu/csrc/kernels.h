// The kernels, once, as templates over an instruction set. Each unit includes this file after defining its traits;
// everything has internal linkage, because the units are compiled with different flags.
//
// Traits I (see generic.cpp for the plainest example):
//   W                          dword lanes of a vector: 4, 8 or 16
//   vf, vi                     W float32, W uint32
//   load, shr<S>, shl<S>, and_mask, or_and(a, b, mask) = a | (b & mask), pick(a, b, mask) = (a & ~mask) | (b & mask)
//   Values<B>                  values of a table: pair<PLACE>(codes, even, odd) looks up the B bits of both halves that
//                              begin at bit B * PLACE; PLACE < SHARE, the codes that are left in one shifted word
//   zero, add, sub, mul, fma(a, b, c) = a * b + c, fnma(a, b, c) = c - a * b, broadcast(float*)
//   floats(p, dtype), bytes(p) W values of a dtype or uint8, as float32
//   store(p, dtype, v, lanes)  first `lanes` lanes, rounded once to nearest even
#pragma once
#include "activations.h"
#include "dequantise.h"
#include "direct.h"
#include "float_path.h"
#include "nested.h"
#include "panels.h"
#include "probes.h"
#include "sparse.h"
