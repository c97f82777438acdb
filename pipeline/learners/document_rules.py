"""Decisions by document: from scores and calibrated log-odds to tags, before the rules between labels.

The document is plain JSON with all keys of `DocumentRule`; a run keeps it as decision.json beside its thresholds.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from pipeline.config import CalibrateConfig, Section
from pipeline.kernels.documents import keep_most_probable, samples_f1, tag_at_least_one

BY_DOCUMENT = ("rcut", "samples_f1")  # rules that need the scores of a whole document

Mask = NDArray[np.bool_]


class DocumentRule(Section):
    """How the tags of a document are chosen; the defaults leave it to the thresholds."""

    rule: Literal["threshold", "rcut", "samples_f1"] = "threshold"
    k: PositiveInt = 5  # of rcut
    if_undefined: Literal[0, 1] = 0  # of samples_f1: F1 of a document with neither tags nor gold
    at_least_one: bool = False
    min_gap: float = Field(0.0, ge=0)
    at_most: int = Field(0, ge=0)

    @classmethod
    def of(cls, cfg: CalibrateConfig, if_undefined: Literal[0, 1]) -> "DocumentRule":
        """From the settings; what a rule does not use stands there with its default."""
        by_document = cfg.rule if cfg.rule in BY_DOCUMENT else "threshold"
        return cls(
            rule=by_document,  # type: ignore[arg-type]
            at_least_one=cfg.at_least_one,
            at_most=cfg.at_most,
            **({"k": cfg.k} if by_document == "rcut" else {}),
            **({"if_undefined": if_undefined} if by_document == "samples_f1" else {}),
            **({"min_gap": cfg.min_gap} if cfg.at_least_one else {}),
        )

    @classmethod
    def parsed(cls, content: bytes, place: object) -> "DocumentRule":
        """From the bytes of decision.json.  Raises DataError, which names `place`, where they are something else."""
        return cls.of_bytes(content, place, "the decision by document")

    @property
    def plain(self) -> bool:
        """Nothing but thresholds."""
        return self.rule == "threshold" and not self.at_least_one and not self.at_most

    def apply(self, above: Mask, Z: NDArray, may: Mask) -> Mask:
        """Tags (m, L) bool.

        Args:
            above (m, L): labels whose score reaches their threshold; overwritten where the rule goes by document.
            Z (m, L) float64: calibrated log-odds.
            may (L,): labels that may be tagged at all.
        """
        if self.rule == "rcut":
            above[:] = may & (-np.inf < Z)
            keep_most_probable(above, Z, self.k)
        elif self.rule == "samples_f1":
            above = samples_f1(Z, may, float(self.if_undefined))
        if self.at_least_one:
            tag_at_least_one(above, Z, may, self.min_gap)
        if self.at_most:
            keep_most_probable(above, Z, self.at_most)
        return above

    def conventions(self) -> dict[str, str]:
        """What the numbers depend on, in words; empty where nothing goes by document."""
        if self.plain:
            return {}
        words = {
            "threshold": "a label is tagged where its score reaches its threshold",
            "rcut": f"the {self.k} labels of largest calibrated probability are tagged",
            "samples_f1": "as many of the most probable labels are tagged as give the largest expected F1 of the "
            f"document, labels taken as independent, 0/0 as {self.if_undefined}",
        }[self.rule]
        if self.at_least_one:
            words += "; a document without a tag gets its most probable label"
            words += f" where that leads the second by {self.min_gap:g} in log-odds" if self.min_gap else ""
        if self.at_most:
            words += f"; at most {self.at_most} tags stay, the most probable"
        return {"decision": f"{words}; ties: smaller label id; labels with threshold null are never tagged"}
