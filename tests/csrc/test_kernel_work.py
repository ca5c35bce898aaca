"""Counting instructions of machine code, on code written by hand."""

from __future__ import annotations

import pytest

from scripts.kernel_work import instructions, work

STRAIGHT = """
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;   /* 0x0 */
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   CALL.REL.NOINC 0x80 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/                   MUFU.EX2 R1, R4 ;
        /*0050*/              @!P1 BRA 0x70 ;
        /*0060*/                   FMUL R1, R1, R1 ;
        /*0070*/                   EXIT ;
        /*0080*/                   RET.REL.NODEC R10 0x0 ;
        /*0090*/                   BRA 0x90;
"""
LOOP = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/               @P2 BRA P1, 0x50 ;
        /*0030*/               @P0 STG.E desc[UR6][R2.64], R4 ;
        /*0040*/                   BRA 0x60 ;
        /*0050*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*0060*/               @P3 BRA 0x10 ;
        /*0070*/                   EXIT ;
"""


def test_the_longest_way_without_calls() -> None:
    """LDG, BRA, MUFU, BRA, FMUL, EXIT."""
    assert work(instructions(STRAIGHT)) == (6, 1)


def test_a_loop_is_counted_once() -> None:
    """LDG, BRA, STG.128, BRA: without what comes before and behind, or is for part of a chunk."""
    assert work(instructions(LOOP)) == (4, 0)


def test_no_way() -> None:
    with pytest.raises(ValueError, match="no way through the kernel"):
        work(instructions(STRAIGHT.replace("@P0 BRA 0x40 ;", "CALL.REL.NOINC 0x80 ;")))
