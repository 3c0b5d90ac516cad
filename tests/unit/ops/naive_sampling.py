"""One position by sorting, in Python's doubles: what both implementations must agree with."""

from __future__ import annotations

import math

import torch

from d2f.ops.sampling import MARGIN, NEG_ENTROPY, Sampling, gumbel_noise


def choose(
    logits: list[float],
    *,
    mask: int | None = None,
    code: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    noise: list[float] | None = None,
) -> tuple[int, float, float]:
    """Token, probability and rank; `logits` are divided by the temperature already."""
    tokens = range(len(logits))
    candidates = [t for t in tokens if t != mask]
    kept = _kept(logits, top_k, top_p)
    best = max(logits[t] for t in candidates)
    kept |= {t for t in candidates if logits[t] == best}
    kept = {t for t in kept if min_p == 0 or math.exp(logits[t] - best) >= min_p}
    weight = {t: math.exp(logits[t] - max(logits)) for t in kept}
    total = sum(weight.values())
    p = {t: weight[t] / total for t in kept}
    score = {t: logits[t] + (noise[t] if noise else 0.0) for t in kept if t != mask}
    token = max(sorted(score), key=score.__getitem__)
    rank = p[token]
    if code == MARGIN:
        first, second = sorted([p[t] for t in score] + [0.0], reverse=True)[:2]
        rank = first - second
    if code == NEG_ENTROPY:
        rank = sum(x * math.log(x) for x in p.values() if x > 0)
    return token, p[token], rank


def _kept(logits: list[float], top_k: int, top_p: float) -> set[int]:
    values = sorted(logits, reverse=True)
    if top_k:
        values = [v for v in values if v >= values[min(top_k, len(values)) - 1]]
    total = sum(math.exp(v - values[0]) for v in values)
    mass, last = 0.0, values[-1]
    if top_p < 1:
        for last in values:
            mass += math.exp(last - values[0])
            if mass >= top_p * total:
                break
    return {t for t, v in enumerate(logits) if v >= last}


def choose_all(
    logits_MV: torch.Tensor,
    mask: int | None,
    codes: list[int] | None = None,
    sampling: Sampling | None = None,
) -> list[tuple[int, float, float]]:
    """`choose` for each position."""
    rows = []
    for row, logits_V in enumerate(logits_MV):
        code = codes[row] if codes else 0
        temperature = 0.0 if sampling is None else float(sampling.temperature_M[row])
        if sampling is None or temperature == 0:
            rows.append(choose(logits_V.tolist(), mask=mask, code=code))
            continue
        one = slice(row, row + 1)
        noise_1V = gumbel_noise(
            sampling.seed_M[one], sampling.position_M[one], sampling.step_M[one], len(logits_V)
        )
        rows.append(
            choose(
                (logits_V / sampling.temperature_M[row]).tolist(),
                mask=mask,
                code=code,
                noise=noise_1V[0].tolist(),
                top_k=int(sampling.top_k_M[row]) if sampling.truncated else 0,
                top_p=float(sampling.top_p_M[row]) if sampling.truncated else 1.0,
                min_p=0.0 if sampling.min_p_M is None else float(sampling.min_p_M[row]),
            )
        )
    return rows
