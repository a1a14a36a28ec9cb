"""Recipe for Amazon's 5-core review files, json or json.gz: one JSON object a line (reviewerID, asin, unixReviewTime).

A product file beside it, meta_NAME.json(.gz) for reviews_NAME_5.json(.gz) or NAME_5.json(.gz), gives categories, brand and
price. Its lines may be JSON or, as in the set of 2014, Python literals. Source: jmcauley.ucsd.edu/data/amazon.
"""

from __future__ import annotations

import ast
import math
from array import array
from pathlib import Path

import numpy as np
import orjson

from converters.raw import RawColumn, RawEvents, RawSet, RawTable, to_seconds
from converters.text import locate_record, numbered_lines, require_file
from errors import UserError

EXPECTED = "one JSON object a line with reviewerID, asin and unixReviewTime"


def read(source: Path) -> RawSet:
    """Read the reviews and, where it lies beside them, the product file. Reviews are streamed; their text is never kept."""
    path = require_file(source, f"a review file: {EXPECTED}")
    events, note = _read_reviews(path)
    notes = [note] if note else []
    names = _product_names(path)
    product_path = next((path.with_name(name) for name in names if path.with_name(name).exists()), None)
    if product_path is None:
        return RawSet(events, [], [*notes, f"no {' or '.join(names)} beside {path.name}: no item features"])
    table, skipped = _read_products(require_file(product_path, "one product a line"), set(events.raw_items))
    if skipped:
        notes.append(f"{skipped:,} products of {product_path.name} have no review and are ignored")
    return RawSet(events, [table], notes)


def _product_names(path: Path) -> list[str]:
    stem = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("reviews_").removesuffix("_5")
    return [f"meta_{stem}.json.gz", f"meta_{stem}.json"]


def _read_reviews(path: Path) -> tuple[RawEvents, str | None]:
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user_codes, item_codes, times, ratings = array("i"), array("i"), array("q"), array("f")
    for number, line in numbered_lines(path):
        try:
            review = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON line ({error}): {line[:60]!r}; expected {EXPECTED}.") from None
        user, item, time, rating = _check_review(path, number, review)
        user_codes.append(users.setdefault(user, len(users)))
        item_codes.append(items.setdefault(item, len(items)))
        times.append(time)
        ratings.append(rating)
    if not users:
        raise UserError(f"{path}: no records; expected {EXPECTED}.")
    seconds, note = to_seconds(np.frombuffer(times, dtype=np.int64))
    events = RawEvents(
        user_codes=np.frombuffer(user_codes, dtype=np.int32),
        item_codes=np.frombuffer(item_codes, dtype=np.int32),
        raw_users=list(users),
        raw_items=list(items),
        timestamps=seconds,
        ratings=np.frombuffer(ratings, dtype=np.float32),
        locate=lambda row: locate_record(path, row),
    )
    return events, note


def _check_review(path: Path, number: int, review: object) -> tuple[str, str, int, float]:
    if not isinstance(review, dict):
        raise UserError(f"{path}:{number}: found a JSON {type(review).__name__}; expected {EXPECTED}.")
    missing = [key for key in ("reviewerID", "asin", "unixReviewTime") if key not in review]
    if missing:
        found = ", ".join(review)[:120] or "an empty object"
        raise UserError(f"{path}:{number}: {', '.join(missing)} missing; found {found}; expected {EXPECTED}.")
    user, item, time, rating = review["reviewerID"], review["asin"], review["unixReviewTime"], review.get("overall")
    for key, value in (("reviewerID", user), ("asin", item)):
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}:{number}: {key} is {value!r}; expected text.")
    if not isinstance(time, int) or isinstance(time, bool) or not 0 <= time < 2**63:
        raise UserError(f"{path}:{number}: unixReviewTime is {time!r}; expected whole seconds since 1970.")
    if rating is not None and (not isinstance(rating, (int, float)) or isinstance(rating, bool)):
        raise UserError(f"{path}:{number}: overall is {rating!r}; expected a number.")
    return user, item, time, math.nan if rating is None else float(rating)


def _read_products(path: Path, known: set[str]) -> tuple[RawTable, int]:
    """The products that have reviews, and the number of those that have none."""
    lines: dict[str, int] = {}
    categories, brands, prices, skipped = [], [], [], 0
    for number, line in numbered_lines(path):
        product = _parse_product(path, number, line)
        item = product["asin"]
        if item not in known:
            skipped += 1
            continue
        if item in lines:
            raise UserError(f"{path}:{number}: product {item!r} is already in line {lines[item]}; expected each once.")
        lines[item] = number
        categories.append(_categories(product))
        brand = product.get("brand")
        brands.append(brand.strip() or None if isinstance(brand, str) else None)
        prices.append(_price(product.get("price")))
    columns = [RawColumn("category", "multi", categories), RawColumn("brand", "single", brands), RawColumn("price", "float", prices)]
    return RawTable("item", str(path), list(lines), columns), skipped


def _parse_product(path: Path, number: int, line: bytes) -> dict:
    try:
        product = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            product = ast.literal_eval(line.decode("utf-8"))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(f"{path}:{number}: neither JSON nor a Python literal ({error}): {line[:60]!r}; expected a product.") from None
    if not isinstance(product, dict) or not isinstance(product.get("asin"), str):
        raise UserError(f"{path}:{number}: found {line[:60]!r}; expected an object with asin.")
    return product


def _categories(product: dict) -> list[str]:
    """2014: "categories", a list of paths; 2018: "category", one path. Each name once, in order."""
    nested = product.get("categories", product.get("category")) or []
    flat = [name for path in nested for name in (path if isinstance(path, list) else [path])] if isinstance(nested, list) else [nested]
    return list(dict.fromkeys(name for name in flat if isinstance(name, str) and name))


def _price(value: object) -> float:
    """A number, or text such as "$1,299.00"; NaN where there is neither."""
    if isinstance(value, str):
        value = value.strip().removeprefix("$").replace(",", "")
    try:
        price = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        return math.nan
    return price if math.isfinite(price) else math.nan
