import io
import json
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.sources.places import expand
from semroute.pipeline.sources.table import read_samples
from semroute.pipeline.store.documents import StoreError
from semroute.schemas import InputError


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write(path, files):
    """A tar of (name, content)."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def shard(numbers):
    return [
        file
        for n in numbers
        for file in ((f"d/{n:03d}.png", png(n)), (f"d/{n:03d}.txt", f"caption {n}\n"))
    ]


@pytest.fixture
def pattern(tmp_path):
    """Two tars of three samples each."""
    for number in range(2):
        write(tmp_path / f"s-{number:02d}.tar", shard(range(3 * number, 3 * number + 3)))
    return tmp_path / "s-{00..01}.tar"


def test_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{b,a}{0..1}") == ["b0", "b1", "a0", "a1"]
    assert expand("plain.tar") == ["plain.tar"]
    assert expand("a.tar::s-{0..1}.tar::b.tar") == ["a.tar", "s-0.tar", "s-1.tar", "b.tar"]
    assert expand("{a,b}.tar::{c.tar,d.tar}") == ["a.tar", "b.tar", "c.tar", "d.tar"]


@pytest.mark.parametrize(
    "url", ["simplecache::s3://x/a.tar", "tar://a.tar::b.tar", "zip://a.tar::simplecache::b.tar"]
)
def test_urls_that_fsspec_chains_are_one_tar(url):
    assert expand(url) == [url]
    assert expand(f"{url}::{url}") == [url, url]


def test_a_list_of_tars_is_read_in_its_order(pattern):
    paths = [str(pattern.with_name(f"s-{number:02d}.tar")) for number in (1, 0)]
    samples = read_samples("::".join(paths), need="text")
    assert samples.texts().to_pylist() == [[f"caption {n}"] for n in (3, 4, 5, 0, 1, 2)]
    assert next(samples.image_files()) == png(3)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_captions(tmp_path, end, bom):
    document = json.dumps({"caption": "a cat\n"}) + end
    files = [("0.txt", bom + f" a\ncat {end}".encode()), ("0.json", bom + document.encode())]
    path = write(tmp_path / "a.tar", files)
    assert read_samples(path, need="text").texts().to_pylist() == [[" a\ncat "]]
    of_json = read_samples(path, text_column="caption", need="text")
    assert of_json.texts().to_pylist() == [["a cat\n"]]


@pytest.mark.parametrize("other", ["1", "true", '["a"]', '{"a": 1}'])
def test_a_value_of_another_type_is_named(tmp_path, other):
    contents = ['{"caption": null}', '{"caption": "a"}', f'{{"caption": {other}}}']
    files = [(f"{number}.json", content) for number, content in enumerate(contents)]
    match = r"a\.tar: row 2 \(counted from 0\): 2\.json: 'caption' is "
    with pytest.raises(InputError, match=match):
        read_samples(write(tmp_path / "a.tar", files), need="text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"caption": "a \\ud83d"}', "'caption' has half a surrogate pair"),
        ('{"caption": ["\\ude00"]}', "'caption' has half a surrogate pair"),
        ('{"caption": "a", "caption": "b"}', "the object has the key 'caption' twice"),
        (b'{"caption": "caf\xe9"}', "is not UTF-8"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_what_a_json_cannot_hold_names_tar_and_row(tmp_path, content, message):
    files = [("a.json", '{"caption": null}'), ("b.json", content)]
    match = rf"a\.tar: row 1 \(counted from 0\): b\.json:? {message}"
    with pytest.raises(InputError, match=match):
        read_samples(write(tmp_path / "a.tar", files), need="text")


@pytest.mark.parametrize("name", ["s-{00..01}.tar", "s-*.tar", "{s-00,s-01}.tar", "s-0?.tar"])
def test_samples_of_several_tars_come_in_order(pattern, name):
    samples = read_samples(str(pattern.with_name(name)), need="text")
    assert samples.texts().to_pylist() == [[f"caption {n}"] for n in range(6)]
    assert [*samples.image_files()] == [png(n) for n in range(6)]
    assert samples.image_names()[4].as_py().endswith("s-01.tar/d/004.png")
    part = samples.slice(2, 5)
    assert [*part.image_files()] == [png(n) for n in (2, 3, 4)]
    assert len(read_samples(str(pattern.with_name(name)), need="text", limit=4)) == 4


def test_urls_may_have_patterns(pattern):
    for file in pattern.parent.glob("*.tar"):
        with fsspec.open(f"memory://tars/{file.name}", "wb") as target:
            target.write(file.read_bytes())
    samples = read_samples("memory://tars/s-*.tar", need="text")
    assert len(samples) == 6
    assert [*samples.image_files()][5] == png(5)


def test_files_of_a_sample_need_not_be_neighbours(tmp_path):
    names = [*shard(range(3))[::2], *shard(range(3))[1::2], ("._000.png", b""), ("README", b"")]
    samples = read_samples(write(tmp_path / "a.tar", names), need="text")
    assert samples.texts().to_pylist() == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert [*samples.image_files()] == [png(n) for n in range(3)]


def test_captions_from_json(tmp_path):
    files = [
        *((f"{n}.JPG", png(n)) for n in range(2)),
        *((f"{n}.json", json.dumps({"caption": f"c{n}", "alt": ["x", "y"]})) for n in range(2)),
    ]
    path = write(tmp_path / "a.tar", files)
    assert read_samples(path, need="text").texts().to_pylist() == [["c0"], ["c1"]]
    alternatives = read_samples(path, need="text", text_column="alt")
    assert alternatives.texts().to_pylist() == [["x", "y"]] * 2
    assert [*alternatives.image_files()] == [png(0), png(1)]
    with pytest.raises(InputError, match=r"no column 'title'; its columns are .*caption"):
        read_samples(path, need="text", text_column="title")


def test_what_is_missing_is_named(tmp_path):
    files = [("0.jpg", png(0)), ("1.jpg", png(1)), ("1.txt", "one"), ("2.txt", "two")]
    path = write(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match=r"1 of 3 rows have an empty caption.*rows 0"):
        read_samples(path, need="text")
    samples = read_samples(path, blank="null", need="text")
    assert [*samples.image_files()][2].reason == "the row names no image"


def test_what_is_no_tar_is_named(tmp_path, pattern):
    with pytest.raises(InputError, match="nothing matches"):
        read_samples(str(tmp_path / "no-*.tar"), need="text")
    with pytest.raises(InputError, match=r"no such file: .*s-02\.tar"):
        read_samples(str(tmp_path / "s-{00..02}.tar"), need="text")
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"b\.tar is not a readable tar"):
        read_samples(str(tmp_path / "b.tar"), need="text")
    with pytest.raises(InputError, match=r"has no samples; expected files such as 000\.jpg"):
        read_samples(write(tmp_path / "c.tar", [("README", "text")]), need="text")
    with pytest.raises(InputError, match=r"holds 0\.txt twice"):
        read_samples(write(tmp_path / "d.tar", [("0.txt", "a"), ("0.txt", "b")]), need="text")
    with pytest.raises(InputError, match=r"0\.json is not JSON"):
        read_samples(write(tmp_path / "e.tar", [("0.json", "{")]), need="text")
    with pytest.raises(InputError, match=r"0\.txt is not UTF-8"):
        read_samples(write(tmp_path / "f.tar", [("0.txt", b"\xff")]), need="text")


def test_a_tar_that_was_cut_off_or_put_together_is_refused(tmp_path, pattern):
    """tarfile itself would take both for a shorter tar."""
    first, second = (file.read_bytes() for file in sorted(tmp_path.glob("s-*.tar")))
    for content in (first[: 512 * 5], first[: 512 * 5 + 100], first + second):
        (tmp_path / "bad.tar").write_bytes(content)
        message = r"bad\.tar is (damaged or truncated|not a readable tar)"
        with pytest.raises(InputError, match=message):
            read_samples(str(tmp_path / "bad.tar"), need="text")


def test_features_and_latents_of_the_same_tars_belong_together(pattern, tmp_path, tiny_llm):
    pytest.importorskip("torch")
    from semroute.pipeline.extraction.features import extract
    from semroute.pipeline.store.order.dataset import check_joined

    options = {"workers": 0, "report": lambda _: None}
    features = extract(str(pattern), tmp_path / "features", model=str(tiny_llm), **options)
    latents = encode_images(str(pattern), tmp_path / "latents", **options)
    check_joined(features, latents)
    assert features.captions["text"].to_pylist()[0] == ""
    assert latents.manifest.identity.samples.fingerprint is not None


def test_latents_of_tars(pattern, tmp_path):
    options = {"workers": 0, "report": lambda _: None}
    store = encode_images(str(pattern), tmp_path / "latents", **options)
    expected = np.arange(6, dtype=np.float32) * (2 / 255) - 1
    np.testing.assert_allclose(store.read(range(6))[:, 0, 0, 0], expected, atol=1e-6)
    write(tmp_path / "s-01.tar", [*shard([3, 4]), ("d/005.png", b"no"), ("d/005.txt", "c")])
    with pytest.raises(StoreError, match=r"1 of 6 images.*\n.*sample 5: .*no image of a known"):
        encode_images(str(pattern), tmp_path / "lacking", **options)
