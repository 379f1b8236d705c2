"""Objectives as configuration files name them."""

import math
import re

from bebop.losses.base import ChainLoss
from bebop.losses.cross_entropy import CrossEntropyLoss
from bebop.losses.e2e_tv import E2ETVLoss
from bebop.losses.expected_rounds import ExpectedRoundsLoss
from bebop.losses.kl import ForwardKLLoss, ReverseKLLoss
from bebop.losses.lk import LKAlphaLoss, LKHybridLoss
from bebop.losses.realised import RealisedE2ETVLoss
from bebop.losses.tv import TVLoss
from bebop.losses.weighted_sum import WeightedSumLoss

LOSSES: dict[str, type[ChainLoss]] = {
    "e2e_tv": E2ETVLoss,
    "realised_e2e_tv": RealisedE2ETVLoss,
    "expected_rounds": ExpectedRoundsLoss,
    "tv": TVLoss,
    "ce": CrossEntropyLoss,
    "kl": ForwardKLLoss,
    "reverse_kl": ReverseKLLoss,
    "lk_alpha": LKAlphaLoss,
    "lk_hybrid": LKHybridLoss,
}


def loss_by_name(text: str, **common) -> ChainLoss:
    """An objective from its name, or a weighted sum: "e2e_tv", "e2e_tv + 0.1 ce".

    Args:
        text: names from `LOSSES`, each with a weight above 0 before it (1 if none), joined by "+".
        **common: as for every `ChainLoss`.

    Raises:
        ValueError: an unknown name or something else that is not such a sum.
    """
    terms: list[tuple[float, type[ChainLoss]]] = []
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d*\.?\d+(?:e-?\d+)?)(?:\s+|\s*\*\s*))?(\w+)\s*", term)
        if match is None or match[2] not in LOSSES:
            raise ValueError(
                f"{term.strip()!r} is no objective; expected one of {', '.join(LOSSES)}, or a sum as 'e2e_tv + 0.1 ce'"
            )
        weight = 1.0 if match[1] is None else float(match[1])
        if not 0 < weight < math.inf:
            raise ValueError(f"{term.strip()!r} has weight {weight}; expected one above 0")
        terms.append((weight, LOSSES[match[2]]))
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1](**common)
    return WeightedSumLoss(terms=[(weight, loss()) for weight, loss in terms], **common)
