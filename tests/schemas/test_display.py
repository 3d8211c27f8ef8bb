from semroute.schemas import Summary
from semroute.schemas.display import Table

ROWS = [["arm", "score", "note"], ["depth & time", "0.5", "**best**"], ["a", "0.25", ""]]


def test_a_summary_says_the_same_in_text_and_html():
    facts = Summary("A <store>", {"bytes": "1 & 2", "state": "complete"})
    assert str(facts) == "A <store>\n  bytes  1 & 2\n  state  complete"
    html = facts._repr_html_()
    assert "A &lt;store&gt;" in html
    assert "1 &amp; 2" in html
    assert html.count("<tr>") == 2


def test_a_table_is_aligned_in_text():
    assert str(Table(ROWS)).splitlines() == [
        "arm           score      note",
        "depth & time    0.5  **best**",
        "a              0.25",
    ]
    assert str(Table(ROWS, num_words=0)).splitlines()[0] == "         arm  score      note"
    assert str(Table(ROWS, num_words=3)).splitlines()[2] == "a             0.25"


def test_a_table_is_escaped_in_html_but_not_in_markdown():
    assert Table(ROWS[:2]).to_html() == (
        "<table><tr><th>arm</th><th>score</th><th>note</th></tr>"
        "<tr><td>depth &amp; time</td><td>0.5</td><td>**best**</td></tr></table>"
    )
    assert Table(ROWS[:2]).to_markdown() == [
        "| arm | score | note |",
        "| --- | --- | --- |",
        "| depth & time | 0.5 | **best** |",
    ]
