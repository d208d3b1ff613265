"""struct ublk_params, read back at the offsets of linux/ublk_cmd.h, and the kernel's own checks."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmount.ublk.params import Params

MiB = 1 << 20
READ_ONLY, ROTATIONAL, VOLATILE_CACHE, FUA = 1, 2, 4, 8
BASIC, DISCARD, DMA_ALIGN = 1, 2, 16


def unpack(raw):
    length, types = struct.unpack_from("=II", raw, 0)
    assert length == len(raw) == 116  # up to and with dma, which every kernel since 6.15 knows
    keys = [
        "attrs",
        "logical",
        "physical",
        "io_opt",
        "io_min",
        "max_sectors",
        "chunk",
        "sectors",
        "boundary",
    ]
    found = dict(zip(keys, struct.unpack_from("=IBBBBIIQQ", raw, 8), strict=True))
    keys = ["alignment", "granularity", "max_discard", "max_zeroes", "segments"]
    found.update(zip(keys, struct.unpack_from("=IIIIH", raw, 40), strict=True))
    found["dma"] = struct.unpack_from("=I", raw, 108)[0]
    found["types"] = types
    assert raw[60:108] == bytes(48)  # devt and zoned
    return found


def test_a_qcow2_disk():
    found = unpack(Params(10 << 30, cluster_size=65536, discard=True).pack())
    assert found == {
        "types": BASIC | DISCARD | DMA_ALIGN,
        "attrs": VOLATILE_CACHE | FUA,
        "logical": 9,
        "physical": 12,
        "io_opt": 16,
        "io_min": 12,
        "max_sectors": 2048,
        "chunk": 0,
        "sectors": 20 << 20,
        "boundary": 0,
        "alignment": 0,
        "granularity": 65536,
        "max_discard": 1 << 21,
        "max_zeroes": 1 << 21,
        "segments": 1,
        "dma": 511,
    }


def test_optimal_size_stops_at_a_megabyte_because_the_kernel_reads_ahead_twice_that():
    assert unpack(Params(1 << 40, cluster_size=32 * MiB).pack())["io_opt"] == 20


def test_cluster_smaller_than_a_physical_sector():
    found = unpack(Params(MiB, cluster_size=512, discard=True).pack())
    assert (found["io_min"], found["io_opt"], found["granularity"]) == (12, 12, 512)


def test_sectors_of_4096_bytes_are_counted_in_512():
    found = unpack(Params(MiB, sector_size=4096).pack())
    assert (found["logical"], found["physical"], found["sectors"]) == (12, 12, 2048)


def test_read_only_disk_is_told_nothing_about_writing():
    found = unpack(Params(MiB, read_only=True, discard=True).pack())
    assert found["attrs"] == READ_ONLY
    assert found["types"] == BASIC | DMA_ALIGN
    assert (found["granularity"], found["max_zeroes"]) == (0, 0)


def test_writethrough_has_no_cache_to_flush():
    assert unpack(Params(MiB, volatile_cache=False).pack())["attrs"] == 0


def test_zeroes_are_taken_where_discards_are_not():
    found = unpack(Params(MiB).pack())
    assert (found["max_discard"], found["max_zeroes"]) == (0, 1 << 21)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 1000}, "size 1000 is not a multiple"),
        ({"size": 512, "sector_size": 4096}, "size 512 is not a multiple"),
        ({"size": MiB, "sector_size": 8192}, "sector size 8192"),
        ({"size": MiB, "cluster_size": 3000}, "cluster size 3000"),
    ],
)
def test_refuses(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        Params(**wrong).pack()


@given(
    sectors=st.integers(1, 1 << 50),
    sector_size=st.sampled_from([512, 4096]),
    physical=st.sampled_from([512, 4096, 65536]),
    cluster=st.integers(9, 40).map(lambda shift: 1 << shift),
    read_only=st.booleans(),
    discard=st.booleans(),
)
def test_the_kernel_takes_it(sectors, sector_size, physical, cluster, read_only, discard):
    """The conditions of ublk_validate_params(), 7.2."""
    params = Params(
        sectors * sector_size,
        sector_size=sector_size,
        physical_sector_size=physical,
        cluster_size=cluster,
        read_only=read_only,
        discard=discard,
    )
    found = unpack(params.pack())
    assert 9 <= found["logical"] <= 12
    assert found["logical"] <= found["physical"]
    assert max(found["physical"], found["io_min"], found["io_opt"]) <= 28
    assert 8 <= found["max_sectors"] <= params.max_io >> 9
    if found["types"] & DISCARD:
        assert found["granularity"]
        assert found["granularity"] & (found["granularity"] - 1) == 0
        assert found["segments"] == 1
    assert (found["dma"] + 1) & found["dma"] == 0
    assert found["dma"] < 4096
    assert bool(found["attrs"] & READ_ONLY) == read_only
