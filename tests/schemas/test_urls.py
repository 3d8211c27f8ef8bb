import pytest

from semroute.pipeline.sources.places import SUFFIXES, expand
from semroute.schemas import InputError
from semroute.schemas.urls import check_protocol, suffix_of, without_query


@pytest.mark.parametrize(
    ("source", "suffix"),
    [
        ("a.csv", ".csv"),
        ("A.CSV", ".csv"),
        ("https://host/a.parquet?X-Amz-Signature=a.b/c", ".parquet"),
        ("https://host/a.jsonl#part", ".jsonl"),
        ("https://host/get?file=a.tsv", ".tsv"),
        ("simplecache::https://host/a.txt?sig=x", ".txt"),
        ("s3://bucket/x-0?.tar", ".tar"),
        ("what?.csv", ".csv"),
        ("https://host/a?b=c", ""),
    ],
)
def test_the_suffix_of_a_url_is_before_its_query(source, suffix):
    assert suffix_of(source, SUFFIXES) == suffix


def test_tars_by_signed_urls_are_no_patterns():
    url = "https://host/x-{0..1}.tar?sig={a,b}*"
    assert expand(url) == [f"https://host/x-{n}.tar?sig={{a,b}}*" for n in (0, 1)]
    two = "https://h/a.tar?s=1::https://h/b.tar?s=2"
    assert expand(two) == two.split("::")


def test_paths_have_no_query():
    assert without_query("what?#.csv") == "what?#.csv"
    assert without_query("https://h/a?b#c") == "https://h/a"


@pytest.mark.parametrize("url", ["foo://a/b.csv", "simplecache::foo://a", "s4://bucket/a"])
def test_an_unknown_protocol_is_refused(url):
    with pytest.raises(InputError, match="Protocol not known"):
        check_protocol(url)
    check_protocol("file:///a")
    check_protocol("foo.csv")
