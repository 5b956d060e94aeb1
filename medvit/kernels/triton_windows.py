# mypy: ignore-errors
"""Geometry inside Triton kernels: which tokens a program works on, where they lie, and which of them attend.

One rule serves every pattern. On each of three axes (missing ones are one token long) the rolled and padded grid falls
into classes of tokens ``dilation`` apart; a token of a class has a place in it, and its window is ``size`` places from
:func:`start` on. Blocked windows are those that start at whole multiples of ``size``. A tile is a box of places of one
class: a whole window if windows are blocked, a box of neighbouring tokens otherwise.

Tokens are made from indices shaped ``[n, 1]`` or ``[1, n]``, so that what is said of pairs of them broadcasts either
way; ``triple`` stands for one value per axis. ``P`` is a :class:`~medvit.kernels.triton_attention.Plan`.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # powers of two are what the hardware computes
NO_QUERY = tl.constexpr(-1)
NO_KEY = tl.constexpr(-2)


@triton.jit
def split(index, n1, n2):
    """Triple of raster coordinates; ``n1`` and ``n2`` are the lengths of the last two axes."""
    return index // (n1 * n2), index // n2 % n1, index % n2


@triton.jit
def ravel(u, n1, n2):
    """Inverse of :func:`split`."""
    return (u[0] * n1 + u[1]) * n2 + u[2]


@triton.jit
def tiles(padded, P: tl.constexpr, A: tl.constexpr):
    """Tiles of a class along axis ``A``."""
    return tl.cdiv(tl.cdiv(padded[A], P.dilation[A]), P.tile[A])


@triton.jit
def tiles_of_all(padded, P: tl.constexpr):
    """Tiles of all classes."""
    classes = P.dilation[0] * P.dilation[1] * P.dilation[2]
    return tiles(padded, P, 0) * tiles(padded, P, 1) * tiles(padded, P, 2) * classes


@triton.jit
def locate(number, padded, P: tl.constexpr):
    """Of a tile, three triples: the class, its tokens, the tile's first place."""
    classes = P.dilation[0] * P.dilation[1] * P.dilation[2]
    residue = split(number % classes, P.dilation[1], P.dilation[2])  # neighbours in memory next to each other
    tile = split(number // classes, tiles(padded, P, 1), tiles(padded, P, 2))
    count = (
        tl.cdiv(padded[0] - residue[0], P.dilation[0]),
        tl.cdiv(padded[1] - residue[1], P.dilation[1]),
        tl.cdiv(padded[2] - residue[2], P.dilation[2]),
    )
    return residue, count, (tile[0] * P.tile[0], tile[1] * P.tile[1], tile[2] * P.tile[2])


@triton.jit
def program(heads, padded, P: tl.constexpr):
    """Of this program: panel of rows of its tile, head, image, and what :func:`locate` says of the tile."""
    number = tl.program_id(0)
    panel = number % P.panels
    head = number // P.panels % heads
    number = number // P.panels // heads  # what shares a window, and the memory around it, runs together
    residue, count, first = locate(number % tiles_of_all(padded, P), padded, P)
    return panel, head, number // tiles_of_all(padded, P), residue, count, first


@triton.jit
def start(place, count, P: tl.constexpr, A: tl.constexpr):
    """First place of the window of a place, on axis ``A`` of a class of ``count`` tokens."""
    first = place // P.stride[A] * P.stride[A]
    if P.sliding:
        first = tl.minimum(tl.maximum(first + P.stride[A] // 2 - P.size[A] // 2, 0), count - P.size[A])
    return first


@triton.jit
def keys_along(first, count, P: tl.constexpr, A: tl.constexpr):
    """Places on axis ``A`` that the queries of a tile attend to: the first, and how many."""
    low, span = first, P.size[A]
    if P.sliding:
        last = tl.minimum(first + P.tile[A], count) - 1
        low = start(first, count, P, A)
        span = start(last, count, P, A) + P.size[A] - low
    return low, span


@triton.jit
def queries_along(first, count, P: tl.constexpr, A: tl.constexpr):
    """Places on axis ``A`` whose windows hold a key of a tile: the first, and how many. Inverse of ``keys_along``."""
    low, span = first, P.size[A]
    if P.sliding:
        reach = P.size[A] // 2 - P.stride[A] // 2
        low = first - P.size[A] + 1  # the earliest start of a window with the tile's first key
        low = tl.where(low > 0, tl.cdiv(low + reach, P.stride[A]) * P.stride[A], 0)
        last = tl.minimum(first + P.tile[A], count) - 1  # the latest start of a window with its last key
        high = ((last + reach) // P.stride[A] + 1) * P.stride[A]
        high = tl.where(last < count - P.size[A], tl.minimum(high, count), count)
        span = tl.maximum(high - low, 0)
    return low, span


@triton.jit
def keys_seen(first, count, P: tl.constexpr):
    """Box of places that the queries of a tile attend to: triples of the first and of how many."""
    low0, span0 = keys_along(first[0], count[0], P, 0)
    low1, span1 = keys_along(first[1], count[1], P, 1)
    low2, span2 = keys_along(first[2], count[2], P, 2)
    return (low0, low1, low2), (span0, span1, span2)


@triton.jit
def queries_seeing(first, count, P: tl.constexpr):
    """Box of places whose windows hold a key of a tile: triples of the first and of how many."""
    low0, span0 = queries_along(first[0], count[0], P, 0)
    low1, span1 = queries_along(first[1], count[1], P, 1)
    low2, span2 = queries_along(first[2], count[2], P, 2)
    return (low0, low1, low2), (span0, span1, span2)


@triton.jit
def along(place, residue, length, padded, P: tl.constexpr, A: tl.constexpr):
    """Of places on axis ``A``: positions in a grid of that length, if there are any, and the bit of the region."""
    rolled = place * P.dilation[A] + residue
    at = rolled + P.shift[A]
    real = rolled < padded
    if P.roll_first:
        real = real & (rolled < length)
        at = at % length
    else:
        at = tl.where(at < padded, at, at - padded)
        real = real & (at < length)
    return at, real, (rolled >= padded - P.shift[A]).to(tl.int32)


@triton.jit
def tokens(index, low, span, residue, grid, padded, NONE: tl.constexpr, P: tl.constexpr):
    """The ``index``-th tokens of a box: triples of places and of positions in ``grid``; region, or ``NONE``."""
    place = split(index, span[1], span[2])
    place = (place[0] + low[0], place[1] + low[1], place[2] + low[2])
    at0, real0, late0 = along(place[0], residue[0], grid[0], padded[0], P, 0)
    at1, real1, late1 = along(place[1], residue[1], grid[1], padded[1], P, 1)
    at2, real2, late2 = along(place[2], residue[2], grid[2], padded[2], P, 2)
    real = (index < span[0] * span[1] * span[2]) & real0 & real1 & real2
    return place, (at0, at1, at2), tl.where(real, ravel((late0, late1, late2), 2, 2), NONE)


@triton.jit
def queries(index, low, span, residue, count, grid, padded, P: tl.constexpr):
    """Tokens that ask: triple of positions, region, triple of where their windows start, part of the bias entry."""
    place, at, region = tokens(index, low, span, residue, grid, padded, NO_QUERY, P)
    first = (
        start(place[0], count[0], P, 0),
        start(place[1], count[1], P, 1),
        start(place[2], count[2], P, 2),
    )
    entry = index
    if P.bias == "dense":  # of the entry query member * tokens + key member, what depends on the query
        origin = ravel(first, P.size[1], P.size[2])
        member = ravel(place, P.size[1], P.size[2]) - origin
        if P.wide:
            member = member.to(tl.int64)
        entry = member * (P.size[0] * P.size[1] * P.size[2]) - origin
    elif P.bias != "none":
        rows = (2 * P.window[0] - 1) * (2 * P.window[1] - 1) * (2 * P.window[2] - 1)
        entry = offset(index, place, P) + rows // 2  # the middle row is that of a token and itself
    return at, region, first, entry


@triton.jit
def keys(index, low, span, residue, grid, padded, P: tl.constexpr):
    """Tokens that answer: triple of positions, region, triple of places, part of the bias entry."""
    place, at, region = tokens(index, low, span, residue, grid, padded, NO_KEY, P)
    entry = index
    if P.bias == "dense":
        entry = ravel(place, P.size[1], P.size[2])
    elif P.bias != "none":
        entry = -offset(index, place, P)
    return at, region, place, entry


@triton.jit
def offset(index, place, P: tl.constexpr):
    """Place as a number in the base of the bias table, so that differences of places are differences of numbers."""
    if P.bias == "prefix":  # that of the same number in the table's window
        place = split(index, P.window[1], P.window[2])
    return ravel(place, 2 * P.window[1] - 1, 2 * P.window[2] - 1)


@triton.jit
def attending(query_region, first, key_region, place, P: tl.constexpr):
    """Which pairs attend, given the queries' regions and windows and the keys' regions and places."""
    pairs = query_region == key_region
    if P.sliding:
        for a in tl.static_range(3):
            pairs = pairs & (place[a] >= first[a]) & (place[a] < first[a] + P.size[a])
    return pairs


@triton.jit
def logits(products, pairs, table, query_entry, key_entry, P: tl.constexpr):
    """Logits in units of log 2, -inf where a pair does not attend."""
    x = products * (P.scale * LOG2E)
    if P.bias != "none":
        x += tl.load(table + (query_entry + key_entry), mask=pairs, other=0.0).to(tl.float32) * LOG2E
    return tl.where(pairs, x, float("-inf"))


@triton.jit
def head_of(pointer, strides, image, head):
    """Where one head of one image begins, given the strides of image, three axes and head."""
    return pointer + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]


@triton.jit
def address(pointer, strides, at):
    """Where tokens lie from there on, given the triple of their positions."""
    at0, at1, at2 = at[0].to(tl.int64), at[1].to(tl.int64), at[2].to(tl.int64)
    return pointer + (at0 * strides[1] + at1 * strides[2] + at2 * strides[3])


@triton.jit
def load(pointer, strides, at, region, feature, P: tl.constexpr):
    """Vectors of tokens, ``[tokens, features]`` or the other way round; zeros for tokens that are not there."""
    there = (region >= 0) & (feature < P.head_dim)
    x = tl.load(address(pointer, strides, at) + feature, mask=there, other=0.0)
    if P.interpreted:
        x = x.to(tl.float32)
    return x


@triton.jit
def store(pointer, strides, at, region, feature, value, P: tl.constexpr):
    """Inverse of :func:`load`; tokens that are not there are skipped."""
    there = (region >= 0) & (feature < P.head_dim)
    tl.store(address(pointer, strides, at) + feature, value.to(pointer.dtype.element_ty), mask=there)


@triton.jit
def load_numbers(pointer, strides, at, region):
    """One number of each token; 0 for tokens that are not there."""
    return tl.load(address(pointer, strides, at), mask=region >= 0, other=0.0)


@triton.jit
def store_numbers(pointer, strides, at, region, value):
    """Inverse of :func:`load_numbers`."""
    tl.store(address(pointer, strides, at), value, mask=region >= 0)
