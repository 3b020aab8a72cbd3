"""What the writer of media files writes is read, and nothing else is: foreign bytes meet this reader before any key."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship_agent.contract import media as md
from lightship_agent.contract.codes import MediaError
from lightship_agent.contract.ustar import BLOCK, END, header, padding

SHA = "ab" * 32
MEMBERS = {
    "metadata/1.root.json": b"root 1",
    "metadata/10.root.json": b"root 10",
    "metadata/3.targets.json": b"targets",
    "metadata/timestamp.json": b"timestamp",
    "assignments/press-1.json": b"envelope 1",
    "assignments/press-2.json": b"envelope 2",
    f"targets/{SHA}": b"z" * 1_300,
}


def written(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    writer = md.MediaWriter(out)
    for name in sorted(members, key=md.member_order):
        writer.add(name, len(members[name]), [members[name]])
    writer.finish()
    return out.getvalue()


def member(name: str, body: bytes) -> bytes:
    """A member as it lies in the file, whatever its name."""
    return header(name, len(body)) + body + bytes(padding(len(body)))


def archive(*members: bytes) -> bytes:
    """A file of such members after a proper beginning."""
    return member(md.FORMAT_MEMBER, md.FORMAT) + b"".join(members) + END


def contents(data: bytes) -> dict[str, bytes]:
    file = io.BytesIO(data)
    index = md.read_index(file)
    return {name: md.read_member(file, index, name, len(data)) for name in index.entries if name != md.FORMAT_MEMBER}


def refused(data: bytes) -> str:
    with pytest.raises(MediaError) as caught:
        md.read_index(io.BytesIO(data))
    return caught.value.code


WHOLE = written(MEMBERS)
STAMP = member(md.TIMESTAMP, b"t")


def test_what_was_written_is_read() -> None:
    assert contents(WHOLE) == MEMBERS


def test_the_devices_are_known_by_the_names_of_their_envelopes() -> None:
    assert md.read_index(io.BytesIO(WHOLE)).devices == ("press-1", "press-2")


def test_the_same_members_give_the_same_bytes_and_the_size_is_known_before() -> None:
    assert written(dict(reversed(MEMBERS.items()))) == WHOLE
    assert md.media_size(map(len, MEMBERS.values())) == len(WHOLE)


def test_any_tar_can_list_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        assert [m.name for m in tar] == [md.FORMAT_MEMBER, *sorted(MEMBERS, key=md.member_order)]


def test_a_large_member_is_read_piece_by_piece() -> None:
    body = bytes(range(256)) * 10_000
    file = io.BytesIO(written({md.TIMESTAMP: b"t", f"targets/{SHA}": body}))
    index = md.read_index(file)

    chunks = list(md.read_chunks(file, index.entries[f"targets/{SHA}"]))

    assert max(map(len, chunks)) == 1 << 20
    assert b"".join(chunks) == body


class Counting(io.BytesIO):
    """Counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_the_index_reads_headers_and_padding_and_no_member() -> None:
    file = Counting(written({md.TIMESTAMP: b"t", f"targets/{SHA}": bytes(5 << 20)}))

    md.read_index(file)

    assert file.taken < 8 * BLOCK


@pytest.mark.parametrize("cut", [600, 1_024, 1_500, len(WHOLE) - 1_024, len(WHOLE) - 513, len(WHOLE) - 1])
def test_a_file_that_was_not_copied_whole_says_so(cut: int) -> None:
    assert refused(WHOLE[:cut]) == "media.truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"MZ" + bytes(2_000),
        b"\x28\xb5\x2f\xfd" + bytes(600),
        WHOLE[:300],
        WHOLE[BLOCK * 2 :],
        member("manifest.json", b"{}") + END,
        WHOLE + b"\0",
        WHOLE + b"more",
    ],
)
def test_what_is_not_a_media_file_is_not_taken_for_one(data: bytes) -> None:
    assert refused(data) == "media.malformed"


@pytest.mark.parametrize("found", [b"2\n", b"1", b"", b"1\n\n"])
def test_another_format_is_named(found: bytes) -> None:
    assert refused(member(md.FORMAT_MEMBER, found) + STAMP + END) == "media.format"


@pytest.mark.parametrize(
    "name",
    [
        "../etc/passwd", "/etc/passwd", "metadata/../x.json", "metadata/0.root.json", "metadata/01.root.json",
        "metadata/root.json", "metadata/1.ROOT.json", "metadata/1.root.json/", "metadata/1.a.b.json", "metadata",
        "assignments/Press.json", "assignments/p.json", "assignments/press-1", "assignments/press-1.json.exe",
        "targets/ab", f"targets/{'AB' * 32}", f"targets/{SHA}0", f"targets/sub/{SHA}", "x", "", " ", "\nmetadata",
        "lightship-media2",
    ],
)  # fmt: skip
def test_no_other_name_is_read_or_written(name: str) -> None:
    assert refused(archive(member(name, b"x"), STAMP)) == "media.malformed"
    with pytest.raises(MediaError, match="not a member"):
        written({name: b"x"})


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"x", b"g", b"L", b"\0"])
def test_links_folders_devices_and_extensions_are_refused(kind: bytes) -> None:
    block = bytearray(header("assignments/press-1.json", 0))
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)

    assert refused(archive(STAMP, bytes(block))) == "media.malformed"


@pytest.mark.parametrize(
    "members",
    [
        [STAMP, STAMP],
        [member("assignments/press-1.json", b"a"), STAMP],
        [member(md.FORMAT_MEMBER, md.FORMAT), STAMP],
        [STAMP, member("assignments/press-2.json", b"a"), member("assignments/press-1.json", b"a")],
        [STAMP, member(f"targets/{SHA}", b"a"), member(f"targets/{SHA}", b"b")],
    ],
)
def test_an_order_or_a_double_that_the_writer_would_not_write_is_refused(members: list[bytes]) -> None:
    assert refused(archive(*members)) == "media.malformed"


def test_padding_hides_nothing() -> None:
    at = WHOLE.index(b"envelope 1") + len(b"envelope 1") + 3

    assert refused(WHOLE[:at] + b"\x01" + WHOLE[at + 1 :]) == "media.malformed"


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("metadata/timestamp.json", md.MAX_METADATA + 1),
        ("assignments/press-1.json", 16 * 1024 + 1),
        (f"targets/{SHA}", md.MAX_TRANSPORT + 1),
        (f"targets/{SHA}", 0o77777777777),
    ],
)
def test_a_size_beyond_its_bound_is_refused_before_it_is_read(name: str, length: int) -> None:
    file = Counting(member(md.FORMAT_MEMBER, md.FORMAT) + header(name, length) + bytes(4_096))

    with pytest.raises(MediaError) as caught:
        md.read_index(file)

    assert (caught.value.code, file.taken <= 4 * BLOCK) == ("media.too-large", True)


def test_more_members_than_any_export_has_are_refused() -> None:
    many = [member(f"targets/{i:064x}", b"") for i in range(md.KINDS[3].most + 1)]

    assert refused(archive(STAMP, *many)) == "media.too-large"
    with pytest.raises(MediaError, match="at most"):
        written({md.TIMESTAMP: b"", **{f"targets/{i:064x}": b"" for i in range(md.KINDS[3].most + 1)}})


def test_a_length_that_is_no_number_is_refused() -> None:
    block = bytearray(header("assignments/press-1.json", 5))
    block[124:135] = b"-0000000005"

    assert refused(archive(STAMP, bytes(block) + bytes(BLOCK))) == "media.malformed"


def test_a_file_without_a_timestamp_has_nothing_to_say() -> None:
    assert refused(archive(member("assignments/press-1.json", b"a"))) == "media.incomplete"


def test_a_member_larger_than_its_reader_expects_is_refused() -> None:
    file = io.BytesIO(WHOLE)
    index = md.read_index(file)

    with pytest.raises(MediaError) as large:
        md.read_member(file, index, "assignments/press-1.json", 5)
    with pytest.raises(MediaError) as absent:
        md.read_member(file, index, "assignments/press-3.json", 5)

    assert (large.value.code, absent.value.code) == ("media.too-large", "media.incomplete")


@pytest.mark.parametrize("chunks", [[], [b"12345"], [b"1234567"], [b"123", b"4567"]])
def test_a_writer_that_was_promised_another_length_says_so(chunks: list[bytes]) -> None:
    writer = md.MediaWriter(io.BytesIO())

    with pytest.raises(MediaError, match="announced"):
        writer.add(md.TIMESTAMP, 6, chunks)


def test_a_writer_keeps_the_order() -> None:
    writer = md.MediaWriter(io.BytesIO())
    writer.add("assignments/press-2.json", 1, [b"a"])

    for name in ("assignments/press-1.json", "assignments/press-2.json", md.TIMESTAMP):
        with pytest.raises(MediaError, match="too late"):
            writer.add(name, 1, [b"a"])


# Any bytes ------------------------------------------------------------------------------------------------------------


def strictly(data: bytes) -> None:
    """Either the reader refuses with a code of its family, or the writer writes the same bytes of what was read."""
    try:
        found = contents(data)
    except MediaError:
        return
    assert written(found) == data


@given(st.binary(max_size=4_000))
def test_any_bytes_are_refused_with_a_code(data: bytes) -> None:
    strictly(data)


@given(st.binary(max_size=4_000))
def test_any_bytes_after_a_proper_beginning_are_refused_with_a_code(data: bytes) -> None:
    strictly(member(md.FORMAT_MEMBER, md.FORMAT) + data)


@settings(max_examples=1_000)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_bytes_are_refused_or_are_another_file_that_the_writer_writes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    strictly(bytes(data))


pieces = st.sampled_from([*(member(n, b) for n, b in MEMBERS.items()), STAMP, END, bytes(BLOCK), b"\0", b"junk"])
edits: dict[str, Callable[[bytes], bytes]] = {
    "all": lambda d: d,
    "cut": lambda d: d[:-1],
    "half": lambda d: d[: len(d) // 2],
}


@settings(max_examples=1_000)
@given(st.lists(pieces, max_size=8), st.sampled_from(sorted(edits)))
def test_members_in_any_order_are_refused_or_are_what_the_writer_writes(parts: list[bytes], edit: str) -> None:
    strictly(edits[edit](member(md.FORMAT_MEMBER, md.FORMAT) + b"".join(parts)))


@given(
    st.dictionaries(
        st.from_regex(r"assignments/[a-z0-9][a-z0-9-]{1,62}\.json|targets/[0-9a-f]{64}", fullmatch=True).filter(
            lambda n: "\n" not in n
        ),
        st.binary(max_size=1_100),
        max_size=6,
    )
)
def test_whatever_is_written_is_read(members: dict[str, bytes]) -> None:
    whole = {**members, md.TIMESTAMP: b"t"}

    assert contents(written(whole)) == whole
