"""The committed hashes of GPU pages are what the CPU's kernels and the reference produce."""

import functools

import golden_cases
import oracle

from kvq_plugin import ops, reference
from kvq_plugin.layout import CPU_V1, GPU_V1

CASES = list(golden_cases.cases())


def different(store, kind, cases=CASES) -> list[str]:
    hashes = golden_cases.golden()
    return [
        case.name
        for case in cases
        if golden_cases.digest(golden_cases.stored(case, store, kind)) != hashes[case.name]
    ]


def test_every_case_has_a_hash_of_its_own():
    hashes = golden_cases.golden()
    assert list(hashes) == [case.name for case in CASES]
    assert len(set(hashes.values())) == len(hashes)


def test_the_cpu_produces_the_hashes():
    """On the best instruction set; test_store.py holds all of them to the same bytes."""
    assert different(ops.store, CPU_V1) == []


@oracle.single_threaded
def test_the_reference_produces_the_hashes():
    """In GPU layout at once, where the CPU's pages are repacked."""
    assert different(functools.partial(reference.store, layout=GPU_V1), GPU_V1) == []


def test_one_wrong_bit_shows():
    def store(*args):
        ops.store(*args)
        args[2][0, 0, 3, 5] ^= 1

    assert len(different(store, CPU_V1, CASES[:3])) == 3
