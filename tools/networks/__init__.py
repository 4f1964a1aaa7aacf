"""The networks that can be exported. A new one is a row here, a file or folder beside this one, and a test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """module: has add_arguments(parser) for its own flags and exportable(args) -> Exportable (tools/export.py)."""

    module: str
    help: str


FAMILIES = {
    "kestrel": Family("matchanything_tools.networks.kestrel", "Kestrel: our own matcher across modalities"),
    "eloftr": Family("matchanything_tools.networks.eloftr", "MatchAnything-ELoFTR and EfficientLoFTR"),
    "aliked": Family("matchanything_tools.networks.aliked", "ALIKED: t16, n16, n16rot, n32"),
    "dedode": Family("matchanything_tools.networks.dedode", "DeDoDe: detector L or B, descriptor B or G"),
    "roma": Family("matchanything_tools.networks.roma", "RoMa: MatchAnything, RoMa, GIM, MINIMA"),
}
