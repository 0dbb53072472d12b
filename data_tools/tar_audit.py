"""Auditing tars that no manifest lists: of another program, or of a sharding that was broken off.

They are read as `dpal shard` would read them (data_tools/sources/tar_members.py).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from data_tools.audit import Finding, audit_each, shortened
from data_tools.decode import decode_rgb
from data_tools.image_header import read_header
from data_tools.shard import IMAGE_EXTENSIONS
from data_tools.sources.tar_members import Member, tar_members
from data_tools.sources.whole_files import OpenFile, open_whole
from data_tools.storage import SourceStore
from data_tools.tar import MAX_MEMBER_BYTES
from dpal.base.errors import DataError
from dpal.base.inputs import Data

MEND_TAR = "make it again from its source"
MEND_IMAGE = "nothing needs to be done before `dpal shard`: it leaves the image out and lists it"


class Tars(NamedTuple):
    """What a folder of tars holds, and what is wrong with it.

    Attributes:
        num_members: regular files in all tars, up to where one is damaged.
        num_images: those that are called images.
        left_out: members that are passed over, by reason.
        findings: damaged tars, and images without a valid header.
    """

    num_members: int
    num_images: int
    left_out: Counter[str]
    findings: list[Finding]


def audit_tars(store: SourceStore, names: Sequence[str], *, decode: bool = False) -> Tars:
    """Read every header of the tars `names`, and that of every image in them.

    Args:
        decode: decode every image as well.
    """
    told: dict[str, Tars] = {}

    def audit(name: str) -> list[Finding]:
        told[name] = _audit_tar(store, name, decode)
        return told[name].findings

    findings = audit_each(names, audit, store)
    members = sum(one.num_members for one in told.values())
    images = sum(one.num_images for one in told.values())
    left_out = sum((one.left_out for one in told.values()), Counter[str]())
    return Tars(members, images, left_out, findings)


def _audit_tar(store: SourceStore, name: str, decode: bool) -> Tars:
    members = num_images = 0
    left_out, findings = Counter[str](), list[Finding]()
    try:
        tar = open_whole(store, name)
        for member in tar_members(tar, f"{store.url}/{name}", left_out):
            members += 1
            if member.name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                continue
            num_images += 1
            problem = _problem(tar, member, decode)
            if problem:
                findings.append(Finding(f"{name}#{member.name}", problem, MEND_IMAGE))
    except DataError as error:
        findings.append(Finding(name, str(error), MEND_TAR))
    return Tars(members, num_images, left_out, shortened(findings, name))


def _problem(tar: OpenFile, member: Member, decode: bool) -> str:
    if member.size > MAX_MEMBER_BYTES:
        return f"image has {member.size} bytes, accepted are {MAX_MEMBER_BYTES}"
    try:
        data = tar.read(member.offset, member.size)
        if decode:
            decode_rgb(data, Data.model_fields["max_pixels"].default)
        else:
            read_header(data)
    except DataError as error:
        return str(error)
    return ""
