"""Images to latents: VAEs and pixels, whole and broken images. Needs no network."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.models.vae import open_decoder
from semroute.pipeline.sources.images import (
    choose_buckets,
    describe_images,
    image_to_codes,
    nearest_bucket,
)
from semroute.pipeline.sources.table import Unreadable, read_samples
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_latents
from semroute.pipeline.store.verify import repair, verify
from semroute.schemas import InputError

SIZE = 64
NUM = 24


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def silent(_line):
    pass


@pytest.fixture
def folder(tmp_path):
    """Images as files, and a table of captions and their paths."""
    rng = np.random.default_rng(0)
    names = [f"{number:02d}.png" for number in range(NUM)]
    for name in names:
        (tmp_path / name).write_bytes(encoded(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)))
    table = pa.table({"text": [f"caption {number}" for number in range(NUM)], "image": names})
    pyarrow.parquet.write_table(table, tmp_path / "samples.parquet")
    return tmp_path


def encode(folder, name="latents", **options):
    options = {"shard_bytes": 8 * 3 * SIZE * SIZE, "workers": 0, "report": silent, **options}
    return encode_images(str(folder / "samples.parquet"), folder / name, **options)


def pixels_of(folder, number):
    with Image.open(folder / f"{number:02d}.png") as image:
        return np.asarray(image, np.float32).transpose(2, 0, 1) * (2 / 255) - 1


class TestAutoencoder:
    @pytest.fixture(params=["kl", "dc", "tiny", "flux2", "qwen", "wan"])
    def vae(self, request, tiny_vae):
        return tiny_vae(request.param)

    def test_stored_latents_are_those_of_the_vae(self, vae, folder):
        """Against diffusers itself, with the formulas that its pipelines use."""
        torch = pytest.importorskip("torch")
        import diffusers

        store = encode(folder, vae=str(vae))
        identity = store.manifest.identity
        assert store.is_complete
        model = getattr(diffusers, identity.vae).from_pretrained(vae).eval()
        config = model.config
        noise = np.random.default_rng(1).normal(size=(NUM, *identity.shape)).astype(np.float32)
        found, drawn = store.read(range(NUM)), store.read(range(NUM), noise)
        images = torch.from_numpy(np.stack([pixels_of(folder, n) for n in range(NUM)]))
        with torch.no_grad():
            match identity.vae:
                case "AutoencoderKL":
                    posterior = model.encode(images).latent_dist
                    draw = posterior.mean + posterior.std * torch.from_numpy(noise)
                    expected = [
                        (each - config.shift_factor) * config.scaling_factor
                        for each in (posterior.mean, draw)
                    ]
                case "AutoencoderDC":
                    expected = [model.encode(images).latent * config.scaling_factor]
                case "AutoencoderTiny":
                    expected = [model.encode(images).latents]
                case "AutoencoderKLFlux2":
                    posterior = model.encode(images).latent_dist
                    fold = diffusers.Flux2Pipeline._patchify_latents
                    draw = fold(posterior.mean) + fold(posterior.std) * torch.from_numpy(noise)
                    mean = model.bn.running_mean[:, None, None]
                    std = (model.bn.running_var + config.batch_norm_eps).sqrt()[:, None, None]
                    expected = [(each - mean) / std for each in (fold(posterior.mean), draw)]
                case _:
                    posterior = model.encode(images[:, :, None]).latent_dist
                    draw = posterior.mean[:, :, 0] + posterior.std[:, :, 0] * torch.tensor(noise)
                    mean, std = (
                        torch.tensor(value)[None, :, None, None]
                        for value in (config.latents_mean, config.latents_std)
                    )
                    expected = [(each - mean) / std for each in (posterior.mean[:, :, 0], draw)]
        scale = np.abs(expected[0].numpy()).max()
        shape = (4, SIZE // 2, SIZE // 2)
        if identity.vae == "AutoencoderKLFlux2":  # patches of 2 x 2 as channels
            shape = (16, SIZE // 4, SIZE // 4)
        assert found.shape == (NUM, *shape)
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-3 * scale)
        assert store.has_deviation == (len(expected) == 2)
        assert np.array_equal(found, drawn) == (len(expected) == 1)
        if store.has_deviation:
            np.testing.assert_allclose(drawn, expected[1].numpy(), atol=4e-3 * np.abs(drawn).max())

    def test_what_is_decoded_is_what_diffusers_decodes(self, vae, folder):
        torch = pytest.importorskip("torch")
        import diffusers

        store = encode(folder, vae=str(vae), limit=3)
        identity = store.manifest.identity
        images = open_decoder(identity, str(vae))(store.read([0, 1, 2]))
        assert images.shape == (3, SIZE, SIZE, 3)
        assert images.dtype == np.uint8
        model = getattr(diffusers, identity.vae).from_pretrained(vae).eval()
        codes = torch.from_numpy(store.arrays["mean"].array[:3].astype(np.float32))
        film = identity.vae in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
        if identity.vae == "AutoencoderKLFlux2":
            codes = diffusers.Flux2Pipeline._unpatchify_latents(codes)
        with torch.no_grad():
            decoded = model.decode(codes[:, :, None] if film else codes).sample
        decoded = decoded.reshape(3, 3, SIZE, SIZE).permute(0, 2, 3, 1).numpy()
        expected = ((decoded + 1) * 127.5).round().clip(0, 255)
        assert np.abs(images - expected).max() <= 1

    def test_ideogram_counts_the_pixels_of_a_patch_before_channels(self, tiny_pipeline, folder):
        """In the VAE's statistics too; its pipeline decodes latents [n, tokens, C]."""
        torch = pytest.importorskip("torch")
        import diffusers

        pipeline = tiny_pipeline("ideogram4")
        store = encode(folder, vae=str(pipeline), limit=3)
        vae = diffusers.AutoencoderKLFlux2.from_pretrained(pipeline / "vae").eval()
        latents = torch.from_numpy(store.read([0, 1, 2])).flatten(2).mT
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        side = SIZE // 4
        patches = (latents * std + vae.bn.running_mean).view(3, side, side, 2, 2, 4)
        found = patches.permute(0, 5, 1, 3, 2, 4).reshape(3, 4, 2 * side, 2 * side)
        images = torch.from_numpy(np.stack([pixels_of(folder, n) for n in range(3)]))
        with torch.no_grad():
            expected = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        decoded = open_decoder(store.manifest.identity, str(pipeline))(store.read([0, 1, 2]))
        with torch.no_grad():
            again = vae.decode(expected).sample.permute(0, 2, 3, 1).numpy()
        assert np.abs(decoded - ((again + 1) * 127.5).clip(0, 255)).max() <= 2

    def test_a_run_that_was_stopped_gives_the_same_bytes(self, tiny_vae, folder):
        vae = str(tiny_vae("kl"))
        whole, parts = encode(folder, "whole", vae=vae), encode(folder, "parts", vae=vae)
        assert whole.manifest.layout.num_shards > 2
        parts.reopen([0, 2])
        (parts.path / "latents.zarr/mean/c/2/0/0/0").unlink()
        encode(folder, "parts", vae=vae)
        for file in whole.path.glob("latents.zarr/*/c/*/*/*/*"):
            assert file.read_bytes() == (parts.path / file.relative_to(whole.path)).read_bytes()

    def test_a_folder_that_holds_a_vae_is_that_vae(self, tiny_vae, folder):
        (folder / "pipeline").mkdir()
        (folder / "pipeline" / "vae").symlink_to(tiny_vae("kl"))
        store = encode(folder, vae=str(folder / "pipeline"))
        encode(folder, vae=str(tiny_vae("kl")))  # the same by its files
        assert set(store.manifest.identity.files) == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
        }
        assert verify(store.path).problems == []
        assert "AutoencoderKL" in str(inspect(store.path))

    def test_another_vae_is_refused(self, tiny_vae, folder):
        from semroute.pipeline.models.vae import open_decoder

        store = encode(folder, vae=str(tiny_vae("kl")))
        with pytest.raises(StoreError, match=r"made differently.*\n(.*\n)*.*identity\.vae"):
            encode(folder, vae=str(tiny_vae("tiny")))
        with pytest.raises(InputError, match=r"is not the VAE of these latents.*\n.*files\."):
            open_decoder(store.manifest.identity, str(tiny_vae("wan")))

    def test_what_is_no_vae_is_named(self, tiny_llm, folder):
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            encode(folder, vae="nothing")
        with pytest.raises(InputError, match=r"names the class None; expected one of Auto"):
            encode(folder, vae=str(tiny_llm))
        with pytest.raises(InputError, match=r"no config\.json in this folder, nor in vae/"):
            encode(folder, vae=str(folder))

    def test_a_size_that_the_vae_does_not_tile_is_refused(self, tiny_vae, folder):
        with pytest.raises(InputError, match=r"of 2 x 2 pixels, and images are 63 x 63.*--size"):
            encode(folder, vae=str(tiny_vae("kl")), size=63)


class TestBrokenImages:
    @pytest.fixture
    def lacking(self, folder):
        """One image is missing, one is cut short, one is text."""
        (folder / "03.png").unlink()
        whole = (folder / "05.png").read_bytes()
        (folder / "05.png").write_bytes(whole[: len(whole) // 2])
        (folder / "20.png").write_text("not found")
        return folder

    def test_all_others_are_written_and_these_are_named(self, lacking):
        with pytest.raises(StoreError, match=r"3 of 24 images.*quarantine") as error:
            encode(lacking)
        for text in (r"sample 3: no such file: 03.png", r"sample 5: ", r"sample 20: .*no image"):
            assert re.search(text, str(error.value))
        store = open_latents(lacking / "latents", complete=False)
        assert not store.is_complete
        assert [*store.broken()] == [3, 5, 20]
        assert [q.entries for q in store.quarantined().values()] == [[3, 5], [20]]
        good = [n for n in range(NUM) if n not in (3, 5, 20)]
        np.testing.assert_allclose(
            store.read(good), np.stack([pixels_of(lacking, n) for n in good]), atol=1e-6
        )
        found = inspect(store.path)
        assert "3 images cannot be read" in str(found)
        assert verify(store.path).problems == []
        with pytest.raises(StoreError, match="is not finished"):
            open_latents(store.path)

    def test_mended_images_are_taken_up(self, lacking, folder):
        with pytest.raises(StoreError, match="3 of 24 images"):
            encode(lacking)
        for name in ("03.png", "05.png", "20.png"):
            (lacking / name).write_bytes((lacking / "00.png").read_bytes())
        store = encode(lacking)
        assert store.is_complete
        assert store.quarantined() == {}
        assert np.array_equal(store.read([3, 5, 20]), store.read([0, 0, 0]))
        assert store.ids.tolist() == list(range(NUM))

    def test_another_image_that_changed_is_refused(self, lacking):
        with pytest.raises(StoreError, match="3 of 24 images"):
            encode(lacking)
        (lacking / "04.png").write_bytes((lacking / "00.png").read_bytes())
        with pytest.raises(StoreError, match=r"identity\.images"):
            encode(lacking)

    def test_they_can_be_dropped_and_that_is_shown(self, lacking):
        lines = []
        store = encode(lacking, broken="skip", report=lines.append)
        assert any("3 of 24 samples are dropped" in line for line in lines)
        store = open_latents(store.path)
        assert store.manifest.identity.dropped == [3, 5, 20]
        assert store.ids.tolist() == [n for n in range(NUM) if n not in (3, 5, 20)]
        assert "24, 3 of them dropped" in str(inspect(store.path))
        assert inspect(store.path).details["manifest"]["identity"]["dropped"] == [3, 5, 20]
        with pytest.raises(StoreError, match=r"sample 5 has no latent.*LatentStore\.ids"):
            store.read([4, 5])
        assert verify(store.path).problems == []
        encode(lacking, broken="skip")  # nothing is left to do

    def test_dropping_what_is_written_encodes_nothing_again(self, lacking):
        with pytest.raises(StoreError, match="3 of 24 images"):
            encode(lacking)
        store = open_latents(lacking / "latents", complete=False)
        before = store.receipts()
        assert encode(lacking, broken="skip").receipts() == before

    def test_a_list_of_dropped_that_was_changed_is_found(self, lacking):
        store = encode(lacking, broken="skip")
        manifest = store.path / "manifest.json"
        manifest.write_text(manifest.read_text().replace("   5,\n", ""))
        assert [p.what for p in verify(store.path).problems] == [
            "drops 2 samples; receipts say that 3 have no latent"
        ]

    def test_a_broken_image_does_not_change_the_others(self, tiny_vae, folder):
        vae = str(tiny_vae("kl"))
        whole = encode(folder, "whole", vae=vae)
        (folder / "05.png").unlink()
        lacking = encode(folder, "lacking", vae=vae, broken="skip")
        assert np.array_equal(lacking.read(lacking.ids), whole.read(lacking.ids))

    def test_a_table_without_any_readable_image_is_refused(self, folder):
        for file in folder.glob("*.png"):
            file.unlink()
        with pytest.raises(InputError, match=r"none of 24 images can be read:\n  row 0: no such"):
            encode(folder)

    @pytest.mark.parametrize("column", [[None, "00.png"], ["", "00.png"]])
    def test_a_row_without_an_image_is_broken_too(self, folder, column):
        pyarrow.parquet.write_table(pa.table({"image": column}), folder / "samples.parquet")
        files = read_samples(str(folder / "samples.parquet"), need="image").image_files()
        found = describe_images(files, "table", None)
        assert found.broken == {0: "the row names no image"}
        assert found.digests[0] is None


class TestGrowing:
    def test_old_shards_stay_and_new_samples_come_after_them(self, folder):
        whole = encode(folder, "whole")
        encode(folder, limit=10)
        before = {f: f.read_bytes() for f in (folder / "latents").glob("latents.zarr/*/c/*/*/*/*")}
        receipts = open_latents(folder / "latents").receipts()
        lines = []
        encode(folder, limit=17, report=lines.append)
        assert "7 new samples in" in lines[1]
        store = encode(folder)
        assert [len(store), store.is_complete] == [NUM, True]
        assert np.array_equal(store.read(range(NUM)), whole.read(range(NUM)))
        assert {f: f.read_bytes() for f in before} == before
        assert {shard: store.receipts()[shard] for shard in receipts} == receipts
        assert [each.samples.num_samples for each in store.manifest.grown_from] == [10, 17]
        assert (np.diff(store.rows) > 0).all()
        assert store.rows[10] == len(receipts) * store.manifest.layout.rows_per_shard
        assert verify(store.path).problems == verify(store.path).warnings == []
        again = encode(folder)  # nothing is left to do
        assert again.manifest == store.manifest

    def test_what_could_not_be_read_stays_out(self, folder):
        for name in ("03.png", "05.png", "20.png"):
            (folder / name).unlink()
        encode(folder, limit=10, broken="skip")
        store = encode(folder, broken="skip")
        assert store.manifest.identity.dropped == [3, 5, 20]
        assert verify(store.path).problems == []
        whole = encode(folder, "whole", broken="skip")
        assert np.array_equal(store.read(store.ids), whole.read(whole.ids))

    def test_rows_that_are_not_as_they_were_are_refused(self, folder):
        encode(folder, limit=10)
        with pytest.raises(StoreError, match=r"9 rows were asked for, but .* holds 10 samples"):
            encode(folder, limit=9)
        with pytest.raises(StoreError, match=r"was made differently(.|\n)*identity\.shape"):
            encode(folder, size=SIZE // 2)
        (folder / "04.png").write_bytes((folder / "00.png").read_bytes())
        with pytest.raises(StoreError, match="the image of row 4, counted from 0, is not the one"):
            encode(folder)
        assert len(open_latents(folder / "latents")) == 10

    def test_a_store_of_an_early_version_has_its_rows_in_order(self, folder):
        store = encode(folder)
        table = pyarrow.parquet.read_table(store.path / "samples.parquet").drop_columns(
            ["row", "bucket"]
        )
        pyarrow.parquet.write_table(table, store.path / "samples.parquet")
        (store.path / "checksums.json").unlink()
        for path in (store.path / "receipts").iterdir():  # which were not sealed then
            receipt = json.loads(path.read_text())
            path.write_text(json.dumps({**receipt, "sha256": ""}))
        early = open_latents(store.path)
        assert np.array_equal(early.read([5, 20]), store.read([5, 20]))


SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472
704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
1024x1024"""


class TestBuckets:
    @pytest.fixture
    def photos(self, folder):
        """Images of several sizes: wide, tall, square, one of each ratio in between."""
        rng = np.random.default_rng(1)
        for number in range(NUM):
            height, width = rng.integers(40, 160, 2)
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            (folder / f"{number:02d}.png").write_bytes(encoded(pixels))
        return folder

    def test_shapes_are_those_that_others_train_on(self):
        pairs = [tuple(map(int, name.split("x"))) for name in SDXL.split()]
        known = {*pairs, *(pair[::-1] for pair in pairs)}
        found = choose_buckets(1024, 64)
        assert found[0] == (1024, 1024)
        assert len(found) == len(set(found)) == 33
        assert set(found) <= known
        assert all(h * w <= 1024 * 1024 and {h % 64, w % 64} == {0} for h, w in found)
        with pytest.raises(InputError, match="--size 1000 is not a multiple of the step"):
            choose_buckets(1000, 64)

    @settings(max_examples=50)
    @given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1))
    def test_an_image_goes_to_the_nearest_ratio(self, sizes):
        buckets = choose_buckets(512, 64)
        for (height, width), number in zip(
            sizes, nearest_bucket(np.array(sizes), buckets), strict=True
        ):
            away = [abs(np.log(height / width * w / h)) for h, w in buckets]
            assert away[number] == pytest.approx(min(away), abs=1e-8)

    @pytest.mark.parametrize("vae", ["pixels", "kl"])
    def test_each_latent_is_that_of_its_shape_alone(self, photos, vae, tiny_vae):
        vae = vae if vae == "pixels" else str(tiny_vae(vae))
        store = encode(photos, vae=vae, size=64, buckets=16)
        shapes = choose_buckets(64, 16)
        assert store.is_complete
        assert len(np.unique(store.buckets)) > 3
        assert sum(store.bucket_counts().values()) == NUM
        for bucket in np.unique(store.buckets):
            ids = np.flatnonzero(store.buckets == bucket)
            latents = store.read(ids)
            assert latents.shape[1:] == store.shape(bucket)
            if vae == "pixels":
                files = [(photos / f"{n:02d}.png").read_bytes() for n in ids]
                codes = np.stack([image_to_codes(file, shapes[bucket]) for file in files])
                np.testing.assert_allclose(latents, codes * (2 / 255) - 1, atol=1e-6)
            else:
                assert latents.shape[2:] == tuple(side // 2 for side in shapes[bucket])
                noise = np.ones_like(latents)
                assert not np.array_equal(store.read(ids, noise), latents)
        with pytest.raises(StoreError, match=r"shapes asked for at once.*LatentStore\.buckets"):
            store.read(range(NUM))
        found = inspect(store.path)
        assert found.details["buckets"] == store.bucket_counts()
        assert "buckets have samples" in str(found)
        assert verify(store.path).problems == verify(store.path).warnings == []
        assert encode(photos, vae=vae, size=64, buckets=16).manifest == store.manifest

    def test_they_grow_and_are_mended_shard_by_shard(self, photos):
        how = {"size": 64, "buckets": 16}
        whole = encode(photos, "whole", **how)
        encode(photos, limit=10, **how)
        before = {f: f.read_bytes() for f in (photos / "latents").glob("latents.zarr/*/c/*/*/*/*")}
        store = encode(photos, **how)
        assert {f: f.read_bytes() for f in before} == before
        for number in range(NUM):
            assert np.array_equal(store.read([number]), whole.read([number]))
        assert verify(store.path).problems == []
        victim = sorted((photos / "latents").glob("latents.zarr/*/c/*/*/*/*"))[-1]
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
        found = verify(store.path)
        assert found.bad_shards == [int(victim.parts[-4])]
        repair(found)
        encode(photos, **how)
        assert verify(store.path).problems == []

    def test_broken_images_are_listed_by_their_sample(self, photos):
        for name in ("03.png", "20.png"):
            (photos / name).write_bytes(b"no image")
        store = encode(photos, size=64, buckets=16, broken="skip")
        assert store.manifest.identity.dropped == [3, 20]
        assert store.ids.tolist() == [n for n in range(NUM) if n not in (3, 20)]

    def test_what_does_not_fit_is_refused(self, photos):
        with pytest.raises(InputError, match="name it with --size"):
            encode(photos, buckets=16)
        encode(photos, size=64, buckets=16)
        with pytest.raises(StoreError, match="was made differently"):
            encode(photos, size=64)


class TestPixels:
    def test_transparent_is_white(self):
        pixels = np.zeros((4, 4, 4), np.uint8)  # black, and nothing of it to be seen
        pixels[0, 0] = 255, 0, 0, 255
        codes = image_to_codes(encoded(pixels), (4, 4))
        assert codes[:, 0, 0].tolist() == [255, 0, 0]
        assert (codes[:, 1:] == 255).all()

    def test_images_stand_upright(self):
        pixels = np.zeros((4, 8, 3), np.uint8)
        pixels[:, :4] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        file = encoded(pixels, "JPEG", exif=exif, quality=100)
        assert describe_images([file], "table", None).size == (8, 4)
        codes = image_to_codes(file, (8, 4))
        assert codes[:, :4].min() > 200
        assert codes[:, 4:].max() < 50

    def test_what_8_bits_do_not_hold_is_refused(self):
        file = encoded(np.full((4, 4), 40_000, np.uint16))
        assert "expected 8 bits per channel" in image_to_codes(file, (4, 4)).reason

    def test_sizes_that_differ_need_a_size(self):
        files = [encoded(np.zeros((size, 4, 3), np.uint8)) for size in (4, 5)]
        with pytest.raises(InputError, match=r"2 sizes \(row 0 is 4 x 4, row 1 is 4 x 5\).*--size"):
            describe_images(files, "table", None)
        assert describe_images([Unreadable("gone"), *files], "table", 4).size == (4, 4)
        assert image_to_codes(files[1], (4, 4)).shape == (3, 4, 4)
