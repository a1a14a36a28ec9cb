"""The world behind the synthetic data: its hidden structure, users drawn from it, and what a ranker that knows it would reach.

Must not describe items (planted_features.py), write files (synthetic.py) or know of layouts. Everything is a function
of (World, seed, chunk), so that processes, parts and layouts change nothing.

The items fall into sub-clusters, about eight to a cluster. Inside a sub-cluster they are ordered by birth, and a window
slides over that order within HORIZON: only the items inside are shown at that time, by a Zipf-like weight. Each user has a type: a home
and a few more sub-clusters in a fixed cycle. What comes next (TRANSITIONS) depends on the last action, the gaps and the hour of the day.
Legend: N users, L events of the longest user, M items, S sub-clusters, K user types, I sub-clusters of a type.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from schema import CLICK, CONVERSION, EXPOSURE, TENCENT_GR

CHUNK = 8192  # users drawn at once; their histories stay in the CPU's cache
ITEMS_A_SUB = 860
MIN_SUBS, SUBS_A_CLUSTER, INTERESTS, TYPES_A_SUB = 12, 8, 5, 2
WINDOW_SHARE, MIN_WINDOW = 0.0235, 6  # of a sub-cluster's items shown at a time: 20 of 860, for 0.7 of 30 days
DAY, HOUR = 86_400, 3_600
START, HORIZON = 1_717_200_000, 30 * DAY  # midnight UTC; seconds
LONG_GAP = HOUR
NEW_SESSION, SHORT_SECONDS, LONG_SECONDS, LONG_SIGMA = 0.12, 45.0, 10 * HOUR, 0.8
LATE_USERS, LATE_SECONDS = 0.4, 1.5 * DAY  # users whose last event lies in the last days, as on the platform
ANYWHERE = 1 << 20
# Of an item that the user has seen: by weight (0), then evenly over so many windows. Few come past the second.
REDRAWS = (0, 0, 1, 2, 4, 8, 16, 64, ANYWHERE)
SUCCESSORS = 5
REPEATS_ALLOWED = 0.03  # chance that a seen item may come again: 0.5 % of events repeat one at 20 items shown
CLICK_AT_HOME, CLICK_ELSEWHERE = 0.106, 0.03  # in the user's own sub-clusters, in others
CONVERSION_SCALE, CONVERSION_SHARE = 0.546, 0.469  # second round: 2.85 % click, 2.52 % conversion
CANDIDATE_SHARE, COLD_SHARE, TRUTH_IN_POOL = 0.138, 0.22, 0.95
COLD_EVENT, COLD_TARGET, COLD_PROFILE = 0.01, 0.03, 0.02
EMPTY_FEATURES = 0.002

# Where the next event goes. Rows: the situation; columns: probabilities of home, the same sub-cluster, the next one of the user's cycle
# (before noon UTC; the previous one after it, by the last event's time), any of the user's, any at all, the last item's successor.
HOME, SAME, NEXT, ANY, NOISE, SUCCESSOR = range(6)
RETURNED, CLICKED, FRESH, MOVING = range(4)
TRANSITIONS = np.array([
    [0.75, 0.00, 0.00, 0.15, 0.10, 0.00],  # RETURNED: after a gap of over an hour
    [0.00, 0.57, 0.05, 0.05, 0.05, 0.28],  # CLICKED: the last action was a click or a conversion
    [0.50, 0.05, 0.27, 0.06, 0.09, 0.03],  # FRESH: the last event was the first after such a gap
    [0.00, 0.05, 0.74, 0.07, 0.11, 0.03],  # MOVING: an exposure amid a session
])  # fmt: skip

STREAMS = ("world", "cold", "features", "users", "predict", "candidates", "embedding")
SPLITMIX = np.uint64(0x9E3779B97F4A7C15)
USER_SINGLE = tuple(f.id for f in TENCENT_GR.select("user", "single"))
USER_MULTI = tuple(f.id for f in TENCENT_GR.select("user", "multi"))
MAX_VALUES = 3  # of a multi-valued feature


@dataclass(frozen=True)
class World:
    """The hidden structure. Places are indices into the items ordered by (sub-cluster, birth).

    sub_start (S + 1) places int64; window (S) items shown at a time; weight_sum (M + 1) float64: running sum of the items' weights, in
    place order; item_at (M) int32: place -> item id. sub_of, offset_of (M + cold + 1) int32: of each item id, cold ones from M + 1, entry 0
    unused; creative_ids (M + cold + 1) int64. interests (K, I) sub-clusters, the home first; type_sum (K): running sum of probabilities.
    """

    seed: int
    num_items: int
    num_cold: int
    sub_start: np.ndarray
    window: np.ndarray
    weight_sum: np.ndarray
    item_at: np.ndarray
    sub_of: np.ndarray
    offset_of: np.ndarray
    creative_ids: np.ndarray
    interests: np.ndarray
    type_sum: np.ndarray

    @property
    def num_subs(self) -> int:
        return len(self.window)


@dataclass
class Users:
    """A chunk of users; rows are right-padded, entry [n, counts[n]:] is meaningless.

    counts (N) int64; items (N, L) int32 item ids; actions (N, L) int8; times (N, L) int64 seconds; cycle (N, L) int8: where in the
    user's cycle each event found him; types (N); single (N, 4) int32 and multi {id: (N, 3) int32}: features, 0 = missing, negative =
    unseen in training; profile_at (N): place of the profile record in the line.
    """

    counts: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    cycle: np.ndarray
    types: np.ndarray
    single: np.ndarray
    multi: dict[str, np.ndarray]
    profile_at: np.ndarray


def stream(seed: int, name: str, chunk: int = 0) -> np.random.Generator:
    """The generator of one purpose and chunk; independent of all others."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, STREAMS.index(name), chunk])))


def mix(values: np.ndarray, salt: int) -> np.ndarray:
    """A fixed 64-bit hash of whole numbers (splitmix64), uint64."""
    x = np.asarray(values).astype(np.uint64) + np.uint64(salt * int(SPLITMIX) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def num_candidates(num_items: int, num_predict: int) -> tuple[int, int]:
    """(candidates, cold ones among them) for so many items and users to predict."""
    if num_predict == 0:
        return 0, 0
    total = max(round(CANDIDATE_SHARE * num_items), round(1.3 * num_predict), 10)
    return total, round(COLD_SHARE * total)


def build_world(num_items: int, num_predict: int = 0, seed: int = 0) -> World:
    """The world of `num_items` items, with the cold ones that `num_predict` users to predict call for; the rest does not depend on them."""
    random = stream(seed, "world")
    num_subs = min(max(MIN_SUBS, round(num_items / ITEMS_A_SUB)), max(1, num_items // (2 * MIN_WINDOW)))
    share = np.exp(random.uniform(-0.5, 0.5, num_subs))
    sizes = np.diff(np.round(np.cumsum(share) / share.sum() * num_items).astype(np.int64), prepend=0)
    window = np.clip(np.round(WINDOW_SHARE * sizes).astype(np.int64), MIN_WINDOW, np.maximum(1, sizes // 2))
    sub_start = np.concatenate([[0], np.cumsum(sizes)])
    weights = 1.0 / (random.random(num_items) + 0.02)
    item_at = (random.permutation(num_items) + 1).astype(np.int32)
    interests = _interests(random, num_subs, sizes)
    type_weight = 1.0 / np.sqrt(random.permutation(len(interests)) + 10.0)

    num_cold = num_candidates(num_items, num_predict)[1]
    cold = stream(seed, "cold")
    cold_sub = np.sort(np.searchsorted(sub_start, cold.integers(0, num_items, num_cold), side="right") - 1)
    sub_of = np.zeros(num_items + num_cold + 1, dtype=np.int32)
    offset_of = np.zeros_like(sub_of)
    sub_of[item_at] = np.repeat(np.arange(num_subs), sizes)
    offset_of[item_at] = np.arange(num_items) - np.repeat(sub_start[:-1], sizes)
    sub_of[num_items + 1 :] = cold_sub
    offset_of[num_items + 1 :] = sizes[cold_sub] * cold.uniform(0.9, 1.0, num_cold)
    numbers = np.arange(num_items + num_cold + 1, dtype=np.uint64) + mix(np.array([seed]), 7)
    creative_ids = (2**61 + (numbers * (SPLITMIX | np.uint64(1))) % np.uint64(2**61)).astype(np.int64)  # odd factor: all distinct
    creative_ids[0] = 0
    return World(seed, num_items, num_cold, sub_start, window, np.concatenate([[0.0], np.cumsum(weights)]), item_at, sub_of, offset_of,
                 creative_ids, interests, np.cumsum(type_weight) / type_weight.sum())  # fmt: skip


def _interests(random: np.random.Generator, num_subs: int, sizes: np.ndarray) -> np.ndarray:
    """(K, I) sub-clusters a type, distinct: a home, two more of its cluster where it has them, the rest from anywhere."""
    num_types, width = TYPES_A_SUB * num_subs, min(INTERESTS, num_subs)
    chances = np.cumsum(sizes) / sizes.sum()
    chosen = np.searchsorted(chances, random.random((num_types, width)))
    near = chosen[:, :1] // SUBS_A_CLUSTER * SUBS_A_CLUSTER + random.integers(0, SUBS_A_CLUSTER, (num_types, width))
    chosen[:, 1:3] = np.minimum(near, num_subs - 1)[:, 1:3]
    for _ in range(1000):
        again = np.array([(chosen[:, :k] == chosen[:, k : k + 1]).any(axis=1) for k in range(width)]).T
        if not again.any():
            break
        chosen[again] = random.integers(0, num_subs, int(again.sum()))
    return chosen


def window_start(world: World, subs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The first place (N) that each sub-cluster shows at its time; window[sub] places are shown."""
    share = np.clip((times - START) / HORIZON, 0, 1 - 1e-9)
    width = world.window[subs]
    room = world.sub_start[subs + 1] - world.sub_start[subs] - width
    return world.sub_start[subs] + (share * (room + 1)).astype(np.int64)


def successor(places: np.ndarray) -> np.ndarray:
    """The planted item -> item successor: one of the next few of the same sub-cluster, a fixed one for each place."""
    return places + 1 + (mix(places, 1) % np.uint64(SUCCESSORS)).astype(np.int64)


def _draw_items(world: World, subs: np.ndarray, times: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Places (N) out of the windows at these times, by weight."""
    low = window_start(world, subs, times)
    high = low + world.window[subs]
    below, above = world.weight_sum[low], world.weight_sum[high]
    places = np.searchsorted(world.weight_sum, below + random.random(len(subs)) * (above - below), side="right") - 1
    return np.clip(places, low, high - 1)


def _draw_near(world: World, subs: np.ndarray, times: np.ndarray, random: np.random.Generator, widths: int) -> np.ndarray:
    """Places (N), evenly out of so many windows' widths around the windows at these times, or out of all items."""
    if widths == ANYWHERE:
        return random.integers(0, world.num_items, len(subs))
    middle = window_start(world, subs, times) + world.window[subs] // 2
    reach = world.window[subs] * widths // 2
    low, high = np.maximum(middle - reach, world.sub_start[subs]), np.minimum(middle + reach + 1, world.sub_start[subs + 1])
    return random.integers(low, high)


def _times(random: np.random.Generator, counts: np.ndarray, width: int) -> np.ndarray:
    """(N, width) int64 seconds: sessions with gaps, all within the horizon at the user's own count of events."""
    num = len(counts)
    long = random.normal(np.log(LONG_SECONDS), LONG_SIGMA, (num, width)) + random.normal(0, 0.4, (num, 1))
    long = np.clip(np.exp(long), 1.2 * LONG_GAP, 6 * DAY)
    short = 1 + np.floor(random.standard_exponential((num, width)) * SHORT_SECONDS)
    is_new = random.random((num, width)) < NEW_SESSION
    is_new[:, 0], short[:, 0] = False, 0
    rows, last = np.arange(num), counts - 1
    long_sum = np.cumsum(np.where(is_new, long, 0), axis=1)
    short_sum = np.cumsum(np.where(is_new, 0, short), axis=1)
    room = 0.95 * HORIZON - short_sum[rows, last]
    shrink = np.minimum(1, room / np.maximum(long_sum[rows, last], 1))
    since = np.floor(long_sum * shrink[:, None]) + short_sum
    span = since[rows, last]
    late = random.random(num) < LATE_USERS
    where = random.random(num)
    end = np.where(late, HORIZON - 1 - where * np.minimum(LATE_SECONDS, HORIZON - 1 - span), span + where * (HORIZON - 1 - span))
    return (START + np.floor(end - span)[:, None] + since).astype(np.int64)


def sample_users(world: World, name: str, chunk: int, num: int, *, max_length: int = 100, mean_length: float = 91.06,
                 conversions: bool = False) -> Users:  # fmt: skip
    """Chunk number `chunk` of the users of stream `name` ("users" or "predict"): the first `num` of it.

    max_length, mean_length: events a user. A user of "predict" has one more, the target, which is the last one.
    """
    random = stream(world.seed, name, chunk)
    extra = int(name == "predict")
    shortest = min(5, max_length)
    middle = (shortest + max_length) / 2
    full = 1.0 if max_length <= middle else float(np.clip((mean_length - middle) / (max_length - middle), 0, 1))
    counts = np.where(random.random(num) < full, max_length, random.integers(shortest, max_length + 1, num)) + extra
    width = max_length + extra
    types = np.searchsorted(world.type_sum, random.random(num))
    single, multi = _user_features(world, types, random)
    times = _times(random, counts, width)
    places, actions, cycle = _walk(world, types, times, random, conversions)
    return Users(counts, world.item_at[places], actions, times, cycle, types, single, multi, random.integers(0, counts + 1 - extra))


def situation(before: np.ndarray, last: np.ndarray, now: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The row of TRANSITIONS (N), from the times (N) of the last event but one, the last and the next, and the last action."""
    fresh = np.where(last - before > LONG_GAP, FRESH, MOVING)
    return np.where(now - last > LONG_GAP, RETURNED, np.where(actions != EXPOSURE, CLICKED, fresh))


def direction(times: np.ndarray) -> np.ndarray:
    """+1 before noon, -1 after it (N): the way along the user's cycle after an event at these times."""
    return np.where(times % DAY < DAY // 2, 1, -1)


def _walk(world: World, types: np.ndarray, times: np.ndarray, random: np.random.Generator,
          conversions: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Places (N, L) int32, actions (N, L) int8 and cycle (N, L) int8: one pass over positions, all users at once."""
    num, width = times.shape
    interests = world.interests[types]
    rows, ring = np.arange(num), interests.shape[1]
    limits = np.cumsum(TRANSITIONS, axis=1)[:, :-1]
    places = np.zeros((num, width), dtype=np.int32)
    actions = np.zeros((num, width), dtype=np.int8)
    cycle = np.zeros((num, width), dtype=np.int8)
    pointer, sub, place = np.zeros(num, dtype=np.int64), interests[:, 0], np.zeros(num, dtype=np.int64)
    scale = CONVERSION_SCALE if conversions else 1.0
    for step in range(width):
        now = times[:, step]
        if step == 0:
            case, way = np.full(num, RETURNED), np.ones(num, dtype=np.int64)
        else:
            last = times[:, step - 1]
            case = situation(times[:, step - 2] if step > 1 else np.full(num, -HORIZON), last, now, actions[:, step - 1])
            way = direction(last)
        outcome = (random.random(num)[:, None] >= limits[case]).sum(axis=1)
        pointer = np.where(outcome == HOME, 0, np.where(outcome == NEXT, (pointer + way) % ring, pointer))
        pointer = np.where(outcome == ANY, random.integers(0, ring, num), pointer)
        anywhere = np.searchsorted(world.sub_start, random.integers(0, world.num_items, num), side="right") - 1
        stay = (outcome == SAME) | (outcome == SUCCESSOR)
        sub = np.where(stay, sub, np.where(outcome == NOISE, anywhere, interests[rows, pointer]))
        follow = successor(place)
        low = window_start(world, sub, now)
        shown = (outcome == SUCCESSOR) & (follow >= low) & (follow < low + world.window[sub])
        place = np.where(shown, follow, _draw_items(world, sub, now, random))
        avoids = random.random(num) >= REPEATS_ALLOWED
        for widths in REDRAWS:
            seen = np.flatnonzero((places[:, :step] == place[:, None]).any(axis=1) & avoids)
            if len(seen) == 0:
                break
            drawn = (world, sub[seen], now[seen], random)
            place[seen] = _draw_near(*drawn, widths) if widths else _draw_items(*drawn)
        own = (interests == sub[:, None]).any(axis=1)
        acted = random.random(num) < np.where(own, CLICK_AT_HOME, CLICK_ELSEWHERE) * scale
        converted = acted & (random.random(num) < CONVERSION_SHARE) & conversions
        places[:, step], cycle[:, step] = place, pointer
        actions[:, step] = np.where(converted, CONVERSION, np.where(acted, CLICK, EXPOSURE))
    return places, actions, cycle


def _user_features(world: World, types: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features as in Users: functions of the type, with noise, some missing, a few users without any."""
    num = len(types)
    single = np.zeros((num, len(USER_SINGLE)), dtype=np.int32)
    empty = random.random(num) < EMPTY_FEATURES
    for column, name in enumerate(USER_SINGLE):
        size = TENCENT_GR[name].cardinality
        values = 1 + (mix(types, int(name)) % np.uint64(size)).astype(np.int64)
        values = np.where(random.random(num) < 0.25, random.integers(1, size + 1, num), values)
        single[:, column] = np.where(empty | (random.random(num) < 0.05), 0, values)
    multi = {}
    interests = world.interests[types]
    for name in USER_MULTI:
        size = TENCENT_GR[name].cardinality
        values = 1 + (mix(interests[:, np.arange(MAX_VALUES) % interests.shape[1]], int(name)) % np.uint64(size)).astype(np.int32)
        values[random.random(values.shape) < 0.3] = 0
        values.sort(axis=1)
        values[:, 1:][values[:, 1:] == values[:, :-1]] = 0
        values[empty] = 0
        multi[name] = values
    return single, multi


def make_cold(world: World, users: Users, chunk: int) -> None:
    """Put cold items into users to predict, as events and as targets, and unseen values into their profiles; in place."""
    random = stream(world.seed, "cold", 1 + chunk)
    begin = np.searchsorted(world.sub_of[world.num_items + 1 :], np.arange(world.num_subs + 1))
    num, width = users.items.shape
    is_target = np.arange(width) == users.counts[:, None] - 1
    chosen = random.random((num, width)) < np.where(is_target, COLD_TARGET, COLD_EVENT)
    subs = world.sub_of[users.items[chosen]]
    room = begin[subs + 1] - begin[subs]
    picked = world.num_items + 1 + begin[subs] + (random.random(len(subs)) * room).astype(np.int64)
    users.items[chosen] = np.where(room > 0, picked, users.items[chosen])
    strange = random.random(num) < COLD_PROFILE
    users.single[strange, 0] = -random.integers(1, 1000, int(strange.sum()))


def choose_candidates(world: World, targets: np.ndarray) -> np.ndarray:
    """Item ids of the candidates, shuffled: all cold items, most targets, and known items by weight."""
    random = stream(world.seed, "candidates")
    total, num_cold = num_candidates(world.num_items, len(targets))
    wanted = np.unique(targets[random.random(len(targets)) < TRUTH_IN_POOL])
    wanted = wanted[wanted <= world.num_items]
    keys = np.zeros(world.num_items + 1)
    keys[world.item_at] = random.standard_exponential(world.num_items) / np.diff(world.weight_sum)
    keys[wanted] = -1
    keys[np.setdiff1d(targets[targets <= world.num_items], wanted)] = np.inf
    keys = keys[1:]
    num_known = min(total - num_cold, world.num_items)  # more users to predict than items: all of them
    known = 1 + np.argpartition(keys, num_known - 1)[:num_known]
    return random.permutation(np.concatenate([known, np.arange(world.num_items + 1, world.num_items + 1 + num_cold)]))


def chunks(total: int) -> list[tuple[int, int]]:
    """(chunk, users in it) for so many users."""
    return [(k, min(CHUNK, total - k * CHUNK)) for k in range(-(-total // CHUNK))]


def ceiling(world: World, num_predict: int, *, only_candidates: bool = False, know_time: bool = False,
            **lengths: object) -> dict[str, float]:  # fmt: skip
    """HR@10 and NDCG@10 of a ranker that knows this world, over the users to predict: what no model can pass by more than chance.

    It knows each user's type and place in the cycle, and the probabilities of TRANSITIONS, windows and weights; seen items are removed. It
    does not know the time of the target (know_time: it does) and takes ten quantiles of the gaps instead. only_candidates: candidates alone
    are ranked, and the other targets missed; else all known items. Approximate: items that only NOISE reaches are left out, the redraw of
    seen items too; cold targets count as missed. lengths: as sample_users takes. Result: {"hr@10", "ndcg@10", "num_users"}.
    """
    found, pool = [], None
    if only_candidates:
        drawn = [sample_users(world, "predict", k, n, **lengths) for k, n in chunks(num_predict)]
        for k, users in enumerate(drawn):
            make_cold(world, users, k)
        pool = np.zeros(world.num_items, dtype=bool)
        targets = np.concatenate([users.items[np.arange(len(users.counts)), users.counts - 1] for users in drawn])
        candidates = choose_candidates(world, targets)
        pool[_place(world, candidates[candidates <= world.num_items])] = True
    for k, n in chunks(num_predict):
        users = sample_users(world, "predict", k, n, **lengths)
        places = _place(world, users.items)
        make_cold(world, users, k)
        for row in range(n):
            found.append(_target_rank(world, users, places, row, know_time, pool))
    ranks = np.array(found)
    hit = ranks < 10
    gain = np.where(hit, 1 / np.log2(2.0 + np.minimum(ranks, 10)), 0)
    return {"hr@10": float(hit.mean()), "ndcg@10": float(gain.mean()), "num_users": num_predict}


def _place(world: World, items: np.ndarray) -> np.ndarray:
    return world.sub_start[world.sub_of[items]] + world.offset_of[items]


def _target_rank(world: World, users: Users, places: np.ndarray, row: int, know_time: bool, pool: np.ndarray | None) -> float:
    """How many items the planted probabilities put before the target of one user; infinite where it has none."""
    end = users.counts[row] - 1
    target = places[row, end]
    if users.items[row, end] > world.num_items or (pool is not None and not pool[target]):
        return np.inf
    found, chances = next_places(world, users, places, row, know_time)
    allowed = ~np.isin(found, places[row, :end])
    if pool is not None:
        allowed &= pool[found]
    mine = chances[found == target]
    return float((chances[allowed] > mine[0]).sum()) if len(mine) else np.inf


def next_places(world: World, users: Users, places: np.ndarray, row: int, know_time: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The places that the last event of one user may lie at, ascending, and their chances as `ceiling` describes them."""
    end = users.counts[row] - 1
    last, place = users.times[row, end - 1], places[row, end - 1]
    before = users.times[row, end - 2] if end > 1 else -HORIZON
    if know_time:
        moments, weights = users.times[row, end : end + 1], np.ones(1)
    else:
        quantiles = np.array([NormalDist(np.log(LONG_SECONDS), np.hypot(LONG_SIGMA, 0.4)).inv_cdf((k + 0.5) / 10) for k in range(10)])
        moments = last + np.append(SHORT_SECONDS, np.exp(quantiles)).astype(np.int64)
        weights = np.append(1 - NEW_SESSION, np.full(10, NEW_SESSION / 10))
    cases = situation(np.full(len(moments), before), np.full(len(moments), last), moments, users.actions[row, end - 1])
    chances = TRANSITIONS[cases] * weights[:, None]
    sub = np.searchsorted(world.sub_start, place, side="right") - 1
    subs = np.append(world.interests[users.types[row]], sub)
    ring = len(subs) - 1
    share = chances[:, [NOISE]] * (world.sub_start[subs + 1] - world.sub_start[subs]) / world.num_items
    share[:, -1] *= sub not in subs[:-1]
    share[:, :-1] += chances[:, [ANY]] / ring
    share[:, 0] += chances[:, HOME]
    share[:, (users.cycle[row, end - 1] + int(direction(last))) % ring] += chances[:, NEXT]
    follow, low = successor(np.array([place]))[0], window_start(world, np.full(len(moments), sub), moments)
    shown = (follow >= low) & (follow < low + world.window[sub])
    share[:, -1] += chances[:, SAME] + np.where(shown, 0, chances[:, SUCCESSOR])

    low = window_start(world, np.tile(subs, len(moments)), np.repeat(moments, len(subs)))
    width = np.tile(world.window[subs], len(moments))
    density = share.ravel() / (world.weight_sum[low + width] - world.weight_sum[low])
    reached = np.repeat(low - np.cumsum(width) + width, width) + np.arange(width.sum())
    mass = np.repeat(density, width) * (world.weight_sum[reached + 1] - world.weight_sum[reached])
    found, inverse = np.unique(np.append(reached, follow if shown.any() else place), return_inverse=True)
    return found, np.bincount(inverse, weights=np.append(mass, (shown * chances[:, SUCCESSOR]).sum()))
