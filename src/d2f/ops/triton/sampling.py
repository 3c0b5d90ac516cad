"""The choice of tokens in one pass over the logits, for any vocabulary.

Shapes: M positions, V vocabulary, C chunks of a vocabulary.

Each program reads one chunk of one position's logits; a second, small kernel merges the chunks.
Chunks are of a fixed size, so that a position's result never depends on what else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2f.ops import sampling as twin
from d2f.ops.sampling import Choice, Sampling

CHUNK = 4096
CHUNK_WARPS = 8
THRESHOLD_BLOCK = 8192
THRESHOLD_WARPS = 16

_MARGIN = tl.constexpr(twin.MARGIN)
_NEG_ENTROPY = tl.constexpr(twin.NEG_ENTROPY)
_NUM_PARTIALS = 6


def choose_tokens(
    logits_MV: Tensor,
    *,
    mask_token_id: int | None,
    confidence_M: Tensor | None = None,
    sampling: Sampling | None = None,
    needed_M: Tensor | None = None,
) -> Choice:
    """Do as `d2f.ops.sampling.choose_tokens`; the last dimension of the logits is contiguous."""
    num_positions, vocab_size = logits_MV.shape
    assert logits_MV.stride(1) == 1
    device, row_stride = logits_MV.device, logits_MV.stride(0)
    mask_token = -1 if mask_token_id is None else mask_token_id
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    choice = Choice(
        torch.empty(num_positions, dtype=torch.int64, device=device),
        torch.empty(num_positions, dtype=torch.float32, device=device),
        torch.empty(num_positions, dtype=torch.float32, device=device),
    )
    partial_FMC = torch.empty(
        (_NUM_PARTIALS, num_positions, num_chunks), dtype=torch.float32, device=device
    )
    token_MC = torch.empty((num_positions, num_chunks), dtype=torch.int32, device=device)
    temperature_M = key_M = threshold_M = None
    if sampling is not None:
        temperature_M = sampling.temperature_M
        key_M = (sampling.seed_M, sampling.position_M, sampling.step_M)
        if sampling.truncated:
            threshold_M = torch.empty(num_positions, dtype=torch.float32, device=device)
            _threshold_kernel[(num_positions,)](
                logits_MV, row_stride, mask_token, needed_M, temperature_M, sampling.top_k_M,
                sampling.top_p_M, None if sampling.min_p_M is None else sampling.min_p_M.log(),
                threshold_M,
                VOCAB=vocab_size, BLOCK=THRESHOLD_BLOCK, num_warps=THRESHOLD_WARPS,
            )  # fmt: skip
    seed_M, position_M, step_M = key_M or (None, None, None)
    _chunk_kernel[(num_positions, num_chunks)](
        logits_MV, row_stride, vocab_size, mask_token, needed_M, confidence_M, temperature_M,
        seed_M, position_M, step_M, threshold_M, partial_FMC, token_MC,
        CHUNK=CHUNK, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    _merge_kernel[(num_positions,)](
        logits_MV, row_stride, needed_M, confidence_M, temperature_M, partial_FMC, token_MC,
        num_chunks, *choice, BLOCK=triton.next_power_of_2(num_chunks), num_warps=1,
    )  # fmt: skip
    return choice


@triton.jit
def _chunk_kernel(
    logits_ptr, row_stride, vocab_size, mask_token, needed_ptr, confidence_ptr, temperature_ptr,
    seed_ptr, position_ptr, step_ptr, threshold_ptr, partial_ptr, token_ptr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute what one chunk of one position adds: the softmax's parts and the best candidate."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    if needed_ptr is not None:
        if tl.load(needed_ptr + row) == 0:
            return
    id_V = chunk * CHUNK + tl.arange(0, CHUNK)
    at_V = logits_ptr + row.to(tl.int64) * row_stride + id_V
    x_V = tl.load(at_V, mask=id_V < vocab_size, other=float("-inf")).to(tl.float32)
    candidate_V = tl.where(id_V == mask_token, float("-inf"), x_V)
    score_V = candidate_V
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            x_V = tl.div_rn(x_V, temperature)
            if threshold_ptr is not None:
                # A NaN stays, so that the probability shows it.
                x_V = tl.where(x_V < tl.load(threshold_ptr + row), float("-inf"), x_V)
            candidate_V = tl.where(id_V == mask_token, float("-inf"), x_V)
            seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
            score_V = candidate_V + _gumbel(seed, position, tl.load(step_ptr + row), id_V)

    score, index = tl.max(score_V, axis=0, return_indices=True)
    largest = tl.max(x_V, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_V = tl.exp(x_V - base)
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    at = row.to(tl.int64) * tl.num_programs(1) + chunk
    partial_ptr += at
    # Comparisons with NaN may lead astray.
    tl.store(token_ptr + at, tl.minimum(chunk * CHUNK + index, vocab_size - 1))
    tl.store(partial_ptr, largest)
    tl.store(partial_ptr + plane, tl.sum(weight_V, axis=0))
    tl.store(partial_ptr + 2 * plane, score)
    if confidence_ptr is not None:
        confidence = tl.load(confidence_ptr + row)
        if confidence == _MARGIN:
            first, index = tl.max(candidate_V, axis=0, return_indices=True)
            others_V = tl.where(id_V == chunk * CHUNK + index, float("-inf"), candidate_V)
            tl.store(partial_ptr + 3 * plane, first)
            tl.store(partial_ptr + 4 * plane, tl.max(others_V, axis=0))
        if confidence == _NEG_ENTROPY:
            product_V = weight_V * tl.where(weight_V == 0, 0.0, x_V - base)
            tl.store(partial_ptr + 5 * plane, tl.sum(product_V, axis=0))


@triton.jit
def _merge_kernel(
    logits_ptr, row_stride, needed_ptr, confidence_ptr, temperature_ptr, partial_ptr, token_ptr,
    num_chunks, chosen_ptr, probability_ptr, rank_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if needed_ptr is not None:
        if tl.load(needed_ptr + row) == 0:
            tl.store(chosen_ptr + row, 0)
            tl.store(probability_ptr + row, 0.0)
            tl.store(rank_ptr + row, 0.0)
            return
    chunk_C = tl.arange(0, BLOCK)
    inside_C = chunk_C < num_chunks
    plane = tl.num_programs(0).to(tl.int64) * num_chunks
    start = row.to(tl.int64) * num_chunks
    at_C = partial_ptr + start + chunk_C
    largest_C = tl.load(at_C, mask=inside_C, other=float("-inf"))
    sum_C = tl.load(at_C + plane, mask=inside_C, other=0.0)
    score_C = tl.load(at_C + 2 * plane, mask=inside_C, other=float("-inf"))

    _, best = tl.max(score_C, axis=0, return_indices=True)
    token = tl.load(token_ptr + start + tl.minimum(best, num_chunks - 1))
    value = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token).to(tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            value = tl.div_rn(value, temperature)
    largest = tl.max(largest_C, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_C = tl.exp(largest_C - base)
    total = tl.sum(weight_C * sum_C, axis=0)
    probability = tl.exp(value - largest) / total
    rank = probability
    if confidence_ptr is not None:
        confidence = tl.load(confidence_ptr + row)
        if confidence == _MARGIN:
            first_C = tl.load(at_C + 3 * plane, mask=inside_C, other=float("-inf"))
            second_C = tl.load(at_C + 4 * plane, mask=inside_C, other=float("-inf"))
            first, winner = tl.max(first_C, axis=0, return_indices=True)
            others_C = tl.where(chunk_C == winner, second_C, first_C)
            second = tl.max(others_C, axis=0)
            rank = (tl.exp(first - base) - tl.exp(second - base)) / total
        if confidence == _NEG_ENTROPY:
            product_C = tl.load(at_C + 5 * plane, mask=inside_C, other=0.0)
            product_C += sum_C * tl.where(weight_C == 0, 0.0, largest_C - base)
            rank = tl.sum(weight_C * product_C, axis=0) / total - tl.log(total)
    tl.store(chosen_ptr + row, token)
    tl.store(probability_ptr + row, probability)
    tl.store(rank_ptr + row, rank)


@triton.jit
def _threshold_kernel(
    logits_ptr, row_stride, mask_token, needed_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    log_min_p_ptr, threshold_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least logit / temperature that is kept.

    Found on the logits themselves, since dividing keeps their order, by bisection on their bits,
    which takes a pass over the logits for each of the 32.
    """
    row = tl.program_id(0)
    if needed_ptr is not None:
        if tl.load(needed_ptr + row) == 0:
            return
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        logits_ptr += row.to(tl.int64) * row_stride
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        largest, best = _largest(logits_ptr, mask_token, VOCAB, BLOCK)
        end = _ordered(largest.to(tl.int32, bitcast=True)).to(tl.int64)
        least = tl.full([], float("-inf"), tl.float32)
        start = _ordered(least.to(tl.int32, bitcast=True)).to(tl.int64)
        if top_k > 0 and top_k < VOCAB:
            low, high = start, end
            while low < high:
                middle = low + (high - low + 1) // 2
                count = _count(logits_ptr, _value(middle), VOCAB, BLOCK)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count >= top_k, high, middle - 1)
            start = low
        if top_p < 1:
            scale = 1.0 / temperature
            wanted = top_p * _mass(logits_ptr, _value(start), largest, scale, VOCAB, BLOCK)
            low, high = start, end
            while low < high:
                middle = low + (high - low + 1) // 2
                mass = _mass(logits_ptr, _value(middle), largest, scale, VOCAB, BLOCK)
                low = tl.where(mass >= wanted, middle, low)
                high = tl.where(mass >= wanted, high, middle - 1)
            start = low
        kept = tl.div_rn(tl.minimum(_value(start), best), temperature)
        if log_min_p_ptr is not None:
            kept = tl.maximum(kept, tl.div_rn(best, temperature) + tl.load(log_min_p_ptr + row))
        tl.store(threshold_ptr + row, kept)


@triton.jit
def _largest(logits_ptr, mask_token, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, and the largest but the mask token's."""
    x_V = tl.full([BLOCK], float("-inf"), tl.float32)
    candidate_V = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        id_V = start + tl.arange(0, BLOCK)
        block_V = tl.load(logits_ptr + id_V, mask=id_V < VOCAB, other=float("-inf"))
        block_V = block_V.to(tl.float32)
        x_V = tl.maximum(x_V, block_V)
        candidate_V = tl.maximum(candidate_V, tl.where(id_V == mask_token, float("-inf"), block_V))
    return tl.max(x_V, axis=0), tl.max(candidate_V, axis=0)


@triton.jit
def _count(logits_ptr, threshold, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Count the logits that reach a threshold."""
    count_V = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        id_V = start + tl.arange(0, BLOCK)
        inside_V = id_V < VOCAB
        x_V = tl.load(logits_ptr + id_V, mask=inside_V, other=float("-inf")).to(tl.float32)
        count_V += (inside_V & (x_V >= threshold)).to(tl.int32)
    return tl.sum(count_V, axis=0)


@triton.jit
def _mass(logits_ptr, threshold, largest, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of the logits that reach a threshold."""
    mass_V = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        id_V = start + tl.arange(0, BLOCK)
        x_V = tl.load(logits_ptr + id_V, mask=id_V < VOCAB, other=float("-inf"))
        x_V = x_V.to(tl.float32)
        mass_V += tl.where(x_V >= threshold, tl.exp((x_V - largest) * scale), 0.0)
    return tl.sum(mass_V, axis=0)


@triton.jit
def _ordered(bits):
    """Turn a float's bits into an integer in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    return _ordered(ordered.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(seed, position, step, id_V):
    """Do as `d2f.ops.sampling.gumbel_noise`."""
    key = _mix(seed.to(tl.uint64, bitcast=True)) ^ position.to(tl.uint64, bitcast=True)
    key = _mix(_mix(key) ^ step.to(tl.uint64, bitcast=True))
    word_V = _mix(key ^ _mix(id_V.to(tl.uint64)))
    u_V = ((word_V & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return (-tl.log(-tl.log(u_V))).to(tl.float32)


@triton.jit
def _mix(word):
    """The finaliser of SplitMix64."""
    word = word + 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)
