"""The checksum: known values, and every single flipped bit is seen."""

from outgrow.memory.checksum import checksum


def test_known_values() -> None:
    assert checksum(b"") == 0x2D06800538D394C2
    assert checksum(b"outgrow") == checksum(memoryview(bytearray(b"outgrow"))) != checksum(b"outgrov")


def test_every_flipped_bit_changes_it() -> None:
    data = bytearray(range(64))
    good = checksum(data)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum(data) != good
        data[bit // 8] ^= 1 << bit % 8
    assert checksum(data) == good
