"""Ranks that agree, wait and stop; ranks are threads here, and a store in memory joins them."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from semroute.schemas import CheckpointState, InputError, WindowState
from semroute.trainer.runs.checkpoint import (
    DamagedError,
    TensorReader,
    latest_checkpoint,
    list_checkpoints,
)
from semroute.trainer.training import agreement, ranks, saver
from semroute.trainer.training.agreement import check_shared, prepare_together
from semroute.trainer.training.ranks import Ranks, RankStopped
from semroute.trainer.training.saver import Saver
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(agreement, "SEE_SECONDS", 0.3)


def as_ranks(num, function):
    """What ``function(ranks)`` returns on each rank, or raises."""
    store = torch.distributed.HashStore()

    def run(rank):
        own = Ranks(rank, num, store)
        try:
            return function(own)
        except Exception as error:
            return error
        finally:
            own.close()

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(run, range(num)))


class TestRanks:
    def test_gather_gives_all_ranks_all_texts_each_time(self):
        def speak(own):
            return [own.gather(f"{own.rank}{turn}") for turn in "ab"]

        expected = [["0a", "1a", "2a"], ["0b", "1b", "2b"]]
        assert as_ranks(3, speak) == [expected] * 3

    def test_one_process_waits_for_nobody(self):
        assert Ranks().gather("alone") == ["alone"]
        Ranks().wait()

    def test_one_that_stops_ends_the_others_wait_with_its_message(self):
        def work(own):
            if own.rank == 1:
                own.stop(InputError("the disk of node1 is full"))
                return "stopped"
            own.wait()
            return "went on"

        first, second, third = as_ranks(3, work)
        assert second == "stopped"
        for found in (first, third):
            assert isinstance(found, RankStopped)
            assert "rank 1 on " in str(found)
            assert str(found).endswith("stopped: the disk of node1 is full")

    def test_a_collective_that_fails_is_blamed_on_the_rank_that_stopped(self):
        def work(own):
            if own.rank == 0:
                own.stop(FloatingPointError("loss nan"))
            else:
                own.stop(RuntimeError("Connection closed by peer"))

        _, second = as_ranks(2, work)
        assert isinstance(second, RankStopped)
        assert "FloatingPointError: loss nan" in str(second)

    def test_a_rank_that_hangs_is_ended(self, monkeypatch, capfd):
        ended, released = [], threading.Event()

        def end(code):
            ended.append(code)
            released.set()

        monkeypatch.setattr(ranks.os, "_exit", end)
        monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)

        def work(own):
            if own.rank == 1:
                own.stop(InputError("no such file"))
            else:
                assert released.wait(10)  # as in a collective

        as_ranks(2, work)
        assert ended == [1]
        assert "Error: rank 1 on " in capfd.readouterr().err


class TestAgreement:
    @pytest.fixture
    def prepared(self, monkeypatch):
        """Each rank opens what its own thread is configured for; networks stay out of it."""
        lock, real = threading.Lock(), agreement.prepare

        def prepare(config, **options):
            with lock:
                return real(config, **options)

        monkeypatch.setattr(agreement, "prepare", prepare)

        def run(*configs, resume_from="newest"):
            def on_rank(own):
                config = configs[own.rank]
                return prepare_together(own, config, resume_from, lambda _line: None)

            return as_ranks(len(configs), on_rank)

        return run

    def test_equal_ranks_agree_and_only_the_first_has_weights(self, prepared, configure, tmp_path):
        first, second = prepared(*[configure(tmp_path / "run")] * 2)
        assert not any(p.is_meta for p in first[0].model.parameters())
        assert all(p.is_meta for p in second[0].model.parameters())
        assert not any(b.is_meta for b in second[0].model.buffers())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"checkpoint_every": 7}, "checkpoint_every: 7 instead of 5000"),
            ({"seed": 1}, "seed: 1 instead of 0"),
            ({"data": {"prefetch": 1}}, "data.prefetch: 1 instead of 4"),
            ({"steps": 5}, "steps: 5 instead of 4"),
            ({"features": "/nowhere"}, "rank 0 on .* finds what it needs\n.*rank 1 on .* /nowhere"),
        ],
    )
    def test_another_configuration_or_store_is_refused(
        self, prepared, configure, tmp_path, changes, message
    ):
        configs = [configure(tmp_path / "run", **each) for each in ({}, changes)]
        for found in prepared(*configs):
            assert isinstance(found, InputError)
            with pytest.raises(InputError, match=message):
                raise found

    def test_another_run_or_step_is_refused(self, prepared, configure, tmp_path):
        configs = [configure(tmp_path / name) for name in ("run", "other", "new")]
        for config in configs[:2]:
            train(config.model_copy(update={"steps": 2}), progress=False)
        for found in prepared(*configs):
            with pytest.raises(InputError, match=r"rank 2 on .* finds no run in .*/new") as error:
                raise found
            assert str(error.value).count("at step 2 in") == 2

    def test_a_folder_that_is_not_shared_is_refused_with_what_is_there(self, tmp_path):
        folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own", tmp_path / "none"]
        for folder in folders[:3]:
            folder.mkdir(exist_ok=True)
        for found in as_ranks(4, lambda own: check_shared(own, folders[own.rank])):
            assert isinstance(found, InputError)
            text = str(found)
            assert f"finds {tmp_path}/shared, the folder of rank 0" in text
            assert "ranks 0, 1 on" in text
            assert f"finds {tmp_path}/own, an empty folder" in text
            assert f"finds {tmp_path}/none, which does not exist" in text
            assert "a file system that all nodes share" in text
        assert [*(tmp_path / "shared").iterdir()] == []

    def test_a_shared_folder_is_not(self, tmp_path):
        assert as_ranks(3, lambda own: check_shared(own, tmp_path)) == [None] * 3
        assert [*tmp_path.iterdir()] == []


def kinds(value):
    generator = torch.Generator().manual_seed(value)
    sizes = {"a": (5, 3), "b": (2,), "c": (), "d": (7, 2)}
    model = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    ema = {name: tensor / 2 for name, tensor in model.items()}
    optimizer = {f"{name}/step": torch.tensor(3.0) for name in sizes}
    return {"model": model, "ema": ema, "optimizer": optimizer}


def state_of(step, num_ranks):
    window = WindowState(losses=[0.1], norms=[2.0])
    return CheckpointState(step=step, window=window, num_ranks=num_ranks)


class TestSaver:
    @pytest.mark.parametrize("num", [1, 2, 5])
    def test_parts_make_the_whole(self, tmp_path, num):
        def save(own):
            writer = Saver(tmp_path, own, keep=2)
            for step in (1, 2, 3):
                writer.save(state_of(step, num), kinds(step))
            writer.wait()

        assert as_ranks(num, save) == [None] * num
        assert [each.step for each in list_checkpoints(tmp_path)] == [2, 3]
        assert {p.suffix for p in (tmp_path / "checkpoints").iterdir()} == {""}
        found = latest_checkpoint(tmp_path)
        found.verify()
        assert found.state() == state_of(3, num)
        for kind, tensors in kinds(3).items():
            read = getattr(found, kind)()
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        sizes = [file.stat().st_size for file in found.path.glob("model*")]
        assert len(sizes) == num

    def test_what_changes_after_the_copy_is_not_written(self, tmp_path, monkeypatch):
        begun, go = threading.Event(), threading.Event()
        real = saver.write_part

        def slow(*arguments):
            begun.set()
            assert go.wait(10)
            return real(*arguments)

        monkeypatch.setattr(saver, "write_part", slow)
        writer, tensors = Saver(tmp_path, Ranks(), keep=1), kinds(1)
        writer.save(state_of(1, 1), tensors)
        assert begun.wait(10)
        tensors["model"]["a"].zero_()  # a step of training
        assert latest_checkpoint(tmp_path) is None
        assert writer.pause_seconds < 1
        go.set()
        writer.wait()
        assert torch.equal(latest_checkpoint(tmp_path).model()["a"], kinds(1)["model"]["a"])

    def test_a_full_disk_ends_all_ranks(self, tmp_path, monkeypatch):
        real = saver.write_part

        def full(folder, parts, rank, num):
            if rank == 1:
                raise OSError(28, "No space left on device")
            return real(folder, parts, rank, num)

        monkeypatch.setattr(saver, "write_part", full)

        def save(own):
            writer = Saver(tmp_path, own, keep=2)
            writer.save(state_of(1, 2), kinds(1))
            try:
                writer.wait()
            except OSError as error:
                own.stop(error)
                raise

        first, second = as_ranks(2, save)
        assert isinstance(second, OSError)
        assert isinstance(first, RankStopped)
        assert "No space left on device" in str(first)
        assert latest_checkpoint(tmp_path) is None


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        def save(own):
            writer = Saver(tmp_path, own, keep=2)
            writer.save(state_of(1, 2), kinds(1))
            writer.wait()

        as_ranks(2, save)
        return latest_checkpoint(tmp_path)

    def test_every_file_is_checked(self, checkpoint):
        for file in sorted(checkpoint.path.iterdir()):
            content = file.read_bytes()
            flipped = bytearray(content)
            flipped[-2] ^= 1
            for damaged in (None, content[: len(content) // 2], bytes(flipped), b"", b"\xff{"):
                file.unlink()
                if damaged is not None:
                    file.write_bytes(damaged)
                with pytest.raises(DamagedError, match="step-00000001 is damaged: ") as error:
                    checkpoint.verify()
                assert "\n" not in str(error.value) or file.suffix == ".json"
                kind = file.name.partition("-")[0]
                if file.suffix == ".safetensors":
                    with pytest.raises(DamagedError):
                        checkpoint.open(kind)
                file.write_bytes(content)
        checkpoint.verify()

    @pytest.mark.parametrize("starts", [(0, 3), (1, 2), (0, 1), (0, 2, 4)])
    def test_pieces_that_do_not_make_up_a_tensor_are_refused(self, tmp_path, starts):
        files = []
        for start in starts:
            files.append(tmp_path / f"{start}.safetensors")
            cuts = {"tensors": {"a": {"shape": [4, 2], "dim": 0, "start": start}}}
            save_file({"a": torch.zeros(2, 2)}, files[-1], {"cuts": json.dumps(cuts)})
        with pytest.raises(InputError, match="pieces of a"):
            TensorReader(files)

    def test_rows_are_read_from_the_pieces_that_hold_them(self, tmp_path):
        whole, files = torch.arange(30.0).reshape(10, 3), []
        for start, stop in ((0, 4), (4, 8), (8, 10)):
            files.append(tmp_path / f"{start}.safetensors")
            cuts = {"tensors": {"a": {"shape": [10, 3], "dim": 0, "start": start}}}
            save_file({"a": whole[start:stop].clone()}, files[-1], {"cuts": json.dumps(cuts)})
        reader = TensorReader(files[::-1])
        for start in range(11):
            for stop in range(start, 11):
                assert torch.equal(reader.read("a", (0, start, stop)), whole[start:stop])
        assert torch.equal(reader.read("a", (1, 1, 3)), whole[:, 1:3])
        assert torch.equal(reader.read("a"), whole)
