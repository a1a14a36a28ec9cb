"""The schema of a data set: which features exist, on which side, of which kind; TencentGR's is built in.

Feature ids, widths and action codes live here and nowhere else. Must not read data other than schema.json.
Source of the built-in schema: TencentGR-1M / -10M (arXiv 2604.04976).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError

EXPOSURE, CLICK, CONVERSION = 0, 1, 2
ACTION_NAMES = ("exposure", "click", "conversion")
NUM_ACTION_TYPES = len(ACTION_NAMES)
ANY_ACTION = NUM_ACTION_TYPES  # of a wanted action: none in particular

SIDES = ("user", "item")
KINDS = ("single", "multi", "embedding")


@dataclass(frozen=True)
class Feature:
    """One feature column.

    id: its name in the files, as a string ("100").
    side: "user" or "item".
    kind: "single" (one value), "multi" (a list of values) or "embedding" (a dense vector, items only).
    width: length of the vector; embeddings only.
    cardinality: the largest value where known, else 0 (taken from the data). Values count from 1; 0 is missing.
    name: what a person calls it.
    """

    id: str
    side: str
    kind: str
    width: int = 0
    cardinality: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        where = f"feature {self.id!r}"
        if not self.id or "/" in self.id or self.id.startswith("."):
            raise UserError(f"{where}: an id is a non-empty string without '/' or a leading '.'.")
        if self.side not in SIDES:
            raise UserError(f"{where}: side is {self.side!r}; expected one of {', '.join(SIDES)}.")
        if self.kind not in KINDS:
            raise UserError(f"{where}: kind is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        if self.kind == "embedding" and (self.width <= 0 or self.side != "item"):
            raise UserError(
                f"{where}: an embedding belongs to an item and has a width above 0; found side {self.side!r}, width {self.width}."
            )
        if self.cardinality < 0:
            raise UserError(f"{where}: cardinality is {self.cardinality}; expected 0 (unknown) or more.")

    @classmethod
    def from_row(cls, row: object) -> Feature:
        """A feature of an object of schema.json; UserError where a key or a type is wrong."""
        allowed = {"id", "side", "kind", "width", "cardinality", "name"}
        if not isinstance(row, dict) or not {"id", "side", "kind"} <= set(row) <= allowed:
            raise UserError(f"a feature needs id, side and kind, and may have width, cardinality, name; found {row!r:.200}.")
        if not _is_whole(row["id"]) and not isinstance(row["id"], str):
            raise UserError(f"feature {row['id']!r:.80}: an id is a non-empty string without '/' or a leading '.'.")
        for key in ("width", "cardinality"):
            if not _is_whole(row.get(key, 0)):
                raise UserError(f"feature {row['id']!r}: {key} is {row[key]!r:.80}; expected a whole number.")
        if not isinstance(row.get("name", ""), str):
            raise UserError(f"feature {row['id']!r}: name is {row['name']!r:.80}; expected a text.")
        return cls(**(row | {"id": str(row["id"])}))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


@dataclass(frozen=True)
class Schema:
    """The features of a data set in a fixed order, and whether its events carry real times (seconds since 1970)."""

    features: tuple[Feature, ...]
    has_time: bool = True
    _by_id: dict[str, Feature] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for feature in self.features:
            if feature.id in self._by_id:
                raise UserError(f"feature {feature.id!r} is listed twice in the schema; ids are unique.")
            self._by_id[feature.id] = feature

    def __getitem__(self, feature_id: str) -> Feature:
        return self._by_id[feature_id]

    def __contains__(self, feature_id: str) -> bool:
        return feature_id in self._by_id

    def select(self, side: str, kind: str) -> tuple[Feature, ...]:
        """The features of one side and kind, in the schema's order."""
        return tuple(f for f in self.features if f.side == side and f.kind == kind)

    @property
    def embeddings(self) -> tuple[Feature, ...]:
        return self.select("item", "embedding")

    def to_dict(self) -> dict:
        rows = []
        for f in self.features:
            row: dict = {"id": f.id, "side": f.side, "kind": f.kind}
            row["width" if f.kind == "embedding" else "cardinality"] = f.width if f.kind == "embedding" else f.cardinality
            rows.append(row | {"name": f.name})
        return {"has_time": self.has_time, "features": rows}

    @classmethod
    def from_dict(cls, tree: object, where: str = "schema.json") -> Schema:
        """Build a schema from `to_dict`'s form; UserError names what is wrong in `where`."""
        if not isinstance(tree, dict) or not isinstance(tree.get("features"), list):
            found = "an object without a list of features" if isinstance(tree, dict) else "null" if tree is None else type(tree).__name__
            raise UserError(f'{where}: expected {{"has_time": true, "features": [...]}}, found {found}.')
        try:
            features = [Feature.from_row(row) for row in tree["features"]]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        has_time = tree.get("has_time", True)
        if not isinstance(has_time, bool):
            raise UserError(f"{where}: has_time is {has_time!r}; expected true or false.")
        try:
            return cls(tuple(features), has_time)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def load(cls, data_path: Path) -> Schema:
        """The schema of a data folder: its schema.json, else TencentGR's."""
        path = Path(data_path) / "schema.json"
        if not path.exists():
            return TENCENT_GR
        try:
            tree = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin a file with a mark
            return cls.from_dict(tree, str(path))
        except UserError as error:
            reason = str(error)
        except (ValueError, RecursionError) as error:
            reason = f"{path}: not readable as JSON: {error}."
        raise UserError(f"{reason}\nMend it, or remove it to use TencentGR's schema.")


def _tencent_gr() -> Schema:
    # Cardinalities are the larger of 1M's and 10M's; they shape synthetic data only. The store takes the real ones from the data.
    item_single = {100: 6, 101: 53, 102: 173_463, 112: 30, 114: 33, 115: 988, 116: 20, 117: 558,
                   118: 1_636, 119: 4_950, 120: 4_045, 121: 5_041_300, 122: 90_919}  # fmt: skip
    user_single = {103: 86, 104: 2, 105: 7, 109: 3}
    user_multi = {106: 14, 107: 19, 108: 4, 110: 2}
    widths = {81: 32, 82: 1024, 83: 3584, 84: 4096, 85: 3584, 86: 3584}
    rows = [Feature(str(i), "item", "single", cardinality=c) for i, c in item_single.items()]
    rows += [Feature(str(i), "user", "single", cardinality=c) for i, c in user_single.items()]
    rows += [Feature(str(i), "user", "multi", cardinality=c) for i, c in user_multi.items()]
    rows += [Feature(str(i), "item", "embedding", width=w) for i, w in widths.items()]
    return Schema(tuple(rows))


TENCENT_GR = _tencent_gr()
# Present in the competition's files and dropped by the organisers; ignored without a warning.
IGNORED_FEATURES = frozenset({"111"})
