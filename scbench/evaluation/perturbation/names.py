"""Names of perturbations: which genes (or drugs) one of them is made of."""

import re
from collections.abc import Container

CONTROL_WORDS = frozenset(["ctrl", "control"])  # whatever the case; the user's own name of the controls goes beside them


def is_control(name: str, control: str) -> bool:
    """Whether a name is what the user calls controls, alone or several times (`ctrl+ctrl`), whatever the case."""
    parts = {part.strip().lower() for part in re.split(r"[+,]", name)}
    return name.lower() == control.lower() or parts == {control.lower()}


def targets_of(name: str, control: str, genes: Container[str]) -> tuple[str, ...]:
    """The targets of `A`, `A+B`, `A,B`, `A_B`, `A+ctrl` or `A,ctrl`, each once, ascending; () for a control.

    A name that is a gene is never taken apart, and `_` parts a name only where it leaves nothing but genes and controls: many
    names of drugs and guides hold one.
    """
    words = CONTROL_WORDS | {control.lower()}
    if name.lower() in words:
        return ()
    if name in genes:
        return (name,)
    parts = [part.strip() for part in re.split(r"[+,]", name)]
    if len(parts) == 1:
        pieces = name.split("_")
        parts = pieces if all(piece in genes or piece.lower() in words for piece in pieces) else parts
    return tuple(sorted({part for part in parts if part and part.lower() not in words}))
