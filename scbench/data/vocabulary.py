"""The token table: gene → id, with the special tokens `<pad>`, `<cls>` and `<eoc>`; a JSON file {token: id}."""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from scbench.errors import UserError
from scbench.files import write_text

SPECIALS = ("<pad>", "<cls>", "<eoc>")


class Vocabulary:
    """A fixed mapping from tokens to ids.

    Parameters
    ----------
    tokens
        {token: id}, the specials included. Ids are distinct and not negative; they may have gaps.
    source
        What to call the vocabulary in an error.

    Raises
    ------
    UserError
        If the tokens are no such mapping.
    """

    def __init__(self, tokens: dict[str, int], source: str = "the vocabulary"):
        if not isinstance(tokens, dict) or not all(type(id_) is int for id_ in tokens.values()):
            raise UserError(f"{source} is not a JSON object {{token: id}} with whole numbers for ids.")
        by_id: dict[int, str] = {}
        for token, id_ in tokens.items():
            if not 0 <= id_ < 2**31:
                raise UserError(f"{source}: the id of {token!r} is {id_}, outside 0 … 2³¹−1.")
            if id_ in by_id:
                raise UserError(f"{source}: {by_id[id_]!r} and {token!r} share the id {id_}.")
            by_id[id_] = token
        missing = [special for special in SPECIALS if special not in tokens]
        if missing:
            raise UserError(f"{source} lacks the special token{'s' * (len(missing) > 1)} {', '.join(missing)}.")
        if len(tokens) == len(SPECIALS):
            raise UserError(f"{source} holds no gene.")
        self.tokens = {by_id[id_]: id_ for id_ in sorted(by_id)}
        self.size = max(by_id) + 1
        if self.size > 2 * len(tokens) + 1024:
            raise UserError(f"{source} gives {len(tokens)} tokens ids up to {self.size - 1}: number them without large gaps.")
        self.pad, self.cls, self.eoc = (tokens[special] for special in SPECIALS)

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.tokens) - len(SPECIALS)} genes, {self.fingerprint[:12]})"

    @cached_property
    def names(self) -> list[str]:
        """The token of each id, [size]; an id that nothing uses has the name ''."""
        names = [""] * self.size
        for token, id_ in self.tokens.items():
            names[id_] = token
        return names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def _json(self) -> str:
        return json.dumps(self.tokens, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def build(cls, keys: Iterable[str]) -> "Vocabulary":
        """The vocabulary of a set of genes: sorted keys get 0 … n−1, then `<pad>`, `<cls>`, `<eoc>` follow."""
        genes = sorted(set(keys) - set(SPECIALS))
        return cls({token: id_ for id_, token in enumerate([*genes, *SPECIALS])})

    @classmethod
    def load(cls, path: Path | str) -> "Vocabulary":
        """Read a JSON file {token: id}; UserError if it is not one."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"there is no vocabulary {path}.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the vocabulary {path} cannot be read: {error}.") from None

        def unique(pairs: list[tuple[str, object]]) -> dict:
            if len({token for token, _ in pairs}) < len(pairs):
                raise UserError(f"the vocabulary {path} names a token twice.")
            return dict(pairs)

        try:
            tokens = json.loads(text, object_pairs_hook=unique)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"the vocabulary {path} is not JSON: {error}.") from None
        return cls(tokens, f"the vocabulary {path}")

    def save(self, path: Path | str) -> None:
        """Write the JSON, ordered by id: the same vocabulary always gives the same bytes."""
        write_text(Path(path), self._json())
