"""The ranking widget: what its buttons record, and that texts stay texts. No browser is needed to press a button."""

import pytest
from ipywidgets import HTML, Button, Widget

from lm.core.errors import UserError
from lm.data.annotations import AnnotationStore, StoreUnavailable
from lm.feedback import widget
from lm.feedback.app import display_order
from lm.feedback.widget import RankingWidget, ranks_from_choices

THREE = ["first", "second", "third"]
MARKUP = "<img src=x onerror=alert(1)> & \x1b"


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch):
    monkeypatch.setattr(widget, "MIN_CLICK_SECONDS", 0)


@pytest.fixture
def store(tmp_path):
    """Two items of two responses, then one of three."""
    with AnnotationStore(tmp_path / "people.db") as store:
        store.add_items(
            (f"made/{i}", [{"role": "user", "content": f"Question {i}?"}], list(responses), [])
            for i, responses in enumerate((("yes", "no"), ("so", MARKUP), THREE))
        )
        yield store


def parts(whole: Widget, kind: type) -> list:
    """Every widget of a kind inside, in the order in which they are shown."""
    inside = [part for child in getattr(whole, "children", ()) for part in parts(child, kind)]
    return [whole] if isinstance(whole, kind) else inside


def press(ranker: RankingWidget, label: str) -> None:
    next(button for button in parts(ranker, Button) if button.description == label).click()


def shown(ranker: RankingWidget) -> str:
    return "\n".join(part.value for part in parts(ranker, HTML))


def recorded(store: AnnotationStore) -> list[tuple[list[int], str]]:
    return [(ranking.ranking, ranking.verdict) for ranking in store.rankings()]


def test_each_button_records_at_once(store):
    ranker = RankingWidget(store, "me")
    press(ranker, "Tie")
    assert recorded(store) == [([1, 1], "ranked")]
    press(ranker, "Both bad")
    press(ranker, "Skip")
    assert recorded(store) == [([1, 1], "ranked"), ([1, 1], "both bad"), ([1, 1, 1], "skipped")]
    assert ranker.item is None and "All done" in shown(ranker) and "3 of 3 judged" in shown(ranker)


def test_choosing_one_of_two_is_a_verdict(store):
    ranker = RankingWidget(store, "me")
    ranker.choose(1)
    (ranking,) = store.rankings()
    assert (ranking.ranking, ranking.rater, ranking.verdict) == ([2, 1], "me", "ranked")
    assert ranking.shown == display_order(store.item(1), "me") and ranking.seconds >= 0
    assert ranker.item.id == 2 and store.progress("me") == (1, 3)


def test_the_first_button_stands_under_the_response_shown_first(store):
    ranker = RankingWidget(store, "me")
    press(ranker, "Best")
    best = store.rankings()[0].ranking.index(1)
    assert best == display_order(store.item(1), "me")[0]


def test_responses_stand_in_the_order_of_the_page(store):
    for rater in "abcdef":
        ranker = RankingWidget(store, rater)
        where = [shown(ranker).index(f">{ranker.item.responses[i]}<") for i in display_order(ranker.item, rater)]
        assert where == sorted(where)


def last_item(store: AnnotationStore) -> RankingWidget:
    ranker = RankingWidget(store, "me")
    ranker.skip()
    ranker.skip()
    return ranker


def test_three_are_ranked_best_to_worst(store):
    ranker = last_item(store)
    ranker.choose(2)
    assert store.progress("me") == (2, 3)
    ranker.choose(0)  # what is left is the worst
    assert recorded(store)[-1] == ([2, 3, 1], "ranked")


def test_a_tie_joins_the_next_choice_to_the_one_before(store):
    ranker = last_item(store)
    ranker.choose(2)
    ranker.tie()
    ranker.choose(1)
    assert recorded(store)[-1] == ([3, 1, 1], "ranked")


def test_saving_early_lets_the_others_share_the_last_rank(store):
    ranker = last_item(store)
    ranker.choose(1)
    press(ranker, "Save")
    assert recorded(store)[-1] == ([2, 1, 2], "ranked")


def test_a_choice_can_be_taken_back_before_it_is_saved(store):
    ranker = last_item(store)
    press(ranker, "Best")
    assert "Rank 1" in [button.description for button in parts(ranker, Button)]
    press(ranker, "Rank 1")
    ranker.choose(0)
    ranker.choose(1)
    assert recorded(store)[-1] == ([1, 2, 3], "ranked")


def test_undo_shows_the_item_again_and_only_ones_own(store):
    other, ranker = RankingWidget(store, "other"), RankingWidget(store, "me")
    other.choose(0)
    ranker.choose(0)
    ranker.undo()
    assert ranker.item.id == 1 and [ranking.rater for ranking in store.rankings()] == ["other"]
    with pytest.raises(UserError, match="me has no verdict to take back"):
        ranker.undo()


def test_texts_are_never_markup(store):
    ranker = RankingWidget(store, "me")
    ranker.skip()
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; ␛" in shown(ranker) and "<img" not in shown(ranker)


def test_a_new_session_goes_on_where_the_last_stopped(store):
    RankingWidget(store, "me").choose(0)
    with AnnotationStore(store.path) as again:
        assert RankingWidget(again, "me").item.id == 2


def test_a_second_click_does_not_judge_the_next_item(store, monkeypatch):
    monkeypatch.setattr(widget, "MIN_CLICK_SECONDS", 60)
    ranker = RankingWidget(store, "me")
    press(ranker, "Skip")
    assert not store.rankings()
    ranker.skip()  # a program may be as fast as it likes
    assert store.progress("me") == (1, 3)


def test_no_widgets_are_left_behind(store):
    """Each costs memory in the browser, and a kilobyte in a notebook that is saved with them."""
    ranker = RankingWidget(store, "me")
    ranker.skip()
    ranker.skip()  # by now there has been a place for a third response
    alive = set(Widget.get_manager_state()["state"])
    for _ in range(5):
        ranker.undo()
        ranker.skip()
    assert set(Widget.get_manager_state()["state"]) == alive


def test_what_cannot_be_followed_is_an_error_in_one_line(store):
    with pytest.raises(UserError, match="a name has 1 to 64 printable characters"):
        RankingWidget(store, "")
    ranker = RankingWidget(store, "me")
    for index in (-1, 2):
        with pytest.raises(UserError, match=f"response is {index}; this item has 0 to 1"):
            ranker.choose(index)
    with pytest.raises(UserError, match="choose the best one first"):
        ranker.save()
    for _ in range(2):
        ranker.skip()
    with pytest.raises(UserError, match="nothing to tie with"):
        ranker.tie()
    ranker.skip()
    for method in (ranker.tie, ranker.save, ranker.skip, ranker.mark_both_bad, lambda: ranker.choose(0)):
        with pytest.raises(UserError, match="me has judged everything in "):
            method()


def test_a_button_shows_the_error_and_the_choice_outlasts_it(store, monkeypatch):
    ranker = RankingWidget(store, "me")

    def locked(verdict):
        raise StoreUnavailable("<locked>")

    with monkeypatch.context() as patch:
        patch.setattr(store, "record_verdict", locked)
        press(ranker, "Best")
    assert "&lt;locked&gt;" in shown(ranker) and not store.rankings()
    press(ranker, "Save")
    assert "locked" not in shown(ranker) and len(store.rankings()) == 1


def test_ranks():
    assert ranks_from_choices([], 2) == [1, 1]
    assert ranks_from_choices([[3], [0, 1]], 5) == [2, 2, 4, 1, 4]  # one better than 0 and 1; three better than 2 and 4


def test_it_says_in_a_line_what_it_is(store):
    assert repr(RankingWidget(store, "me")) == "RankingWidget('me'): 0 of 3 judged"
