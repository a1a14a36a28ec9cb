"""Recipe for MovieLens' folders: 100K (u.data), 1M and 10M ('::' files), 20M, 25M, 32M and latest (csv).

Source: the READMEs of the sets (grouplens.org). Every rating is an event; genres and year describe a film,
age group, gender and occupation a user where the set has them. Titles, links and zip codes are not used.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np

from converters.raw import RawColumn, RawEvents, RawSet, RawTable, to_seconds
from converters.text import (
    Layout,
    encode,
    locate_record,
    read_columns,
    read_header,
    read_records,
    require_at_least,
    require_file,
    require_folder,
)
from errors import UserError

# The 1M set's age groups, by their lower bounds; the 100K set's ages are put into the same ones.
AGE_GROUPS = (1, 18, 25, 35, 45, 50, 56)
GENRES_100K = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
               "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")  # fmt: skip
NO_GENRES = "(no genres listed)"
RATING_NAMES = ("userId", "movieId", "rating", "timestamp")
RATING_KINDS = ("int", "int", "float", "int")
TITLE_YEAR = re.compile(r"\((\d{4})\)\s*\"?\s*$")


def read(source: Path) -> RawSet:
    """Read the folder of one set; which one is told by the name of its ratings file."""
    recipes = {"u.data": _read_100k, "ratings.dat": _read_dat, "ratings.csv": _read_csv}
    folder = require_folder(source, f"a MovieLens folder with one of {', '.join(recipes)}")
    found = [name for name in recipes if (folder / name).exists()]
    if len(found) != 1:
        what = f"{' and '.join(found)} side by side" if found else "none of them"
        raise UserError(f"{folder}: expected exactly one of {', '.join(recipes)}; found {what}.\nName the folder that holds the files.")
    return recipes[found[0]](folder)


def _read_100k(folder: Path) -> RawSet:
    events, notes = _read_ratings(folder / "u.data", Layout("\t", RATING_NAMES, RATING_KINDS))
    fields = ("movie id", "title", "release date", "video release date", "URL", *GENRES_100K)
    path = require_file(folder / "u.item", "the films of MovieLens-100K")
    ids, genres, years = _Ids(path, "film"), [], []
    for number, row in read_records(path, Layout("|", fields, ("token",) * len(fields)), ("latin-1",)):
        ids.add(number, row[0])
        flags = row[5:]
        if not set(flags) <= {"0", "1"}:
            bad = next(flag for flag in flags if flag not in ("0", "1"))
            raise UserError(f"{path}:{number}: found the genre flag {bad!r}; expected 0 or 1.")
        genres.append([name for name, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"])
        release = row[2].rsplit("-", 1)[-1]
        years.append(release if re.fullmatch(r"\d{4}", release) else _title_year(row[1]))
    items = _film_table(path, ids, genres, years)
    names = ("user id", "age", "gender", "occupation", "zip code")
    path = require_file(folder / "u.user", "the users of MovieLens-100K")
    users = _read_users(path, Layout("|", names, ("token",) * 5), lambda row: (row[1], row[2], row[3]))
    return RawSet(events, [items, users], notes)


def _read_dat(folder: Path) -> RawSet:
    events, notes = _read_ratings(folder / "ratings.dat", Layout("::", RATING_NAMES, RATING_KINDS))
    items = _read_films(folder / "movies.dat", Layout("::", ("MovieID", "Title", "Genres"), ("token",) * 3))
    path = folder / "users.dat"
    if not path.exists():  # the 10M set has none
        return RawSet(events, [items], [*notes, f"no {path.name} in {folder}: no user features"])
    names = ("UserID", "Gender", "Age", "Occupation", "Zip-code")
    require_file(path, "the users of MovieLens")
    users = _read_users(path, Layout("::", names, ("token",) * 5), lambda row: (row[2], row[1], row[3]))
    return RawSet(events, [items, users], notes)


def _read_csv(folder: Path) -> RawSet:
    events, notes = _read_ratings(folder / "ratings.csv", Layout(",", RATING_NAMES, RATING_KINDS, header=True, quoted=True))
    items = _read_films(folder / "movies.csv", Layout(",", ("movieId", "title", "genres"), ("token",) * 3, header=True, quoted=True))
    return RawSet(events, [items], [*notes, "this set has no user features"])


def _check_header(path: Path, layout: Layout) -> None:
    if layout.header and (found := read_header(path, layout.separator)) != list(layout.names):
        raise UserError(f"{path}:1: found the header {','.join(found)[:80]!r}; expected {','.join(layout.names)!r}.")


def _read_ratings(path: Path, layout: Layout) -> tuple[RawEvents, list[str]]:
    require_file(path, "ratings of MovieLens")
    _check_header(path, layout)
    columns = read_columns(path, layout)
    times = columns.pop("timestamp").to_numpy()
    require_at_least(path, layout, "timestamp", times, 0)
    coded = {}
    for name in ("userId", "movieId"):
        column = columns.pop(name)
        require_at_least(path, layout, name, column.to_numpy(), 1)
        coded[name] = encode(column)
    seconds, note = to_seconds(times)
    events = RawEvents(
        user_codes=coded["userId"][0],
        item_codes=coded["movieId"][0],
        raw_users=coded["userId"][1],
        raw_items=coded["movieId"][1],
        timestamps=seconds,
        ratings=columns["rating"].to_numpy().astype(np.float32),
        locate=lambda row: locate_record(path, row, layout.header),
        repeats="error",  # a rating stands once in a sound file
    )
    return events, [note] if note else []


class _Ids(list):
    """Raw int ids of a table in the file's order; refuses what is no number and what comes twice."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__()
        self.path, self.what, self.lines = path, what, {}

    def add(self, number: int, value: str) -> None:
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{self.path}:{number}: the {self.what} id is {value!r}; expected a whole number.")
        raw = int(value)
        if raw in self.lines:
            raise UserError(f"{self.path}:{number}: {self.what} {raw} is already in line {self.lines[raw]}; expected each once.")
        self.lines[raw] = number
        self.append(raw)


def _title_year(title: str) -> str | None:
    found = TITLE_YEAR.search(title)
    return found.group(1) if found else None


def _film_table(path: Path, ids: _Ids, genres: list[list[str]], years: list[str | None]) -> RawTable:
    return RawTable("item", str(path), list(ids), [RawColumn("genre", "multi", genres), RawColumn("year", "single", years)])


def _read_films(path: Path, layout: Layout) -> RawTable:
    require_file(path, "the films of MovieLens")
    _check_header(path, layout)
    ids, genres, years = _Ids(path, "film"), [], []
    for number, (film, title, listed) in read_records(path, layout):
        ids.add(number, film)
        genres.append([] if listed in ("", NO_GENRES) else listed.split("|"))
        years.append(_title_year(title))
    return _film_table(path, ids, genres, years)


def _read_users(path: Path, layout: Layout, pick: Callable[[list[str]], tuple[str, str, str]]) -> RawTable:
    """pick: fields of a line -> (age, gender, occupation)."""
    ids, ages, genders, occupations = _Ids(path, "user"), [], [], []
    for number, row in read_records(path, layout):
        ids.add(number, row[0])
        age, gender, occupation = pick(row)
        if not (age.isascii() and age.isdigit()) or int(age) < AGE_GROUPS[0]:
            raise UserError(f"{path}:{number}: the age is {age!r}; expected a whole number from {AGE_GROUPS[0]}.")
        ages.append(str(AGE_GROUPS[bisect_right(AGE_GROUPS, int(age)) - 1]))
        genders.append(gender or None)
        occupations.append(occupation or None)
    columns = [RawColumn("age", "single", ages), RawColumn("gender", "single", genders), RawColumn("occupation", "single", occupations)]
    return RawTable("user", str(path), list(ids), columns)
