import numpy as np
import pytest
import torch

from semroute.schemas.seeds import (
    Purpose,
    UnnumberedPurpose,
    as_uniform,
    numpy_generator,
    philox,
    seed_sequence,
    torch_generator,
)

KEYS = {
    Purpose.PERMUTATION: (7, 0, 3),
    Purpose.CHOICE: (7, 1, 3),
    Purpose.NOISE: (7, 2, 3),
    Purpose.POSTERIOR: (7, 3, 3),
    Purpose.T_JITTER: (7, 4, 3),
    Purpose.HELD_OUT: (7, 6, 3),
    Purpose.VALIDATION_NOISE: (7, 7, 3),
    Purpose.SHARD_ORDER: (7, 8, 3),
    Purpose.MIXTURE: (7, 9, 3),
    Purpose.SHAPES: (7, 10, 3),
    Purpose.T: (7, 11, 3),
    Purpose.GAUSSIAN: (7, 12, 3),
    Purpose.CODEC_FIT: (7, 13, 3),
    **dict.fromkeys(UnnumberedPurpose, (7, 3)),
}
"""What the first release used: runs and stores depend on these."""


def state(key):
    return np.random.SeedSequence(key).generate_state(4).tolist()


@pytest.mark.parametrize("purpose", [*Purpose, *UnnumberedPurpose])
def test_keys_are_those_of_the_first_release(purpose):
    assert seed_sequence(7, purpose, 3).generate_state(4).tolist() == state(KEYS[purpose])


def test_numbers_are_used_once():
    assert [*Purpose.__members__] == [purpose.name for purpose in Purpose]  # no aliases


def test_generators_are_functions_of_the_key():
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence((7, 2, 3)))).random(4)
    assert numpy_generator(7, Purpose.NOISE, 3).random(4).tolist() == expected.tolist()
    first = torch_generator(7, Purpose.NOISE, 3), torch_generator(7, Purpose.NOISE, 3)
    assert torch.equal(*(torch.rand(4, generator=each) for each in first))
    other = torch.rand(4, generator=torch_generator(7, Purpose.NOISE, 4))
    assert not torch.equal(torch.rand(4, generator=torch_generator(7, Purpose.NOISE, 3)), other)


@pytest.mark.parametrize("seed", [0, 3, 2**33 + 1, 2**70])
def test_captions_are_ordered_by_pcg64(seed):
    purpose = UnnumberedPurpose.CAPTION_ORDER
    first, second = numpy_generator(seed, purpose), numpy_generator(seed, purpose, 4)
    expected = [np.random.Generator(np.random.PCG64(key)) for key in (seed, [seed, 4])]
    for found, reference in zip((first, second), expected, strict=True):
        assert found.permutation(20).tolist() == reference.permutation(20).tolist()


def test_any_position_is_reached_at_once():
    words = philox(7, Purpose.CHOICE).random_raw(40).reshape(-1, 4)
    assert philox(7, Purpose.CHOICE).advance(6).random_raw(4).tolist() == words[6].tolist()


def test_bits_become_numbers_from_zero_to_one():
    found = as_uniform(np.array([0, 2**63, 2**64 - 1], np.uint64)).tolist()
    assert found == [0.0, 0.5, 1 - 2**-53]
