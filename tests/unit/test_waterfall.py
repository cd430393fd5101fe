"""The rows of the waterfall: every span once, below its parent, in the order of time, whatever agents say."""

from cost import assert_proportional
from hypothesis import given
from hypothesis import strategies as st

from clrk.gateway.admin.page.waterfall import WIDTH, Axis, SpanLink, tree_order

IDS = st.sampled_from(["a", "b", "c", "d", "e", "", "x"])
TIMES = st.integers(-(2**63), 2**63 - 1)
LINKS = st.lists(st.builds(SpanLink, IDS, IDS, TIMES, TIMES), max_size=12)


def named(*spans):
    return [SpanLink(span_id, parent, start, start + 1) for span_id, parent, start in spans]


def drawn(links):
    return [(links[place.index].span_id, place.depth, place.below) for place in tree_order(links)]


def test_children_are_below_their_parent_by_time():
    links = named(
        ("leaf", "run", 9), ("root", "remote", 1), ("early", "run", 5), ("run", "root", 2), ("end", "root", 8)
    )
    assert drawn(links) == [("root", 0, 4), ("run", 1, 2), ("early", 2, 0), ("leaf", 2, 0), ("end", 1, 0)]


def test_at_the_same_time_the_longer_one_comes_first():
    links = [SpanLink("short", "", 1, 2), SpanLink("long", "", 1, 9)]
    assert [entry[0] for entry in drawn(links)] == ["long", "short"]


def test_orphans_cycles_and_doubles_have_a_row_each():
    assert drawn(named(("a", "b", 1), ("b", "a", 2))) == [("a", 0, 1), ("b", 1, 0)]
    assert drawn(named(("a", "a", 1))) == [("a", 0, 0)]
    assert drawn(named(("a", "gone", 1), ("b", "", 2))) == [("a", 0, 0), ("b", 0, 0)]
    assert [entry[0] for entry in drawn(named(("a", "", 1), ("a", "", 2), ("c", "a", 3)))] == ["a", "c", "a"]


def test_a_chain_of_twenty_thousand_is_quick_and_not_recursive():
    links = named(*((str(number), str(number - 1), number) for number in range(20_000)))
    order = tree_order(links)
    assert [place.depth for place in order] == list(range(20_000))
    assert order[0].below == 19_999
    assert_proportional(tree_order, links[:2_500], links)


@given(LINKS)
def test_every_span_has_exactly_one_row(links):
    order = tree_order(links)
    assert sorted(place.index for place in order) == list(range(len(links)))
    for row, place in enumerate(order):
        assert all(below.depth > place.depth for below in order[row + 1 : row + 1 + place.below])
        end = row + 1 + place.below
        assert end == len(order) or order[end].depth <= place.depth


@given(LINKS, TIMES, TIMES)
def test_every_bar_is_on_the_axis_and_can_be_seen(links, start, end):
    axis = Axis.of(links, start, end)
    for link in links:
        x, width = axis.bar(link.start_time_unix_nano, link.end_time_unix_nano)
        assert 0 <= x < x + width <= WIDTH
    assert len(axis.ticks()) == 5


def test_bars_stand_where_their_times_are():
    axis = Axis.of(named(("a", "", 1000)), 1000, 2000)
    assert axis.bar(1000, 2000) == (0, WIDTH)
    assert axis.bar(1500, 1750) == (500, 250)
    assert axis.bar(1999, 1999) == (997, 3)
    assert Axis.of([]).bar(0, 0) == (0, 3)
